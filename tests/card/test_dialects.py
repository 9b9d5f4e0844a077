"""Cards of adapters that are not PEFT's: what loads them, and how to make PEFT's of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.dialects import CASES

import loratool
from loratool import Told


def _copy(case: str, folder: Path) -> Path:
    source = CASES[case].adapter
    shutil.copytree(source if source.is_dir() else source.parent, folder / case)
    return folder / case


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("mlx-lora", "mlx_lm.generate --model path/to/base --adapter-path"),
        ("gguf-f32", "llama-cli -m base.gguf --lora"),
        ("litgpt-qv", "litgpt loads it as it is, and PEFT does not"),
        ("torchtune-lora", "torchtune loads it as it is, and PEFT does not"),
    ],
)
def test_a_card_names_the_program_that_loads_it(case: str, words: str, tmp_path: Path) -> None:
    """And the command that converts it; PEFT's code, which cannot load it, is not there."""
    text = loratool.card(_copy(case, tmp_path), dry_run=True).text
    assert words in text
    assert "loratool convert" in text
    assert "PeftModel" not in text


def test_what_is_said_of_an_adapter_stands_in_its_card(tmp_path: Path) -> None:
    """A scale that only the user knows is in the table of modules."""
    folder = _copy("hand-subclass", tmp_path)
    assert "| unknown |" in loratool.card(folder, dry_run=True).text
    text = loratool.card(folder, told=Told(alpha=6), dry_run=True).text
    assert "| 6 | 2 |" in text
