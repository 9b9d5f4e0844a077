"""Adapters as the libraries of each dialect saved them (`fixtures/dialects`), and what is right."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from helpers.places import FIXTURES

DIALECTS = FIXTURES / "dialects"


@dataclass(frozen=True)
class DialectCase:
    """An adapter, the base that it is for, and what somebody must say beside (`options`). `merges`
    is false where it must be refused, and `why` says why."""

    name: str
    dialect: str
    producer: str
    adapter: Path
    base: Path
    options: dict[str, Any]
    merges: bool
    note: str
    why: str

    def expected(self) -> dict[str, np.ndarray]:
        """What merging adds, by tensors of the base; of no other is a value changed."""
        return load_file(DIALECTS / self.name / "expected.safetensors")

    def base_tensors(self) -> dict[str, np.ndarray]:
        return load_file(self.base / "model.safetensors")

    def merged(self) -> dict[str, np.ndarray]:
        """All tensors of the merged model, in float64."""
        merged = {k: v.astype(np.float64) for k, v in self.base_tensors().items()}
        for name, added in self.expected().items():
            merged[name] += added
        return merged


def _case(name: str, entry: dict[str, Any]) -> DialectCase:
    return DialectCase(
        name=name,
        dialect=entry["dialect"],
        producer=entry["producer"],
        adapter=DIALECTS / name / "adapter" / entry["adapter"],
        base=DIALECTS / "bases" / entry["base"],
        options=entry["options"],
        merges=entry["expect"] == "merge",
        note=entry["note"],
        why=entry["why"],
    )


#: All cases by name.
CASES = {
    name: _case(name, entry)
    for name, entry in json.loads((DIALECTS / "manifest.json").read_text())["cases"].items()
}


def cases(*dialects: str, merges: bool | None = None) -> list[DialectCase]:
    """The cases of these dialects, or all: those that merge, those that don't, or both."""
    return [
        case
        for case in CASES.values()
        if (not dialects or case.dialect in dialects) and merges in (None, case.merges)
    ]


def apart(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """How far deltas are from the right ones: the largest relative error (Frobenius) of a tensor.
    Both must be of the same tensors; of what was found, zeros count as absent."""
    found = {name: value for name, value in found.items() if np.any(value)}
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    errors = [0.0]
    for name, right in expected.items():
        assert found[name].shape == right.shape, (name, found[name].shape, right.shape)
        right = right.astype(np.float64)
        errors.append(float(np.linalg.norm(found[name] - right) / np.linalg.norm(right)))
    return max(errors)


def added_to(case: DialectCase, output: Path) -> dict[str, np.ndarray]:
    """What a merge into the base of a case added, by tensor, in float64; of one in float32."""
    merged = load_file(output / "model.safetensors")
    return {
        name: merged[name].astype(np.float64) - weight
        for name, weight in case.base_tensors().items()
    }
