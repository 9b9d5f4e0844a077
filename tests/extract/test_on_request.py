"""Norms and biases are in the adapter only on request, and the report says what that costs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from helpers.adapters import PREFIX, WEIGHTS, codes, config_of
from helpers.cli import run_cli
from helpers.extracting import (
    EVERYTHING,
    Q0,
    Pair,
    assert_accounted,
    assert_selected,
    distance,
    model,
    moved,
    moves,
    random_for,
    saved,
    square,
)
from helpers.files import NORM
from safetensors.torch import load_file

from loratool.errors import UsageError

BIAS = "model.layers.0.self_attn.k_proj.bias"


def test_by_default_there_are_factors_alone(tiny: Pair) -> None:
    """The file has what every server reads, and the config saves nothing and trains no bias."""
    report = tiny.extract(rank=16, verify=True)
    assert report.saved == []
    assert all(".lora_" in name for name in load_file(tiny.out / WEIGHTS))
    config = config_of(tiny.out)
    assert (config["modules_to_save"], config["bias"]) == (None, "none")
    assert {t.why for t in report.left} == {"unasked"}
    assert {t.name for t in report.left} == {
        n for n, t in tiny.before.items() if "norm" in n or n.endswith(".bias")
    }
    assert_accounted(report, tiny.before, tiny.after)
    assert_selected(tiny.out, tiny.before)


@pytest.mark.parametrize("save", [[], ["norms"], ["biases"], EVERYTHING], ids=str)
def test_the_report_says_what_they_hold_and_cost(tiny: Pair, save: list[str]) -> None:
    """`groups`: their number, bytes and share of ‖Δ‖², and the error with all and without any of
    them, which is what extract has with and without them."""
    report = tiny.extract(rank=3, save=save, verify=True)
    goal = moves(tiny.before, tiny.after)
    total = square(goal.values())
    assert [g.group for g in report.groups] == EVERYTHING
    for group in report.groups:
        names = [n for n in goal if ("norm" if group.group == "norms" else ".bias") in n]
        assert (group.tensors, group.nbytes) == (
            len(names),
            sum(tiny.after[n].nbytes for n in names),
        )
        assert group.saved == (len(names) if group.group in save else 0)
        assert group.share == pytest.approx(square(goal[n] for n in names) / total, rel=1e-5)
        others = [name for name in save if name != group.group]
        with_it = tiny.extract(rank=3, save=[*others, group.group]).error
        without = tiny.extract(rank=3, save=others).error
        assert group.error_with == pytest.approx(with_it, rel=1e-6)
        assert group.error_without == pytest.approx(without, rel=1e-6)
    assert report.verified == pytest.approx(report.error, rel=1e-3)
    assert {g["group"] for g in json.loads(json.dumps(report.to_dict()))["groups"]} == {*EVERYTHING}


def test_what_is_left_out_unasked_is_a_notice_by_name(tiny: Pair) -> None:
    """It names the tensors, their share, and the option; whoever said --skip is not told again."""
    report = tiny.extract(rank=2)
    texts = [n.message for n in report.warnings if n.code == "not-saved"]
    assert len(texts) == 2
    for text, name, group in zip(texts, (NORM, "k_proj.bias"), EVERYTHING, strict=True):
        assert name in text
        assert f"--save {group}" in text
        assert "vLLM refuses" in text
        assert "% of ‖ΔW‖²" in text
    assert codes(tiny.extract(rank=2, skip=EVERYTHING)) == []
    assert codes(tiny.extract(rank=2, save=EVERYTHING)) == []
    assert codes(tiny.extract(rank=2, save=["norms"])) == ["not-saved"]
    assert codes(tiny.extract(dry_run=True)) == ["not-saved", "not-saved"]


def test_without_a_change_there_is_no_notice(tmp_path: Path) -> None:
    """A fine-tune that left norms and biases alone has nothing to say of them."""
    state = model()
    report = Pair(tmp_path, state, moved(state, "_proj.weight")).extract(rank=2)
    assert codes(report) == []
    assert report.groups == []


def test_one_of_them_can_be_saved_by_name(tiny: Pair) -> None:
    """--save GLOB takes single norms, and the bias of a layer that is saved whole."""
    report = tiny.extract(rank=16, save=["model.norm", "layers.0.self_attn.k_proj"], verify=True)
    assert saved(tiny.out).keys() == {NORM, BIAS, BIAS.replace("bias", "weight")}
    assert {g.group: (g.saved, g.tensors) for g in report.groups} == {
        "norms": (1, 3), "biases": (1, 2),
    }  # fmt: skip
    assert report.verified == pytest.approx(
        distance(tiny.before, tiny.after, tiny.out), rel=1e-4, abs=1e-5
    )


@pytest.mark.parametrize("bias", [True, False])
def test_a_saved_module_has_its_bias(tmp_path: Path, bias: bool) -> None:
    """PEFT saves whole modules: one that is saved for its weight has its bias in the file, also
    where that did not change."""
    at = "model.vision.depthwise."
    state = model() | {
        f"{at}weight": random_for("dw", 8, 1, 3, 3).float(), f"{at}bias": torch.ones(8),
    }  # fmt: skip
    ends = [f"{Q0}.weight", f"{at}weight", *[f"{at}bias"] * bias]
    pair = Pair(tmp_path, state, moved(state, *ends))
    report = pair.extract(rank=16, verify=True)
    assert {t.name for t in report.saved} == {f"{at}weight", f"{at}bias"}
    assert f"{PREFIX}{at}bias" in load_file(pair.out / WEIGHTS)
    assert report.left == []
    assert report.error == pytest.approx(0, abs=1e-5)


def test_a_module_is_not_saved_for_its_bias_alone(tmp_path: Path) -> None:
    """Where the bias alone changed, it is a bias like others."""
    at = "model.vision.depthwise."
    state = model() | {
        f"{at}weight": random_for("dw", 8, 1, 3, 3).float(), f"{at}bias": torch.ones(8),
    }  # fmt: skip
    report = Pair(tmp_path, state, moved(state, f"{Q0}.weight", f"{at}bias")).extract(rank=2)
    assert report.saved == []
    assert [(t.name, t.why) for t in report.left] == [(f"{at}bias", "unasked")]


def test_a_new_head_is_saved_with_its_norm(tmp_path: Path) -> None:
    """What the base does not have is no change of a norm: a head is saved as it is."""
    state = model()
    tuned = moved(state, f"{Q0}.weight") | {
        "score.weight": torch.ones(3, 16), "score.norm.weight": torch.ones(16),
    }  # fmt: skip
    report = Pair(tmp_path, state, tuned).extract(rank=2)
    assert {t.name for t in report.saved} == {"score.weight", "score.norm.weight"}


@pytest.mark.parametrize("group", EVERYTHING)
def test_saving_and_skipping_the_same_is_refused(tiny: Pair, group: str) -> None:
    """--skip norms is accepted, as it always was, but not together with --save norms."""
    tiny.fails(UsageError, f"--skip {group} and --save {group}", skip=[group], save=[group])


def test_the_terminal_shows_share_and_cost(tiny: Pair) -> None:
    """A line for norms and one for biases, with the error either way; on stderr the names."""
    arguments = ["extract", str(tiny.base), str(tiny.tuned), "--rank", "2", "-o", str(tiny.out)]
    done = run_cli(*arguments, COLUMNS="200")
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line[:1].isalpha()}
    report = tiny.extract(rank=2, save=["norms"])
    assert report.error is not None
    assert "3 tensors" in lines["norms"]
    assert "left out (--save norms)" in lines["norms"]
    assert "% with them" in lines["norms"]
    assert math.isclose(
        float(lines["norms"].split("the error is ")[1].split("%")[0]), 100 * report.error,
        abs_tol=0.06,
    )  # fmt: skip
    assert "left out (--save biases)" in lines["biases"]
    assert done.stderr.count("[not-saved]") == 2
    done = run_cli(*arguments, "--save", "norms", "--save", "biases", "--overwrite", COLUMNS="200")
    assert done.stderr == ""
    assert "left out" not in done.stdout
    assert "saved whole" in done.stdout
