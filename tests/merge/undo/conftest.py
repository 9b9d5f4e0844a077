"""A reversible merge of a small base in two files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.files import ADAPTED, NORM, OTHER, random_of, small_lora, write_base
from helpers.undoing import load_one, replace_z
from safetensors.torch import save_file

import loratool


@pytest.fixture
def merged(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base in two files, an adapter, and what a reversible merge made of them."""
    base = write_base(
        tmp_path / "base",
        {ADAPTED: random_of(torch.bfloat16, 8, 8), OTHER: random_of(torch.float32, 4)},
        {NORM: random_of(torch.float32, 8), "z.weight": random_of(torch.float32, 6, 5)},
    )
    # A header that nobody would write again by chance.
    second = base / "model-00002-of-00002.safetensors"
    save_file(load_one(second), second, metadata={"format": "pt", "origin": "a ship of Theseus"})
    lora = small_lora(tmp_path / "lora")
    replace_z(lora)
    for folder, text in ((base, "{}"), (lora, '{"trained": true}')):
        (folder / "tokenizer.json").write_text(text)
    loratool.merge(base, lora, tmp_path / "out", reversible=True)
    return base, lora, tmp_path / "out"
