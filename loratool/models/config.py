"""What of config.json changes with the weights: dtype, vocabulary, tying, labels and class."""

from __future__ import annotations

import re
from typing import Any


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
