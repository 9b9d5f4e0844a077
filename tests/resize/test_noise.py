"""resize --noise: the rank that stands above the noise edge, and words where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.adapters import PREFIX, codes, config_of, deltas, write_adapter
from helpers.cli import run_cli
from helpers.resizing import fails, of_spectrum

import loratool
from loratool.errors import UsageError

RANK = 16


def planted(folder: Path, *signals: int, out: int = 1024, width: int = 1024, **config: Any) -> Path:
    """An adapter of rank 16 whose modules have so many signals, and noise besides."""
    tensors = {}
    for number, count in enumerate(signals):
        rng = np.random.default_rng(number)
        b, a = rng.standard_normal((out, RANK)), rng.standard_normal((RANK, width))
        b[:, :count] *= 5
        turn = np.linalg.qr(rng.standard_normal((RANK, RANK)))[0]
        path = f"{PREFIX}model.layers.{number}.q_proj"
        tensors[f"{path}.lora_A.weight"] = (turn.T @ a).astype(np.float32)
        tensors[f"{path}.lora_B.weight"] = (b @ turn).astype(np.float32)
    return write_adapter(folder, tensors, {"r": RANK, "lora_alpha": 32, **config})


def test_planted_ranks_are_recovered(tmp_path: Path) -> None:
    """Each module gets its planted rank with --patterns, and all the largest of them without."""
    source = planted(tmp_path / "one", 2, 5, 1)
    own = loratool.resize(source, tmp_path / "own", noise=True, patterns=True)
    assert [m.rank for m in own.modules] == [2, 5, 1]
    assert "ranks-differ" in codes(own)
    one = loratool.resize(source, tmp_path / "all", noise=True)
    assert [m.rank for m in one.modules] == [5, 5, 5]
    assert config_of(tmp_path / "all")["r"] == 5
    assert codes(one) == []


def test_what_stays_are_the_largest_values(tmp_path: Path) -> None:
    """The cut at the edge is the best of its rank."""
    source = planted(tmp_path / "one", 3)
    report = loratool.resize(source, tmp_path / "out", noise=True)
    (before,), (after,) = deltas(source).values(), deltas(tmp_path / "out").values()
    values = np.linalg.svd(before, compute_uv=False)
    assert np.linalg.norm(before - after) == pytest.approx(np.linalg.norm(values[3:]), rel=1e-4)
    assert report.kept == pytest.approx((values[:3] ** 2).sum() / (values**2).sum(), rel=1e-5)


def test_a_cap_and_a_multiple_hold(tmp_path: Path) -> None:
    """--max-rank caps what stands above the edge, and --pad-to rounds it up."""
    source = planted(tmp_path / "one", 6)
    capped = loratool.resize(source, tmp_path / "capped", noise=True, max_rank=4)
    padded = loratool.resize(source, tmp_path / "padded", noise=True, pad_to=4)
    assert (capped.rank, padded.rank) == (4, 8)


def test_pure_noise_keeps_one_value_and_says_so(tmp_path: Path) -> None:
    """A module with nothing above the edge keeps its largest value, with a warning."""
    source = planted(tmp_path / "one", 0, 3)
    report = loratool.resize(source, tmp_path / "out", noise=True, patterns=True)
    assert [m.rank for m in report.modules] == [1, 3]
    assert "all-noise" in codes(report)


def test_a_module_without_an_edge_is_not_cut(tmp_path: Path) -> None:
    """A spectrum that falls to its end, or that is too short, stays whole, with a warning."""
    source = of_spectrum(tmp_path / "one", [1.0, 0.5], [1.0])
    report = loratool.resize(source, tmp_path / "out", noise=True, patterns=True)
    assert [m.rank for m in report.modules] == [2, 1]
    assert [code for code in codes(report) if code != "ranks-differ"] == ["no-noise-edge"]
    (notice,) = [w for w in report.warnings if w.code == "no-noise-edge"]
    assert "too few to tell" in notice.message


def test_the_same_bytes_twice(tmp_path: Path) -> None:
    """Neither another run nor another number of threads changes a byte."""
    source = planted(tmp_path / "one", 2, 4)
    for name, threads in (("first", 1), ("second", 2)):
        loratool.resize(source, tmp_path / name, noise=True, patterns=True, threads=threads)
    for file in ("adapter_model.safetensors", "adapter_config.json", "loratool.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


@pytest.mark.parametrize("other", [{"rank": 2}, {"energy": 0.9}, {"sv_ratio": 10}])
def test_noise_and_another_choice_contradict_each_other(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    """Two ways of choosing the rank are an error that names both."""
    source = planted(tmp_path / "one", 2)
    options = {"rank": None, **other, "noise": True}
    fails(UsageError, source, tmp_path / "out", "--noise", **options)


def test_the_command_line_takes_it(tmp_path: Path) -> None:
    """--noise is in the help with an example, and does what the function does."""
    assert "--noise --patterns -o smaller/" in run_cli("resize", "--help").stdout
    source = planted(tmp_path / "one", 2)
    done = run_cli("resize", source, "--noise", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert config_of(tmp_path / "out")["r"] == 2
