"""FourierFT and C3A: a few frequencies of a weight, and blocks that are circulant.

Sources: peft/tuners/fourierft/layer.py, peft/tuners/c3a/layer.py (`get_delta_weight`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import numpy as np

from loratool.adapters.dialects.peft.types.making import (
    Array,
    Numbers,
    computed_factor,
    computed_pair,
    elementwise,
    is_smaller,
    structured,
)
from loratool.adapters.dialects.peft.types.method import Made, PeftMethod, PeftModule
from loratool.adapters.dialects.peft.types.places import random_places
from loratool.adapters.dialects.peft.types.sizes import Size
from loratool.adapters.factors import Matrix, Part
from loratool.storage.fields import COUNT, NUMBER


def _fourierft(module: PeftModule) -> Iterable[Made]:
    (spectrum,) = module.need("fourierft_spectrum")
    module.require(len(spectrum.shape) == 1)
    shape, seed = module.size(), module.config.get("random_loc_seed", 777)
    module.require(spectrum.numel <= math.prod(shape))
    scaled = module.scaled(module.config.get("scaling", 150.0))
    rank = 2 * spectrum.numel
    if is_smaller(rank, shape):
        of = f"{spectrum.name} from {seed} in {shape}"
        down, across = partial(_rows, shape, seed), partial(_columns, shape, seed)
        b = computed_factor(f"{of}, rows", (shape[0], rank), [spectrum], down)
        a = computed_factor(f"{of}, columns", (rank, shape[1]), [spectrum], across)
        yield computed_pair(module, "FourierFT", b, a, scaled)
    else:
        load = partial(_transformed, shape, seed)
        yield structured(module, "FourierFT", shape, {"spectrum": spectrum}, load, rank, scaled)


def _waves(numbers: Numbers, length: int) -> tuple[Array, Array]:
    """Cosine and sine of 2π·n·k/length, `[length, numbers]`."""
    angles = 2 * np.pi / length * (np.arange(length)[:, None] * numbers % length)
    return np.cos(angles), np.sin(angles)


def _rows(shape: Size, seed: int, spectrum: Array) -> Array:
    """B of cos(x + y) = cos x·cos y - sin x·sin y, summed over the frequencies."""
    cosine, sine = _waves(random_places(shape, seed, len(spectrum))[0], shape[0])
    heights = spectrum / math.prod(shape)
    return np.concatenate([cosine * heights, -sine * heights], axis=1)


def _columns(shape: Size, seed: int, spectrum: Array) -> Array:
    cosine, sine = _waves(random_places(shape, seed, len(spectrum))[1], shape[1])
    waves: Array = np.concatenate([cosine, sine], axis=1).T
    return waves


def _transformed(shape: Size, seed: int, spectrum: Array) -> Part:
    """The real part of the inverse transform, of some rows or of some columns at a time."""
    rows, columns = random_places(shape, seed, len(spectrum))
    heights = spectrum.astype(np.float64)

    def along(wanted: Numbers, first: int, second: int, one: Numbers, other: Numbers) -> Array:
        """`[wanted, second]`, with frequencies `one` in the first direction."""
        phases = np.exp(2j * np.pi / first * (wanted[:, None] * one % first)) * heights / first
        spread = np.zeros((len(wanted), second), complex)
        np.add.at(spread.T, other, phases.T)
        real: Array = np.fft.ifft(spread, axis=1).real
        return real

    def part(wanted: slice | Numbers, across: slice) -> Matrix:
        of_rows, of_columns = np.arange(shape[0])[wanted], np.arange(shape[1])[across]
        if across == slice(None):
            return along(of_rows, *shape, rows, columns).astype(np.float32)
        turned: Matrix = along(of_columns, shape[1], shape[0], columns, rows).T.astype(np.float32)
        return turned[of_rows]

    return part


def _c3a(module: PeftModule) -> Iterable[Made]:
    (kernel,) = module.need("c3a_kernel")
    module.require(len(kernel.shape) == 3)
    down, across, size = kernel.shape
    shape = down * size, across * size
    yield structured(
        module, "C3A", shape, {"kernel": kernel}, _circulant, min(shape), module.scaled()
    )


def _circulant(kernel: Array) -> Part:
    """Row p and column t of a block have the element t - p of its kernel, by the columns of all."""
    down, across, size = kernel.shape
    shares = kernel.astype(np.float64) / (across * size)

    def element(i: Numbers, j: Numbers) -> Array:
        found: Array = shares[i // size, j // size, (j - i) % size]
        return found

    return elementwise((down * size, across * size), element)


FOURIERFT = PeftMethod(
    "FOURIERFT", "FourierFT", ("fourierft_spectrum",), _fourierft,
    {"scaling": NUMBER, "random_loc_seed": COUNT},
    frozenset({"n_frequency", "n_frequency_pattern"}), shown=("n_frequency", "scaling"),
)  # fmt: skip
C3A = PeftMethod(
    "C3A", "C³A", ("c3a_kernel",), _c3a, {}, frozenset({"block_size", "block_size_pattern"}),
    shown=("block_size",),
)  # fmt: skip
