"""config.json of a model: the types of what is read of it."""

from __future__ import annotations

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
