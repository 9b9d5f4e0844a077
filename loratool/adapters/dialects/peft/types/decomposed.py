"""OSF, PSOFT and FRoD: a weight is taken apart, and what was trained takes the place of a part.

PEFT makes the parts anew from the base when it loads an adapter, in float32 and on the CPU where
the model is there, and so they are made here. Sources: peft/tuners/osf (layer.py, utils.py),
peft/tuners/psoft/layer.py, peft/tuners/frod (layer.py, model.py).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import partial

import numpy as np

from loratool.adapters.changed import Float64, Rows
from loratool.adapters.dialects.peft.types.making import places_within
from loratool.adapters.dialects.peft.types.method import Made, PeftMethod, PeftModule, Trouble
from loratool.adapters.functions import RowFunction
from loratool.errors import AdapterError, ValueRangeError
from loratool.linalg.rotations import cayley, cayley_series, skew
from loratool.storage.fields import ABSENT, COUNT, FLAG, NUMBER, FieldType
from loratool.storage.tensors import as_bytes, as_float32
from loratool.words import counted

#: U, Σ and Vᵀ.
_Decomposition = tuple[Float64, Float64, Float64]

#: What lies nearer together than this share of the largest singular value, no float32
#: decomposition tells apart.
_RESOLVED = 4 * 2.0**-23

#: torch.svd_lowrank draws from the generator that all threads share.
_DRAWING = threading.Lock()


def _osf(module: PeftModule) -> Iterable[Made]:
    """W' = W + U·Σ·Vᵀ - U₀·Σ₀·V₀ᵀ, where U₀, Σ₀, V₀ are those of the smallest singular values."""
    names = [f"osf_svd_params.{part}_low" for part in "USV"]
    u, s, v = module.need(*names)
    module.require(len(u.shape) == len(v.shape) == 2 and len(s.shape) == 1)
    module.require(u.shape[1] == s.numel == v.shape[0])
    shape = u.shape[0], v.shape[1]
    if s.numel > min(shape):
        text = f"{s.numel} singular values of a weight {list(shape)}, which has {min(shape)}"
        raise Trouble("pair-mismatch", text)
    parts = dict(zip("USV", (u, s, v), strict=True))
    lower = partial(_lower_part_replaced, path=module.path)
    yield RowFunction(module.path, "OSF", parts, shape, lower, step=0, rounds=True)


def _lower_part_replaced(U: Float64, S: Float64, V: Float64, *, path: str, dtype: str) -> Rows:
    def made(first: int, rows: Float64) -> Float64:
        found = _singular(rows, path)
        upper = len(found[1]) - len(S)
        _refuse_undetermined(found[1], upper, path)
        u, s, v = (
            _rounded(part, dtype)
            for part in (found[0][:, upper:], found[1][upper:], found[2][upper:])
        )
        changed: Float64 = rows + ((U * S) @ V - (u * s) @ v)
        return changed

    return made


def _psoft(module: PeftModule) -> Iterable[Made]:
    """W' = W + U·√Σ…(R - 1)…√Σ·Vᵀ, with the r largest singular values on one side or both.

    Whatever alpha is, PEFT divides the singular values by the scale and multiplies with it.
    """
    config = module.config
    rank = config.get("r", 32)
    if config.get("psoft_alpha", 32) <= 0 or rank < 1:
        raise Trouble("peft-options", "psoft_alpha or r is not above zero, which PSOFT divides by")
    free = not config.get("psoft_orth", True)
    parts = {"R": module.need("psoft_R")[0]}
    size = rank * rank if free else rank * (rank - 1) // 2
    for side in "ab":
        if config.get(f"psoft_mag_{side}", True):
            parts[side] = module.need(f"psoft_R.vector_{side}")[0]
    given = ", ".join(f"{name} {list(t.shape)}" for name, t in parts.items())
    if parts["R"].shape != ((rank, rank) if free else (size,)):
        raise Trouble("rank-mismatch", f"the config gives {rank}, psoft_R has {given}")
    module.require(all(parts[side].shape == (rank,) for side in "ab" if side in parts))
    terms = config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann") else None
    lowrank = config.get("psoft_svd", "full") == "lowrank"
    turn = partial(
        _subspace_turned, rank=rank, free=free, terms=terms, path=module.path,
        limit=config.get("cayley_neumann_eps"),
        both=config.get("ab_svd_init", "psoft_init") == "pissa_init",
        drawn=(config.get("random_seed", 0), config.get("psoft_svd_lowrank_niter", 10))
        if lowrank else None,
    )  # fmt: skip
    yield RowFunction(module.path, "PSOFT", parts, (0, 0), turn, step=0)


def _subspace_turned(
    R: Float64,
    a: Float64 | None = None,
    b: Float64 | None = None,
    *,
    rank: int,
    free: bool,
    terms: int | None,
    limit: float | None,
    both: bool,
    drawn: tuple[int, int] | None,
    path: str,
) -> Rows:
    turn = R if free else _turn(skew(R.reshape(1, -1), rank)[0], terms, limit)
    turn = turn if b is None else b[:, None] * turn
    turn = turn if a is None else turn * a[None, :]
    turn = turn - np.eye(rank)

    def made(first: int, rows: Float64) -> Float64:
        if rank > min(rows.shape):
            raise AdapterError(
                f"{path}: PSOFT of rank {rank}, and its weight is {list(rows.shape)}.",
                "Is this the base that it was trained on?",
            )
        u, s, v = _singular(rows, path, rank, drawn)
        left, right = (np.sqrt(s), np.sqrt(s)) if both else (s, np.ones_like(s))
        changed: Float64 = rows + (u * left) @ turn @ (right[:, None] * v)
        return changed

    return made


def _turn(generator: Float64, terms: int | None, limit: float | None) -> Float64:
    if terms is None:
        exact: Float64 = cayley(-generator[None])[0]
        return exact
    norm = np.linalg.norm(generator)
    if limit is not None and np.isfinite(norm) and norm > limit:
        generator = generator * (limit / (norm + 1e-12))
    series: Float64 = cayley_series(generator[None], terms, last_whole=False)[0]
    return series


def _frod(module: PeftModule) -> Iterable[Made]:
    """W' = U(S + diag(λ))Vᵀ, where V is shared, and the base's weight gives U: W = U·diag(·)·Vᵀ."""
    values, diagonal = module.need("frod_lambda_s_values", "frod_lambda_l")
    if not module.config.get("save_projection", True):
        text = (
            "save_projection is false: V and the places of λ_s are computed from all layers of the "
            "base. Load the adapter with PEFT, set save_projection in its config, and save it"
        )
        raise Trouble("peft-options", text)
    kind = _category(module.path)
    v, places = module.need_shared(f"frod_V.{kind}", f"frod_s_indices.{kind}")
    width = diagonal.numel
    shapes = v.shape == (width, width) and places.shape == (2, values.numel)
    if not (shapes and places.dtype in ("I64", "I32") and len(values.shape) == 1):
        text = f"frod_V {list(v.shape)}, frod_s_indices {places.dtype} {list(places.shape)}, "
        text += f"{values.numel} values, {width} on the diagonal"
        raise Trouble("pair-mismatch", text)
    parts = {"V": v, "places": places, "values": values, "diagonal": diagonal}
    compose = partial(_recomposed, path=module.path)
    yield RowFunction(
        module.path, "FRoD", parts, (0, width), partial(compose, turned=False),
        partial(compose, turned=True), step=0, rounds=True,
    )  # fmt: skip


def _category(path: str) -> str:
    """What modules share V: those of the same role in all layers (`_category_from_key`)."""
    parts = path.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def _recomposed(
    V: Float64,
    places: np.ndarray,
    values: Float64,
    diagonal: Float64,
    *,
    path: str,
    dtype: str,
    turned: bool,
) -> Rows:
    middle = np.diag(diagonal)
    np.add.at(middle, tuple(places_within(places, len(V), "frod_s_indices")), values)

    def made(first: int, rows: Float64) -> Float64:
        weight = _finite(rows.T if turned else rows, path)
        try:
            scaled = np.linalg.solve(V, weight.T).T
        except np.linalg.LinAlgError:
            scaled = weight @ np.linalg.pinv(V, rcond=1e-6).T
        lengths = np.linalg.norm(scaled, axis=0)
        unit = np.divide(scaled, lengths, out=np.zeros_like(scaled), where=lengths > 1e-12)
        changed: Float64 = _rounded(unit, dtype) @ (middle @ V.T)
        return changed.T if turned else changed

    return made


def _singular(
    rows: Float64, path: str, rank: int | None = None, drawn: tuple[int, int] | None = None
) -> _Decomposition:
    """The singular values of a weight and their vectors, as torch finds them in float32.

    The signs of vectors are those that PEFT works with, which they depend on. `drawn` is the seed
    and the number of iterations of a search for `rank` of them that starts with random numbers.
    """
    import torch

    weight = torch.from_numpy(_finite(rows, path).astype(np.float32))
    if drawn is None:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
    else:
        assert rank is not None
        with _DRAWING, torch.random.fork_rng(devices=[]):
            torch.manual_seed(drawn[0])
            u, s, columns = torch.svd_lowrank(weight, q=rank, niter=drawn[1])
        v = columns.T
    found = (u[:, :rank], s[:rank], v[:rank])
    wide_u, wide_s, wide_v = (part.numpy().astype(np.float64) for part in found)
    return wide_u, wide_s, wide_v


def _finite(weight: Float64, path: str) -> Float64:
    broken = int(np.count_nonzero(~np.isfinite(weight)))
    if broken:
        raise ValueRangeError(
            f"{path}: {counted(broken, 'value', 'is')} NaN or infinite before anything is changed.",
            "The base is damaged. Nothing was written.",
        )
    return weight


def _refuse_undetermined(values: Float64, upper: int, path: str) -> None:
    """Raise ValueRangeError where the parts above and below the first `upper` are chance."""
    if 0 < upper < len(values):
        last, following = values[upper - 1], values[upper]
        if last - following < _RESOLVED * values[0] and following > _RESOLVED * values[0]:
            raise ValueRangeError(
                f"{path}: singular values {upper} and {upper + 1} of its weight are as good as "
                f"equal ({last:.7g} and {following:.7g}), so which part OSF trained is chance.",
                "Merge it with PEFT where it was trained.",
            )


def _rounded(values: Float64, dtype: str) -> Float64:
    """As PEFT keeps what it made: in the dtype of the weight."""
    if dtype == "F64":
        return values
    raw = as_bytes(values.astype(np.float32), dtype)
    return as_float32(raw, dtype).astype(np.float64).reshape(values.shape)


def _one_of(*words: str) -> FieldType:
    return FieldType(f"one of {', '.join(words)}", lambda v: v in words)


OSF = PeftMethod(
    # How many singular values are trained shows in the shapes.
    "OSF", "OSF", ("osf_svd_params",), _osf, {},
    frozenset({"effective_rank", "rank_pattern", "target_svd_config"}), rest=r"\.[USV]_low",
    shown=("effective_rank",),
)  # fmt: skip
PSOFT = PeftMethod(
    "PSOFT", "PSOFT", ("psoft_R",), _psoft,
    {
        "r": COUNT, "psoft_alpha": NUMBER, "psoft_orth": FLAG, "psoft_mag_a": FLAG,
        "psoft_mag_b": FLAG, "use_cayley_neumann": FLAG | ABSENT,
        "num_cayley_neumann_terms": COUNT, "cayley_neumann_eps": NUMBER | ABSENT,
        "ab_svd_init": _one_of("psoft_init", "pissa_init"), "random_seed": COUNT,
        "psoft_svd": _one_of("full", "lowrank"), "psoft_svd_lowrank_niter": COUNT,
    },
    frozenset({"psoft_dropout"}), rest=r"(?:\.vector_[ab])?", shown=("r", "psoft_orth"),
    warnings={
        "signs-of-base": "PSOFT turns singular vectors of the base's weights, whose signs no file "
        "holds. They are found here as PEFT finds them on a CPU; a GPU may find others. If the "
        "model was on one when the adapter was made, compare this merge with PEFT's there.",
    },
)  # fmt: skip
FROD = PeftMethod(
    "FROD", "FRoD",
    ("frod_lambda_l", "frod_lambda_s_values", r"frod_(?:V|s_indices|s_size)\.[^.]+"), _frod,
    {"save_projection": FLAG | ABSENT},
    frozenset({"frod_dropout", "projection_prng_key", "sparse_rate", "regularization_alpha",
               "progressbar", "runtime_offload_base_weight"}),
    shown=("sparse_rate", "save_projection"),
)  # fmt: skip
