"""Quantised bases are told by their tensors; what is incomplete or unknown is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.files import State, load, same, small_state, write_base
from helpers.layer_cases import edit_base, linear, refuse
from helpers.outcomes import refused

import loratool
from loratool.errors import BaseError

LEFTOVERS: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "no-method": {"quantization_config": {"bits": 4}},
    "old-name": {"compression_config": {"quant_method": "compressed-tensors"}},
    "in-text-config": {"text_config": {"quantization_config": {"quant_method": "awq"}}},
    "in-second-config": {
        "vision_config": {"quantization_config": None},
        "text_config": {"quantization_config": {"quant_method": "awq"}},
    },
}


@pytest.mark.parametrize("case", LEFTOVERS)
def test_what_only_the_config_calls_quantised_is_merged(
    tmp_path: Path, lora: Path, case: str
) -> None:
    """The tensors decide. The entry is said and does not go along: programs would look for scales
    that are not there."""
    base = write_base(tmp_path / "base", small_state(), config=LEFTOVERS[case])
    (base / "recipe.yaml").write_text("a: b")
    plain = write_base(tmp_path / "plain", small_state())
    report = loratool.merge(base, lora, tmp_path / "out")
    assert [w.code for w in report.warnings if "quantis" in w.code] == ["leftover-quantisation"]
    loratool.merge(plain, lora, tmp_path / "expected")
    assert same(load(tmp_path / "out"), load(tmp_path / "expected"))
    text = (tmp_path / "out" / "config.json").read_text()
    assert "quant_method" not in text
    assert "bits" not in text
    assert not (tmp_path / "out" / "recipe.yaml").exists()


PACKED: dict[str, State] = {
    "gptq": {"x.q_proj.qweight": torch.ones(4, dtype=torch.int32)},
    "gptq-zeros": {"x.q_proj.qzeros": torch.ones(4, dtype=torch.int32)},
    "bitsandbytes-8bit": {"x.q_proj.SCB": torch.ones(4)},
    "bitsandbytes-4bit": {"x.q_proj.weight.quant_state.bitsandbytes__nf4": torch.ones(4)},
    "bitsandbytes-absmax": {"x.q_proj.weight.absmax": torch.ones(4)},
    "int8-weight": {"x.q_proj.weight": torch.ones(4, 4, dtype=torch.int8)},
    "packed-4bit": {"x.q_proj.weight": torch.ones(8, 1, dtype=torch.uint8)},
    "fp8-weight": {"x.q_proj.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)},
    "fp8-scale": {"x.q_proj.weight_scale": torch.ones(1)},
    "fp8-scale-inv": {"x.q_proj.weight_scale_inv": torch.ones(1)},
    "mxfp4": {"x.mlp.experts.gate_up_proj_blocks": torch.ones(4, dtype=torch.uint8)},
    "compressed-tensors": {"x.q_proj.weight_packed": torch.ones(4, dtype=torch.int32)},
}


@pytest.mark.parametrize("case", PACKED)
def test_quantised_tensors_are_refused(tmp_path: Path, lora: Path, case: str) -> None:
    """Packed weights are recognised by themselves, where no config says so."""
    base = write_base(tmp_path / "base", {**small_state(), **PACKED[case]})
    refused(BaseError, base, lora, tmp_path / "out", "quantised", next(iter(PACKED[case])))


def test_a_bare_quantization_entry_of_none_is_no_quantisation(tmp_path: Path, lora: Path) -> None:
    """`quantization_config: null`, which some tools write, does not stop a merge."""
    base = write_base(tmp_path / "base", small_state(), config={"quantization_config": None})
    loratool.merge(base, lora, tmp_path / "out")


def test_integer_buffers_are_no_quantisation(tmp_path: Path, lora: Path) -> None:
    """position_ids, counters and masks beside float weights do not stop a merge."""
    extra = {
        "embeddings.position_ids": torch.arange(9)[None],
        "bn.num_batches_tracked": torch.tensor(5),
        "attn.mask": torch.ones(3, dtype=torch.bool),
    }
    base = write_base(tmp_path / "base", {**small_state(), **extra})
    loratool.merge(base, lora, tmp_path / "out")
    merged = load(tmp_path / "out")
    assert same({n: merged[n] for n in extra}, extra)


PACKED_LAYERS = {
    "l.qweight": torch.zeros(4, 4, dtype=torch.int32),
    "l.weight_scale": torch.ones(4),
    "l.SCB": torch.ones(4),
    "l.weight.absmax": torch.ones(4),
    "l.weight_packed": torch.zeros(4, 4, dtype=torch.int32),
    "z.weight": torch.zeros(4, 4, dtype=torch.uint8),
    "f.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn),
}


@pytest.mark.parametrize("name", PACKED_LAYERS)
def test_base_with_packed_weights_is_refused(name: str, tmp_path: Path) -> None:
    """Packed weights and their scales are recognised without any config."""
    trained = linear(12, 20).train(tmp_path)
    edit_base(trained, lambda state: {**state, name: PACKED_LAYERS[name]})
    refuse(trained, BaseError, "quantised")
