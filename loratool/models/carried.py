"""What was trained with weights and lies beside them: value heads, sentence encoders' modules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loratool.errors import FileError
from loratool.storage.fields import ABSENT, TEXT, check_fields
from loratool.storage.filenames import SENTENCE_FILES, VALUE_HEAD
from loratool.storage.folder import Folder
from loratool.storage.jsonfile import read_any_json


def carried_files(folder: Folder) -> dict[str, Path]:
    """What a folder holds that belongs beside the weights made of it, by name, fetched."""
    return value_heads(folder) | sentence_modules(folder)


def value_heads(folder: Folder) -> dict[str, Path]:
    """Files with the value head of reinforcement learning."""
    return _fetched(folder, [name for name in folder.names(depth=0) if VALUE_HEAD.fullmatch(name)])


def sentence_modules(folder: Folder) -> dict[str, Path]:
    """The modules around a sentence encoder that lies in the folder itself: its dense layers were
    trained with it, its prompts and pooling fit them. {} where the encoder lies elsewhere."""
    parts = sentence_parts(folder)
    if "" not in parts:
        return {}
    inside = [n for n in folder.names() if any(n.startswith(f"{p}/") for p in parts if p)]
    return _fetched(folder, [*SENTENCE_FILES, *inside])


def missing_parts(files: dict[str, Path]) -> list[str]:
    """The folders that a modules.json names and of which there is no file, though one is needed."""
    folder = Folder(files["modules.json"].parent)
    return [
        part
        for part, kind in _modules_of(folder).items()
        if part
        and not kind.endswith("Normalize")  # it has nothing to save
        and not any(name.startswith(f"{part}/") for name in files)
    ]


def _fetched(folder: Folder, names: Sequence[str]) -> dict[str, Path]:
    there = [name for name in names if folder.has(name)]
    folder.fetch(there)
    return {name: folder.path / name for name in there}


def sentence_parts(folder: Folder) -> set[str]:
    """The folders of a sentence-transformers model's modules ("" is the folder itself)."""
    return set(_modules_of(folder))


def _modules_of(folder: Folder) -> dict[str, str]:
    """What modules.json says: classes by folder; {} where there is none.

    Raises FileError for one that is damaged: parts of the model would be taken for something else.
    """
    if not folder.has("modules.json"):
        return {}
    folder.fetch(["modules.json"])
    path = folder.path / "modules.json"
    modules = read_any_json(path)
    whole = isinstance(modules, list) and all(isinstance(m, dict) and "path" in m for m in modules)
    if not whole:
        raise FileError(
            f"{path}: not a list of modules with their paths, as sentence-transformers writes it.",
            "Repair it, or move it away if it is of something else.",
        )
    for number, module in enumerate(modules):
        check_fields(module, {"path": TEXT, "type": TEXT | ABSENT}, f"{path}, {number}")
    return {m["path"].rstrip("/"): m.get("type") or "" for m in modules}
