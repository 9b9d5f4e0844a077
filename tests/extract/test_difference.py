"""tuned - base as it is read from files, its norms and its noise, against NumPy in float64."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.files import random_of, read_pickled
from helpers.outcomes import assert_clear
from safetensors.torch import save_file

from loratool.errors import ValueRangeError
from loratool.extracting import difference as differences
from loratool.extracting.difference import Difference, Stopped
from loratool.linalg.truncation import truncated
from loratool.storage.header import read_header
from loratool.storage.tensors import FilePool, TensorInfo

CPU = torch.device("cpu")
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = [(), (1,), (7,), (5, 9), (3, 4, 5), (4, 3, 3, 2), (2, 3, 2, 3, 2), (1, 1), (0, 4), (4, 0)]
NAME = "layer.weight"


@pytest.fixture
def files() -> Iterator[FilePool]:
    with FilePool() as pool:
        yield pool


def stored(path: Path, value: torch.Tensor) -> TensorInfo:
    save_file({NAME: value}, path)
    return read_header(path)[0][NAME]


def difference(
    folder: Path, files: FilePool, base: torch.Tensor, tuned: torch.Tensor
) -> Difference:
    """The difference of two tensors, stored in files of their own."""
    one = stored(folder / "base.safetensors", base)
    return Difference(one, stored(folder / "tuned.safetensors", tuned), files, CPU)


def expected(base: torch.Tensor, tuned: torch.Tensor) -> np.ndarray:
    """The float32 difference of the values in float32, in the shape of the matrix."""
    found = tuned.float() - base.float()
    return found.reshape(base.shape[0] if base.shape else 1, -1 if base.numel() else 0).numpy()


def whole(found: Difference) -> np.ndarray:
    """All blocks put together; each begins where the one before ended."""
    rows: list[np.ndarray] = []
    for low, block in found.blocks():
        assert low == sum(len(own) for own in rows)
        assert block.dtype == torch.float32
        rows.append(block.numpy().copy())
    return np.concatenate(rows) if rows else np.zeros((found.rows, found.columns), np.float32)


def square(values: torch.Tensor | np.ndarray) -> float:
    return float(np.sum(np.asarray(torch.as_tensor(values).double()) ** 2))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_shape_and_dtype(
    tmp_path: Path, files: FilePool, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Tensors of any number of dimensions become `[first, all others]`, with norms in float64."""
    base, tuned = random_of(dtype, *shape, seed=1), random_of(dtype, *shape, seed=2)
    found = difference(tmp_path, files, base, tuned)
    wanted = expected(base, tuned)
    size = found.measure()
    if base.numel():
        assert (found.rows, found.columns) == wanted.shape
        assert np.array_equal(whole(found), wanted)
    # Few float32 squares are summed: their rounding is 1e-6 at the very most.
    assert size.energy == pytest.approx(square(wanted), rel=1e-6, abs=0)
    assert size.weight == pytest.approx(square(base.float()), rel=1e-6, abs=0)
    assert size.changed == (base.numel() > 0)


@pytest.mark.parametrize("base_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tuned_dtype", FLOATS, ids=str)
def test_sides_of_different_dtypes(
    tmp_path: Path, files: FilePool, base_dtype: torch.dtype, tuned_dtype: torch.dtype
) -> None:
    """Each side is widened on its own; a float64 is rounded to float32 first."""
    base, tuned = random_of(base_dtype, 40, 30, seed=1), random_of(tuned_dtype, 40, 30, seed=2)
    found = difference(tmp_path, files, base, tuned)
    size = found.measure(hold=True)
    wanted = expected(base, tuned)
    assert np.array_equal(whole(found), wanted)
    assert size.energy == pytest.approx(square(wanted), rel=1e-6, abs=0)
    # The noise is what the tuned side's dtype took of values as large as the base's that differ.
    bits = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}
    differ = square(base.float()[torch.from_numpy(wanted) != 0])
    assert size.noise == pytest.approx(differ * 4.0 ** -bits[tuned_dtype] / 24, rel=1e-6, abs=0)
    assert not size.rounding


@pytest.mark.parametrize("block", [1, 50, 1000, 1 << 20])
@pytest.mark.parametrize("hold", [False, True])
def test_blocks(
    tmp_path: Path, files: FilePool, hold: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of any size, held or read again, are the same matrix, as often as it is asked for."""
    monkeypatch.setattr(differences, "BLOCK_ELEMENTS", block)
    base, tuned = random_of(torch.bfloat16, 37, 50, seed=1), random_of(torch.float16, 37, 50)
    found = difference(tmp_path, files, base, tuned)
    size = found.measure(hold=hold)
    wanted = expected(base, tuned)
    assert size.energy == pytest.approx(square(wanted), rel=1e-6, abs=0)
    assert size.weight == pytest.approx(square(base.float()), rel=1e-6, abs=0)
    for _ in range(2):
        assert np.array_equal(whole(found), wanted)


def test_only_what_is_small_enough_is_held(
    tmp_path: Path, files: FilePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to `_HELD` elements stay in memory, so that the files are read once; others are not."""
    reads = 0
    read_into = FilePool.read_into

    def counted(self: FilePool, path: Path, start: int, buffer: memoryview) -> None:
        nonlocal reads
        reads += 1
        read_into(self, path, start, buffer)

    monkeypatch.setattr(FilePool, "read_into", counted)
    base, tuned = random_of(torch.float32, 20, 30), random_of(torch.float32, 20, 30, seed=1)
    found = difference(tmp_path, files, base, tuned)
    for limit, hold, wanted in ((600, True, 2), (599, True, 4), (600, False, 4)):
        monkeypatch.setattr(differences, "_HELD", {"cpu": limit})
        reads = 0
        found.measure(hold=hold)
        assert np.array_equal(whole(found), expected(base, tuned))
        assert reads == wanted


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equal_tensors_are_unchanged(tmp_path: Path, files: FilePool, dtype: torch.dtype) -> None:
    """Equal values are no change, also of zeros with another sign."""
    base = random_of(dtype, 30, 20)
    base[0] = 0.0
    tuned = base.clone()
    tuned[0] = -0.0
    size = difference(tmp_path, files, base, tuned).measure()
    assert not size.changed
    assert size.energy == 0
    assert size.weight == pytest.approx(square(base.float()), rel=1e-6, abs=0)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("tiny", [1e-12, 1e-14, 1e-19, 1e-25, 1e-30, 1e-38, 1e-44])
def test_tiny_changes_are_changes(
    tmp_path: Path, files: FilePool, tiny: float, hold: bool, alone: bool
) -> None:
    """Differences whose squares float32 cannot hold have their energy, and one alone is enough."""
    tuned = random_of(torch.float32, 50, 70) * tiny
    if alone:
        tuned[:49] = 0
        tuned[49, :69] = 0
    size = difference(tmp_path, files, torch.zeros(50, 70), tuned).measure(hold=hold)
    assert size.changed
    assert size.energy == pytest.approx(square(tuned), rel=1e-6, abs=0)


def test_small_changes_of_large_weights(tmp_path: Path, files: FilePool) -> None:
    """A last place of a few values, a millionth of the weight's energy and less, is found."""
    base = random_of(torch.bfloat16, 64, 64)
    tuned = base.clone()
    tuned[3, 5] += tuned[3, 5] * 2.0**-7
    size = difference(tmp_path, files, base, tuned).measure()
    assert size.changed
    assert size.energy == square(expected(base, tuned))


@pytest.mark.parametrize("strides", ["transposed", "sliced", "permuted", "both"])
@pytest.mark.parametrize("hold", [False, True])
def test_strided_tensors(
    tmp_path: Path,
    files: FilePool,
    strides: str,
    hold: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Views in a torch file are read in the order of their shape, block by block."""
    monkeypatch.setattr(differences, "BLOCK_ELEMENTS", 40)
    full = random_of(torch.float16, 12, 18, seed=1)
    views = {
        "transposed": full.T,
        "sliced": full[::2, 3::3],
        "permuted": random_of(torch.bfloat16, 4, 5, 6).permute(2, 0, 1),
        "both": full.T,
    }
    tuned = views[strides]
    base = random_of(torch.float16, *tuned.shape, seed=3)
    if strides == "both":
        base = random_of(torch.float16, *tuned.shape[::-1], seed=3).T
    torch.save({NAME: tuned}, tmp_path / "tuned.bin")
    torch.save({NAME: base}, tmp_path / "base.bin")
    infos = [read_pickled(tmp_path / f"{side}.bin")[0][NAME] for side in ("base", "tuned")]
    assert infos[1].strides is not None
    found = Difference(infos[0], infos[1], files, CPU)
    size = found.measure(hold=hold)
    wanted = expected(base, tuned)
    assert np.array_equal(whole(found), wanted)
    assert size.energy == pytest.approx(square(wanted), rel=1e-6, abs=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["base", "tuned", "both"])
def test_not_finite(
    tmp_path: Path, files: FilePool, side: str, value: float, dtype: torch.dtype
) -> None:
    """NaN or infinity names tensor, side and file, the base first; equal ones do not cancel."""
    base, tuned = random_of(dtype, 30, 20, seed=1), random_of(dtype, 30, 20, seed=2)
    for name, tensor in (("base", base), ("tuned", tuned)):
        if side in (name, "both"):
            tensor[17, 3:6] = value
    found = difference(tmp_path, files, base, tuned)
    role = "tuned model" if side == "tuned" else "base"
    path = tmp_path / ("tuned.safetensors" if side == "tuned" else "base.safetensors")
    for hold in (False, True):
        with pytest.raises(ValueRangeError) as caught:
            found.measure(hold=hold)
        assert_clear(caught.value, NAME, "3 of 600", f"of the {role} ", str(path))


@pytest.mark.parametrize("side", ["base", "tuned model"])
def test_float64_beyond_float32(tmp_path: Path, files: FilePool, side: str) -> None:
    """A float64 difference that float32 cannot hold is refused."""
    pair = [torch.ones(4, 4, dtype=torch.float64) for _ in range(2)]
    pair[side != "base"][1, 2] = 1e39
    with pytest.raises(ValueRangeError) as caught:
        difference(tmp_path, files, *pair).measure()
    assert_clear(caught.value, NAME, "too large to be squared")


def test_overflow_of_the_squares(tmp_path: Path, files: FilePool) -> None:
    """Finite values whose difference cannot be squared in float32 are refused, and said so."""
    with pytest.raises(ValueRangeError) as caught:
        difference(tmp_path, files, torch.zeros(4, 4), torch.full((4, 4), 1e20)).measure()
    assert_clear(caught.value, NAME, "too large to be squared")


@pytest.mark.parametrize("value", [1e20, 1e-25])
def test_weight_of_extreme_values(tmp_path: Path, files: FilePool, value: float) -> None:
    """‖base‖² is right where float32 cannot hold the squares, and the noise follows it."""
    base = torch.full((6, 5), value)
    size = difference(tmp_path, files, base, base.clone()).measure()
    assert size.weight == pytest.approx(square(base), rel=1e-6, abs=0)
    assert math.isfinite(size.noise)


@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3, 0.7])
def test_energy_of_equal_magnitudes(tmp_path: Path, files: FilePool, value: float) -> None:
    """Where every square rounds alike, as after one step of a sign optimiser, they do not add up.

    The truncation takes ‖D‖² for good to 1e-7.
    """
    tuned = torch.full((300, 512), value) * torch.where(
        random_of(torch.float32, 300, 512) > 0, 1, -1
    )
    size = difference(tmp_path, files, torch.zeros(300, 512), tuned).measure()
    assert size.energy == pytest.approx(square(tuned), rel=1e-7, abs=0)


def test_bounds_of_equal_magnitudes(tmp_path: Path, files: FilePool) -> None:
    """A sign matrix of rank two, of which 2e-4 is left at rank one: `cut` and `least` are right."""
    tuned = torch.full((512, 512), 0.3)
    tuned[:4, :4] *= -1
    found = difference(tmp_path, files, torch.zeros(512, 512), tuned)
    size = found.measure(hold=True)
    values = np.linalg.svd(tuned.double().numpy(), compute_uv=False)
    result = truncated(found, size.energy, lambda values, _: 1, 1)
    best = float(np.sum(values[1:] ** 2))
    assert result.cut == pytest.approx(best, rel=2e-3)
    assert result.least <= best * (1 + 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [0.02, 0.017, 1.0, 0.0123])
def test_noise_is_what_rounding_takes(
    tmp_path: Path, files: FilePool, scale: float, dtype: torch.dtype
) -> None:
    """The estimate's root is within 20 % of the norm that rounding Gaussian weights takes."""
    exact = random_of(torch.float32, 400, 300).double() * scale
    base = exact.to(torch.float32)
    size = difference(tmp_path, files, base, base.to(dtype)).measure()
    taken = square(base.double() - base.to(dtype).double())
    assert size.energy == pytest.approx(taken, rel=1e-6, abs=0)
    assert math.sqrt(size.noise) == pytest.approx(math.sqrt(taken), rel=0.2)


def test_a_matrix_nobody_waits_for_stops(tmp_path: Path, files: FilePool) -> None:
    """After Ctrl-C a thread gives up at its next block, held or read."""
    stop = threading.Event()
    sides = [stored(tmp_path / f"{n}.safetensors", torch.full((4, 4), n)) for n in (1.0, 2.0)]
    found = Difference(*sides, files, CPU, stop)
    found.measure(hold=True)
    stop.set()
    with pytest.raises(Stopped):
        next(found.blocks())
    with pytest.raises(Stopped):
        found.measure()
