"""Charts that several answers share: numbers of modules by layer, spectra."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loratool.paths import numbers_of, pattern
from loratool.sheet import Chart, Curves, HeatMap

#: Curves that are shown of more spectra than anybody can tell apart: one for each kind of module.
_CURVES = 12


def by_layer(
    title: str,
    unit: str,
    values: Iterable[tuple[str, float | None]],
    middle: float | None = None,
) -> list[Chart]:
    """A heat map of modules' numbers, kinds of modules by layers; none where nothing is known.

    The layer of a module is the first number of its path. Where several modules come to one place,
    as experts do, it is the largest of their numbers.
    """
    cells: dict[tuple[str, int | None], float] = {}
    for path, value in values:
        if value is None:
            continue
        numbers = numbers_of(path)
        place = pattern(path), numbers[0] if numbers else None
        cells[place] = max(value, cells.get(place, value))
    if not cells:
        return []
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    layers = sorted({layer for _, layer in cells}, key=lambda n: (n is not None, n or 0))
    rows = [[cells.get((kind, layer)) for layer in layers] for kind in kinds]
    named = ["–" if layer is None else str(layer) for layer in layers]
    return [HeatMap(title, _short(kinds), named, rows, unit, "layer", middle)]


def spectra(title: str, y: str, values: Sequence[tuple[str, Sequence[float]]]) -> list[Chart]:
    """Singular values by their number: a curve for each module, or where these are too many, one
    for each kind of them, the mean over its layers."""
    known = [(path, list(curve)) for path, curve in values if curve]
    if len(known) > _CURVES:
        kinds: dict[str, list[list[float]]] = {}
        for path, curve in known:
            kinds.setdefault(pattern(path), []).append(curve)
        known = [(kind, _mean(curves)) for kind, curves in kinds.items()][:_CURVES]
    if not known:
        return []
    names = _short([name for name, _ in known])
    series = [
        (name, list(map(float, range(1, len(curve) + 1))), curve)
        for name, (_, curve) in zip(names, known, strict=True)
    ]
    return [Curves(title, "number of the singular value", y, series, log_y=True)]


def _mean(curves: Sequence[Sequence[float]]) -> list[float]:
    length = max(map(len, curves))
    columns = [[curve[i] for curve in curves if i < len(curve)] for i in range(length)]
    return [sum(column) / len(column) for column in columns]


def _short(names: Sequence[str]) -> list[str]:
    """Names without what all of them begin with, up to a dot."""
    if len(names) < 2:
        return [name.rpartition("#.")[2] for name in names]
    parts = [name.split(".") for name in names]
    same = 0
    while all(len(p) > same + 1 and p[same] == parts[0][same] for p in parts):
        same += 1
    return [".".join(p[same:]) for p in parts]
