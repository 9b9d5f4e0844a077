"""What becomes of a quantised base: untouched, plain, kept; the values, the tensors, the config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.adapters import write_adapter
from helpers.cli import run_cli
from helpers.files import State, load
from helpers.outcomes import refused
from helpers.quantised import llama_state, write_fp8_base, write_nf4_base

import loratool
from loratool.errors import UsageError

QKV = {f"model.layers.0.self_attn.{side}_proj" for side in "qkv"}
DOWN = "model.layers.0.mlp.down_proj"


def lora_for(folder: Path, state: State, *modules: str, rank: int = 4) -> tuple[Path, State]:
    """An adapter on these modules, and its deltas in float64 by the names of the weights."""
    generator = torch.Generator().manual_seed(5)
    tensors, deltas = {}, {}
    for module in modules:
        out, width = state[f"{module}.weight"].shape
        a = torch.randn(rank, width, generator=generator) * 0.05
        b = torch.randn(out, rank, generator=generator) * 0.05
        tensors |= {
            f"base_model.model.{module}.lora_A.weight": a,
            f"base_model.model.{module}.lora_B.weight": b,
        }
        deltas[f"{module}.weight"] = 2 * (b.double() @ a.double())
    config = {"r": rank, "lora_alpha": 2 * rank,
              "target_modules": sorted({m.rpartition(".")[2] for m in modules})}  # fmt: skip
    return write_adapter(folder, tensors, config), deltas


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def expected(plain: State, deltas: State, name: str, dtype: torch.dtype) -> torch.Tensor:
    value = plain[name].double() + deltas.get(name, torch.zeros(1))
    return value.float().to(dtype)


def near(found: torch.Tensor, value: torch.Tensor) -> bool:
    """Equal but for the order of a float32 sum."""
    return bool(torch.allclose(found.double(), value.double(), rtol=2.0**-7, atol=1e-6))


@pytest.fixture
def state() -> State:
    return llama_state()


def test_nf4_becomes_plain(tmp_path: Path, state: State) -> None:
    """All of it, in float16; nothing of the quantisation is left, in tensors, config or files."""
    plain = write_nf4_base(tmp_path / "base", state)
    (tmp_path / "base" / "quantize_config.json").write_text("{}")
    adapter, deltas = lora_for(tmp_path / "adapter", state, *QKV)
    report = loratool.merge(tmp_path / "base", adapter, tmp_path / "out", verify=True)
    merged = load(tmp_path / "out")
    assert merged.keys() == state.keys()
    assert {t.dtype for t in merged.values()} == {torch.float16}
    assert all(near(merged[n], expected(plain, deltas, n, torch.float16)) for n in state)
    assert all(torch.equal(merged[n], plain[n].half()) for n in state if n not in deltas)
    config = config_of(tmp_path / "out")
    assert config["dtype"] == "float16"
    assert "quantization_config" not in config
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    assert "quantize_config.json (of the quantisation)" in report.left_out
    assert [w.code for w in report.warnings] == ["quantised-base"]
    record = json.loads((tmp_path / "out" / "loratool.json").read_text())
    assert record["base"]["quantised"] == "NF4"
    assert record["options"]["quantised"] == "plain"
    assert loratool.verify(tmp_path / "out", tmp_path / "base", adapter).verdict == "yes"


@pytest.mark.parametrize("write", [write_nf4_base, write_fp8_base])
def test_kept_but_for_what_is_adapted(tmp_path: Path, state: State, write: Any) -> None:
    """An adapter on q opens q, k and v, in the base's own dtype; the rest is the same bytes."""
    plain = write(tmp_path / "base", state)
    base = load(tmp_path / "base")
    adapter, deltas = lora_for(tmp_path / "adapter", state, "model.layers.0.self_attn.q_proj")
    report = loratool.merge(
        tmp_path / "base", adapter, tmp_path / "out", quantised="keep", verify=True
    )
    merged = load(tmp_path / "out")
    opened = {f"{module}.weight" for module in QKV}
    for name in opened:
        assert merged[name].dtype == torch.bfloat16
        assert near(merged[name], expected(plain, deltas, name, torch.bfloat16))
    copied = {n for n in base if not any(n.startswith(name) for name in opened)}
    assert merged.keys() == copied | opened
    for name in copied:
        assert merged[name].dtype == base[name].dtype
        assert merged[name].view(torch.uint8).equal(base[name].view(torch.uint8))
    table = config_of(tmp_path / "out")["quantization_config"]
    before = config_of(tmp_path / "base")["quantization_config"]
    key = next(k for k in ("llm_int8_skip_modules", "modules_to_not_convert") if k in table)
    known = before[key] or ["lm_head", "model.embed_tokens"]
    assert table[key] == [*known, *sorted(QKV)]
    assert {k: v for k, v in table.items() if k != key} == {
        k: v for k, v in before.items() if k != key
    }
    assert config_of(tmp_path / "out")["dtype"] == "bfloat16"
    assert "3 weights are plain bfloat16 (2 beside adapted ones)" in report.quantised
    assert loratool.verify(tmp_path / "out", tmp_path / "base", adapter).verdict == "yes"


def test_fp8_is_kept_and_nf4_is_not(tmp_path: Path, state: State) -> None:
    """The default by format; --quantised plain opens all of FP8 too."""
    adapter, _ = lora_for(tmp_path / "adapter", state, DOWN)
    write_fp8_base(tmp_path / "fp8", state, block=(16, 32))
    kept = loratool.merge(tmp_path / "fp8", adapter, tmp_path / "kept")
    assert "kept: 1 weight is plain bfloat16, 6 copied" in kept.quantised
    assert kept.dtype == "base"
    plainly = loratool.merge(tmp_path / "fp8", adapter, tmp_path / "plain", quantised="plain")
    assert "dequantised" in plainly.quantised
    assert {t.dtype for t in load(tmp_path / "plain").values()} == {torch.float16}


@pytest.mark.parametrize("write", [write_nf4_base, write_fp8_base])
@pytest.mark.parametrize("asked", [None, "keep"])
def test_what_no_adapter_touches_is_copied(
    tmp_path: Path, state: State, write: Any, asked: str | None
) -> None:
    """An adapter on the head alone: every quantised tensor is the same bytes, the config too."""
    write(tmp_path / "base", state)
    base = load(tmp_path / "base")
    adapter, deltas = lora_for(tmp_path / "adapter", state, "lm_head")
    report = loratool.merge(tmp_path / "base", adapter, tmp_path / "out", quantised=asked)
    merged = load(tmp_path / "out")
    assert merged.keys() == base.keys()
    changed = {
        n for n in base if not torch.equal(merged[n].view(torch.uint8), base[n].view(torch.uint8))
    }
    assert changed == {"lm_head.weight"}
    value = state["lm_head.weight"].double() + deltas["lm_head.weight"]
    assert near(merged["lm_head.weight"], value)
    assert merged["lm_head.weight"].dtype == torch.bfloat16
    assert config_of(tmp_path / "out") == config_of(tmp_path / "base")
    assert "copied as it is" in report.quantised
    assert report.warnings == []


def test_plain_may_be_asked_for_where_nothing_is_touched(tmp_path: Path, state: State) -> None:
    """plain means a plain model, whatever is adapted."""
    write_fp8_base(tmp_path / "base", state)
    adapter, _ = lora_for(tmp_path / "adapter", state, "lm_head")
    loratool.merge(
        tmp_path / "base", adapter, tmp_path / "out", quantised="plain", dtype="bfloat16"
    )
    assert {t.dtype for t in load(tmp_path / "out").values()} == {torch.bfloat16}


def test_a_dtype_has_no_meaning_where_the_model_stays_quantised(
    tmp_path: Path, state: State
) -> None:
    """Refused with the way out, and nothing is written; base, which says the same, is not."""
    write_fp8_base(tmp_path / "base", state)
    adapter, _ = lora_for(tmp_path / "adapter", state, DOWN)
    out = tmp_path / "out"
    error = refused(UsageError, tmp_path / "base", adapter, out, "FP8", "bfloat16", dtype="float16")
    assert "--quantised plain" in error.hint
    loratool.merge(tmp_path / "base", adapter, out, dtype="base")


def test_parts_may_lie_in_other_shards(tmp_path: Path, state: State) -> None:
    """Scales in a shard of their own: what is opened loses them, and an empty shard goes."""
    plain = write_fp8_base(
        tmp_path / "base", state, shard_of=lambda name: int(name.endswith("_scale_inv"))
    )
    adapter, deltas = lora_for(tmp_path / "adapter", state, DOWN)
    loratool.merge(tmp_path / "base", adapter, tmp_path / "kept", verify=True)
    names = load(tmp_path / "kept").keys()
    assert f"{DOWN}.weight_scale_inv" not in names
    assert f"{next(iter(QKV))}.weight_scale_inv" in names
    report = loratool.merge(
        tmp_path / "base", adapter, tmp_path / "plain", quantised="plain", verify=True
    )
    assert len(report.shards) == 1
    merged = load(tmp_path / "plain")
    assert all(near(merged[n], expected(plain, deltas, n, torch.float16)) for n in state)


@pytest.mark.parametrize("width", [80, 33])
def test_blocks_that_straddle_rows(tmp_path: Path, width: int) -> None:
    """Rows that are no multiple of the block, an odd number of values among them."""
    state = llama_state(width)
    plain = write_nf4_base(tmp_path / "base", state, nested=False)
    adapter, deltas = lora_for(tmp_path / "adapter", state, DOWN, *QKV)
    loratool.merge(tmp_path / "base", adapter, tmp_path / "out", dtype="float32")
    merged = load(tmp_path / "out")
    for name in state:
        value = plain[name].double() + deltas.get(name, torch.zeros(1))
        assert np.allclose(merged[name].double(), value, rtol=1e-6, atol=1e-7)


def test_same_bytes_with_any_threads(tmp_path: Path, state: State) -> None:
    """Dequantised blocks do not depend on who computes them."""
    write_nf4_base(tmp_path / "base", state)
    adapter, _ = lora_for(tmp_path / "adapter", state, *QKV)
    for threads in (1, 4):
        loratool.merge(tmp_path / "base", adapter, tmp_path / str(threads), threads=threads)
    one, four = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("1", "4"))
    assert one == four


def test_dry_run_counts_the_plain_output(tmp_path: Path, state: State) -> None:
    """A plain output is 3.6 times NF4: that is what the disk must hold."""
    write_nf4_base(tmp_path / "base", state)
    adapter, _ = lora_for(tmp_path / "adapter", state, *QKV)
    report = loratool.merge(tmp_path / "base", adapter, tmp_path / "out", dry_run=True)
    assert report.bytes_written == sum(2 * t.numel() for t in state.values())
    stored = sum(t.nbytes for t in load(tmp_path / "base").values())
    assert report.bytes_to_read < stored + 30_000


def test_dequantise_alone(tmp_path: Path, state: State) -> None:
    """The plain model, also on the command line; a plain base has nothing to dequantise."""
    plain = write_fp8_base(tmp_path / "base", state)
    done = run_cli("dequantise", tmp_path / "base", "-o", tmp_path / "out", "--dtype", "bfloat16")
    assert done.exit_code == 0
    assert "7 weights in FP8 in blocks of 128×128" in done.stdout
    merged = load(tmp_path / "out")
    assert all(torch.equal(merged[n], plain[n].bfloat16()) for n in state)
    assert "quantization_config" not in config_of(tmp_path / "out")
    again = run_cli("dequantise", tmp_path / "out", "-o", tmp_path / "again")
    assert again.exit_code == 1
    assert "is not quantised" in again.stderr


def test_a_file_beside_the_config_says_the_same(tmp_path: Path, state: State) -> None:
    """ModelOpt's description names what is opened too, also where config.json says nothing."""
    write_fp8_base(tmp_path / "base", state, block=None)
    base, said = tmp_path / "base", {"quantization": {"quant_algo": "FP8", "exclude_modules": []}}
    (base / "hf_quant_config.json").write_text(json.dumps(said))
    config = config_of(base)
    del config["quantization_config"]
    (base / "config.json").write_text(json.dumps(config))
    adapter, _ = lora_for(tmp_path / "adapter", state, DOWN)
    loratool.merge(base, adapter, tmp_path / "out")
    assert "quantization_config" not in config_of(tmp_path / "out")
    found = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    assert found["quantization"]["exclude_modules"] == [DOWN]
