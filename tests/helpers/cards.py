"""Reading model cards, running the code in them, and records that somebody changed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData

from helpers.places import FIXTURES

BASE, ADAPTER = FIXTURES / "base", FIXTURES / "adapter"
HTML, TUNED = FIXTURES / "tasks" / "html", FIXTURES / "tuned"
ID = "loratool-fixtures/base"

#: Folders that loratool made, by how; "plain" and "base" it did not.
KINDS = ("merged", "two", "combined", "resized", "extracted", "unmerged", "plain", "base")


def data(text: str) -> dict[str, Any]:
    """The YAML of a card, as the Hub's library reads it."""
    found: dict[str, Any] = ModelCard(text).data.to_dict()
    assert ModelCardData(**found).to_dict() == found
    return found


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run_code(text: str, places: dict[str, Path]) -> dict[str, Any]:
    """Run the card's Python with these folders in place of the names in it."""
    (source,) = blocks(text, "python")
    for name, place in places.items():
        source = source.replace(json.dumps(name), json.dumps(str(place)))
    found: dict[str, Any] = {}
    exec(source, found)
    return found


def logits(found: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        tokens = found["tokenizer"]("def add(a, b):\n    return", return_tensors="pt").input_ids
        values: torch.Tensor = found["model"].float().eval()(tokens).logits
    assert torch.isfinite(values).all()
    return values


def changed_record(source: Path, folder: Path, change: dict[str, dict[str, Any]]) -> Path:
    """A copy with these entries in objects of its loratool.json; `adapters.0` is one of a list."""
    shutil.copytree(source, folder)
    path = folder / "loratool.json"
    record = json.loads(path.read_text())
    for place, entries in change.items():
        part = record
        for key in place.split("."):
            part = part[int(key) if key.isdigit() else key]
        part.update(entries)
    path.write_text(json.dumps(record))
    return folder
