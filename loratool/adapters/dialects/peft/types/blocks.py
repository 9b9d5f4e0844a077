"""MiSS, Bone, GraLoRA and DeLoRA: factors that repeat, lie in blocks, or are normalised.

Sources: peft/tuners/miss/layer.py (Bone, until PEFT 0.18, is the same by another name),
peft/tuners/gralora/layer.py, peft/tuners/delora/layer.py (`get_delta_weight`).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np

from loratool.adapters.changed import Float64, Rows
from loratool.adapters.dialects.peft.types.making import Array, computed_factor, computed_pair
from loratool.adapters.dialects.peft.types.method import Made, PeftMethod, PeftModule, Trouble
from loratool.adapters.functions import RowFunction
from loratool.adapters.told import scaling
from loratool.storage.composed import joined, transposed
from loratool.storage.fields import ABSENT, BOOLEAN, COUNT, NUMBER, TEXT, mapping_to
from loratool.storage.tensors import TensorInfo

_NUMBERS = mapping_to(NUMBER, "a table of numbers") | ABSENT


def _miss(module: PeftModule) -> Iterable[Made]:
    return _shards(module, "miss_block", "MiSS")


def _bone(module: PeftModule) -> Iterable[Made]:
    return _shards(module, "bone_block", "Bone")


def _shards(module: PeftModule, slot: str, method: str) -> Iterable[Made]:
    """`block [r, out]` is added to every r columns of the weight."""
    (block,) = module.need(slot)
    kind = module.config.get("init_weights", True)
    if kind == "bat":
        module.require(len(block.shape) == 3 and block.shape[1] == block.shape[2])
        count, size, _ = block.shape
        yield RowFunction(
            module.path, f"{method} (bat)", {"block": block}, (count * size, 0), _block_affine,
            multiple=size,
        )  # fmt: skip
        return
    module.require(len(block.shape) == 2)
    mini = kind == "mini"
    out, width = module.size((0 if mini else block.shape[1], 0))
    module.require(out % block.shape[1] == 0 and block.shape[0] <= width)
    b = transposed(block)
    if mini:
        b = joined(b.name, (out, block.shape[0]), [b] * (out // block.shape[1]))
    a = computed_factor(
        f"1 of {block.name}, {width} wide", (block.shape[0], width), [block], partial(_tiled, width)
    )
    yield computed_pair(module, method, b, a, module.scaled())


def _tiled(width: int, block: Array) -> Array:
    """Unit matrices side by side, the last one cut."""
    tiled: Array = np.equal(np.arange(len(block))[:, None], np.arange(width) % len(block)) * 1.0
    return tiled


def _block_affine(block: Float64) -> Rows:
    return partial(_affine_rows, block)


def _affine_rows(block: Float64, first: int, rows: Float64) -> Float64:
    """W + W·M + M in blocks `[r, r]` of W, of which those of the same rows share M."""
    size = block.shape[1]
    changed: Float64 = rows.copy()
    numbers = np.arange(first, first + len(rows))
    for which in np.unique(numbers // size):
        own = numbers // size == which
        apart = rows[own].reshape(own.sum(), -1, size)
        added = apart @ block[which] + block[which][numbers[own] % size][:, None, :]
        changed[own] += added.reshape(own.sum(), -1)
    return changed


def _gralora(module: PeftModule) -> Iterable[Made]:
    config = module.config
    a, b = module.need("gralora_A", "gralora_B")
    module.require(len(a.shape) == len(b.shape) == 3 and a.shape[0] == b.shape[0])
    count, wide, rank = a.shape
    given, more = config.get("r", 32), config.get("hybrid_r", 0)
    module.require(b.shape[1] == rank and rank % count == 0)
    if rank != given:
        raise Trouble("rank-mismatch", f"the config gives {given}, gralora_A has {rank}")
    out, width, whole = count * b.shape[2], count * wide, count * rank
    scaled = scaling(
        module.adapter.told, given + more, alpha=config.get("alpha", 64), where=module.path
    )
    left: list[TensorInfo] = [b]
    right: list[TensorInfo] = [a]
    if more:
        general_a, general_b = module.need("gralora_A_general", "gralora_B_general")
        module.require(general_a.shape == (more, width) and general_b.shape == (out, more))
        left.append(general_b)
        right.append(general_a)
    left_factor = computed_factor(f"{b.name} apart", (out, whole + more), left, _blocks_down)
    right_factor = computed_factor(f"{a.name} apart", (whole + more, width), right, _blocks_across)
    yield computed_pair(module, "GraLoRA", left_factor, right_factor, scaled)


def _blocks_down(b: Array, *general: Array) -> Array:
    """`[k, r, out/k]` -> `[out, k·r]`: block m of the rows has its own r columns."""
    count, rank, height = b.shape
    whole = np.zeros((count, height, count, rank))
    for m in range(count):
        whole[m, :, m] = b[m].T
    return np.concatenate([whole.reshape(count * height, -1), *general], axis=1)


def _blocks_across(a: Array, *general: Array) -> Array:
    """`[k, in/k, r]` -> `[k·r, in]`: r/k of the r rows of block m are for each run of columns."""
    count, width, rank = a.shape
    part = rank // count
    whole = np.zeros((count, count, part, count, width))
    for m in range(count):
        for n in range(count):
            whole[m, n, :, n] = a[n][:, m * part : (m + 1) * part].T
    return np.concatenate([whole.reshape(count * rank, -1), *general])


def _delora(module: PeftModule) -> Iterable[Made]:
    b, a, strength, norms = module.need("delora_B", "delora_A", "delora_lambda", "delora_w_norm")
    module.require(len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1])
    module.require(strength.numel == 1 and norms.shape == a.shape[1:])
    b = computed_factor(f"λ/(r·norms) · {b.name}", b.shape, [b, a, strength], _normalised)
    a = computed_factor(f"{a.name} · ‖W‖", a.shape, [a, norms], _times)
    yield computed_pair(module, "DeLoRA", b, a, module.scaled())


def _normalised(b: Array, a: Array, strength: Array) -> Array:
    # PEFT keeps norms from being smaller than this.
    lengths = [np.maximum(np.linalg.norm(x, axis=axis), 1e-4) for x, axis in ((a, 1), (b, 0))]
    normalised: Array = b * (strength / len(a) / (lengths[0] * lengths[1]))
    return normalised


def _times(a: Array, norms: Array) -> Array:
    return a * norms


MISS = PeftMethod(
    "MISS", "MiSS", ("miss_block",), _miss, {"init_weights": BOOLEAN | TEXT | ABSENT},
    frozenset({"r", "miss_dropout", "mini_r"}), shown=("r", "mini_r", "init_weights"),
)  # fmt: skip
BONE = PeftMethod(
    "BONE", "Bone", ("bone_block",), _bone, {"init_weights": BOOLEAN | TEXT | ABSENT},
    frozenset({"r"}), shown=("r", "init_weights"),
)  # fmt: skip
GRALORA = PeftMethod(
    "GRALORA", "GraLoRA", ("gralora_[AB](?:_general)?",), _gralora,
    {"r": COUNT, "hybrid_r": COUNT, "alpha": NUMBER},
    frozenset({"gralora_dropout", "gralora_k"}), shown=("r", "hybrid_r", "alpha", "gralora_k"),
)  # fmt: skip
DELORA = PeftMethod(
    "DELORA", "DeLoRA", ("delora_[AB]", "delora_lambda", "delora_w_norm"), _delora,
    {"r": NUMBER, "rank_pattern": _NUMBERS},
    frozenset({"delora_lambda", "lambda_pattern", "module_dropout"}), shown=("r", "delora_lambda"),
)  # fmt: skip
