"""LoHa and LoKr: Hadamard and Kronecker products, as PEFT has them from LyCORIS.

Weights of convolutions are seen as matrices, kernels flattened. Sources: peft/tuners/loha/layer.py
and peft/tuners/lokr/layer.py (`get_delta_weight`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from loratool.adapters.dialects.peft.types.making import (
    Array,
    Numbers,
    computed_factor,
    computed_pair,
    elementwise,
    is_smaller,
    reshaped,
    structured,
)
from loratool.adapters.dialects.peft.types.method import Made, PeftMethod, PeftModule, Trouble
from loratool.adapters.factors import Matrix, Part
from loratool.linalg.identities import columns_multiplied, kronecker, rows_multiplied, tucker_right
from loratool.linalg.reproducible import reproducible_product
from loratool.storage.composed import transposed
from loratool.storage.fields import ABSENT, NUMBER, mapping_to
from loratool.storage.tensors import TensorInfo

_NUMBERS = mapping_to(NUMBER, "a table of numbers") | ABSENT
_FIELDS = {"r": NUMBER, "alpha": NUMBER, "rank_pattern": _NUMBERS, "alpha_pattern": _NUMBERS}
_TRAINING = frozenset({"rank_dropout", "module_dropout", "rank_dropout_scale"})
# What they decide shows in the shapes.
_SHAPING = frozenset({"use_effective_conv2d", "decompose_both", "decompose_factor"})

#: B and A of a product.
_Pair = tuple[TensorInfo, TensorInfo]


def _product(module: PeftModule, left: str, right: str, core: str, rank: int) -> _Pair:
    """Two factors as B `[out, r]` and A `[r, in]`; with a Tucker core B is stored transposed."""
    b, a = module.need(left, right)
    kernel = module.tensors.get(core)
    if kernel is not None:
        module.require(len(b.shape) == len(a.shape) == 2 and len(kernel.shape) > 2)
        module.require(kernel.shape[:2] == (b.shape[0], a.shape[0]))
        width = a.shape[1] * math.prod(kernel.shape[2:])
        parts = [kernel, a]
        a = computed_factor(f"{core} · {a.name}", (b.shape[0], width), parts, tucker_right)
        b = transposed(b)
    module.require(len(b.shape) == len(a.shape) == 2 and b.shape[1] == a.shape[0])
    if b.shape[1] != rank:
        raise Trouble("rank-mismatch", f"the config gives {rank}, {left} has {b.shape[1]}")
    return b, a


def _loha(module: PeftModule) -> Iterable[Made]:
    rank, scaled = module.rank_and_scale("alpha")
    b1, a1 = _product(module, "hada_w1_a", "hada_w1_b", "hada_t1", rank)
    b2, a2 = _product(module, "hada_w2_a", "hada_w2_b", "hada_t2", rank)
    module.require(b1.shape == b2.shape and a1.shape == a2.shape)
    shape, square = (b1.shape[0], a1.shape[1]), rank * rank
    if is_smaller(square, shape):
        b = computed_factor(f"{b1.name} • {b2.name}", (shape[0], square), [b1, b2], rows_multiplied)
        a = computed_factor(
            f"{a1.name} * {a2.name}", (square, shape[1]), [a1, a2], columns_multiplied
        )
        yield computed_pair(module, "LoHa", b, a, scaled, flat=True)
    else:
        parts = {"w1_a": b1, "w1_b": a1, "w2_a": b2, "w2_b": a2}
        yield structured(module, "LoHa", shape, parts, _hadamard, square, scaled, flat=True)


def _hadamard(w1_a: Array, w1_b: Array, w2_a: Array, w2_b: Array) -> Part:
    def part(rows: slice | Numbers, columns: slice) -> Matrix:
        one = reproducible_product(w1_a[rows], w1_b[:, columns])
        other = reproducible_product(w2_a[rows], w2_b[:, columns])
        product: Matrix = (one * other).astype(np.float32)
        return product

    return part


def _side(module: PeftModule, whole: str, core: str, rank: int) -> TensorInfo | _Pair:
    """A side of a Kronecker product, as a matrix or as B and A."""
    full = module.tensors.get(whole)
    if full is None:
        return _product(module, f"{whole}_a", f"{whole}_b", core, rank)
    module.require(len(full.shape) >= 2)
    return (
        full if len(full.shape) == 2 else reshaped(full, full.shape[0], math.prod(full.shape[1:]))
    )


def _as_pair(side: TensorInfo | _Pair) -> _Pair:
    """A side as B and A, one of which is the unit matrix if it is none."""
    if not isinstance(side, TensorInfo):
        return side
    out, width = side.shape
    if width <= out:
        return side, computed_factor(f"1 of {side.name}", (width, width), [side], _unit_of_columns)
    return computed_factor(f"1 of {side.name}", (out, out), [side], _unit_of_rows), side


def _unit_of_columns(matrix: Array) -> Array:
    return np.eye(matrix.shape[1])


def _unit_of_rows(matrix: Array) -> Array:
    return np.eye(matrix.shape[0])


def _as_matrix(side: TensorInfo | _Pair) -> TensorInfo:
    if isinstance(side, TensorInfo):
        return side
    b, a = side
    shape = b.shape[0], a.shape[1]
    return computed_factor(f"{b.name} · {a.name}", shape, side, reproducible_product)


def _lokr(module: PeftModule) -> Iterable[Made]:
    rank, scaled = module.rank_and_scale("alpha")
    w1 = _side(module, "lokr_w1", "", rank)
    w2 = _side(module, "lokr_w2", "lokr_t2", rank)
    (b1, a1), (b2, a2) = _as_pair(w1), _as_pair(w2)
    shape = b1.shape[0] * b2.shape[0], a1.shape[1] * a2.shape[1]
    inner = b1.shape[1] * b2.shape[1]
    if is_smaller(inner, shape):
        b = computed_factor(f"{b1.name} ⊗ {b2.name}", (shape[0], inner), [b1, b2], kronecker)
        a = computed_factor(f"{a1.name} ⊗ {a2.name}", (inner, shape[1]), [a1, a2], kronecker)
        yield computed_pair(module, "LoKr", b, a, scaled, flat=True)
    else:
        parts = {"w1": _as_matrix(w1), "w2": _as_matrix(w2)}
        yield structured(module, "LoKr", shape, parts, _kronecker, inner, scaled, flat=True)


def _kronecker(w1: Array, w2: Array) -> Part:
    one, other = w1.astype(np.float64), w2.astype(np.float64)
    rows, columns = other.shape

    def element(i: Numbers, j: Numbers) -> Array:
        product: Array = one[i // rows, j // columns] * other[i % rows, j % columns]
        return product

    return elementwise((len(one) * rows, one.shape[1] * columns), element)


LOHA = PeftMethod(
    "LOHA", "LoHa", ("hada_w[12]_[ab]", "hada_t[12]"), _loha, _FIELDS,
    _TRAINING | _SHAPING, shown=("r", "alpha"),
)  # fmt: skip
LOKR = PeftMethod(
    "LOKR", "LoKr", ("lokr_w[12](?:_[ab])?", "lokr_t2"), _lokr, _FIELDS,
    _TRAINING | _SHAPING, shown=("r", "alpha"),
)  # fmt: skip
