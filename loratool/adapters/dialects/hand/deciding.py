"""Which products of a hand-written adapter's factors the weights and the user allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.hand.names import HandPair
from loratool.adapters.dialects.hand.products import (
    WORDS,
    Decided,
    Reading,
    choices,
    likely,
    readings,
)
from loratool.adapters.dialects.weights import AdaptedWeights, is_table
from loratool.adapters.told import Product
from loratool.errors import AdapterError, listed
from loratool.notices import Notice
from loratool.words import counted


def candidates(
    adapter: Adapter, pair: HandPair, weights: AdaptedWeights, only: Product | None
) -> Sequence[Reading]:
    """The readings of a pair that its weight, or what the user says, allows.

    Where nothing fits the weight the likely ones are given, so that matching says what does not.
    """
    told, path = adapter.told, pair.path
    found = readings(pair.a.shape, pair.b.shape, pair.layers, is_table(path))
    found = [one for one in found if only in (None, one.product)] or found
    shapes = f"{pair.a.name} {list(pair.a.shape)} and {pair.b.name} {list(pair.b.shape)}"
    if told.rank is not None:
        of_rank = [one for one in found if one.rank == told.rank]
        if not of_rank and not told.override:
            ranks = " or ".join(dict.fromkeys(str(one.rank) for one in found))
            raise AdapterError(
                f"{path}: --adapter-rank {told.rank}, but {shapes} give rank {ranks}.",
                "Omit the option, or add --override if the adapter is wrong.",
            )
        found = of_rank or found
    fits = {one: weights.fits(path, one.shape) for one in found}
    fitting = [one for one in found if fits[one]] if None not in fits.values() else []
    found = fitting or likely(found, is_table(path))
    if pair.layers:
        found = found[:1]  # layers are applied A first where nothing else tells
    found = list({one.product: one for one in reversed(found)}.values())[::-1]
    if told.product is not None and not (is_table(path) and len(fitting) == 1):
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


def note_products(
    adapter: Adapter, decided: Decided, pairs: Mapping[str, HandPair], is_known: bool
) -> None:
    """Say what decided, and what is open; `is_known` says that there is a base."""
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
        why = (
            "the shapes of their weights decide nothing"
            if is_known
            else ("without the base no weight decides it")
        )
        text = (
            f"{counted(len(lines), 'module', 'has')} factors that can be multiplied in several "
            f"ways, and {why}. The forward pass of the training script tells; say {said}"
            + (":" if is_known else ", or give the base:")
            + f"\n{listed(lines)}"
        )
        first = next(iter(decided.open))
        adapter.notices.append(Notice("product-unknown", text, first, refused=True))
