"""Inputs that once slipped through: each was a wrong result, a lost tensor or a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FIXTURES, pair, run_cli, write_adapter
from safetensors.numpy import load_file, save_file

import loratool
from loratool.errors import LoraToolError, ValueRangeError

Q = "model.layers.0.self_attn.q_proj"


def small_base(folder: Path, dtype: type = np.float16, **extra: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    state = {f"{Q}.weight": np.ones((6, 5), dtype), **extra}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def test_base_of_one_numbered_shard_keeps_its_index(tmp_path: Path) -> None:
    """model-00001-of-00001.safetensors is found by its index only, so the output has one too."""
    base = small_base(tmp_path / "base")
    shard = "model-00001-of-00001.safetensors"
    (base / "model.safetensors").rename(base / shard)
    index = {"metadata": {}, "weight_map": {f"{Q}.weight": shard}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    adapter = write_adapter(tmp_path / "adapter", pair(Q, 6, 5), {})
    loratool.merge(base, adapter, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert written == {"metadata": {"total_size": 60}, "weight_map": index["weight_map"]}


def test_other_weights_are_left_out_and_said_so(tmp_path: Path) -> None:
    """Other formats and checkpoints of a training run stay behind; parts that modules.json names
    come along; everything left is listed."""
    base = small_base(tmp_path / "base")
    (base / "model.gguf").write_bytes(b"x")
    for folder in ("checkpoint-10", "2_Dense", "1_Pooling"):
        (base / folder).mkdir()
        (base / folder / "config.json").write_text("{}")
    for folder in ("checkpoint-10", "2_Dense"):
        (base / folder / "model.safetensors").write_bytes(b"x")
    (base / "modules.json").write_text(json.dumps([{"path": "2_Dense"}, {"path": "1_Pooling"}]))
    adapter = write_adapter(tmp_path / "adapter", pair(Q, 6, 5), {})
    report = loratool.merge(base, adapter, tmp_path / "out")
    assert set(report.left_out) == {"model.gguf", "checkpoint-10/"}
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").read_bytes() == b"x"
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
    assert not (tmp_path / "out" / "checkpoint-10").exists()


def test_values_that_were_subnormal_before_are_not_counted(tmp_path: Path) -> None:
    """An adapter that changes nothing makes nothing subnormal."""
    base = small_base(tmp_path / "base")
    state = {f"{Q}.weight": np.full((6, 5), 2.0**-20, np.float16)}
    save_file(state, base / "model.safetensors")
    tensors = {k: np.zeros_like(v) for k, v in pair(Q, 6, 5).items()}
    report = loratool.merge(
        base, write_adapter(tmp_path / "adapter", tensors, {}), tmp_path / "out", dtype="base"
    )
    assert (report.subnormal, report.zeroed) == (0, 0)
    tensors = {k: np.ones_like(v) for k, v in tensors.items()}
    halved = write_adapter(tmp_path / "tiny", tensors, {"lora_alpha": 2.0**-17})
    save_file({f"{Q}.weight": np.zeros((6, 5), np.float16)}, base / "model.safetensors")
    again = loratool.merge(base, halved, tmp_path / "again", dtype="base")
    assert again.subnormal == 30


TRAINED: dict[str, tuple[dict[str, np.ndarray], dict[str, Any]]] = {
    "integers in the place of a weight": (
        {"base_model.model.lm_head.weight": np.ones((8, 5), np.int8)},
        {"modules_to_save": ["lm_head"]}),
    "the same token twice": (
        {"base_model.model.lm_head.token_adapter.trainable_tokens_delta":
         np.ones((2, 5), np.float32)}, {"trainable_token_indices": {"lm_head": [7, 7]}}),
    "a stray tensor beside modules_to_save as a string": (
        {"base_model.model.layers.0.typo.weight": np.ones((3, 3), np.float32)},
        {"modules_to_save": "score"}),
    "factors of integers": (
        {f"base_model.model.{Q}.lora_B.weight": np.ones((6, 4), np.int8)}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_refused_when_planning(name: str, tmp_path: Path) -> None:
    """What would be lost or misread is refused, by --dry-run already."""
    base = small_base(tmp_path / "base", **{"lm_head.weight": np.ones((8, 5), np.float16)})
    extra, config = TRAINED[name]
    adapter = write_adapter(tmp_path / "adapter", {**pair(Q, 6, 5), **extra}, config)
    with pytest.raises(LoraToolError):
        loratool.merge(base, adapter, tmp_path / "out", dry_run=True)
    loratool.inspect(adapter, base=base)


def test_dry_run_looks_for_nan(tmp_path: Path) -> None:
    """A plan that the merge would refuse for NaN in the adapter is refused at once."""
    tensors = {k: np.full_like(v, np.nan) for k, v in pair(Q, 6, 5).items()}
    adapter = write_adapter(tmp_path / "adapter", tensors, {})
    with pytest.raises(ValueRangeError, match="2 tensors hold NaN"):
        loratool.merge(small_base(tmp_path / "base"), adapter, tmp_path / "out", dry_run=True)


SCALAR = np.ones((), np.float32)
BROKEN: dict[str, tuple[dict[str, np.ndarray], dict[str, Any]]] = {
    "scalar A": ({f"base_model.model.{Q}.lora_A.weight": SCALAR}, {}),
    "scalar B": ({f"base_model.model.{Q}.lora_B.weight": SCALAR}, {}),
    "scalar token rows": ({"base_model.model.e.trainable_tokens_delta": SCALAR}, {}),
    "scalar embedding": ({"base_model.model.model.embed_tokens.weight": SCALAR}, {}),
    "scalar head": (
        {"base_model.model.score.weight": SCALAR}, {"modules_to_save": ["score"]}),
    "modules_to_save is a number": ({}, {"modules_to_save": 5}),
    "patterns of BD-LoRA are a number": ({}, {"use_bdlora": {"target_modules_bd_a": 5}}),
    "alpha of 400 digits": ({}, {"lora_alpha": 10**400}),
    "alpha too large for norms": ({}, {"lora_alpha": 1e308}),
    "rank is a word": ({}, {"r": "eight"}),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_no_traceback(name: str, tmp_path: Path) -> None:
    """Whatever stands in an adapter, inspect and merge answer in words and in valid JSON."""
    extra, config = BROKEN[name]
    adapter = write_adapter(tmp_path / "adapter", {**pair(Q, 6, 5), **extra}, config)
    base = small_base(tmp_path / "base")
    for call in (
        lambda: json.dumps(loratool.inspect(adapter).to_dict(), allow_nan=False),
        lambda: json.dumps(loratool.inspect(adapter, base=base).to_dict(), allow_nan=False),
        lambda: loratool.merge(base, adapter, tmp_path / "out", overwrite=True),
    ):
        with suppress(LoraToolError):
            call()


@pytest.mark.parametrize("command", ["inspect", "merge"])
def test_full_disk_behind_stdout(command: str, tmp_path: Path) -> None:
    """An answer that cannot be printed is one line on stderr."""
    arguments = {
        "inspect": [FIXTURES / "adapter"],
        "merge": [FIXTURES / "base", FIXTURES / "adapter", "-o", tmp_path / "out"],
    }[command]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "loratool", command, *map(str, arguments)],
            stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 1
    assert "could not be printed" in done.stderr
    assert "Traceback" not in done.stderr


def test_hint_for_the_wrong_base_does_not_praise_a_lone_head(tmp_path: Path) -> None:
    """If no module fits, --allow-unmatched is not suggested for the sake of a saved head."""
    tensors = {**pair("other.q", 3, 3), "base_model.model.score.weight": np.ones((2, 5), "f4")}
    adapter = write_adapter(tmp_path / "adapter", tensors, {"modules_to_save": ["score"]})
    with pytest.raises(LoraToolError) as error:
        loratool.merge(small_base(tmp_path / "base"), adapter, tmp_path / "out")
    assert "--allow-unmatched" not in error.value.hint


def test_empty_paths_and_reversed_ranges_are_usage_errors(tmp_path: Path) -> None:
    """A shell variable that is empty does not mean the current directory."""
    base, adapter = str(FIXTURES / "base"), str(FIXTURES / "adapter")
    assert run_cli("merge", base, adapter, "-o", "").exit_code == 2
    assert run_cli("inspect", adapter, "--layer", "3-1").exit_code == 2
    assert run_cli("inspect", adapter, "--layer", "0-99999999999").exit_code == 2


def test_old_output_put_back_stops_the_next_run_at_its_start(tmp_path: Path) -> None:
    """After a crash between two renames the old output is put back, and not merged over."""
    base = small_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", pair(Q, 6, 5), {})
    (tmp_path / ".out.loratool-replaced-123").mkdir()
    asked: list[int] = []
    with pytest.raises(LoraToolError, match="appeared"):
        loratool.merge(
            base, adapter, tmp_path / "out", progress=lambda done, total, name: asked.append(done)
        )
    assert asked == []
    assert (tmp_path / "out").is_dir()


def test_written_bytes_are_those_of_the_factors(tmp_path: Path) -> None:
    """A pair of ones adds rank times scale to every element: the simplest merge there is."""
    tensors = {k: np.ones_like(v) for k, v in pair(Q, 6, 5).items()}
    adapter = write_adapter(tmp_path / "adapter", tensors, {})
    loratool.merge(small_base(tmp_path / "base"), adapter, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")[f"{Q}.weight"]
    assert found.dtype == np.float16
    assert (found == 1 + 4 * 2).all()
