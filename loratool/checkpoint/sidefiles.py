"""What a model directory holds beside its weights: config, tokenizer, everything else.

The base's files are copied, the adapter's tokenizer files lie on top, and config.json is changed
where the weights changed. Left out, and said so: weights in other formats (they are of the unmerged
model), hidden files, and the model card, which describes the base.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.checkpoint.config import read_json
from loratool.checkpoint.undo import FOLDER, UNDO

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
#: How an output came about; written by every command that makes a model.
PROVENANCE = "loratool.json"
_LEFT_AT_TOP = {"README.md", "adapter_config.json", PROVENANCE}


@dataclass
class SideFiles:
    """Which files go along: `copied` by path in the output, and the names `left_out`."""

    copied: dict[str, Path] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.copied.values())

    def check_readable(self) -> None:
        """Raise OSError now for a file that could not be copied later."""
        for path in self.copied.values():
            path.open("rb").close()


def collect(
    directory: Path, weights: set[str], adapters: list[Path], whole_directory: bool
) -> SideFiles:
    """The side files of the base in `directory`, and the tokenizers of adapter directories.

    `weights` names the files the base consists of. Folders with weights of their own (checkpoints
    of a training run, adapters) are left out, but for those that modules.json names: they are parts
    of a sentence-transformers model.

    With `whole_directory` False (the base was given as one file, whose neighbours may be anything)
    only config and tokenizer are taken.
    """
    found = SideFiles()

    def fail(error: OSError) -> None:
        raise error

    listed = _sentence_modules(directory)
    for folder, names, files in os.walk(directory, onerror=fail):
        where = Path(folder).relative_to(directory)
        if not whole_directory:
            names.clear()
        for name in sorted(names):
            foreign = name.startswith((".", "__")) or name.lower() in _FOREIGN_FOLDERS
            inside = Path(folder) / name
            unknown = str(where / name) not in listed and _has_weights(inside)
            if foreign or unknown or inside.is_symlink():
                found.left_out.append(f"{where / name}/")
        names[:] = sorted(n for n in names if f"{where / n}/" not in found.left_out)
        for name in sorted(files):
            path = Path(folder) / name
            at_top = where == Path()
            if at_top and _WEIGHTS.search(name):
                if name not in weights:
                    found.left_out.append(name)
                continue
            known = _TOKENIZER.match(name) or name in ("config.json", "generation_config.json")
            if not path.is_file():
                found.left_out.append(f"{where / name} (a broken link)")
            elif name.startswith(".") or (at_top and name in _LEFT_AT_TOP):
                found.left_out.append(str(where / name))
            elif whole_directory or known:
                found.copied[str(where / name)] = path
    for adapter in adapters:
        if adapter.is_dir():
            found.copied |= tokenizer_files(adapter)
    return found


def tokenizer_files(directory: Path) -> dict[str, Path]:
    """The files of a tokenizer in a directory, by name."""
    return {
        path.name: path
        for path in sorted(directory.iterdir())
        if path.is_file() and _TOKENIZER.match(path.name)
    }


def previous(directory: Path) -> list[Path]:
    """What a reversible merge left in a model that is now a base: how it came about itself."""
    found = [directory / PROVENANCE] if (directory / PROVENANCE).is_file() else []
    return found + ([directory / FOLDER] if (directory / FOLDER / UNDO).is_file() else [])


def _sentence_modules(directory: Path) -> set[str]:
    path = directory / "modules.json"
    try:
        modules = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        return {str(module["path"]) for module in modules}
    except (ValueError, TypeError, KeyError):
        return set()


def _has_weights(folder: Path) -> bool:
    return any(_WEIGHTS.search(p.name) for p in folder.rglob("*"))


def write_side_files(files: SideFiles, folder: Path, dtype: str, changes: dict[str, Any]) -> None:
    """Copy the files into `folder`; config.json is written with the output's dtype and `changes`.

    `dtype` is a torch name ("float16"), or "base" where every tensor kept its own.
    """
    for name, source in files.copied.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name == "config.json":
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
