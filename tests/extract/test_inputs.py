"""Models that are no base and fine-tune of it are refused in words."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import WEIGHTS, codes
from helpers.extracting import Q0, Pair, model, moved, write
from helpers.files import NORM

import loratool
from loratool.errors import BaseError, FileError, MatchError, UsageError, ValueRangeError


@pytest.mark.parametrize(
    ("base", "fine", "origin", "warned"),
    [
        ("llama-instruct", "llama", "", True),
        ("my-sft", "plain", "", True),
        ("plain", "my-sft", "", False),
        ("one-chat", "other-chat", "", False),
        ("one", "other", "", False),
        ("one", "other", "org/other", True),
        ("one", "other", "org/one", False),
        ("llama-italian", "mine", "", False),
    ],
)
def test_swapped_models_are_told_by_their_names(
    tmp_path: Path, base: str, fine: str, origin: str, warned: bool
) -> None:
    """A base that sounds like the fine-tune, or says that it was made from TUNED, is a warning."""
    config = {"_name_or_path": origin} if origin else {}
    before = write(tmp_path / base, model(), **config)
    after = write(tmp_path / fine, moved(model()))
    report = loratool.extract(before, after, tmp_path / "out", rank=1, dry_run=True)
    assert ("swapped" in codes(report)) is warned


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    """Two model types are named, with both paths."""
    pair = Pair(tmp_path, model(), moved(model()))
    fine = write(tmp_path / "qwen", moved(model()), model_type="qwen2")
    pair.fails(MatchError, "llama", "qwen2", str(pair.base), str(fine), tuned=fine)


def test_another_size_is_refused(tmp_path: Path) -> None:
    """Other hidden sizes are told with tensor, expected and found."""
    pair = Pair(tmp_path, model(16), model(24))
    error = pair.fails(MatchError, "model.embed_tokens.weight", "[40, 16]", "[40, 24]")
    assert "base" in error.hint


def test_a_size_that_differs_in_places_is_refused(tmp_path: Path) -> None:
    """Models that share some shapes, as those with another MLP or fewer heads, are no pair."""
    for number, end in enumerate(("mlp.up_proj.weight", "self_attn.k_proj.bias")):
        wide = {n: torch.cat([t, t]) if n.endswith(end) else t for n, t in moved(model()).items()}
        pair = Pair(tmp_path / str(number), model(), wide)
        pair.fails(MatchError, end, str(list(model()[f"model.layers.0.{end}"].shape)))


def test_more_layers_are_refused(tmp_path: Path) -> None:
    """A model with more layers than the other is no fine-tune of it, either way round."""
    pair = Pair(tmp_path, model(layers=2), model(layers=3))
    pair.fails(MatchError, "layers.2", "only in the tuned model")
    pair.fails(MatchError, "layers.2", "only in the base", base=pair.tuned, tuned=pair.base)


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_quantised_side_is_refused(tmp_path: Path, side: str) -> None:
    """Packed weights of no known form are refused on either side, and the model is named."""
    pair = Pair(tmp_path, model(), moved(model()))
    packed = {n: t for n, t in model().items() if n != f"{Q0}.weight"}
    packed |= {f"{Q0}.qweight": torch.ones(4, 16, dtype=torch.int32)}
    by_tensor = write(tmp_path / "one", packed)
    pair.fails(BaseError, f"{Q0}.qweight", str(by_tensor), **{side: by_tensor})
    eight = model() | {f"{Q0}.weight": torch.ones(16, 16, dtype=torch.int8)}
    by_dtype = write(tmp_path / "two", eight)
    pair.fails(BaseError, f"{Q0}.weight", "I8", **{side: by_dtype})


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("name", [f"{Q0}.weight", NORM, "model.embed_tokens.weight"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "options", [{}, {"dry_run": True}, {"budget": "20KB", "rank": None}], ids=str
)
def test_values_that_are_no_numbers_are_named(
    tmp_path: Path, side: str, name: str, bad: float, options: Any
) -> None:
    """NaN and infinity stop the run: tensor, file, side and how many."""
    before, after = model(), moved(model())
    (before if side == "base" else after)[name].view(-1)[[1, 3]] = bad
    pair = Pair(tmp_path, before, after)
    role = "base" if side == "base" else "tuned model"
    folder = pair.base if side == "base" else pair.tuned
    pair.fails(ValueRangeError, name, "2 of", role, str(folder / "model.safetensors"), **options)


def test_infinity_on_both_sides_is_named(tmp_path: Path) -> None:
    """The same infinity on both sides has no difference, and is refused all the same."""
    before, after = model(), moved(model())
    before[NORM][2] = after[NORM][2] = math.inf
    Pair(tmp_path, before, after).fails(ValueRangeError, NORM, "base")


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_new_head_with_nan_is_refused(tmp_path: Path, dry_run: bool) -> None:
    """What is saved as it is must be numbers as well."""
    after = moved(model()) | {"score.weight": torch.full((2, 16), math.nan)}
    Pair(tmp_path, model(), after).fails(ValueRangeError, "score.weight", "NaN", dry_run=dry_run)


def test_differences_too_large_for_the_dtype_are_refused(tmp_path: Path) -> None:
    """Factors that float16 cannot hold are refused with the module, and float32 is the hint."""
    before, after = model(), moved(model())
    after[f"{Q0}.weight"] = after[f"{Q0}.weight"] * 1e12
    pair = Pair(tmp_path, before, after)
    error = pair.fails(ValueRangeError, Q0, "too large for float16", dtype="float16")
    assert "float32" in error.hint
    assert pair.extract(rank=2, dtype="bfloat16").rank == 2
    after[f"{Q0}.weight"] = torch.full((16, 16), 3e38)
    Pair(tmp_path / "more", before, after).fails(ValueRangeError, Q0, "too large")


def test_identical_checkpoints_are_refused(tmp_path: Path, tiny: Pair) -> None:
    """A copy, in other files and in another dtype of the same values, is no fine-tune."""
    copy = write(tmp_path / "copy", {n: t.double() for n, t in tiny.before.items()}, "shards")
    for dry_run in (False, True):
        tiny.fails(ValueRangeError, "the same", "15 tensors", tuned=copy, dry_run=dry_run)
        tiny.fails(ValueRangeError, "the same", tuned=copy, exclude=["q_proj"], dry_run=dry_run)


def test_the_same_path_twice_is_refused(tmp_path: Path, tiny: Pair) -> None:
    """One model as both, by its folder, its file or a link, is told as that."""
    (tmp_path / "link").symlink_to(tiny.base)
    for tuned in (tiny.base, tiny.base / "model.safetensors", tmp_path / "link", f"{tiny.base}/."):
        tiny.fails(UsageError, "the same files", str(tiny.base), tuned=tuned)


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_an_adapter_is_no_model(tmp_path: Path, tiny: Pair, side: str) -> None:
    """An adapter in the place of a model is told as that, and the hint is about extract."""
    tiny.extract(rank=2)
    adapter = tmp_path / "adapter"
    shutil.move(tiny.out, adapter)
    for given in (adapter, adapter / WEIGHTS):
        error = tiny.fails(BaseError, str(given), "an adapter", **{side: given})
        assert "loratool merge" not in error.hint


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_files_that_are_missing_or_broken_are_named(tmp_path: Path, tiny: Pair, side: str) -> None:
    """No such path, an empty folder, a missing shard and a truncated file are FileErrors."""
    tiny.fails(FileError, str(tmp_path / "in" / "bas"), **{side: tmp_path / "in" / "bas"})
    (tmp_path / "empty").mkdir()
    tiny.fails(FileError, str(tmp_path / "empty"), "no model weights", **{side: tmp_path / "empty"})
    shards = write(tmp_path / "shards", model(), "shards")
    name = "model-00002-of-00003.safetensors"
    (shards / name).rename(tmp_path / "aside")
    tiny.fails(FileError, name, "missing", **{side: shards})
    cut = write(tmp_path / "cut", model())
    os.truncate(cut / "model.safetensors", 2000)
    tiny.fails(FileError, str(cut / "model.safetensors"), **{side: cut})
    tiny.fails(UsageError, "path is empty", **{side: ""})
