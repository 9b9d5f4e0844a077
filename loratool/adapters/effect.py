"""Whether an adapter does anything, and whether two of them are the same."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.adapters.adapter import Adapter
from loratool.adapters.factors import Factors
from loratool.adapters.weighting import PLAIN, Weight
from loratool.dtypes import FLOAT_FORMATS
from loratool.errors import ValueRangeError, listed
from loratool.notices import Notice
from loratool.storage.tensors import FilePool
from loratool.storage.values import float_blocks, same_values
from loratool.words import counted

#: Weights beyond this are mostly a slip.
_LARGE = 100

#: Where weight × scale mostly lies; what people train with is between 0.001 and 100.
_SCALES = (1e-6, 1000)


def same_adapter(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters hold the same; different ones differ in the first block read."""
    scales = [{path: m.scale for path, m in a.modules.items()} for a in (one, other)]
    return (
        scales[0] == scales[1]
        and one.tensors.keys() == other.tensors.keys()
        and all(same_values(info, other.tensors[name]) for name, info in one.tensors.items())
    )


def check_ranges(adapter: Adapter, weight: Weight) -> None:
    """Raise UsageError for a range of layers in which an adapter has no module."""
    names = [module.weight_name for module in adapter.modules.values()]
    names += [function.weight_name for function in adapter.functions.values()]
    weight.check(names, adapter.label)


def note_slips(adapters: Sequence[Adapter], weights: Sequence[Weight]) -> list[Notice]:
    """What may be meant, and may be a slip: one adapter twice, weights beyond 100 (70 for 0.70)."""
    notices = []
    used = [(a, w) for a, w in zip(adapters, weights, strict=True) if w]
    for number, (adapter, weight) in enumerate(used):
        twin = next((a for a, _ in used[:number] if same_adapter(adapter, a)), None)
        if twin is not None:
            text = f"{adapter.label} is the same adapter as {twin.label}."
            notices.append(Notice("same-adapter", text, adapter.label))
        if max(map(abs, weight.values)) > _LARGE:
            text = f"{adapter.label} has weight {weight}; weights are mostly between -2 and 2."
            notices.append(Notice("large-weight", text, adapter.label))
    return notices


def note_scales(adapter: Adapter, weight: Weight = PLAIN) -> list[Notice]:
    """A warning for modules whose weight × scale nobody means: what an alpha with a slip makes.

    Raises ValueRangeError where float32 does not hold it.
    """
    modules = [m for m in adapter.modules.values() if m.scale is not None]
    scales = {m.weight_name: weight.at(m.weight_name) * (m.scale or 0.0) for m in modules}
    largest = FLOAT_FORMATS["F32"].overflow
    beyond = [f"{name}: {scale:.3g}" for name, scale in scales.items() if not abs(scale) < largest]
    if beyond:
        raise ValueRangeError(
            f"{adapter.label}: weight × scale of {counted(len(beyond), 'module', 'is')} more than "
            f"float32 holds:\n{listed(beyond)}",
            "Correct --weight, or lora_alpha in its config.",
        )
    low, high = _SCALES
    odd = {name: s for name, s in scales.items() if s and not low <= abs(s) <= high}
    if not odd:
        return []
    name = next(iter(odd))
    text = (
        f"{adapter.label}: weight × scale of {counted(len(odd), 'module', 'is')} far from any that "
        f"is trained with, {odd[name]:.3g} for {name}. Check --weight and lora_alpha."
    )
    return [Notice("absurd-scale", text, name)]


def idle_modules(adapter: Adapter) -> list[str]:
    """Paths of modules that change nothing: the scale is 0, or a factor is zero as before training.

    A module with a magnitude (DoRA) or a bias may change something all the same and is not listed.
    Of a factor that is not zero little more than its first block is read.
    """
    with FilePool() as files:
        return [
            path
            for path, module in adapter.modules.items()
            if module.magnitude is None
            and module.bias is None
            and module.adds
            and (module.scale == 0 or _has_zero_factor(module, files))
        ]


def _has_zero_factor(module: Factors, files: FilePool) -> bool:
    if module.parts.keys() != {"A", "B"}:
        return False  # of other kinds a part may be zero and the delta not
    return any(
        not any(block.any() for block in float_blocks(info, files))
        for info in module.parts.values()
    )
