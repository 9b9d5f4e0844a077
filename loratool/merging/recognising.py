"""Which of the adapters that a model holds, by its record, are those that were given?"""

from __future__ import annotations

from collections.abc import Sequence

from loratool.adapters.adapter import Adapter
from loratool.adapters.weighting import Weight
from loratool.errors import RestoreError, listed
from loratool.merging.provenance import Merged, adapter_hashes
from loratool.storage.filenames import ADAPTER_CONFIG


def identify(
    adapters: Sequence[Adapter],
    held: Sequence[Merged],
    weights: Sequence[Weight] | None,
    beneath: Sequence[Merged] = (),
) -> list[int]:
    """Which of the recorded adapters the given ones are, as indices into `held`.

    `beneath` are those merged before, which cannot be taken off yet.

    Raises RestoreError for an adapter that is none of them, by the hash of its files, and for a
    weight that is not the one it was merged with.
    """
    found: list[int] = []
    given = [adapter_hashes(adapter) for adapter in adapters]
    for position, adapter in enumerate(adapters):
        digest, config = given[position]
        same = [
            i for i, entry in enumerate(held) if entry.weights_sha256 == digest and i not in found
        ]
        exact = [i for i in same if held[i].config_sha256 == config]
        if weights is not None:
            exact.sort(key=lambda i: held[i].weight != weights[position])
        if not exact:
            what = (
                f"its {ADAPTER_CONFIG} is not the one it was merged with"
                if same
                else "it is not among the adapters merged into the model, by the hash of its files"
            )
            hint = "Give the adapters as they were when they were merged."
            if any(entry.weights_sha256 == digest for entry in beneath):
                what = "it was merged earlier, before those that came last"
                hint = "Take the last ones off first; what comes out knows how to go on."
            raise RestoreError(
                f"{adapter.label}: {what}. Merged last:\n{listed(map(str, held))}", hint
            )
        index = exact[0]
        copies = given[position:].count(given[position])
        fitting = [i for i in exact if weights is None or held[i].weight == held[index].weight]
        if len(fitting) > copies and len({(held[i].weight, held[i].choice) for i in fitting}) > 1:
            parts = len({held[i].choice for i in fitting}) > 1
            raise RestoreError(
                f"{adapter.label} was merged more than once, with different "
                f"{'parts' if parts else 'weights'}:\n{listed(str(held[i]) for i in exact)}",
                "Give the adapter once for each."
                if parts
                else "Say which with --weight, or give the adapter once for each.",
            )
        if weights is not None and held[index].weight != weights[position]:
            raise RestoreError(
                f"{adapter.label} was merged with weight {held[index].weight}, "
                f"not {weights[position]}.",
                "Omit --weight; loratool.json has the weights.",
            )
        found.append(index)
    return found
