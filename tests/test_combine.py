"""combine: what it refuses, the laws it obeys, and what it leaves on the disk."""

from __future__ import annotations

import json
import math
import os
import re
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
import safetensors.torch
from adapters import HEAD, ROOT, WEIGHTS, K, Q, Tensors, codes, config_of, deltas, lora
from conftest import FIXTURES, pair, run_cli, write_adapter
from files import assert_clean, assert_clear, beside, permissions_that_count, sha256s
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import loratool
from loratool.errors import (
    AdapterError,
    FileError,
    LoraToolError,
    MatchError,
    OutputError,
    UsageError,
    ValueRangeError,
)
from loratool.linalg.methods import METHODS

QUICK = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def holding(folder: Path, head: np.ndarray, seed: int = 0, **config: Any) -> Path:
    """An adapter that holds a head whole."""
    extra = {HEAD: head}
    return lora(folder, seed=seed, extra=extra, modules_to_save=["score"], **config)


def total(folders: list[Path], weights: list[float]) -> dict[str, np.ndarray]:
    """The weighted sum of the dense deltas."""
    found: dict[str, np.ndarray] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for path, delta in deltas(folder).items():
            found[path] = found.get(path, 0.0) + weight * delta
    return found


def assert_near(
    one: dict[str, np.ndarray], other: dict[str, np.ndarray], size: float, share: float = 1e-6
) -> None:
    """The same modules, whose deltas differ by no more than this share of `size`."""
    assert one.keys() == other.keys()
    for path in one:
        assert np.linalg.norm(one[path] - other[path]) <= share * size


def fails(
    kind: type[LoraToolError], adapters: Any, output: Path, *parts: str, **options: Any
) -> LoraToolError:
    """Combine, expecting this clear error with `parts` in its message, and nothing on the disk."""
    with pytest.raises(LoraToolError) as caught:
        loratool.combine(adapters, output, **options)
    assert isinstance(caught.value, kind), caught.value
    assert_clear(caught.value, *parts)
    assert_clean(output)
    return caught.value


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [lora(tmp_path / "in" / "one", seed=1), lora(tmp_path / "in" / "two", seed=2)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{one}", "{two}", "--weight", "1"], 2, "1 weights for 2 adapters"),
        (["{one}", "--weight", "inf"], 2, "finite"),
        (["{one}", "{two}", "--rank", "0"], 2, "--rank 0"),
        (["{one}", "{two}", "--rank", "2", "--energy", "0.9"], 2, "different ranks"),
        (["{one}", "{two}", "--method", "ties"], 2, "--density"),
        (["{one}", "{two}", "--density", "0.5"], 2, "does not prune"),
        (["{one}", "{two}", "--method", "ties_cor", "--density", "1"], 2, "Did you mean ties_core"),
        (["{one}", "{two}", "--dtype", "flaot16"], 2, "Did you mean float16"),
        (["{one}", "{two}", "--saved", "frist"], 2, "first"),
        (["{one}", "{two}", "--majority-sign-method", "most"], 2, "total, frequency"),
        (["{one}", "{two}", "--seed", "-1"], 2, "--seed"),
        (["{one}", "{two}x"], 1, "Did you mean"),
        (["{one}", "{one}", "--weight", "1", "--weight", "-1"], 1, "does nothing"),
    ],
)
def test_mistakes_get_one_clear_error(
    two: list[Path], out: Path, arguments: list[str], code: int, words: str
) -> None:
    """A mistake is one error in words on stderr with its exit code, and nothing is written."""
    filled = [a.format(one=two[0], two=two[1]) for a in arguments]
    done = run_cli("combine", *filled, "-o", str(out))
    assert done.exit_code == code
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stderr.lower().count("error:") == 1
    assert done.stdout == ""
    assert_clean(out)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"weights": [1.0, 2.0, 3.0]}, "3 weights for 2 adapters"),
        ({"weights": [1.0, math.nan]}, "nan"),
        ({"weights": [-math.inf, 1.0]}, "inf"),
        ({"weights": [0.0, 0.0]}, "All weights are 0"),
        ({"rank": -3}, "--rank -3"),
        ({"energy": 0.0}, "--energy 0"),
        ({"energy": 1.01}, "--energy 1.01"),
        ({"energy": math.nan}, "--energy nan"),
        ({"method": "Sum"}, "Unknown method 'Sum'"),
        ({"dtype": "float8"}, "Unknown dtype 'float8'"),
        ({"threads": 0}, "0 threads"),
        ({"saved": "both"}, "'both'"),
    ],
)
def test_options_out_of_range_are_refused(
    two: list[Path], out: Path, options: dict[str, Any], part: str
) -> None:
    """Numbers and names that no option takes are UsageErrors that quote them."""
    assert fails(UsageError, two, out, part, **options).exit_code == 2


@pytest.mark.parametrize("method", [n for n, m in METHODS.items() if m.prunes])
@pytest.mark.parametrize("density", [None, 0.0, -0.1, 1.5, math.nan])
def test_pruning_needs_a_density_that_is_a_share(
    two: list[Path], out: Path, method: str, density: float | None
) -> None:
    """Pruning methods refuse a density that is missing or not above 0 and at most 1."""
    part = "needs a density" if density is None else f"{density:g}"
    fails(UsageError, two, out, part, method=method, density=density)


@pytest.mark.parametrize("method", [n for n, m in METHODS.items() if not m.prunes])
def test_a_density_for_nothing_is_refused(two: list[Path], out: Path, method: str) -> None:
    """Methods that do not prune refuse a density instead of ignoring it."""
    fails(UsageError, two, out, method, "does not prune", method=method, density=0.5)


def test_no_adapter_and_an_empty_path_are_refused(two: list[Path], out: Path) -> None:
    """An empty list and an empty string (an unset shell variable) are UsageErrors."""
    fails(UsageError, [], out, "No adapter")
    fails(UsageError, [two[0], ""], out, "empty")


def test_a_negative_seed_is_refused(two: list[Path], out: Path) -> None:
    """The library refuses a seed below zero in words, as the command line does."""
    fails(UsageError, two, out, "-1", method="dare_linear", density=0.5, seed=-1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "name",
    [f"{ROOT}{Q}.lora_A.weight", f"{ROOT}{Q}.lora_B.weight", f"{ROOT}{Q}.lora_B.bias", HEAD],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_values_that_are_no_numbers_are_named(
    tmp_path: Path, out: Path, name: str, bad: float, dry_run: bool
) -> None:
    """NaN and infinity in A, B, a bias or a saved tensor stop the run with the tensor's name."""
    extra = {f"{ROOT}{Q}.lora_B.bias": np.ones(12, np.float32), HEAD: np.ones((3, 10), np.float32)}
    good = lora(tmp_path / "good", seed=1)
    bad_one = lora(tmp_path / "bad", extra=extra, lora_bias=True, modules_to_save=["score"])
    tensors = load_file(bad_one / WEIGHTS)
    tensors[name].reshape(-1)[3] = bad
    write_adapter(bad_one, tensors, None)
    error = fails(ValueRangeError, [good, bad_one], out, dry_run=dry_run)
    assert name.removeprefix(ROOT) in error.message
    assert "NaN or infinity" in error.message


def test_the_file_with_a_bad_saved_tensor_is_named(tmp_path: Path, out: Path) -> None:
    """With several adapters the message says which file holds the NaN, also in a saved tensor."""
    adapters = [
        lora(tmp_path / "good", seed=1),
        holding(tmp_path / "bad", np.full((3, 10), np.nan)),
    ]
    fails(ValueRangeError, adapters, out, str(tmp_path / "bad"))


@pytest.mark.parametrize("weight", [1e200, -1e308])
def test_absurd_weights_are_an_error_in_words(two: list[Path], out: Path, weight: float) -> None:
    """A weight whose product leaves the range of numbers is named as that: no traceback, and no
    word of weights that cancel."""
    error = fails(UsageError, two, out, "weight", weights=[weight, 1.0], dtype="float32")
    assert "cancel" not in error.message


@pytest.mark.parametrize("dry_run", [False, True])
def test_overflow_of_the_dtype_is_refused(two: list[Path], out: Path, dry_run: bool) -> None:
    """Factors too large for float16 are refused with module and size, in a dry run too; float32
    holds them."""
    options: dict[str, Any] = {"weights": [1e12, 1.0], "dry_run": dry_run}
    error = fails(ValueRangeError, two, out, Q, "too large", dtype="float16", **options)
    assert "float32" in error.hint
    loratool.combine(two, out, dtype="float32", **options)


def test_overflow_of_a_bias_is_refused(tmp_path: Path, out: Path) -> None:
    """A summed lora_bias too large for float16 is refused, not written as infinity."""
    extra = {f"{ROOT}{Q}.lora_B.bias": np.full(12, 5e4, np.float32)}
    source = lora(tmp_path / "one", extra=extra, lora_bias=True)
    fails(ValueRangeError, [source], out, Q, dtype="float16")


def test_overflow_of_a_mean_is_refused(tmp_path: Path, out: Path) -> None:
    """A weighted mean of saved tensors that its dtype cannot hold is refused by name."""
    heads = [np.full((3, 10), x, np.float16) for x in (6e4, -6e4)]
    sources = [holding(tmp_path / str(n), h, seed=n) for n, h in enumerate(heads)]
    fails(ValueRangeError, sources, out, "score.weight", saved="mean", weights=[1, -0.9])


def test_different_shapes_are_different_bases(tmp_path: Path, out: Path) -> None:
    """Modules of one name and different shapes are a MatchError with both shapes and adapters."""
    one = lora(tmp_path / "small")
    two = write_adapter(tmp_path / "large", pair(Q, 24, 10), {})
    fails(MatchError, [one, two], out, Q, "12×10", "24×10", "small", "large", "different")


def test_different_base_names_are_a_warning(tmp_path: Path, out: Path) -> None:
    """Base names that differ in more than their path and case are named in a warning."""
    names = ["org/Base-A", "/models/base-a", "org/base-b"]
    sources = [
        lora(tmp_path / str(n), seed=n, base_model_name_or_path=name)
        for n, name in enumerate(names)
    ]
    assert codes(loratool.combine(sources[:2], out)) == []
    report = loratool.combine([sources[0], sources[2]], tmp_path / "other")
    assert codes(report) == ["bases-differ"]
    assert all(name in report.warnings[0].message for name in ("org/Base-A", "org/base-b"))
    assert config_of(tmp_path / "other")["base_model_name_or_path"] == "org/Base-A"


@pytest.mark.parametrize("swapped", [False, True])
def test_paths_that_differ_by_a_prefix_are_refused(
    tmp_path: Path, out: Path, swapped: bool
) -> None:
    """`layers.0.q` and `model.layers.0.q` are one module under two names: nothing is guessed."""
    sources = [lora(tmp_path / "short", "layers.0.q"), lora(tmp_path / "long", "model.layers.0.q")]
    fails(
        MatchError, sources[::-1] if swapped else sources, out, "'layers.0.q'",
        "'model.layers.0.q'", str(sources[0]), str(sources[1]),
    )  # fmt: skip


def test_adapters_of_other_modules_are_joined_with_a_warning(tmp_path: Path, out: Path) -> None:
    """Adapters without a common module are combined, and that is said."""
    sources = [lora(tmp_path / "q", Q, seed=1), lora(tmp_path / "k", K, seed=2)]
    report = loratool.combine(sources, out)
    assert codes(report) == ["nothing-shared"]
    assert [m.ranks for m in report.modules] == [(4, None), (None, 4)]
    assert_near(deltas(out), total(sources, [1, 1]), 1e3)


def test_one_adapter_twice_is_a_warning(two: list[Path], tmp_path: Path, out: Path) -> None:
    """The same adapter under two names counts twice, and a warning names both places."""
    copy = shutil.copytree(two[0], tmp_path / "copy")
    report = loratool.combine([two[0], two[1], copy], out)
    assert codes(report) == ["same-adapter"]
    assert str(copy) in report.warnings[0].message
    assert str(two[0]) in report.warnings[0].message
    assert_near(deltas(out), total(two, [2, 1]), 100)


def test_a_zero_weight_leaves_an_adapter_out(tmp_path: Path, two: list[Path], out: Path) -> None:
    """Weight 0 leaves out modules, saved tensors and the name of the base, with a warning."""
    other = holding(tmp_path / "other", np.ones((3, 10)), 3, base_model_name_or_path="x/other")
    write_adapter(other, load_file(other / WEIGHTS) | pair(K, 12, 10), None)
    report = loratool.combine([*two, other], out, weights=[1, 2, 0])
    assert codes(report) == ["zero-weight"]
    assert str(other) in report.warnings[0].message
    assert report.saved == []
    assert_near(deltas(out), total(two, [1, 2]), 100)
    config = config_of(out)
    assert (config["base_model_name_or_path"], config["modules_to_save"]) == (None, None)


def test_an_adapter_that_does_nothing_changes_nothing(tmp_path: Path, out: Path) -> None:
    """An adapter with B = 0 adds nothing; a module that only it has is zero, which is said."""
    source = lora(tmp_path / "one", Q, seed=1)
    zero = lora(tmp_path / "zero", Q, K, seed=2)
    tensors = {n: t * ("lora_A" in n) for n, t in load_file(zero / WEIGHTS).items()}
    write_adapter(zero, tensors, None)
    report = loratool.combine([source, zero], out)
    assert codes(report) == ["zero-delta", "zero-adapter"]
    assert K in report.warnings[0].message
    assert [m.kept for m in report.modules] == [1.0, None]
    assert_near(deltas(out), {Q: deltas(source)[Q], K: np.zeros((12, 10))}, 10)


@pytest.mark.parametrize("method", ["sum", "linear", "iso_c", "tsv_m", "ties_svd"])
def test_adapters_that_are_all_zero_are_refused(tmp_path: Path, out: Path, method: str) -> None:
    """A result without any delta is refused, without blaming weights where nothing cancels."""
    sources = [lora(tmp_path / str(n), seed=n) for n in range(2)]
    for source in sources:
        tensors = {n: t * ("lora_A" in n) for n, t in load_file(source / WEIGHTS).items()}
        write_adapter(source, tensors, None)
    density = 0.5 if METHODS[method].prunes else None
    error = fails(ValueRangeError, sources, out, "does nothing", method=method, density=density)
    assert "cancel" not in error.message


@pytest.mark.parametrize("method", ["ties", "dare_linear", "magnitude_prune_svd", "ties_core"])
def test_a_density_that_keeps_nothing_is_named(two: list[Path], out: Path, method: str) -> None:
    """Where pruning leaves no value at all, the density is blamed, not the weights."""
    error = fails(ValueRangeError, two, out, "does nothing", method=method, density=1e-6)
    assert "cancel" not in error.message
    assert "density" in error.message + error.hint


@pytest.mark.parametrize("method", ["sum", "svd", "cat", "iso_c"])
def test_weights_that_cancel_are_refused(tmp_path: Path, out: Path, method: str) -> None:
    """Copies with opposite weights leave only rounding noise: that is zero, and it is said why."""
    one, two = (lora(tmp_path / name, seed=1) for name in ("one", "two"))
    fails(ValueRangeError, [one, two], out, "cancel", method=method, weights=[0.3, -0.3])


def test_dora_is_refused(tmp_path: Path, out: Path) -> None:
    """DoRA has no sum of deltas: the error says why and names merge."""
    extra = {f"{ROOT}{Q}.lora_magnitude_vector": np.ones(12, np.float32)}
    source = lora(tmp_path / "dora", extra=extra, use_dora=True)
    error = fails(AdapterError, [source, lora(tmp_path / "one")], out, "DoRA", str(source))
    assert "loratool merge" in error.hint


def test_bare_parameters_are_refused(tmp_path: Path, out: Path) -> None:
    """target_parameters of mixture-of-experts stacks are refused by name."""
    source = lora(tmp_path / "moe", target_parameters=["experts.down_proj"])
    fails(AdapterError, [source], out, "target_parameters", str(source))


def test_weights_without_their_config_are_refused(tmp_path: Path, out: Path) -> None:
    """Without adapter_config.json the scale is unknown, so nothing is combined."""
    source = write_adapter(tmp_path / "bare", pair(Q, 12, 10), None)
    fails(AdapterError, [source], out, "no adapter_config.json", str(source))


def test_what_is_no_lora_is_refused(tmp_path: Path, out: Path) -> None:
    """A base model, and an adapter that only holds whole tensors, are called by their names."""
    assert "base model" in fails(FileError, [FIXTURES / "base"], out).message
    head = {HEAD: np.ones((3, 10), np.float32)}
    source = write_adapter(tmp_path / "head", head, {"modules_to_save": ["score"]})
    fails(AdapterError, [source], out, str(source))


@pytest.mark.parametrize("length", [0, 5, 200, -1])
def test_truncated_files_are_named(two: list[Path], out: Path, length: int) -> None:
    """A weights file cut anywhere is a FileError with its path."""
    file = two[1] / WEIGHTS
    file.write_bytes(file.read_bytes()[:length])
    fails(FileError, two, out, str(file))


def test_a_damaged_config_is_named(two: list[Path], out: Path) -> None:
    """An adapter_config.json that is no JSON is a FileError with its path."""
    (two[1] / "adapter_config.json").write_text("{")
    fails(FileError, two, out, str(two[1] / "adapter_config.json"))


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json", "tokenizer.json"])
def test_files_that_may_not_be_read_are_named(two: list[Path], out: Path, name: str) -> None:
    """An input without read permission is a FileError that names it, and there is no output."""
    (two[1] / "tokenizer.json").write_text("{}")
    (two[1] / name).chmod(0)
    with permissions_that_count():
        fails(FileError, two, out, str(two[1] / name))


# --- tensors held whole --------------------------------------------------------------------------


def test_clashing_heads_are_refused(tmp_path: Path, out: Path) -> None:
    """Different heads have no sum: the error names them and the three choices."""
    sources = [holding(tmp_path / str(n), np.full((3, 10), n + 1.0), n) for n in range(2)]
    error = fails(MatchError, sources, out, "score.weight", "different values")
    assert all(f"--saved {choice}" in error.hint for choice in ("first", "last", "mean"))


@pytest.mark.parametrize(
    ("saved", "heads", "value"),
    [
        ("first", [1, 2], 1.0),
        ("last", [1, 2], 2.0),
        ("mean", [1, 2], 1.75),
        ("refuse", [5, 5], 5.0),
        ("first", [2, 1, 2], 2.0),
        ("last", [1, 2, 1], 1.0),
        ("mean", [1, 2, 1], 1.375),
    ],
)
def test_heads_are_taken_as_asked(
    tmp_path: Path, out: Path, saved: str, heads: list[int], value: float
) -> None:
    """first, last and the mean by weight, over all adapters, copies of one head included; copies
    alone do not clash."""
    sources = [holding(tmp_path / str(n), np.full((3, 10), float(h)), n)
               for n, h in enumerate(heads)]  # fmt: skip
    weights = [1.0, 3.0, 4.0][: len(heads)]
    report = loratool.combine(sources, out, saved=saved, weights=weights)
    assert report.saved == ["score.weight"]
    np.testing.assert_allclose(load_file(out / WEIGHTS)[HEAD], np.full((3, 10), value), rtol=1e-6)
    assert config_of(out)["modules_to_save"] == ["score"]


def test_a_head_of_one_adapter_is_kept_bit_for_bit(tmp_path: Path, out: Path) -> None:
    """A tensor that one adapter alone holds keeps its dtype and bits, whatever weight and dtype."""
    head = np.random.default_rng(0).standard_normal((3, 10)).astype(np.float64)
    sources = [holding(tmp_path / "one", head), lora(tmp_path / "two", seed=2)]
    loratool.combine(sources, out, weights=[0.25, 1], dtype="float16")
    kept = load_file(out / WEIGHTS)[HEAD]
    assert kept.dtype == np.float64
    assert kept.tobytes() == head.tobytes()


def test_whole_numbers_held_by_several_are_compared(tmp_path: Path, out: Path) -> None:
    """Integers in saved modules (a count of batches) are kept where equal and clash otherwise."""
    key = f"{ROOT}score.norm.num_batches_tracked"
    sources = [
        lora(tmp_path / str(n), seed=n, extra={key: np.array([count])}, modules_to_save=["score"])
        for n, count in enumerate((5, 5, 6))
    ]
    loratool.combine(sources[:2], out)
    kept = load_file(out / WEIGHTS)[key]
    assert (kept.dtype, kept.tolist()) == (np.int64, [5])
    fails(MatchError, sources, tmp_path / "clash", "num_batches_tracked")


def test_heads_of_other_shapes_have_no_mean(tmp_path: Path, out: Path) -> None:
    """--saved mean refuses heads of different shapes; first and last take them."""
    sources = [holding(tmp_path / str(n), np.ones((n, 10)), n) for n in (3, 4)]
    error = fails(MatchError, sources, out, "shapes", saved="mean")
    assert "--saved mean" not in error.hint
    loratool.combine(sources, out, saved="last")
    assert load_file(out / WEIGHTS)[HEAD].shape == (4, 10)


def test_weights_that_add_up_to_nothing_have_no_mean(tmp_path: Path, out: Path) -> None:
    """A mean with weights 1 and -1 does not exist, and is refused by the tensor's name."""
    sources = [holding(tmp_path / str(n), np.full((3, 10), n + 1.0), n) for n in range(2)]
    fails(MatchError, sources, out, "score.weight", "add up to 0", saved="mean", weights=[1, -1])


EMBEDDING = "model.embed_tokens"


def rows(folder: Path, values: list[float], tokens: list[int], seed: int = 0) -> Path:
    """An adapter with trained token rows."""
    key = f"{ROOT}{EMBEDDING}.token_adapter.trainable_tokens_delta"
    extra = {key: np.repeat(np.asarray(values, np.float32)[:, None], 10, 1)}
    return lora(folder, seed=seed, extra=extra, trainable_token_indices={"embed_tokens": tokens})


def test_token_rows_are_kept(tmp_path: Path, out: Path) -> None:
    """Token rows of one adapter, or equal ones of several, come along with their indices."""
    sources = [rows(tmp_path / "a", [1, 2], [7, 3]), lora(tmp_path / "b", seed=1),
               rows(tmp_path / "c", [1, 2], [7, 3], seed=2)]  # fmt: skip
    report = loratool.combine(sources, out)
    assert report.saved == [EMBEDDING]
    again = loratool.inspect(out)
    assert again.warnings == []
    assert list(config_of(out)["trainable_token_indices"].values()) == [[7, 3]]
    held = [t for n, t in load_file(out / WEIGHTS).items() if "trainable_tokens" in n]
    assert [t[:, 0].tolist() for t in held] == [[1, 2]]


@pytest.mark.parametrize(
    ("values", "tokens"), [([1.0, 9.0], [7, 3]), ([1.0, 2.0], [3, 7])], ids=["values", "tokens"]
)
def test_clashing_token_rows(
    tmp_path: Path, out: Path, values: list[float], tokens: list[int]
) -> None:
    """Different token rows are refused, by mean too; first and last take one with its indices."""
    sources = [rows(tmp_path / "a", [1, 2], [7, 3]), rows(tmp_path / "b", values, tokens, 1)]
    for saved in ("refuse", "mean"):
        fails(MatchError, sources, out, EMBEDDING, "token rows", saved=saved)
    for saved, wanted in (("first", [7, 3]), ("last", tokens)):
        loratool.combine(sources, tmp_path / saved, saved=saved)
        indices = config_of(tmp_path / saved)["trainable_token_indices"]
        assert list(indices.values()) == [wanted]


def test_biases_are_summed_with_weight_and_scale(tmp_path: Path, out: Path) -> None:
    """lora_bias is part of the delta: it is added up with weight and scale, zero where absent."""
    extra = {f"{ROOT}{Q}.lora_B.bias": np.arange(12, dtype=np.float32)}
    sources = [lora(tmp_path / "one", extra=extra, lora_bias=True), lora(tmp_path / "two", Q, K)]
    loratool.combine(sources, out, weights=[-0.5, 3])
    tensors = load_file(out / WEIGHTS)
    np.testing.assert_allclose(tensors[f"{ROOT}{Q}.lora_B.bias"], -0.5 * 2 * np.arange(12))
    assert not tensors[f"{ROOT}{K}.lora_B.bias"].any()
    assert config_of(out)["lora_bias"] is True
    assert loratool.inspect(out).warnings == []


def test_a_bias_beside_an_embedding_is_refused(tmp_path: Path, out: Path) -> None:
    """PEFT has no adapter with lora_bias and an embedding, so none is made of two."""
    extra = {f"{ROOT}{Q}.lora_B.bias": np.ones(12, np.float32)}
    biased = lora(tmp_path / "biased", extra=extra, lora_bias=True)
    rng = np.random.default_rng(0)
    table = {f"{ROOT}{EMBEDDING}.lora_embedding_{half}": rng.standard_normal(shape)
             for half, shape in (("A", (4, 50)), ("B", (10, 4)))}  # fmt: skip
    embedded = write_adapter(tmp_path / "embedded", table | pair(Q, 12, 10), {})
    error = fails(MatchError, [biased, embedded], out, "lora_bias", "embedding")
    assert "loratool merge" in error.hint


# --- the place of the output ---------------------------------------------------------------------


def test_an_existing_output_stays(two: list[Path], out: Path) -> None:
    """An output that exists is refused and stays; --overwrite replaces it with all its files."""
    loratool.combine(two, out)
    (out / "README.md").write_text("old")
    before = sha256s(out)
    with pytest.raises(OutputError) as caught:
        loratool.combine(two, out, weights=[1, 2])
    assert "--overwrite" in caught.value.hint
    assert sha256s(out) == before
    loratool.combine(two, out, weights=[1, 2], overwrite=True)
    assert set(sha256s(out)) == {WEIGHTS, "adapter_config.json", "loratool.json"}
    assert sha256s(out)[WEIGHTS] != before[WEIGHTS]
    assert beside(out) == []


@pytest.mark.parametrize("place", ["in/one", "in/one/out", "in", f"in/two/{WEIGHTS}"])
@pytest.mark.parametrize("as_file", [False, True], ids=["directories", "files"])
def test_inputs_are_never_written_to(
    tmp_path: Path, two: list[Path], place: str, as_file: bool
) -> None:
    """An output that is, contains or is in an input is refused even with --overwrite."""
    if as_file and place == "in/one/out":
        return  # beside an input that is a file
    before = sha256s(tmp_path)
    sources = [folder / WEIGHTS for folder in two] if as_file else two
    with pytest.raises(OutputError) as caught:
        loratool.combine(sources, tmp_path / place, overwrite=True)
    assert_clear(caught.value, str(tmp_path / place))
    assert sha256s(tmp_path) == before


def test_what_is_no_adapter_is_not_overwritten(two: list[Path], out: Path) -> None:
    """--overwrite does not delete a directory of other things."""
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError):
        loratool.combine(two, out, overwrite=True)
    assert (out / "thesis.tex").read_text() == "mine"


def test_a_failed_overwrite_keeps_the_old_output(two: list[Path], out: Path) -> None:
    """The old adapter goes when the new one is whole, not before."""
    loratool.combine(two, out)
    before = sha256s(out)
    with pytest.raises(ValueRangeError):
        loratool.combine(two, out, weights=[1e12, 1], dtype="float16", overwrite=True)
    assert sha256s(out) == before
    assert beside(out) == []


# --- laws ----------------------------------------------------------------------------------------

numbers = st.floats(-4, 4).filter(lambda w: abs(w) > 0.01)


@st.composite
def several(draw: st.DrawFn, least: int = 2) -> tuple[list[dict[str, Any]], list[float]]:
    """Settings of a few small adapters of any rank, scale and modules; and weights."""
    count = draw(st.integers(least, 3))
    found = [
        {
            "rank": draw(st.integers(1, 12)),
            "lora_alpha": draw(st.integers(1, 32)),
            "use_rslora": draw(st.booleans()),
            "seed": draw(st.integers(0, 1000)) + 1001 * n,
            "paths": draw(st.sampled_from([(Q,), (Q, K), (K,)])),
        }
        for n in range(count)
    ]
    return found, [draw(numbers) for _ in range(count)]


def made(folder: Path, kinds: list[dict[str, Any]]) -> list[Path]:
    """The adapters of these settings."""
    return [
        lora(folder / str(n), *kind["paths"], **{k: v for k, v in kind.items() if k != "paths"})
        for n, kind in enumerate(kinds)
    ]


def size_of(folders: list[Path], weights: list[float]) -> float:
    """What rounding is measured by: the norms of all that is added up."""
    return sum(
        abs(w) * float(np.linalg.norm(d))
        for f, w in zip(folders, weights, strict=True)
        for d in deltas(f).values()
    )


@QUICK
@given(several(1), st.sampled_from(["sum", "cat"]))
def test_the_sum_is_the_sum(given_: tuple[list[dict[str, Any]], list[float]], method: str) -> None:
    """sum and cat equal the dense Σ weight·scale·B·A, for all ranks, scales and weights."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources, weights = made(folder, given_[0]), given_[1]
        report = loratool.combine(
            sources, folder / "out", weights=weights, method=method, dtype="float32", threads=1
        )
        result, size = deltas(folder / "out"), size_of(sources, weights)
        expected = total(sources, weights)
        assert_near(result, expected, size)
        assert report.error < 1e-6
        for module in report.modules:
            assert module.norm == pytest.approx(
                np.linalg.norm(expected[module.path]), abs=1e-6 * size
            )
        if method == "sum":
            wanted = max(
                np.linalg.matrix_rank(d, 1e-4 * np.linalg.norm(d)) for d in expected.values()
            )
            assert report.rank >= wanted
            assert report.rank <= 10


@QUICK
@given(several(2), numbers)
def test_the_sum_commutes_and_is_linear(
    given_: tuple[list[dict[str, Any]], list[float]], factor: float
) -> None:
    """The order does not matter, and a factor on all weights is a factor on the result."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources, weights = made(folder, given_[0]), given_[1]
        size = size_of(sources, weights)
        options: dict[str, Any] = {"dtype": "float32", "threads": 1}
        loratool.combine(sources, folder / "a", weights=weights, **options)
        loratool.combine(sources[::-1], folder / "b", weights=weights[::-1], **options)
        loratool.combine(sources, folder / "c", weights=[factor * w for w in weights], **options)
        first = deltas(folder / "a")
        assert_near(first, deltas(folder / "b"), size)
        scaled = {path: factor * delta for path, delta in first.items()}
        assert_near(scaled, deltas(folder / "c"), size * max(1, abs(factor)))


@QUICK
@given(several(1))
def test_one_adapter_with_weight_one_computes_the_same(
    given_: tuple[list[dict[str, Any]], list[float]],
) -> None:
    """Combining one adapter, or it and others with weight 0, gives its own delta."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = made(folder, given_[0])
        alone = loratool.combine(sources[0], folder / "a", dtype="float32", threads=1)
        weights = [1.0] + [0.0] * (len(sources) - 1)
        loratool.combine(sources, folder / "b", weights=weights, dtype="float32", threads=1)
        own = deltas(sources[0])
        assert_near(deltas(folder / "a"), own, size_of(sources[:1], [1]))
        assert sha256s(folder / "a")[WEIGHTS] == sha256s(folder / "b")[WEIGHTS]
        assert alone.rank <= given_[0][0]["rank"]


@QUICK
@given(several(2), st.integers(1, 12))
def test_a_cut_is_the_best_of_its_rank(
    given_: tuple[list[dict[str, Any]], list[float]], rank: int
) -> None:
    """--rank keeps the largest singular values of the sum, and reports what they hold."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources, weights = made(folder, given_[0]), given_[1]
        options: dict[str, Any] = {"weights": weights, "dtype": "float32", "threads": 1}
        report = loratool.combine(sources, folder / "out", rank=rank, **options)
        assert report.rank <= rank
        assert ("rank-not-reached" in codes(report)) == (report.rank < rank)
        result, size = deltas(folder / "out"), size_of(sources, weights)
        for module in report.modules:
            u, s, v = np.linalg.svd(total(sources, weights)[module.path])
            best = (u[:, :rank] * s[:rank]) @ v[:rank] if rank < 10 else None
            kept = np.sum(s[:rank] ** 2) / np.sum(s**2)
            assert module.kept == pytest.approx(kept, abs=1e-5)
            assert module.error**2 == pytest.approx(1 - kept, abs=1e-5)
            off = np.linalg.norm(result[module.path] - total(sources, weights)[module.path])
            assert off == pytest.approx(math.sqrt(np.sum(s[rank:] ** 2)), abs=1e-5 * size)
            assert best is None or np.linalg.matrix_rank(best) <= rank


@QUICK
@given(several(2), st.floats(0.05, 1.0), st.booleans())
def test_the_energy_asked_for_is_kept_in_every_module(
    given_: tuple[list[dict[str, Any]], list[float]], energy: float, patterns: bool
) -> None:
    """--energy holds in every module, and with --keep-patterns no rank is larger than needed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources, weights = made(folder, given_[0]), given_[1]
        report = loratool.combine(
            sources, folder / "out", weights=weights, energy=energy, keep_patterns=patterns,
            dtype="float32", threads=1,
        )  # fmt: skip
        for module in report.modules:
            assert module.kept is not None
            assert module.kept >= energy * (1 - 1e-9)
            s = np.linalg.svd(total(sources, weights)[module.path], compute_uv=False) ** 2
            if patterns and module.rank > 1:
                assert s[: module.rank - 1].sum() < energy * s.sum() * (1 + 1e-6)
        assert report.rank == max(m.rank for m in report.modules)


def test_a_rank_for_all_is_used_by_all(tmp_path: Path, out: Path) -> None:
    """With --energy every module keeps what fits into the rank of the one that needs the most."""
    q = [np.linalg.qr(np.random.default_rng(n).standard_normal((10, 3)))[0] for n in range(4)]
    tensors: Tensors = {}
    for number, (path, values) in enumerate(((Q, [3, 3, 3]), (K, [5, 1, 0.5]))):
        tensors[f"{ROOT}{path}.lora_A.weight"] = (q[2 * number] * values).T.astype(np.float32)
        tensors[f"{ROOT}{path}.lora_B.weight"] = q[2 * number + 1].astype(np.float32)
    source = write_adapter(tmp_path / "one", tensors, {"r": 3, "lora_alpha": 3})
    report = loratool.combine(source, out, energy=0.9)
    assert [(m.rank, m.kept) for m in report.modules] == [(3, pytest.approx(1))] * 2
    assert_near(deltas(out), deltas(source), 5)


@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_survives_every_method(tmp_path: Path, out: Path, method: str) -> None:
    """At density 1 and weight 1 every method but iso_c gives a single adapter's own delta back."""
    source = lora(tmp_path / "one", Q, K, lora_alpha=3)
    density = 1.0 if METHODS[method].prunes else None
    report = loratool.combine(source, out, method=method, density=density)
    if method != "iso_c":
        assert_near(deltas(out), deltas(source), 100)
    for delta in deltas(out).values():
        values = np.linalg.svd(delta, compute_uv=False)
        if method == "iso_c":
            np.testing.assert_allclose(values[:4], values[0], rtol=1e-5)
        assert values[4] < 1e-5 * values[0]
    assert report.rank == 4


@pytest.mark.parametrize("method", [n for n, m in METHODS.items() if not m.exact_sum])
def test_the_distance_from_the_sum_is_reported(two: list[Path], out: Path, method: str) -> None:
    """from_sum is ‖result − Σ‖/‖Σ‖ of the dense matrices, for every method that is no sum."""
    density = 0.6 if METHODS[method].prunes else None
    report = loratool.combine(two, out, method=method, density=density)
    wanted = total(two, [1, 1])[Q]
    far = np.linalg.norm(deltas(out)[Q] - wanted) / np.linalg.norm(wanted)
    assert report.modules[0].from_sum == pytest.approx(far, rel=1e-4)


# --- what is written -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path]:
    """Two adapters of different ranks, scales and modules, and what was made of them."""
    folder = tmp_path_factory.mktemp("mixed")
    sources = [
        lora(folder / "a", Q, K, rank=2, seed=1, target_modules=["q_proj", "k_proj"]),
        lora(folder / "b", Q, rank=5, seed=2, lora_alpha=5, use_rslora=True,
             target_modules=["q_proj"]),
    ]  # fmt: skip
    loratool.combine(sources, folder / "out")
    return sources, folder / "out"


def test_the_config_is_plain(mixed: tuple[list[Path], Path]) -> None:
    """alpha is r, no rsLoRA, no patterns, no dropout, leaf names as targets: all can read it."""
    config = config_of(mixed[1])
    assert (config["r"], config["lora_alpha"]) == (7, 7)
    assert config["target_modules"] == ["k_proj", "q_proj"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert not config["use_rslora"]
    assert not config["use_dora"]
    assert config["bias"] == "none"
    assert config["peft_type"] == "LORA"


def test_ranks_are_uniform_and_filled_with_zeros(mixed: tuple[list[Path], Path]) -> None:
    """Every module has the largest rank; what a module lacks is exactly zero, in A and in B."""
    tensors = load_file(mixed[1] / WEIGHTS)
    assert tensors[f"{ROOT}{K}.lora_A.weight"].shape == (7, 10)
    assert tensors[f"{ROOT}{K}.lora_B.weight"].shape == (12, 7)
    assert not tensors[f"{ROOT}{K}.lora_A.weight"][2:].any()
    assert not tensors[f"{ROOT}{K}.lora_B.weight"][:, 2:].any()
    assert tensors[f"{ROOT}{K}.lora_A.weight"][:2].any(1).all()
    assert tensors[f"{ROOT}{Q}.lora_A.weight"].any(1).all()
    assert_near(deltas(mixed[1]), total(mixed[0], [1, 1]), 100)


def test_peft_loads_the_result(mixed: tuple[list[Path], Path]) -> None:
    """PEFT's own model computes the sum of the deltas with the adapter that was written."""
    import torch
    from peft import PeftModel

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = torch.nn.Linear(10, 12, bias=False)
            self.k_proj = torch.nn.Linear(10, 12, bias=False)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = Attention()

    class Inner(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([Layer()])

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Inner()

    model = Outer()
    before = {n: p.detach().clone().double() for n, p in model.named_parameters()}
    merged = PeftModel.from_pretrained(model, str(mixed[1])).merge_and_unload()
    wanted = total(mixed[0], [1, 1])
    for name, weight in merged.named_parameters():
        change = weight.detach().double() - before[name]
        assert np.linalg.norm(change.numpy() - wanted[name.removesuffix(".weight")]) < 1e-3


def test_patterns_are_kept_when_asked(mixed: tuple[list[Path], Path], tmp_path: Path) -> None:
    """--keep-patterns writes each module with its own rank, and an alpha equal to it."""
    loratool.combine(mixed[0], tmp_path / "out", keep_patterns=True)
    config = config_of(tmp_path / "out")
    assert config["r"] == 7
    assert config["rank_pattern"] == config["alpha_pattern"] == {K: 2}
    assert load_file(tmp_path / "out" / WEIGHTS)[f"{ROOT}{K}.lora_A.weight"].shape == (2, 10)
    report = loratool.compare([tmp_path / "out", mixed[1]], tolerance=1e-5)
    assert report.equal, report.differing


@pytest.mark.parametrize("ranks", [(2, 3, 4), (4, 3, 2), (3, 4, 2), (2, 4, 3), (4, 2, 3)])
def test_patterns_of_paths_that_end_alike(
    tmp_path: Path, out: Path, ranks: tuple[int, int, int]
) -> None:
    """Where one path is the end of another, each still has its own rank, and can be read."""
    paths = ("q", "inner.q", "model.inner.q")
    sources = [
        write_adapter(tmp_path / str(n), pair(path, 12, 10, rank, n), {"r": rank})
        for n, (path, rank) in enumerate(zip(paths, ranks, strict=True))
    ]
    # In one adapter, so that they are no prefixes of each other's names.
    tensors: Tensors = {}
    for source in sources:
        tensors |= load_file(source / WEIGHTS)
    config = {"r": 1, "lora_alpha": 1, "rank_pattern": {}}
    longest_first = sorted(zip(paths, ranks, strict=True), key=lambda item: -len(item[0]))
    config["rank_pattern"] = dict(longest_first)
    source = write_adapter(tmp_path / "all", tensors, config)
    loratool.combine(source, out, keep_patterns=True)
    again = loratool.inspect(out)
    assert {m.path: m.rank for m in again.modules} == dict(zip(paths, ranks, strict=True))
    assert [w.message for w in again.warnings if w.refused] == []


@pytest.mark.parametrize(
    "how",
    [
        {"target_modules": r".*\.(q|k)_proj"},
        {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.1"]},
        {},
    ],
    ids=["regex", "layers", "excluded", "none"],
)
def test_targets_are_full_paths_where_names_would_not_do(
    tmp_path: Path, out: Path, how: dict[str, Any]
) -> None:
    """A source made by a regex or for some layers makes full paths of the targets, which select
    the same modules in any model."""
    plain = lora(tmp_path / "plain", Q, target_modules=["q_proj"], seed=1)
    narrow = lora(tmp_path / "narrow", Q, K, seed=2, **how)
    loratool.combine([plain, narrow], out)
    config = config_of(out)
    assert config["target_modules"] == sorted([Q, K])
    assert not config.get("layers_to_transform")
    assert not config.get("exclude_modules")


def test_targets_name_nothing_that_is_absent(tmp_path: Path, out: Path) -> None:
    """A target that no module answers to is not carried over."""
    source = lora(tmp_path / "one", Q, target_modules=["q_proj", "v_proj"])
    report = loratool.combine(source, out)
    assert codes(report) == ["target-absent"]
    assert config_of(out)["target_modules"] == ["q_proj"]
    assert loratool.inspect(out).warnings == []


def test_dtypes(tmp_path: Path, out: Path) -> None:
    """Inputs of one dtype keep it, mixed ones give float32, and --dtype decides."""
    full = lora(tmp_path / "full", seed=1)
    half = lora(tmp_path / "half", seed=2)
    tensors = {n: t.astype(np.float16) for n, t in load_file(half / WEIGHTS).items()}
    write_adapter(half, tensors, None)
    assert loratool.combine([half, half], tmp_path / "a").dtype == "float16"
    assert loratool.combine([half, full], tmp_path / "b").dtype == "float32"
    assert loratool.combine([half, full], tmp_path / "c", dtype="bfloat16").dtype == "bfloat16"
    found = [loratool.inspect(tmp_path / name).modules[0].dtype for name in "abc"]
    assert found == ["F16", "F32", "BF16"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("weight", [1.0, 1e-6])
def test_what_rounding_costs_is_reported(
    two: list[Path], out: Path, dtype: str, weight: float
) -> None:
    """`rounding` is about what half precision takes of the delta, also of one that is tiny."""
    import torch
    from safetensors.torch import load_file as load_torch

    report = loratool.combine(two, out, weights=[weight, weight], dtype=dtype)
    wanted = total(two, [weight, weight])[Q]
    b, a = (load_torch(out / WEIGHTS)[f"{ROOT}{Q}.lora_{half}.weight"] for half in "BA")
    off = (b.to(torch.float64) @ a.to(torch.float64)).numpy() - wanted
    if dtype == "float32":
        assert report.rounding is None
    else:
        found = np.linalg.norm(off) / np.linalg.norm(wanted)
        assert report.rounding is not None
        assert 0.5 * found <= report.rounding <= 2 * found


def test_tokenizers(two: list[Path], tmp_path: Path, out: Path) -> None:
    """One tokenizer, or equal ones, come along; different ones are a warning, and none is there."""
    (two[0] / "tokenizer.json").write_text('{"a": 1}')
    (two[0] / "README.md").write_text("not of the result")
    loratool.combine(two, out)
    assert (out / "tokenizer.json").read_text() == '{"a": 1}'
    assert not (out / "README.md").exists()
    (two[1] / "tokenizer.json").write_text('{"a": 1}')
    assert codes(loratool.combine(two, tmp_path / "equal")) == []
    assert (tmp_path / "equal" / "tokenizer.json").is_file()
    (two[1] / "tokenizer.json").write_text('{"a": 2}')
    assert codes(loratool.combine(two, tmp_path / "other")) == ["tokenizers-differ"]
    assert not (tmp_path / "other" / "tokenizer.json").exists()
    assert codes(loratool.combine(two, tmp_path / "left", weights=[1, 0])) == ["zero-weight"]
    assert (tmp_path / "left" / "tokenizer.json").read_text() == '{"a": 1}'


def test_provenance(mixed: tuple[list[Path], Path]) -> None:
    """loratool.json has the options and the hashes of all inputs and outputs as on the disk."""
    document = json.loads((mixed[1] / "loratool.json").read_text())
    assert document["schema_version"] == 1
    assert document["command"] == "combine"
    assert document["options"]["method"] == "sum"
    assert [a["files"] for a in document["adapters"]] == [sha256s(s) for s in mixed[0]]
    hashes = sha256s(mixed[1])
    del hashes["loratool.json"]
    assert document["files"] == hashes
    assert document["result"]["rank"] == 7


@pytest.mark.parametrize("case", ["plain", "zero-weight", "same-adapter", "nothing-shared"])
def test_provenance_has_no_path_and_no_date(tmp_path: Path, case: str) -> None:
    """Equal inputs in other places, at other times, give equal files, also where there are
    warnings."""
    runs = []
    for place in ("here", "elsewhere"):
        folder = tmp_path / place
        sources = [
            lora(folder / "one", seed=1),
            lora(folder / "two", K if case == "nothing-shared" else Q, seed=1 + (case == "plain")),
        ]
        weights = [1, 0] if case == "zero-weight" else None
        loratool.combine(sources, folder / "out", weights=weights)
        runs.append(sha256s(folder / "out"))
        text = (folder / "out" / "loratool.json").read_text()
        assert [a["weight"] for a in json.loads(text)["adapters"]] == (weights or [1, 1])
        assert str(tmp_path) not in text
        assert time.strftime("%Y-") not in text
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    "options",
    [{}, {"rank": 2}, {"energy": 0.5, "keep_patterns": True}, {"dtype": "float16"},
     {"saved": "mean"}, {"method": "ties", "density": 0.5}],
    ids=str,
)  # fmt: skip
def test_a_dry_run_predicts_and_writes_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    """A dry run reports the very bytes, ranks and losses of the run, and touches no disk."""
    sources = [
        holding(tmp_path / "a", np.ones((3, 10)), 1),
        holding(tmp_path / "b", np.ones((3, 10)), 2),
    ]
    write_adapter(sources[1], load_file(sources[1] / WEIGHTS) | pair(K, 12, 10), None)
    out = tmp_path / "new" / "out"
    planned = loratool.combine(sources, out, dry_run=True, **options)
    assert not (tmp_path / "new").exists()
    done = loratool.combine(sources, out, **options)
    for one, two in zip(planned.modules, done.modules, strict=True):
        assert (one.path, one.rank, one.kept, one.norm) == (two.path, two.rank, two.kept, two.norm)
    assert (planned.kept, planned.error, planned.rank) == (done.kept, done.error, done.rank)
    assert done.bytes_written == (out / WEIGHTS).stat().st_size
    assert planned.bytes_written == done.bytes_written


def test_random_methods_follow_their_seed(tmp_path: Path) -> None:
    """dare gives the same bytes for a seed with 1 or 2 threads and in another process, and others
    for another seed."""
    paths = [f"model.layers.{n}.q_proj" for n in range(6)]
    sources = [lora(tmp_path / str(n), *paths, seed=n) for n in range(2)]
    options: dict[str, Any] = {"method": "dare_ties_core", "density": 0.5}
    runs = []
    for number, threads in enumerate((1, 2)):
        out = tmp_path / f"run{number}"
        loratool.combine(sources, out, seed=7, threads=threads, **options)
        runs.append(sha256s(out))
    out = tmp_path / "process"
    done = run_cli(
        "combine", *map(str, sources), "-o", str(out), "--method", "dare_ties_core", "--density",
        "0.5", "--seed", "7",
    )  # fmt: skip
    assert done.exit_code == 0
    assert runs[0] == runs[1] == sha256s(out)
    loratool.combine(sources, tmp_path / "seed", seed=8, **options)
    assert sha256s(tmp_path / "seed")[WEIGHTS] != runs[0][WEIGHTS]


@pytest.mark.parametrize("method", METHODS)
def test_threads_do_not_matter(tmp_path: Path, method: str) -> None:
    """Every method gives the same bytes with 1 and with 3 threads."""
    paths = [f"model.layers.{n}.q_proj" for n in range(5)]
    sources = [lora(tmp_path / str(n), *paths, seed=n, rank=3 + n) for n in range(3)]
    density = 0.4 if METHODS[method].prunes else None
    for threads in (1, 3):
        out = tmp_path / f"threads{threads}"
        loratool.combine(sources, out, method=method, density=density, threads=threads)
    assert sha256s(tmp_path / "threads1") == sha256s(tmp_path / "threads3")


def test_random_numbers_differ_between_modules_and_adapters(tmp_path: Path, out: Path) -> None:
    """Copies of one module, in one adapter or in two, are not pruned at the same places."""
    one = pair(Q, 12, 10, 4, 0)
    both = one | {name.replace(Q, K): value for name, value in one.items()}
    source = write_adapter(tmp_path / "one", both, {})
    loratool.combine(source, out, method="dare_linear", density=0.5)
    tensors = load_file(out / WEIGHTS)
    kept = [tensors[f"{ROOT}{path}.lora_A.weight"] != 0 for path in (Q, K)]
    assert (kept[0] != kept[1]).any()
    copy = write_adapter(tmp_path / "two", one, {})
    twice = write_adapter(tmp_path / "three", one, {})
    loratool.combine([copy, twice], tmp_path / "sum", method="dare_linear", density=0.5)
    values = load_file(tmp_path / "sum" / WEIGHTS)[f"{ROOT}{Q}.lora_A.weight"]
    single = one[f"{ROOT}{Q}.lora_A.weight"] * math.sqrt(2)
    multiples = np.unique(np.round(values / single, 3))
    np.testing.assert_allclose(multiples, [0, 2, 4])  # 2 where one of them is pruned


# --- the command line ----------------------------------------------------------------------------


def test_json_is_all_there_is_on_stdout(two: list[Path], out: Path) -> None:
    """--json prints one strict document with schema_version, and what the library reports."""
    done = run_cli("combine", *map(str, two), "-o", str(out), "--rank", "99", "--json")
    assert (done.exit_code, done.stderr) == (0, "")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    document = json.loads(done.stdout, parse_constant=refuse)
    assert document["schema_version"] == 1
    assert document["rank"] == 8
    assert document["adapters"] == [str(p) for p in two]
    assert [w["code"] for w in document["warnings"]] == ["rank-not-reached"]
    assert document["bytes_written"] == (out / WEIGHTS).stat().st_size


def test_warnings_are_on_stderr_and_quiet_is_quiet(two: list[Path], tmp_path: Path) -> None:
    """Warnings go to stderr with their codes; -q silences stderr and keeps the answer."""
    arguments = ["combine", str(two[0]), str(two[0]), "--rank", "9", "--dry-run", "-o"]
    done = run_cli(*arguments, str(tmp_path / "x"))
    assert "[same-adapter]" in done.stderr
    assert "[rank-not-reached]" in done.stderr
    assert "nothing was written" in done.stdout
    quiet = run_cli(*arguments, str(tmp_path / "x"), "-q")
    assert quiet.stderr == ""
    assert "q_proj" in quiet.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("width", [40, 80, 120])
def test_lines_fit_the_terminal(width: int, tmp_path: Path) -> None:
    """No line is wider than the terminal; at 80 columns every row is one line, without ellipses."""
    for method in ("sum", "iso_c"):
        done = subprocess.run(
            [sys.executable, "-m", "loratool", "combine", str(FIXTURES / "adapter"),
             str(FIXTURES / "adapter"), "--weight", "0.7", "--weight", "-0.4", "--rank", "4",
             "--method", method, "-o", "out", "--dry-run"],
            capture_output=True, text=True, env={**os.environ, "COLUMNS": str(width)},
            cwd=tmp_path, check=True,
        )  # fmt: skip
        lines = done.stdout.splitlines()
        assert max(map(len, lines)) <= width
        assert "…" not in done.stdout
        if width >= 80:
            table = lines[next(i for i, x in enumerate(lines) if x.startswith("module ")) :]
            names = [x.split()[0] for x in table if x.startswith("  ") and "_proj" in x]
            assert len(names) == 7
            assert all(len(x.split()) >= 7 for x in table if "_proj" in x)


@pytest.mark.parametrize("option", ["--json", "--full"])
def test_a_closed_pipe_is_no_error(tmp_path: Path, out: Path, option: str) -> None:
    """A reader that leaves early gets no traceback, the output is whole and the code is 0."""
    paths = [f"model.layers.{n}.q_proj" for n in range(200)]
    source = lora(tmp_path / "one", *paths)
    done = subprocess.run(
        ["bash", "-c",
         f"{sys.executable} -m loratool combine {source} -o {out} {option} | true; "
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
adapters, output, where = json.loads(sys.argv[1])
def progress(done, total, path):
    if where == "computing" and done == 2: time.sleep(60)
if where == "flushing": writer.sync = lambda path: time.sleep(60)
loratool.combine(adapters, output, progress=progress, threads=1)
"""


def start(sources: list[Path], output: Path, where: str) -> subprocess.Popen[str]:
    """A run of its own that stops in the middle of computing or of flushing."""
    arguments = json.dumps([[str(s) for s in sources], str(output), where])
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A suite that runs in the background has it ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    wanted = "factors.partial" if where == "computing" else "loratool.json"
    until = time.monotonic() + 30
    while not any(p.stat().st_size for p in output.parent.glob(f".out.loratool-*/{wanted}")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    return process


@pytest.fixture
def layers(tmp_path: Path) -> list[Path]:
    """Two adapters with six modules."""
    paths = [f"model.layers.{n}.q_proj" for n in range(6)]
    return [lora(tmp_path / "in" / str(n), *paths, seed=n) for n in range(2)]


@pytest.mark.parametrize("where", ["computing", "flushing"])
def test_a_killed_run_leaves_what_the_next_one_removes(
    layers: list[Path], out: Path, where: str
) -> None:
    """SIGKILL leaves no output; its hidden leftovers go with the next run for that output."""
    process = start(layers, out, where)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)
    assert not out.exists()
    assert len(beside(out)) == 1
    loratool.combine(layers, out)
    assert beside(out) == []
    assert set(sha256s(out)) == {WEIGHTS, "adapter_config.json", "loratool.json"}


@pytest.mark.parametrize("where", ["computing", "flushing"])
def test_an_interrupted_run_leaves_nothing(layers: list[Path], out: Path, where: str) -> None:
    """Ctrl-C, while it computes or while it flushes, leaves neither output nor leftovers."""
    process = start(layers, out, where)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode != 0
    assert_clean(out)


def test_the_command_says_that_it_was_interrupted(layers: list[Path], out: Path) -> None:
    """Ctrl-C ends the command with code 130, one line and nothing on the disk."""
    slow = (
        "import time, loratool.combining.rank_change as o; "
        "run = o.decompose; "
        "o.decompose = lambda *x: (time.sleep(0.5), run(*x))[1]; "
        "from loratool.cli.main import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, "combine", *map(str, layers), "-o", str(out),
         "--threads", "1"],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    until = time.monotonic() + 30
    while not beside(out):
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    words, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert words == ""
    assert_clean(out)


@pytest.mark.parametrize("size", ["4k", "20k", "36k", "48k"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, disk: Callable[[str], Path], size: str) -> None:
    """A disk too small for the scratch file, for the weights or for the rest ends the run in
    words, with all its space given back."""
    place = disk(f"size={size}")
    paths = [f"model.layers.{n}.q_proj" for n in range(32)]
    sources = [lora(tmp_path / str(n), *paths, seed=n, rank=8) for n in range(2)]
    with pytest.raises(OutputError) as caught:
        loratool.combine(sources, place / "out")
    assert_clear(caught.value, str(place))
    assert "partial" not in caught.value.message
    assert os.listdir(place) == []
    free = shutil.disk_usage(place)
    assert free.used == 0


def test_a_disk_that_fills_up_in_mid_run_leaves_nothing(
    tmp_path: Path, layers: list[Path], disk: Callable[[str], Path]
) -> None:
    """Space that others take during the run ends it in words, and the next run succeeds."""
    place = disk("size=256k")
    filler = place / "filler"

    def fill(done: int, total: int, path: str) -> None:
        if done == total:
            with filler.open("wb", buffering=0) as stream:
                try:
                    while True:
                        stream.write(bytes(4096))
                except OSError:
                    pass

    with pytest.raises(OutputError) as caught:
        loratool.combine(layers, place / "out", progress=fill)
    assert_clear(caught.value, str(place))
    assert re.search("disk is full|are free", caught.value.message)
    assert os.listdir(place) == ["filler"]
    filler.unlink()
    loratool.combine(layers, place / "out")
    assert os.listdir(place) == ["out"]


def test_forbidden_places_are_named(
    tmp_path: Path, layers: list[Path], disk: Callable[[str], Path]
) -> None:
    """A parent without write permission and a disk mounted read-only are OutputErrors."""
    parent = tmp_path / "forbidden"
    parent.mkdir(mode=0o555)
    with permissions_that_count():
        fails(OutputError, layers, parent / "out", str(parent), "not allowed")
    place = disk("size=1M")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    fails(OutputError, layers, place / "out", str(place), "not allowed")


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_from_progress_leaves_nothing(layers: list[Path], out: Path, threads: int) -> None:
    """An exception of the caller's own goes through unchanged, and nothing stays."""

    def fail(*_: Any) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        loratool.combine(layers, out, progress=fail, threads=threads)
    assert_clean(out)


def test_progress_counts_the_modules(layers: list[Path], out: Path) -> None:
    """Progress goes from 1 to the number of modules, with their paths in order."""
    calls: list[tuple[int, int, str]] = []
    loratool.combine(layers, out, progress=lambda *call: calls.append(call))
    assert calls == [(n + 1, 6, f"model.layers.{n}.q_proj") for n in range(6)]


# --- what a review found --------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_rounding_costs_is_true_of_every_method(
    tmp_path: Path, out: Path, method: str, dtype: str
) -> None:
    """`rounding` is the distance of what lies in the file from what was computed, also where the
    factors are far from orthogonal: here one adapter and nearly its opposite."""
    one = lora(tmp_path / "one", seed=1)
    noise = {
        name: -t + 0.01 * np.random.default_rng(5).standard_normal(t.shape).astype(np.float32)
        if "lora_B" in name else t
        for name, t in load_file(one / WEIGHTS).items()
    }  # fmt: skip
    two = write_adapter(tmp_path / "two", noise, {"r": 4})
    options: dict[str, Any] = {"density": 0.6} if METHODS[method].prunes else {}
    report = loratool.combine([one, two], out, method=method, dtype=dtype, **options)
    loratool.combine([one, two], tmp_path / "exact", method=method, dtype="float32", **options)
    exact, rounded = compared(tmp_path / "exact"), compared(out)
    off = sum(np.sum((exact[path] - rounded[path]) ** 2) for path in exact)
    size = sum(np.sum(delta**2) for delta in exact.values())
    assert report.rounding == pytest.approx(math.sqrt(off / size), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("options", [{"energy": 0.3}, {"rank": 2}, {}], ids=str)
@pytest.mark.parametrize("keep_patterns", [False, True])
@pytest.mark.parametrize("method", ["iso_c", "tsv_m", "ties_core", "linear"])
def test_off_sum_is_that_of_the_file(
    two: list[Path], out: Path, method: str, keep_patterns: bool, options: dict[str, Any]
) -> None:
    """`from_sum` measures what was written, after the cut, per module and over all."""
    more: dict[str, Any] = {"density": 0.5} if METHODS[method].prunes else {}
    report = loratool.combine(
        two, out, method=method, keep_patterns=keep_patterns, **options, **more
    )
    exact = total(two, [1.0, 1.0])
    found = compared(out)
    (module,) = report.modules
    off = np.linalg.norm(found[module.path] - exact[module.path])
    share = off / np.linalg.norm(exact[module.path])
    assert module.from_sum == pytest.approx(share, abs=1e-5)
    assert report.from_sum == pytest.approx(share, abs=1e-5)


def compared(folder: Path) -> dict[str, np.ndarray]:
    """B·A of every module, in any dtype: what combine writes has the scale 1."""
    tensors = {
        n: t.float().numpy() for n, t in safetensors.torch.load_file(folder / WEIGHTS).items()
    }
    return {
        name.removeprefix(ROOT).removesuffix(".lora_A.weight"): tensors[
            name.replace("lora_A", "lora_B")
        ].astype(np.float64)
        @ a.astype(np.float64)
        for name, a in tensors.items()
        if name.endswith("lora_A.weight")
    }


def test_factors_inside_a_saved_module_are_refused(tmp_path: Path, out: Path) -> None:
    """PEFT has no place for factors of a part of a module that is saved whole."""
    saved = lora(
        tmp_path / "saved", extra={f"{ROOT}classifier.dense.weight": np.ones((3, 3), np.float32)},
        modules_to_save=["classifier"],
    )  # fmt: skip
    inside = lora(tmp_path / "inside", "classifier.out_proj")
    fails(MatchError, [saved, inside], out, "classifier.out_proj (in classifier)")


def test_a_weight_does_not_apply_to_what_is_saved_whole(tmp_path: Path, out: Path) -> None:
    """A head has no half: combine says so, as merge does."""
    source = holding(tmp_path / "one", np.ones((3, 10)))
    report = loratool.combine([source], out, weights=[0.5])
    assert codes(report) == ["weight-not-applied"]
    assert codes(loratool.combine([source], tmp_path / "other", weights=[1.0])) == []


def test_different_ranks_are_said(tmp_path: Path, out: Path) -> None:
    """Programs that do not know patterns compute something else with them: a warning names it."""
    sources = [lora(tmp_path / "a", Q, "model.k"), lora(tmp_path / "b", Q, seed=3)]
    assert codes(loratool.combine(sources, out)) == []
    kept = loratool.combine(sources, out, keep_patterns=True, overwrite=True)
    assert codes(kept) == ["ranks-differ"]


def test_one_alike_name_is_no_other_class(tmp_path: Path, out: Path) -> None:
    """Paths of which one happens to end like another are not taken for renamed ones."""
    one = lora(tmp_path / "one", "fc", "model.a", "model.b")
    two = lora(tmp_path / "two", "layers.0.fc")
    assert "nothing-shared" in codes(loratool.combine([one, two], out))


def test_metadata_and_tasks_are_not_lost(tmp_path: Path, out: Path) -> None:
    """What all the files say alike stays in the file; the rest is in loratool.json."""
    sources = []
    for name in ("one", "two"):
        folder = lora(tmp_path / name, seed=len(sources), task_type=name.upper())
        tensors = load_file(folder / WEIGHTS)
        save_file(tensors, folder / WEIGHTS, {"format": "pt", "licence": "mit", "run": name})
        sources.append(folder)
    report = loratool.combine(sources, out)
    assert codes(report) == ["tasks-differ"]
    assert loratool.inspect(out).metadata == {"format": "pt", "licence": "mit"}
    record = json.loads((out / "loratool.json").read_text())
    assert [a["metadata"]["run"] for a in record["adapters"]] == ["one", "two"]


def test_one_tokenizer_file_more_is_no_other_tokenizer(two: list[Path], out: Path) -> None:
    """Tokenizers clash where a file of one name has two contents, not where one is missing."""
    for folder in two:
        (folder / "tokenizer.json").write_text("{}")
    (two[1] / "chat_template.jinja").write_text("x")
    assert codes(loratool.combine(two, out)) == []
    assert (out / "tokenizer.json").read_text() == "{}"
    assert (out / "chat_template.jinja").read_text() == "x"


@pytest.mark.skipif(
    sys.platform != "linux",
    reason="only /proc tells a process's own peak; ru_maxrss starts at that of its parent",
)
def test_a_saved_tensor_is_never_whole_in_memory(tmp_path: Path, out: Path) -> None:
    """Large tensors beside the factors go through in blocks, also where their mean is taken."""
    sources = [holding(tmp_path / str(n), np.full((4000, 4000), n, np.float32)) for n in (1, 2)]
    code = (
        "import re, sys, loratool; loratool.combine(sys.argv[1:3], sys.argv[3], saved='mean'); "
        "print(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, sources), str(out)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) * 1024 < 64e6 + 40e6  # each of the tensors has 64 MB, Python 30 to 50
    assert load_file(out / WEIGHTS)[HEAD][0, 0] == 1.5


def test_an_adapter_that_does_nothing_is_named(tmp_path: Path, out: Path) -> None:
    """One untrained adapter among others does not change the result, and a warning names it."""
    one = lora(tmp_path / "one", Q, seed=1)
    tensors = load_file(one / WEIGHTS)
    idle = write_adapter(
        tmp_path / "idle", {n: t * ("lora_A" in n) for n, t in tensors.items()}, {"r": 4}
    )
    report = loratool.combine([one, idle], out)
    assert codes(report) == ["zero-adapter"]
    assert str(idle) in report.warnings[0].message
    assert_near(deltas(out), deltas(one), 1e2)
    assert "B does nothing" in run_cli("compare", str(one), str(idle)).stdout
