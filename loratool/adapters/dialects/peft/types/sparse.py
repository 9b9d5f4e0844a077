"""SHiRA, Super and WaveFT: single elements of a weight, or of its wavelet transform, are trained.

Sources: peft/tuners/shira/layer.py, peft/tuners/supertuning/layer.py, peft/tuners/waveft/layer.py
(`get_delta_weight`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import numpy as np

from loratool.adapters.dialects.peft.types.making import (
    Array,
    Numbers,
    places_within,
    structured,
)
from loratool.adapters.dialects.peft.types.method import Made, PeftMethod, PeftModule, Trouble
from loratool.adapters.dialects.peft.types.places import random_places
from loratool.adapters.dialects.peft.types.sizes import Size
from loratool.adapters.factors import Matrix, Part
from loratool.linalg.reproducible import reproducible_product
from loratool.storage.fields import ABSENT, COUNT, FLAG, NUMBER, TEXT


def sparse(shape: Size, rows: Numbers, columns: Numbers, values: Array) -> Part:
    """A Δ with these values in these places, which are added where several have one place, and
    left out where they are outside."""
    inside = (rows < shape[0]) & (columns < shape[1])
    order = np.argsort(rows[inside], kind="stable")
    rows, columns, values = rows[inside][order], columns[inside][order], values[inside][order]
    starts = np.searchsorted(rows, np.arange(shape[0] + 1))

    def part(wanted: slice | Numbers, across: slice) -> Matrix:
        numbers, within = np.arange(shape[0])[wanted], np.arange(shape[1])[across]
        whole = np.zeros((len(numbers), shape[1]))
        for at, row in enumerate(numbers):
            own = slice(starts[row], starts[row + 1])
            np.add.at(whole[at], columns[own], values[own])
        return whole[:, within].astype(np.float32)

    return part


def _shira(module: PeftModule) -> Iterable[Made]:
    values, places = module.need("shira_weight", "shira_indices")
    module.require(len(values.shape) == 1 and places.shape == (2, values.numel))
    module.require(not places.is_float)
    shape = module.size()
    parts = {"values": values, "places": places}
    load = partial(_at_places, shape)
    yield structured(module, "SHiRA", shape, parts, load, values.numel, module.scaled())


def _at_places(shape: Size, values: Array, places: Numbers) -> Part:
    rows, columns = (
        places_within(part, size, "shira_indices") for part, size in zip(places, shape, strict=True)
    )
    return sparse(shape, rows, columns, values)


def _supertuning(module: PeftModule) -> Iterable[Made]:
    config = module.config
    (values,) = module.need("supertuning_values")
    if "supertuning_indices" not in module.tensors:
        text = "the places of its values are not in the file (save_precomputed_indices)"
        raise Trouble("peft-options", text)
    (places,) = module.need("supertuning_indices")
    module.require(len(values.shape) == 1 and places.shape == values.shape and not places.is_float)
    shape, parts, ratio = module.size(), {"values": values, "places": places}, 0.0
    if config.get("r") is not None:
        b, a = module.need("supertuning_lora_B", "supertuning_lora_A")
        module.require((*b.shape, *a.shape) == (shape[0], config["r"], config["r"], shape[1]))
        parts |= {"B": b, "A": a}
        ratio = float(config.get("lora_alpha") or 0) / config["r"]
    load = partial(_with_product, shape, ratio)
    yield structured(module, "Super", shape, parts, load, min(shape), module.scaled())


def _with_product(
    shape: Size, ratio: float, values: Array, places: Numbers, B: Array | None = None,
    A: Array | None = None,
) -> Part:  # fmt: skip
    numbers = places_within(places, math.prod(shape), "supertuning_indices")
    rows, columns = np.divmod(numbers, shape[1])
    alone = sparse(shape, rows, columns, values)
    if B is None or A is None:
        return alone

    def part(wanted: slice | Numbers, across: slice) -> Matrix:
        product = ratio * reproducible_product(B[wanted], A[:, across])
        return (alone(wanted, across).astype(np.float64) + product).astype(np.float32)

    return part


def _waveft(module: PeftModule) -> Iterable[Made]:
    config = module.config
    (spectrum,) = module.need("waveft_spectrum")
    module.require(len(spectrum.shape) == 1)
    family, transformed = config.get("wavelet_family", "db1"), config.get("use_idwt", True)
    if transformed and family != "db1":
        text = f"its wavelets are {family}; those that are known are db1, PEFT's default"
        raise Trouble("peft-options", text)
    shape = module.size()
    module.require(spectrum.numel <= math.prod(shape))
    scaled = module.scaled(config.get("scaling", 25.0))
    load = partial(_haar if transformed else _scattered, shape, config.get("random_loc_seed", 777))
    yield structured(module, "WaveFT", shape, {"spectrum": spectrum}, load, min(shape), scaled)


def _scattered(shape: Size, seed: int, spectrum: Array) -> Part:
    rows, columns = random_places(shape, seed, len(spectrum))
    return sparse(shape, rows, columns, spectrum)


def _haar(shape: Size, seed: int, spectrum: Array) -> Part:
    """The inverse Haar transform of a spectrum: each of its values makes a square of four.

    Quarters of the spectrum are averages, and differences along rows, along columns and both.
    """
    rows, columns = random_places(shape, seed, len(spectrum))
    half = -(-shape[0] // 2), -(-shape[1] // 2)
    lower, right = rows >= half[0], columns >= half[1]
    top, left = 2 * (rows - half[0] * lower), 2 * (columns - half[1] * right)
    found = []
    for y in (0, 1):
        for x in (0, 1):
            # The upper right quarter changes its sign from row to row, the lower left one across.
            sign = np.where(right & bool(y), -1, 1) * np.where(lower & bool(x), -1, 1)
            found.append((top + y, left + x, spectrum * sign / 2))
    places = [np.concatenate(part) for part in zip(*found, strict=True)]
    return sparse(shape, places[0], places[1], places[2])


SHIRA = PeftMethod(
    "SHIRA", "SHiRA", ("shira_weight", "shira_indices"), _shira, {},
    frozenset({"r", "mask_type", "random_seed"}), shown=("r", "mask_type"),
)  # fmt: skip
SUPERTUNING = PeftMethod(
    "SUPERTUNING", "Super", ("supertuning_values", "supertuning_indices", "supertuning_lora_[AB]"),
    _supertuning, {"r": COUNT | ABSENT, "lora_alpha": NUMBER | ABSENT},
    frozenset({"sparsity", "select_top", "lora_dropout", "save_precomputed_indices"}),
    shown=("sparsity", "r", "lora_alpha"),
)  # fmt: skip
WAVEFT = PeftMethod(
    "WAVEFT", "WaveFT", ("waveft_spectrum",), _waveft,
    {"scaling": NUMBER, "wavelet_family": TEXT, "use_idwt": FLAG, "random_loc_seed": COUNT},
    frozenset({"n_frequency", "n_frequency_pattern", "proportional_parameters"}),
    shown=("n_frequency", "scaling", "wavelet_family"),
)  # fmt: skip
