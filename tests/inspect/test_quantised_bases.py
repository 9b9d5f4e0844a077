"""inspect --base of a quantised model: coverage, norms and counts are those of the plain one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.adapters import codes, pair, write_adapter
from helpers.cli import run_cli
from helpers.files import write_base
from helpers.golden import golden
from helpers.outcomes import assert_clear
from helpers.quantised import is_quantised, llama_state, write_fp8_base, write_nf4_base

import loratool
from loratool.errors import BaseError

AT = "model.layers.0."
Q, GATE, HEAD = f"{AT}self_attn.q_proj", f"{AT}mlp.gate_proj", "lm_head"


def adapter(folder: Path, shapes: dict[str, tuple[int, int]]) -> Path:
    tensors = {}
    for path, (rows, columns) in shapes.items():
        tensors |= pair(path, rows, columns)
    return write_adapter(folder, tensors, {})


@pytest.mark.parametrize("form", ["nf4", "fp8"])
def test_figures_are_those_of_the_plain_model(tmp_path: Path, form: str) -> None:
    """‖ΔW‖/‖W‖ of the values that codes stand for; parameters and coverage without packed tensors
    and scales; how many weights are quantised, and how many of these are adapted."""
    state = llama_state(64, layers=2)
    write = {"nf4": write_nf4_base, "fp8": write_fp8_base}[form]
    values = write(tmp_path / "base", state)
    plain = write_base(tmp_path / "plain", {n: t.contiguous() for n, t in values.items()})
    lora = adapter(tmp_path / "a", {Q: (64, 64), GATE: (96, 64), HEAD: (32, 64)})
    found, expected = (
        loratool.inspect(lora, base=base).to_dict() for base in (tmp_path / "base", plain)
    )
    ratios = [m["relative_norm"] for m in found["modules"]]
    assert ratios == pytest.approx([m["relative_norm"] for m in expected["modules"]], rel=1e-6)
    assert all(ratio > 0 for ratio in ratios)
    title = "NF4" if form == "nf4" else "FP8 in blocks of 128×128"
    count = sum(is_quantised(n, t) for n, t in state.items())
    told = {"quantised": title, "quantised_weights": count, "quantised_adapted": 2}
    assert {key: found["base"].pop(key) for key in told} == told
    assert {key: expected["base"].pop(key) for key in told} == {
        "quantised": "", "quantised_weights": 0, "quantised_adapted": 0,
    }  # fmt: skip
    assert found["base"].pop("source") != expected["base"].pop("source")
    for one in (found, expected):
        one["base"]["coverage"].sort(key=lambda entry: entry["name"])
    assert found["base"] == expected["base"]


def test_the_terminal_says_it_in_one_line(tmp_path: Path) -> None:
    """The format, and how many weights."""
    write_nf4_base(tmp_path / "base", llama_state(64))
    done = run_cli("inspect", str(adapter(tmp_path / "a", {Q: (64, 64)})), "--base",
                   str(tmp_path / "base"))  # fmt: skip
    assert done.exit_code == 0
    assert "NF4, 7 weights, 1 of them adapted" in " ".join(done.stdout.split())


def test_experts_of_gpt_oss(tmp_path: Path) -> None:
    """A stack is measured expert by expert, whichever way round its codes lie."""
    case = golden("mxfp4-gpt-oss")
    name = next(n for n in case.expected if n.endswith("down_proj"))
    values = case.expected[name].float()
    experts, inner, out = values.shape
    path = name.rpartition(".")[0]
    tensors = {
        f"base_model.model.{path}.lora_A.weight": torch.ones(2 * experts, inner).numpy(),
        f"base_model.model.{path}.lora_B.weight": torch.ones(out, 2 * experts).numpy(),
    }
    config = {"target_modules": [], "target_parameters": ["experts.down_proj"], "r": 2}
    config |= {"lora_alpha": 2, "peft_version": "0.21.2"}
    lora = write_adapter(tmp_path / "a", tensors, config)
    report = loratool.inspect(lora, base=case.lay(tmp_path / "base"))
    assert report.base is not None
    assert (report.base.quantised, report.base.quantised_adapted) == ("MXFP4", 1)
    (module,) = report.modules
    assert module.delta_norm is not None
    assert module.relative_norm == pytest.approx(module.delta_norm / float(values.norm()), rel=1e-5)


def test_what_only_the_config_calls_quantised_is_said(tmp_path: Path) -> None:
    """The tensors decide; the entry is warned of, and no figure speaks of quantisation."""
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    base = write_base(tmp_path / "base", llama_state(64), config=config)
    report = loratool.inspect(adapter(tmp_path / "a", {Q: (64, 64)}), base=base)
    assert codes(report) == ["leftover-quantisation"]
    assert report.base is not None
    assert report.base.quantised == ""


def test_what_is_not_read_is_one_error(tmp_path: Path) -> None:
    """A base in a form that is not read is refused by name, before anything is shown."""
    config = {"quantization_config": {"quant_method": "aqlm"}}
    state = llama_state(64)
    del state[f"{Q}.weight"]
    state |= {f"{Q}.codes": torch.ones(64, 8, 1, dtype=torch.int16), f"{Q}.scales": torch.ones(64)}
    base = write_base(tmp_path / "base", state, config=config)
    with pytest.raises(BaseError) as caught:
        loratool.inspect(adapter(tmp_path / "a", {Q: (64, 64)}), base=base)
    assert_clear(caught.value, "AQLM")
