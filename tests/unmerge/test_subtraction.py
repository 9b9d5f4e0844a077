"""Without an undo file: as near as it says, and what cannot be subtracted is refused."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.files import ADAPTED, State, load, lora_on, same, small_state, write_base
from helpers.layer_cases import RESIZED, train_head, train_resized, two_linear
from helpers.models import lora, read_json, step, tiny_llama, train_on_disk
from helpers.outcomes import assert_clean, assert_clear, sha256s
from helpers.unmerging import TORCH, UNDO, codes, no_unmerge
from transformers import AutoModelForSequenceClassification

import loratool
from loratool.errors import LoraToolError, RestoreError, UsageError


def true_share(found: State, base: State, adapted: list[str]) -> float:
    changed = sum(int((found[n].double() != base[n].double()).sum()) for n in adapted)
    return changed / sum(base[n].numel() for n in adapted)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_subtraction_comes_as_near_as_it_says(
    dtype: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    """Each weight is off by the merge's rounding at most, untouched ones not at all where the
    dtype holds them; and the share that differs is near the share foretold."""
    out, back = tmp_path / "out", tmp_path / "back"
    merge = loratool.merge(base, adapter, out, dtype=dtype)
    report = loratool.unmerge(out, adapter, back)
    assert not report.exact
    assert report.dtype == "bfloat16"
    found, merged, wanted = load(back), load(out), load(base)
    adapted = merge.changes["merge"]
    for name in adapted:
        assert found[name].dtype == wanted[name].dtype
        off = (found[name].double() - wanted[name].double()).abs()
        bound = step(merged[name].abs(), merged[name].dtype) / 2
        bound += step(found[name].abs().maximum(wanted[name].abs()), torch.bfloat16) / 2
        # And what two sums in float32 round.
        slack = 1e-6 * merged[name].double().abs().max()
        assert bool((off <= bound + slack).all()), name
    rest = {n: t for n, t in found.items() if n not in adapted}
    if dtype == "bfloat16":
        assert same(rest, {n: wanted[n] for n in rest})
    share = true_share(found, wanted, adapted)
    assert report.expected_changed is not None
    assert share / 2 - 1e-4 <= report.expected_changed <= share * 2 + 1e-4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("size", [0.02, 0.3])
@pytest.mark.parametrize("stored", ["F16", "BF16", "F32"])
def test_the_share_that_will_differ_is_foretold(
    stored: str, size: float, dtype: str, tmp_path: Path
) -> None:
    """The estimate is within a factor of two of the truth, from nearly nothing to nearly all."""
    base = write_base(tmp_path / "base", small_state(192, TORCH[stored]))
    rng = np.random.default_rng(4)
    b = rng.standard_normal((192, 4)) * size / 2
    lora_dir = lora_on(tmp_path / "lora", b, rng.standard_normal((4, 192)))
    loratool.merge(base, lora_dir, tmp_path / "out", dtype=dtype)
    report = loratool.unmerge(tmp_path / "out", lora_dir, tmp_path / "back")
    share = true_share(load(tmp_path / "back"), load(base), [ADAPTED])
    assert report.expected_changed is not None
    assert share / 2 - 0.003 <= report.expected_changed <= share * 2 + 0.003


def test_the_dtype_of_a_subtraction(tmp_path: Path, lora_dir: Path) -> None:
    """By default the base's, as recorded; what is asked for otherwise; with an undo file none
    may be asked for."""
    base = write_base(tmp_path / "base", small_state(dtype=torch.bfloat16))
    out = tmp_path / "out"
    loratool.merge(base, lora_dir, out, reversible=True)
    with pytest.raises(UsageError):
        loratool.unmerge(out, lora_dir, tmp_path / "no", dtype="bfloat16")
    assert_clean(tmp_path / "no")
    for dtype, kind in ((None, "bfloat16"), ("float32", "float32"), ("base", "float16")):
        back = tmp_path / f"in-{dtype}"
        loratool.unmerge(out, lora_dir, back, dtype=dtype, subtract=True)
        assert {t.dtype for t in load(back).values()} == {getattr(torch, kind)}


def test_a_model_without_record_is_subtracted_from_with_a_notice(
    tmp_path: Path, lora_dir: Path
) -> None:
    """What merged it nobody knows: the weights given are taken for the merge's, and it is said."""
    base = write_base(tmp_path / "base", small_state())
    out = tmp_path / "out"
    loratool.merge(base, lora_dir, out, weights=[0.5], dtype="float32")
    (out / "loratool.json").unlink()
    report = loratool.unmerge(out, lora_dir, tmp_path / "back", weights=[0.5])
    assert "no-provenance" in codes(report)
    assert not report.exact
    found = load(tmp_path / "back")
    assert torch.allclose(found[ADAPTED], small_state()[ADAPTED], atol=1e-6)
    assert same({**found, ADAPTED: small_state()[ADAPTED]}, small_state())
    file = loratool.unmerge(out / "model.safetensors", lora_dir, tmp_path / "x", weights=[0.5])
    assert "no-provenance" in codes(file)
    assert torch.equal(load(tmp_path / "x")[ADAPTED], found[ADAPTED])


def test_an_undo_file_without_its_record_does_not_pass_in_silence(
    tmp_path: Path, lora_dir: Path
) -> None:
    """Where loratool.json is gone but the undo file is there, nobody is left to believe that the
    base came back: it is exact, refused, or said to be subtracted."""
    base = write_base(tmp_path / "base", small_state())
    out, back = tmp_path / "out", tmp_path / "back"
    loratool.merge(base, lora_dir, out, reversible=True)
    (out / "loratool.json").unlink()
    try:
        report = loratool.unmerge(out, lora_dir, back)
    except LoraToolError as error:
        assert_clear(error, "loratool.json")
        assert_clean(back)
    else:
        assert report.exact == (sha256s(back) == sha256s(base))
        assert report.exact or "no-provenance" in codes(report)


def test_one_of_several_adapters_is_subtracted(
    two: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    """The others stay, in the weights and in the record, and can be taken out next."""
    base, (style, task), out = two
    one = tmp_path / "without-style"
    report = loratool.unmerge(out, style, one, subtract=True)
    assert report.weights == [0.7]
    assert [r.split(" ")[0] for r in report.remaining] == ["task"]
    record = read_json(one / "loratool.json")
    assert [(a["name"], a["weight"]) for a in record["adapters"]] == [("task", -0.4)]
    assert [a["name"] for a in record["removed"]] == ["style"]
    assert not (one / UNDO).exists()
    loratool.merge(base, task, tmp_path / "wanted", weights=[-0.4], dtype="float32")
    wanted = load(tmp_path / "wanted")[ADAPTED]
    assert torch.allclose(load(one)[ADAPTED].float(), wanted, atol=0.01)
    no_unmerge(RestoreError, one, style, tmp_path / "no", "not among", "task")
    none = tmp_path / "none"
    report = loratool.unmerge(one, task, none)
    assert (report.weights, report.remaining) == ([-0.4], [])
    assert read_json(none / "loratool.json")["adapters"] == []
    assert torch.allclose(load(none)[ADAPTED].float(), small_state()[ADAPTED], atol=0.01)


def test_an_adapter_of_the_base_is_subtracted(tmp_path: Path, lora_dir: Path) -> None:
    """What the base was merged from itself is known too, with its weight."""
    base = write_base(tmp_path / "base", small_state())
    other = lora_on(tmp_path / "other", np.ones((8, 1)), np.ones((1, 8)))
    loratool.merge(base, lora_dir, tmp_path / "one", weights=[0.5], dtype="float32")
    loratool.merge(tmp_path / "one", other, tmp_path / "two", dtype="float32")
    report = loratool.unmerge(tmp_path / "two", lora_dir, tmp_path / "back")
    assert report.weights == [0.5]
    assert [r.split(" ")[0] for r in report.remaining] == ["other"]
    wanted = small_state()[ADAPTED] + 1
    assert torch.allclose(load(tmp_path / "back")[ADAPTED], wanted, atol=1e-5)
    both = loratool.unmerge(tmp_path / "two", [other, lora_dir], tmp_path / "both")
    assert both.remaining == []
    assert torch.allclose(load(tmp_path / "both")[ADAPTED], small_state()[ADAPTED], atol=1e-5)


IRREVERSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "DoRA"),
    "biases": ({"bias": "all"}, "replaced"),
    "modules": ({"modules_to_save": ["z"]}, "replaced"),
}


@pytest.mark.parametrize("name", IRREVERSIBLE)
def test_what_cannot_be_subtracted_is_refused(name: str, tmp_path: Path) -> None:
    """DoRA and replaced tensors lose the base for good, unless there is an undo file."""
    options, word = IRREVERSIBLE[name]
    trained = two_linear(**options).train(tmp_path)
    loratool.merge(trained.base, trained.adapter, tmp_path / "out", reversible=True)
    no_unmerge(
        RestoreError, tmp_path / "out", trained.adapter, tmp_path / "no", word, subtract=True
    )
    shutil.rmtree(tmp_path / "out" / "loratool")
    # That the undo file was there is on record; subtracting must be asked for.
    no_unmerge(RestoreError, tmp_path / "out", trained.adapter, tmp_path / "no", "is missing")
    loratool.merge(trained.base, trained.adapter, tmp_path / "plain")
    error = no_unmerge(RestoreError, tmp_path / "plain", trained.adapter, tmp_path / "no", word)
    assert "--reversible" in error.hint


def test_trained_rows_and_added_tensors_are_not_subtracted(tmp_path: Path) -> None:
    """Nor are replaced token rows, a head that untying added, or one that the base lacks."""
    config = lora("q_proj", trainable_token_indices=[3, 5])
    rows = train_on_disk(tmp_path / "rows", tiny_llama(), config)
    tied = train_on_disk(
        tmp_path / "tied", tiny_llama(tie_word_embeddings=True), lora("q_proj", "embed_tokens")
    )
    head = train_head(tmp_path / "head", AutoModelForSequenceClassification, "SEQ_CLS", False)
    for trained, word in ((rows, "rows that were replaced"), (tied, "added 1 tensor"), (head, "")):
        out = trained.base.parent / "out"
        loratool.merge(trained.base, trained.adapter, out)
        no_unmerge(RestoreError, out, trained.adapter, tmp_path / "no", word)


@pytest.mark.parametrize("name", ["lora-on-both", "modules-to-save", "token-rows"])
def test_an_embedding_that_was_replaced_is_not_subtracted_from(name: str, tmp_path: Path) -> None:
    """A resized embedding is the adapter's, also where the adapter adds a delta to it: the
    base's rows are gone."""
    trained = train_resized(tmp_path, 53, False, copy.deepcopy(RESIZED[name]))
    loratool.merge(trained.base, trained.adapter, tmp_path / "out")
    no_unmerge(RestoreError, tmp_path / "out", trained.adapter, tmp_path / "no", "replaced")
