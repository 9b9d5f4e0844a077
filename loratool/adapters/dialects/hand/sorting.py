"""From the tensors of a hand-written state dict to modules, frozen weights and trained heads."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.hand.deciding import candidates, note_products
from loratool.adapters.dialects.hand.fused import (
    is_merged,
    kernel_of,
    of_convolution,
    of_parts,
    parts_with_factors,
)
from loratool.adapters.dialects.hand.names import HandPair, Sorted, sorted_names
from loratool.adapters.dialects.hand.numbers import Numbers
from loratool.adapters.dialects.hand.products import Reading, decide, readings
from loratool.adapters.dialects.troubles import (
    refuse_empty,
    refuse_halves,
    refuse_modules,
    refuse_shapes,
    refuse_unknown,
    refuse_without_scale,
)
from loratool.adapters.dialects.weights import AdaptedWeights, is_table
from loratool.adapters.factors import Kind, LowRank
from loratool.adapters.told import Product, Scaling
from loratool.errors import AdapterError, listed
from loratool.models.checkpoint import Checkpoint
from loratool.models.layouts.components import Wanted
from loratool.models.layouts.names import HEAD, is_legacy_buffer
from loratool.notices import Notice
from loratool.paths import dotted_ends, matches
from loratool.storage.composed import joined
from loratool.storage.computed import computed_tensor
from loratool.storage.tensors import TensorInfo
from loratool.words import counted

#: Names of convolutions, as far as names tell.
_CONVOLUTION = re.compile(r"conv|patch_embed|downsample", re.IGNORECASE)
#: What scripts call a layer inside of its wrapper, where the file does not hold it.
_INNER = (
    "linear",
    "conv",
    "orig_linear",
    "original_layer",
    "base_layer",
    "original",
    "layer",
    "adapter",
)


def fill_hand_written(
    adapter: Adapter, base: Checkpoint | None, only: Product | None = None
) -> None:
    """Sort the tensors of a hand-written adapter, in place. With `only` factors are multiplied so
    wherever they can be."""
    found = sorted_names(adapter.tensors)
    adapter.inert += found.of_a_run
    adapter.unknown += found.unknown
    weights = AdaptedWeights(base, _wanted(found.pairs.values()), found.own, adapter.told)
    _rename_inner(found, weights)
    _refuse_unnamed(adapter, found)
    numbers = Numbers(adapter, found)
    whole = {path: pair for path, pair in found.pairs.items() if pair.is_whole}
    fused = _Fused(adapter, weights, numbers)
    modules = {path: module for path, pair in whole.items() if (module := fused.module(pair))}
    plain = {p: pair for p, pair in whole.items() if p not in modules and _are_matrices(pair)}
    decided = decide(
        {path: candidates(adapter, pair, weights, only) for path, pair in plain.items()},
        {path: pair.style for path, pair in plain.items()},
    )
    note_products(adapter, decided, plain, base is not None)
    _refuse_convolutions(adapter, plain, weights)
    for path, pair in whole.items():
        if path in modules:
            adapter.modules[path] = modules[path]
        elif path in plain:
            reading = decided.readings.get(path) or decided.open[path][0]
            said = numbers.scaling(path, reading.rank)
            adapter.modules[path] = _module(pair, reading, said, weights.shape(path))
        else:
            adapter.modules[path] = _as_it_is(pair, numbers)
    _sort_own(adapter, found, weights)
    halves = {p: [t.name for t in x.tensors.values()] for p, x in found.pairs.items()
              if not x.is_whole}  # fmt: skip
    refuse_halves(adapter, halves, "its two factors")
    fused.refuse()
    refuse_shapes(adapter, {})
    refuse_empty(adapter)
    refuse_unknown(adapter)
    refuse_without_scale(adapter)


def _are_matrices(pair: HandPair) -> bool:
    """Whether both factors are matrices that have a product of some kind."""
    a, b = pair.a.shape, pair.b.shape
    return len(a) == len(b) == 2 and 0 not in (*a, *b) and bool(readings(a, b, pair.layers, False))


def _refuse_convolutions(
    adapter: Adapter, pairs: Mapping[str, HandPair], weights: AdaptedWeights
) -> None:
    """Refuse bare factors of what is called a convolution where nothing tells the weight's shape:
    as loralib's they are of another rank, and so of another scale, than as a linear layer's."""
    unseen = [
        path
        for path, pair in pairs.items()
        if not pair.layers and weights.shape(path) is None and _CONVOLUTION.search(path)
    ]
    if unseen and adapter.told.rank is None:
        text = (
            f"{counted(len(unseen), 'module', 'is')} called as convolutions are, whose rank (and "
            "with it the scale) depends on the kernel, which only the base tells. Say --base, or "
            f"--adapter-rank:\n{listed(unseen)}"
        )
        adapter.notices.append(Notice("kernel-unknown", text, unseen[0], refused=True))


def _wanted(pairs: Iterable[HandPair]) -> list[Wanted]:
    """The weights by their names, each with the larger shape that its factors can make."""
    found = []
    for pair in pairs:
        if not pair.is_whole:
            continue
        shapes = [(*pair.b.shape[:1], *pair.a.shape[1:2])]
        if _are_matrices(pair):
            known = readings(pair.a.shape, pair.b.shape, pair.layers, False)
            shapes = [one.shape for one in known]
        found.append(Wanted(f"{pair.path}.weight", max(shapes, key=math.prod)))
    return [one for one in found if len(one.shape) == 2]


def _rename_inner(found: Sorted, weights: AdaptedWeights) -> None:
    """Call modules as the base calls the wrapped layer, where the base has the wrapper too."""
    for path in list(found.pairs):
        if weights.has(f"{path}.weight"):
            continue
        inside = (found.wrapped[path],) if path in found.wrapped else _INNER
        inner = [f"{path}.{name}" for name in inside if weights.has(f"{path}.{name}.weight")]
        if len(inner) != 1:
            continue
        found.pairs[inner[0]] = replace(found.pairs.pop(path), path=inner[0])
        for leaf in ("weight", "bias"):
            info = found.own.pop(f"{path}.{leaf}", None)
            if info is not None:
                found.own[f"{inner[0]}.{leaf}"] = info
        if path in found.numbers:
            found.numbers[inner[0]] = found.numbers.pop(path)


def _refuse_unnamed(adapter: Adapter, found: Sorted) -> None:
    """Raise AdapterError for an option that names no module of the file."""
    ends = {end for path in found.pairs for end in (path, *dotted_ends(path))}
    unnamed = [f"--enable-lora {name}" for name in adapter.told.enable_lora if name not in ends]
    unnamed += [
        f"--fan-in-fan-out {glob}"
        for glob in adapter.told.fan_in_fan_out
        if not any(matches(path, [glob]) for path in found.pairs)
    ]
    if unnamed:
        raise AdapterError(
            f"{unnamed[0]}: no module of the adapter is called so.",
            f"Its modules are {', '.join(list(found.pairs)[:3])}"
            + (", …" if len(found.pairs) > 3 else "."),
        )


def _module(
    pair: HandPair, reading: Reading, said: Scaling, weight: Sequence[int] | None
) -> LowRank:
    a, b = reading.arranged(pair.a, pair.b)
    kind: Kind = "embedding" if is_table(pair.path) else "linear"
    if (
        weight is not None
        and len(weight) > 2
        and weight[1:]
        and math.prod(weight[1:]) == a.shape[1]
    ):
        # The product is given the shape of the convolution's weight.
        kind, ones = "conv", (1,) * (len(weight) - 2)
        a = joined(a.name, (a.shape[0], *weight[1:]), [a])
        b = joined(b.name, (*b.shape, *ones), [b])
    return LowRank(
        pair.path, kind, a, b, said.alpha, said.scale, bias=_bias(pair), scale_from=said.origin
    )


def _as_it_is(pair: HandPair, numbers: Numbers) -> LowRank:
    """Factors that are layers with more axes, or fit none of what is known."""
    kind: Kind = "conv" if len(pair.a.shape) > 2 else "linear"
    rank = pair.a.shape[0] if pair.a.shape else 0
    said = numbers.scaling(pair.path, rank) if rank else Scaling()
    return LowRank(
        pair.path, kind, pair.a, pair.b, said.alpha, said.scale, bias=_bias(pair),
        scale_from=said.origin,
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


class _Fused:
    """Pairs for several parts of a weight, and for convolutions, as loralib has them."""

    def __init__(self, adapter: Adapter, weights: AdaptedWeights, numbers: Numbers) -> None:
        self._adapter = adapter
        self._told = adapter.told
        self._weights = weights
        self._numbers = numbers
        #: Modules of which nobody knows the parts that have factors.
        self._untold: list[str] = []

    def module(self, pair: HandPair) -> LowRank | None:
        """The factors of such a pair; None where it is a plain one."""
        ends = (pair.path, *dotted_ends(pair.path))
        enabled = next((self._told.enable_lora[e] for e in ends if e in self._told.enable_lora), ())
        weight = self._weights.shape(pair.path)
        if enabled or is_merged(pair):
            return self._of_parts(pair, enabled, weight)
        kernel = kernel_of(pair, weight, self._told.rank)
        if kernel is None:
            self._note_parts(pair, weight)
            return None
        a, b = of_convolution(pair, kernel)
        return self._low_rank(pair, "conv", a, b, pair.a.shape[0] // kernel)

    def refuse(self) -> None:
        refuse_modules(
            self._adapter, "parts-unknown", "has factors for some of the equal parts of a weight "
            "(MergedLinear of loralib), and the file does not say for which. Say --enable-lora "
            "MODULE=1,0,1, a 1 for each part that has them", self._untold,
        )  # fmt: skip

    def _of_parts(
        self, pair: HandPair, enabled: Sequence[bool], weight: Sequence[int] | None
    ) -> LowRank:
        count = parts_with_factors(pair)
        a, b = list(pair.a.shape), list(pair.b.shape)
        if enabled and sum(enabled) != count:
            raise AdapterError(
                f"{pair.path}: --enable-lora names {sum(enabled)} parts with factors, and A {a} "
                f"and B {b} are of {count or 'none'}.",
                "Give a flag for each of the equal parts of the weight.",
            )
        if not enabled:
            enabled = (True,) * count
            if weight is None or tuple(weight) != (b[0], a[1]):
                whole = f" of a weight {list(weight)}" if weight is not None else ""
                self._untold.append(f"{pair.path}: A {a}, B {b}: {count} parts{whole}")
        elif weight is not None and (b[0] // count * len(enabled), a[1]) != tuple(weight):
            raise AdapterError(
                f"{pair.path}: --enable-lora with {len(enabled)} parts makes a weight of "
                f"{[b[0] // count * len(enabled), a[1]]}, and the base's is {list(weight)}.",
                "Give a flag for each of the equal parts of the weight.",
            )
        return self._low_rank(pair, "linear", *of_parts(pair, enabled), pair.b.shape[1])

    def _note_parts(self, pair: HandPair, weight: Sequence[int] | None) -> None:
        """Of a pair that is of one part: it is smaller than the weight by a whole number."""
        if weight is None or parts_with_factors(pair) != 1 or len(weight) != 2:
            return
        rows, columns = pair.b.shape[0], pair.a.shape[1]
        if columns == weight[1] and weight[0] > rows and weight[0] % rows == 0:
            shapes = f"A {list(pair.a.shape)}, B {list(pair.b.shape)}"
            self._untold.append(f"{pair.path}: {shapes}: 1 part of a weight {list(weight)}")

    def _low_rank(
        self, pair: HandPair, kind: Kind, a: TensorInfo, b: TensorInfo, rank: int
    ) -> LowRank:
        if self._told.rank not in (None, rank) and not self._told.override:
            raise AdapterError(
                f"{pair.path}: --adapter-rank {self._told.rank}, but A {list(pair.a.shape)} and "
                f"B {list(pair.b.shape)} give rank {rank}.",
                "Omit the option, or add --override if the adapter is wrong.",
            )
        said = self._numbers.scaling(pair.path, rank)
        return LowRank(pair.path, kind, a, b, said.alpha, said.scale, scale_from=said.origin)


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
        owner, _, leaf = name.rpartition(".")
        if owner in found.pairs and leaf not in ("weight", "bias"):
            adapter.unknown.append(info.name)  # of the script's own class: a magnitude, a mask
        elif not weights.has(name) and _is_constant(name, info):
            adapter.inert.append(info.name)
        elif whole and (weights.layout is None or weights.has(name)):
            adapter.frozen[name] = info
        elif whole and not HEAD.search(name):
            adapter.unknown.append(info.name)
        else:
            adapter.replaced[name] = info
            if not weights.has(name) and HEAD.search(name):
                heads.add(name.rpartition(".")[0])
    saved = {n.rpartition(".")[0] for n in adapter.replaced if not n.endswith(".bias")} | heads
    adapter.declared = replace(
        adapter.declared, heads=frozenset(heads), saved_modules=tuple(sorted(saved))
    )
    if adapter.frozen and weights.layout is None:
        text = (
            f"{counted(len(adapter.frozen), 'tensor', 'is')} as in the model that it was trained "
            "on, if they were not trained: `merge` holds them against the base, and nothing else "
            f"is made of them:\n{listed([info.name for info in adapter.frozen.values()])}"
        )
        adapter.notices.append(Notice("frozen-weights", text, next(iter(adapter.frozen))))


def _is_constant(name: str, info: TensorInfo) -> bool:
    """Whether a tensor is a buffer that models compute anew: positions, masks, frequencies."""
    return not info.is_float or is_legacy_buffer(name, info.shape)
