"""Show what `merge` did or would do."""

from __future__ import annotations

from loratool.merging.initial import Derivation
from loratool.merging.range_loss import RangeLoss
from loratool.merging.report import MergeReport
from loratool.rendering.sharing import is_part, share_facts
from loratool.rendering.terminal import fact_grid, out, verbatim, written_text
from loratool.storage.filenames import CONFIG
from loratool.words import format_bytes, percent


def _derivation(cost: Derivation) -> str:
    name = {"pissa": "PiSSA", "olora": "OLoRA"}[cost.how]
    tera = float(f"{cost.flops / 1e12:.2g}")
    each = "its matrix" if cost.matrices == 1 else f"each of {cost.matrices} matrices"
    text = f"{name}: one decomposition of {each}, about {tera:,.6g} TFLOP in float64"
    if cost.seconds is None:
        return text
    units = ((3600, "h"), (60, "min"), (1, "s"))
    size, unit = next((u for u in units if cost.seconds >= 1.5 * u[0]), units[-1])
    return f"{text}, about {max(1, round(cost.seconds / size))} {unit} here"


def small_values(lost: RangeLoss) -> str:
    """What float16 would lose, in words."""
    text = (
        f"about {percent(lost.subnormal)} of the values lose digits in float16, "
        f"{percent(lost.zeroed)} become zero (from {lost.sampled:,} of them)"
    )
    if lost.overflowing:
        text += f"; [red]{percent(lost.overflowing)} overflow, which stops the merge[/]"
    return text


def show_merge(report: MergeReport, verbose: bool) -> None:
    if report.dry_run:
        out.print("[bold]Plan[/] (nothing was written)")
    facts = fact_grid()
    facts.add_row("base", verbatim(report.base))
    given = zip(report.adapters, report.trained_on, report.weights, strict=True)
    for adapter, trained_on, weight in given:
        times = f"  × {weight:g}" if weight != 1 else ""
        named = f"  (trained on {trained_on})" if trained_on else ""
        facts.add_row("adapter", verbatim(adapter + times + named))
    if report.quantised:
        facts.add_row("quantised", verbatim(report.quantised))
    kept = "each tensor's own" if report.dtype == "base" else report.dtype
    facts.add_row("dtype", kept)
    if report.adapters:
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
            facts.add_row(words[action], ", ".join(map(verbatim, shown)) + more)
    if verbose:
        facts.add_row("merged", "\n".join(map(verbatim, report.changes["merge"])))
    if report.derivation is not None:
        facts.add_row("initialisation", _derivation(report.derivation))
    if report.kept_of_delta is not None:
        left = report.kept_of_delta
        kept_of_it = f"{percent(left.share)} of the delta (error {percent(left.error)})"
        if report.dry_run:
            facts.add_row("requantising", f"would keep about {kept_of_it}, from a sample")
        else:
            facts.add_row("requantising", f"kept {kept_of_it}")
    if report.config_changes:
        changed = ", ".join(f"{k} = {v}" for k, v in report.config_changes.items())
        facts.add_row(CONFIG, verbatim(changed))
    if report.tokenizer:
        facts.add_row("tokenizer", verbatim(report.tokenizer))
    if report.left_out:
        facts.add_row("left out", ", ".join(map(verbatim, report.left_out)))
    if report.dry_run:
        facts.add_row("to read", format_bytes(report.bytes_to_read))
        free = format_bytes(report.bytes_free)
        room = "" if report.bytes_free > report.bytes_needed else " [bold red](not enough)[/]"
        facts.add_row("to write", f"{format_bytes(report.bytes_needed)} of {free} free{room}")
        if report.range_loss is not None:
            facts.add_row("small values", small_values(report.range_loss))
        if report.reversible:
            share = report.undo_bytes / max(1, report.bytes_written)
            undo = f"about {format_bytes(report.undo_bytes)} more ({share:.1%}), from a sample"
            facts.add_row("undo file", undo)
    elif is_part(report.share):
        share_facts(facts, report.share, report.output)
    else:
        facts.add_row(
            "written", written_text(report.bytes_written, len(report.shards), report.seconds)
        )
        if report.subnormal or report.zeroed:
            share = 100 * (report.subnormal + report.zeroed) / max(1, report.parameters)
            facts.add_row(
                "small values",
                f"{report.subnormal:,} became subnormal, {report.zeroed:,} became zero "
                f"({share:.2g}% of all)",
            )
        if report.kept_of_delta is None and report.lost is not None:
            facts.add_row("rounding", f"took about {percent(report.lost)} of the delta")
        if report.verified:
            facts.add_row("verified", "[green]every value read back as computed[/]")
        if report.reversible:
            share = report.undo_bytes / max(1, report.bytes_written)
            undo = f"{format_bytes(report.undo_bytes)} ({share:.2%} of the output)"
            facts.add_row("undo file", undo)
        if report.kept:
            facts.add_row("output", verbatim(report.output))
        if report.resumed:
            count = f"{len(report.resumed)} of {len(report.shards)} shards"
            facts.add_row("resumed", f"{count} were there from an earlier run")
        if report.pushed:
            seen = "private" if report.private else "public"
            facts.add_row("repository", f"{'created, ' if report.created else ''}{seen}")
            facts.add_row("commit", verbatim(report.commit))
    if report.pushed and report.dry_run:
        facts.add_row("to push to", verbatim(report.pushed))
    out.print(facts)
    if report.pushed and not report.dry_run:
        out.print(verbatim(report.pushed), soft_wrap=True)
