"""Equal means that everything acts the same: factors, heads, biases, magnitudes, token rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.adapters import HEAD, PREFIX, WEIGHTS, K, Q, Tensors, lora
from helpers.cli import run_cli
from helpers.comparing import changed, of, units
from safetensors.numpy import load_file

import loratool

ROWS = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
MAGNITUDE = f"{PREFIX}{Q}.lora_magnitude_vector"
BIAS = f"{PREFIX}{Q}.lora_B.bias"


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
    key = f"{PREFIX}score.norm.num_batches_tracked"
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
