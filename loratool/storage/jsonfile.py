"""JSON files beside the weights: config.json, adapter_config.json, the index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loratool.errors import FileError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; FileError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: not valid JSON ({error}).", "Repair or fetch it again.") from None
    if not isinstance(value, dict):
        raise FileError(f"{path}: not a JSON object.", "Repair or fetch it again.")
    return value


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
