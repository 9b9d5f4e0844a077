"""What a model says of its quantisation: in config.json, wherever in it, or in a file beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loratool.errors import BaseError
from loratool.models.checkpoint import Checkpoint
from loratool.models.quantised.module import Quantisation
from loratool.storage.fields import value_text

#: What the table is called in config.json.
_KEYS = ("quantization_config", "compression_config")

#: Files that older versions wrote in its place, and whose they are.
BESIDE = {
    "quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt",
}  # fmt: skip


def quantisation_of(base: Checkpoint) -> Quantisation:
    """What a model says of its quantisation.

    Raises BaseError where that is no table.
    """
    found = [item for item in _tables(base.config) if item[1]]
    for path, table in found:
        if not isinstance(table, dict):
            raise BaseError(
                f"{base.label}: {'.'.join(path)} of its config.json is no table "
                f"({value_text(table)}).",
                "Repair it, or fetch it again.",
            )
    if not found:
        return _said_beside(base)
    (path, table), *others = found
    contradiction = next(
        (
            f"its config.json says {_method(table) or 'quantised'} in {'.'.join(path)}, and in "
            f"{'.'.join(other)} {_method(second) or 'quantised'}, otherwise than there"
            for other, second in others
            if second != table
        ),
        "",
    )
    return Quantisation(_method(table), table, tuple(place for place, _ in found), contradiction)


def _tables(config: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The tables of quantisation in a config and in the parts of it, with the keys that lead
    there; those of the whole model first."""
    waiting: list[tuple[tuple[str, ...], dict[str, Any]]] = [((), config)]
    for path, place in waiting:
        for key, value in place.items():
            if key in _KEYS:
                yield (*path, key), value
            elif isinstance(value, dict):
                waiting.append(((*path, key), value))


def _method(table: dict[str, Any]) -> str:
    """How the method is called, in small letters and with hyphens; "" for none that is named."""
    method = table.get("quant_method", table.get("method"))
    if method is None and (table.get("load_in_4bit") or table.get("load_in_8bit")):
        method = "bitsandbytes"
    return method.lower().replace("_", "-") if isinstance(method, str) else ""


def _said_beside(base: Checkpoint) -> Quantisation:
    """What a file beside config.json says, for want of an entry in that."""
    for name, method in BESIDE.items():
        if base.folder.has(name):
            return Quantisation(method, base.folder.json(name))
    return Quantisation()
