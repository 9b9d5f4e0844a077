"""The charts of a sheet, drawn by matplotlib: as SVG in a page, or as a picture by themselves."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.errors import UsageError
from loratool.sheet import Bars, Chart, Curves, HeatMap
from loratool.storage.onefile import write_file
from loratool.text import printable
from loratool.words import number_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: What `--plot` can write.
PICTURES = (".png", ".svg", ".pdf")

#: Stands for the colour of the text around a chart, which differs between light and dark.
_INK = "#123457"

#: Colours that people with any kind of colour vision tell apart (Okabe and Ito, 2008), without
#: yellow, which is too light on white.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_DASHES = ("-", "--", ":")

#: Rows and columns of a heat map up to which every one is labelled, and numbers are written in.
_LABELLED = 40
_NUMBERED = 12
#: Letters that fit below a heat map side by side, and those of the numbers of layers.
_ACROSS, _NUMBER = 76, 4

_MISSING = "Charts are drawn by matplotlib, which is not installed."
_INSTALL = "Install it: pip install 'loratool[plot]'."


def has_plots() -> bool:
    """Whether charts can be drawn here."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def check_plots() -> None:
    """Raise UsageError where charts cannot be drawn."""
    if not has_plots():
        raise UsageError(_MISSING, _INSTALL)


def write_plot(charts: Sequence[Chart], file: Path) -> None:
    """Write charts one below the other as the picture that the name's ending says.

    Raises UsageError where there is none, or no matplotlib.
    """
    check_plots()
    if not charts:
        raise UsageError("There is nothing to draw.", "Omit --plot.")
    with _settings("#1b1b1b"):
        figure = _figure(charts)
        data = io.BytesIO()
        kind = file.suffix.lower().lstrip(".")
        # Without a date, the same charts are the same bytes.
        undated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
        figure.savefig(data, format=kind, dpi=150, facecolor="white", metadata=undated)
    write_file(file, data.getvalue())


def svg_of(chart: Chart) -> str:
    """A chart as an SVG element for a page, in the colour of the text around it."""
    with _settings(_INK):
        data = io.StringIO()
        _figure([chart]).savefig(data, format="svg", transparent=True, metadata={"Date": None})
    text = data.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    # What names the file's kind is for files of their own; a caption says what is seen.
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)


def said_of(chart: Chart) -> str:
    """A chart in a sentence, for those who do not see it."""
    if isinstance(chart, HeatMap):
        known = [
            (value, row, column)
            for row, values in zip(chart.rows, chart.values, strict=True)
            for column, value in zip(chart.columns, values, strict=True)
            if value is not None and math.isfinite(value)
        ]
        size = f"{len(chart.rows)} by {len(chart.columns)}"
        if not known:
            return f"Heat map, {size}: nothing is known."
        low, high = min(known), max(known)
        return (
            f"Heat map, {size}: from {number_text(low[0])} ({low[1]}, {low[2]}) to "
            f"{number_text(high[0])} ({high[1]}, {high[2]})."
        )
    if isinstance(chart, Curves):
        ends = [f"{name} from {number_text(y[0])} to {number_text(y[-1])}"
                for name, _, y in chart.series if y]  # fmt: skip
        return f"{chart.y} over {chart.x}: {'; '.join(ends)}."
    said = []
    for name, values in chart.series:
        pairs = zip(chart.labels, values, strict=True)
        what = f"{name}: " if len(chart.series) > 1 else ""
        said.append(what + ", ".join(f"{label} {number_text(value)}" for label, value in pairs))
    return f"{chart.y}: {'; '.join(said)}."


@contextmanager
def _settings(ink: str) -> Iterator[None]:
    import matplotlib as mpl

    colour = {f"{part}.color": ink for part in ("xtick", "ytick", "text")}
    with mpl.rc_context(
        {
            **colour, "axes.labelcolor": ink, "axes.edgecolor": ink, "axes.titlecolor": ink,
            "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
            "font.size": 9, "font.family": ["DejaVu Sans"], "axes.titlesize": 10,
            "svg.fonttype": "none", "svg.hashsalt": "loratool", "text.parse_math": False,
            "axes.formatter.use_mathtext": False, "pdf.fonttype": 42,
        }
    ), warnings.catch_warnings():  # fmt: skip
        # A browser has more fonts; in a picture a box stands for what this font lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


def _figure(charts: Sequence[Chart]) -> Figure:
    from matplotlib.figure import Figure

    heights = [_height(chart) for chart in charts]
    figure = Figure(figsize=(8, sum(heights)), layout="constrained")
    grid = figure.subplots(len(charts), 1, squeeze=False, height_ratios=heights)
    for chart, axes in zip(charts, grid[:, 0], strict=True):
        axes.set_title(_shown(chart.title))
        if isinstance(chart, HeatMap):
            _heat(figure, axes, chart)
        elif isinstance(chart, Curves):
            _curves(axes, chart)
        else:
            _bars(axes, chart)
    return figure


def _height(chart: Chart) -> float:
    """Inches of a chart that is 8 inches wide."""
    if isinstance(chart, HeatMap):
        return 1.1 + 0.26 * min(len(chart.rows), _LABELLED) + 0.4 * _slants(chart)
    return 3.2


def _step(columns: Sequence[str]) -> int:
    """Every how many columns has its name below it: of numbers as many as fit side by side."""
    widest = max(map(len, columns), default=0)
    most = _ACROSS / (widest + 0.5) if widest <= _NUMBER else _LABELLED
    return max(1, math.ceil(len(columns) / most))


def _slants(chart: HeatMap) -> bool:
    """Whether the names of the columns would run into each other if they lay flat."""
    names = chart.columns[:: _step(chart.columns)]
    room = 2 * _ACROSS / (len(names) or 1)
    return any(len(one) + len(other) > room for one, other in pairwise(names))


def _heat(figure: Figure, axes: Axes, chart: HeatMap) -> None:
    import matplotlib as mpl
    import numpy as np

    values = np.array([[math.nan if v is None else v for v in row] for row in chart.values], float)
    values[~np.isfinite(values)] = math.nan
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if chart.middle is not None:
        far = max(abs(high - chart.middle), abs(low - chart.middle), chart.reach)
        low, high = chart.middle - far, chart.middle + far
    name = "viridis" if chart.middle is None else "RdBu_r"
    colours = mpl.colormaps[name].with_extremes(bad=(0, 0, 0, 0))
    if low == high:
        low, high = min(0.0, low), max(0.0, high) or 1.0
    image = axes.imshow(values, aspect="auto", cmap=colours, vmin=low, vmax=high,
                        interpolation="nearest")  # fmt: skip
    rows, columns = -(-len(chart.rows) // _LABELLED), _step(chart.columns)
    for names, axis, step in ((chart.rows, axes.yaxis, rows), (chart.columns, axes.xaxis, columns)):
        axis.set_ticks(range(0, len(names), step), [_shown(n, 40) for n in names[::step]])
    if _slants(chart):
        axes.tick_params("x", labelrotation=20)
    if len(chart.columns) <= _NUMBERED:
        _numbers(axes, values, image)
    axes.set_xlabel(_shown(chart.across))
    figure.colorbar(image, ax=axes, label=_shown(chart.unit), pad=0.01)


def _numbers(axes: Axes, values: Any, image: Any) -> None:
    """Write the numbers into the cells, light on dark and dark on light."""
    for (row, column), value in _cells(values):
        red, green, blue, _ = image.cmap(image.norm(value))
        bright = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45
        axes.text(column, row, number_text(value, 2), ha="center", va="center", fontsize=7,
                  color="#000000" if bright else "#ffffff")  # fmt: skip


def _cells(values: Any) -> Iterator[tuple[tuple[int, int], float]]:
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            if math.isfinite(value):
                yield (row, column), value


def _curves(axes: Axes, chart: Curves) -> None:
    for number, (name, x, y) in enumerate(chart.series):
        style = _DASHES[number // len(_COLOURS) % len(_DASHES)]
        if chart.log_y:  # zero has no place there
            y = [value if value > 0 else math.nan for value in y]
        axes.plot(x, y, style, color=_COLOURS[number % len(_COLOURS)], label=_shown(name, 40),
                  marker="." if len(x) < 20 else None)  # fmt: skip
    axes.set_xlabel(_shown(chart.x))
    axes.set_ylabel(_shown(chart.y))
    if chart.log_y:
        axes.set_yscale("log")
        _plain_numbers(axes)
    else:
        axes.set_ylim(bottom=0)
    if len(chart.series) > 1:
        axes.legend(frameon=False, fontsize=7, ncols=2)


def _bars(axes: Axes, chart: Bars) -> None:
    count = len(chart.series)
    width = 0.8 / max(1, count)
    for number, (name, values) in enumerate(chart.series):
        places = [i + (number - (count - 1) / 2) * width for i in range(len(values))]
        axes.bar(places, values, width, color=_COLOURS[number % len(_COLOURS)], label=_shown(name))
    step = -(-len(chart.labels) // _LABELLED)
    axes.set_xticks(
        range(0, len(chart.labels), step), [_shown(n, 24) for n in chart.labels[::step]]
    )
    if sum(map(len, chart.labels)) > 60:
        axes.tick_params(axis="x", rotation=90)
    axes.set_ylabel(_shown(chart.y))
    if chart.log_y:
        axes.set_yscale("symlog", linthresh=1)
        _plain_numbers(axes)
    if count > 1:
        axes.legend(frameon=False, fontsize=8)


def _plain_numbers(axes: Axes) -> None:
    """Numbers of a logarithmic axis as words, not as formulas, which are switched off."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value)))
    low, high = axes.get_ylim()
    if low <= 0 or high / low > 20:
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:  # hardly a power of ten among them
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: number_text(value)))


def _shown(text: str, most: int = 100) -> str:
    """Text on one line, cut where it would push the chart away."""
    line = printable(text)
    return line if len(line) <= most else line[: most - 1] + "…"
