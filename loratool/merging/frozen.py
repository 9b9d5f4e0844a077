"""Weights of the base that lie in an adapter's file too: are they those of this base?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loratool.errors import MatchError, listed
from loratool.merging.match import Match
from loratool.models.layouts.assembly import assembled
from loratool.models.layouts.holding import Holdings
from loratool.models.layouts.layout import Layout
from loratool.models.layouts.parameter import MisfitError
from loratool.storage.tensors import TensorInfo, as_bytes
from loratool.storage.values import float_blocks, raw_blocks, same_values
from loratool.words import counted


def refuse_other_frozen(matches: Sequence[Match], layout: Layout) -> None:
    """Raise MatchError where they are not: the adapter was trained on another base, or they were
    trained, or merged, too."""
    for found in matches:
        other = []
        frozen = {found.naming(name): info for name, info in found.adapter.frozen.items()}
        theirs = Holdings(
            {name: info.renamed(name) for name, info in frozen.items()}, layout.base.config
        )
        for name, info in frozen.items():
            try:
                held = (
                    layout.tensor_of(name)
                    or assembled(layout.holdings, name, info.shape, theirs)[0]
                )
            except MisfitError as error:
                other.append(f"{info.name}: {error}")
                continue
            layout.base.fetch([held.name] if held.name in layout.base.tensors else None)
            if not _is_same(held, info):
                other.append(f"{info.name}: {held.name} of the base has other values")
        if other:
            raise MatchError(
                f"{found.adapter.label}: the file holds {counted(len(other), 'weight')} of a base "
                f"that {'is' if len(other) == 1 else 'are'} not in {layout.base.label} with these "
                f"values:\n{listed(other)}",
                "It was trained on another base, or these were trained or merged too. Give the "
                "base that it was trained on.",
            )


def _is_same(held: TensorInfo, info: TensorInfo) -> bool:
    """Whether a tensor of a file has the values of the base, or those rounded to its own dtype."""
    if not (held.is_float and info.is_float) or held.dtype == info.dtype:
        return same_values(held, info)
    return held.shape == info.shape and all(
        np.array_equal(as_bytes(block, info.dtype), raw)
        for block, raw in zip(float_blocks(held), raw_blocks(info), strict=True)
    )
