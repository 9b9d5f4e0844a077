"""Heads and token rows of an adapter: merged, dropped or other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.adapters import write_adapter
from helpers.files import (
    ADAPTED,
    State,
    load,
    lora_on,
    random_of,
    small_lora,
    small_state,
    write_base,
)
from helpers.verifying import DTYPES, bad, code_by_tensor, codes, finding, flipped, written
from safetensors.torch import load_file, save_file

import loratool


def with_saved(folder: Path, saved: State, base: State) -> tuple[Path, Path]:
    """A base and an adapter that also holds whole tensors."""
    adapter = small_lora(folder / "a", len(base[ADAPTED]))
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors |= {f"base_model.model.{n}": v for n, v in saved.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["modules_to_save"] = sorted({n.split(".")[-2] for n in saved})
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return write_base(folder / "base", base), adapter


@pytest.mark.parametrize("dtype", DTYPES)
def test_trained_head_that_was_dropped_was_never_merged(dtype: str, tmp_path: Path) -> None:
    """A saved module of which the base's value is still there was never merged."""
    state = {**small_state(16), "lm_head.weight": random_of(torch.float32, 20, 16, seed=8)}
    head = {"lm_head.weight": random_of(torch.float32, 20, 16, seed=9)}
    base, adapter = with_saved(tmp_path, head, state)
    loratool.merge(base, adapter, tmp_path / "out", dtype=dtype)
    report = loratool.verify(tmp_path / "out", base, adapter)
    assert report.verdict == "yes"
    assert codes(report) == {"once": 1, "same": 1}
    right = load(tmp_path / "out")
    dropped = {**right, "lm_head.weight": state["lm_head.weight"].to(DTYPES[dtype])}
    report = loratool.verify(written(tmp_path / "m", dropped, base), base, adapter)
    assert bad(report) == {"lm_head.weight": "not-merged"}
    assert report.summary[0] == "1 of 2 modules was never merged: lm_head"
    neither = {**right, "lm_head.weight": right["lm_head.weight"] * 1.5}
    report = loratool.verify(written(tmp_path / "n", neither, base), base, adapter)
    assert bad(report) == {"lm_head.weight": "other"}


@pytest.fixture
def rows(tmp_path: Path) -> tuple[Path, Path, torch.Tensor]:
    """A base, an adapter that trained three token rows, and these rows."""
    embedding = "model.embed_tokens"
    state = {**small_state(16), f"{embedding}.weight": random_of(torch.bfloat16, 20, 16, seed=8)}
    trained = random_of(torch.float32, 3, 16, seed=9)
    adapter = small_lora(tmp_path / "a", 16)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[f"base_model.model.{embedding}.token_adapter.trainable_tokens_delta"] = trained
    save_file(tensors, adapter / "adapter_model.safetensors")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["trainable_token_indices"] = {"embed_tokens": [2, 3, 11]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return write_base(tmp_path / "base", state), adapter, trained


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "base"])
def test_trained_token_rows_pass(
    rows: tuple[Path, Path, torch.Tensor], dtype: str, tmp_path: Path
) -> None:
    """An embedding with its trained rows put in is as the adapter holds it."""
    base, adapter, _ = rows
    loratool.merge(base, adapter, tmp_path / "out", dtype=dtype)
    report = loratool.verify(tmp_path / "out", base, adapter)
    assert (report.verdict, codes(report)) == ("yes", {"once": 1, "same": 1})


def test_trained_token_rows_that_were_dropped_were_never_merged(
    rows: tuple[Path, Path, torch.Tensor], tmp_path: Path
) -> None:
    """An embedding that is still the base's, or has an untrained row changed, is found."""
    base, adapter, _ = rows
    loratool.merge(base, adapter, tmp_path / "out", dtype="base")
    right, name = load(tmp_path / "out"), "model.embed_tokens.weight"
    dropped = written(tmp_path / "m", {**right, name: load(base)[name]}, base)
    report = loratool.verify(dropped, base, adapter)
    assert bad(report) == {name: "not-merged"}
    off = written(tmp_path / "n", {**right, name: flipped(right[name], 0, 5)}, base)
    report = loratool.verify(off, base, adapter)
    assert list(bad(report)) == [name]


def test_trained_token_rows_rounded_on_the_way_pass(
    rows: tuple[Path, Path, torch.Tensor], tmp_path: Path
) -> None:
    """Rows that a bfloat16 model rounded before it was stored as float32 pass as rounded twice."""
    base, adapter, trained = rows
    loratool.merge(base, adapter, tmp_path / "out", dtype="float32")
    state, name = load(tmp_path / "out"), "model.embed_tokens.weight"
    state[name][[2, 3, 11]] = trained.bfloat16().float()
    report = loratool.verify(written(tmp_path / "m", state, base), base, adapter)
    assert report.verdict == "yes"
    assert finding(report, name).code in ("rounded-twice", "same-rounded")


def test_a_head_of_another_size_is_not_held_against_the_base(tmp_path: Path) -> None:
    """A saved head with more rows and other values than merged is "other", without reading past
    the end of the base's smaller one."""
    state = {**small_state(), "score.weight": torch.ones(2, 8)}
    base = write_base(tmp_path / "base", state, config={"num_labels": 2})
    pair = {
        f"base_model.model.{ADAPTED.removesuffix('.weight')}.lora_{half}.weight": np.ones(shape)
        for half, shape in (("A", (1, 8)), ("B", (8, 1)))
    }
    saved = {**pair, "base_model.model.score.weight": np.full((5, 8), 3.0)}
    tensors = {name: value.astype(np.float32) for name, value in saved.items()}
    config = {"r": 1, "lora_alpha": 1, "modules_to_save": ["score"], "task_type": "SEQ_CLS"}
    lora = write_adapter(tmp_path / "lora", tensors, config)
    loratool.merge(base, lora, tmp_path / "out", dtype="base")
    wrong = {**load(tmp_path / "out"), "score.weight": torch.zeros(5, 8)}
    report = loratool.verify(write_base(tmp_path / "m", wrong), base, lora)
    assert code_by_tensor(report)["score.weight"] == "other"


def test_a_head_that_the_config_drops_is_warned_about(tmp_path: Path) -> None:
    """Two matrices, but a config.json that still ties them: loaders would drop the merged head."""
    state = {"model.embed_tokens.weight": torch.randn(16, 8), **small_state()}
    base = write_base(tmp_path / "base", state, config={"tie_word_embeddings": True})
    lora = lora_on(tmp_path / "lora", np.ones((16, 1)), np.ones((1, 8)), "lm_head.weight")
    loratool.merge(base, lora, tmp_path / "out", dtype="base")
    report = loratool.verify(tmp_path / "out", base, lora)
    assert report.verdict == "yes"
    assert "still-tied" not in {notice.code for notice in report.warnings}
    (tmp_path / "out" / "config.json").write_bytes((base / "config.json").read_bytes())
    report = loratool.verify(tmp_path / "out", base, lora)
    assert "still-tied" in {notice.code for notice in report.warnings}
