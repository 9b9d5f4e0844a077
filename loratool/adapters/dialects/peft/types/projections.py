"""VeRA, PVeRA and RandLoRA: scaled random matrices that all modules share.

A and B are as large as the largest weights need, and each module takes the first rows and columns.
They lie in the file or are drawn from a seed; either way the base tells how large weights are.
Sources: peft/tuners/vera, peft/tuners/pvera, peft/tuners/randlora (model.py, layer.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache, partial

from loratool.adapters.dialects.peft.types.making import (
    Array,
    computed_factor,
    computed_pair,
    drawn,
)
from loratool.adapters.dialects.peft.types.method import Made, PeftMethod, PeftModule, Trouble
from loratool.adapters.dialects.peft.types.sizes import Size
from loratool.storage.composed import row_range, view
from loratool.storage.fields import ABSENT, COUNT, FLAG

_FIELDS = {"r": COUNT, "save_projection": FLAG | ABSENT, "projection_prng_key": COUNT}


def _vera(module: PeftModule) -> Iterable[Made]:
    return _scaled(module, "vera", "VeRA", 1)


def _pvera(module: PeftModule) -> Iterable[Made]:
    if module.config.get("sample_at_inference"):
        raise Trouble("peft-options", "sample_at_inference is set: it draws anew for each input")
    # Of A and lambda_d the first half are means; the rest are variances, for training.
    return _scaled(module, "pvera", "PVeRA", 2)


def _scaled(module: PeftModule, name: str, method: str, halves: int) -> Iterable[Made]:
    """Δ = diag(λ_b)·B·diag(λ_d)·A."""
    of_rows, of_rank = module.need(f"{name}_lambda_b", f"{name}_lambda_d")
    module.require(len(of_rows.shape) == len(of_rank.shape) == 1)
    rank = module.config.get("r", 256)
    if of_rank.numel != rank * halves:
        given = f"the config gives {rank}, {name}_lambda_d has {of_rank.numel}"
        raise Trouble("rank-mismatch", given)
    known = {
        path: (tensors[f"{name}_lambda_b"].numel, 0)
        for path, tensors in module.contents.modules.items()
        if f"{name}_lambda_b" in tensors
    }
    out, out_wide = of_rows.numel, max(size[0] for size in known.values())
    told = _is_saved(module) and module.contents.base is None
    sizes = {} if told else module.contents.sizes(known)
    in_wide = max((size[1] for size in sizes.values()), default=0)
    if _is_saved(module):
        a, b = module.need_shared(f"{name}_A", f"{name}_B")
        in_wide = a.shape[1] if len(a.shape) == 2 else 0
        wide = a.shape == (rank * halves, in_wide) and len(b.shape) == 2 and b.shape[1] == rank
        if not (wide and b.shape[0] >= out):
            text = f"{name}_A {list(a.shape)}, {name}_B {list(b.shape)}, {out} rows"
            raise Trouble("pair-mismatch", text)
    else:
        key = module.config.get("projection_prng_key", 0)
        shapes = (rank * halves, in_wide), (out_wide, rank)
        a, b = drawn(f"{name} {key}", of_rows, shapes, partial(_uniform, key, *shapes))
    width = sizes[module.path][1] if sizes else in_wide
    if width > in_wide:
        raise Trouble("pair-mismatch", f"{name}_A has {in_wide} columns, the weight {width}")
    a = view(a, (rank, width), 0, (in_wide, 1))
    half = view(of_rank, (rank,), 0, None)
    rows = row_range(b, range(out))
    b = computed_factor(f"λ_b · {name}_B", (out, rank), [of_rows, rows], _rows_times)
    a = computed_factor(f"λ_d · {name}_A", (rank, width), [half, a], _rows_times)
    yield computed_pair(module, method, b, a, module.scaled())
    if not sizes:
        raise Trouble("needs-base", f"{name}_A is as wide as the widest weight, {in_wide}")


def _rows_times(factors: Array, matrix: Array) -> Array:
    return factors[:, None] * matrix


def _is_saved(module: PeftModule) -> bool:
    return bool(module.config.get("save_projection", True))


@lru_cache(1)
def _uniform(key: int, a: Size, b: Size) -> tuple[Array, Array]:
    """What PEFT draws for A and B, in this order, on a CPU (`_kaiming_init`)."""
    import torch

    generator = torch.Generator(device="cpu").manual_seed(key)
    found = []
    for shape in (a, b):
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
        found.append(torch.empty(shape).uniform_(-bound, bound, generator=generator).numpy())
    return found[0], found[1]


VERA = PeftMethod(
    "VERA", "VeRA", ("vera_lambda_[bd]", "vera_[AB]"), _vera, _FIELDS,
    frozenset({"vera_dropout", "d_initial"}), shown=("r", "save_projection", "projection_prng_key"),
)  # fmt: skip
PVERA = PeftMethod(
    "PVERA", "PVeRA", ("pvera_lambda_[bd]", "pvera_[AB]"), _pvera,
    {**_FIELDS, "sample_at_inference": FLAG | ABSENT},
    frozenset({"pvera_dropout", "d_initial", "generator_seed"}),
    shown=("r", "save_projection", "projection_prng_key"),
)  # fmt: skip
