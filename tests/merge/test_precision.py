"""The dtype that is written without being asked for, and what float16 would lose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.cli import run_cli
from helpers.files import load, small_lora, small_state, write_base
from helpers.models import read_json

import loratool

FAMILIES = ["gemma2", "gemma3_text", "gemma3", "t5", "mt5", "umt5", "qwen2", "glm4", "gpt_oss"]


def base_of(folder: Path, dtype: torch.dtype = torch.bfloat16, **config: object) -> Path:
    return write_base(folder, small_state(dtype=dtype), config=config)


@pytest.mark.parametrize("kind", FAMILIES)
def test_families_that_overflow_float16_get_bfloat16(tmp_path: Path, kind: str) -> None:
    """Without --dtype bfloat16 is written, for these architectures alone, and it is said why."""
    base = base_of(tmp_path / "base", model_type=kind)
    lora = small_lora(tmp_path / "lora")
    report = loratool.merge(base, lora, tmp_path / "out")
    assert report.dtype == "bfloat16"
    assert {t.dtype for t in load(tmp_path / "out").values()} == {torch.bfloat16}
    config = read_json(tmp_path / "out" / "config.json")
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    (notice,) = report.warnings
    assert notice.code == "float16-overflows"
    assert kind in notice.message
    assert json.loads((tmp_path / "out" / "loratool.json").read_text())["options"]["dtype"] == (
        "bfloat16"
    )
    assert loratool.verify(tmp_path / "out", base, lora).verdict == "yes"


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "gemma", "qwen3", ""])
def test_others_get_float16(tmp_path: Path, kind: str) -> None:
    base = base_of(tmp_path / "base", model_type=kind)
    report = loratool.merge(base, small_lora(tmp_path / "lora"), tmp_path / "out")
    assert (report.dtype, report.warnings) == ("float16", [])


def test_a_language_model_inside_counts(tmp_path: Path) -> None:
    """A vision-language model overflows where its language model does."""
    base = base_of(tmp_path / "base", model_type="paligemma", text_config={"model_type": "gemma2"})
    report = loratool.merge(base, small_lora(tmp_path / "lora"), tmp_path / "out")
    assert report.dtype == "bfloat16"


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "base"])
def test_what_is_asked_for_is_obeyed(tmp_path: Path, dtype: str) -> None:
    """An explicit float16 is written, with a warning; other dtypes need none."""
    base = base_of(tmp_path / "base", model_type="gemma2")
    report = loratool.merge(base, small_lora(tmp_path / "lora"), tmp_path / "out", dtype=dtype)
    assert report.dtype == dtype
    assert [n.code for n in report.warnings] == ["float16-overflows"] * (dtype == "float16")


def test_a_dry_run_says_how_much_range_is_lost(tmp_path: Path) -> None:
    """Of a bfloat16 base: shares of values that lose digits, become zero, and would overflow."""
    state = small_state(dtype=torch.bfloat16)
    state["a.weight"] = torch.full((100_000,), 2e-5, dtype=torch.bfloat16)
    state["b.weight"] = torch.full((500,), 1e-9, dtype=torch.bfloat16)
    state["c.weight"] = torch.full((250,), 1e6, dtype=torch.bfloat16)
    total = sum(t.numel() for t in state.values())
    base, lora = write_base(tmp_path / "base", state), small_lora(tmp_path / "lora")
    report = loratool.merge(base, lora, tmp_path / "out", dry_run=True)
    lost = report.range_loss
    assert lost is not None
    assert abs(lost.subnormal - 100_000 / total) < 0.01
    assert abs(lost.zeroed - 500 / total) < 1e-9
    assert abs(lost.overflowing - 250 / total) < 1e-9
    assert report.to_dict()["range_loss"]["zeroed"] == lost.zeroed
    out = run_cli("merge", base, lora, "-o", tmp_path / "out", "--dry-run", COLUMNS="200").stdout
    assert "become zero" in out
    assert "overflow, which stops the merge" in out


@pytest.mark.parametrize(
    ("stored", "asked"),
    [(torch.bfloat16, "bfloat16"), (torch.bfloat16, "base"), (torch.float16, "float16")],
)
def test_nothing_is_said_where_nothing_is_lost(
    tmp_path: Path, stored: torch.dtype, asked: str
) -> None:
    base = base_of(tmp_path / "base", stored)
    lora = small_lora(tmp_path / "lora")
    report = loratool.merge(base, lora, tmp_path / "out", dtype=asked, dry_run=True)
    assert report.range_loss is None
