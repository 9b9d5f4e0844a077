"""inspect --audit: each finding where it is and nowhere else, and commands that hold."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.adapters import PREFIX, Tensors, config_of, pair, write_adapter
from helpers.cli import run_cli
from helpers.experts import EXPERTS, GATE_UP, expert_pairs, stacks
from helpers.places import ROOT
from safetensors.numpy import load_file, save_file

import loratool
from loratool.auditing.audit import Audit
from loratool.errors import UsageError
from loratool.rendering.audit import audit_pieces
from loratool.rendering.inspect import inspect_sheet
from loratool.sheet import Bars, Curves, HeatMap

OUT, IN, RANK, LAYERS = 300, 256, 16, 6


def module(layer: int, name: str = "q_proj") -> str:
    return f"model.layers.{layer}.self_attn.{name}"


def falling(
    layer: int, name: str = "q_proj", decay: float = 0.8, dtype: Any = np.float32
) -> Tensors:
    """A pair whose singular values fall by `decay`, each from the one before: nothing to find."""
    rng = np.random.default_rng(100 * layer + len(name))
    left = np.linalg.qr(rng.standard_normal((OUT, RANK)))[0]
    right = np.linalg.qr(rng.standard_normal((IN, RANK)))[0]
    root = np.sqrt(decay ** np.arange(RANK))
    path = f"{PREFIX}{module(layer, name)}"
    return {f"{path}.lora_A.weight": (right * root).T.astype(dtype),
            f"{path}.lora_B.weight": (left * root).astype(dtype)}  # fmt: skip


def sound(**more: Any) -> Tensors:
    """q_proj and v_proj in six layers."""
    return {
        name: values
        for layer in range(LAYERS)
        for leaf in ("q_proj", "v_proj")
        for name, values in falling(layer, leaf, **more).items()
    }


def times(tensors: Tensors, factor: float, layer: int, side: str = "B") -> Tensors:
    name = f"{PREFIX}{module(layer)}.lora_{side}.weight"
    return {**tensors, name: tensors[name] * np.float32(factor)}


def audit(folder: Path, tensors: Tensors, **options: Any) -> Audit:
    """The audit of these tensors with r 16 and alpha 32; its JSON has no NaN."""
    config = {"r": RANK, "lora_alpha": 32, **options.pop("config", {})}
    write_adapter(folder / "one", tensors, config)
    report = loratool.inspect(folder / "one", audit=True, **options)
    assert report.audit is not None
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["audit"]["findings"] == [
        f.to_dict() for f in report.audit.findings
    ]
    return report.audit


def found(result: Audit) -> dict[str, list[tuple[str, ...]]]:
    """The modules of each finding by its code."""
    codes: dict[str, list[tuple[str, ...]]] = {}
    for finding in result.findings:
        codes.setdefault(finding.code, []).append(finding.modules)
    return codes


def test_a_sound_adapter_has_no_findings(tmp_path: Path) -> None:
    """Spectra that use their rank, alike in all layers, are nothing to speak of."""
    result = audit(tmp_path, sound())
    assert found(result) == {}
    assert len(result.modules) == 12
    assert {m.no_edge for m in result.modules} == {"wide"}
    assert "no noise edge" in result.notes[-1]


SIZES = {
    "B is zero": (0.0, "B", {"dead": [(module(2),)]}),
    "A is zero": (0.0, "A", {"dead": [(module(2),)]}),
    "far smaller": (1e-3, "B", {"faint": [(module(2),)], "norm-outlier": [(module(2),)]}),
    "far larger": (20.0, "B", {"norm-outlier": [(module(2),)]}),
    "NaN": (float("nan"), "A", {"not-finite": [(module(2),)]}),
    "infinity": (float("inf"), "B", {"not-finite": [(module(2),)]}),
}


@pytest.mark.parametrize("case", SIZES)
def test_one_module_that_is_off_is_found(tmp_path: Path, case: str) -> None:
    """A module that is dead, faint, far off or not finite is found under its code, and no other."""
    factor, side, expected = SIZES[case]
    assert found(audit(tmp_path, times(sound(), factor, 2, side))) == expected


def test_the_same_over_layers_is_one_finding(tmp_path: Path) -> None:
    """Modules that differ in their layer alone are folded, with a count and the span of figures."""
    tensors = sound()
    for layer in (1, 2, 4):
        tensors = times(tensors, 0, layer)
    result = audit(tmp_path, tensors)
    assert found(result) == {"dead": [(module(1), module(2), module(4))]}
    assert result.findings[0].figure == "B is zero"
    assert len(result.remedies) == 1
    assert "target_modules" in result.remedies[0].advice


def test_an_adapter_before_training_is_dead_everywhere(tmp_path: Path) -> None:
    """Of an adapter whose B is all zero every module is dead, and nothing else is said."""
    tensors = {n: v * (0 if "lora_B" in n else 1) for n, v in sound().items()}
    result = audit(tmp_path, tensors)
    assert set(found(result)) == {"dead"}
    assert "before training" in result.remedies[0].advice
    assert audit_pieces(result)


def test_a_scale_that_differs_is_found(tmp_path: Path) -> None:
    """A module with another alpha than its kind in the other layers is found by its scale."""
    config = {"alpha_pattern": {module(3): 64}}
    result = audit(tmp_path, sound(), config=config)
    assert found(result)["scale-outlier"] == [(module(3),)]
    assert result.findings[0].numbers == (pytest.approx(2.0),)


def test_a_spike_is_found(tmp_path: Path) -> None:
    """One direction with nearly all of ‖ΔW‖² is a spike; where ‖ΔW‖ is as ever, σ₁ tells."""
    tensors = sound()
    name = f"{PREFIX}{module(2)}.lora_B.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][:, 0] *= 30
    codes = found(audit(tmp_path, tensors))
    assert codes["spike"] == [(module(2),)]
    assert codes["norm-outlier"] == [(module(2),)]
    assert "rank-excess" in codes


@pytest.mark.parametrize("one", [True, False])
def test_the_command_for_an_unused_rank_saves_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one: bool
) -> None:
    """The command of a finding can be pasted: it gives the rank and saves the bytes of the
    finding, with one rank for all where that is enough, else with one for each module."""
    tensors = sound(decay=0.3)
    if not one:
        tensors |= falling(0, decay=0.98)
    result = audit(tmp_path, tensors)
    (remedy,) = [r for r in result.remedies if r.code == "rank-excess"]
    assert ("--patterns" in remedy.command) != one
    before = (tmp_path / "one" / "adapter_model.safetensors").stat().st_size
    monkeypatch.chdir(tmp_path)
    done = run_cli(*shlex.split(remedy.command)[1:], cwd=tmp_path)
    assert done.exit_code == 0, done.stderr
    after = (tmp_path / "one-smaller" / "adapter_model.safetensors").stat().st_size
    assert remedy.saved == pytest.approx(before - after, rel=0.02)
    if one:
        assert config_of(tmp_path / "one-smaller")["r"] == max(
            m.rank_enough or 0 for m in result.modules
        )
    again = loratool.inspect(tmp_path / "one-smaller", audit=True).audit
    assert again is not None
    assert "rank-excess" not in found(again)


def test_a_rank_filled_up_with_zeros_is_unused(tmp_path: Path) -> None:
    """After a resize to twice the rank half of it is zeros, and the command takes them off."""
    write_adapter(tmp_path / "small", sound(), {"r": RANK, "lora_alpha": 32})
    loratool.resize(tmp_path / "small", tmp_path / "large", rank=20)
    result = loratool.inspect(tmp_path / "large", audit=True).audit
    assert result is not None
    assert set(found(result)) == {"rank-unused"}
    assert result.remedies[0].command.endswith("--max-rank 16 -o large-smaller")
    loratool.resize(tmp_path / "large", tmp_path / "again", max_rank=16)
    assert config_of(tmp_path / "again")["r"] == RANK


def noisy(layer: int, signals: int, size: float = 4.0) -> Tensors:
    """A pair of noise in all but so many directions."""
    rng = np.random.default_rng(layer)
    b, a = rng.standard_normal((1024, RANK)), rng.standard_normal((RANK, 1024))
    b[:, :signals] *= size
    turn = np.linalg.qr(rng.standard_normal((RANK, RANK)))[0]
    return {f"{PREFIX}{module(layer)}.lora_A.weight": (turn.T @ a).astype(np.float32),
            f"{PREFIX}{module(layer)}.lora_B.weight": (b @ turn).astype(np.float32)}  # fmt: skip


def test_noise_is_told_from_signals(tmp_path: Path) -> None:
    """Planted ranks are what stands above the edge, pure noise has none, and the command cuts."""
    tensors = {k: v for layer, n in enumerate((2, 3, 2, 0)) for k, v in noisy(layer, n).items()}
    result = audit(tmp_path, tensors)
    assert [m.above_noise for m in result.modules] == [2, 3, 2, 0]
    assert found(result)["noise"] == [(module(0), module(1), module(2))]
    assert found(result)["all-noise"] == [(module(3),)]
    (remedy,) = [r for r in result.remedies if r.code == "noise"]
    assert "--noise" in remedy.command
    assert "Rank 3 for all" in remedy.advice


def test_a_base_tells_what_is_large(tmp_path: Path) -> None:
    """With the base, a delta beyond a third of its weight is found."""
    weights = {f"{module(layer)}.weight": np.full((OUT, IN), 0.5, np.float32) for layer in range(2)}
    save_file(weights, tmp_path / "base.safetensors")
    tensors = times({**falling(0), **falling(1)}, 20.0, 1)
    result = audit(tmp_path, tensors, base=tmp_path / "base.safetensors")
    assert found(result)["large-against-base"] == [(module(1),)]


def test_half_precision_near_nothing_is_measured(tmp_path: Path) -> None:
    """Factors that float16 stores as subnormal numbers have a norm, and are faint, not dead."""
    tensors = {name: values.astype(np.float16) for name, values in sound().items()}
    name = f"{PREFIX}{module(2)}.lora_B.weight"
    tensors[name] = (tensors[name].astype(np.float32) * 1e-6).astype(np.float16)
    assert tensors[name].any()
    result = audit(tmp_path, tensors)
    assert found(result)["faint"] == [(module(2),)]
    assert "dead" not in found(result)


def test_an_unknown_scale_is_said(tmp_path: Path) -> None:
    """Without a config spectra are looked at, norms are not compared, and no command is given."""
    tensors = times(sound(decay=0.3), 1e-3, 2)
    write_adapter(tmp_path / "one", tensors, None)
    result = loratool.inspect(tmp_path / "one", audit=True).audit
    assert result is not None
    assert set(found(result)) == {"rank-excess"}
    assert all(m.norm is None for m in result.modules)
    assert "scale is not known" in " ".join(result.notes)
    assert [r.command for r in result.remedies] == [""]


def test_a_stack_of_experts_is_audited_expert_by_expert(tmp_path: Path) -> None:
    """A stack has the rank that its widest expert needs; that resize cannot cut it is said."""
    pairs = [(b * np.array([9, 1e-3, 1e-3, 1e-3], np.float32), a)
             for b, a in expert_pairs(5, 96, 64, 4)]  # fmt: skip
    pairs[1] = (pairs[1][0] * 0, pairs[1][1])
    stacks(tmp_path / "one", pairs, expert_pairs(5, 64, 48, 4))
    result = loratool.inspect(tmp_path / "one", audit=True).audit
    assert result is not None
    assert found(result)["dead-experts"] == [(GATE_UP,)]
    assert found(result)["rank-excess"] == [(GATE_UP,)]
    assert found(result)["spike"] == [(GATE_UP,)]
    (remedy,) = [r for r in result.remedies if r.code == "rank-excess"]
    assert not remedy.command
    assert "expert stacks" in remedy.advice
    assert result.modules[1].path == f"{EXPERTS}.down_proj"


def test_a_zero_product_with_a_magnitude_is_not_called_dead(tmp_path: Path) -> None:
    """A DoRA module with B = 0 may still change its weight, so it is not dead; a note says so."""
    tensors = times(sound(), 0, 2)
    for layer in range(LAYERS):
        for leaf in ("q_proj", "v_proj"):
            name = f"{PREFIX}{module(layer, leaf)}.lora_magnitude_vector"
            tensors[name] = np.ones(OUT, np.float32)
    result = audit(tmp_path, tensors, config={"use_dora": True})
    assert "dead" not in found(result)
    assert any("DoRA" in note for note in result.notes)


def test_one_layer_and_rank_one(tmp_path: Path) -> None:
    """An adapter of one module of rank 1 is audited without a word about others or noise."""
    tensors = pair(module(0), 12, 10, 1)
    result = audit(tmp_path, tensors, config={"r": 1})
    assert found(result) == {}
    assert result.modules[0].no_edge == "few"


ODD = ["peft-ia3", "peft-oft", "peft-loha", "peft-lokr", "loralib-convolution",
       "loralib-embedding", "gguf-experts", "gguf-q8-0"]  # fmt: skip


def _odd() -> list[Path]:
    roots = [ROOT / "fixtures" / "dialects" / name for name in ODD]
    return [path for path in roots if path.exists()]


@pytest.mark.parametrize("folder", _odd(), ids=lambda path: path.name)
def test_what_is_no_pair_is_said_and_not_guessed(folder: Path) -> None:
    """Adapters of other kinds are audited as far as they have pairs; the rest is in the notes."""
    inner = folder / "adapter" if (folder / "adapter").exists() else folder
    done = run_cli("inspect", inner, "--audit", "--json")
    assert "Traceback" not in done.stderr
    if done.exit_code:
        return
    document = json.loads(done.stdout)["audit"]
    measured = [m for m in document["modules"] if m["measured"]]
    whole = len(measured) == len(document["modules"]) and measured
    assert whole or document["notes"] or document["findings"]


@pytest.mark.parametrize("name", ["peft-lokr-full", "peft-oft", "peft-ia3"])
def test_nan_in_what_is_no_pair_is_found(tmp_path: Path, name: str) -> None:
    """NaN in parts of other products and of functions is found by the tensor's name."""
    source = ROOT / "fixtures" / "dialects" / name / "adapter"
    folder = Path(shutil.copytree(source, tmp_path / "one"))
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    odd = next(key for key, values in tensors.items() if values.dtype.kind == "f")
    tensors[odd] = np.full_like(tensors[odd], np.nan)
    save_file(tensors, weights)
    result = loratool.inspect(folder, audit=True).audit
    assert result is not None
    assert set(found(result)) >= {"not-finite"}
    assert result.notes


def test_the_trained_fixture(adapter: Path) -> None:
    """The trained adapter of the fixtures has nothing dead, and none of its values is noise: cut at
    the edges alone, its loss on held-out text grew."""
    result = loratool.inspect(adapter, audit=True).audit
    assert result is not None
    assert not {"dead", "not-finite", "faint", "noise", "all-noise"} & set(found(result))
    assert all(1 <= (m.rank_enough or 0) <= m.rank for m in result.modules)


def test_charts_show_what_was_measured(tmp_path: Path) -> None:
    """The sheet of an audit has spectra, ranks and what is used of them, and norms by layer."""
    write_adapter(tmp_path / "one", sound(), {"r": RANK, "lora_alpha": 32})
    sheet = inspect_sheet(loratool.inspect(tmp_path / "one", audit=True))
    (curves,) = [p for p in sheet.charts if isinstance(p, Curves)]
    (bars,) = [p for p in sheet.charts if isinstance(p, Bars)]
    assert {len(y) for _, _, y in curves.series} == {RANK}
    assert dict(bars.series)["rank"] == [RANK, RANK]
    assert dict(bars.series)["holds 99%"] == [11, 11]
    heat = [p for p in sheet.charts if isinstance(p, HeatMap) and p.title == "‖ΔW‖"]
    assert len(heat) == 1


def test_the_answer_fits_a_terminal(tmp_path: Path) -> None:
    """Findings, advice and commands are printed within 80 columns, and names made printable."""
    tensors = {k: v for layer in range(4) for k, v in noisy(layer, 2).items()}
    odd = pair("model.layers.0.\x1b[31mq", 20, 20, RANK)
    write_adapter(tmp_path / "one", tensors | odd, {"r": RANK, "lora_alpha": 32})
    done = run_cli("inspect", tmp_path / "one", "--audit", COLUMNS="80")
    assert "\x1b" not in done.stdout
    section = done.stdout[done.stdout.index("audit") :]
    assert max(map(len, section.splitlines())) <= 80
    assert "--noise" in section


def test_what_is_no_adapter_is_not_audited(tmp_path: Path) -> None:
    """--audit of a file that no dialect reads is an error that says what the file is."""
    save_file({"x": np.ones((2, 2), np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="nothing to audit"):
        loratool.inspect(tmp_path / "x.safetensors", audit=True)
