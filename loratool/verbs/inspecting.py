"""Many adapters looked at: one after the other, or each by a task of a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loratool.errors import LoraToolError
from loratool.streams.cluster import Cluster, ClusterCall
from loratool.verbs.inputs import Source
from loratool.verbs.inspect import InspectReport, inspect
from loratool.verbs.making import as_place, recalled, recordable

#: Bytes of memory that one task of a cluster takes at most.
_MEMORY = 1 << 30


def inspect_all(
    sources: Sequence[Source], options: Mapping[str, Any], ray: str | None = None
) -> Iterator[tuple[Source, InspectReport | LoraToolError]]:
    """The report of each adapter in the order given, or the error that there is in its place.

    `options` are those of `inspect`; with `ray`, an address or "", a cluster's tasks do it.
    """
    if ray is None:
        for source in sources:
            yield source, _inspected(source, options)
        return
    found: dict[str, InspectReport | LoraToolError] = {}
    with Cluster(ray, 1) as cluster:
        base = options.get("base")
        told = {**options, "base": None if base is None else as_place(base)}
        calls = [
            ClusterCall(
                str(number), (str(as_place(source)), str(source), recordable(told)), _MEMORY
            )
            for number, source in enumerate(sources)
        ]
        found = dict(cluster.results(_inspect_one, calls))
    for number, source in enumerate(sources):
        yield source, found[str(number)]


def _inspect_one(place: str, source: str, options: dict[str, Any]) -> InspectReport | LoraToolError:
    """What one task does; `source` is what the user calls the adapter."""
    found = _inspected(place, recalled(options))
    if isinstance(found, InspectReport) and found.source == place:
        found.source = source
    if isinstance(found, LoraToolError):
        found.message = found.message.replace(place, source)
        found.hint = found.hint.replace(place, source)
    return found


def _inspected(source: Source, options: Mapping[str, Any]) -> InspectReport | LoraToolError:
    try:
        return inspect(source, **options)
    except LoraToolError as error:
        return error
