"""`loratool.json`: how an output came about, and whether given adapters are those it was made from.

It holds no date and no path, so that equal inputs give equal files.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from loratool.adapter import Adapter
from loratool.plan import Plan

PROVENANCE = "loratool.json"


def describe(plan: Plan, command: str, shards: dict[str, str], result: dict[str, Any]) -> Any:
    """The document for an output made by `plan`. `shards` maps file names to their sha256."""
    import torch

    from loratool import __version__

    return {
        "schema_version": 1,
        "command": command,
        "versions": {"loratool": __version__, "torch": torch.__version__, "numpy": np.__version__},
        "options": {
            "dtype": plan.dtype,
            "weights": plan.weights,
            "allow_unmatched": plan.allow_unmatched,
        },
        "base": {
            "name": plan.base.name,
            "model_type": plan.base.model_type,
            "architectures": plan.base.config.get("architectures"),
            "tensors": len(plan.base.tensors),
            "bytes": plan.base.nbytes,
            "dtypes": sorted({t.dtype for t in plan.base.tensors.values() if t.is_float}),
            "header_sha256": plan.base.identity(),
        },
        "adapters": [
            {
                "name": adapter.name,
                "base_model_name_or_path": adapter.config.get("base_model_name_or_path"),
                "weight": weight,
                "files": adapter_files(adapter),
            }
            for adapter, weight in zip(plan.adapters, plan.weights, strict=True)
        ],
        "result": {
            "modules": plan.modules,
            "tensors": plan.counts(),
            "config_changes": plan.config_changes,
            "warnings": [n.to_dict() for n in plan.notices],
            **result,
        },
        "shards": shards,
    }


def adapter_files(adapter: Adapter) -> dict[str, str]:
    """sha256 of the adapter's weights and of its config, by file name."""
    config = adapter.weights.with_name("adapter_config.json")
    paths = [adapter.weights, *([config] if config.is_file() else [])]
    return {path.name: file_sha256(path) for path in paths}


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
