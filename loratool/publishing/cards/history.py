"""How what a card describes was made: the command, the inputs with their hashes, the options."""

from __future__ import annotations

import re
import shlex
from contextlib import suppress
from typing import Any

from loratool.adapters.weighting import Weight, parse_weight
from loratool.errors import UsageError
from loratool.publishing.cards.facts import CardFacts, dicts, linked, number, part, reference, texts
from loratool.publishing.cards.markdown import code, one_line, prose, table
from loratool.words import counted, enumerated

#: Options that a command has by itself; they are left out of it.
_DEFAULTS: dict[str, dict[str, object]] = {
    "merge": {"dtype": "float16"},
    "combine": {"method": "sum", "majority_sign_method": "total", "seed": 0, "saved": "refuse"},
    "extract": {"dtype": "float16", "seed": 0},
    "resize": {},
    "unmerge": {},
    "dequantise": {"dtype": "float16", "quantised": "plain", "trained_here": True},
}


def how_made(facts: CardFacts) -> str:
    """The section, "" where nothing is known."""
    record = facts.record
    if not record:
        stale = "`loratool.json` describes other weights than these; nothing of it is repeated."
        return stale if facts.stale else ""
    line = _rebuilt(facts)
    made = ", ".join(f"{prose(str(k))} {prose(str(v))}"
                     for k, v in part(record, "versions").items())  # fmt: skip
    parts = [_block(line) if line else "", _inputs(record)]
    points = [f"Versions: {made}." if made else "", *_points(facts)]
    parts.append("\n".join(f"- {point}" for point in points if point))
    return "\n\n".join(filter(None, parts))


def _rebuilt(facts: CardFacts) -> str:
    """The command that gives this again, from the record; "" for one that is not known."""
    record, name = facts.record, facts.command
    if name not in _DEFAULTS:
        return ""
    removed = name == "unmerge"
    words = ["loratool", name]
    if name in ("merge", "extract", "unmerge", "dequantise"):
        words.append(reference(part(record, "base")))
    if name == "extract":
        words.append(reference(part(record, "tuned")))
    adapters = dicts(record.get("removed" if removed else "adapters"))
    words += [reference(entry) for entry in adapters]
    weights = [_weight(entry) for entry in adapters]
    known = [weight for weight in weights if weight is not None]
    if name != "resize" and len(known) == len(weights) and not all(w.is_one for w in known):
        # What unmerge records is what it added: the weights of the merge with another sign.
        words += [w for x in known for w in ("--weight", _weight_text(-x if removed else x))]
    for key, value in _chosen(record).items():
        if _DEFAULTS[name].get(key) == value:
            continue
        flag = "--" + key.replace("_", "-")
        for entry in value if isinstance(value, list) else [value]:
            words += [flag] if entry is True else [flag, _value(entry)]
    if name == "merge" and part(record, "options").get("quantised") == "requantise":
        words.append("--force")  # which formats of few bits ask for
    if name == "merge" and record.get("undo"):
        words.append("--reversible")
    if removed:
        words.append("--subtract")
    return shlex.join([one_line(word) for word in [*words, "-o"]] + ["OUT"])


def _weight(entry: dict[str, Any]) -> Weight | None:
    """What an adapter was multiplied with; None where the record does not tell."""
    said = entry.get("weight")
    amount = number(said)
    if amount is not None:
        return Weight(float(amount))
    with suppress(UsageError):
        return parse_weight(said) if isinstance(said, str) else None
    return None


def _weight_text(weight: Weight) -> str:
    return one_line(str(weight)) if weight.ranges else f"{weight.value:.12g}"


def _chosen(record: dict[str, Any]) -> dict[str, Any]:
    """The options that say something about the result."""
    options = {
        one_line(key): value
        for key, value in part(record, "options").items()
        if key != "weights" and value not in (None, False, [], "")
    }
    method = str(options.get("method", ""))
    idle = {
        "majority_sign_method": record.get("command") == "combine" and "ties" not in method,
        "seed": "dare" not in method if method else bool(options.get("exact")),
        "saved": options.get("saved") == "refuse",
        "allow_unmatched": record.get("command") == "unmerge",
    }
    return {key: value for key, value in options.items() if not idle.get(key)}


def _value(value: object) -> str:
    amount = number(value)
    if amount is None:
        return one_line(str(value))
    return str(value) if isinstance(value, int) else f"{amount:.12g}"


def _block(line: str) -> str:
    # A fence that is longer than any in the line, so that the line cannot end it.
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", line)), 0)
    return f"{fence}sh\n{line}\n{fence}"


def _inputs(record: dict[str, Any]) -> str:
    """The table of what went in."""
    rows = []
    base = part(record, "base")
    if base:
        role = "model" if record.get("command") == "unmerge" else "base"
        rows.append([linked(base), role, "", *_header_hash(base)])
    rows += [_adapter_row(entry, f"in the {role} before") for entry in dicts(base.get("adapters"))]
    tuned = part(record, "tuned")
    if tuned:
        rows.append([linked(tuned), "fine-tune", "", *_header_hash(tuned)])
    if record.get("command") == "unmerge":
        rows += [_adapter_row(entry, "taken out") for entry in dicts(record.get("removed"))]
        rows += [_adapter_row(entry, "still inside") for entry in dicts(record.get("adapters"))]
    else:
        rows += [_adapter_row(entry, "adapter") for entry in dicts(record.get("adapters"))]
    return table(["input", "role", "weight", "hash of", "sha256"], rows) if rows else ""


def _adapter_row(entry: dict[str, Any], role: str) -> list[str]:
    files = part(entry, "files")
    name = next((key for key in files if not key.endswith(".json")), "")
    weight = _weight(entry)
    return [
        linked(entry), role, "" if weight is None else _weight_text(weight),
        code(name) if name else "", _short(files.get(name)),
    ]  # fmt: skip


def _header_hash(model: dict[str, Any]) -> list[str]:
    digest = _short(model.get("header_sha256"))
    return ["names, dtypes and shapes" if digest else "", digest]


def _short(digest: object) -> str:
    return code(f"{digest[:16]}…") if isinstance(digest, str) and digest else ""


def _points(facts: CardFacts) -> list[str]:
    record, name = facts.record, facts.command
    result = part(record, "result")
    options = [
        f"{code(key)} {enumerated([code(_value(v)) for v in value])}"
        if isinstance(value, list)
        else code(key)
        if value is True
        else f"{code(key)} {code(_value(value))}"
        for key, value in _chosen(record).items()
    ]
    points = [f"Options: {', '.join(options)}." if options else ""]
    for entry in dicts(record.get("adapters")):
        if left := texts(entry.get("left_out")):
            named = enumerated([code(one_line(text)) for text in left], 4)
            points.append(f"Not taken of {linked(entry)}: {named}.")
    if name in ("merge", "unmerge"):
        points.append("All sums are taken in float32 and rounded once.")
        small = [int(number(result.get(key)) or 0) for key in ("subnormal", "zeroed")]
        if any(small):
            text = f"{small[0]:,} values became subnormal and {small[1]:,} became zero."
            points.append(f"Of the values that were not zero, {text}")
    if facts.undo:
        text = "is here: `loratool unmerge` gives the base back bit for bit."
        points.append(f"The undo file {text}")
    warned = _warnings(result)
    if warned:
        points.append(
            f"{counted(len(warned), 'warning')}: {enumerated([code(w) for w in warned])}."
        )
    return points


def _warnings(result: dict[str, Any]) -> list[str]:
    """Codes only: the sentences may name paths."""
    found = result.get("warnings")
    named = [str(entry.get("code")) for entry in dicts(found) if entry.get("code")]
    return list(dict.fromkeys([*texts(found), *named]))
