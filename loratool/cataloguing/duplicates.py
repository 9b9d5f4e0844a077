"""The same weights under two names: by a hash of the tensors' bytes, never of their header.

Whole files are read only where names, dtypes, shapes and a few bytes are the same already.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from loratool.adapters.adapter import Adapter
from loratool.adapters.norms import norms_of
from loratool.cataloguing.describing import opened
from loratool.cataloguing.entry import CatalogEntry
from loratool.cataloguing.units import Unit
from loratool.cataloguing.walking import FilesIn
from loratool.errors import LoraToolError
from loratool.storage.hashing import Hasher
from loratool.storage.tensors import FilePool, TensorInfo
from loratool.storage.values import raw_blocks

#: An entry, and where it was read from.
Listed = tuple[CatalogEntry, FilesIn, Unit]

#: Norms of equal deltas agree this well, relatively, whatever dtype they are stored in.
_NORMS = 0.02


def mark_copies(listed: Sequence[Listed], advance: Callable[[str], None]) -> None:
    """Set `duplicate_of` of every entry whose tensors are those of one before it, byte for byte."""
    for group in _alike(listed, lambda entry: entry.likeness):
        first: dict[str, str] = {}
        digests: dict[object, str] = {}
        for entry, place, unit in group:
            advance(entry.path)
            try:
                digest = _digest(place, unit, digests)
            except (LoraToolError, OSError):
                continue  # it changed meanwhile; nothing is said of it
            same = first.setdefault(digest, entry.path)
            if same != entry.path:
                entry.duplicate_of = same


def mark_equal(
    listed: Sequence[Listed],
    are_equal: Callable[[str, str], bool],
    advance: Callable[[str], None],
) -> None:
    """The same where the deltas are equal, however they are stored. `are_equal` compares two
    adapters by their labels; it is asked where the norms of all modules agree."""
    for group in _alike(listed, lambda entry: entry.outline):
        known: list[tuple[CatalogEntry, dict[str, float]]] = []
        for entry, place, unit in group:
            advance(entry.path)
            try:
                norms = _norms(place, unit)
            except (LoraToolError, OSError):
                continue
            if norms is None:
                continue
            twin = next(
                (
                    other.path
                    for other, theirs in known
                    if _near(norms, theirs) and _agree(other, entry, are_equal)
                ),
                None,
            )
            if twin is None:
                known.append((entry, norms))
            elif entry.duplicate_of is None:
                entry.duplicate_of = twin


def count_alike(listed: Sequence[Listed], equal: bool) -> int:
    """How many files will be read as a whole."""
    groups = [*_alike(listed, lambda entry: entry.likeness)]
    groups += [*_alike(listed, lambda entry: entry.outline)] if equal else []
    return sum(map(len, groups))


def _alike(listed: Iterable[Listed], key: Callable[[CatalogEntry], str]) -> Iterator[list[Listed]]:
    """The groups of several that have the same key."""
    groups: dict[str, list[Listed]] = defaultdict(list)
    for one in listed:
        if key(one[0]):
            groups[key(one[0])].append(one)
    return (group for group in groups.values() if len(group) > 1)


def _digest(place: FilesIn, unit: Unit, known: dict[object, str]) -> str:
    """The digest of all tensors, by name; of files that are the same on the disk one for all."""
    tensors: Mapping[str, TensorInfo] = opened(place, unit).tensors
    key = tuple(sorted({info.stamp for info in tensors.values() if info.stamp is not None}))
    if key not in known:
        hasher = Hasher()
        with FilePool() as files:
            for name in sorted(tensors):
                hasher.update(f"{tensors[name]}\n".encode("utf-8", "replace"))
                for block in raw_blocks(tensors[name], files):
                    hasher.update(block)
        known[key] = hasher.text
    return known[key]


def _norms(place: FilesIn, unit: Unit) -> dict[str, float] | None:
    """The norm of every module's delta; None where one cannot be told."""
    adapter = opened(place, unit)
    if not isinstance(adapter, Adapter):
        return None
    with FilePool() as files:
        found = norms_of(list(adapter.modules.values()), files)
    norms = {}
    for path, one in zip(adapter.modules, found, strict=True):
        if one is None or one.values is None:
            return None
        norms[path] = float((one.values**2).sum() ** 0.5)
    return norms


def _near(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return all(abs(n - other[path]) <= _NORMS * max(n, other[path]) for path, n in one.items())


def _agree(one: CatalogEntry, other: CatalogEntry, are_equal: Callable[[str, str], bool]) -> bool:
    try:
        return are_equal(one.label, other.label)
    except (LoraToolError, OSError):
        return False
