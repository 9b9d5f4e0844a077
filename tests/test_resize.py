"""resize: what it refuses, the laws it obeys, and what it leaves on the disk."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import HEAD, ROOT, WEIGHTS, K, Q, Tensors, codes, config_of, deltas, lora
from conftest import FIXTURES, pair, run_cli, write_adapter
from files import assert_clean, assert_clear, beside, permissions_that_count, sha256s
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import loratool
from loratool.errors import (
    AdapterError,
    FileError,
    LoraToolError,
    OutputError,
    UsageError,
    ValueRangeError,
)

QUICK = settings(max_examples=12, deadline=None)


def of_spectrum(folder: Path, *spectra: list[float]) -> Path:
    """An adapter whose modules have these singular values (at most 10), scale 2."""
    tensors: Tensors = {}
    rank = max(map(len, spectra))
    for number, values in enumerate(spectra):
        rng = np.random.default_rng(number)
        left = np.linalg.qr(rng.standard_normal((12, 10)))[0][:, : len(values)]
        right = np.linalg.qr(rng.standard_normal((10, 10)))[0][:, : len(values)]
        path = f"{ROOT}model.layers.{number}.q_proj"
        a, b = np.zeros((rank, 10)), np.zeros((12, rank))
        a[: len(values)] = (right * np.asarray(values) / 2).T
        b[:, : len(values)] = left
        tensors |= {f"{path}.lora_A.weight": a.astype(np.float32),
                    f"{path}.lora_B.weight": b.astype(np.float32)}  # fmt: skip
    return write_adapter(folder, tensors, {"r": rank, "lora_alpha": 2 * rank})


def assert_near(one: Path, other: Path, share: float = 1e-6) -> None:
    """Both adapters have the same modules, and each does the same in both."""
    first, second = deltas(one), deltas(other)
    assert first.keys() == second.keys()
    for path, delta in first.items():
        assert np.linalg.norm(delta - second[path]) <= share * np.linalg.norm(delta)


def fails(
    kind: type[LoraToolError], source: Any, output: Path, *parts: str, **options: Any
) -> LoraToolError:
    """Resize, expecting this clear error with `parts` in its message, and nothing on the disk."""
    with pytest.raises(LoraToolError) as caught:
        loratool.resize(source, output, **{"rank": 2, **options})
    assert isinstance(caught.value, kind), caught.value
    assert_clear(caught.value, *parts)
    assert_clean(output)
    return caught.value


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return lora(tmp_path / "in" / "one", Q, K, lora_alpha=3)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{one}"], 2, "No rank given"),
        (["{one}", "--rank", "0"], 2, "--rank 0"),
        (["{one}", "--rank", "-4"], 2, "--rank -4"),
        (["{one}", "--rank", "2.5"], 2, "'2.5'"),
        (["{one}", "--rank", "2", "--energy", "0.9"], 2, "--rank and --energy"),
        (["{one}", "--rank", "2", "--dtype", "flaot32"], 2, "Did you mean float32"),
        (["{one}", "--rnk", "2"], 2, "--rank"),
        (["{one}x", "--rank", "2"], 1, "Did you mean"),
    ],
)
def test_mistakes_get_one_clear_error(
    one: Path, out: Path, arguments: list[str], code: int, words: str
) -> None:
    """A mistake is one error in words on stderr with its exit code, and nothing is written."""
    done = run_cli("resize", *[a.format(one=one) for a in arguments], "-o", str(out))
    assert done.exit_code == code
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stderr.lower().count("error:") == 1
    assert done.stdout == ""
    assert_clean(out)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"max_rank": 0}, ["--max-rank 0"]),
        ({"pad_to": 0}, ["--pad-to 0"]),
        ({"pad_to": -8}, ["--pad-to -8"]),
        ({"energy": 0.0}, ["--energy 0"]),
        ({"energy": -0.1}, ["--energy -0.1"]),
        ({"energy": 1.5}, ["--energy 1.5"]),
        ({"energy": math.nan}, ["--energy nan"]),
        ({"sv_fro": 99.0}, ["--sv-fro 99"]),
        ({"sv_cumulative": 0.0}, ["--sv-cumulative 0"]),
        ({"sv_ratio": 0.5}, ["--sv-ratio 0.5"]),
        ({"sv_ratio": math.inf}, ["--sv-ratio inf"]),
        ({"sv_ratio": math.nan}, ["--sv-ratio nan"]),
        ({"sv_ratio": 2, "energy": 0.5}, ["--energy and --sv-ratio"]),
        ({"sv_fro": 0.5, "sv_cumulative": 0.5}, ["--sv-fro and --sv-cumulative"]),
        ({"rank": 4, "max_rank": 8}, ["--rank and --max-rank"]),
        ({"rank": 4, "dtype": "int8"}, ["'int8'"]),
        ({"rank": 4, "threads": 0}, ["0 threads"]),
        ({}, ["No rank given"]),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(
    one: Path, out: Path, options: dict[str, Any], parts: list[str]
) -> None:
    """Numbers that no option takes, and options that contradict each other, are quoted."""
    assert fails(UsageError, one, out, *parts, **{"rank": None, **options}).exit_code == 2


def test_an_empty_path_is_refused(out: Path) -> None:
    """An empty string (an unset shell variable) is a UsageError."""
    fails(UsageError, "", out, "empty")


@pytest.mark.parametrize("options", [{"rank": 10**13}, {"rank": None, "pad_to": 10**13}], ids=str)
def test_absurd_ranks_are_an_error_in_words(one: Path, out: Path, options: dict[str, Any]) -> None:
    """A rank that neither memory nor disk holds is an error in words, not a MemoryError."""
    fails(LoraToolError, one, out, **options)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize(
    "name",
    [f"{ROOT}{Q}.lora_A.weight", f"{ROOT}{Q}.lora_B.weight", f"{ROOT}{Q}.lora_B.bias",
     f"{ROOT}{Q}.lora_magnitude_vector", HEAD],
)  # fmt: skip
@pytest.mark.parametrize("dry_run", [False, True])
def test_values_that_are_no_numbers_are_named(
    tmp_path: Path, out: Path, name: str, bad: float, dry_run: bool
) -> None:
    """NaN and infinity anywhere in the adapter stop the run with the tensor's name."""
    ones = np.ones(12, np.float32)
    extra = {HEAD: np.ones((3, 10), np.float32), f"{ROOT}{Q}.lora_B.bias": ones,
             f"{ROOT}{Q}.lora_magnitude_vector": ones.copy()}  # fmt: skip
    source = lora(tmp_path / "one", extra=extra, lora_bias=True, use_dora=True,
                  modules_to_save=["score"])  # fmt: skip
    tensors = load_file(source / WEIGHTS)
    tensors[name].reshape(-1)[1] = bad
    write_adapter(source, tensors, None)
    fails(ValueRangeError, source, out, name.removeprefix(ROOT), "NaN", dry_run=dry_run)


@pytest.mark.parametrize("dry_run", [False, True])
def test_overflow_of_the_dtype_is_refused(tmp_path: Path, out: Path, dry_run: bool) -> None:
    """Factors too large for float16 are refused with module and size, in a dry run too."""
    source = of_spectrum(tmp_path / "one", [1e12, 1.0])
    error = fails(
        ValueRangeError, source, out, "model.layers.0.q_proj", "too large",
        dtype="float16", dry_run=dry_run,
    )  # fmt: skip
    assert "float32" in error.hint


def test_an_adapter_that_does_nothing_is_refused(tmp_path: Path, out: Path) -> None:
    """An adapter with B = 0 everywhere has nothing to resize, and no other adapters are blamed."""
    source = lora(tmp_path / "zero")
    tensors = {n: t * ("lora_A" in n) for n, t in load_file(source / WEIGHTS).items()}
    write_adapter(source, tensors, None)
    error = fails(ValueRangeError, source, out, "does nothing")
    assert "weights" not in error.message
    assert "compare" not in error.hint  # of what?


def test_one_module_that_does_nothing_is_a_warning(one: Path, out: Path) -> None:
    """A module with B = 0 among others stays, at zero, with a warning."""
    tensors = load_file(one / WEIGHTS)
    tensors[f"{ROOT}{K}.lora_B.weight"][:] = 0
    write_adapter(one, tensors, None)
    report = loratool.resize(one, out, rank=6)
    assert "zero-delta" in codes(report)
    assert {m.path: m.kept for m in report.modules} == {Q: 1.0, K: None}
    assert not deltas(out)[K].any()
    assert_near(one, out)


def test_weights_without_their_config_are_refused(tmp_path: Path, out: Path) -> None:
    """Without adapter_config.json the scale is unknown, so nothing is resized."""
    source = write_adapter(tmp_path / "bare", pair(Q, 12, 10), None)
    fails(AdapterError, source, out, "no adapter_config.json", str(source))


def test_bare_parameters_are_refused(tmp_path: Path, out: Path) -> None:
    """target_parameters of mixture-of-experts stacks are refused by name."""
    source = lora(tmp_path / "moe", target_parameters=["experts.down_proj"])
    fails(AdapterError, source, out, "target_parameters", str(source))


@pytest.mark.parametrize("length", [0, 5, 300, -1])
def test_truncated_files_are_named(one: Path, out: Path, length: int) -> None:
    """A weights file cut anywhere is a FileError with its path."""
    file = one / WEIGHTS
    file.write_bytes(file.read_bytes()[:length])
    fails(FileError, one, out, str(file))


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json", "tokenizer.json"])
def test_files_that_may_not_be_read_are_named(one: Path, out: Path, name: str) -> None:
    """An input without read permission is a FileError that names it, and there is no output."""
    (one / "tokenizer.json").write_text("{}")
    (one / name).chmod(0)
    with permissions_that_count():
        fails(FileError, one, out, str(one / name))


def test_an_existing_output_stays(one: Path, out: Path) -> None:
    """An output that exists is refused and stays; --overwrite replaces it with all its files."""
    loratool.resize(one, out, rank=2)
    (out / "README.md").write_text("old")
    before = sha256s(out)
    with pytest.raises(OutputError) as caught:
        loratool.resize(one, out, rank=3)
    assert "--overwrite" in caught.value.hint
    assert sha256s(out) == before
    loratool.resize(one, out, rank=3, overwrite=True)
    assert set(sha256s(out)) == {WEIGHTS, "adapter_config.json", "loratool.json"}
    assert beside(out) == []


@pytest.mark.parametrize("place", ["in/one", "in/one/out", "in"])
def test_the_input_is_never_written_to(tmp_path: Path, one: Path, place: str) -> None:
    """An output that is, contains or is in the input is refused even with --overwrite."""
    before = sha256s(tmp_path)
    with pytest.raises(OutputError) as caught:
        loratool.resize(one, tmp_path / place, rank=2, overwrite=True)
    assert_clear(caught.value, str(tmp_path / place))
    assert sha256s(tmp_path) == before


# --- laws ----------------------------------------------------------------------------------------


@st.composite
def kinds(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of a small adapter of any rank and scale."""
    return {
        "rank": draw(st.integers(1, 14)),
        "lora_alpha": draw(st.integers(1, 32)),
        "use_rslora": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


@QUICK
@given(kinds(), st.integers(0, 6))
def test_the_same_rank_and_up_and_down_change_nothing(kind: dict[str, Any], more: int) -> None:
    """Resizing to the same rank, or up and down again, keeps every product; ranks are as asked."""
    with tempfile.TemporaryDirectory() as name:
        folder, rank = Path(name), kind["rank"]
        source = lora(folder / "one", Q, K, **kind)
        report = loratool.resize(source, folder / "same", rank=rank, threads=1)
        loratool.resize(source, folder / "up", rank=rank + more, threads=1)
        loratool.resize(folder / "up", folder / "down", rank=rank, threads=1)
        for result in ("same", "up", "down"):
            assert_near(source, folder / result)
        assert config_of(folder / "up")["r"] == rank + more
        assert config_of(folder / "down")["r"] == rank
        assert [m.kept for m in report.modules] == [pytest.approx(1)] * 2
        assert report.error < 1e-6


@QUICK
@given(kinds(), st.integers(1, 12))
def test_a_cut_is_the_best_of_its_rank(kind: dict[str, Any], rank: int) -> None:
    """The cut keeps the largest singular values; kept is 1 − error², in each module and overall."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = lora(folder / "one", Q, K, **kind)
        report = loratool.resize(source, folder / "out", rank=rank, threads=1)
        before, after = deltas(source), deltas(folder / "out")
        lost = whole = 0.0
        for module in report.modules:
            delta = before[module.path]
            off = float(np.sum((delta - after[module.path]) ** 2))
            s = np.linalg.svd(delta, compute_uv=False) ** 2
            assert off == pytest.approx(s[rank:].sum(), abs=1e-5 * s.sum())
            assert module.kept == pytest.approx(1 - off / s.sum(), abs=1e-5)
            assert module.kept == pytest.approx(1 - module.error**2, abs=1e-9)
            assert module.norm == pytest.approx(np.sqrt(s.sum()), rel=1e-6)
            lost, whole = lost + off, whole + s.sum()
        assert report.kept == pytest.approx(1 - lost / whole, abs=1e-5)
        assert report.kept == pytest.approx(1 - report.error**2, abs=1e-9)


CRITERIA: dict[str, Callable[[np.ndarray, float], float]] = {
    "energy": lambda s, t: (np.cumsum(s**2) >= t * np.sum(s**2)).argmax() + 1,
    "sv_fro": lambda s, t: (np.sqrt(np.cumsum(s**2) / np.sum(s**2)) >= t).argmax() + 1,
    "sv_cumulative": lambda s, t: (np.cumsum(s) >= t * np.sum(s)).argmax() + 1,
    "sv_ratio": lambda s, t: max(1, int(np.sum(s > s[0] * t))),
}


@QUICK
@given(
    st.sampled_from(sorted(CRITERIA)), st.floats(0.05, 0.97),
    st.lists(
        st.lists(st.floats(0.1, 10), min_size=1, max_size=6, unique=True), min_size=1, max_size=3
    ),
    st.none() | st.integers(1, 4),
)  # fmt: skip
def test_criteria_are_obeyed_in_every_module(
    name: str, share: float, spectra: list[list[float]], cap: int | None
) -> None:
    """Each module gets the smallest rank its criterion allows, capped by --max-rank."""
    with tempfile.TemporaryDirectory() as place:
        source = of_spectrum(Path(place) / "one", *spectra)
        value = 1 / share if name == "sv_ratio" else share
        options: dict[str, Any] = {name: value, "max_rank": cap, "threads": 1}
        report = loratool.resize(source, Path(place) / "out", **options)
        after = deltas(Path(place) / "out")
        for module, spectrum in zip(report.modules, spectra, strict=True):
            s = np.sort(spectrum)[::-1]
            allowed = {int(CRITERIA[name](s, share * (1 + e))) for e in (-1e-5, 0, 1e-5)}
            assert module.rank in {min(a, cap or 99) for a in allowed}
            found = np.linalg.svd(after[module.path], compute_uv=False)
            np.testing.assert_allclose(found[: module.rank], s[: module.rank], rtol=1e-4)
            assert found[module.rank :].max(initial=0) < 1e-4 * s[0]
        assert not report.uniform or len({m.rank for m in report.modules}) == 1


# --- what is written -----------------------------------------------------------------------------


def test_a_rank_above_what_is_there_is_filled_with_zeros(one: Path, out: Path) -> None:
    """Above the rank that is there A and B are zero, and the product is the same."""
    report = loratool.resize(one, out, rank=16)
    tensors = load_file(out / WEIGHTS)
    a, b = (tensors[f"{ROOT}{Q}.lora_{half}.weight"] for half in "AB")
    assert (a.shape, b.shape) == ((16, 10), (12, 16))
    assert not a[4:].any()
    assert not b[:, 4:].any()
    assert a[:4].any(1).all()
    assert_near(one, out)
    assert (report.rank, report.error, report.kept) == (16, 0, 1)
    assert (config_of(out)["r"], config_of(out)["lora_alpha"]) == (16, 16)


@pytest.mark.parametrize(
    ("options", "rank", "wanted"),
    [
        ({"energy": 0.99}, 3, {"model.layers.1.q_proj": 1, "model.layers.2.q_proj": 2}),
        ({"energy": 0.99, "pad_to": 8}, 8, {}),
        ({"energy": 0.99, "pad_to": 1}, 3, {}),
        ({"pad_to": 4}, 4, {}),
        ({"max_rank": 2}, 2, {"model.layers.1.q_proj": 1}),
        ({"rank": 2}, 2, {}),
        ({"rank": 8, "pad_to": 4}, 8, {}),
    ],
    ids=str,
)
def test_patterns_and_padding(
    tmp_path: Path, out: Path, options: dict[str, Any], rank: int, wanted: dict[str, int]
) -> None:
    """Criteria give each module a rank of its own in rank_pattern; --rank and --pad-to one for
    all; alpha is the rank everywhere."""
    source = of_spectrum(tmp_path / "one", [3, 2, 1], [5.0], [2, 2])
    report = loratool.resize(source, out, **options)
    config = config_of(out)
    assert (config["r"], config["lora_alpha"], report.rank) == (rank, rank, rank)
    assert config["rank_pattern"] == config["alpha_pattern"] == wanted
    shapes = {n: t.shape for n, t in load_file(out / WEIGHTS).items()}
    for module in report.modules:
        assert shapes[f"{ROOT}{module.path}.lora_A.weight"] == (module.rank, 10)
        assert shapes[f"{ROOT}{module.path}.lora_B.weight"] == (12, module.rank)
        assert module.rank == wanted.get(module.path, rank)
    assert [w for w in loratool.inspect(out).warnings if w.refused] == []
    if "rank" not in options and "max_rank" not in options:
        assert_near(source, out)


def test_padding_uses_the_room_it_makes(tmp_path: Path, out: Path) -> None:
    """What one module needs all others get: singular values that fit are kept, not zeroed."""
    source = of_spectrum(tmp_path / "one", [3, 3, 3], [5, 1, 0.5])
    report = loratool.resize(source, out, energy=0.9, pad_to=1)
    assert [m.rank for m in report.modules] == [3, 3]
    assert_near(source, out)
    assert report.kept == pytest.approx(1)


@pytest.mark.parametrize("ranks", [(1, 2, 3), (3, 2, 1), (2, 3, 1), (1, 3, 2)])
def test_patterns_of_paths_that_end_alike(
    tmp_path: Path, out: Path, ranks: tuple[int, int, int]
) -> None:
    """Where one path is the end of another, each still has its own rank, and can be read."""
    paths = ("q", "inner.q", "model.inner.q")
    tensors: Tensors = {}
    for path, rank in zip(paths, ranks, strict=True):
        rng = np.random.default_rng(rank)
        a, b = np.zeros((4, 10)), np.zeros((12, 4))
        a[:rank], b[:, :rank] = rng.standard_normal((rank, 10)), rng.standard_normal((12, rank))
        tensors |= {f"{ROOT}{path}.lora_A.weight": a, f"{ROOT}{path}.lora_B.weight": b}
    source = write_adapter(tmp_path / "one", tensors, {})
    loratool.resize(source, out, energy=1.0, dtype="float32")
    again = loratool.inspect(out)
    assert {m.path: m.rank for m in again.modules} == dict(zip(paths, ranks, strict=True))
    assert [w.message for w in again.warnings if w.refused] == []
    assert all(m.scale == 1 for m in again.modules)


def test_dora_keeps_its_magnitudes(tmp_path: Path, out: Path) -> None:
    """DoRA magnitudes are kept bit for bit, use_dora stays on, and a warning says what it means."""
    magnitude = np.linspace(1, 2, 12, dtype=np.float32)
    key = f"{ROOT}{Q}.lora_magnitude_vector"
    source = lora(tmp_path / "dora", extra={key: magnitude}, use_dora=True)
    report = loratool.resize(source, out, rank=2, dtype="float16")
    assert codes(report) == ["dora-magnitudes-kept"]
    kept = load_file(out / WEIGHTS)[key]
    assert kept.tobytes() == magnitude.tobytes()
    assert config_of(out)["use_dora"] is True


def test_the_rest_of_the_adapter_comes_along(tmp_path: Path, out: Path) -> None:
    """Saved tensors and token rows keep every bit, biases their scaled value, the tokenizer comes
    along."""
    rows = f"{ROOT}model.embed_tokens.token_adapter.trainable_tokens_delta"
    extra = {
        HEAD: np.random.default_rng(0).standard_normal((3, 10)),
        f"{ROOT}score.steps": np.array([7]),
        f"{ROOT}{Q}.lora_B.bias": np.arange(12, dtype=np.float32),
        rows: np.arange(20, dtype=np.float32).reshape(2, 10),
    }
    source = lora(
        tmp_path / "one", extra=extra, lora_bias=True, modules_to_save=["score"], lora_alpha=2,
        trainable_token_indices={"embed_tokens": [5, 1]}, task_type="SEQ_CLS",
        base_model_name_or_path="org/base",
    )  # fmt: skip
    (source / "tokenizer.json").write_text("{}")
    report = loratool.resize(source, out, rank=2, dtype="bfloat16")
    import torch
    from safetensors.torch import load_file as load_torch

    tensors = load_torch(out / WEIGHTS)
    for name in (HEAD, f"{ROOT}score.steps", rows):
        assert tensors[name].numpy().tobytes() == extra[name].tobytes()
    bias = tensors[f"{ROOT}{Q}.lora_B.bias"]
    assert bias.dtype == torch.bfloat16
    assert bias.tolist() == [0.5 * n for n in range(12)]
    assert (out / "tokenizer.json").read_text() == "{}"
    config = config_of(out)
    assert config["modules_to_save"] == ["score"]
    assert list(config["trainable_token_indices"].values()) == [[5, 1]]
    assert (config["task_type"], config["base_model_name_or_path"]) == ("SEQ_CLS", "org/base")
    assert report.warnings == []
    assert loratool.inspect(out).warnings == []


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ({"target_modules": ["q_proj", "k_proj"]}, ["k_proj", "q_proj"]),
        ({"target_modules": "all-linear"}, sorted([Q, K])),
        ({"target_modules": r".*\.(q|k)_proj"}, sorted([Q, K])),
        ({"target_modules": ["q_proj", "k_proj"], "layers_to_transform": 0}, sorted([Q, K])),
    ],
    ids=str,
)
def test_targets(tmp_path: Path, out: Path, how: dict[str, Any], wanted: list[str]) -> None:
    """Names where the source has names, full paths where it used a regex or chose layers."""
    loratool.resize(lora(tmp_path / "one", Q, K, **how), out, rank=2)
    assert config_of(out)["target_modules"] == wanted


def test_embeddings_and_convolutions_keep_their_shapes(tmp_path: Path, out: Path) -> None:
    """Factors of embeddings and convolutions are cut in their own layouts, and mean the same."""
    rng = np.random.default_rng(0)
    shapes = {
        "embed.lora_embedding_A": (4, 50), "embed.lora_embedding_B": (10, 4),
        "conv.lora_A.weight": (4, 6, 3, 3), "conv.lora_B.weight": (8, 4, 1, 1),
    }  # fmt: skip
    tensors = {ROOT + n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    source = write_adapter(tmp_path / "one", tensors, {})
    loratool.resize(source, out, rank=2)
    after = load_file(out / WEIGHTS)
    assert {n.removeprefix(ROOT): t.shape for n, t in after.items()} == {
        "embed.lora_embedding_A": (2, 50), "embed.lora_embedding_B": (10, 2),
        "conv.lora_A.weight": (2, 6, 3, 3), "conv.lora_B.weight": (8, 2, 1, 1),
    }  # fmt: skip
    for a_name, b_name in zip(list(shapes)[::2], list(shapes)[1::2], strict=True):
        old, new = (
            scale * t[ROOT + b_name].reshape(shapes[b_name][0], -1).astype(np.float64)
            @ t[ROOT + a_name].reshape(len(t[ROOT + a_name]), -1)
            for scale, t in ((2.0, tensors), (1.0, after))
        )  # fmt: skip
        s = np.linalg.svd(old, compute_uv=False)
        assert np.linalg.norm(old - new) == pytest.approx(np.sqrt(np.sum(s[2:] ** 2)), rel=1e-4)


def test_provenance(one: Path, out: Path) -> None:
    """loratool.json has the options and the hashes of input and output, but no path and no date."""
    loratool.resize(one, out, energy=0.9, max_rank=3)
    text = (out / "loratool.json").read_text()
    document = json.loads(text)
    assert document["command"] == "resize"
    assert document["options"]["energy"] == 0.9
    assert document["options"]["max_rank"] == 3
    assert document["adapters"][0]["files"] == sha256s(one)
    hashes = sha256s(out)
    del hashes["loratool.json"]
    assert document["files"] == hashes
    assert str(one.parent) not in text
    assert time.strftime("%Y-") not in text


@pytest.mark.parametrize(
    "options",
    [{"rank": 2}, {"rank": 9}, {"energy": 0.6}, {"energy": 0.6, "pad_to": 8}, {"max_rank": 3},
     {"rank": 2, "dtype": "float16"}],
    ids=str,
)  # fmt: skip
def test_a_dry_run_predicts_and_writes_nothing(
    tmp_path: Path, one: Path, options: dict[str, Any]
) -> None:
    """A dry run reports the very bytes, ranks and losses of the run, and touches no disk."""
    out = tmp_path / "new" / "out"
    planned = loratool.resize(one, out, dry_run=True, **options)
    assert not (tmp_path / "new").exists()
    done = loratool.resize(one, out, **options)
    for before, after in zip(planned.modules, done.modules, strict=True):
        assert (before.path, before.rank, before.kept) == (after.path, after.rank, after.kept)
    assert (planned.kept, planned.error, planned.rank) == (done.kept, done.error, done.rank)
    assert done.bytes_before == planned.bytes_before == (one / WEIGHTS).stat().st_size
    assert done.bytes_written == (out / WEIGHTS).stat().st_size
    assert planned.bytes_written == done.bytes_written


def test_bytes_depend_neither_on_threads_nor_on_the_process(tmp_path: Path) -> None:
    """1 and 3 threads and another process write the same files."""
    source = lora(tmp_path / "one", *[f"model.layers.{n}.q_proj" for n in range(8)], rank=7)
    for threads in (1, 3):
        loratool.resize(source, tmp_path / f"t{threads}", energy=0.8, threads=threads)
    done = run_cli("resize", str(source), "--energy", "0.8", "-o", str(tmp_path / "p"))
    assert done.exit_code == 0
    assert sha256s(tmp_path / "t1") == sha256s(tmp_path / "t3") == sha256s(tmp_path / "p")


def test_a_pickled_adapter_is_resized_like_the_other(one: Path, tmp_path: Path) -> None:
    """adapter_model.bin gives the same weights as adapter_model.safetensors."""
    import torch
    from safetensors.torch import load_file as load_torch

    pickled = tmp_path / "bin"
    pickled.mkdir()
    torch.save(load_torch(one / WEIGHTS), pickled / "adapter_model.bin")
    shutil.copyfile(one / "adapter_config.json", pickled / "adapter_config.json")
    for source in (one, pickled):
        loratool.resize(source, tmp_path / f"{source.name}-out", rank=2)
    assert sha256s(tmp_path / "one-out")[WEIGHTS] == sha256s(tmp_path / "bin-out")[WEIGHTS]


# --- the command line ----------------------------------------------------------------------------


def test_json_is_all_there_is_on_stdout(one: Path, out: Path) -> None:
    """--json prints one strict document with schema_version, and what the library reports."""
    done = run_cli("resize", str(one), "-o", str(out), "--rank", "2", "--json")
    assert (done.exit_code, done.stderr) == (0, "")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    document = json.loads(done.stdout, parse_constant=refuse)
    assert document["schema_version"] == 1
    assert (document["rank"], document["uniform"]) == (2, True)
    assert {m["path"] for m in document["modules"]} == {Q, K}
    assert document["bytes_written"] == (out / WEIGHTS).stat().st_size


def test_warnings_are_on_stderr_and_quiet_is_quiet(tmp_path: Path, out: Path) -> None:
    """Warnings go to stderr with their codes; -q silences stderr and keeps the answer."""
    source = lora(tmp_path / "one", target_modules=["q_proj", "v_proj"])
    arguments = ["resize", str(source), "--rank", "2", "--dry-run", "-o", str(out)]
    done = run_cli(*arguments)
    assert "[target-absent]" in done.stderr
    assert "nothing was written" in done.stdout
    quiet = run_cli(*arguments, "-q")
    assert quiet.stderr == ""
    assert "q_proj" in quiet.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert not out.exists()


@pytest.mark.parametrize("width", [40, 80, 120])
def test_lines_fit_the_terminal(width: int, tmp_path: Path) -> None:
    """No line is wider than the terminal; at 80 columns every row is one line, without ellipses."""
    for options in (["--energy", "0.9"], ["--rank", "16", "--dtype", "bfloat16"]):
        done = subprocess.run(
            [sys.executable, "-m", "loratool", "resize", str(FIXTURES / "adapter"), *options,
             "-o", "out", "--dry-run"],
            capture_output=True, text=True, env={**os.environ, "COLUMNS": str(width)},
            cwd=tmp_path, check=True,
        )  # fmt: skip
        lines = done.stdout.splitlines()
        assert max(map(len, lines)) <= width
        assert "…" not in done.stdout
        if width >= 80:
            table = lines[next(i for i, x in enumerate(lines) if x.startswith("module ")) :]
            assert [len(x.split()) for x in table if "_proj" in x] == [7] * 7


@pytest.mark.parametrize("option", ["--json", "--full"])
def test_a_closed_pipe_is_no_error(tmp_path: Path, out: Path, option: str) -> None:
    """A reader that leaves early gets no traceback, the output is whole and the code is 0."""
    source = lora(tmp_path / "one", *[f"model.layers.{n}.q_proj" for n in range(200)])
    done = subprocess.run(
        ["bash", "-c",
         f"{sys.executable} -m loratool resize {source} --rank 2 -o {out} {option} | true; "
         "exit ${PIPESTATUS[0]}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (out / WEIGHTS).is_file()
    assert (done.returncode, done.stderr) == (0, "")


# --- all or nothing ------------------------------------------------------------------------------

_CHILD = """
import json, sys, time
import loratool
import loratool.storage.staging as writer
source, output, where = json.loads(sys.argv[1])
def progress(done, total, path):
    if where == "computing" and done == 2: time.sleep(60)
if where == "flushing": writer.sync = lambda path: time.sleep(60)
loratool.resize(source, output, rank=3, progress=progress, threads=1)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("where", ["computing", "flushing"])
def test_a_run_that_is_stopped_leaves_no_output(
    tmp_path: Path, out: Path, number: signal.Signals, where: str
) -> None:
    """SIGKILL leaves only what the next run removes, SIGINT nothing; the output is never half."""
    source = lora(tmp_path / "one", *[f"model.layers.{n}.q_proj" for n in range(6)])
    arguments = json.dumps([str(source), str(out), where])
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wanted = "factors.partial" if where == "computing" else "loratool.json"
    until = time.monotonic() + 30
    while not any(p.stat().st_size for p in tmp_path.glob(f".out.loratool-*/{wanted}")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=10)
    assert process.returncode != 0
    assert not out.exists()
    assert len(beside(out)) == (number == signal.SIGKILL)
    loratool.resize(source, out, rank=3)
    assert beside(out) == []
    assert set(sha256s(out)) == {WEIGHTS, "adapter_config.json", "loratool.json"}


@pytest.mark.parametrize("options", ["size=4k", "size=16k", "size=32k", "size=1M,nr_inodes=3"])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, disk: Callable[[str], Path], options: str
) -> None:
    """A disk without room for scratch, weights or the rest ends the run in words and is empty."""
    source = lora(tmp_path / "one", *[f"model.layers.{n}.q_proj" for n in range(32)], rank=8)
    place = disk(options)
    with pytest.raises(OutputError) as caught:
        loratool.resize(source, place / "out", rank=8)
    assert_clear(caught.value, str(place))
    assert "partial" not in caught.value.message
    assert os.listdir(place) == []
    assert shutil.disk_usage(place).used == 0


def test_forbidden_places_are_named(tmp_path: Path, one: Path, disk: Callable[[str], Path]) -> None:
    """A parent without write permission and a disk mounted read-only are OutputErrors."""
    parent = tmp_path / "forbidden"
    parent.mkdir(mode=0o555)
    with permissions_that_count():
        fails(OutputError, one, parent / "out", str(parent), "not allowed")
    place = disk("size=1M")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    fails(OutputError, one, place / "out", str(place), "not allowed")


def test_norms_are_those_of_inspect_for_attention_too(tmp_path: Path, out: Path) -> None:
    """The delta of an attention module's out_proj counts twice, in the table and in the totals."""
    rng = np.random.default_rng(0)
    names = ("attn.", "attn.base_layer.out_proj.")
    tensors = {
        f"{ROOT}{name}lora_{half}.weight": rng.standard_normal(shape).astype(np.float32)
        for name in names
        for half, shape in (("A", (4, 8)), ("B", (24 if name == "attn." else 8, 4)))
    }
    source = write_adapter(tmp_path / "one", tensors, {"r": 4, "lora_alpha": 6})
    report = loratool.resize(source, out, rank=2)
    before = {m.path: m.delta_norm for m in loratool.inspect(source).modules}
    after = {m.path: m.delta_norm for m in loratool.inspect(out).modules}
    assert {m.path: m.norm for m in report.modules} == pytest.approx(before, rel=1e-6)
    whole = sum((before[m.path] or 0) ** 2 for m in report.modules)
    kept = sum((after[m.path] or 0) ** 2 for m in report.modules)
    assert report.kept == pytest.approx(kept / whole, rel=1e-6)
    assert report.error == pytest.approx(math.sqrt(1 - kept / whole), rel=1e-5)


@pytest.mark.parametrize("flat", ["attn.", "attn.base_layer.out_proj."])
def test_the_parts_of_an_attention_module_share_the_larger_rank(
    tmp_path: Path, out: Path, flat: str
) -> None:
    """PEFT gives in_proj and out_proj one rank; it is the one that both need for the energy."""
    tensors = {}
    for name, width in (("attn.", 24), ("attn.base_layer.out_proj.", 8)):
        size = np.ones(4) if name == flat else np.array([10, 0.1, 0.1, 0.1])
        tensors[f"{ROOT}{name}lora_A.weight"] = np.eye(4, 8, dtype=np.float32)
        b = np.eye(width, 4) * size
        tensors[f"{ROOT}{name}lora_B.weight"] = b.astype(np.float32)
    source = write_adapter(tmp_path / "one", tensors, {"r": 4, "lora_alpha": 4})
    report = loratool.resize(source, out, energy=0.74)
    assert [m.rank for m in report.modules] == [3, 3]
    assert min(m.kept or 0 for m in report.modules) >= 0.74
    assert config_of(out)["rank_pattern"] == {}
