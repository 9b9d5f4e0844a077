"""config.json of a model: the types of what is read of it, and what changes with the weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
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
    """config.json with the new dtype, vocabulary, tying, layers, labels and class; all else as it
    was."""
    if dtype != "base":
        config = _with_dtype(config, dtype, top=True)
    for key in ("vocab_size", "tie_word_embeddings"):
        if key in changes:
            nested = config.get("text_config")
            if isinstance(nested, dict):
                config["text_config"] = {**nested, key: changes[key]}
            if key in config or not isinstance(nested, dict) or key == "tie_word_embeddings":
                config[key] = changes[key]
    if "layers" in changes:
        config = _with_layers(config, changes["layers"])
    if "num_labels" in changes:
        count = changes["num_labels"]
        if len(config.get("id2label") or {}) != count:
            config["id2label"] = {str(i): f"LABEL_{i}" for i in range(count)}
            config["label2id"] = {f"LABEL_{i}": i for i in range(count)}
    if "architecture" in changes and config.get("architectures"):
        stem = re.sub(r"(LMHeadModel|Model|For[A-Z]\w*)$", "", config["architectures"][0])
        config["architectures"] = [stem + changes["architecture"]]
    return config


@dataclass(frozen=True)
class Rewriting:
    """What a model's files must say differently of its quantisation.

    The table in config.json at each of `places`, given by the keys that lead there, becomes
    `table`, or goes where that is None; files of other names become what `others` makes of them,
    and those of `without` do not go along.
    """

    places: tuple[tuple[str, ...], ...]
    table: dict[str, Any] | None
    others: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]] = field(default_factory=dict)
    without: tuple[str, ...] = ()

    def applied(self, config: dict[str, Any]) -> dict[str, Any]:
        """config.json with the table changed."""
        for place in self.places:
            config = self._changed(config, place)
        return config

    def _changed(self, config: dict[str, Any], place: tuple[str, ...]) -> dict[str, Any]:
        key, *rest = place
        if rest:
            return {**config, key: self._changed(config[key], tuple(rest))}
        if self.table is not None:
            return {**config, key: self.table}
        return {name: value for name, value in config.items() if name != key}


#: What config.json calls the number of layers.
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
#: Lists with an entry for each layer.
_PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")
#: Rules for what such a list spells out, which goes first where it is there.
_SPELLED_OUT = {
    "max_window_layers": "layer_types", "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types", "full_attention_interval": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
}  # fmt: skip
#: How fields are called that tell layers apart by their number, and those that only sound so.
_BY_NUMBER = re.compile(
    r"layer|interval|pattern|period|offset|freq|every|first_k|sparse_step|block_type"
)
_OF_ALL = re.compile(r"layer_?norm\w*|(\w+_)?layer_?drop(out)?|(\w+_)?layer_?norm(_\w+)?")


def layer_count(config: dict[str, Any]) -> int | None:
    """The number of layers that config.json says; None where it does not."""
    found = next((config[key] for key in _COUNTS if key in config), None)
    return found if type(found) is int else None


def lists_by_layer(config: dict[str, Any]) -> set[str]:
    """The fields that are a list with an entry for each layer."""
    count = layer_count(config)
    return {k for k in _PER_LAYER if isinstance(config.get(k), list) and len(config[k]) == count}


def settings_by_layer(config: dict[str, Any]) -> list[str]:
    """The fields that make layers differ by their number, and are no list with one entry each."""
    lists = lists_by_layer(config)
    found = []
    for key, value in config.items():
        settled = key in lists or key in _COUNTS or _SPELLED_OUT.get(key) in lists
        if key == "max_window_layers" and not config.get("use_sliding_window"):
            settled = True
        if key == "decoder_sparse_step" and value == 1:
            settled = True
        if value and not settled and _BY_NUMBER.search(key) and not _OF_ALL.fullmatch(key):
            found.append(key)
    return found


def _with_layers(config: dict[str, Any], order: list[int]) -> dict[str, Any]:
    """The config of a model whose layers are those of the old one in this order."""
    changed: dict[str, Any] = {key: len(order) for key in _COUNTS if key in config}
    for key in lists_by_layer(config):
        changed[key] = [config[key][number] for number in order]
    return {**config, **changed}


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
