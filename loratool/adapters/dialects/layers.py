"""Drafts of programs in which all layers are alike: one rank, one alpha, the same modules in each.

What a layer lacks that others have is filled up with factors of zero, which add nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import numpy as np

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.drafting import (
    alpha_for,
    common_dtype,
    common_rank,
    common_scale,
    fitted,
    low_rank,
    refuse_all,
)
from loratool.adapters.dialects.writing import Asked, Draft, Fate
from loratool.adapters.factors import LowRank
from loratool.models.checkpoint import Checkpoint
from loratool.models.decoder import LINEAR, Decoder
from loratool.notices import Notice
from loratool.storage.computed import computed_tensor
from loratool.storage.tensors import TensorInfo
from loratool.storage.values import same_values
from loratool.words import counted

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
#: Programs switch the MLP on as a whole.
_MLP = tuple(module for module in LINEAR if module.startswith("mlp."))
HEAD = "lm_head"


def unknown_base(base: Checkpoint | None) -> str:
    """What to do where the base is not known well enough to write for it."""
    if base is None:
        return "Say --base, with its config.json."
    kind = base.model_type or "a model without a model_type in its config.json"
    return f"{base.label} is {kind}, and its program has no such names: convert to another dialect."


@dataclass
class Alike:
    """Factors of one rank, scale and dtype by path, each in every layer. `modules` are those of a
    layer, of `LINEAR`, and `HEAD`."""

    rank: int
    alpha: float
    modules: list[str]
    pairs: dict[str, LowRank] = field(default_factory=dict)


def alike(
    draft: Draft, adapter: Adapter, asked: Asked, decoder: Decoder, title: str, scaled: bool
) -> Alike | None:
    """Fill in the fates and pieces of `draft`; None where something is refused.

    `title` is the program's name, and `scaled` says whether it has magnitudes (DoRA).
    """
    found: dict[str, LowRank] = {}
    for path, module in adapter.modules.items():
        pair = low_rank(module)
        why = _why_not(pair, path, decoder, title, scaled)
        if why or pair is None:
            draft.refuse(path, why)
        else:
            found[path] = pair
    same = _of_the_base(adapter, asked.base)
    draft.fates += [Fate(name, "exact", "as it is in the base; left out") for name in same]
    left = replace(adapter, replaced={n: t for n, t in adapter.replaced.items() if n not in same})
    refuse_all(draft, left, {
        "replaced": f"{title} keeps factors alone",
        "rows": f"{title} keeps factors alone",
        "functions": "it is no sum; merge it, and extract a LoRA from the result",
    })  # fmt: skip
    modules = _modules(found)
    wanted = [f"model.layers.{n}.{m}" for n in range(decoder.layers) for m in modules if m != HEAD]
    wanted += [HEAD] * (HEAD in modules)
    plain = [path for path in wanted if path not in found or found[path].magnitude is None]
    if plain and len(plain) < len(wanted):
        for path in found:
            draft.refuse(path, f"{title} has magnitudes in all modules; {plain[0]} has none")
    if any(fate.outcome == "refused" for fate in draft.fates) or not found:
        return None
    pairs = list(found.values())
    rank, scale = common_rank(pairs), common_scale(pairs)
    made = Alike(rank, alpha_for(scale, rank), modules)
    dtype = common_dtype(pairs, asked.dtype)
    for path in wanted:
        if path in found:
            pair = found[path]
            fit = fitted(pair, rank, scale, dtype)
            draft.fates.append(fit.fate)
            draft.pieces[path] = pair
            made.pairs[path] = replace(pair, a=fit.a, b=fit.b)
        else:
            shape = decoder.shape_of(_module_of(path))
            made.pairs[path] = _nothing(path, shape, rank, pairs[0].a, dtype)
            draft.pieces[path] = replace(made.pairs[path], scale=scale)
    more = len(wanted) - len(found)
    if more:
        text = (
            f"{counted(more, 'module', 'was')} added with factors of zero, because "
            f"{title} has the same modules in all layers."
        )
        draft.notices.append(Notice("filled-up", text))
    return made


def _why_not(pair: LowRank | None, path: str, decoder: Decoder, title: str, scaled: bool) -> str:
    """Why a module has no place, in words; "" where it has one."""
    layer, module = _LAYER.fullmatch(path), _module_of(path)
    if pair is None:
        return "its change is no product of two factors"
    if pair.kind != "linear" or module not in (*LINEAR, HEAD) or (module == HEAD) == bool(layer):
        return f"{title} has factors of q, k, v, output, MLP and head alone"
    if layer and int(layer[1]) >= decoder.layers:
        return f"the base has {decoder.layers} layers"
    if pair.shape != decoder.shape_of(module):
        return f"it is {list(pair.shape)}, in the base {list(decoder.shape_of(module))}"
    if pair.bias is not None:
        return f"{title} has no biases of factors"
    if pair.magnitude is not None and not scaled:
        return f"{title} has no magnitudes (DoRA); merge it instead"
    return ""


def _of_the_base(adapter: Adapter, base: Checkpoint | None) -> list[str]:
    """Tensors saved whole that the base has as they are: PEFT saves embedding and head beside
    factors of them."""
    known = base.tensors if base is not None else {}
    there = [name for name in adapter.replaced if name in known]
    if base is not None:
        base.fetch(there)
    return [name for name in there if same_values(adapter.replaced[name], known[name])]


def _module_of(path: str) -> str:
    layer = _LAYER.fullmatch(path)
    return layer[2] if layer else path


def _modules(paths: Collection[str]) -> list[str]:
    """The modules that every layer must have, in order."""
    there = set(map(_module_of, paths))
    if there & set(_MLP):
        there |= set(_MLP)
    return [module for module in (*LINEAR, HEAD) if module in there]


def _nothing(path: str, shape: tuple[int, int], rank: int, like: TensorInfo, dtype: str) -> LowRank:
    """A pair of zeros."""
    a, b = (rank, shape[1]), (shape[0], rank)
    return LowRank(
        path, "linear",
        computed_tensor(f"zeros {a}", a, [like], lambda _: np.zeros(a, np.float32), dtype),
        computed_tensor(f"zeros {b}", b, [like], lambda _: np.zeros(b, np.float32), dtype),
        None, None,
    )  # fmt: skip
