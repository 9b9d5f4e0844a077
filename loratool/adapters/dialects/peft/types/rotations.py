"""OFT, BOFT and HRA: an orthogonal matrix on the side of the inputs, W' = W·Rᵀ.

Weights of convolutions are seen as matrices, kernels flattened. Sources: peft/tuners/oft/layer.py
(`OFTRotationModule`), peft/tuners/boft/layer.py and peft/tuners/hra/layer.py (`get_delta_weight`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import partial

import numpy as np

from loratool.adapters.changed import Float64, Rows
from loratool.adapters.dialects.peft.types.method import Made, PeftMethod, PeftModule, Trouble
from loratool.adapters.functions import RowFunction
from loratool.linalg.rotations import butterfly_order, cayley, cayley_series, projected, skew
from loratool.storage.fields import ABSENT, COUNT, FLAG, NUMBER, TEXT

#: The release from which the last term of the series counts once; before, it counted twice.
_HALVED = (0, 18)


def _oft(module: PeftModule) -> Iterable[Made]:
    config = module.config
    if "oft_block_size" not in config:
        text = "the config has no oft_block_size: it is an OFT of PEFT before 0.14, another one"
        raise Trouble("peft-options", text)
    embedding = "oft_embedding_R" in module.tensors
    (info,) = module.need("oft_embedding_R" if embedding else "oft_R")
    module.require(len(info.shape) == 2)
    blocks, elements = info.shape
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    share = bool(config.get("block_share"))
    module.require(size * (size - 1) // 2 == elements and (blocks == 1 or not share))
    terms = config.get("num_cayley_neumann_terms", 5) if _is_series(config) else None
    rotate = partial(
        _rotated, size=size, terms=terms, before=_version(config) < _HALVED, inverse=embedding,
        limit=config.get("eps", 6e-5) if config.get("coft") else None,
    )  # fmt: skip
    yield RowFunction(
        module.path, "OFT", {"R": info}, (0, 0 if share else blocks * size), rotate,
        multiple=size, pointwise=True,
    )  # fmt: skip


def _is_series(config: dict[str, object]) -> bool:
    return bool(config.get("use_cayley_neumann", "peft_version" in config))


def _version(config: dict[str, object]) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _rotated(
    R: Float64,
    *,
    size: int,
    terms: int | None,
    before: bool,
    inverse: bool,
    limit: float | None,
) -> Rows:
    """Rows times Rᵀ, block by block; `inverse` for times R (embeddings are turned as they are)."""
    matrices = skew(R, size)
    if limit is not None:
        matrices = projected(matrices, limit)
    turns = cayley(matrices) if terms is None else cayley_series(matrices, terms, before)
    return partial(_in_blocks, turns if inverse else turns.transpose(0, 2, 1))


def _in_blocks(turns: Float64, first: int, rows: Float64) -> Float64:
    """Each run of columns times its matrix `[b, b]`, or all times the only one."""
    size = turns.shape[-1]
    apart = rows.reshape(len(rows), -1, size).transpose(1, 0, 2)
    turned: Float64 = np.matmul(apart, turns).transpose(1, 0, 2).reshape(rows.shape)
    return turned


def _boft(module: PeftModule) -> Iterable[Made]:
    turns, scales = module.need("boft_R", "boft_s")
    module.require(len(turns.shape) == 4 and turns.shape[2] == turns.shape[3])
    module.require(len(scales.shape) == 2 and 1 in scales.shape)
    stages, blocks, size, _ = turns.shape
    if stages > 1 and (blocks % 2 ** (stages - 1) or size % 2):
        raise Trouble("pair-mismatch", f"boft_R {list(turns.shape)} is no butterfly")
    yield RowFunction(
        module.path, "BOFT", {"R": turns, "s": scales}, (scales.numel, blocks * size), _butterfly
    )


def _butterfly(R: Float64, s: Float64) -> Rows:
    stages, blocks, size, _ = R.shape
    flat = R.reshape(-1, size, size)
    turns = cayley((flat - flat.transpose(0, 2, 1)) / 2).reshape(R.shape).transpose(0, 1, 3, 2)
    orders = [butterfly_order(blocks * size, blocks >> i, size // 2, stages) for i in range(stages)]
    return partial(_through_stages, turns, orders, s.reshape(-1, 1))


def _through_stages(
    turns: Float64, orders: list[np.ndarray], scales: Float64, first: int, rows: Float64
) -> Float64:
    for stage, order in zip(turns, orders, strict=True):
        apart = np.empty_like(rows)
        apart[:, order] = rows
        rows = _in_blocks(stage, 0, apart)[:, order]
    return rows * scales[first : first + len(rows)]


def _hra(module: PeftModule) -> Iterable[Made]:
    (u,) = module.need("hra_u")
    module.require(len(u.shape) == 2)
    rank = module.config.get("r", 8)
    if u.shape[1] != rank:
        raise Trouble("rank-mismatch", f"the config gives {rank:g}, hra_u has {u.shape[1]}")
    orthogonal = bool(module.config.get("apply_GS"))
    reflect = partial(_reflected, orthogonal=orthogonal)
    yield RowFunction(module.path, "HRA", {"u": u}, (0, u.shape[0]), reflect)


def _reflected(u: Float64, *, orthogonal: bool) -> Rows:
    """Householder reflections one after the other; made orthogonal first, with Gram-Schmidt."""
    with np.errstate(divide="ignore", invalid="ignore"):
        vectors: list[Float64] = []
        for column in u.T:
            for other in vectors if orthogonal else ():
                column = column - (other @ column) * other
            vectors.append(column / np.linalg.norm(column))
    return partial(_mirrored, vectors)


def _mirrored(vectors: list[Float64], first: int, rows: Float64) -> Float64:
    mirrored: Float64 = rows.copy()
    for vector in vectors:
        mirrored -= 2 * np.outer(mirrored @ vector, vector)
    return mirrored


OFT = PeftMethod(
    "OFT", "OFT", ("oft_R", "oft_embedding_R"), _oft,
    {
        "r": NUMBER | ABSENT, "oft_block_size": COUNT | ABSENT, "coft": FLAG | ABSENT,
        "eps": NUMBER, "block_share": FLAG | ABSENT, "use_cayley_neumann": FLAG | ABSENT,
        "num_cayley_neumann_terms": COUNT, "peft_version": TEXT | ABSENT,
    },
    frozenset({"module_dropout"}), shown=("r", "oft_block_size", "coft", "block_share"),
)  # fmt: skip
BOFT = PeftMethod(
    "BOFT", "BOFT", ("boft_R", "boft_s"), _boft, {},
    frozenset({"boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout"}),
    shown=("boft_block_size", "boft_block_num", "boft_n_butterfly_factor"),
)  # fmt: skip
HRA = PeftMethod(
    "HRA", "HRA", ("hra_u",), _hra, {"r": NUMBER, "apply_GS": FLAG | ABSENT},
    shown=("r", "apply_GS"),
)  # fmt: skip
