"""HiRA and GLoRA: each element of a weight times one of a matrix of low rank, and more added.

Sources: peft/tuners/hira/layer.py (`_merge`), peft/tuners/glora/layer.py (`merge`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial

from loratool.adapters.changed import Float64, Rows
from loratool.adapters.dialects.peft.types.making import reshaped
from loratool.adapters.dialects.peft.types.method import Made, PeftMethod, PeftModule, Trouble
from loratool.adapters.functions import RowFunction
from loratool.storage.composed import transposed
from loratool.storage.fields import COUNT
from loratool.storage.tensors import TensorInfo


def _hira(module: PeftModule) -> Iterable[Made]:
    """W' = W + W ∘ BA; an embedding's matrix is stored transposed, as LoRA's."""
    embedding = "hira_embedding_A" in module.tensors
    names = ("hira_embedding_B", "hira_embedding_A") if embedding else ("hira_B", "hira_A")
    b, a = module.need(*names)
    kernel = math.prod(a.shape[2:])
    module.require(len(a.shape) == len(b.shape) >= 2 and math.prod(b.shape[2:]) == 1)
    module.require(b.shape[1] == a.shape[0] and not (embedding and len(a.shape) > 2))
    left = reshaped(b, *b.shape[:2])
    right = reshaped(a, a.shape[0], a.shape[1] * kernel)
    if embedding:
        left, right = transposed(right), transposed(left)
    parts = {"B": left, "A": right}
    yield RowFunction(
        module.path, "HiRA", parts, (left.shape[0], right.shape[1]), _times_product,
        _times_product_turned,
    )  # fmt: skip


def _times_product(B: Float64, A: Float64) -> Rows:
    return partial(_modulated, B, A)


def _times_product_turned(B: Float64, A: Float64) -> Rows:
    return partial(_modulated, A.T, B.T)


def _modulated(left: Float64, right: Float64, first: int, rows: Float64) -> Float64:
    return rows + rows * (left[first : first + len(rows)] @ right)


#: The forms of a path of GLoRA by its tensors: of low rank, trained as it is, and not at all.
_FORMS = (("Xd", "Xu"), ("X",), ("zeros",))


def _glora(module: PeftModule) -> Iterable[Made]:
    """W' = W + W ∘ A + B and b' = b + b ∘ D + E + W·C."""
    times, plus = _path(module, "A"), _path(module, "B")
    if any(f"glora_C.{slot}" in module.tensors for slot in ("X", "Xd", "Xu")):
        text = (
            "glora_C is trained: it adds W·C to a bias, which is not computed here. Merge it with "
            "PEFT (merge_and_unload)"
        )
        raise Trouble("peft-options", text)
    parts = {f"A{i}": t for i, t in enumerate(times)} | {f"B{i}": t for i, t in enumerate(plus)}
    one, other = _size(times), _size(plus)
    module.require(all(n == m or 0 in (n, m) for n, m in zip(one, other, strict=True)))
    yield RowFunction(
        module.path, "GLoRA", parts, (max(one[0], other[0]), max(one[1], other[1])),
        partial(_scaled_and_added, turned=False), partial(_scaled_and_added, turned=True),
    )  # fmt: skip
    if any(f"glora_{path}.X" in module.tensors for path in "DE"):
        scale, shift = module.need("glora_D.X", "glora_E.X")
        module.require(scale.shape == shift.shape and len(shift.shape) == 1)
        yield RowFunction(
            module.path, "GLoRA", {"A0": scale, "B0": shift}, _size([scale]),
            partial(_scaled_and_added, turned=False), leaf="bias",
        )  # fmt: skip


def _path(module: PeftModule, name: str) -> list[TensorInfo]:
    """The tensors of A or B: two factors, one per row, a single number, or zeros of full size."""
    for form in _FORMS:
        if f"glora_{name}.{form[0]}" in module.tensors:
            found = module.need(*(f"glora_{name}.{slot}" for slot in form))
            shapes = [info.shape for info in found]
            if len(found) == 2:
                module.require(all(len(s) == 2 for s in shapes) and shapes[0][1] == shapes[1][0])
                rank = module.config.get("r", 8)
                if shapes[1][0] != rank:
                    given = f"the config gives {rank}, glora_{name}.Xu has {shapes[1][0]}"
                    raise Trouble("rank-mismatch", given)
            else:
                module.require(shapes[0] == (1,) or len(shapes[0]) == 2)
            return found
    raise Trouble("half-a-pair", f"it has no glora_{name}")


def _size(path: Sequence[TensorInfo]) -> tuple[int, int]:
    """(out, in) of the weight, as far as a path tells; 0 is any."""
    out, width = path[0].shape[0], path[-1].shape[-1]
    if path[0].shape == (1,):
        return 0, 0
    return out, (0 if len(path) == 1 and path[0].shape[1:] in ((), (1,)) else width)


def _scaled_and_added(*, turned: bool, **paths: Float64) -> Rows:
    times = [v for k, v in sorted(paths.items()) if k[0] == "A"]
    plus = [v for k, v in sorted(paths.items()) if k[0] == "B"]
    return partial(_with_paths, _of_rows(times, turned), _of_rows(plus, turned))


def _of_rows(path: Sequence[Float64], turned: bool) -> Rows:
    """A function that gives rows of a path; what is given as rows only says how many."""
    if len(path) == 2:
        left, right = (path[1].T, path[0].T) if turned else path
        return lambda first, rows: left[first : first + len(rows)] @ right
    whole = path[0]
    if whole.size == 1:
        return lambda first, rows: whole.reshape(1, 1)
    matrix = whole.reshape(len(whole), -1)
    if turned:
        matrix = matrix.T
    if len(matrix) == 1:
        return lambda first, rows: matrix
    return lambda first, rows: matrix[first : first + len(rows)]


def _with_paths(times: Rows, plus: Rows, first: int, rows: Float64) -> Float64:
    return rows + rows * times(first, rows) + plus(first, rows)


HIRA = PeftMethod(
    "HIRA", "HiRA", ("hira_[AB]", "hira_embedding_[AB]"), _hira,
    # The shapes tell the rank, which nothing is divided by; PEFT does not look at rank_pattern.
    {}, frozenset({"hira_dropout", "r", "rank_pattern"}), shown=("r",),
)  # fmt: skip
GLORA = PeftMethod(
    "GLORA", "GLoRA", ("glora_[A-E]",), _glora, {"r": COUNT},
    frozenset({"config_A_B", "config_C", "config_D_E"}), rest=r"(?:\.(?:Xd|Xu|X|zeros))",
    shown=("r", "config_A_B", "config_C", "config_D_E"),
)  # fmt: skip
