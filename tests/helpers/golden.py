"""The golden files of quantised formats (`fixtures/quantised`), as the checkpoints they were."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from helpers.places import FIXTURES

GOLDEN = FIXTURES / "quantised"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))


@dataclass
class Golden:
    """A quantised checkpoint, and what the library of its format makes of it: `expected`, by the
    names of the plain model. `about` has the rest that the file says."""

    stored: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]
    config: dict[str, Any]
    about: dict[str, Any]

    def lay(self, folder: Path) -> Path:
        """Write the checkpoint into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        metadata = self.about["metadata"] or {"format": "pt"}
        save_file(self.stored, folder / "model.safetensors", metadata)
        (folder / "config.json").write_text(json.dumps(self.config))
        return folder


def golden(name: str) -> Golden:
    """The case of this name."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        about = json.loads(file.metadata()["golden"])
        tensors: dict[str, dict[str, torch.Tensor]] = {"stored": {}, "expected": {}}
        for key in file.keys():  # noqa: SIM118  (no mapping)
            kind, _, tensor = key.partition("/")
            tensors[kind][tensor] = file.get_tensor(key)
    return Golden(**tensors, config=about.pop("config"), about=about)
