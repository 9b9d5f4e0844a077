"""DEFT, FRoD, OSF and PEANuT: changes that are made of the weight as a whole.

Sources: peft/tuners/deft/layer.py, peft/tuners/frod/layer.py (and `_category_from_key` in
model.py), peft/tuners/osf/layer.py, peft/tuners/peanut/layer.py (`get_delta_weight`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from loratool.adapters.changed import Float64, Rows
from loratool.adapters.dialects.peft.types.making import places_within
from loratool.adapters.dialects.peft.types.method import Made, PeftMethod, PeftModule, Trouble
from loratool.adapters.functions import RowFunction
from loratool.storage.fields import ABSENT, COUNT, FLAG, NUMBER, TEXT, value_text


def _deft(module: PeftModule) -> Iterable[Made]:
    """W - Q·(rightᵀ·W), and Q·R added to it unless it is `para`."""
    config = module.config
    (p,) = module.need("deft_P")
    module.require(len(p.shape) == 2)
    out, rank = p.shape
    given, method = config.get("r", 8), config.get("decomposition_method", "relu")
    if rank != min(given, out):
        raise Trouble("rank-mismatch", f"the config gives {given}, deft_P has {rank}")
    if method not in ("relu", "qr"):
        text = f"decomposition_method {value_text(method)} is not known"
        raise Trouble("peft-options", text)
    parts, width = {"P": p}, 0
    if not config.get("para"):
        (parts["R"],) = module.need("deft_R")
        module.require(len(parts["R"].shape) == 2 and parts["R"].shape[0] == rank)
        width = parts["R"].shape[1]
    scale = config["alpha"] / rank if config.get("alpha") else 1.0
    orthogonal = method == "qr"
    yield RowFunction(
        module.path, "DEFT", parts, (out, width), partial(_decomposed, orthogonal, scale),
        gather=partial(_projected, orthogonal),
    )  # fmt: skip


def _sides(orthogonal: bool, p: Float64) -> tuple[Float64, Float64]:
    if orthogonal:
        q = np.linalg.qr(p)[0]
        return q, q
    return p, np.maximum(p, 0)


def _projected(orthogonal: bool, P: Float64, R: Float64 | None = None) -> Rows:
    right = _sides(orthogonal, P)[1]
    return lambda first, rows: right[first : first + len(rows)].T @ rows


def _decomposed(
    orthogonal: bool, scale: float, gathered: Float64, P: Float64, R: Float64 | None = None
) -> Rows:
    left = _sides(orthogonal, P)[0]
    factor = -gathered if R is None else R * scale - gathered
    return lambda first, rows: rows + left[first : first + len(rows)] @ factor


def _frod(module: PeftModule) -> Iterable[Made]:
    """U·(S + diag(l))·Vᵀ, with U the columns of W·V⁻ᵀ, each of length 1."""
    values, diagonal = module.need("frod_lambda_s_values", "frod_lambda_l")
    category = _category(module.path)
    if not module.config.get("save_projection", True):
        text = "its projections are not in the file (save_projection); PEFT decomposes all weights"
        raise Trouble("peft-options", text)
    v, places = module.need_shared(f"frod_V.{category}", f"frod_s_indices.{category}")
    width = v.shape[0] if len(v.shape) == 2 else 0
    fits = v.shape == (width, width) and places.shape == (2, values.numel)
    if not fits or diagonal.shape != (width,) or places.is_float:
        shapes = f"frod_V {list(v.shape)}, frod_s_indices {list(places.shape)}"
        raise Trouble("pair-mismatch", f"{shapes}, frod_lambda_l {list(diagonal.shape)}")
    parts = {"V": v, "places": places, "values": values, "diagonal": diagonal}
    yield RowFunction(module.path, "FRoD", parts, (0, width), _recomposed, gather=_lengths)


def _category(path: str) -> str:
    """The name by which PEFT calls the weights that share a V."""
    names = path.split(".")
    if len(names) == 1 or names[-2].isdigit():
        return names[-1]
    if names[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return "_".join(names[-2:])


def _lengths(V: Float64, **_: Float64) -> Rows:
    inverse = np.linalg.inv(V).T
    return lambda first, rows: np.sum((rows @ inverse) ** 2, axis=0)


def _recomposed(
    gathered: Float64, V: Float64, places: Float64, values: Float64, diagonal: Float64
) -> Rows:
    lengths = np.sqrt(gathered)
    inverse = np.linalg.inv(V).T
    inverse = np.where(lengths > 1e-12, inverse / np.maximum(lengths, 1e-12), 0)
    middle = np.diag(diagonal)
    np.add.at(middle, tuple(places_within(places, len(middle), "frod_s_indices")), values)
    right = inverse @ middle @ V.T
    return lambda first, rows: rows @ right


def _osf(module: PeftModule) -> Iterable[Made]:
    """The largest singular directions of W as they are, and trained ones in place of the others."""
    slots = [f"osf_svd_params.{name}" for name in ("U_low", "S_low", "V_low")]
    u, s, v = module.need(*slots)
    module.require(len(u.shape) == len(v.shape) == 2 and len(s.shape) == 1)
    module.require(u.shape[1] == v.shape[0] == s.numel)
    shape = u.shape[0], v.shape[1]
    module.require(s.numel <= min(shape))
    yield RowFunction(module.path, "OSF", {"U": u, "S": s, "V": v}, shape, _lower_part, step=0)


def _lower_part(U: Float64, S: Float64, V: Float64) -> Rows:
    def rows_of(first: int, rows: Float64) -> Float64:
        kept = min(rows.shape) - len(S)
        left, values, right = np.linalg.svd(rows, full_matrices=False)
        upper: Float64 = left[:, :kept] * values[:kept] @ right[:kept]
        return upper + U * S @ V

    return rows_of


#: Activations of transformers' ACT2FN, by name.
_ACTIVATIONS: dict[str, Callable[[Float64], Float64]] = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "swish": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf, [float])(x / math.sqrt(2))) / 2,
}


def _peanut(module: PeftModule) -> Iterable[Made]:
    """W + s·f(Wᵀ)ᵀ, with a small network f on what belongs to each input."""
    config = module.config
    a, b = module.need("peanut_A", "peanut_B")
    depth, name = config.get("depth", 0), config.get("act_fn", "relu")
    if name not in _ACTIVATIONS:
        raise Trouble("peft-options", f"act_fn {value_text(name)} is not known")
    inner = [f"peanut_{part}.{i}" for part in ("encoders", "decoders") for i in range(depth)]
    parts = {"A": a, "B": b}
    for slot, info in zip(inner, module.need(*inner), strict=True):
        parts[slot.replace(".", "_")] = info
    out, rank = (*b.shape, 0)[:2]
    module.require(len(b.shape) == 2 and a.shape == (rank, out))
    module.require(all(parts[slot.replace(".", "_")].shape == (rank, rank) for slot in inner))
    network = partial(_network, name, depth, config.get("scaling", 1.0))
    yield RowFunction(module.path, "PEANuT", parts, (out, 0), network, step=0)


def _network(name: str, depth: int, scale: float, **parts: Float64) -> Rows:
    activation = _ACTIVATIONS[name]

    def rows_of(first: int, rows: Float64) -> Float64:
        found = activation(rows.T @ parts["A"].T)
        residuals = []
        for i in range(depth):
            residuals.append(found)
            found = activation(found @ parts[f"peanut_encoders_{i}"].T)
        for i in range(depth):
            found = activation(found @ parts[f"peanut_decoders_{i}"].T) + residuals.pop()
        changed: Float64 = rows + scale * (found @ parts["B"].T).T
        return changed

    return rows_of


DEFT = PeftMethod(
    "DEFT", "DEFT", ("deft_[PR]",), _deft,
    {
        "r": COUNT, "alpha": NUMBER | ABSENT, "para": FLAG | ABSENT,
        "decomposition_method": TEXT | ABSENT,
    },
    frozenset({"init_scale", "deft_dropout"}), shown=("r", "alpha", "decomposition_method", "para"),
)  # fmt: skip
FROD = PeftMethod(
    "FROD", "FRoD", ("frod_lambda_l", "frod_lambda_s_values", "frod_V", "frod_s_indices",
    "frod_s_size"), _frod, {"save_projection": FLAG | ABSENT},
    frozenset({
        "projection_prng_key", "frod_dropout", "sparse_rate", "regularization_alpha", "progressbar",
        "runtime_offload_base_weight",
    }), shown=("sparse_rate",), rest=r"(?:\.[^.]+)?",
)  # fmt: skip
OSF = PeftMethod(
    "OSF", "OSF", ("osf_svd_params",), _osf, {},
    frozenset({"effective_rank", "rank_pattern", "target_svd_config"}), shown=("effective_rank",),
    rest=r"\.[USV]_low",
)  # fmt: skip
PEANUT = PeftMethod(
    "PEANUT", "PEANuT", ("peanut_[AB]", "peanut_encoders", "peanut_decoders"), _peanut,
    {"depth": COUNT, "act_fn": TEXT, "scaling": NUMBER}, frozenset({"r"}),
    shown=("r", "depth", "act_fn", "scaling"), rest=r"(?:\.\d+)?",
)  # fmt: skip
