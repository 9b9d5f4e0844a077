"""Heads, token rows and biases: what adapters hold beside factors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.adapters import (
    HEAD,
    PREFIX,
    WEIGHTS,
    K,
    Q,
    codes,
    config_of,
    lora,
    pair,
    write_adapter,
)
from helpers.combining import fails, holding
from safetensors.numpy import load_file

import loratool
from loratool.errors import MatchError


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
    key = f"{PREFIX}score.norm.num_batches_tracked"
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
    key = f"{PREFIX}{EMBEDDING}.token_adapter.trainable_tokens_delta"
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
    extra = {f"{PREFIX}{Q}.lora_B.bias": np.arange(12, dtype=np.float32)}
    sources = [lora(tmp_path / "one", extra=extra, lora_bias=True), lora(tmp_path / "two", Q, K)]
    loratool.combine(sources, out, weights=[-0.5, 3])
    tensors = load_file(out / WEIGHTS)
    np.testing.assert_allclose(tensors[f"{PREFIX}{Q}.lora_B.bias"], -0.5 * 2 * np.arange(12))
    assert not tensors[f"{PREFIX}{K}.lora_B.bias"].any()
    assert config_of(out)["lora_bias"] is True
    assert loratool.inspect(out).warnings == []


def test_a_bias_beside_an_embedding_is_refused(tmp_path: Path, out: Path) -> None:
    """PEFT has no adapter with lora_bias and an embedding, so none is made of two."""
    extra = {f"{PREFIX}{Q}.lora_B.bias": np.ones(12, np.float32)}
    biased = lora(tmp_path / "biased", extra=extra, lora_bias=True)
    rng = np.random.default_rng(0)
    table = {f"{PREFIX}{EMBEDDING}.lora_embedding_{half}": rng.standard_normal(shape)
             for half, shape in (("A", (4, 50)), ("B", (10, 4)))}  # fmt: skip
    embedded = write_adapter(tmp_path / "embedded", table | pair(Q, 12, 10), {})
    error = fails(MatchError, [biased, embedded], out, "lora_bias", "embedding")
    assert "loratool merge" in error.hint


def test_factors_inside_a_saved_module_are_refused(tmp_path: Path, out: Path) -> None:
    """PEFT has no place for factors of a part of a module that is saved whole."""
    saved = lora(
        tmp_path / "saved", extra={f"{PREFIX}classifier.dense.weight": np.ones((3, 3), np.float32)},
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


@pytest.mark.process
@pytest.mark.skipif(
    sys.platform != "linux",
    # Only /proc tells a process's own peak: ru_maxrss starts at that of the parent that forked it,
    # here a test process with torch, and would hide what is measured. No code depends on the
    # platform, and CI is Linux, where this always runs.
    reason="only Linux's /proc tells the peak memory of a process without that of its parent",
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
