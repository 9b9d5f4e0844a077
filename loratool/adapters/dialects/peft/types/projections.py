"""VeRA, PVeRA and RandLoRA: scaled random matrices that all modules share.

A and B are as large as the largest weights need, and each module takes the first rows and columns.
They lie in the file or are drawn from a seed; either way the base tells how large weights are.
Sources: peft/tuners/vera, peft/tuners/pvera, peft/tuners/randlora (model.py, layer.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache, partial

import numpy as np

from loratool.adapters.dialects.peft.types.making import (
    Array,
    Numbers,
    computed_factor,
    computed_pair,
    drawn,
    structured,
)
from loratool.adapters.dialects.peft.types.method import Made, PeftMethod, PeftModule, Trouble
from loratool.adapters.dialects.peft.types.sizes import Size
from loratool.adapters.factors import Matrix, Part
from loratool.adapters.told import scaling
from loratool.linalg.reproducible import reproducible_product
from loratool.storage.composed import row_range, view
from loratool.storage.fields import ABSENT, COUNT, FLAG, NUMBER

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


def _randlora(module: PeftModule) -> Iterable[Made]:
    """Bases Bₙ times rows of A, scaled by λ and γ; transposed where the weight is wide."""
    lambdas, gammas = module.need("randlora_lambda", "randlora_gamma")
    module.require(len(lambdas.shape) == len(gammas.shape) == 2)
    (rank, bases), smaller = lambdas.shape, gammas.shape[1]
    module.require(gammas.shape[0] == bases)
    given = module.config.get("r", 32)
    if rank != given:
        raise Trouble("rank-mismatch", f"the config gives {given}, randlora_lambda has {rank}")
    out, width = module.size()
    low, high = sorted((out, width))
    module.require(smaller == low and bases == -(-low // rank))
    sizes = module.contents.sizes({}).values()
    largest = max(size[0] for size in sizes), max(size[1] for size in sizes)
    if _is_saved(module):
        a, b = module.need_shared("randlora_A", "randlora_B")
        fits = a.shape[:2] == (rank, 1) and len(a.shape) == len(b.shape) == 3
        if not (fits and b.shape[2] == rank and a.shape[2] >= low and b.shape[0] >= high
                and b.shape[1] >= bases):  # fmt: skip
            text = f"randlora_A {list(a.shape)}, randlora_B {list(b.shape)}, weight {out}×{width}"
            raise Trouble("pair-mismatch", text)
    else:
        config = module.config
        key = config.get("projection_prng_key", 0)
        sparsity = math.sqrt(min(largest)) if config.get("very_sparse") else 3.0
        sparsity = sparsity if config.get("very_sparse") or config.get("sparse") else 0.0
        shapes = (rank, 1, min(largest)), (max(largest), -(-min(largest) // rank), rank)
        draw = partial(_random_bases, key, rank, largest, sparsity)
        a, b = drawn(f"randlora {key} {sparsity}", lambdas, shapes, draw)
    scaled = scaling(
        module.adapter.told, rank, alpha=module.config.get("randlora_alpha", 640),
        where=module.path,
    )  # fmt: skip
    parts = {"A": a, "B": b, "lambdas": lambdas, "gammas": gammas}
    load = partial(_sum_of_bases, (out, width))
    yield structured(module, "RandLoRA", (out, width), parts, load, low, scaled)


def _sum_of_bases(shape: Size, A: Array, B: Array, lambdas: Array, gammas: Array) -> Part:
    low, high = sorted(shape)
    bases = lambdas.shape[1]
    # As PEFT pairs them: the rows of A, scaled for each of the bases, are in the order of ranks,
    # B's columns in that of bases.
    right = (A[:, :, :low] * lambdas[:, :, None] * gammas).reshape(-1, low)
    left = B[:high, :bases].reshape(high, -1)
    factors = (left, right) if low == shape[1] else (right.T, left.T)

    def part(rows: slice | Numbers, columns: slice) -> Matrix:
        return reproducible_product(factors[0][rows], factors[1][:, columns]).astype(np.float32)

    return part


@lru_cache(1)
def _random_bases(key: int, rank: int, largest: Size, sparsity: float) -> tuple[Array, Array]:
    """What PEFT draws for A and B on a CPU (`_init_randlora_A_randlora_B` and `…_sparse`)."""
    import torch

    generator = torch.Generator(device="cpu").manual_seed(key)
    low, high = sorted(largest)
    count = -(-low // rank)
    if sparsity:
        shapes = (rank, 1, low), (high, count, rank)
        found = [torch.rand(shape, generator=generator) for shape in shapes]
        edge = 1 / (2 * sparsity)
        found = [(x > 1 - edge).float() - (x < edge).float() for x in found]
    else:
        parts = [
            torch.nn.init.kaiming_uniform_(
                torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=generator
            )
            for shape in [(rank, 1, low), *[(high, 1, rank)] * count]
        ]
        found = [parts[0], torch.cat(parts[1:], dim=1)]
    a, b = ((x / x.std()).float().numpy() for x in found)
    return a, b


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
RANDLORA = PeftMethod(
    "RANDLORA", "RandLoRA", ("randlora_lambda", "randlora_gamma", "randlora_[AB]"), _randlora,
    {**_FIELDS, "randlora_alpha": NUMBER, "sparse": FLAG | ABSENT, "very_sparse": FLAG | ABSENT},
    frozenset({"randlora_dropout"}),
    shown=("r", "randlora_alpha", "save_projection", "projection_prng_key"),
)  # fmt: skip
