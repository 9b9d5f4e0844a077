"""What a model directory holds beside its weights: config, tokenizer, everything else.

The base's files are copied, the adapter's tokenizer files lie on top, and config.json is changed
where the weights changed. Left out, and said so: weights in other formats (they are of the unmerged
model), hidden files, and the model card, which describes the base.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.errors import explained_os_errors
from loratool.models.checkpoint import Checkpoint
from loratool.storage.filenames import ADAPTER_CONFIG, CONFIG, PROVENANCE
from loratool.storage.folder import Folder
from loratool.storage.jsonfile import read_json

_TOKENIZER = re.compile(
    r"(tokenizer(_config)?\.json|tokenizer\.model|special_tokens_map\.json|added_tokens\.json|"
    r"vocab\.(json|txt)|merges\.txt|spiece\.model|sentencepiece\.bpe\.model|"
    r"chat_template\.(jinja|json))$"
)
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

    def check_readable(self) -> None:
        """Raise OSError now for a file that could not be copied later."""
        coming = self._coming
        for name, path in self.copied.items():
            if name not in coming:
                path.open("rb").close()

    def fetch(self) -> None:
        """See to it that they are on this disk."""
        self.folder.fetch(self._coming)


def side_files_of(checkpoint: Checkpoint, adapters: Sequence[Folder] = ()) -> SideFiles:
    """What lies beside the weights of `checkpoint`, with the tokenizers of adapters on top.

    Raises FileError for a file that cannot be read.
    """
    names = {path.name for path in checkpoint.files}
    names |= {name for name in checkpoint.folder.names(depth=0) if name.endswith(".index.json")}
    with explained_os_errors():
        found = collect(checkpoint.folder, names, adapters, checkpoint.is_directory)
        found.check_readable()
    return found


def collect(
    folder: Folder, weights: set[str], adapters: Sequence[Folder], whole_directory: bool
) -> SideFiles:
    """The side files of the base in `folder`, and the tokenizers of adapter directories.

    `weights` names the files the base consists of. Folders with weights of their own (checkpoints
    of a training run, adapters) are left out, but for those that modules.json names: they are parts
    of a sentence-transformers model.

    With `whole_directory` False (the base was given as one file, whose neighbours may be anything)
    only config and tokenizer are taken.
    """
    found = SideFiles(folder)
    names = folder.names() if whole_directory else _plain_files(folder)
    parts = _sentence_modules(folder)
    heavy = {parent for name in names if _WEIGHTS.search(name) for parent in _parents(name)}
    taken = []
    for name in names:
        shut = next((p for p in _parents(name) if _is_foreign(p, parts, heavy)), None)
        at_top, leaf = "/" not in name, name.rpartition("/")[2]
        known = _TOKENIZER.match(leaf) or leaf in (CONFIG, "generation_config.json")
        if name == ".gitattributes":  # every repository of the Hub has one
            continue
        if shut is not None:
            if f"{shut}/" not in found.left_out:
                found.left_out.append(f"{shut}/")
        elif at_top and _WEIGHTS.search(name):
            if name not in weights:
                found.left_out.append(name)
        elif not folder.has(name):
            found.left_out.append(name if name.endswith("/") else f"{name} (a broken link)")
        elif leaf.startswith(".") or (at_top and name in _LEFT_AT_TOP):
            found.left_out.append(name)
        elif whole_directory or known:
            taken.append(name)
    found.copied = {name: folder.path / name for name in taken}
    for adapter in adapters:
        if adapter.is_there():
            found.copied |= tokenizer_files(adapter)
    return found


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


def tokenizer_files(folder: Folder) -> dict[str, Path]:
    """The files of a tokenizer in a folder, by name, fetched."""
    names = [name for name in folder.names(depth=0) if _TOKENIZER.match(name) and folder.has(name)]
    folder.fetch(names)
    return {name: folder.path / name for name in names}


def _sentence_modules(folder: Folder) -> set[str]:
    if not folder.has("modules.json"):
        return set()
    folder.fetch(["modules.json"])
    try:
        modules = json.loads((folder.path / "modules.json").read_text(encoding="utf-8"))
        return {str(module["path"]) for module in modules}
    except (ValueError, TypeError, KeyError):
        return set()


def write_side_files(files: SideFiles, folder: Path, dtype: str, changes: dict[str, Any]) -> None:
    """Copy the files into `folder`; config.json is written with the output's dtype and `changes`.

    `dtype` is a torch name ("float16"), or "base" where every tensor kept its own.
    """
    for name, source in files.copied.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name == CONFIG:
            config = updated_config(read_json(source), dtype, changes)
            text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            target.write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(source, target)


def updated_config(config: dict[str, Any], dtype: str, changes: dict[str, Any]) -> dict[str, Any]:
    """config.json with the new dtype, vocabulary, tying, labels and class; all else as it was."""
    if dtype != "base":
        config = _with_dtype(config, dtype, top=True)
    for key in ("vocab_size", "tie_word_embeddings"):
        if key in changes:
            nested = config.get("text_config")
            if isinstance(nested, dict):
                config["text_config"] = {**nested, key: changes[key]}
            if key in config or not isinstance(nested, dict) or key == "tie_word_embeddings":
                config[key] = changes[key]
    if "num_labels" in changes:
        count = changes["num_labels"]
        if len(config.get("id2label") or {}) != count:
            config["id2label"] = {str(i): f"LABEL_{i}" for i in range(count)}
            config["label2id"] = {f"LABEL_{i}": i for i in range(count)}
    if "architecture" in changes and config.get("architectures"):
        stem = re.sub(r"(LMHeadModel|Model|For[A-Z]\w*)$", "", config["architectures"][0])
        config["architectures"] = [stem + changes["architecture"]]
    return config


def _with_dtype(config: dict[str, Any], dtype: str, top: bool) -> dict[str, Any]:
    # transformers 5 writes `dtype`, 4 wrote `torch_dtype`; each reads the other's.
    changed = {
        key: dtype
        if key in ("dtype", "torch_dtype") and (value is None or isinstance(value, str))
        else _with_dtype(value, dtype, top=False)
        if isinstance(value, dict) and key.endswith("_config")
        else value
        for key, value in config.items()
    }
    if top and not changed.keys() & {"dtype", "torch_dtype"}:
        changed["torch_dtype"] = dtype
    return changed
