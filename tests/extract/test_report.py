"""The figures of extract's report, against float64, and its record."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import WEIGHTS, config_of
from helpers.extracting import (
    BF16,
    EVERYTHING,
    F16,
    F32,
    SAVED,
    UP1,
    Pair,
    assert_selected,
    cast,
    distance,
    model,
    moved,
    moves,
    products,
    ranks_of,
    saved,
    singular,
    square,
)
from helpers.outcomes import sha256s
from safetensors.torch import load_file


def test_the_report_is_what_float64_finds(tiny: Pair) -> None:
    """Norms, shares, errors and singular values of every module, and their sums, are right."""
    report = tiny.extract(rank=4, verify=True, **EVERYTHING)
    goal, have = moves(tiny.before, tiny.after), products(tiny.out)
    for m in report.modules:
        name = f"{m.path}.weight"
        delta, values = goal[name], singular(goal[name])
        size = float(delta.norm())
        off = float((delta - have[name]).norm()) / size
        assert m.shape in (tuple(delta.shape), tuple(delta.shape)[::-1])
        assert m.norm == pytest.approx(size, rel=1e-5)
        assert m.relative == pytest.approx(size / float(tiny.before[name].norm()), rel=1e-5)
        assert m.error == pytest.approx(off, rel=1e-4)
        assert m.kept == pytest.approx(1 - off**2, rel=1e-5)
        assert m.best_error is not None
        assert m.error is not None
        best = float(values[4:].norm()) / size
        assert m.best_error <= m.error * (1 + 1e-12)
        assert m.best_error * (1 - 1e-4) <= best <= m.error * (1 + 1e-4)
        assert m.stable_rank == pytest.approx((size / float(values[0])) ** 2, rel=1e-4)
        assert m.singular_values == pytest.approx(values.tolist(), rel=1e-3)
        assert m.rounding is None
    total = square(goal.values())
    assert report.norm == pytest.approx(math.sqrt(total), rel=1e-5)
    cut = sum((m.error or 0) ** 2 * m.norm**2 for m in report.modules)
    assert report.error == pytest.approx(math.sqrt(cut / total), rel=1e-5)
    assert report.held == pytest.approx(1 - cut / total, rel=1e-6)
    assert report.best_error is not None
    assert report.error is not None
    assert report.best_error <= report.error
    assert report.verified == pytest.approx(distance(tiny.before, tiny.after, tiny.out), rel=1e-4)
    assert report.verified == pytest.approx(report.error, rel=1e-3)
    whole = saved(tiny.out)
    assert {t.name for t in report.saved} == goal.keys() & whole.keys()
    for t in report.saved:
        assert t.norm == pytest.approx(float(goal[t.name].norm()), rel=1e-5)
        assert (t.shape, t.nbytes) == (tuple(goal[t.name].shape), whole[t.name].nbytes)
    assert report.bytes_tuned == (tiny.tuned / "model.safetensors").stat().st_size
    assert report.bytes_written == (tiny.out / WEIGHTS).stat().st_size
    assert (report.rank, report.uniform, report.left, report.unchanged) == (4, True, [], 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_is_what_the_dtype_of_the_factors_takes(
    tmp_path: Path, tiny: Pair, dtype: str
) -> None:
    """`rounding` is ‖B'A' - BA‖/‖BA‖, of a module and in all; `verified` has it, `error` not."""
    exact = tiny.extract(rank=4)
    before = products(tiny.out)
    report = tiny.extract(rank=4, dtype=dtype, verify=True)
    after = products(tiny.out)
    assert {t.dtype for n, t in load_file(tiny.out / WEIGHTS).items() if "lora_" in n} == {
        getattr(torch, dtype)
    }
    for m in report.modules:
        name = f"{m.path}.weight"
        lost = float((after[name] - before[name]).norm() / before[name].norm())
        assert m.rounding == pytest.approx(lost, rel=0.02)
    lost = math.sqrt(square(after[n] - d for n, d in before.items()) / square(before.values()))
    assert report.rounding == pytest.approx(lost, rel=0.02)
    assert report.error == pytest.approx(exact.error, rel=1e-6)
    assert report.verified == pytest.approx(distance(tiny.before, tiny.after, tiny.out), rel=1e-4)


@pytest.mark.parametrize(("dtype", "low", "high"), [(F32, 1e-7, 1e-5), (F16, 0, 1), (BF16, 0, 1)])
def test_noise_is_what_storing_the_tuned_weights_took(
    tmp_path: Path, dtype: torch.dtype, low: float, high: float
) -> None:
    """`noise` is ‖rounding of TUNED‖/‖Δ‖, estimated; checked against the unrounded weights."""
    state = cast(model(64), torch.float64)
    exact = moved(state)
    tuned = cast(exact, dtype)
    pair = Pair(tmp_path, cast(state, F32), tuned)
    report = pair.extract(rank=4)
    goal = moves(cast(state, F32), tuned)
    lost = {n: tuned[n].double() - exact[n] for n in goal}
    goal = {n: d for n, d in goal.items() if n in {f"{m.path}.weight" for m in report.modules}}
    lost = {n: lost[n] for n in goal}
    real = math.sqrt(square(lost.values()) / square(goal.values()))
    assert report.noise == pytest.approx(real, rel=0.15)
    assert low < report.noise < high
    for m in report.modules:
        name = f"{m.path}.weight"
        assert m.noise == pytest.approx(float(lost[name].norm() / goal[name].norm()), rel=0.2)


LEFT: list[dict[str, Any]] = [
    {"skip": ["norms"], "save": ["biases"]}, {"skip": ["biases"], "save": ["norms"]},
    {"skip": ["norms", "biases"], "save": []}, {"save": []}, {"embeddings": False},
    {"skip": ["embeddings"], "embeddings": False},
    {"include": ["q_proj"]}, {"exclude": ["q_proj", "model.norm"]},
    {"include": ["model.layers.1.*"], "exclude": ["mlp.*"], "skip": ["biases"], "save": ["norms"]},
    {"exclude": ["lm_head", "embed_tokens"]},
]  # fmt: skip


@pytest.mark.parametrize("options", LEFT, ids=str)
def test_what_is_left_out_is_missing_from_what_is_held(tiny: Pair, options: Any) -> None:
    """What --skip, --include and --exclude leave out, and what is on request where nobody asks, is
    listed, is not in the file, and lowers `held` by exactly its share of ‖Δ‖²; base + adapter is
    that far off."""
    full = tiny.extract(rank=16, **EVERYTHING)
    report = tiny.extract(rank=16, verify=True, **{**EVERYTHING, **options})
    goal = moves(tiny.before, tiny.after)
    gone = {t.name for t in report.left}
    assert gone
    there = products(tiny.out).keys() | saved(tiny.out).keys()
    assert there | gone == set(goal)
    assert not there & gone
    share = square(goal[n] for n in gone) / square(goal.values())
    assert full.held == pytest.approx(1, abs=1e-9)
    assert report.held == pytest.approx(1 - share, rel=1e-6)
    assert report.error == pytest.approx(math.sqrt(share), rel=1e-4)
    assert report.norm == full.norm
    assert report.verified == pytest.approx(math.sqrt(share), rel=1e-4)
    assert distance(tiny.before, tiny.after, tiny.out) == pytest.approx(math.sqrt(share), rel=1e-4)
    group = (options.get("skip") or [""])[0]
    if group == "norms" and len(options["skip"]) == 1:
        assert gone == {n for n in goal if "norm" in n}
    if not options.get("embeddings", True):
        assert gone == {"model.embed_tokens.weight"}
    assert_selected(tiny.out, tiny.after)


def test_saved_tensors_keep_every_bit(tmp_path: Path) -> None:
    """--save and what cannot be factors: bytes and dtype of the tuned tensors, not of factors."""
    state = model()
    pair = Pair(tmp_path, state, cast(moved(state), BF16))
    report = pair.extract(
        rank=2, save=["lm_head", "layers.1.mlp.*", *SAVED], dtype="float16", verify=True
    )
    whole = saved(pair.out)
    assert {"lm_head.weight", f"{UP1}.weight", "model.norm.weight"} <= whole.keys()
    for name, value in whole.items():
        assert value.dtype == BF16
        assert torch.equal(value.view(torch.int16), pair.after[name].view(torch.int16))
    assert {t.name for t in report.saved} == whole.keys()
    assert "lm_head" in config_of(pair.out)["modules_to_save"]
    assert report.verified == pytest.approx(distance(pair.before, pair.after, pair.out), rel=1e-4)
    assert_selected(pair.out, state)


def test_the_document_is_strict_json(tiny: Pair) -> None:
    """to_dict survives strict JSON and has all that the report has."""
    for options in ({"rank": 3}, {"dry_run": True}, {"energy": 0.5, "skip": ["norms"]}):
        report = tiny.extract(**options)
        document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert document["schema_version"] == 1
        assert document.keys() == {"schema_version", *report.__dict__}
        assert [m["path"] for m in document["modules"]] == [m.path for m in report.modules]
        assert document["error"] == report.error


def test_the_record_says_what_was_done(tiny: Pair) -> None:
    """loratool.json has the options, the ranks, what was saved and left, and the files' hashes."""
    report = tiny.extract(energy=0.7, max_rank=4, skip=["norms"], seed=3)
    record = json.loads((tiny.out / "loratool.json").read_text())
    assert record["command"] == "extract"
    assert (record["options"]["energy"], record["options"]["seed"]) == (0.7, 3)
    assert {p: m["rank"] for p, m in record["result"]["modules"].items()} == ranks_of(report)
    assert record["result"]["left"] == [t.name for t in report.left]
    assert record["result"]["saved"] == [t.name for t in report.saved]
    hashes = sha256s(tiny.out)
    assert record["files"] == {n: hashes[n] for n in (WEIGHTS, "adapter_config.json")}
    assert str(tiny.base.parent) not in json.dumps(record)
