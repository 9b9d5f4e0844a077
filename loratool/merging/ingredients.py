"""What a merge is made of, known before it is made: runs that agree in it make the same bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loratool.merging.plan import Plan
from loratool.merging.provenance import (
    describe_adapter,
    describe_model,
    describe_options,
    versions,
)
from loratool.merging.replication import original
from loratool.storage.folder import origin_of
from loratool.storage.hashing import digest_of
from loratool.storage.stamps import stamp_of


def ingredients(plan: Plan, files: Sequence[Path] | None = None) -> dict[str, Any]:
    """Inputs, options and versions, as tables whose differences can be told to people.

    A base on this disk is known by its headers and by size and time of change of its files: to hash
    them would take as long as to merge them. One of the Hub is known by its commit. `files` are
    those that are read in place of a base's that is not there.
    """
    base = plan.base
    if files is None:
        files = [] if origin_of(base.source) else base.files
    return {
        "versions": versions("torch", "numpy"),
        "options": describe_options(plan),
        "base": describe_model(original(base)),
        "files": known_files(*files),
        "config.json of the base": _digest(base.config),
        "adapters": {
            f"{number}: {adapter.name}": describe_adapter(adapter, weight)
            for number, (adapter, weight) in enumerate(
                zip(plan.adapters, plan.weights, strict=True), 1
            )
        },
        "what is done": {
            "tensors": plan.counts(),
            "changes of config.json": _digest(plan.config_changes),
            "files": {shard.name: digest_of(shard.header) for shard in plan.outputs},
        },
    }


def known_files(*paths: Path) -> dict[str, str]:
    """Size and time of change of files on this disk, by their names."""
    found = {}
    for path in paths:
        stamp = stamp_of(path)
        found[path.name] = f"{stamp.nbytes} bytes, changed {stamp.changed} ns"
    return found


def fingerprint(plan: Plan) -> str:
    """All of it as one text."""
    document = json.dumps(ingredients(plan), sort_keys=True)
    return hashlib.sha256(document.encode()).hexdigest()


def _digest(value: Any) -> str:
    return digest_of(json.dumps(value, sort_keys=True).encode())
