"""From the tensors of a hand-written state dict to modules, frozen weights and trained heads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.hand.names import HandPair, Sorted, sorted_names
from loratool.adapters.dialects.hand.products import (
    WORDS,
    Decided,
    Reading,
    choices,
    decide,
    likely,
    readings,
)
from loratool.adapters.dialects.hand.weights import AdaptedWeights, is_table
from loratool.adapters.dialects.troubles import (
    refuse_empty,
    refuse_halves,
    refuse_shapes,
    refuse_unknown,
    refuse_without_scale,
)
from loratool.adapters.factors import Kind, LowRank
from loratool.adapters.told import Scaling, scaling
from loratool.errors import AdapterError, listed
from loratool.models.checkpoint import Checkpoint
from loratool.models.layouts.components import Wanted
from loratool.models.layouts.names import HEAD, is_legacy_buffer
from loratool.notices import Notice
from loratool.storage.computed import computed_tensor
from loratool.storage.tensors import TensorInfo
from loratool.storage.values import read_float32
from loratool.words import counted


def fill_hand_written(adapter: Adapter, base: Checkpoint | None) -> None:
    """Sort the tensors of a hand-written adapter, in place."""
    found = sorted_names(adapter.tensors)
    adapter.inert += found.of_a_run
    adapter.unknown += found.unknown
    matrices = {path: p for path, p in found.pairs.items() if p.is_whole and _are_matrices(p)}
    weights = AdaptedWeights(base, _wanted(matrices), found.own)
    _rename_inner(found, matrices, weights)
    decided = decide(
        {path: _candidates(adapter, path, pair, weights) for path, pair in matrices.items()},
        {path: pair.style for path, pair in matrices.items()},
    )
    _note_products(adapter, decided, matrices)
    numbers = _Numbers(adapter, found)
    halves = {}
    for path, pair in found.pairs.items():
        if not pair.is_whole:
            halves[path] = [info.name for info in pair.tensors.values()]
        elif path in decided.readings or path in decided.open:
            reading = decided.readings.get(path) or decided.open[path][0]
            adapter.modules[path] = _module(pair, reading, numbers.scaling(path, reading.rank))
        else:
            kind: Kind = "conv" if len(pair.a.shape) > 2 else "linear"
            rank = pair.a.shape[0] if pair.a.shape else 0
            said = numbers.scaling(path, rank) if rank else Scaling()
            adapter.modules[path] = LowRank(
                path, kind, pair.a, pair.b, said.alpha, said.scale, scale_from=said.origin
            )
    _sort_own(adapter, found, weights)
    refuse_halves(adapter, halves, "its two factors")
    refuse_shapes(adapter, {})
    refuse_empty(adapter)
    refuse_unknown(adapter)
    refuse_without_scale(adapter)


def _are_matrices(pair: HandPair) -> bool:
    """Whether both factors are matrices that have a product of some kind."""
    a, b = pair.a.shape, pair.b.shape
    return len(a) == len(b) == 2 and 0 not in (*a, *b) and bool(readings(a, b, pair.layers, False))


def _wanted(pairs: Mapping[str, HandPair]) -> list[Wanted]:
    """The weights by their names, each with the larger shape that its factors can make."""
    found = []
    for path, pair in pairs.items():
        shapes = [one.shape for one in readings(pair.a.shape, pair.b.shape, pair.layers, False)]
        found.append(Wanted(f"{path}.weight", max(shapes, key=math.prod)))
    return found


def _rename_inner(found: Sorted, matrices: dict[str, HandPair], weights: AdaptedWeights) -> None:
    """Call modules as the base calls the wrapped layer, where the base has the wrapper too."""
    for path, child in found.wrapped.items():
        inner = f"{path}.{child}"
        if weights.has(f"{path}.weight") or not weights.has(f"{inner}.weight"):
            continue
        pair = replace(found.pairs.pop(path), path=inner)
        found.pairs[inner] = pair
        if matrices.pop(path, None) is not None:
            matrices[inner] = pair
        for leaf in ("weight", "bias"):
            info = found.own.pop(f"{path}.{leaf}", None)
            if info is not None:
                found.own[f"{inner}.{leaf}"] = info
        if path in found.numbers:
            found.numbers[inner] = found.numbers.pop(path)


# --- how factors multiply -------------------------------------------------------------------------


def _candidates(
    adapter: Adapter, path: str, pair: HandPair, weights: AdaptedWeights
) -> Sequence[Reading]:
    """The readings of a pair that its weight, or what the user says, allows.

    Where nothing fits the weight the likely ones are given, so that matching says what does not.
    """
    told = adapter.told
    found = readings(pair.a.shape, pair.b.shape, pair.layers, is_table(path))
    shapes = f"{pair.a.name} {list(pair.a.shape)} and {pair.b.name} {list(pair.b.shape)}"
    fits = {one: weights.fits(path, one.shape) for one in found}
    if None not in fits.values():
        fitting = [one for one in found if fits[one]]
        found = (fitting[:1] if pair.layers else fitting) or likely(found, pair.layers)
    elif told.rank is None:
        found = likely(found, pair.layers)
    if told.rank is not None:
        of_rank = [one for one in found if one.rank == told.rank]
        if not of_rank and not told.override:
            ranks = " or ".join(dict.fromkeys(str(one.rank) for one in found))
            raise AdapterError(
                f"{path}: --adapter-rank {told.rank}, but {shapes} give rank {ranks}.",
                "Omit the option, or add --override if the adapter is wrong.",
            )
        found = of_rank or found
    if told.product is not None:
        of_product = [one for one in found if one.product == told.product]
        if not of_product and not told.override:
            raise AdapterError(
                f"{path}: --product {told.product}, but {shapes} are for {choices(found)}"
                + ("." if None in fits.values() else ", by the shape of the weight."),
                "Omit the option, or add --override if the adapter is wrong.",
            )
        everything = readings(pair.a.shape, pair.b.shape, False, is_table(path))
        found = of_product or [o for o in everything if o.product == told.product] or found
    return found


def _note_products(adapter: Adapter, decided: Decided, pairs: Mapping[str, HandPair]) -> None:
    for product, path in decided.by.items():
        text = (
            f"The factors multiply as {WORDS[product]}: the weight of {path} is not square and "
            "decides it for those of other modules that could be read in two ways."
        )
        adapter.notices.append(Notice("product-decided", text, path))
    if decided.open:
        lines = [
            f"{path}: A {list(pairs[path].a.shape)}, B {list(pairs[path].b.shape)}: "
            f"{choices(found)}"
            for path, found in decided.open.items()
        ]
        options = {one.product for found in decided.open.values() for one in found}
        said = " or ".join(f"--product {p}" for p in WORDS if p in options)
        text = (
            f"{counted(len(lines), 'module', 'has')} factors that can be multiplied in several "
            f"ways, and no weight that is not square decides it. The forward pass of the training "
            f"script tells; say {said}:\n{listed(lines)}"
        )
        first = next(iter(decided.open))
        adapter.notices.append(Notice("product-unknown", text, first, refused=True))


def _module(pair: HandPair, reading: Reading, said: Scaling) -> LowRank:
    a, b = reading.arranged(pair.a, pair.b)
    return LowRank(
        pair.path, "embedding" if is_table(pair.path) else "linear", a, b, said.alpha, said.scale,
        bias=_bias(pair), scale_from=said.origin,
    )  # fmt: skip


def _bias(pair: HandPair) -> TensorInfo | None:
    """What factors that are layers with biases of their own add: B·bias_A + bias_B."""
    first, second = pair.tensors.get("A.bias"), pair.tensors.get("B.bias")
    if first is None:
        return second
    name = f"{pair.path}: B·bias_A"
    if second is None:
        return computed_tensor(
            name, pair.b.shape[:1], [pair.b, first], lambda b, bias: b @ bias.reshape(-1)
        )
    return computed_tensor(
        f"{name} + bias_B", second.shape, [pair.b, first, second],
        lambda b, bias, own: b @ bias.reshape(-1) + own,
    )  # fmt: skip


# --- scales ---------------------------------------------------------------------------------------


class _Numbers:
    """Alpha and scale as the file holds them, in tensors of one element."""

    def __init__(self, adapter: Adapter, found: Sorted) -> None:
        self._adapter = adapter
        self._values: dict[str, dict[str, float]] = {}
        if found.numbers:
            adapter.fetch()
        for path, tensors in found.numbers.items():
            self._values[path] = {what: self._read(info) for what, info in tensors.items()}

    def _read(self, info: TensorInfo) -> float:
        value = float(read_float32(info).reshape(-1)[0]) if info.is_float else math.nan
        if not math.isfinite(value) or not value:
            raise AdapterError(
                f"{info.name}: {value:g} is no scale, alpha or rank.",
                "Say --alpha or --scale, and remove it from the file.",
            )
        return value

    def scaling(self, path: str, rank: int) -> Scaling:
        values = self._values.get("", {}) | self._values.get(path, {})
        alpha, scale = values.get("alpha"), values.get("scale")
        told = self._adapter.told
        if values.get("rank", rank) != rank and not told.override:
            raise AdapterError(
                f"{path}: the file gives rank {values['rank']:g}, its factors have {rank}.",
                "Say which factors it is for with --adapter-rank, or add --override.",
            )
        if alpha is not None and scale is not None:
            if not math.isclose(alpha / rank, scale, rel_tol=1e-6) and not told.says_scale:
                raise AdapterError(
                    f"{path}: alpha {alpha:g} of the file and rank {rank} are scale "
                    f"{alpha / rank:g}, and the file also gives scale {scale:g}.",
                    "Say --alpha or --scale, with --override.",
                )
            alpha = None
        return scaling(told, rank, alpha=alpha, scale=scale, origin="alpha tensor", where=path)


# --- the model's own tensors ----------------------------------------------------------------------


def _sort_own(adapter: Adapter, found: Sorted, weights: AdaptedWeights) -> None:
    """Sort the tensors of the model that lie in the file: frozen ones, and those that were trained.

    A state dict of everything holds the weights of the adapted layers, which are frozen; so the
    others of theirs should be the base's as well. Without those a script has chosen what it saved:
    what it trained.
    """
    whole = any(f"{path}.weight" in found.own for path in found.pairs)
    heads = set()
    for name, info in found.own.items():
        held = weights.tensor(name)
        if held is None and _is_constant(name, info):
            adapter.inert.append(info.name)
        elif whole and (weights.layout is None or weights.has(name)):
            adapter.frozen[name] = info
        elif whole and not HEAD.search(name):
            adapter.unknown.append(info.name)
        else:
            adapter.replaced[name] = info
            if held is None and HEAD.search(name):
                heads.add(name.rpartition(".")[0])
    adapter.declared = replace(
        adapter.declared, heads=adapter.declared.heads | heads, saved_modules=tuple(sorted(heads))
    )


def _is_constant(name: str, info: TensorInfo) -> bool:
    """Whether a tensor is a buffer that models compute anew: positions, masks, frequencies."""
    return not info.is_float or is_legacy_buffer(name, info.shape)
