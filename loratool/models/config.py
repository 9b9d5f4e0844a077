"""config.json of a model: the types of what is read of it, and what changes with the weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from loratool.errors import BaseError
from loratool.storage.fields import ABSENT, BOOLEAN, NAMES, TABLE, TEXT, check_fields

_TIED = {"tie_word_embeddings": BOOLEAN | ABSENT}
_KIND = {"model_type": TEXT | ABSENT}
#: Of the model alone; its parts have a model_type too.
_OF_MODELS = {
    **_KIND, **_TIED, "architectures": NAMES | ABSENT, "_name_or_path": TEXT | ABSENT,
    "text_config": TABLE | ABSENT, "id2label": TABLE | ABSENT,
}  # fmt: skip


def check_model_config(config: dict[str, Any], where: object) -> None:
    """Raise BaseError for a field that is read and has a wrong type; `where` is the file.

    What transformers makes of those is mostly a crash, and sometimes another model: a text "false"
    ties the embeddings.
    """
    check_fields(config, _OF_MODELS, where, BaseError)
    check_fields(config.get("text_config") or {}, _TIED, f"{where}, text_config", BaseError)
    for key, part in parts_within(config):
        check_fields(part, _KIND, f"{where}, {key}", BaseError)


def parts_within(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The configs inside of a config, of parts of the model, however deep they lie, by their keys;
    in the order of the file."""
    waiting = list(reversed(config.items()))
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            yield key, value
            waiting += reversed([(f"{key}.{name}", inner) for name, inner in value.items()])


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
        if key in ("dtype", "torch_dtype") and not isinstance(value, dict)
        else _with_dtype(value, dtype, top=False)
        if isinstance(value, dict) and key.endswith("_config")
        else value
        for key, value in config.items()
    }
    if top and not changed.keys() & {"dtype", "torch_dtype"}:
        changed["torch_dtype"] = dtype
    return changed
