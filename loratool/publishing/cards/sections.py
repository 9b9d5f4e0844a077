"""The section of a model card that loratool writes, as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.adapters.experts import ExpertStack
from loratool.adapters.factors import Factors
from loratool.models.checkpoint import Checkpoint
from loratool.models.quantised.base import Dequantised
from loratool.models.quantised.refusals import is_plain
from loratool.paths import pattern, ranged
from loratool.publishing.cards.facts import (
    CardFacts,
    bases_named,
    dicts,
    dtype_names,
    hub_id,
    linked,
    number,
    part,
    sort_of,
    string,
    texts,
)
from loratool.publishing.cards.history import how_made
from loratool.publishing.cards.markdown import code, link, prose, span, table
from loratool.publishing.cards.usage import how_to_use
from loratool.words import counted, enumerated, format_bytes, percent

#: Lines of a table beyond which a card would be a listing.
_MOST = 50
_WORST = 5
#: What is kept of a module is not distinguished from all of it above this share.
_ALL = 1 - 1e-9


def section(facts: CardFacts, place: str) -> str:
    """Everything between the markers. `place` is where the code loads it from."""
    parts = {
        "What this is": _what(facts),
        "How it was made": how_made(facts),
        "Modules": _modules(facts),
        "What was kept": _kept(facts),
        "How to use": how_to_use(facts, place),
    }
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items() if text)


# ------------------------------------------------------------------------------- what this is


def _what(facts: CardFacts) -> str:
    if facts.adapter is not None:
        return _what_adapter(facts, facts.adapter)
    assert facts.model is not None
    return _what_model(facts, facts.model)


def _what_adapter(facts: CardFacts, adapter: Adapter) -> str:
    base = link(facts.base) if facts.base else "a base model that is not recorded here"
    inputs = [linked(entry) for entry in dicts(facts.record.get("adapters"))]
    if not adapter.is_read:
        first = f"This is {prose(adapter.description)}, for {base}."
    elif facts.command == "extract":
        tuned, before = part(facts.record, "tuned"), part(facts.record, "base")
        named = link(facts.base) if facts.base else linked(before)
        first = f"A LoRA adapter for {named}, extracted from the fine-tuned model {linked(tuned)}: "
        first += "the difference between the two, cut to low rank."
        if not facts.base:
            first += " The Hub id of the base is not recorded here."
    elif facts.command == "combine" and inputs:
        method = code(str(part(facts.record, "options").get("method") or "sum"))
        first = f"A LoRA adapter for {base}, combined from {enumerated(inputs)} by {method}."
    elif facts.command == "resize" and inputs:
        first = f"A LoRA adapter for {base}: {inputs[0]} resized{_old_ranks(facts)}."
    else:
        first = f"{sort_of(adapter)} for {base}."
    return f"{first}\n\n{_adapter_size(adapter)}"


def _old_ranks(facts: CardFacts) -> str:
    before = [
        float(rank)
        for entry in dicts(part(facts.record, "result").get("modules"))
        for rank in entry.get("ranks") or []
        if isinstance(rank, int)
    ]
    return f" from rank {span(before)}" if before else ""


def _adapter_size(adapter: Adapter) -> str:
    modules = adapter.modules.values()
    ranks = [float(m.rank) for m in modules]
    text = ""
    if ranks:
        word = "rank" if len(set(ranks)) == 1 else "ranks"
        text = f"It adapts {counted(len(ranks), 'module')} with {word} {span(ranks)}"
        if any(m.magnitude is not None for m in modules):
            text += " and DoRA"
        text += ". "
    if adapter.functions:
        text += f"{counted(len(adapter.functions), 'weight', 'is')} made anew of the base's own. "
    if adapter.replaced:
        text += f"{counted(len(adapter.replaced), 'tensor', 'is')} saved whole. "
    if adapter.token_rows:
        rows = sum(len(r.indices) for r in adapter.token_rows.values())
        text += f"{counted(rows, 'token')} of the vocabulary {'has' if rows == 1 else 'have'} "
        text += "trained embeddings. "
    tensors = adapter.tensors.values()
    size = f"{counted(adapter.parameters, 'parameter')} in {dtype_names(tensors) or 'no tensors'}"
    return f"{text}It holds {size}, {format_bytes(adapter.nbytes)}."


def _what_model(facts: CardFacts, model: Checkpoint) -> str:
    first = ""
    inputs = [linked(entry) for entry in dicts(facts.record.get("adapters"))]
    base = part(facts.record, "base")
    named = link(facts.base) if facts.base else linked(base)
    if facts.command == "merge" and inputs:
        what = "an adapter" if len(inputs) == 1 else f"{len(inputs)} adapters"
        first = f"{named} with {what} merged into its weights: {enumerated(inputs)}. "
        first += _said_bases(facts) + _said_treatment(facts)
    elif facts.command == "dequantise":
        form = prose(string(base.get("quantised"))) or "quantised"
        first = f"{named}, dequantised: the plain model that its {form} weights stand for. "
    elif facts.command == "unmerge":
        removed = enumerated([linked(entry) for entry in dicts(facts.record.get("removed"))])
        first = f"{linked(base)} without {removed}, whose deltas were subtracted and the result "
        first += "rounded once: near the model they were merged into, not the same bit for bit. "
    elif facts.base:
        first = f"The base model is {link(facts.base)}. "
    classes = texts(model.config.get("architectures"))
    kind = enumerated([code(name) for name in [*classes[:1], model.model_type][:1] if name])
    what = f"The model ({kind})" if kind else "The model"
    tensors = counted(len(model.tensors), "tensor")
    return f"{first}{what} has {tensors}, {_model_size(model)}, {_bytes(model)}."


def _model_size(model: Checkpoint) -> str:
    """Its parameters and what they are stored in."""
    size = counted(model.parameters, "parameter")
    if isinstance(model, Dequantised):
        plain = [info for name, info in model.tensors.items() if name not in model.weights]
        rest = f", all else is {dtype_names(plain)}" if plain else ""
        count = counted(len(model.weights), "weight", "is")
        return f"{size} ({count} quantised as {prose(model.title)}{rest})"
    if not is_plain(model):  # in a form that is not read: parts of weights are no parameters
        return "of quantised weights"
    return f"{size} in {dtype_names(model.tensors.values())}"


def _said_treatment(facts: CardFacts) -> str:
    """What became of a base that was quantised."""
    form = prose(string(part(facts.record, "base").get("quantised")))
    if not form:
        return ""
    become = {
        "plain": "all of it was dequantised",
        "keep": "what is adapted was dequantised, the rest is as it was",
        "requantise": "what is adapted was quantised again, which rounds the change",
    }
    how = part(facts.record, "options").get("quantised")
    known = become.get(how) if isinstance(how, str) else None
    return f"The base is quantised ({form}): {known or 'what is quantised of it is as it was'}. "


def _bytes(model: Checkpoint) -> str:
    return f"{format_bytes(model.nbytes)} in {counted(len(model.files), 'file')}"


def _said_bases(facts: CardFacts) -> str:
    """What the adapters call their base, where the base that was taken has no id."""
    if hub_id(part(facts.record, "base").get("repo")):
        return ""
    if facts.base:
        return "That this is the base is what the adapters say. "
    named = enumerated(list(map(link, bases_named(facts.record))))
    return f"The Hub id of the base is not recorded; the adapters name {named}. " if named else ""


# ------------------------------------------------------------------------------------ modules


def _modules(facts: CardFacts) -> str:
    if facts.adapter is not None:
        parts = [_module_table(facts.adapter), _whole(facts.adapter)]
        return "\n\n".join(filter(None, parts))
    result = part(facts.record, "result")
    modules, tensors = number(result.get("modules")), part(result, "tensors")
    if facts.command not in ("merge", "unmerge") or modules is None:
        return ""
    verb = "subtracted from" if facts.command == "unmerge" else "merged into"
    changed = int(number(tensors.get("merge")) or 0)
    text = f"{counted(int(modules), 'module')} of the adapters {'was' if modules == 1 else 'were'} "
    text += f"{verb} {counted(changed, 'tensor')}."
    if changed < modules:
        text += " Where several adapters change one tensor, the sum is rounded once."
    words = {"replace": "replaced by an adapter's", "add": "added", "cast": "in another dtype only",
             "copy": "unchanged"}  # fmt: skip
    others = [
        f"{int(count):,} {words[key]}" for key in words if (count := number(tensors.get(key)))
    ]
    if others:
        text += f" Of the other tensors: {enumerated(others)}."
    changes = part(result, "config_changes")
    if changes:
        text += f" In `config.json` changed: {enumerated(list(map(code, changes)))}."
    inputs = _input_table(facts)
    return f"{text}\n\n{inputs}" if inputs else text


def _input_table(facts: CardFacts) -> str:
    """The modules of the adapters that went into a model, by its record."""
    entries = dicts(facts.record.get("removed" if facts.command == "unmerge" else "adapters"))
    rows = []
    for entry in entries:
        name = hub_id(entry.get("repo")) or string(entry.get("name"))
        for group in dicts(entry.get("modules")):
            kind = prose(string(group.get("kind"))) + (", DoRA" if group.get("dora") else "")
            numbers = [number(group.get(key)) for key in ("count", "rank", "alpha", "scale")]
            cells = ["unknown" if n is None else f"{n:.4g}" for n in numbers]
            rows.append([code(name), code(string(group.get("path"))), kind, *cells])
    headings = ["adapter", "module", "kind", "count", "rank", "alpha", "scale"]
    if len(entries) < 2:
        headings, rows = headings[1:], [row[1:] for row in rows]
    if not rows:
        return ""
    more = len(rows) - _MOST
    text = table(headings, rows[:_MOST])
    return f"{text}\n\nand {more} more kinds of module." if more > 0 else text


def _module_table(adapter: Adapter) -> str:
    """One line for the modules that differ only in the numbers of their path."""
    groups: dict[Any, dict[str, Factors]] = {}
    for path, module in adapter.modules.items():
        experts = module.experts if isinstance(module, ExpertStack) else 1
        kind = f"{experts} experts" if experts > 1 else module.kind
        key = pattern(path), kind, module.shape, module.magnitude is not None
        groups.setdefault(key, {})[path] = module
    rows = []
    for (_, kind, shape, dora), modules in groups.items():
        paths, group = list(modules), list(modules.values())
        rows.append([
            code(ranged(paths)), f"{kind}, DoRA" if dora else kind, f"{len(group):,}",
            f"{shape[0]}×{shape[1]}", span(m.rank for m in group),
            span(m.alpha for m in group), span(m.scale for m in group),
        ])  # fmt: skip
    if not rows:
        return ""
    text = table(["module", "kind", "count", "out×in", "rank", "alpha", "scale"], rows[:_MOST])
    more = len(rows) - _MOST
    return f"{text}\n\nand {more} more kinds of module." if more > 0 else text


def _whole(adapter: Adapter) -> str:
    """What the adapter holds beside factors."""
    lines = []
    if adapter.replaced:
        lines.append(f"Saved whole: {enumerated(list(map(code, folded(adapter.replaced))))}.")
    for path, rows in list(adapter.token_rows.items())[:_WORST]:
        lines.append(f"Trained rows of {code(path)}: {len(rows.indices):,}.")
    return "\n\n".join(lines)


def folded(names: Iterable[str]) -> list[str]:
    """Names with ranges for their numbers."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(pattern(name), []).append(name)
    return [ranged(group) for group in groups.values()]


# ------------------------------------------------------------------------------- what was kept


def _kept(facts: CardFacts) -> str:
    if facts.command not in ("combine", "resize", "extract"):
        return ""
    result = part(facts.record, "result")
    modules = _shares(result)
    if not modules:
        return ""
    symbol = "‖tuned − base‖²" if facts.command == "extract" else "‖ΔW‖²"
    parts = [_overall(facts, result, [kept for _, _, kept in modules], symbol)]
    dtype = part(facts.record, "options").get("dtype")
    if dtype in ("float16", "bfloat16"):
        parts[0] += f" What rounding the factors to {dtype} adds is not counted."
    worst = sorted((m for m in modules if m[2] < _ALL), key=lambda m: m[2])[:_WORST]
    if worst:
        most = len(modules) > _WORST
        parts.append("The modules that lost most:" if most else "Module by module:")
        rows = [
            [code(path), str(rank), percent(kept), percent(math.sqrt(max(0.0, 1 - kept)))]
            for path, rank, kept in worst
        ]
        parts.append(table(["module", "rank", "kept", "relative error"], rows))
    left = texts(result.get("left"))
    if left:
        text = f"Changed in the fine-tune and left out of the adapter: {len(left):,}, "
        parts.append(text + f"{enumerated(list(map(code, folded(left))))}.")
    return "\n\n".join(parts)


def _shares(result: dict[str, Any]) -> list[tuple[str, int, float]]:
    """Path, rank and share kept of every module, as extract and as the others record it."""
    modules = result.get("modules")
    entries: list[tuple[object, dict[str, Any]]] = [
        (entry.get("path"), entry) for entry in dicts(modules)
    ]
    if isinstance(modules, dict):
        entries = [(path, entry) for path, entry in modules.items() if isinstance(entry, dict)]
    found = []
    for path, entry in entries:
        kept, rank = number(entry.get("kept")), number(entry.get("rank"))
        if kept is not None and rank is not None:
            found.append((str(path), int(rank), min(1.0, max(0.0, kept))))
    return found


def _overall(facts: CardFacts, result: dict[str, Any], shares: list[float], symbol: str) -> str:
    extracted = facts.command == "extract"
    held = number(result.get("held" if extracted else "kept"))
    if held is not None:
        held = min(1.0, max(0.0, held))
        error = number(result.get("error"))
        error = math.sqrt(1 - held) if error is None else error
        where = "all tensors" if extracted else "all modules together"
        if held >= _ALL:
            return f"Nothing of {symbol} was cut."
        text = f"Over {where} the adapter keeps {percent(held)} of {symbol}, a relative error of "
        text += f"{percent(error)}."
        verified = number(result.get("verified"))
        if verified is not None:
            text += f" Read back and measured: {percent(verified)}."
        return text
    # Shares of single modules cannot be added up without their norms, which are not recorded.
    low, high = min(shares), max(shares)
    middle = percent(statistics.median(shares))
    if low >= _ALL:
        return f"Nothing of {symbol} was cut in any module."
    return (
        f"Of {symbol} the factors keep {percent(low)} to {percent(high)}, module by module "
        f"(median {middle})."
    )
