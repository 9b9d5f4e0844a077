"""The figures of a report, against float64, and that threads do not change them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.files import ADAPTED, load, lora_on, small_state, write_base
from helpers.places import FIXTURES
from helpers.verifying import (
    DTYPES,
    UNTOUCHED,
    K,
    check,
    deltas,
    finding,
    flipped,
    merged,
    only,
    original,
    written,
)
from safetensors.torch import load_file

import loratool


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_numbers_are_those_of_a_float64_oracle(dtype: str, tmp_path: Path) -> None:
    """Equal share, histogram, largest deviation, weight, lost: all as computed by hand."""
    base = write_base(tmp_path / "base", small_state(48))
    rng = np.random.default_rng(5)
    b, a = (rng.standard_normal(s).astype(np.float32) for s in ((48, 2), (2, 48)))
    adapter = lora_on(tmp_path / "a", b * np.float32(0.1), a)
    b = load_file(adapter / "adapter_model.safetensors")[
        f"base_model.model.{ADAPTED.removesuffix('weight')}lora_B.weight"
    ].numpy()
    w = load(base)[ADAPTED]
    delta = b.astype(np.float64) @ a.astype(np.float64)
    x = w.double().numpy() + delta
    once = torch.from_numpy(x).float().to(DTYPES[dtype])
    got = once.clone()
    bits = got.view(-1).view(torch.int16)
    # 5 values 1 unit off, 4 by 2, 3 by 3, 2 by 10, 1 by 100, 1 by 300: away from zero.
    steps = [1] * 5 + [2] * 4 + [3] * 3 + [10] * 2 + [100, 300]
    for i, step in enumerate(steps):
        bits[11 * i + 2] += step
    loratool.merge(base, adapter, tmp_path / "out", dtype=dtype)
    assert torch.equal(load(tmp_path / "out")[ADAPTED], once), "the oracle itself must be right"
    model = written(tmp_path / "m", {**load(tmp_path / "out"), ADAPTED: got}, base)
    one = finding(loratool.verify(model, base, adapter), ADAPTED)
    assert one.elements == 48 * 48
    assert one.equal == 1 - len(steps) / 48**2
    assert one.ulps == {
        "0": 48**2 - 16, "1": 5, "2": 4, "4": 3, "16": 2, "256": 1, "more": 1,
    }  # fmt: skip
    assert one.largest_ulp == 300
    m = got.double().numpy()
    assert one.largest == pytest.approx(np.abs(m - once.double().numpy()).max(), rel=1e-6)
    change = m - w.double().numpy()
    assert one.applied == pytest.approx((change * delta).sum() / (delta**2).sum(), rel=1e-5)
    lost = np.linalg.norm(m - x) / np.linalg.norm(delta)
    assert one.lost == pytest.approx(lost, rel=1e-4)
    assert not one.sound


def test_unexplained_is_the_share_across_the_delta(tmp_path: Path) -> None:
    """A change half along the delta and half across it is unexplained by the half across."""
    base = write_base(tmp_path / "base", {**small_state(64), ADAPTED: torch.zeros(64, 64)})
    b, a = np.zeros((64, 1)), np.zeros((1, 64))
    b[:32], a[:] = 1, 1
    adapter = lora_on(tmp_path / "a", b, a)
    state = load(base)
    state[ADAPTED][:32] = 1
    state[ADAPTED][32:] = 1
    one = finding(loratool.verify(written(tmp_path / "m", state, base), base, adapter), ADAPTED)
    assert one.code == "other"
    assert one.applied == pytest.approx(1)
    assert one.unexplained == pytest.approx(math.sqrt(0.5))
    assert one.off == 32 * 64


def test_totals_are_those_of_the_findings(tmp_path: Path) -> None:
    """The report's equal share and loss are over all adapted weights, and over merged ones."""
    state = merged(torch.bfloat16, added=only(lambda n: n == K, 0.0))
    report = check(tmp_path / "m", state)
    adapted = [f for f in report.findings if f.adapted]
    equal = sum(f.equal * f.elements for f in adapted) / sum(f.elements for f in adapted)
    assert report.equal == pytest.approx(equal)
    lost = delta = 0.0
    for name, d in deltas().items():
        if name != K:
            x = original()[name].double() + d.double()
            lost += float((state[name].double() - x).square().sum())
            delta += float(d.double().square().sum())
    assert report.lost == pytest.approx(math.sqrt(lost / delta), rel=1e-4)
    assert report.bytes_read == sum(v.numel() * 2 for v in state.values())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_merge_reports_the_loss_that_verify_measures(dtype: str, tmp_path: Path) -> None:
    """What `merge` says rounding took, from a sample, is what `verify` finds on all values."""
    done = loratool.merge(FIXTURES / "base", FIXTURES / "adapter", tmp_path / "out", dtype=dtype)
    report = loratool.verify(tmp_path / "out", FIXTURES / "base", FIXTURES / "adapter")
    assert report.lost is not None
    assert 0 < report.lost < 0.1
    assert done.lost == pytest.approx(report.lost, rel=0.1)


def test_threads_change_nothing(tmp_path: Path) -> None:
    """The whole report, to the last digit, is the same with one thread and with many."""
    state = merged(torch.bfloat16, added=only(lambda n: "q_proj" in n, 0.7))
    state[UNTOUCHED] = flipped(state[UNTOUCHED], 0, 5)
    model = written(tmp_path / "m", state)
    documents = []
    for threads in (1, 2, 7):
        report = loratool.verify(
            model, FIXTURES / "base", [FIXTURES / "adapter"], threads=threads
        ).to_dict()
        del report["seconds"]
        documents.append(json.dumps(report))
    assert len(set(documents)) == 1


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    """Progress grows to the bytes of the merged model and names its tensors."""
    calls: list[tuple[int, int, str]] = []
    report = check(tmp_path / "m", merged(), progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert {call[1] for call in calls} == {report.bytes_read}
    assert done[-1] == report.bytes_read
    assert {call[2] for call in calls} >= set(original())


def test_names_of_adapters_are_said_as_they_are(tmp_path: Path) -> None:
    """A sentence in the singular changes its own words only, never those of a folder's name."""
    base = write_base(tmp_path / "base", small_state(48))
    rng = np.random.default_rng(5)
    folders = [tmp_path / "dark theme", tmp_path / "keep their tone"]
    for folder in folders:
        lora_on(folder, 0.1 * rng.standard_normal((48, 2)), rng.standard_normal((2, 48)))
    loratool.merge(base, folders, tmp_path / "out", weights=[0.7, 0.3], dtype="float32")
    report = loratool.verify(tmp_path / "out", base, folders)
    assert report.summary == [
        "the only module was merged with 0.70 × dark theme and 0.30 × keep their tone instead of "
        f"what was asked: {ADAPTED}"
    ]
