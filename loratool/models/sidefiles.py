"""What a model directory holds beside its weights: config, tokenizer, everything else.

The base's files are copied, an adapter's tokenizer takes the place of the base's, and config.json
is changed where the weights changed. Left out, and said so: weights in other formats (they are of
the unmerged model), hidden files, and the model card, which describes the base.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.errors import FileError, UsageError, explained_os_errors
from loratool.models.carried import missing_parts, sentence_modules, sentence_parts, value_heads
from loratool.models.checkpoint import Checkpoint
from loratool.models.config import Rewriting, updated_config
from loratool.models.tokenizers import (
    Tokenizer,
    broken_parts,
    common_files,
    files_beside,
    is_beside_tokenizer,
    is_part_of_tokenizer,
    stray_parts,
    tokenizer_files,
)
from loratool.notices import Notice
from loratool.storage.filenames import (
    ADAPTER_CONFIG,
    CONFIG,
    LEGAL,
    PARAMS,
    PROVENANCE,
    SENTENCE_FILES,
    VALUE_HEAD,
    VOCABULARY,
)
from loratool.storage.folder import Folder
from loratool.storage.jsonfile import read_json, write_json
from loratool.storage.links import copy_own, leads_out, open_own, refuse_leading_out

_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|msgpack|onnx|onnx_data|tflite|mlmodel|ot|npz)$"
    r"|\.(safetensors|bin)\.index(\.[^.]+)?\.json$"
)
#: Folders that hold the unmerged model in other formats.
_FOREIGN_FOLDERS = {"onnx", "openvino", "original", "coreml", "gguf", "tflite", "metal"}
_LEFT_AT_TOP = {"README.md", ADAPTER_CONFIG, PROVENANCE}


@dataclass
class SideFiles:
    """Which files go along: `copied` by path in the output, and the names `left_out`."""

    folder: Folder
    copied: dict[str, Path] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    notices: list[Notice] = field(default_factory=list)

    @property
    def _coming(self) -> dict[str, int]:
        """Bytes of those that are still to be downloaded, by name."""
        own = [name for name, path in self.copied.items() if path == self.folder.path / name]
        return self.folder.missing(own)

    @property
    def nbytes(self) -> int:
        coming = self._coming
        here = (path for name, path in self.copied.items() if name not in coming)
        return sum(coming.values()) + sum(path.stat().st_size for path in here)

    def leave(self, names: Sequence[str], why: str) -> None:
        """Let files of these names not go along."""
        for name in names:
            if self.copied.pop(name, None) is not None:
                self.left_out.append(f"{name} ({why})")

    def check_readable(self) -> None:
        """Raise OSError now for a file that could not be copied later."""
        coming = self._coming
        for name, path in self.copied.items():
            if name not in coming:
                open_own(path, name).close()

    def fetch(self) -> None:
        """See to it that they are on this disk."""
        self.folder.fetch(self._coming)


def side_files_of(
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[str, Folder]] = (),
    tokenizer: str | None = None,
) -> SideFiles:
    """What lies beside the weights of `checkpoint`, and what adapters (name, folder) bring.

    `tokenizer` says whose to take, "base" or "adapter"; without it an adapter's where one has one.
    Links out of their folder are left out; the config, a part of the tokenizer and what was trained
    are refused then, because a model without them is another one.

    Raises FileError for these and for a file that cannot be read, UsageError for a tokenizer that
    is not there.
    """
    names = {path.name for path in checkpoint.files}
    names |= {name for name in checkpoint.folder.names(depth=0) if name.endswith(".index.json")}
    with explained_os_errors():
        found = collect(checkpoint.folder, names, checkpoint.is_directory)
        present = [(name, folder) for name, folder in adapters if folder.is_there()]
        _settle_tokenizer(found, present, tokenizer)
        _carry_all(found, present)
        _leave_links(found)
        found.check_readable()
        checkpoint.folder.note(found.copied)
    return found


def collect(folder: Folder, weights: set[str], whole_directory: bool) -> SideFiles:
    """The side files of the base in `folder`.

    `weights` names the files the base consists of. Folders with weights of their own (checkpoints
    of a training run, adapters) are left out, but for those that modules.json names: they are parts
    of a sentence-transformers model.

    With `whole_directory` False (the base was given as one file, whose neighbours may be anything)
    only config, tokenizer and licence are taken.
    """
    found = SideFiles(folder)
    names = folder.names() if whole_directory else _plain_files(folder)
    parts = sentence_parts(folder)
    heavy = {parent for name in names if _WEIGHTS.search(name) for parent in _parents(name)}
    taken = []
    for name in names:
        shut = next((p for p in _parents(name) if _is_foreign(p, parts, heavy)), None)
        at_top, leaf = "/" not in name, name.rpartition("/")[2]
        known = is_part_of_tokenizer(name) or is_beside_tokenizer(name) or leaf in (CONFIG, PARAMS)
        if name == ".gitattributes":  # every repository of the Hub has one
            continue
        if shut is not None:
            if f"{shut}/" not in found.left_out:
                found.left_out.append(f"{shut}/")
        elif at_top and _WEIGHTS.search(name) and not VALUE_HEAD.fullmatch(name):
            if name not in weights:
                found.left_out.append(name)
        elif name == CONFIG and not folder.has(name):
            raise FileError(f"{folder.path / name}: {_why(folder, name)}.", folder.remedy)
        elif not folder.has(name):
            found.left_out.append(name if name.endswith("/") else f"{name} ({_why(folder, name)})")
        elif leaf.startswith(".") or (at_top and name in _LEFT_AT_TOP):
            found.left_out.append(name)
        elif whole_directory or known or LEGAL.fullmatch(name):
            taken.append(name)
    found.copied = {name: folder.path / name for name in taken}
    return found


def _why(folder: Folder, name: str) -> str:
    """Why there is no file of this name, though the folder lists it."""
    return "not a file" if os.path.exists(folder.path / name) else "a broken link"


def _leave_links(found: SideFiles) -> None:
    """Leave out what lies outside its folder, or refuse it where the model needs it."""
    parts = sentence_parts(found.folder)
    out = [name for name, path in found.copied.items() if leads_out(path, name)]
    refuse_leading_out({name: found.copied[name] for name in out if _is_needed(name, parts)})
    for name in out:
        path = found.copied.pop(name)
        found.left_out.append(f"{name} (a link out of the folder)")
        text = f"{name} is a link out of its folder, to {os.path.realpath(path)}: it stays there."
        found.notices.append(Notice("link-left-out", text, str(path)))


def _is_needed(name: str, parts: set[str]) -> bool:
    """Whether the model is another one without this file."""
    known = is_part_of_tokenizer(name) or is_beside_tokenizer(name) or VALUE_HEAD.fullmatch(name)
    return (
        bool(known)
        or name in (CONFIG, PARAMS, *SENTENCE_FILES)
        or any(p in parts for p in _parents(name))
    )


def _settle_tokenizer(
    found: SideFiles, adapters: Sequence[tuple[str, Folder]], choice: str | None
) -> None:
    """Decide whose tokenizer goes along, and take all of it."""
    brought = [
        (name, folder, files) for name, folder in adapters if (files := tokenizer_files(folder))
    ]
    own = {name: path for name, path in found.copied.items() if is_part_of_tokenizer(name)}
    own = own if any(map(VOCABULARY.fullmatch, own)) else {}
    if choice and not (brought if choice == "adapter" else own):
        who = "No adapter brings" if choice == "adapter" else "The base does not bring"
        raise UsageError(f"{who} a tokenizer (tokenizer.json or the like).", "Omit --tokenizer.")
    for name, folder in adapters:
        for part in broken_parts(folder):
            found.left_out.append(f"{part} of {name} ({_why(folder, part)})")
        if stray := stray_parts(folder):
            text = (
                f"{name} has {', '.join(stray)} but no vocabulary, so no tokenizer that these "
                "could belong to: they do not go along."
            )
            found.notices.append(Notice("tokenizer-part", text, str(folder.path)))
    if choice == "base" or not brought:
        if own:
            found.folder.fetch(own)
            found.tokenizer = Tokenizer("the base", own)
        return
    common = common_files([files for _, _, files in brought])
    owner, folder, files = brought[-1 if common is None else common]
    if common is None:
        text = (
            f"The adapters bring different tokenizers; that of {owner}, the last one, goes along. "
            "--tokenizer base keeps the base's."
        )
        found.notices.append(Notice("tokenizers-differ", text))
    beside = files_beside(folder)
    found.tokenizer = Tokenizer(owner, files, beside)
    replaced = [name for name in found.copied if found.tokenizer.replaces(name)]
    for name in replaced:
        del found.copied[name]
        if name not in files and name not in beside:
            found.left_out.append(f"{name} (the tokenizer is {owner}'s)")
    found.copied |= files | beside


def _carry_all(found: SideFiles, adapters: Sequence[tuple[str, Folder]]) -> None:
    """Take what adapters bring beside their weights: each sort whole, from one of them."""
    for sort in (value_heads, sentence_modules):
        brought = [(name, files) for name, folder in adapters if (files := sort(folder))]
        if not brought:
            continue
        common = common_files([files for _, files in brought])
        owner, files = brought[-1 if common is None else common]
        if common is None:
            text = (
                f"The adapters bring different files ({', '.join(sorted(files))}); those of "
                f"{owner}, the last one, go along."
            )
            found.notices.append(Notice("companions-differ", text))
        for name in set(sort(found.folder)) & found.copied.keys():
            del found.copied[name]
            if name not in files:
                found.left_out.append(f"{name} ({owner} brings its own)")
        found.copied |= files
        missing = missing_parts(files) if sort is sentence_modules else []
        if missing:
            text = f"modules.json of {owner} names {', '.join(missing)}, which it does not bring."
            found.notices.append(Notice("sentence-modules", text, owner))


def _plain_files(folder: Folder) -> list[str]:
    return [name for name in folder.names(depth=0) if not name.endswith("/")]


def _parents(name: str) -> list[str]:
    """The folders that a name lies in, the outermost first: "a/b/c" -> ["a", "a/b"]."""
    parts = name.rstrip("/").split("/")[:-1]
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def _is_foreign(place: str, parts: set[str], heavy: set[str]) -> bool:
    """Whether a folder holds something else than the model: another format, a training run."""
    name = place.rpartition("/")[2]
    other = name.startswith((".", "__")) or name.lower() in _FOREIGN_FOLDERS
    return other or (place in heavy and place not in parts)


def write_side_files(
    files: SideFiles,
    folder: Path,
    dtype: str,
    changes: dict[str, Any],
    rewriting: Rewriting | None = None,
) -> None:
    """Copy the files into `folder`; config.json is written with the output's dtype and `changes`.

    `dtype` is a torch name ("float16"), or "base" where every tensor kept its own; `rewriting` is
    what is to be said of quantisation.
    """
    for name, source in files.copied.items():
        target = folder / name
        if name == CONFIG:
            refuse_leading_out({name: source})
            config = updated_config(read_json(source), dtype, changes)
            write_json(target, rewriting.applied(config) if rewriting else config)
        elif rewriting is not None and name in rewriting.others:
            refuse_leading_out({name: source})
            write_json(target, rewriting.others[name](read_json(source)))
        else:
            copy_own(source, name, target)
