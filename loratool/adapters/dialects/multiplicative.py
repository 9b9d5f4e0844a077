"""Multiplicative LoRA: W + s·B·A·W, which is the pair B and A·W once the weight is known.

A is `[r, out]`, B `[out, r]`: the layer's output, not its input, goes through the factors. Adapters
of qlora-pipe may be so; they look like PEFT's, so a user has to say it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.weights import AdaptedWeights
from loratool.adapters.factors import Factors, LowRank
from loratool.adapters.timesweight import TimesWeight
from loratool.errors import AdapterError
from loratool.models.checkpoint import Checkpoint
from loratool.models.layouts.components import Wanted
from loratool.notices import Notice

#: Dialects in which a user may say that pairs are so.
_DIALECTS = ("peft", "hand")


def could_multiply(adapter: Adapter, weights: Mapping[str, tuple[int, int]]) -> bool:
    """Whether all of an adapter could be multiplicative if a user said so. `weights` are the shapes
    `[out, in]` of what its modules change, by their paths."""
    plain = adapter.format in _DIALECTS and not adapter.functions and bool(adapter.modules)
    return plain and all(
        _is_plain(module) and path in weights and module.shape == (weights[path][0],) * 2
        for path, module in adapter.modules.items()
    )


def _is_plain(module: Factors) -> bool:
    plain = isinstance(module, LowRank) and module.kind == "linear"
    return plain and module.magnitude is None and module.bias is None


def multiply(adapter: Adapter, base: Checkpoint | None) -> None:
    """Take the pairs of an adapter for multiplicative ones, as the user said.

    Raises AdapterError where they cannot be. Without a base there is a refused notice.
    """
    _refuse_others(adapter)
    wanted = [
        Wanted(module.weight_name, (module.shape[0], module.shape[0]))
        for module in adapter.modules.values()
    ]
    weights = AdaptedWeights(base, wanted, {}, adapter.told)
    unknown = []
    for path, module in adapter.modules.items():
        if not isinstance(module, LowRank) or not module.is_sound:
            continue  # refused already
        weight = weights.tensor(module.weight_name)
        if weight is None or len(weight.shape) != 2:
            unknown.append(path)
            continue
        turned = weights.is_turned(path, weight.shape)
        out, width = weight.shape[::-1] if turned else weight.shape
        if module.shape != (out, out):
            raise AdapterError(
                f"{path}: --kind multiplicative, but A {list(module.a.shape)} and B "
                f"{list(module.b.shape)} are not [r, {out}] and [{out}, r], as W + s·B·A·W has "
                f"them for {weight.name} {list(weight.shape)}.",
                "Omit the option, or check that this is the base.",
            )
        product = TimesWeight(
            f"{module.a.name} · {weight.name}", "F32", (module.rank, width), module.a.file,
            module.a.start, stamp=module.a.stamp, parts=(module.a, weight), turned=turned,
        )  # fmt: skip
        adapter.modules[path] = replace(module, a=product)
    if unknown:
        what = "the base has no such weight as one tensor" if base is not None else "give the base"
        text = (
            f"W + s·B·A·W adds something else to every W, so the weight must be known: {what} "
            f"({unknown[0]})."
        )
        adapter.notices.append(Notice("weight-unknown", text, unknown[0], refused=True))


def _refuse_others(adapter: Adapter) -> None:
    """Raise AdapterError for what cannot be multiplicative."""
    for path, module in adapter.modules.items():
        if not _is_plain(module):
            raise AdapterError(
                f"{path}: --kind multiplicative is known for plain factors of linear layers, and "
                f"this one is otherwise ({module.kind}"
                f"{', DoRA' if module.magnitude is not None else ''}).",
                "Omit the option.",
            )
    if adapter.functions:
        raise AdapterError(
            f"--kind multiplicative: {next(iter(adapter.functions))} is no pair of factors.",
            "Omit the option.",
        )
