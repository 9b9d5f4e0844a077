"""What training scripts save beside the factors: weights of their own, in files of their own.

Those whose meaning is known are parts of the adapter and read with it. Everything else that may
hold weights is named, so that nobody believes that it was merged.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from loratool.errors import FileError, LoraToolError, listed
from loratool.notices import Notice
from loratool.storage.filenames import (
    ADAPTER_ENTRIES,
    ADAPTER_INDICES,
    SHARD,
    TORCH_SUFFIXES,
    VALUE_HEAD,
)
from loratool.storage.folder import Folder
from loratool.storage.tensors import TensorInfo
from loratool.storage.values import same_bytes, same_sample
from loratool.storage.weights import read_contents
from loratool.words import counted

#: Whole tensors under the names that they have in the model: of LLaVA and its kin, of LongLoRA
#: (embeddings and norms), and of scripts that name the file after PEFT's option.
_TRAINED = re.compile(
    r"(non_lora_trainables|non_lora_state_dict|mm_projector|trainable_params|modules_to_save)"
    r"\.(bin|pt|pth|safetensors)"
)
#: What a training run needs to go on; no weights of the model.
_OF_A_RUN = re.compile(
    r"(training_args|optimizer|optim_states|scheduler|scaler|rng_state|random_states|"
    r"training_state|trainer_state)\b.*|.*_(optim_states|rng_state)\.pt|rng_state_.*"
)


@dataclass
class Companions:
    """`tensors` of the files `names` are parts of the adapter; `notices` name the other files."""

    names: list[str] = field(default_factory=list)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    notices: list[Notice] = field(default_factory=list)


def read_companions(
    folder: Folder, beside: str, entry: str, held: dict[str, TensorInfo], read: Collection[str]
) -> Companions:
    """What lies beside the adapter that is read from `read`, in `beside` ("", or a folder in it).

    `held` are the tensors it has. Raises FileError where a file holds one of them with another
    value, or cannot be read.
    """
    found = Companions()
    unread = []
    for name in _weights_in(folder, beside):
        leaf = name.rpartition("/")[2]
        if name in read or _OF_A_RUN.fullmatch(leaf):
            continue
        if _TRAINED.fullmatch(leaf):
            _take(found, folder, name, held)
        elif VALUE_HEAD.fullmatch(leaf):
            found.notices.append(_note_value_head(folder, name))
        elif leaf in ADAPTER_ENTRIES and "/" not in name:
            found.notices += _note_second(folder, entry, name, held)
        elif not SHARD.fullmatch(leaf) or entry not in ADAPTER_INDICES:
            unread.append(name)
    if unread:
        text = (
            f"{counted(len(unread), 'file')} beside the adapter may hold weights and "
            f"{'was' if len(unread) == 1 else 'were'} not read:\n{listed(unread)}"
        )
        found.notices.append(Notice("weights-beside", text, str(folder.path)))
    return found


def _weights_in(folder: Folder, beside: str) -> list[str]:
    prefix = f"{beside}/" if beside else ""
    return [
        name
        for name in folder.names(depth=1 if beside else 0)
        if name.startswith(prefix)
        and "/" not in name[len(prefix) :]
        and Path(name).suffix in TORCH_SUFFIXES | {".safetensors", ".npz"}
        and folder.has(name)
    ]


def _take(found: Companions, folder: Folder, name: str, held: dict[str, TensorInfo]) -> None:
    contents = read_contents(folder, name)
    if contents.top != "dict" or not contents.tensors:
        raise FileError(
            f"{folder.path / name}: trained weights beside the adapter should be here, and it "
            "holds no named tensors.",
            "Save it again, or move it away to merge without it.",
        )
    for key, info in contents.tensors.items():
        known = held.get(key) or found.tensors.get(key)
        if known is None:
            found.tensors[key] = info
            continue
        folder.fetch([name, known.file.name])
        if not same_bytes(known, info):
            raise FileError(
                f"{folder.path / name}: {key!a} is also in {known.file.name}, with other values.",
                "Keep the file that is right, and move the other one away.",
            )
    found.names.append(name)
    text = (
        f"{name} lies beside the factors; its {counted(len(contents.tensors), 'tensor', 'is')} "
        "part of the adapter."
    )
    found.notices.append(Notice("weights-read", text, name))


def _note_value_head(folder: Folder, name: str) -> Notice:
    text = (
        f"{name} holds a value head of reinforcement learning. It is no part of the language "
        "model; the file is copied beside the output."
    )
    return Notice("value-head", text, str(folder.path / name))


def _note_second(
    folder: Folder, entry: str, name: str, held: dict[str, TensorInfo]
) -> list[Notice]:
    """What to say of a second file of the same adapter; nothing where it holds the same."""
    if folder.missing([name]):
        return []  # nothing is downloaded for a comparison
    try:
        other = read_contents(folder, name).tensors
    except LoraToolError:
        other = {}
    here = all(info.file.is_file() for info in held.values())
    if other.keys() == held.keys() and (
        not here or all(same_sample(held[key], other[key]) for key in held)
    ):
        return []
    text = f"The folder also holds {name}, whose weights differ; {entry} was taken, as PEFT does."
    return [Notice("weights-differ", text, str(folder.path))]
