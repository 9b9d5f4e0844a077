"""How two factors multiply: B·A, A·B, or (A·B)ᵀ, and what decides it.

A script may name its factors as it likes, and write x·A·B as well as B·A·x. With A `[a, b]` and
B `[c, d]` there are three changes of a weight `[out, in]` (and of a table of rows that are looked
up a fourth one, loralib's): those are kept whose shape is the weight's. A square weight takes A·B
and its transpose, so there one that is not square must decide, or the user.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from loratool.adapters.told import Product
from loratool.storage.composed import transposed
from loratool.storage.tensors import TensorInfo

#: In the words of messages.
WORDS: dict[Product, str] = {"BA": "B·A", "AB": "A·B", "ABt": "(A·B)ᵀ"}


@dataclass(frozen=True)
class Reading:
    """One way to multiply two factors: the shape `(out, in)` of what is added, and its rank.

    What is `turned` is the transpose of the product: a table of rows that are looked up is stored
    so against the layers of this package.
    """

    product: Product
    shape: tuple[int, int]
    rank: int
    turned: bool = False

    def arranged(self, a: TensorInfo, b: TensorInfo) -> tuple[TensorInfo, TensorInfo]:
        """Factors `(A [r, in], B [out, r])` of it, as PEFT has them."""
        if self.product == "BA":
            return (transposed(b), transposed(a)) if self.turned else (a, b)
        swapped = (self.product == "AB") != self.turned
        return (b, a) if swapped else (transposed(a), transposed(b))


def readings(a: Sequence[int], b: Sequence[int], layers: bool, lookup: bool) -> list[Reading]:
    """All ways to multiply matrices of these shapes.

    As `layers` they are applied one after the other, each `[out, in]`, so their product is never
    transposed. With `lookup` they change a table `[rows, width]`.
    """
    found = []
    if a[0] == b[1]:
        found.append(Reading("BA", (b[0], a[1]), a[0]))
    if a[1] == b[0]:
        found.append(Reading("AB", (a[0], b[1]), a[1]))
        if not layers:
            found.append(Reading("ABt", (b[1], a[0]), a[1]))
    if lookup:
        loralib = found[:1] if a[0] == b[1] else []
        found = loralib + [replace(one, shape=one.shape[::-1], turned=True) for one in found]
    return found


def likely(found: Sequence[Reading], lookup: bool) -> list[Reading]:
    """The readings that make sense where no weight is known: a product over the larger of two
    dimensions is no low rank, and a table has more rows than columns."""
    least = min((one.rank for one in found), default=0)
    rest = [one for one in found if one.rank == least]
    if lookup:
        rest = [one for one in rest if one.shape[1] > one.shape[0]] or rest
    return rest


@dataclass
class Decided:
    """Which reading each module has, by its path.

    `by` names for a product a module whose weight decided for others, `open` has the readings of
    modules that nothing decides.
    """

    readings: dict[str, Reading] = field(default_factory=dict)
    by: dict[Product, str] = field(default_factory=dict)
    open: dict[str, list[Reading]] = field(default_factory=dict)


def decide(candidates: Mapping[str, Sequence[Reading]], styles: Mapping[str, object]) -> Decided:
    """Choose a reading for every module of those that its weight allows, one at least.

    Modules of one style are of one class, and multiply alike: what one of them settles holds for
    the others, as long as all can be read so.
    """
    decided = Decided()
    groups: dict[object, list[str]] = defaultdict(list)
    for path in candidates:
        groups[styles[path]].append(path)
    for paths in groups.values():
        settled = {candidates[p][0].product: p for p in reversed(paths) if len(candidates[p]) == 1}
        only = next(iter(settled)) if len(settled) == 1 else None
        for path in paths:
            own = candidates[path]
            chosen = next((one for one in own if one.product == only), None)
            if len(own) == 1:
                decided.readings[path] = own[0]
            elif chosen is not None and only is not None:
                decided.readings[path] = chosen
                decided.by[only] = settled[only]
            else:
                decided.open[path] = list(own)
    return decided


def choices(found: Sequence[Reading]) -> str:
    """What can be chosen, for people: "A·B or (A·B)ᵀ"."""
    return " or ".join(dict.fromkeys(WORDS[one.product] for one in found))
