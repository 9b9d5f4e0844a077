"""One right table entry of a safetensors header and its data, to be broken in one way each."""

from __future__ import annotations

from typing import Any

#: One table entry and its data, which the cases below break in one way each.
DATA = bytes(range(24))
ENTRY: dict[str, Any] = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def entry(**changes: Any) -> dict[str, Any]:
    return {"blocks.w": {**ENTRY, **changes}}
