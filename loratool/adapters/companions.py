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
from loratool.models.carried import sentence_parts
from loratool.notices import Notice
from loratool.storage.filenames import (
    ADAPTER_ENTRIES,
    LITGPT,
    LITGPT_MERGED,
    OF_A_RUN,
    TORCHTUNE,
    VALUE_HEAD,
    WEIGHTS_SUFFIXES,
)
from loratool.storage.folder import Folder
from loratool.storage.tensors import TensorInfo
from loratool.storage.values import same_sample, same_values
from loratool.storage.weights import read_contents
from loratool.words import counted

#: Whole tensors under the names that they have in the model: of LLaVA and its kin, of LongLoRA
#: (embeddings and norms), and of scripts that name the file after PEFT's option.
_TRAINED = re.compile(
    r"(non_lora_trainables|non_lora_state_dict|mm_projector|trainable_params|modules_to_save)"
    r"\.(bin|pt|pth|safetensors)"
)
#: Folders of the modules around a sentence encoder, which modules.json names.
_SENTENCE_PART = re.compile(r"\d+_[A-Z]\w*")


@dataclass
class Companions:
    """`tensors` of the files `names` are parts of the adapter; `notices` name the other files."""

    names: list[str] = field(default_factory=list)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    notices: list[Notice] = field(default_factory=list)


def is_companion(name: str) -> bool:
    """Whether a file lies beside an adapter and is none, by its name."""
    return any(pattern.fullmatch(name) for pattern in (_TRAINED, VALUE_HEAD, OF_A_RUN))


def read_companions(
    folder: Folder, entry: str, held: dict[str, TensorInfo], read: Collection[str]
) -> Companions:
    """What lies in `folder` beside the adapter that is read from the files `read`.

    `held` are the tensors it has. Raises FileError where a file holds one of them with another
    value, or cannot be read.
    """
    found = Companions()
    unread = []
    for name in _weights_in(folder):
        if name in read or OF_A_RUN.fullmatch(name):
            continue
        if _of_the_same(entry, name):
            continue
        if _TRAINED.fullmatch(name):
            _take(found, folder, name, held)
        elif VALUE_HEAD.fullmatch(name):
            found.notices += _note_value_head(folder, name)
        elif name in ADAPTER_ENTRIES:
            found.notices += _note_second(folder, entry, name, held)
        else:
            unread.append(name)
    if unread:
        text = (
            f"{counted(len(unread), 'file', 'was')} not read that may hold weights of the adapter:"
            f"\n{listed(unread)}"
        )
        found.notices.append(Notice("weights-beside", text, str(folder.path)))
    return found


def _of_the_same(entry: str, name: str) -> bool:
    """Whether a file is made of the adapter in `entry`: what litgpt merged, torchtune's export."""
    return (entry, name) == (LITGPT, LITGPT_MERGED) or (
        TORCHTUNE.fullmatch(entry) is not None and name in ADAPTER_ENTRIES
    )


def _weights_in(folder: Folder) -> list[str]:
    """The weights files of a folder, and those of sentence modules that modules.json forgot."""
    named = sentence_parts(folder)
    return [
        name
        for name in folder.names(depth=1)
        if Path(name).suffix in WEIGHTS_SUFFIXES
        and ("/" not in name or _forgotten(name.partition("/")[0], named))
        and folder.has(name)
    ]


def _forgotten(part: str, named: Collection[str]) -> bool:
    return _SENTENCE_PART.fullmatch(part) is not None and part not in named


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
        if not same_values(known, info):
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


def _note_value_head(folder: Folder, name: str) -> list[Notice]:
    """It is copied as it is; nothing but its names and shapes is looked at."""
    text = (
        f"{name} holds a value head of reinforcement learning. It is no part of the language "
        "model; a merge copies the file."
    )
    notices = [Notice("value-head", text, str(folder.path / name))]
    try:
        tensors = read_contents(folder, name).tensors
    except FileError:
        return notices
    empty = [key for key, info in tensors.items() if not info.numel]
    if empty:
        text = (
            f"{name}: {empty[0]} is empty, a placeholder as DeepSpeed ZeRO-3 or FSDP leave it when "
            "shards were not gathered before saving. Save again from the training run"
        )
        notices.append(Notice("zero3-placeholder", text, name, refused=True))
    return notices


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
