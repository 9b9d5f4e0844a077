"""How what a card describes was made: the command, the inputs with their hashes, the options."""

from __future__ import annotations

import shlex
from contextlib import suppress
from typing import Any

from loratool.adapters.weighting import Weight, parse_weight
from loratool.errors import UsageError
from loratool.publishing.cards.facts import CardFacts, dicts, linked, number, part, reference, texts
from loratool.sheet import (
    CodeBlock,
    Piece,
    Points,
    SheetTable,
    Words,
    code,
    joined_words,
    listed_words,
    said,
    separated,
    table_of,
)
from loratool.words import counted

#: Options that a command has by itself; they are left out of it.
_DEFAULTS: dict[str, dict[str, object]] = {
    "merge": {"dtype": "float16"},
    "combine": {"method": "sum", "majority_sign_method": "total", "seed": 0, "saved": "refuse"},
    "extract": {"dtype": "float16", "seed": 0},
    "resize": {},
    "unmerge": {},
    "dequantise": {"dtype": "float16", "quantised": "plain", "trained_here": True},
}


def how_made(facts: CardFacts) -> list[Piece]:
    """Nothing where nothing is known."""
    if not facts.record:
        stale = " describes other weights than these; nothing of it is repeated."
        return [said(code("loratool.json"), stale)] * facts.stale
    line, inputs, points = _rebuilt(facts), _inputs(facts.record), _points(facts)
    pieces: list[Piece] = [CodeBlock("sh", [line])] if line else []
    pieces += [inputs] if inputs.lines else []
    return pieces + ([Points(points)] if points else [])


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
    return shlex.join([*words, "-o", "OUT"])


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
    return str(weight) if weight.ranges else f"{weight.value:.12g}"


def _chosen(record: dict[str, Any]) -> dict[str, Any]:
    """The options that say something about the result."""
    options = {
        key: value
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
        return str(value)
    return str(value) if isinstance(value, int) else f"{amount:.12g}"


def _inputs(record: dict[str, Any]) -> SheetTable:
    """What went in."""
    rows: list[list[Words]] = []
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
    table = table_of("input", "role", "weight", "hash of", "sha256")
    for row in rows:
        table.add(*row)
    return table


def _adapter_row(entry: dict[str, Any], role: str) -> list[Words]:
    files = part(entry, "files")
    name = next((key for key in files if not key.endswith(".json")), "")
    weight = _weight(entry)
    return [
        linked(entry), role, "" if weight is None else _weight_text(weight),
        code(name) if name else "", _short(files.get(name)),
    ]  # fmt: skip


def _header_hash(model: dict[str, Any]) -> list[Words]:
    digest = _short(model.get("header_sha256"))
    return ["names, dtypes and shapes" if digest else "", digest]


def _short(digest: object) -> Words:
    return code(f"{digest[:16]}…") if isinstance(digest, str) and digest else ""


def _points(facts: CardFacts) -> list[Words]:
    record, name = facts.record, facts.command
    result = part(record, "result")
    points: list[Words] = []
    if versions := part(record, "versions"):
        made = ", ".join(f"{what} {version}" for what, version in versions.items())
        points.append(f"Versions: {made}.")
    if chosen := _chosen(record):
        options = separated(_option(key, value) for key, value in chosen.items())
        points.append(joined_words("Options: ", options, "."))
    for entry in dicts(record.get("adapters")):
        if left := texts(entry.get("left_out")):
            named = listed_words([code(text) for text in left], 4)
            points.append(joined_words("Not taken of ", linked(entry), ": ", named, "."))
    if name in ("merge", "unmerge"):
        points.append("All sums are taken in float32 and rounded once.")
        small = [int(number(result.get(key)) or 0) for key in ("subnormal", "zeroed")]
        if any(small):
            text = f"{small[0]:,} values became subnormal and {small[1]:,} became zero."
            points.append(f"Of the values that were not zero, {text}")
    if facts.undo:
        gives = " gives the base back bit for bit."
        points.append(("The undo file is here: ", code("loratool unmerge"), gives))
    if warned := _warnings(result):
        count = counted(len(warned), "warning")
        points.append(joined_words(f"{count}: ", listed_words(list(map(code, warned))), "."))
    return points


def _option(key: str, value: object) -> Words:
    if value is True:
        return code(key)
    values = value if isinstance(value, list) else [value]
    return joined_words(code(key), " ", listed_words([code(_value(entry)) for entry in values]))


def _warnings(result: dict[str, Any]) -> list[str]:
    """Codes only: the sentences may name paths."""
    found = result.get("warnings")
    named = [str(entry.get("code")) for entry in dicts(found) if entry.get("code")]
    return list(dict.fromkeys([*texts(found), *named]))
