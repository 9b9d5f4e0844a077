"""An extracted adapter on its base is the fine-tune, in PEFT and merged, for every architecture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers.architectures import ARCHITECTURES, BART, T5, Architecture, pair_of_texts
from helpers.models import read
from helpers.tuning import EXACT, FUSED, MODELS, WARNINGS, Tuning, computed, load_peft, tune

from loratool.errors import MatchError

#: Those that are tried always; the others are `long`.
FEW = ("llama", "llama-tied", "gpt2", "bert", "clip", "whisper")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FEW else pytest.mark.long) for name in MODELS]
)
def test_extracted_adapter_gives_the_tuned_model(name: str, tmp_path: Path) -> None:
    """Every parameter of a fine-tune is in its adapter, in a place where PEFT puts it back."""
    work = tune(tmp_path, MODELS[name])
    report = work.extract(patterns=True)
    assert report.unchanged == 0
    assert report.left == []
    work.check(None, *WARNINGS.get(name, ()))


#: Models in which encoder, decoder and head share a matrix, and the name of that matrix.
SHARED = {
    "t5": (ARCHITECTURES["t5"], "shared"),
    "t5-gated": (ARCHITECTURES["t5-gated"], "shared"),
    "mt5": (Architecture("MT5ForConditionalGeneration", "MT5Config", T5, pair_of_texts), "shared"),
    "bart": (ARCHITECTURES["bart"], "model.shared"),
    "marian": (Architecture("MarianMTModel", "MarianConfig", BART, pair_of_texts), "model.shared"),
}


@pytest.mark.parametrize("name", SHARED)
def test_matrix_with_three_places_is_refused_by_name(name: str, tmp_path: Path) -> None:
    """An adapter has no place for a change of a matrix that encoder, decoder and head share."""
    found, path = SHARED[name]
    work = tune(tmp_path, found)
    with pytest.raises(MatchError) as caught:
        work.extract()
    assert f"{path}.weight" in caught.value.message
    assert f"--exclude {path}" in caught.value.hint
    assert not work.adapter.exists()


@pytest.mark.parametrize("name", SHARED)
def test_such_a_matrix_is_left_out_like_other_embeddings(name: str, tmp_path: Path) -> None:
    """Without --embeddings it is no refusal, but in the notice, which does not offer factors."""
    found, path = SHARED[name]
    work = tune(tmp_path, found)
    report = work.extract(embeddings=False)
    left = {t.name: t.why for t in report.left}
    assert left[f"{path}.weight"] == "unasked"
    (text,) = [n.message for n in report.warnings if "embeddings changed" in n.message]
    assert f"{path}.weight is one matrix of encoder, decoder and head" in text
    assert "factors;" not in text
    assert report.verified == pytest.approx(report.error, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        *[(name, "exclude") for name in SHARED],
        ("t5", "skip"),
        ("bart", "skip"),
        ("t5", "unchanged"),
    ],
)
def test_all_but_the_shared_matrix_is_extracted(name: str, option: str, tmp_path: Path) -> None:
    """Where the shared matrix is left out, or did not change, the rest is the tuned model's."""
    found, path = SHARED[name]
    # Heads of their own, position embeddings and relative biases are embeddings too.
    only = "" if option == "exclude" else "(layer|layers|block)[.]"
    rest = f"^(?!.*(relative_attention_bias|{re.escape(path)}))(?=.*{only})"
    work = tune(tmp_path, found, "" if option == "exclude" else rest)
    options: dict[str, Any] = {"skip": {"skip": ["embeddings"]}, "exclude": {"exclude": [path]}}
    report = work.extract(**options.get(option, {}))
    if option == "exclude":
        assert [t.name for t in report.left] == [f"{path}.weight"]
        model = found.load(work.tuned)
        given = read(work.base)[f"{path}.weight"]
        model.get_parameter(f"{path}.weight").data.copy_(given)
        model.save_pretrained(tmp_path / "expected")
        work = OtherTuned(found, tmp_path)
    work.check()


class OtherTuned(Tuning):
    """A fine-tune of which one matrix was left out."""

    @property
    def tuned(self) -> Path:
        return self.folder / "expected"


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "olmoe"])
def test_experts_of_one_low_rank_are_the_same_in_peft_and_merged(name: str, tmp_path: Path) -> None:
    """A truncated adapter of experts means in PEFT what it means in merge."""
    work = tune(tmp_path, MODELS[name])
    work.extract(rank=4)
    base = work.found.load(work.base)
    inputs = work.found.inputs()
    before = computed(base, inputs)
    model = load_peft(base, work.adapter, *FUSED)
    found, expected = computed(model, inputs), computed(work.merged(), inputs)
    assert (found - expected).norm() < EXACT * (expected - before).norm()
    assert 0.02 < work.error(model, before) < 0.98
