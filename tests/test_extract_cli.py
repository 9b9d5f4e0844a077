"""extract: mistakes, dry runs, the command line, and what a run leaves on the disk."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from adapters import WEIGHTS, codes, config_of
from conftest import run_cli
from files import assert_clean, assert_clear, beside, permissions_that_count, sha256s, write_base
from safetensors.torch import load_file, save_file
from test_extract import BF16, Q0, UP1, Pair, model, moved, random_for, write

import loratool
from loratool.cli.extract import extract_command
from loratool.errors import (
    BaseError,
    FileError,
    MatchError,
    OutputError,
    UsageError,
    ValueRangeError,
)

NORM = "model.norm.weight"


@pytest.fixture
def tiny(tmp_path: Path) -> Pair:
    """A model in which everything changed."""
    state = model()
    return Pair(tmp_path, state, moved(state))


# --- the same every time -------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"rank": 3}, {"energy": 0.7}, {"budget": "30KB"}], ids=str)
def test_bytes_depend_neither_on_threads_nor_on_the_run(tmp_path: Path, options: Any) -> None:
    """Two runs, and 1 and 3 threads, write the same three files."""
    state = model(size=96, layers=1)
    pair = Pair(tmp_path, state, moved(state, decay=0.9))
    found = []
    for threads in (None, 1, 3):
        pair.extract(threads=threads, dtype="bfloat16", **options)
        found.append(sha256s(pair.out))
    assert set(found[0]) == {WEIGHTS, "adapter_config.json", "loratool.json"}
    assert found[0] == found[1] == found[2]


def test_the_seed_matters_only_where_something_is_random(tmp_path: Path, tiny: Pair) -> None:
    """Small matrices, and all with --exact, do not depend on the seed; large ones do, a little."""
    for pair, exact, same in (
        (tiny, False, True),
        (Pair(tmp_path / "large", *_large()), False, False),
        (Pair(tmp_path / "exact", *_large()), True, True),
    ):
        digests, errors = set(), []
        for seed in (0, 7):
            report = pair.extract(rank=2, seed=seed, exact=exact)
            digests.add(sha256s(pair.out)[WEIGHTS])
            errors.append(report.error)
        assert (len(digests) == 1) is same
        assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def _large() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    state = {f"{Q0}.weight": random_for("q", 120, 130).float()}
    return state, moved(state, decay=0.9)


def test_any_seed_will_do(tmp_path: Path) -> None:
    """A seed of many digits is no crash: it is taken or refused in words."""
    pair = Pair(tmp_path, *_large())
    try:
        pair.extract(rank=2, seed=10**20)
    except UsageError as error:
        assert_clear(error, "seed")
        assert_clean(pair.out)


def test_files_and_shards_do_not_matter(tmp_path: Path, tiny: Pair) -> None:
    """The same tensors in shards or in a torch file give the same weights."""
    tiny.extract(rank=3)
    wanted = sha256s(tiny.out)[WEIGHTS]
    for kind in ("shards", "bin"):
        folder = tmp_path / kind
        base = write(folder / "base", tiny.before, kind)
        fine = write(folder / "fine", tiny.after, kind)
        loratool.extract(base, fine, folder / "out", rank=3, dtype="float32")
        mine = load_file(folder / "out" / WEIGHTS)
        theirs = load_file(tiny.out / WEIGHTS)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert wanted == sha256s(tiny.out)[WEIGHTS]


def test_progress_ends_at_the_total(tiny: Pair) -> None:
    """Progress grows to exactly the bytes announced, with and without --verify and a dry run."""
    for options in ({"rank": 2}, {"rank": 2, "verify": True}, {"dry_run": True}):
        calls: list[tuple[int, int, str]] = []
        tiny.extract(progress=lambda *call: calls.append(call), **options)  # noqa: B023
        done = [c[0] for c in calls]
        assert done == sorted(done)
        assert calls[-1][0] == calls[-1][1], options


# --- dry runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("options", [{}, {"skip": ["norms"]}, {"save": ["lm_head"]}], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_a_dry_run_predicts_the_sizes(tmp_path: Path, dtype: str, options: Any, tied: bool) -> None:
    """A dry run writes nothing, measures what a run does, and its sizes are those of the files."""
    state = model()
    if tied:
        del state["lm_head.weight"]
        options = {**options, "save": []}
    pair = Pair(tmp_path, state, moved(state), tie_word_embeddings=tied)
    planned = pair.extract(dry_run=True, dtype=dtype, **options)
    assert_clean(pair.out)
    assert list(planned.proposals) == [4, 8, 16]  # no module has more
    for rank in (4, 16):
        report = pair.extract(rank=rank, dtype=dtype, **options)
        assert planned.proposals[rank] == report.bytes_written
        assert (pair.out / WEIGHTS).stat().st_size == report.bytes_written
    assert planned.norm == report.norm
    assert planned.noise == report.noise
    assert planned.unchanged == report.unchanged
    assert (planned.saved, planned.left) == (report.saved, report.left)
    for before, after in zip(planned.modules, report.modules, strict=True):
        assert (before.path, before.norm, before.noise) == (after.path, after.norm, after.noise)
        assert before.relative == after.relative
        assert (before.rank, before.kept, before.error) == (None, None, None)
    assert (planned.held, planned.error, planned.dry_run) == (None, None, True)
    assert pair.extract(rank=5, dry_run=True, dtype=dtype, **options).proposals.keys() == {5}


@pytest.mark.parametrize("extra", [-1, 0, 1, 50])
def test_a_dry_run_with_a_budget_is_right_about_the_rank(tiny: Pair, extra: int) -> None:
    """The one rank that a dry run sees in a budget is what --uniform writes; and a budget of just
    the size of a file is enough for it."""
    size = tiny.extract(rank=8).bytes_written
    planned = tiny.extract(budget=size + extra, dry_run=True)
    report = tiny.extract(budget=size + extra, uniform=True)
    assert planned.proposals == {report.rank: report.bytes_written}
    assert report.rank == (7 if extra < 0 else 8)


def test_a_dry_run_that_no_rank_fits_says_so(tiny: Pair) -> None:
    """A budget that is too small for one rank is refused before anything is decomposed, too."""
    tiny.fails(UsageError, "too small", rank=None, budget=100, dry_run=True)


# --- mistakes ------------------------------------------------------------------------------------


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
    """Packed weights on either side are refused, told by config or by tensors, with the role."""
    pair = Pair(tmp_path, model(), moved(model()))
    role = {"base": "base", "tuned": "tuned model"}[side]
    packed = {n: t for n, t in model().items() if n != f"{Q0}.weight"}
    packed |= {f"{Q0}.qweight": torch.ones(4, 16, dtype=torch.int32)}
    by_tensor = write(tmp_path / "one", packed)
    pair.fails(BaseError, role, f"{Q0}.qweight", str(by_tensor), **{side: by_tensor})
    eight = model() | {f"{Q0}.weight": torch.ones(16, 16, dtype=torch.int8)}
    by_dtype = write(tmp_path / "two", eight)
    pair.fails(BaseError, role, f"{Q0}.weight", "I8", **{side: by_dtype})
    by_config = write(tmp_path / "three", model(), quantization_config={"quant_method": "awq"})
    error = pair.fails(BaseError, role, "awq", str(by_config), **{side: by_config})
    assert "merge" not in error.hint.lower()


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


@pytest.mark.parametrize("which", ["base", "tuned"])
@pytest.mark.parametrize("where", ["same", "inside", "around", "linked"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_in_the_place_of_an_input_is_refused(
    tmp_path: Path, tiny: Pair, which: str, where: str, overwrite: bool
) -> None:
    """Equal to, inside of or around an input, by any path: refused, and the inputs stay."""
    source = tiny.base if which == "base" else tiny.tuned
    (tmp_path / "link").symlink_to(source)
    output = {
        "same": source, "inside": source / "lora", "around": source.parent,
        "linked": tmp_path / "link" / "lora",
    }[where]  # fmt: skip
    before = sha256s(tmp_path / "in")
    with pytest.raises(OutputError) as caught:
        loratool.extract(tiny.base, tiny.tuned, output, rank=2, overwrite=overwrite)
    assert_clear(caught.value, str(tmp_path / "in"))
    assert sha256s(tmp_path / "in") == before
    assert sorted(os.listdir(tmp_path / "in")) == ["base", "fine"]


def test_an_existing_output_stays_unless_it_may_be_overwritten(tmp_path: Path, tiny: Pair) -> None:
    """Without --overwrite nothing is replaced, a dry run refuses too; with it only an adapter."""
    tiny.extract(rank=2)
    before = sha256s(tiny.out)
    for dry_run in (False, True):
        with pytest.raises(OutputError) as caught:
            loratool.extract(tiny.base, tiny.tuned, tiny.out, rank=3, dry_run=dry_run)
        assert_clear(caught.value, str(tiny.out))
        assert "--overwrite" in caught.value.hint
        assert sha256s(tiny.out) == before
    with pytest.raises(ValueRangeError):  # a failed overwrite keeps what was there
        loratool.extract(
            tiny.base, tiny.tuned, tiny.out, rank=3, overwrite=True, include=["k_proj"],
            skip=["biases"], exclude=["k_proj"],
        )  # fmt: skip
    assert sha256s(tiny.out) == before
    loratool.extract(tiny.base, tiny.tuned, tiny.out, rank=3, overwrite=True)
    assert config_of(tiny.out)["r"] == 3
    assert beside(tiny.out) == []
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError):
        loratool.extract(tiny.base, tiny.tuned, mine, rank=3, overwrite=True)
    assert (mine / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("dry_run", [False, True])
def test_nothing_to_hold_is_refused(tmp_path: Path, dry_run: bool) -> None:
    """No change in what was chosen, and changes of norms alone, are errors that name what did
    change."""
    some = Pair(tmp_path, model(), moved(model(), f"{UP1}.weight"))
    error = some.fails(
        ValueRangeError, "Nothing differs in what was selected", f"{UP1}.weight",
        include=["q_proj"], dry_run=dry_run,
    )  # fmt: skip
    assert "--include" in error.hint
    norms = Pair(tmp_path / "norms", model(), moved(model(), "norm.weight"))
    norms.fails(ValueRangeError, "No weight that could become factors", NORM, dry_run=dry_run)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"rank": None}, ["No rank given"]),
        ({"energy": 0.5}, ["--rank and --energy"]),
        ({"budget": "1MB"}, ["--rank and --budget"]),
        ({"rank": None, "energy": 0.5, "budget": "1MB"}, ["--energy and --budget"]),
        ({"max_rank": 4}, ["--rank and --max-rank"]),
        ({"rank": None, "max_rank": 4}, ["No rank given"]),
        ({"rank": None, "max_rank": 4, "dry_run": True}, ["--max-rank"]),
        ({"rank": 0}, ["--rank 0"]),
        ({"rank": -3}, ["--rank -3"]),
        ({"rank": None, "energy": 0.0}, ["--energy 0"]),
        ({"rank": None, "energy": 1.01}, ["--energy 1.01"]),
        ({"rank": None, "energy": math.nan}, ["--energy nan"]),
        ({"rank": None, "energy": 0.9, "max_rank": 0}, ["--max-rank 0"]),
        ({"rank": None, "budget": 0}, ["--budget"]),
        ({"rank": None, "budget": "-5MB"}, ["'-5MB'", "size"]),
        ({"rank": None, "budget": "50 parsecs"}, ["'50 parsecs'"]),
        ({"rank": None, "budget": ""}, ["''"]),
        ({"rank": None, "budget": "MB"}, ["'MB'"]),
        ({"dtype": "int8"}, ["'int8'"]),
        ({"dtype": "base"}, ["'base'"]),
        ({"skip": ["norm"]}, ["'norm'"]),
        ({"skip": ["linears"]}, ["'linears'"]),
        ({"threads": 0}, ["0 threads"]),
        ({"device": "gpu"}, ["'gpu'"]),
        ({"device": "mps"}, ["mps"]),
        ({"device": "cuda:99"}, ["cuda:99"]),
        ({"include": ["nosuch"]}, ["--include 'nosuch'", "no module"]),
        ({"exclude": ["q_proj", "*.nosuch"]}, ["--exclude '*.nosuch'"]),
        ({"save": ["layers.7.*"]}, ["--save 'layers.7.*'"]),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(
    tiny: Pair, options: dict[str, Any], parts: list[str]
) -> None:
    """Values that no option takes, contradictions and globs without a match are quoted."""
    assert tiny.fails(UsageError, *parts, **options).exit_code == 2


def test_a_near_miss_is_suggested(tiny: Pair) -> None:
    """Misspelled dtypes and groups get the nearest right one."""
    assert "float32" in tiny.fails(UsageError, dtype="flaot32").hint
    assert "norms" in tiny.fails(UsageError, skip=["nroms"]).hint


# --- all or nothing ------------------------------------------------------------------------------

_CHILD = """
import json, sys, time
import loratool.storage.staging as writer
import loratool.adapters.factorfile as peft_writer
from loratool.cli.main import main
arguments, where = json.loads(sys.argv[1])
def wait(*_):
    print("there", flush=True)
    time.sleep(60)
if where == "flushing":
    writer.sync = wait
else:
    peft_writer.AdapterWriter.add = wait
main(["extract", *arguments])
"""


def start(pair: Pair, where: str) -> subprocess.Popen[str]:
    """An extraction that has come to a halt in the middle of its work."""
    arguments = [str(pair.base), str(pair.tuned), "--rank", "4", "-o", str(pair.out)]
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, json.dumps([arguments, where])],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n", process.communicate()
    return process


@pytest.mark.parametrize("where", ["computing", "flushing"])
def test_an_interrupted_run_leaves_nothing(tiny: Pair, where: str) -> None:
    """Ctrl-C in the middle ends the run with code 130 and a word, and nothing stays."""
    process = start(tiny, where)
    assert len(beside(tiny.out)) == 1
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert_clean(tiny.out)


@pytest.mark.parametrize("where", ["computing", "flushing"])
def test_a_killed_run_leaves_no_output_and_the_next_one_cleans_up(tiny: Pair, where: str) -> None:
    """SIGKILL in the middle: no output, inputs unharmed; the next run removes what was left."""
    before = sha256s(tiny.base.parent)
    process = start(tiny, where)
    process.kill()
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGKILL
    assert not tiny.out.exists()
    assert len(beside(tiny.out)) == 1
    assert sha256s(tiny.base.parent) == before
    tiny.extract(rank=4)
    assert beside(tiny.out) == []
    assert config_of(tiny.out)["r"] == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [({}, "disk is full"), ({"save": ["layers.1.mlp.*", "lm_head"]}, "needs"),
     ({"dtype": "float16"}, "")],
)  # fmt: skip
def test_a_full_disk_is_named_and_left_empty(
    tmp_path: Path, disk: Callable[[str], Path], options: Any, words: str
) -> None:
    """Space that runs out for the factors, or is too little for the file, ends the run in words."""
    place = disk("size=160k" if options.get("save") else "size=128k")
    state = model(64)
    pair = Pair(tmp_path, state, moved(state))
    rank = 20 if options.get("save") else 60
    with pytest.raises(OutputError) as caught:
        loratool.extract(
            pair.base, pair.tuned, place / "out", **{"rank": rank, "dtype": "float32", **options}
        )
    assert_clear(caught.value, words, str(place))
    assert "partial" not in caught.value.message
    assert os.listdir(place) == []
    assert shutil.disk_usage(place).used == 0


@pytest.mark.parametrize("options", ["size=64k", "size=1M,nr_inodes=2", "size=1M,nr_inodes=3"])
def test_a_disk_without_room_for_the_first_file_leaves_nothing(
    tiny: Pair, disk: Callable[[str], Path], options: str
) -> None:
    """Where not even the first file fits, the run leaves no directory and names the disk."""
    place = disk(options)
    if "nr_inodes" not in options:
        (place / "filler").write_bytes(bytes(shutil.disk_usage(place).free))
    before = os.listdir(place)
    with pytest.raises(OutputError) as caught:
        loratool.extract(tiny.base, tiny.tuned, place / "out", rank=2)
    assert_clear(caught.value, "disk is full", str(place))
    assert os.listdir(place) == before


def test_forbidden_places_are_named(tmp_path: Path, tiny: Pair) -> None:
    """A parent without write permission, or below a file, is an OutputError that names it."""
    parent = tmp_path / "forbidden"
    parent.mkdir(mode=0o555)
    with permissions_that_count():
        tiny.fails(OutputError, str(parent), "not allowed", output=parent / "out")
    (tmp_path / "file").write_text("mine")
    tiny.fails(OutputError, str(tmp_path / "file"), output=tmp_path / "file" / "out")


@pytest.mark.parametrize("side", ["base", "fine"])
@pytest.mark.parametrize("how", ["shrinks", "vanishes"])
def test_an_input_that_goes_away_during_the_run_is_named(
    tmp_path: Path, side: str, how: str
) -> None:
    """A weights file cut or removed while it is read is a FileError about it, not about writing."""
    before, after = model(), moved(model())
    folders = {}
    for name, state in (("base", before), ("fine", after)):
        parts = [
            {n: t for n, t in state.items() if ("norm" in n) is norm} for norm in (True, False)
        ]
        folders[name] = write_base(tmp_path / "in" / name, *parts)
    victim = folders[side] / "model-00002-of-00002.safetensors"

    def harm(*_: Any) -> None:
        if how == "vanishes":
            victim.unlink(missing_ok=True)
        else:
            os.truncate(victim, 3000)

    # Norms are measured first; the shard with the matrices is gone by then.
    with pytest.raises(FileError) as caught:
        loratool.extract(
            folders["base"], folders["fine"], tmp_path / "out", rank=2, progress=harm, threads=1
        )
    assert_clear(caught.value, str(victim))
    assert_clean(tmp_path / "out")


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_from_progress_leaves_nothing(tiny: Pair, threads: int) -> None:
    """An exception of the caller's own goes through unchanged, and nothing stays."""

    def fail(*_: Any) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        tiny.extract(rank=2, progress=fail, threads=threads)
    assert_clean(tiny.out)


def test_missing_parents_are_made_and_taken_away_again(tmp_path: Path, tiny: Pair) -> None:
    """An output in directories that do not exist is made with them; a refused one makes none."""
    loratool.extract(tiny.base, tiny.tuned, tmp_path / "new" / "deep" / "out", rank=2)
    assert os.listdir(tmp_path / "new" / "deep") == ["out"]
    after = dict(tiny.after)
    after[NORM] = torch.full((16,), math.nan)
    save_file(after, tiny.tuned / "model.safetensors")
    with pytest.raises(ValueRangeError):
        loratool.extract(tiny.base, tiny.tuned, tmp_path / "other" / "out", rank=2)
    assert not (tmp_path / "other").exists()


def test_a_new_tokenizer_comes_along(tmp_path: Path, tiny: Pair) -> None:
    """The tuned model's tokenizer is in the adapter if it is another one, and not otherwise."""
    for folder in (tiny.base, tiny.tuned):
        (folder / "tokenizer.json").write_text("{}")
    tiny.extract(rank=1)
    assert not (tiny.out / "tokenizer.json").exists()
    (tiny.tuned / "tokenizer.json").write_text('{"new": 1}')
    tiny.extract(rank=1)
    assert (tiny.out / "tokenizer.json").read_text() == '{"new": 1}'


# --- the command line ----------------------------------------------------------------------------


def test_help_has_examples_and_every_option() -> None:
    """--help lists each option with its words, and shows calls that can be copied."""
    done = run_cli("extract", "--help")
    assert done.exit_code == 0
    examples = done.stdout.split("Examples:")[1].split("Options:")[0]
    assert len(re.findall(r"^ +loratool extract .* -o ", examples, re.MULTILINE)) >= 3
    for option in extract_command.params:
        if isinstance(option, click.Option):
            assert option.help
            assert all(re.search(rf"{name}\b", done.stdout) for name in option.opts), option.name
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{base}", "{fine}"], 2, "No rank given"),
        (["{base}", "{fine}", "--rank", "2", "--energy", "0.5"], 2, "--rank and --energy"),
        (["{base}", "{fine}", "--rank", "two"], 2, "'two'"),
        (["{base}", "{fine}", "--rank", "2", "--dtype", "flaot16"], 2, "float16"),
        (["{base}", "{fine}", "--rank", "2", "--skip", "norm"], 2, "norm"),
        (["{base}", "{fine}", "--rank", "2", "--seed", "-1"], 2, "-1"),
        (["{base}", "{fine}", "--budget", "lots"], 2, "'lots' is no size"),
        (["{base}", "{fine}", "--rnk", "2"], 2, "--rank"),
        (["{base}", "--rank", "2"], 2, "TUNED"),
        (["{base}", "{base}", "--rank", "2"], 2, "the same files"),
        (["{base}", "{fine}x", "--rank", "2"], 1, "Did you mean"),
        (["{base}", "{fine}", "--rank", "2", "--include", "nosuch"], 2, "matches no module"),
        (["{base}", "{fine}", "--rank", "2", "--include", "q_proj", "--exclude", "q_proj"], 1,
         "Nothing differs"),
        (["{base}", "{fine}", "--budget", "1KB"], 2, "too small"),
    ],
)  # fmt: skip
def test_mistakes_get_one_clear_error(
    tiny: Pair, arguments: list[str], code: int, words: str
) -> None:
    """A mistake is one error in words on stderr with its exit code; one JSON object with --json."""
    places = {"base": str(tiny.base), "fine": str(tiny.tuned)}
    filled = ["extract", *[a.format(**places) for a in arguments], "-o", str(tiny.out)]
    done = run_cli(*filled, "--json")
    assert (done.exit_code, done.stdout) == (code, "")
    error = json.loads(done.stderr)
    assert error.keys() == {"error", "message", "hint"}
    assert words in " ".join(f"{error['message']} {error['hint']}".split())
    if "--rank" not in arguments or code == 1:
        plain = run_cli(*filled)
        assert (plain.exit_code, plain.stdout) == (code, "")
        assert words in " ".join(plain.stderr.split())
        assert "Traceback" not in plain.stderr
        assert plain.stderr.lower().count("error:") == 1
    assert_clean(tiny.out)


@pytest.mark.parametrize("spectrum", [False, True])
def test_json_is_what_the_library_reports(tiny: Pair, spectrum: bool) -> None:
    """--json prints one strict document, that of the library, and nothing on stderr."""
    arguments = ["extract", str(tiny.base), str(tiny.tuned), "-o", str(tiny.out), "--energy", "0.6",
                 "--skip", "norms", "--dtype", "float32", "--verify", "--json"]  # fmt: skip
    done = run_cli(*arguments, *["--spectrum"] * spectrum)
    assert (done.exit_code, done.stderr) == (0, "")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    printed = json.loads(done.stdout, parse_constant=refuse)
    digests = sha256s(tiny.out)
    report = tiny.extract(energy=0.6, skip=["norms"], verify=True)
    assert sha256s(tiny.out) == digests
    wanted = json.loads(json.dumps(report.to_dict()))
    if not spectrum:
        for module in wanted["modules"]:
            del module["singular_values"]
    for document in (printed, wanted):
        del document["seconds"]
    assert printed == wanted


def test_warnings_are_on_stderr_and_quiet_is_quiet(tiny: Pair) -> None:
    """Warnings go to stderr with their codes, the answer to stdout; -q silences stderr."""
    arguments = ["extract", str(tiny.base), str(tiny.tuned), "-o", str(tiny.out), "--rank", "20"]
    done = run_cli(*arguments)
    assert done.exit_code == 0
    assert "[rank-too-large]" in done.stderr
    assert "rank-too-large" not in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    quiet = run_cli(*arguments, "-q", "--overwrite")
    assert (quiet.exit_code, quiet.stderr) == (0, "")
    assert "q_proj" in quiet.stdout


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize(
    "options",
    [["--rank", "3", "--full", "--spectrum"], ["--energy", "0.9", "--skip", "norms", "--verify"],
     ["--dry-run"]],
    ids=str,
)  # fmt: skip
def test_lines_fit_the_terminal(tmp_path: Path, width: int, options: list[str]) -> None:
    """No line is wider than the terminal, and every module is one whole line of the table."""
    state = model(size=32, layers=12)
    fine = {n: t.to(BF16) for n, t in moved(state).items()}
    write(tmp_path / "base", state)
    write(tmp_path / "a-fine-tune-with-a-rather-long-name", fine)
    done = subprocess.run(
        [sys.executable, "-m", "loratool", "extract", "base", "a-fine-tune-with-a-rather-long-name",
         "-o", "out", *options],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "COLUMNS": str(width)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in done.stdout
    start = next(i for i, line in enumerate(lines) if line.startswith("module "))
    columns = len(re.sub(r" ([≥≤])", r"\1", lines[start]).split())
    rows = [line for line in lines[start + 1 :] if re.match(r"\s.*(_proj|lm_head)\b", line)]
    if "--spectrum" not in options:
        assert rows
        assert {len(row.split()) for row in rows} == {columns}


def test_a_closed_pipe_is_no_error(tiny: Pair) -> None:
    """A reader that leaves early gets no traceback, and the output is whole."""
    done = subprocess.run(
        ["bash", "-c",
         f"{sys.executable} -m loratool extract {tiny.base} {tiny.tuned} --rank 2 -o {tiny.out} "
         "--full | true; exit ${PIPESTATUS[0]}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (tiny.out / WEIGHTS).is_file()
    assert (done.returncode, done.stderr) == (0, "")
