"""compare: its numbers against dense matrices, its verdicts, its exit codes and its looks."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import HEAD, ROOT, WEIGHTS, K, Q, Tensors, deltas, lora
from conftest import FIXTURES, pair, run_cli, write_adapter
from files import assert_clear, permissions_that_count, sha256s, write_base
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import loratool
from loratool.errors import (
    AdapterError,
    FileError,
    LoraToolError,
    MatchError,
    UsageError,
    ValueRangeError,
)

QUICK = settings(max_examples=12, deadline=None)


def of(folder: Path, modules: dict[str, tuple[Any, Any]], **config: Any) -> Path:
    """An adapter with these `(B, A)`, scale 1."""
    tensors: Tensors = {}
    rank = 0
    for path, (b, a) in modules.items():
        rank = len(a)
        tensors |= {f"{ROOT}{path}.lora_A.weight": np.asarray(a, np.float32),
                    f"{ROOT}{path}.lora_B.weight": np.asarray(b, np.float32)}  # fmt: skip
    return write_adapter(folder, tensors, {"r": rank, "lora_alpha": rank, **config})


def changed(source: Path, target: Path, extra: Tensors, **config: Any) -> Path:
    """A copy of an adapter with some tensors and config fields put in."""
    old = json.loads((source / "adapter_config.json").read_text())
    return write_adapter(target, load_file(source / WEIGHTS) | extra, {**old, **config})


def overlaps(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Squared cosines of the principal angles between the column spaces, by dense SVDs."""
    bases = []
    for matrix in (one, two):
        u, s, _ = np.linalg.svd(matrix)
        bases.append(u[:, : int(np.sum(s > 1e-6 * s[0]))])
    return np.linalg.svd(bases[0].T @ bases[1], compute_uv=False) ** 2


def fails(kind: type[LoraToolError], adapters: Any, *parts: str, **options: Any) -> LoraToolError:
    """Compare, expecting this clear error with `parts` in its message."""
    with pytest.raises(LoraToolError) as caught:
        loratool.compare(adapters, **options)
    assert isinstance(caught.value, kind), caught.value
    assert_clear(caught.value, *parts)
    return caught.value


def verdict(*adapters: Path, **options: Any) -> str:
    report = loratool.compare(adapters, **options)
    assert len(report.verdicts) == 1
    return report.verdicts[0]


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [lora(tmp_path / "one", Q, K, seed=1), lora(tmp_path / "two", Q, K, seed=2)]


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{one}"], 2, "Give two or more"),
        (["{one}", "{two}", "--tolerance", "-1"], 2, "--tolerance -1"),
        (["{one}", "{two}", "--weight", "1"], 2, "1 weights for 2 adapters"),
        (["{one}", "{two}", "--layer", "x"], 2, "Not a range of layers"),
        (["{one}", "{two}x", "--equal"], 1, "Did you mean"),
        (["{one}", "{two}", "--equl"], 2, "--equal"),
    ],
)
def test_mistakes_get_one_clear_error(
    two: list[Path], arguments: list[str], code: int, words: str
) -> None:
    """A mistake is one error in words on stderr with its exit code, never 3, and no answer."""
    done = run_cli("compare", *[a.format(one=two[0], two=two[1]) for a in arguments])
    assert done.exit_code == code
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stderr.lower().count("error:") == 1
    assert done.stdout == ""


@pytest.mark.parametrize("tolerance", [0.0, -1e-3, 1.0, 2.0, 1e-9, math.nan, math.inf])
def test_tolerances_out_of_range_are_refused(two: list[Path], tolerance: float) -> None:
    """A tolerance that no comparison could meet or fail is a UsageError that quotes it."""
    error = fails(UsageError, two, f"--tolerance {tolerance:g}", tolerance=tolerance)
    assert error.exit_code == 2


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_weights_must_be_numbers(two: list[Path], weight: float) -> None:
    """Weights that are not finite are refused."""
    fails(UsageError, two, "finite", weights=[1, weight])


@pytest.mark.parametrize("weight", [1e200, -1e308])
def test_absurd_weights_are_an_error_in_words(two: list[Path], weight: float) -> None:
    """A weight whose square leaves the range of numbers is refused, or the answer is finite."""
    try:
        report = loratool.compare(two, weights=[weight, 1])
    except LoraToolError as error:
        assert_clear(error)
    else:
        json.dumps(report.to_dict(), allow_nan=False)


def test_fewer_than_two_adapters(two: list[Path]) -> None:
    """None, one, and an empty path among them, are UsageErrors."""
    fails(UsageError, [], "No adapter")
    fails(UsageError, two[0], "One adapter")
    fails(UsageError, [two[0], ""], "empty")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("half", "AB")
def test_factors_that_are_no_numbers_are_named(two: list[Path], bad: float, half: str) -> None:
    """NaN and infinity in a factor stop the comparison with file and tensor."""
    tensors = load_file(two[1] / WEIGHTS)
    name = f"{ROOT}{K}.lora_{half}.weight"
    tensors[name].reshape(-1)[2] = bad
    write_adapter(two[1], tensors, None)
    fails(ValueRangeError, two, name, str(two[1]), "NaN or infinity")


def test_a_saved_tensor_with_nan_equals_nothing(tmp_path: Path) -> None:
    """NaN in a saved tensor is a difference or an error, never equality."""
    head = np.ones((3, 10), np.float32)
    head[0, 0] = np.nan
    adapters = [lora(tmp_path / n, extra={HEAD: head}, modules_to_save=["score"]) for n in "ab"]
    try:
        report = loratool.compare(adapters)
    except ValueRangeError as error:
        assert_clear(error, "score.weight")
    else:
        assert not report.equal


def test_different_shapes_are_different_bases(tmp_path: Path) -> None:
    """Modules of one name and different shapes are a MatchError with both shapes."""
    adapters = [lora(tmp_path / "small"), write_adapter(tmp_path / "large", pair(Q, 24, 10), {})]
    fails(MatchError, adapters, Q, "12×10", "24×10", "small", "large")


def test_different_base_names_are_a_warning(tmp_path: Path) -> None:
    """Base names that differ are named in a warning; nothing is refused."""
    adapters = [
        lora(tmp_path / name, seed=n, base_model_name_or_path=f"org/{name}")
        for n, name in enumerate("ab")
    ]
    report = loratool.compare(adapters)
    assert [w.code for w in report.warnings] == ["bases-differ"]


def test_paths_that_differ_by_a_prefix_are_refused(tmp_path: Path) -> None:
    """`layers.0.q` and `model.layers.0.q` are one module under two names: nothing is guessed."""
    adapters = [lora(tmp_path / "a", "layers.0.q"), lora(tmp_path / "b", "model.layers.0.q")]
    fails(MatchError, adapters, "'layers.0.q'", "'model.layers.0.q'")


def test_what_is_no_lora_is_refused(tmp_path: Path, two: list[Path]) -> None:
    """A base model and weights without their config are called by their names."""
    fails(FileError, [two[0], FIXTURES / "base"], "base model")
    bare = write_adapter(tmp_path / "bare", pair(Q, 12, 10), None)
    fails(AdapterError, [two[0], bare], "no adapter_config.json", str(bare))


@pytest.mark.parametrize("length", [0, 5, 300, -1])
def test_truncated_files_are_named(two: list[Path], length: int) -> None:
    """A weights file cut anywhere is a FileError with its path."""
    file = two[1] / WEIGHTS
    file.write_bytes(file.read_bytes()[:length])
    fails(FileError, two, str(file))


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json"])
def test_files_that_may_not_be_read_are_named(two: list[Path], name: str) -> None:
    """An input without read permission is a FileError that names it."""
    (two[1] / name).chmod(0)
    with permissions_that_count():
        fails(FileError, two, str(two[1] / name))


def test_inputs_are_not_touched(two: list[Path], tmp_path: Path) -> None:
    """A comparison writes nothing anywhere near its inputs."""
    before = sha256s(tmp_path)
    loratool.compare(two)
    assert sha256s(tmp_path) == before


# --- laws ----------------------------------------------------------------------------------------


@st.composite
def kinds(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of a small adapter of any rank and scale."""
    return {
        "rank": draw(st.integers(1, 12)),
        "lora_alpha": draw(st.integers(1, 32)),
        "use_rslora": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
        "paths": draw(st.sampled_from([(Q,), (K,), (Q, K)])),
    }


def made(folder: Path, kind: dict[str, Any]) -> Path:
    return lora(folder, *kind["paths"], **{k: v for k, v in kind.items() if k != "paths"})


weights_ = st.floats(-3, 3).filter(lambda w: abs(w) > 0.01)


@QUICK
@given(kinds(), kinds(), weights_, weights_)
def test_numbers_are_those_of_the_dense_matrices(
    first: dict[str, Any], second: dict[str, Any], v: float, w: float
) -> None:
    """Norms, cosine, ratio, distance, factor, survival and overlaps, per module and
    overall, equal what dense float64 gives."""
    with tempfile.TemporaryDirectory() as name:
        adapters = [made(Path(name) / "a", first), made(Path(name) / "b", second)]
        dense = [deltas(a) for a in adapters]
        report = loratool.compare(adapters, weights=[v, w], threads=1)
        zero = np.zeros((12, 10))
        sums = np.zeros(4)  # ⟨a,a⟩, ⟨b,b⟩, ⟨a,b⟩, ‖va+wb‖²
        shared = np.zeros(2)  # ⟨a,a⟩, ⟨b,b⟩ of the modules that both adapt
        assert {m.path for m in report.modules} == dense[0].keys() | dense[1].keys()
        for module in report.modules:
            a, b = (d.get(module.path, zero) for d in dense)
            total = v * a + w * b
            sums += [np.sum(a * a), np.sum(b * b), np.sum(a * b), np.sum(total**2)]
            # From Gram matrices: what nearly cancels is known to the root of float64's precision.
            parts = abs(v) * np.linalg.norm(a) + abs(w) * np.linalg.norm(b)
            assert module.sum_norm == pytest.approx(np.linalg.norm(total), abs=1e-7 * parts)
            (pair_,) = module.pairs
            if not a.any() or not b.any():
                assert pair_.cosine is pair_.output_overlap is pair_.input_overlap is None
                assert pair_.distance == pytest.approx(1)
                assert [n is None for n in module.norms] == [not a.any(), not b.any()]
                continue
            shared += [np.sum(a * a), np.sum(b * b)]
            size_a, size_b = np.linalg.norm(a), np.linalg.norm(b)
            cosine = np.sum(a * b) / size_a / size_b
            assert module.norms == pytest.approx([size_a, size_b], rel=1e-6)
            assert pair_.cosine == pytest.approx(cosine, abs=1e-6)
            assert pair_.ratio == pytest.approx(size_b / size_a, rel=1e-6)
            distance = np.linalg.norm(a - b) / max(size_a, size_b)
            assert pair_.distance == pytest.approx(distance, abs=1e-6)
            assert pair_.factor == pytest.approx(np.sum(a * b) / size_a**2, abs=1e-6)
            survival = [np.sum(a * total) / (v * size_a**2), np.sum(b * total) / (w * size_b**2)]
            assert module.survival == pytest.approx(survival, rel=1e-5, abs=1e-6)
            assert np.square(pair_.output_cosines or []) == pytest.approx(overlaps(a, b), abs=1e-5)
            assert np.square(pair_.input_cosines or []) == pytest.approx(
                overlaps(a.T, b.T), abs=1e-5
            )
            assert pair_.output_overlap == pytest.approx(np.mean(overlaps(a, b)), abs=1e-5)
            values = np.linalg.svd(a, compute_uv=False)[: first["rank"]]
            shares = values / values.sum()
            entropy = math.exp(-np.sum(shares * np.log(shares)))
            assert module.effective_ranks[0] == pytest.approx(entropy, rel=1e-4)
        (whole,) = report.pairs
        aa, bb, ab, both = sums
        assert report.norms == pytest.approx([math.sqrt(aa), math.sqrt(bb)], rel=1e-6)
        if shared.all():
            assert whole.cosine == pytest.approx(ab / math.sqrt(np.prod(shared)), abs=1e-6)
        else:
            assert whole.cosine is None
        assert whole.ratio == pytest.approx(math.sqrt(bb / aa), rel=1e-6)
        assert whole.factor == pytest.approx(ab / aa, abs=1e-6)
        assert report.survival == pytest.approx(
            [(v * aa + w * ab) / (v * aa), (v * ab + w * bb) / (w * bb)], rel=1e-5, abs=1e-6
        )
        apart = v * v * aa + w * w * bb
        assert report.sum_share == pytest.approx(both / apart, rel=1e-5, abs=1e-13)
        json.dumps(report.to_dict(), allow_nan=False)


@QUICK
@given(kinds(), kinds())
def test_comparing_is_symmetric(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Swapping the adapters swaps their numbers and turns the ratio over; nothing else changes."""
    with tempfile.TemporaryDirectory() as name:
        adapters = [made(Path(name) / "a", first), made(Path(name) / "b", second)]
        there = loratool.compare(adapters, threads=1)
        back = loratool.compare(adapters[::-1], threads=1)
        assert (there.verdicts, there.equal) == (back.verdicts, back.equal)
        assert there.norms == pytest.approx(back.norms[::-1])
        assert there.survival == pytest.approx(back.survival[::-1], rel=1e-9)
        one, two = there.pairs[0], back.pairs[0]
        assert one.cosine == (None if two.cosine is None else pytest.approx(two.cosine, abs=1e-12))
        assert one.distance == pytest.approx(two.distance)
        assert one.output_overlap == pytest.approx(two.output_overlap)
        assert one.input_overlap == pytest.approx(two.input_overlap)
        assert (one.ratio or 0) * (two.ratio or 0) == pytest.approx(1)


@QUICK
@given(kinds(), kinds(), st.integers(0, 3), st.booleans())
def test_factors_and_their_rank_do_not_matter(
    first: dict[str, Any], second: dict[str, Any], more: int, conventional: bool
) -> None:
    """B·G, G⁻¹·A, filled up with zeros, with another alpha or rsLoRA, is the same adapter."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, other = made(folder / "a", first), made(folder / "b", second)
        config = json.loads((source / "adapter_config.json").read_text())
        rank = config["r"] + more
        root = math.sqrt if first["use_rslora"] else float
        scale = config["lora_alpha"] / root(config["r"])
        new_root = float if conventional else math.sqrt
        new = {"r": rank, "lora_alpha": 3, "use_rslora": not conventional}
        rng = np.random.default_rng(first["seed"])
        turn = np.linalg.qr(rng.standard_normal((rank, rank)))[0] * rng.uniform(0.5, 2, rank)
        tensors = load_file(source / WEIGHTS)
        fresh: Tensors = {}
        for path in first["paths"]:
            names = [f"{ROOT}{path}.lora_{half}.weight" for half in "AB"]
            a = np.pad(tensors[names[0]].astype(np.float64), [(0, more), (0, 0)])
            b = np.pad(tensors[names[1]].astype(np.float64), [(0, 0), (0, more)])
            b = b * scale / (3 / new_root(rank))
            fresh[names[0]] = (np.linalg.inv(turn) @ a).astype(np.float32)
            fresh[names[1]] = (b @ turn).astype(np.float32)
        remade = write_adapter(folder / "c", fresh, new)
        report = loratool.compare([source, remade], tolerance=1e-5, threads=1)
        assert report.equal, report.differing
        assert report.verdicts == ["same"]
        one = loratool.compare([source, other], threads=1)
        two = loratool.compare([remade, other], threads=1)
        assert one.verdicts == two.verdicts
        assert one.pairs[0].distance == pytest.approx(two.pairs[0].distance, abs=1e-5)
        for left, right in zip(one.modules, two.modules, strict=True):
            assert left.path == right.path
            if left.pairs[0].output_overlap is not None:
                assert np.square(left.pairs[0].output_cosines or []) == pytest.approx(
                    np.square(right.pairs[0].output_cosines or []), abs=1e-4
                )
                assert np.square(left.pairs[0].input_cosines or []) == pytest.approx(
                    np.square(right.pairs[0].input_cosines or []), abs=1e-4
                )


@QUICK
@given(kinds(), st.floats(-5, 5).filter(lambda c: abs(c) > 0.01 and abs(c - 1) > 0.01))
def test_a_multiple_is_found_with_its_factor(kind: dict[str, Any], factor: float) -> None:
    """c·A is "scaled", for negative c too, and the report has c."""
    with tempfile.TemporaryDirectory() as name:
        source = made(Path(name) / "a", kind)
        tensors = {n: t * np.float32(factor if "lora_B" in n else 1)
                   for n, t in load_file(source / WEIGHTS).items()}  # fmt: skip
        multiple = changed(source, Path(name) / "b", tensors)
        report = loratool.compare([source, multiple], threads=1)
        assert report.verdicts == ["scaled"]
        assert report.pairs[0].factor == pytest.approx(factor, rel=1e-5)
        assert report.pairs[0].cosine == pytest.approx(math.copysign(1, factor))
        assert not report.equal


# --- verdicts ------------------------------------------------------------------------------------


def units(*numbers: int, size: int = 10) -> np.ndarray:
    """Unit vectors as columns."""
    return np.eye(size)[:, list(numbers)]


def test_verdict_same_in_every_format(tmp_path: Path) -> None:
    """The same adapter as .bin, in float16 and in float64 is the same; bfloat16 needs more room."""
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file

    source = lora(tmp_path / "one", Q, K)
    tensors = load_torch(source / WEIGHTS)
    config = source / "adapter_config.json"
    for name, dtype in (("f16", torch.float16), ("f64", torch.float64), ("bf16", torch.bfloat16)):
        (tmp_path / name).mkdir()
        shutil.copyfile(config, tmp_path / name / config.name)
        converted = {n: t.to(dtype) for n, t in tensors.items()}
        save_file(converted, tmp_path / name / WEIGHTS)
        (tmp_path / f"{name}-bin").mkdir()
        shutil.copyfile(config, tmp_path / f"{name}-bin" / config.name)
        torch.save(converted, tmp_path / f"{name}-bin" / "adapter_model.bin")
        exact = loratool.compare([tmp_path / name, tmp_path / f"{name}-bin"], tolerance=1e-6)
        assert exact.equal
        assert exact.pairs[0].distance == pytest.approx(0, abs=1e-7)
    assert verdict(source, tmp_path / "f64", tolerance=1e-6) == "same"
    assert verdict(source, tmp_path / "f16") == "same"
    assert (
        verdict(source, tmp_path / "bf16") == "scaled"
        or not loratool.compare([source, tmp_path / "bf16"]).equal
    )
    assert verdict(source, tmp_path / "bf16", tolerance=0.01) == "same"


def test_verdicts_of_related_and_conflicting_adapters(tmp_path: Path) -> None:
    """A positive cosine is "related", a negative one "conflict", a small one "unrelated"."""
    first = of(tmp_path / "a", {Q: (units(0), units(0).T)})
    for cosine, word in ((0.3, "related"), (-0.3, "conflict"), (0.0, "unrelated"),
                         (0.04, "unrelated"), (-0.04, "unrelated"), (0.06, "related"),
                         (-0.06, "conflict")):  # fmt: skip
        rest = math.sqrt(1 - cosine**2)
        other = of(tmp_path / "b", {Q: (cosine * units(0) + rest * units(1), units(0).T)})
        report = loratool.compare([first, other])
        assert report.verdicts == [word], cosine
        assert report.pairs[0].cosine == pytest.approx(cosine, abs=1e-7)
        assert report.pairs[0].output_overlap == pytest.approx(cosine**2, abs=1e-7)
        assert report.pairs[0].input_overlap == pytest.approx(1)


def test_verdict_disjoint(tmp_path: Path) -> None:
    """Adapters without a common module are "disjoint", and that is a warning too."""
    adapters = [lora(tmp_path / "q", Q), lora(tmp_path / "k", K)]
    report = loratool.compare(adapters)
    assert report.verdicts == ["disjoint"]
    assert [w.code for w in report.warnings] == ["nothing-shared"]
    assert report.pairs[0].cosine in (None, 0)
    assert report.survival == pytest.approx([1, 1])
    assert not report.equal


def test_a_difference_in_one_small_module_is_seen(tmp_path: Path) -> None:
    """One module that differs is not drowned by large ones that agree."""
    shared = {f"model.layers.{n}.q": (1e3 * units(n), units(n).T) for n in range(5)}
    one = of(tmp_path / "a", shared | {K: (units(0), units(0).T)})
    two = of(tmp_path / "b", shared | {K: (units(1), units(1).T)})
    report = loratool.compare([one, two])
    assert not report.equal
    assert report.verdicts != ["same"]
    assert [d for d in report.differing if K in d] == report.differing


def test_equal_directions_in_modules_and_not_overall(tmp_path: Path) -> None:
    """One module doubled and another tripled is no multiple of the adapter."""
    one = of(tmp_path / "a", {Q: (units(0), units(0).T), K: (units(1), units(1).T)})
    two = of(tmp_path / "b", {Q: (2 * units(0), units(0).T), K: (3 * units(1), units(1).T)})
    assert verdict(one, two) == "related"


def test_zero_deltas(tmp_path: Path) -> None:
    """Adapters that do nothing are the same as each other, and unlike those that do something."""
    source = lora(tmp_path / "one")
    zeros = {n: t * ("lora_A" in n) for n, t in load_file(source / WEIGHTS).items()}
    zero = changed(source, tmp_path / "zero", zeros)
    other = changed(source, tmp_path / "other", {n: 0 * t for n, t in zeros.items()})
    assert loratool.compare([zero, other]).equal
    report = loratool.compare([source, zero])
    assert not report.equal
    assert report.pairs[0].cosine is None
    assert report.survival == [pytest.approx(1), None]
    json.dumps(report.to_dict(), allow_nan=False)
    absent = lora(tmp_path / "absent", K)
    both = changed(absent, tmp_path / "both", zeros)
    assert loratool.compare([absent, both]).equal  # a module that does nothing is none


def test_survival_says_what_cancels(tmp_path: Path) -> None:
    """In A − A nothing of A is left, in A + A it is doubled."""
    one, two = lora(tmp_path / "a"), lora(tmp_path / "b")
    assert loratool.compare([one, two]).survival == pytest.approx([2, 2])
    gone = loratool.compare([one, two], weights=[0.5, -0.5])
    assert gone.survival == pytest.approx([0, 0], abs=1e-9)
    assert gone.sum_share == pytest.approx(0, abs=1e-9)
    left_out = loratool.compare([one, two], weights=[1, 0])
    assert left_out.survival == [pytest.approx(1), None]


# --- equality ------------------------------------------------------------------------------------

ROWS = f"{ROOT}model.embed_tokens.token_adapter.trainable_tokens_delta"
MAGNITUDE = f"{ROOT}{Q}.lora_magnitude_vector"
BIAS = f"{ROOT}{Q}.lora_B.bias"


def complete(folder: Path) -> Path:
    """An adapter with a head, DoRA magnitudes, a bias and token rows."""
    rng = np.random.default_rng(3)
    shapes: dict[str, tuple[int, ...]] = {
        HEAD: (3, 10),
        MAGNITUDE: (12,),
        BIAS: (12,),
        ROWS: (2, 10),
    }
    extra = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    return lora(
        folder, extra=extra, modules_to_save=["score"], use_dora=True, lora_bias=True,
        trainable_token_indices={"embed_tokens": [4, 9]},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "words"),
    [(HEAD, "score.weight"), (MAGNITUDE, "DoRA magnitude"), (BIAS, "lora_bias"),
     (ROWS, "token rows")],
)  # fmt: skip
def test_what_lies_beside_the_factors_counts(tmp_path: Path, name: str, words: str) -> None:
    """A head, magnitude, bias or token row that differs, in values or in shape, is a difference
    that is named; one within the tolerance is none."""
    source = complete(tmp_path / "one")
    assert loratool.compare([source, complete(tmp_path / "copy")]).equal
    old = load_file(source / WEIGHTS)[name]
    near = changed(source, tmp_path / "near", {name: old * np.float32(1.0005)})
    assert loratool.compare([source, near]).equal
    far = old.copy()
    far.reshape(-1)[0] += 1
    report = loratool.compare([source, changed(source, tmp_path / "far", {name: far})])
    assert not report.equal
    assert len(report.differing) == 1
    assert words in report.differing[0]
    assert "differs by" in report.differing[0]


@pytest.mark.parametrize("swapped", [False, True])
def test_what_is_on_one_side_only_is_a_difference(tmp_path: Path, swapped: bool) -> None:
    """A head, a bias, magnitudes or token rows that only one adapter has make them unequal, and
    the side that has it is named."""
    plain = lora(tmp_path / "plain")
    cases: list[tuple[Tensors, dict[str, Any]]] = [
        ({HEAD: np.ones((3, 10), np.float32)}, {"modules_to_save": ["score"]}),
        ({BIAS: np.ones(12, np.float32)}, {"lora_bias": True}),
        ({MAGNITUDE: np.ones(12, np.float32)}, {"use_dora": True}),
        ({ROWS: np.ones((1, 10), np.float32)}, {"trainable_token_indices": {"embed_tokens": [1]}}),
    ]
    for number, (extra, config) in enumerate(cases):
        richer = changed(plain, tmp_path / f"richer{number}", extra, **config)
        report = loratool.compare([richer, plain] if swapped else [plain, richer])
        assert not report.equal
        assert len(report.differing) == 1
        assert f"only in {richer}" in report.differing[0]


def test_other_tokens_are_a_difference(tmp_path: Path) -> None:
    """The same rows for other tokens are not the same."""
    source = complete(tmp_path / "one")
    other = changed(source, tmp_path / "two", {}, trainable_token_indices={"embed_tokens": [4, 8]})
    assert not loratool.compare([source, other]).equal


def test_saved_tensors_of_whole_numbers_are_compared(tmp_path: Path) -> None:
    """Integers in saved modules (a count of batches) are equal or not like everything else."""
    key = f"{ROOT}score.norm.num_batches_tracked"
    adapters = [
        lora(tmp_path / str(n), extra={key: np.array([count])}, modules_to_save=["score"])
        for n, count in enumerate((5, 5, 6))
    ]
    assert loratool.compare(adapters[:2]).equal
    assert not loratool.compare(adapters[1:]).equal


def test_the_words_do_not_call_different_adapters_the_same(tmp_path: Path) -> None:
    """Where only a head differs, nobody may read that the adapters are the same without reading
    that something else differs, also without --equal."""
    source = complete(tmp_path / "one")
    other = changed(source, tmp_path / "two", {HEAD: np.zeros((3, 10), np.float32)})
    done = run_cli("compare", str(source), str(other))
    assert done.exit_code == 0
    assert "score.weight" in done.stdout + done.stderr


def test_biases_count_with_their_scale(tmp_path: Path) -> None:
    """A bias is compared as it acts: half of it with twice the alpha is the same."""
    source = lora(tmp_path / "one", extra={BIAS: np.ones(12, np.float32)}, lora_bias=True)
    tensors = load_file(source / WEIGHTS)
    half = {n: t / 2 for n, t in tensors.items() if "lora_B" in n}
    other = changed(source, tmp_path / "two", half, lora_alpha=16)
    assert loratool.compare([source, other]).equal
    wrong = changed(source, tmp_path / "three", half | {BIAS: tensors[BIAS]}, lora_alpha=16)
    assert not loratool.compare([source, wrong]).equal


@pytest.mark.parametrize(("equal", "code"), [(True, 0), (False, 3)])
def test_exit_codes(tmp_path: Path, equal: bool, code: int) -> None:
    """--equal exits with 0 where all do the same, 3 where not; as JSON, quiet or in words."""
    source = lora(tmp_path / "one", Q, K)
    loratool.resize(source, tmp_path / "two", rank=4 if equal else 3, dtype="float16")
    loratool.resize(source, tmp_path / "three", rank=9)
    adapters = [str(tmp_path / name) for name in ("one", "three", "two")]
    done = run_cli("compare", *adapters, "--equal")
    assert done.exit_code == code
    assert done.stdout.rstrip().splitlines()[-1].startswith("equal" if equal else "not equal")
    document = run_cli("compare", *adapters, "--equal", "--json", "-q")
    assert document.exit_code == code
    assert json.loads(document.stdout)["equal"] is equal
    assert run_cli("compare", *adapters).exit_code == 0


def test_all_pairs_count_for_equality(tmp_path: Path) -> None:
    """Three adapters are equal only if all are: the one that differs may be anywhere."""
    same_ = [lora(tmp_path / name, seed=1) for name in "ab"]
    odd = lora(tmp_path / "odd", seed=2)
    assert not loratool.compare([odd, *same_]).equal
    assert not loratool.compare([*same_, odd]).equal
    assert not loratool.compare([same_[0], odd, same_[1]]).equal
    assert loratool.compare(same_).equal


def test_two_that_are_each_near_the_first(tmp_path: Path) -> None:
    """Differences are measured from the first adapter: one beyond the tolerance from it is seen,
    whatever lies between."""
    middle = of(tmp_path / "a", {Q: (units(0), units(0).T)})
    left = of(tmp_path / "b", {Q: (0.92 * units(0), units(0).T)})
    right = of(tmp_path / "c", {Q: (1.08 * units(0), units(0).T)})
    assert loratool.compare([middle, left], tolerance=0.1).equal
    assert loratool.compare([middle, right], tolerance=0.1).equal
    assert not loratool.compare([left, right], tolerance=0.1).equal
    assert not loratool.compare([left, middle, right], tolerance=0.1).equal


# --- three, a base, a selection ------------------------------------------------------------------


def test_three_adapters_make_a_matrix(tmp_path: Path) -> None:
    """Three adapters give three pairs in order, a matrix of cosines and a verdict for each."""
    adapters = [lora(tmp_path / name, Q, K, seed=n) for n, name in enumerate("xyz")]
    report = loratool.compare(adapters, weights=[1, 2, -1])
    assert [(p.a, p.b) for p in report.pairs] == [(0, 1), (0, 2), (1, 2)]
    dense = [np.concatenate([d.ravel() for _, d in sorted(deltas(a).items())]) for a in adapters]
    total = dense[0] + 2 * dense[1] - dense[2]
    for p in report.pairs:
        x, y = dense[p.a], dense[p.b]
        assert p.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-6)
    assert report.survival == pytest.approx(
        [d @ total / (w * d @ d) for d, w in zip(dense, [1, 2, -1], strict=True)], rel=1e-5
    )
    words = run_cli("compare", *map(str, adapters)).stdout
    rows = re.findall(r"^ *([ABC])((?: +-?\d+\.\d\d| +1)+) *$", words, re.MULTILINE)
    assert [name for name, _ in rows] == list("ABC")
    values = [row.split() for _, row in rows]
    assert all(values[i][i] == "1" for i in range(3))
    assert values[0][1] == values[1][0] == f"{report.pairs[0].cosine:.2f}"
    assert values[0][2] == values[2][0] == f"{report.pairs[1].cosine:.2f}"
    assert len(re.findall(r"^[AB] and [BC] ", words, re.MULTILINE)) == 3


def test_modules_of_some_adapters_only(tmp_path: Path) -> None:
    """With three adapters a module that two have is compared between these."""
    adapters = [lora(tmp_path / "a", Q), lora(tmp_path / "b", Q, K, seed=1),
                lora(tmp_path / "c", K, seed=2)]  # fmt: skip
    report = loratool.compare(adapters)
    by_path = {m.path: m for m in report.modules}
    assert by_path[Q].ranks == [4, 4, None]
    assert by_path[K].ranks == [None, 4, 4]
    assert [p.cosine is None for p in by_path[K].pairs] == [True, True, False]
    assert report.verdicts[1] == "disjoint"
    assert "disjoint" not in (report.verdicts[0], report.verdicts[2])


def test_intruders_are_counted_against_the_base(tmp_path: Path) -> None:
    """A large direction that the base lacks is an intruder, a small or an old one is none."""
    import torch

    values = np.linspace(10, 1, 10)
    left = np.linalg.qr(np.random.default_rng(0).standard_normal((12, 12)))[0]
    right = np.linalg.qr(np.random.default_rng(1).standard_normal((10, 10)))[0]
    weight = (left[:, :10] * values) @ right
    state = {f"{Q}.weight": torch.tensor(weight).float(), "model.norm.weight": torch.ones(10)}
    base = write_base(tmp_path / "base", state)
    new = left[:, 10:11]
    adapters = [
        of(tmp_path / "new", {Q: (100 * new, right[:1])}),
        of(tmp_path / "small", {Q: (0.01 * new, right[:1])}),
        of(tmp_path / "old", {Q: (5 * left[:, :1], right[:1])}),
    ]
    report = loratool.compare(adapters, base=base)
    assert report.modules[0].intruders == [1, 0, 0]
    assert report.base == str(base)
    words = run_cli("compare", *map(str, adapters), "--base", str(base)).stdout
    assert "intruders" in words
    assert loratool.compare(adapters).modules[0].intruders is None


def test_intruders_of_the_fixtures(adapter: Path, base: Path) -> None:
    """The fixtures can be compared against their base: a count from 0 to 10 for every module."""
    report = loratool.compare([adapter, adapter], base=base, layers="0")
    assert len(report.modules) == 7
    for module in report.modules:
        assert module.intruders is not None
        assert module.intruders[0] == module.intruders[1]
        assert 0 <= (module.intruders[0] or 0) <= 10


def test_a_base_that_does_not_fit(tmp_path: Path, two: list[Path], base: Path) -> None:
    """A base without the modules, an adapter in its place, and nothing there are refused."""
    fails(MatchError, two, str(base), base=base)
    fails(LoraToolError, two, base=tmp_path / "nothing")
    fails(LoraToolError, two, base=two[0])


def test_selections(adapter: Path) -> None:
    """--layer and --include narrow the modules and all overall numbers; wrong ones are refused."""
    every = loratool.compare([adapter, adapter])
    assert len(every.modules) == 28
    some = loratool.compare([adapter, adapter], layers="1-2", include=["self_attn.*"])
    assert len(some.modules) == 8
    assert {m.path.split(".")[2] for m in some.modules} == {"1", "2"}
    assert all(".self_attn." in m.path for m in some.modules)
    norm = math.sqrt(sum((m.norms[0] or 0) ** 2 for m in some.modules))
    assert some.norms[0] == pytest.approx(norm)
    assert some.norms[0] < every.norms[0]
    fails(UsageError, [adapter, adapter], "No module matches", layers="9")
    fails(UsageError, [adapter, adapter], "'3-1'", layers="3-1")
    fails(UsageError, [adapter, adapter], "nothing.*", include=["nothing.*"])


def test_norms_are_those_of_inspect(tmp_path: Path, adapter: Path) -> None:
    """compare, inspect and resize name the same ‖ΔW‖."""
    compared = {m.path: m.norms[0] for m in loratool.compare([adapter, adapter]).modules}
    inspected = {m.path: m.delta_norm for m in loratool.inspect(adapter).modules}
    resized = loratool.resize(adapter, tmp_path / "x", rank=8, dry_run=True).modules
    assert compared == pytest.approx(inspected, rel=1e-9)
    assert compared == pytest.approx({m.path: m.norm for m in resized}, rel=1e-9)


# --- the command line ----------------------------------------------------------------------------


def test_json_is_all_there_is_on_stdout(two: list[Path]) -> None:
    """--json prints one strict document with schema_version, and what the library reports."""
    done = run_cli("compare", *map(str, two), "--weight", "1", "--weight", "-1", "--json")
    assert (done.exit_code, done.stderr) == (0, "")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    document = json.loads(done.stdout, parse_constant=refuse)
    assert document["schema_version"] == 1
    report = loratool.compare(two, weights=[1, -1])
    assert document == json.loads(json.dumps(report.to_dict()))


def test_threads_do_not_matter(tmp_path: Path) -> None:
    """The report is the same to the last bit with 1 and with 3 threads."""
    paths = [f"model.layers.{n}.q_proj" for n in range(8)]
    adapters = [lora(tmp_path / str(n), *paths, seed=n) for n in range(2)]
    reports = [loratool.compare(adapters, threads=n).to_dict() for n in (1, 3)]
    assert reports[0] == reports[1]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_lines_fit_the_terminal(width: int) -> None:
    """No line is wider than the terminal; at 80 columns every row is one line, without ellipses."""
    adapter = str(FIXTURES / "adapter")
    for count in (2, 4):
        done = subprocess.run(
            [sys.executable, "-m", "loratool", "compare", *[adapter] * count, "--equal",
             "--base", str(FIXTURES / "base")],
            capture_output=True, text=True, env={**os.environ, "COLUMNS": str(width)}, check=True,
        )  # fmt: skip
        lines = done.stdout.splitlines()
        assert max(map(len, lines)) <= width
        assert "…" not in done.stdout
        assert "\x1b" not in done.stdout
        if width >= 80:
            start = next(i for i, x in enumerate(lines) if x.startswith("module "))
            table = [x for x in lines[start:] if "_proj" in x]
            assert len(table) == 7
            assert len({len(x.split()) for x in table}) == 1
            assert all("1.00" in x for x in table)


def test_warnings_are_on_stderr_and_quiet_is_quiet(tmp_path: Path) -> None:
    """Warnings go to stderr with their codes; -q silences stderr and keeps the answer."""
    adapters = [str(lora(tmp_path / "q", Q)), str(lora(tmp_path / "k", K))]
    done = run_cli("compare", *adapters)
    assert "[nothing-shared]" in done.stderr
    assert "change no module together" in done.stdout
    quiet = run_cli("compare", *adapters, "-q")
    assert quiet.stderr == ""
    assert quiet.stdout == done.stdout
    assert "\x1b" not in done.stdout + done.stderr


def test_words_in_brackets_are_no_markup(tmp_path: Path) -> None:
    """Paths and modules with square brackets are printed as they are."""
    adapters = [str(lora(tmp_path / name, "blocks.[red].q", seed=n))
                for n, name in enumerate(("[bold]a", "[/b]"))]  # fmt: skip
    done = run_cli("compare", *adapters, "--equal")
    assert done.exit_code == 3
    assert done.stderr == ""
    assert "".join(done.stdout.split()).count("[red]") >= 2
    assert "[bold]a" in "".join(done.stdout.split())


@pytest.mark.parametrize("option", ["--json", "--full"])
@pytest.mark.parametrize(("equal", "code"), [(True, 0), (False, 3)])
def test_a_closed_pipe_keeps_the_exit_code(
    tmp_path: Path, option: str, equal: bool, code: int
) -> None:
    """A reader that leaves early gets no traceback, and the code still says what was found."""
    paths = [f"model.layers.{n}.q_proj" for n in range(100)]
    one, two = (lora(tmp_path / str(n), *paths, seed=0 if equal else n) for n in range(2))
    done = subprocess.run(
        ["bash", "-c",
         f"{sys.executable} -m loratool compare {one} {two} --equal {option} | true; "
         "exit ${PIPESTATUS[0]}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (code, "")


# --- what a review found --------------------------------------------------------------------------


def test_scaled_means_every_module_by_the_same_factor(tmp_path: Path) -> None:
    """One small module with the opposite sign, or missing, or another head, is no multiple."""
    big, small = (100 * units(0), units(0).T), (units(1), units(1).T)
    one = of(tmp_path / "a", {Q: big, K: small})
    flipped = of(tmp_path / "b", {Q: (2 * big[0], big[1]), K: (-2 * small[0], small[1])})
    missing = of(tmp_path / "c", {Q: (2 * big[0], big[1])})
    whole = of(tmp_path / "d", {Q: (2 * big[0], big[1]), K: (2 * small[0], small[1])})
    head = changed(whole, tmp_path / "e", {HEAD: np.ones((3, 10))}, modules_to_save=["score"])
    assert verdict(one, whole) == "scaled"
    assert [verdict(one, other) for other in (flipped, missing, head)] == ["related"] * 3


def test_dora_is_said_not_to_be_in_the_figures(tmp_path: Path) -> None:
    """Cosines of DoRA adapters leave the magnitudes out, and a warning says so; their intruders
    are not counted."""
    plain = loratool.compare([FIXTURES / "adapter"] * 2, base=FIXTURES / "base", layers="0")
    assert plain.modules[0].intruders is not None
    assert None not in plain.modules[0].intruders
    tensors = load_file(FIXTURES / "adapter" / WEIGHTS)
    magnitudes = {
        name.replace("lora_B.weight", "lora_magnitude_vector"): np.ones(len(b), np.float32)
        for name, b in tensors.items()
        if "lora_B" in name
    }
    dora = changed(FIXTURES / "adapter", tmp_path / "dora", magnitudes, use_dora=True)
    report = loratool.compare([FIXTURES / "adapter", dora], base=FIXTURES / "base", layers="0")
    assert [w.code for w in report.warnings] == ["dora-compared"]
    assert report.modules[0].intruders is not None
    assert report.modules[0].intruders[0] is not None
    assert report.modules[0].intruders[1] is None


def test_a_bfloat16_copy_is_nearly_the_same(tmp_path: Path) -> None:
    """Rounding to bfloat16 is no other adapter: the words say how far apart the two are."""
    source = lora(tmp_path / "one", Q, K)
    loratool.resize(source, tmp_path / "half", pad_to=4, dtype="bfloat16")
    assert verdict(source, tmp_path / "half") == "near"
    done = run_cli("compare", str(source), str(tmp_path / "half"))
    assert "nearly the same" in done.stdout


def test_parts_that_cancel_leave_nothing(tmp_path: Path) -> None:
    """The sentence about the sum has no rounding noise in it."""
    source = lora(tmp_path / "one", Q)
    done = run_cli("compare", str(source), str(source), "--weight", "1", "--weight", "-1")
    assert "its parts cancel" in done.stdout
    assert "-0" not in done.stdout.split("scaled")[-1]


def test_many_adapters_do_not_fill_the_screen(tmp_path: Path) -> None:
    """Of many pairs those that have little to do with each other are counted, not listed."""
    sources = [str(lora(tmp_path / str(n), Q, K, seed=n)) for n in range(6)]
    done = run_cli("compare", *sources)
    assert "of 15 pairs have little to do with each other" in done.stdout
    assert done.stdout.count("little to do") <= 2


def test_the_expectation_of_chance_is_there(tmp_path: Path) -> None:
    """Random spaces of rank 4 in widths 12 and 10 overlap by about a third; the report says so."""
    report = loratool.compare([lora(tmp_path / str(n), Q, seed=n) for n in range(2)])
    (pair_,) = report.modules[0].pairs
    assert pair_.output_chance == pytest.approx(4 / 12)
    assert pair_.input_chance == pytest.approx(4 / 10)
