"""Norms, biases and embeddings are in the adapter on request; the report says what that costs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import PREFIX, WEIGHTS, codes, config_of
from helpers.cli import run_cli
from helpers.extracting import (
    EVERYTHING,
    Q0,
    SAVED,
    Pair,
    assert_accounted,
    assert_selected,
    distance,
    model,
    moved,
    moves,
    products,
    random_for,
    saved,
    square,
)
from helpers.files import NORM
from safetensors.torch import load_file

from loratool.errors import UsageError, ValueRangeError

BIAS = "model.layers.0.self_attn.k_proj.bias"
TOKENS = "model.embed_tokens.weight"
GROUPS = [*SAVED, "embeddings"]
#: What of a name says which group a tensor is of.
PARTS = {"norms": "norm", "biases": ".bias", "embeddings": "embed"}


def asking(*groups: str) -> dict[str, Any]:
    """The options that ask for these groups."""
    return {"save": [g for g in groups if g in SAVED], "embeddings": "embeddings" in groups}


def test_by_default_there_are_factors_alone(tiny: Pair) -> None:
    """The file has what every server reads, and the config saves nothing and trains no bias."""
    report = tiny.extract(rank=16, verify=True)
    assert report.saved == []
    assert all(".lora_" in name for name in load_file(tiny.out / WEIGHTS))
    config = config_of(tiny.out)
    assert (config["modules_to_save"], config["bias"]) == (None, "none")
    assert {t.why for t in report.left} == {"unasked"}
    assert {t.name for t in report.left} == {
        n for n in tiny.before if any(part in n for part in PARTS.values())
    }
    assert_accounted(report, tiny.before, tiny.after)
    assert_selected(tiny.out, tiny.before)


@pytest.mark.parametrize(
    "asked", [[], ["norms"], ["biases"], ["embeddings"], SAVED, GROUPS], ids=str
)
def test_the_report_says_what_they_hold_and_cost(tiny: Pair, asked: list[str]) -> None:
    """`groups`: their number, bytes and share of ‖Δ‖², and the error with all and without any of
    them, which is what extract has with and without them. What the error is with embeddings that
    are left out, only their decomposition would tell."""
    report = tiny.extract(rank=3, verify=True, **asking(*asked))
    goal = moves(tiny.before, tiny.after)
    total = square(goal.values())
    assert [g.group for g in report.groups] == GROUPS
    for group in report.groups:
        names = [n for n in goal if PARTS[group.group] in n]
        assert (group.tensors, group.nbytes) == (
            len(names),
            sum(tiny.after[n].nbytes for n in names),
        )
        assert group.saved == (len(names) if group.group in asked else 0)
        assert group.share == pytest.approx(square(goal[n] for n in names) / total, rel=1e-5)
        others = [name for name in asked if name != group.group]
        without = tiny.extract(rank=3, **asking(*others)).error
        assert group.error_without == pytest.approx(without, rel=1e-6)
        if group.group == "embeddings" and "embeddings" not in asked:
            assert group.error_with is None
            continue
        with_it = tiny.extract(rank=3, **asking(*others, group.group)).error
        assert group.error_with == pytest.approx(with_it, rel=1e-6)
    assert report.verified == pytest.approx(report.error, rel=1e-3)
    assert {g["group"] for g in json.loads(json.dumps(report.to_dict()))["groups"]} == {*GROUPS}


def test_what_is_left_out_unasked_is_a_notice_by_name(tiny: Pair) -> None:
    """It names the tensors, their share, and the option; whoever said --skip is not told again."""
    report = tiny.extract(rank=2)
    texts = [n.message for n in report.warnings if n.code == "not-saved"]
    options = ["--save norms", "--save biases", "--embeddings"]
    programs = ["vLLM refuses", "vLLM refuses", "LoRAX, TGI and exllamav3 drop"]
    names = [NORM, "k_proj.bias", TOKENS]
    for text, *parts in zip(texts, names, options, programs, strict=True):
        assert all(part in text for part in (*parts, "% of ‖ΔW‖²"))
    assert not any("lm_head" in text for text in texts)
    assert codes(tiny.extract(rank=2, skip=GROUPS)) == []
    assert codes(tiny.extract(rank=2, **EVERYTHING)) == []
    assert codes(tiny.extract(rank=2, save=["norms"])) == ["not-saved"] * 2
    assert codes(tiny.extract(rank=2, embeddings=True)) == ["not-saved"] * 2
    assert codes(tiny.extract(dry_run=True)) == ["not-saved"] * 3


def test_without_a_change_there_is_no_notice(tmp_path: Path) -> None:
    """A fine-tune that left all of them alone has nothing to say of them."""
    state = model()
    report = Pair(tmp_path, state, moved(state, "_proj.weight")).extract(rank=2)
    assert codes(report) == []
    assert report.groups == []


def test_one_of_them_can_be_saved_by_name(tiny: Pair) -> None:
    """--save GLOB takes a single norm or embedding, and the bias of a layer that is saved whole."""
    names = ["model.norm", "layers.0.self_attn.k_proj", "embed_tokens"]
    report = tiny.extract(rank=16, save=names, verify=True)
    assert saved(tiny.out).keys() == {NORM, BIAS, BIAS.replace("bias", "weight"), TOKENS}
    assert {g.group: (g.saved, g.tensors) for g in report.groups} == {
        "norms": (1, 3), "biases": (1, 2), "embeddings": (1, 1),
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


@pytest.mark.parametrize("group", GROUPS)
def test_asking_for_and_skipping_the_same_is_refused(tiny: Pair, group: str) -> None:
    """--skip norms is accepted, as it always was, but not together with --save norms."""
    option = f"--save {group}" if group in SAVED else f"--{group}"
    tiny.fails(UsageError, f"--skip {group} and {option}", skip=[group], **asking(group))


def test_the_tokens_get_factors_on_request(tiny: Pair) -> None:
    """--embeddings gives them lora_embedding factors, as PEFT has them for `embed_tokens`."""
    report = tiny.extract(rank=16, embeddings=True, verify=True)
    assert (report.modules[0].path, report.modules[0].kind) == ("model.embed_tokens", "embedding")
    assert f"{PREFIX}model.embed_tokens.lora_embedding_A" in load_file(tiny.out / WEIGHTS)
    assert any("embed_tokens" in name for name in config_of(tiny.out)["target_modules"])
    delta = moves(tiny.before, tiny.after)[TOKENS]
    assert torch.allclose(products(tiny.out)[TOKENS], delta, rtol=0, atol=1e-6)
    record = json.loads((tiny.out / "loratool.json").read_text())
    assert record["options"]["embeddings"] is True
    assert TOKENS not in record["result"]["left"]


def test_other_embeddings_go_the_same_way(tmp_path: Path) -> None:
    """Embeddings of positions, which are no factors, are on request too, and whole then."""
    name = "model.embed_positions.weight"
    state = model() | {name: random_for("p", 12, 16).float()}
    pair = Pair(tmp_path, state, moved(state))
    report = pair.extract(rank=16)
    (text,) = [n.message for n in report.warnings if "embeddings changed" in n.message]
    assert f"--embeddings saves {name} whole" in text
    assert "--embeddings gives model.embed_tokens factors" in text
    assert {TOKENS, name} < {t.name for t in report.left if t.why == "unasked"}
    report = pair.extract(rank=16, embeddings=True, verify=True)
    assert saved(pair.out).keys() == {name}
    (group,) = [g for g in report.groups if g.group == "embeddings"]
    assert (group.saved, group.tensors) == (2, 2)
    assert group.error_with == pytest.approx(report.error, rel=1e-6)
    without = pair.extract(rank=16).error
    assert group.error_without == pytest.approx(without, rel=1e-6)


def test_embeddings_that_a_budget_leaves_no_rank_are_not_in_the_adapter(tmp_path: Path) -> None:
    """What was asked for and got nothing is counted with what is left out."""
    state = model()
    tuned = moved(state, "_proj.weight", decay=0.9)
    tuned[TOKENS] = state[TOKENS] + 1e-4 * random_for("t", 40, 16).float()
    pair = Pair(tmp_path, state, tuned)
    report = pair.extract(budget="6kB", patterns=True, embeddings=True)
    assert "no-budget" in codes(report)
    (group,) = report.groups
    assert (group.saved, group.tensors, group.error_with) == (0, 1, None)
    assert group.error_without == pytest.approx(report.error, rel=1e-6)


@pytest.mark.parametrize("include", [["embed_tokens"], ["model.embed*"]], ids=str)
def test_to_include_is_not_to_ask(tiny: Pair, include: list[str]) -> None:
    """--include narrows what is taken, for embeddings as for norms; where nothing is left but what
    is on request, the refusal names the option that takes it."""
    error = tiny.fails(ValueRangeError, "without being asked for", TOKENS, include=include)
    assert "--embeddings" in error.hint
    report = tiny.extract(rank=2, include=[*include, "lm_head", "model.norm"])
    assert [m.path for m in report.modules] == ["lm_head"]
    assert {t.name for t in report.left if t.why == "unasked"} == {TOKENS, NORM}
    report = tiny.extract(rank=2, include=include, embeddings=True)
    assert [m.path for m in report.modules] == ["model.embed_tokens"]


def test_a_model_of_which_embeddings_alone_changed(tmp_path: Path) -> None:
    """It is refused with the option that makes an adapter of it, and then there is one."""
    state = model()
    pair = Pair(tmp_path, state, moved(state, TOKENS, NORM))
    error = pair.fails(ValueRangeError, "without being asked for", TOKENS, NORM)
    assert "--embeddings" in error.hint
    assert [m.path for m in pair.extract(rank=2, embeddings=True).modules] == ["model.embed_tokens"]


def test_saving_embeddings_is_told_from_asking_for_factors(tiny: Pair) -> None:
    """--save is for whole tensors, and its globs fit modules: whoever writes `--save embeddings`
    is told of both options."""
    error = tiny.fails(UsageError, "--save 'embeddings' matches no module", save=["embeddings"])
    assert "--embeddings gives them factors" in error.hint
    assert "--save embed_tokens" in error.hint


@pytest.mark.parametrize("share", [0.5, 0.99])
def test_a_change_that_is_mostly_of_embeddings_is_no_bad_fit(tmp_path: Path, share: float) -> None:
    """What is left out unasked says nothing against the rank, nor against the base: there is the
    one notice that says what share it is."""
    state = model()
    tuned = moved(state, "_proj.weight", decay=0.1)
    moving = random_for("e", 40, 16)
    rest = square(moves(state, tuned).values())
    moving *= math.sqrt(rest * share / (1 - share)) / float(moving.norm())
    tuned[TOKENS] = (state[TOKENS].double() + moving).float()
    pair = Pair(tmp_path, state, tuned)
    report = pair.extract(rank=8)
    assert codes(report) == ["not-saved"]
    assert report.held == pytest.approx(1 - share, rel=1e-3)
    assert f"{100 * share:g}% of ‖ΔW‖²" in report.warnings[0].message


def test_a_large_change_of_embeddings_is_held_against_their_own_weights(tmp_path: Path) -> None:
    """Large embeddings that moved by half of themselves do not make two models strangers; those
    that moved by more do."""
    state = model()
    state[TOKENS] = state[TOKENS] * 50
    tuned = moved(state, "_proj.weight")
    for factor, found in ((1.5, ["not-saved"]), (-0.5, ["not-saved", "unrelated"])):
        tuned[TOKENS] = state[TOKENS] * factor
        folder = tmp_path / str(factor)
        assert codes(Pair(folder, state, tuned).extract(rank=4)) == found


def test_the_terminal_shows_share_and_cost(tiny: Pair) -> None:
    """A line for each group, with the error either way where it is known; on stderr the names."""
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
    assert "1 tensor" in lines["embeddings"]
    assert "left out (--embeddings); the error is " in lines["embeddings"]
    assert lines["embeddings"].endswith("% without them")
    assert done.stderr.count("[not-saved]") == 3
    asked = ["--save", "norms", "--save", "biases", "--embeddings"]
    done = run_cli(*arguments, *asked, "--overwrite", COLUMNS="200")
    assert done.stderr == ""
    assert "left out" not in done.stdout
    assert "saved whole" in done.stdout
