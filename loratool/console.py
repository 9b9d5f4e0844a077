"""Words and tables for people.

stdout carries the answer, stderr the conversation: progress, warnings, errors, hints.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from loratool.adapter import Notice
from loratool.checkpoint.tensors import format_bytes
from loratool.errors import LoraToolError
from loratool.inspecting import InspectReport, ModuleReport
from loratool.merging import MergeReport

#: From this width on, a table shows kinds, both factor shapes and ranges in every column.
WIDE = 120

#: Below this width only the module, its rank and its norm are shown, rather than broken columns.
NARROW = 78

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)


def print_json(document: dict[str, Any]) -> None:
    # Strict JSON: a NaN would break the reader's parser, so it must never get here.
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def print_error(error: LoraToolError) -> None:
    err.print(f"[bold red]error:[/] {escape(error.message)}", soft_wrap=True)
    if error.hint:
        err.print(f"[bold cyan]hint:[/] {escape(error.hint)}", soft_wrap=True)


def print_warnings(notices: Iterable[Notice]) -> None:
    for notice in notices:
        label = "[bold red]cannot merge" if notice.refused else "[bold yellow]warning"
        err.print(f"{label}:[/] \\[{notice.code}] {escape(notice.message)}", soft_wrap=True)


@contextmanager
def progress_bar(enabled: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    """A bar with bytes, rate and time left on a terminal; nothing elsewhere."""
    if not enabled or not err.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=None), DownloadColumn(),
        TransferSpeedColumn(), TimeRemainingColumn(compact=True),
    )  # fmt: skip
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("merging", total=None)

        def advance(done: int, total: int, label: str) -> None:
            short = re.sub(r"^model-|\.safetensors$", "", label)
            bar.update(task, completed=done, total=total, description=short)

        yield advance


def _facts() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def _span(values: Sequence[float | None], digits: int = 2) -> str:
    """ "0.12" for one value, "0.12–0.34" for several that differ."""
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    low, high = _number(min(known), digits), _number(max(known), digits)
    return _number(known[0]) if len(known) == 1 else low if low == high else f"{low}–{high}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


# ---------------------------------------------------------------------------------------- inspect


def show_inspect(report: InspectReport, full: bool, tensors: bool, spectrum: bool) -> None:
    facts = _facts()
    facts.add_row("file", escape(report.file))
    facts.add_row("format", escape(report.description))
    if report.peft_type:
        facts.add_row("PEFT type", escape(report.peft_type))
    if report.base_model:
        facts.add_row("base model", escape(report.base_model))
    if report.format == "peft":
        _lora_facts(facts, report)
    dtypes = ", ".join(f"{n}× {d}" for d, n in report.dtypes.items())
    facts.add_row("tensors", f"{len(report.tensors)}" + (f" ({dtypes})" if dtypes else ""))
    size = f"{_count(report.parameters, 'parameter')}, {format_bytes(report.nbytes)}"
    facts.add_row("size", size)
    for key, value in list(report.metadata.items())[:5]:
        shown = value if len(value) <= 60 else value[:57] + "…"
        facts.add_row("metadata", escape(f"{key} = {shown}"))
    if len(report.metadata) > 5:
        facts.add_row("", f"and {len(report.metadata) - 5} more entries (--json shows all)")
    out.print(facts)
    if report.modules:
        out.print()
        out.print(_module_table(report.modules, full or len(report.modules) == 1))
    if spectrum and report.modules:
        _show_spectra(report.modules)
    if report.base is not None:
        _show_base(report)
    if tensors or (report.format not in ("peft", "empty") and len(report.tensors) <= 8):
        table = _table("tensor", "dtype", "shape")
        for info in report.tensors:
            table.add_row(escape(info.name), info.dtype, _shape(info.shape))
        out.print()
        out.print(table)


def _lora_facts(facts: Table, report: InspectReport) -> None:
    config = report.config
    if config:
        said = f"r {config.get('r', 8)}, alpha {config.get('lora_alpha', 8)}"
        flags = [k for k in ("use_rslora", "use_dora", "lora_bias") if config.get(k)]
        flags += [f for f in ("rank_pattern", "alpha_pattern") if config.get(f)]
        facts.add_row("configured", escape(", ".join([said, *flags])))
        targets = config.get("target_modules")
        shown = ", ".join(sorted(targets)) if isinstance(targets, list) else str(targets)
        facts.add_row("targets", escape(shown))
    ranks = sorted({m.rank for m in report.modules})
    scales = sorted({m.scale for m in report.modules if m.scale is not None})
    if ranks:
        found = f"rank {_values(ranks)}, scale {_values(scales) or 'unknown'}"
        facts.add_row("found", found)
    chosen = len(report.modules)
    shown = "" if chosen == report.total_modules else f" ({chosen} shown)"
    facts.add_row("modules", f"{report.total_modules}{shown}")
    if report.saved:
        names = [f"{name} {_shape(shape)}" for name, shape in report.saved.items()]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        facts.add_row("saved whole", escape(", ".join(names[:4]) + more))


def _values(numbers: Sequence[float]) -> str:
    if len(numbers) > 4:
        return f"{numbers[0]:g}–{numbers[-1]:g}"
    return ", ".join(f"{n:g}" for n in numbers)


def _shape(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold")
    for heading in headings:
        numeric = heading in _NUMERIC
        table.add_column(
            heading,
            justify="right" if numeric else "left",
            no_wrap=numeric,
            overflow="fold",
        )
    return table


_NUMERIC = {"r", "r/α", "alpha", "scale", "‖ΔW‖", "σ₁", "σ₁ max", "stable rank", "s.rank",
            "‖ΔW‖/‖W‖"}  # fmt: skip


def _module_table(modules: list[ModuleReport], full: bool) -> Table:
    """One line per group of modules that differ only in their numbers, under their layers."""
    wide = out.width >= WIDE
    relative = any(m.relative_norm is not None for m in modules)
    headings = ["module", "kind", "r", "alpha", "scale", "A", "B", "dtype", "‖ΔW‖", "σ₁",
                "stable rank"] if wide else [
                "module", "r/α", "scale", "out×in", "‖ΔW‖", "σ₁ max", "s.rank"]  # fmt: skip
    if out.width < NARROW:
        headings = ["module", "r/α", "‖ΔW‖"]
    if relative:
        headings.append("‖ΔW‖/‖W‖")
    table = _table(*headings)
    section = ""
    for name, group in _folded(modules, full):
        head, leaf = _split(name)
        if head != section and head:
            table.add_row(f"[cyan]{escape(head)}[/]")
        section = head
        table.add_row(*_module_cells(leaf, bool(head), group, headings))
    return table


def _module_cells(
    leaf: str, indented: bool, group: list[ModuleReport], headings: list[str]
) -> list[str]:
    one = group[0]
    stable = [m.stable_rank for m in group if m.stable_rank is not None]
    largest = [m.spectral_norm for m in group if m.spectral_norm is not None]
    cells = {
        "module": ("  " if indented else "") + escape(leaf) + (" (DoRA)" if one.dora else ""),
        "kind": one.kind,
        "r": str(one.rank),
        "alpha": "?" if one.alpha is None else f"{one.alpha:g}",
        "r/α": f"{one.rank}/" + ("?" if one.alpha is None else f"{one.alpha:g}"),
        "scale": "?" if one.scale is None else f"{one.scale:.4g}",
        "A": _shape(one.shapes["A"]),
        "B": _shape(one.shapes["B"]),
        "out×in": f"{one.shapes['B'][0]}×{math.prod(one.shapes['A'][1:])}"
        if one.shapes["B"] else "–",
        "dtype": one.dtype,
        "‖ΔW‖": _span([m.delta_norm for m in group]),
        "σ₁": _span([m.spectral_norm for m in group]),
        "σ₁ max": _number(max(largest) if largest else None),
        "stable rank": _span([m.stable_rank for m in group]),
        "s.rank": _number(statistics.median(stable) if stable else None, 2),
        "‖ΔW‖/‖W‖": _span([m.relative_norm for m in group]),
    }  # fmt: skip
    return [cells[heading] for heading in headings]


def _folded(modules: list[ModuleReport], full: bool) -> list[tuple[str, list[ModuleReport]]]:
    """Modules alike but for the numbers in their paths, as `(path with ranges, modules)`."""
    if full:
        return [(m.path, [m]) for m in modules]
    groups: dict[tuple[Any, ...], list[ModuleReport]] = {}
    for m in modules:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "#", m.path)
        key = (pattern, m.kind, m.rank, m.alpha, m.scale, str(m.shapes), m.dtype, m.dora)
        groups.setdefault(key, []).append(m)
    return [(_ranged(key[0], [m.path for m in group]), group) for key, group in groups.items()]


def _ranged(pattern: str, paths: list[str]) -> str:
    """ "layers.#.q" with the paths of layers 0 to 3 -> "layers.{0-3}.q"."""
    columns = list(zip(*([int(n) for n in _numbers(p)] for p in paths), strict=True))
    parts = pattern.split("#")
    named = [_ranges(sorted(set(numbers))) for numbers in columns]
    return parts[0] + "".join(r + part for r, part in zip(named, parts[1:], strict=True))


def _numbers(path: str) -> list[str]:
    return [part for part in path.split(".") if part.isdigit()]


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    shown = [f"{a}-{b}" if a != b else str(a) for a, b in runs]
    return "{" + ",".join(shown[:4]) + (",…" if len(shown) > 4 else "") + "}"


def _split(name: str) -> tuple[str, str]:
    """Path up to and with its last number, and the rest."""
    found = re.match(r"(.*(?:^|\.)(?:\d+|\{[^}]*\}))\.(.+)$", name)
    return (found[1], found[2]) if found else ("", name)


def _show_spectra(modules: list[ModuleReport]) -> None:
    table = _table("module", "singular values of ΔW", "σ₁", "σᵣ")
    for m in modules:
        values = m.singular_values or []
        bars = _bars(values)
        first, last = (_number(values[0]), _number(values[-1])) if values else ("–", "–")
        table.add_row(escape(m.path), bars, first, last)
    out.print()
    out.print(table)


def _bars(values: Sequence[float], width: int = 16) -> str:
    """Singular values as a line of bars, the first one full height."""
    if not values or values[0] <= 0:
        return "–"
    step = max(1, math.ceil(len(values) / width))
    shown = values[::step]
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * v / values[0]))] for v in shown)


def _show_base(report: InspectReport) -> None:
    base = report.base
    assert base is not None
    facts = _facts()
    facts.add_row("base", f"{escape(base.source)} ({escape(base.model_type or 'no config')}, "
                  f"{_count(base.parameters, 'parameter')})")  # fmt: skip
    facts.add_row("share", f"{base.trainable_share:.3%} of the base's parameters")
    if base.unmatched:
        facts.add_row("unmatched", f"[red]{len(base.unmatched)} parts do not fit this base[/]")
    out.print()
    out.print(facts)
    table = _table("base weight", "adapted", "of")
    for entry in base.coverage:
        style = "dim" if not entry.adapted else ""
        table.add_row(escape(entry.name), str(entry.adapted), str(entry.total), style=style)
    out.print(table)


# ------------------------------------------------------------------------------------------ merge


def show_merge(report: MergeReport, verbose: bool) -> None:
    if report.dry_run:
        out.print("[bold]Plan[/] (nothing was written)")
    facts = _facts()
    facts.add_row("base", escape(report.base))
    for adapter, weight in zip(report.adapters, report.weights, strict=True):
        facts.add_row("adapter", escape(adapter) + (f"  × {weight:g}" if weight != 1 else ""))
    kept = "each tensor's own" if report.dtype == "base" else report.dtype
    facts.add_row("dtype", kept)
    facts.add_row("modules", f"{report.modules} merged")
    words = {"merge": "merged", "replace": "replaced", "add": "added", "cast": "cast",
             "copy": "copied"}  # fmt: skip
    done = [f"{n} {words[action]}" for action, n in report.tensors.items() if n]
    facts.add_row("tensors", ", ".join(done))
    for action in ("replace", "add"):
        names = report.changes[action]
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 and not verbose else ""
            shown = names if verbose else names[:5]
            facts.add_row(words[action], escape(", ".join(shown)) + more)
    if verbose:
        facts.add_row("merged", escape("\n".join(report.changes["merge"])))
    if report.config_changes:
        changed = ", ".join(f"{k} = {v}" for k, v in report.config_changes.items())
        facts.add_row("config.json", escape(changed))
    if report.left_out:
        facts.add_row("left out", escape(", ".join(report.left_out)))
    if report.dry_run:
        facts.add_row("to read", format_bytes(report.bytes_to_read))
        free = format_bytes(report.bytes_free)
        room = "" if report.bytes_free > report.bytes_needed else " [bold red](not enough)[/]"
        facts.add_row("to write", f"{format_bytes(report.bytes_needed)} of {free} free{room}")
    else:
        # The seconds include the import of torch, which says nothing about small models' speed.
        rate = ""
        if report.bytes_written > 100e6:
            rate = f" ({format_bytes(report.bytes_written / max(report.seconds, 1e-9))}/s)"
        facts.add_row(
            "written",
            f"{format_bytes(report.bytes_written)} in {len(report.shards)} "
            f"{'file' if len(report.shards) == 1 else 'files'}, "
            f"{report.seconds:.1f} s{rate}",
        )
        if report.subnormal or report.zeroed:
            share = 100 * (report.subnormal + report.zeroed) / max(1, report.parameters)
            facts.add_row(
                "small values",
                f"{report.subnormal:,} became subnormal, {report.zeroed:,} became zero "
                f"({share:.2g}% of all)",
            )
        facts.add_row("output", escape(report.output))
    out.print(facts)
