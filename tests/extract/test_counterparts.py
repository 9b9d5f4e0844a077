"""Tensors of another shape, or that one side lacks, and tied or transposed ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import WEIGHTS, codes, config_of
from helpers.extracting import (
    EVERYTHING,
    Q0,
    SAVED,
    UP1,
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
    write,
)
from safetensors.torch import load_file

import loratool
from loratool.errors import MatchError
from loratool.rendering.extract import extract_sheet
from loratool.sheet import Facts, plain_text
from loratool.verbs.lint import AdapterLint


def test_a_grown_vocabulary_is_saved_whole(tmp_path: Path) -> None:
    """New tokens: embedding and head are saved as they are, with a warning of both shapes."""
    state, grown = model(), moved(model(vocabulary=43))
    tuned = moved(state) | {n: grown[n] for n in ("model.embed_tokens.weight", "lm_head.weight")}
    pair = Pair(tmp_path, state, tuned)
    report = pair.extract(rank=16, verify=True)
    assert_accounted(report, state, tuned)
    assert torch.equal(saved(pair.out)["lm_head.weight"], tuned["lm_head.weight"])
    assert torch.equal(
        saved(pair.out)["model.embed_tokens.weight"], tuned["model.embed_tokens.weight"]
    )
    text = next(n.message for n in report.warnings if n.code == "shape-changed")
    assert "another shape" in text
    assert "[40, 16]" in text
    assert "[43, 16]" in text
    assert {t.norm for t in report.saved if "lm_head" in t.name} == {None}
    assert [g.group for g in report.groups] == SAVED
    assert report.norm == pytest.approx(math.sqrt(square(moves(state, tuned).values())), rel=1e-5)


@pytest.mark.parametrize("rows", [37, 43])
@pytest.mark.parametrize("verify", [False, True])
def test_another_vocabulary_may_be_left_out(tmp_path: Path, rows: int, verify: bool) -> None:
    """Embeddings of another shape that are excluded are listed as left, and verify copes."""
    state, other = model(), moved(model(vocabulary=rows))
    tuned = moved(state) | {n: other[n] for n in ("model.embed_tokens.weight", "lm_head.weight")}
    pair = Pair(tmp_path, state, tuned)
    report = pair.extract(rank=16, verify=verify, exclude=["lm_head", "embed_tokens"], **EVERYTHING)
    assert_accounted(report, state, tuned)
    assert {t.name for t in report.left} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert report.verified is None or report.verified < 2e-5
    assert [g.group for g in report.groups] == SAVED


@pytest.mark.parametrize("head", ["score", "classifier.out_proj"])
def test_a_head_with_other_classes_is_saved(tmp_path: Path, head: str) -> None:
    """A classifier of another number of classes is saved whole, its bias too."""
    config = {"architectures": ["LlamaForSequenceClassification"]}
    state = model() | {f"{head}.weight": torch.ones(2, 16), f"{head}.bias": torch.ones(2)}
    tuned = moved(state, f"{Q0}.weight") | {
        f"{head}.weight": torch.zeros(5, 16), f"{head}.bias": torch.zeros(5),
    }  # fmt: skip
    pair = Pair(tmp_path, state, tuned, **config)
    report = pair.extract(rank=2, verify=True)
    assert_accounted(report, state, tuned)
    assert {t.name for t in report.saved} == {f"{head}.weight", f"{head}.bias"}
    assert saved(pair.out)[f"{head}.weight"].shape == (5, 16)
    assert "shape-changed" in codes(report)
    assert config_of(pair.out)["task_type"] == "SEQ_CLS"


def test_a_new_head_is_saved_and_a_dropped_one_is_a_notice(tmp_path: Path) -> None:
    """A classifier made of a language model: its head is saved, and the old one is said to be
    gone."""
    state = model()
    tuned = moved(state, f"{Q0}.weight") | {"score.weight": torch.ones(3, 16)}
    del tuned["lm_head.weight"]
    base = write(tmp_path / "base", state)
    fine = write(tmp_path / "fine", tuned, architectures=["LlamaForSequenceClassification"])
    report = loratool.extract(base, fine, tmp_path / "out", rank=2)
    assert_accounted(report, state, tuned)
    assert [t.name for t in report.saved] == ["score.weight"]
    assert "head-dropped" in codes(report)
    assert config_of(tmp_path / "out")["modules_to_save"] == ["score"]


def test_a_new_bias_is_refused(tmp_path: Path) -> None:
    """A bias that the base's layer lacks cannot be in an adapter."""
    state = model()
    pair = Pair(tmp_path, state, moved(state) | {f"{Q0}.bias": torch.ones(16)})
    pair.fails(MatchError, f"{Q0}.bias", "only in the tuned model", "[16]")


@pytest.mark.parametrize("options", [{"exclude": ["q_proj"]}, {"skip": ["biases"]}], ids=str)
def test_a_new_bias_may_be_left_out(tmp_path: Path, options: Any) -> None:
    """The refusal says `leave them out`, and then it is possible: it is listed as left."""
    state = model()
    tuned = moved(state) | {f"{Q0}.bias": torch.ones(16)}
    pair = Pair(tmp_path, state, tuned)
    report = pair.extract(rank=2, **options)
    assert f"{Q0}.bias" in {t.name for t in report.left}


def test_a_tensor_that_only_the_base_has_is_refused_unless_excluded(tmp_path: Path) -> None:
    """A module that the tuned model lacks is refused; --exclude says that it is meant."""
    state = model()
    tuned = {n: t for n, t in moved(state).items() if n != f"{UP1}.weight"}
    pair = Pair(tmp_path, state, tuned)
    pair.fails(MatchError, f"{UP1}.weight", "only in the base", "[32, 16]")
    pair.extract(rank=2, exclude=["layers.1.mlp.*"])
    assert f"{UP1}.weight" not in products(pair.out)


def test_a_module_that_only_the_base_has_can_be_excluded_by_its_path(tmp_path: Path) -> None:
    """--exclude with exactly the path that the refusal names is no `matches no module`."""
    state = model()
    tuned = {n: t for n, t in moved(state).items() if n != f"{UP1}.weight"}
    Pair(tmp_path, state, tuned).extract(rank=2, exclude=[UP1])


def test_a_tied_head_that_is_excluded_takes_its_embedding_along(tmp_path: Path) -> None:
    """The two are one matrix, so --exclude with the name of either leaves both out."""
    state = model()
    del state["lm_head.weight"]
    pair = Pair(tmp_path, state, moved(state), tie_word_embeddings=True)
    for name, other in (("lm_head", "embed_tokens"), ("embed_tokens", "lm_head")):
        report = pair.extract(rank=2, exclude=[name], **EVERYTHING, overwrite=True)
        assert [t.name for t in report.left] == ["model.embed_tokens.weight"]
        assert not any("embed" in m.path or "head" in m.path for m in report.modules)
        (notice,) = [n for n in report.warnings if n.code == "left-by-one-name"]
        assert f"{name}.weight is left out by what was selected" in notice.message
        assert f"{other}.weight" in notice.message


@pytest.mark.parametrize(
    ("options", "is_said"),
    [
        ({"include": ["embed_tokens", "q_proj"]}, True),
        ({"include": ["lm_head", "q_proj"]}, True),
        ({"skip": ["heads"]}, True),
        ({"skip": ["heads"], "exclude": ["embed_tokens"]}, False),
        ({"include": ["q_proj"]}, False),
        ({"include": ["q_proj", "lm_head", "embed_tokens"]}, False),
    ],
)
def test_what_goes_with_its_other_name_is_said(
    options: dict[str, Any], is_said: bool, tmp_path: Path
) -> None:
    """Whoever selects one of two names of a matrix is told why it is not in the adapter, and the
    report does not tell of the option that was given."""
    state = model()
    del state["lm_head.weight"]
    pair = Pair(tmp_path, state, moved(state), tie_word_embeddings=True)
    report = pair.extract(rank=2, embeddings=True, **options)
    assert ("left-by-one-name" in codes(report)) == is_said
    facts = [row for piece in extract_sheet(report).pieces if isinstance(piece, Facts)
             for row in piece.rows]  # fmt: skip
    said = [plain_text(words) for what, words in facts if what == "embeddings"]
    assert all("--embeddings" not in text for text in said)
    assert all(group.unasked == 0 for group in report.groups if group.group == "embeddings")


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    """Tied models: one change, counted once, in factors for both places, one the transpose."""
    state = {n: t for n, t in model().items() if n != "lm_head.weight"}
    pair = Pair(tmp_path, state, moved(state), tie_word_embeddings=True)
    report = pair.extract(rank=16, verify=True, **EVERYTHING)
    have = products(pair.out)
    assert torch.allclose(
        have["lm_head.weight"], have["model.embed_tokens.weight"], rtol=0, atol=1e-9
    )
    assert report.norm == pytest.approx(
        math.sqrt(square(moves(state, pair.after).values())), rel=1e-5
    )
    assert report.verified is not None
    assert report.verified < 2e-5
    assert distance(state, pair.after, pair.out) < 2e-5
    assert config_of(pair.out)["ensure_weight_tying"]


def test_a_tied_head_is_left_out_with_its_embedding(tmp_path: Path) -> None:
    """By default neither is in the adapter, in file or config, and the notice says so of both."""
    state = {n: t for n, t in model().items() if n != "lm_head.weight"}
    pair = Pair(tmp_path, state, moved(state), tie_word_embeddings=True)
    report = pair.extract(rank=16, verify=True)
    assert not any("embed" in n or "head" in n for n in load_file(pair.out / WEIGHTS))
    assert "ensure_weight_tying" not in config_of(pair.out)
    assert_selected(pair.out, state)
    (text,) = [n.message for n in report.warnings if "embeddings changed" in n.message]
    assert "lm_head.weight is the same matrix, so its change is left out too" in text
    assert "llama.cpp refuses those of a head" in text
    goal = moves(state, pair.after)
    gone = [n for n in goal if "embed" in n or "norm" in n or n.endswith(".bias")]
    assert report.error == pytest.approx(
        math.sqrt(square(goal[n] for n in gone) / square(goal.values())), rel=1e-4
    )
    assert report.verified == pytest.approx(report.error, rel=1e-3)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_a_tied_head_is_saved_whole_by_either_name(
    tmp_path: Path, name: str, embeddings: bool
) -> None:
    """The two are one matrix, so --save with the name of either saves both."""
    state = {n: t for n, t in model().items() if n != "lm_head.weight"}
    pair = Pair(tmp_path, state, moved(state), tie_word_embeddings=True)
    report = pair.extract(rank=4, save=[name], embeddings=embeddings, verify=True)
    whole = saved(pair.out)
    assert whole.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    assert all(torch.equal(v, pair.after["model.embed_tokens.weight"]) for v in whole.values())
    assert [(g.saved, g.tensors) for g in report.groups if g.group == "embeddings"] == [(1, 1)]


@pytest.mark.parametrize("sides", [(True, False), (False, True)], ids=str)
def test_a_head_that_one_side_alone_ties_is_a_head(
    tmp_path: Path, sides: tuple[bool, bool]
) -> None:
    """Where it is another matrix than the embedding in one of the two models, it has factors, and
    the embedding is left out without it."""
    folders = {}
    for name, tied in zip(("base", "tuned"), sides, strict=True):
        state = model() if name == "base" else moved(model())
        kept = {n: t for n, t in state.items() if not (tied and n == "lm_head.weight")}
        folders[name] = write(tmp_path / name, kept, tie_word_embeddings=tied)
    report = loratool.extract(folders["base"], folders["tuned"], tmp_path / "out", rank=2)
    assert "lm_head" in {m.path for m in report.modules}
    assert {t.name for t in report.left if "norm" not in t.name and "bias" not in t.name} == {
        "model.embed_tokens.weight"
    }
    assert not any("same matrix" in n.message for n in report.warnings)
    # llama.cpp refuses these factors where the base's head is tied, and lint says so.
    assert ("head-untied" in codes(report)) == sides[0]
    (adapter,) = loratool.lint(tmp_path / "out", base=folders["base"]).adapters
    assert isinstance(adapter, AdapterLint)
    refused = {v.program for v in adapter.verdicts if v.outcome == "refused"}
    assert ("llamacpp" in refused) == sides[0]
    again = {"rank": 2, "skip": ["heads"], "overwrite": True}
    report = loratool.extract(folders["base"], folders["tuned"], tmp_path / "out", **again)
    assert "head-untied" not in codes(report)


def test_weights_that_are_stored_transposed_are_told_by_the_architecture(tmp_path: Path) -> None:
    """GPT-2 stores [in, out]: the factors are those of the transposed matrix, square ones too."""
    at = "transformer.h.0."
    shapes = {"attn.c_attn": (8, 24), "attn.c_proj": (8, 8), "mlp.c_fc": (8, 32)}
    state = {f"{at}{n}.weight": random_for(n, *s).float() for n, s in shapes.items()}
    state["transformer.wpe.weight"] = random_for("wpe", 10, 8).float()
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    pair = Pair(tmp_path, state, moved(state), **config)
    report = pair.extract(rank=8, verify=True, embeddings=True)
    assert config_of(pair.out)["fan_in_fan_out"] is True
    goal = moves(state, pair.after)
    for path, product in products(pair.out).items():
        assert torch.allclose(product.T, goal[path], rtol=0, atol=1e-6)
    assert {m.path: m.shape for m in report.modules} == {
        f"{at}{n}": s[::-1] for n, s in shapes.items()
    }
    assert [t.name for t in report.saved] == ["transformer.wpe.weight"]
    assert report.verified is not None
    assert report.verified < 1e-5
