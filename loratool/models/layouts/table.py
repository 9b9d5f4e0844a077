"""What tensors of files are in memory, by the table that was derived from transformers.

`layouts.json` has rules by model_type. A rule replaces a run of the parts of a name between dots:
its pattern for files and its name in memory, with `#` for a number, `{e}` for an expert's number,
and `^` and `$` for the two ends of the name. Each rule is applied at most once, in the list's
order: those of the root to the whole name, then those of each part of the model (a sub-config with
a model_type of its own) to what follows the part's path. Names of memory pass through unchanged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from loratool.models.layouts.components import kind_of
from loratool.models.layouts.native import NATIVE_NAMES, NATIVE_RULES
from loratool.models.layouts.rules import NameRule, apply_rules
from loratool.models.layouts.shares import Share, by_config

#: The key of what holds for every model.
_ALL = "*"
#: Whose rules are tried on models that are not known.
_USUAL = "qwen2_moe"
#: What is not in a cache yet; None is that a name stays as it is.
_UNKNOWN: Any = object()


@dataclass(frozen=True)
class Segment:
    """What a tensor, or some of its rows, is in memory.

    Rows are those of the matrix `[out, in]`: of the first axis, or with `expert` or `stacked` of
    the second, in each expert alike.
    """

    #: The parameter's name in memory.
    memory: str
    #: Its number in a stack [experts, d1, d2].
    expert: int | None = None
    #: The numbers on disk are this share of all, and `expert` is still the number on disk.
    experts: tuple[Fraction, Fraction] | None = None
    #: The parameter's rows that the tensor holds; None is all.
    rows: Share | None = None
    #: The tensor's rows that hold them; None is all.
    into: Share | None = None
    #: With an expert that is [out, in] where the parameter is [in, out]: the columns that are its
    #: rows. Only adapters have such names.
    columns: Share | None = None
    #: Both are stacks of all experts.
    stacked: bool = False
    #: The last two axes are swapped on disk; or they may be, which the shape says.
    transposed: bool = False
    maybe_transposed: bool = False
    #: "rope:FIELD": rows stand in the order of `rope_order`, with as many heads as FIELD says;
    #: "interleaved": the two halves of the rows stand alternately, which is the same with one head.
    order: str = ""


def rope_order(rows: int, heads: int) -> tuple[int, ...]:
    """The row on disk of each row in memory, where files have the two halves of a rotary pair side
    by side and memory has all the first halves of a head before all the second ones."""
    size = rows // heads
    half = size // 2
    return tuple(
        head * size + 2 * at + side
        for head in range(heads)
        for side in (0, 1)
        for at in range(half)
    )


class Part(NamedTuple):
    """Where a sub-config's model is, its model_type where the config does not say, and the class
    whose entry it has, if not the type's."""

    key: str
    path: str
    model_type: str
    model: str = ""


@dataclass(frozen=True)
class LayoutEntry:
    """What is known of one model_type."""

    rules: tuple[NameRule, ...] = ()
    parts: tuple[Part, ...] = ()
    #: Names in memory of the output and input embeddings' modules.
    head: str = "lm_head"
    embedding: str = "model.embed_tokens"
    #: Parameters that the class itself can tie: (the tied one, the one it is).
    tied: tuple[tuple[str, str], ...] = ()
    #: Stacked parameters are [experts, in, out].
    transposed_experts: bool = False
    #: Modules with several stacked parameters, by the end of their path: their names in the order
    #: in which they were registered.
    parameters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


Table = Mapping[str, LayoutEntry]
#: Segments with `%s` for a number, the places of their numbers and of an expert's in a name.
_Templates = list[tuple[Segment, tuple[int, ...], int | None]]


def read_table(data: Mapping[str, Any]) -> Table:
    """The entries of a table, by model_type or class."""
    entries = {}
    for group in data["groups"]:
        parts = tuple(Part(*part) for part in group.get("parts", ()))
        head = group.get("head", "lm_head")
        embedding = group.get("embedding", usual_embedding(parts))
        tied = group.get("tied", [[f"{head}.weight", f"{embedding}.weight"]])
        entry = LayoutEntry(
            rules=tuple(map(NameRule.read, group["rules"])),
            parts=parts,
            head=head,
            embedding=embedding,
            tied=tuple((name, of) for name, of in tied),
            transposed_experts=group.get("transposed_experts", False),
            parameters={end: tuple(names) for end, names in group.get("parameters", {}).items()},
        )
        entries.update(dict.fromkeys(group["types"], entry))
    return entries


def usual_embedding(parts: Iterable[Part]) -> str:
    """Where the input embedding is, if an entry does not say: in the text's model."""
    paths = [part.path for part in parts if part.key == "text_config"]
    return f"{paths[0] if paths else 'model'}.embed_tokens"


@cache
def known_layouts() -> Table:
    """The table of the package."""
    text = resources.files("loratool.models.layouts").joinpath("layouts.json").read_text("utf-8")
    return read_table(json.loads(text))


class Names:
    """How one model's tensors are called in memory.

    `config` is the base's config.json and `names` those of its tensors, which say how many experts
    there are where two kinds of them share their numbers.
    """

    def __init__(
        self, config: Mapping[str, Any], names: Iterable[str] = (), table: Table | None = None
    ) -> None:
        self._table = known_layouts() if table is None else table
        self.entry = self._entry_of(config)
        self._config = config
        self._parts: list[LayoutEntry] = []
        self._scopes = list(self._find_scopes(config))
        literal = {
            pattern[at - 1]
            for _, _, rules in self._scopes
            for pattern in (rule.disk for rule in rules)
            for at, part in enumerate(pattern)
            if part.isdecimal() and at
        }
        # A number that a rule names is kept; all others are told apart by their place alone.
        kept = "".join(
            r"(?<!\d\.)" if part == "#" else rf"(?<!{re.escape(part)}\.)"
            for part in sorted(literal)
        )
        self._number = re.compile(rf"(?<![^.]){kept}(\d+)(?![^.])")
        self._known: dict[str, _Templates | None] = {}
        self._experts: dict[str, int] = {}
        self._experts = self._count_experts(names)

    def segments(self, name: str) -> tuple[Segment, ...]:
        """What a tensor of this name is, whichever spelling it has; without rules, itself."""
        if "#" in name:
            return (Segment(name),)
        pieces = self._number.split(name)
        key, numbers = "#".join(pieces[::2]), pieces[1::2]
        known = self._known.get(key, _UNKNOWN)
        if known is _UNKNOWN:
            known = self._known[key] = self._fold(key)
        if known is None:
            return (Segment(name),)
        filled = []
        for template, places, expert in known:
            # There are tens of thousands of experts' tensors, and __init__ would be half the time.
            made = object.__new__(Segment)
            values = made.__dict__
            values.update(template.__dict__)
            values["memory"] = template.memory % tuple([numbers[at] for at in places])
            if expert is not None:
                values["expert"] = int(numbers[expert])
                if template.experts is not None and key in self._experts:
                    start, stop = (int(share * self._experts[key]) for share in template.experts)
                    if not start <= values["expert"] < stop:
                        continue
                    values["expert"] -= start
                    values["experts"] = None
            filled.append(made)
        return tuple(filled)

    @property
    def parameters(self) -> dict[str, tuple[str, ...]]:
        """The stacked parameters of modules of the model and its parts; see LayoutEntry."""
        found: dict[str, tuple[str, ...]] = {}
        for entry in (*self._parts, self.entry):
            found.update(entry.parameters)
        return found

    @property
    def transposed_experts(self) -> bool:
        """Whether stacked parameters are [experts, in, out] in memory."""
        return any(entry.transposed_experts for entry in (self.entry, *self._parts))

    def _count_experts(self, names: Iterable[str]) -> dict[str, int]:
        """How many experts there are, of names whose numbers are shared by two kinds of them."""
        counts: dict[str, int] = {}
        if any("experts" in rule.attributes for _, _, rules in self._scopes for rule in rules):
            for name in names:
                segments = self.segments(name)
                if segments[0].experts is not None and segments[0].expert is not None:
                    key = self._number.sub("#", name)
                    counts[key] = max(counts.get(key, 0), segments[0].expert + 1)
        return counts

    # --- which rules, for which part of the model -------------------------------------------------

    def _entry_of(self, config: Mapping[str, Any]) -> LayoutEntry:
        classes = config.get("architectures") or ()
        keys = [*classes[:1], config.get("model_type")]
        known = next((self._table[key] for key in keys if key in self._table), None)
        self.is_known = known is not None
        if known is None:
            # What most mixtures of experts have; `gate_up_proj` says itself which comes first.
            return LayoutEntry(rules=self._table.get(_USUAL, LayoutEntry()).rules)
        return known

    def _find_scopes(
        self, config: Mapping[str, Any]
    ) -> Iterator[tuple[tuple[str, ...], str, Sequence[NameRule]]]:
        """(path, kind of part, rules): a path, or where that is not known a kind by its words."""
        general = self._table.get(_ALL, LayoutEntry()).rules
        native = NATIVE_RULES if config.get(NATIVE_NAMES) else ()
        yield (), "", (*native, *self.entry.rules, *general)
        if self.entry.parts:
            for part in self.entry.parts:
                value: Any = config
                for step in part.key.split("."):
                    value = value.get(step) if isinstance(value, Mapping) else None
                kind = value.get("model_type") if isinstance(value, Mapping) else None
                kind = kind or part.model_type
                own = part.model if kind == part.model_type else ""
                entry = self._table.get(own) or self._table.get(kind)
                self._parts += [entry] if entry is not None else []
                if entry is not None and entry.rules:
                    below = [rule.below(part.key) for rule in entry.rules]
                    yield tuple(part.path.split(".")), "", below
            return
        for key, value in config.items():
            if isinstance(value, Mapping) and value.get("model_type") in self._table:
                rules = self._table[value["model_type"]].rules
                self._parts.append(self._table[value["model_type"]])
                kind = kind_of(key.removesuffix("_config"))
                if rules and kind:
                    yield (), kind, rules

    # --- one name ---------------------------------------------------------------------------------

    def _fold(self, key: str) -> _Templates | None:
        """Segments of all names with this key, as templates with `%s` for a number, the places of
        their numbers and of the expert's among those of the name; None if it is as it is."""
        if "^" in key or "$" in key:
            return None
        count = iter(range(key.count("#") + 1))
        own = tuple(f"#{next(count)}" if part == "#" else part for part in key.split("."))
        found: list[tuple[tuple[str, ...], dict[str, Any]]] = [(own, {})]
        for path, kind, rules in self._scopes:
            found = [
                (parts[:at] + rest, attributes)
                for parts, known in found
                for at in [_after(parts, path, kind)]
                for rest, attributes in (
                    [(parts[len(parts) :], known)]
                    if at is None
                    else apply_rules(rules, parts[at:], known)
                )
            ]
        if found == [(own, {})]:
            return None
        return [
            _template(parts, by_config(self._config, parts, attributes))
            for parts, attributes in found
        ]


def _after(parts: tuple[str, ...], path: tuple[str, ...], kind: str) -> int | None:
    """Where in a name the part at this path, or of this kind, begins; None if it is not in it."""
    if path:
        return len(path) if parts[: len(path)] == path and len(parts) > len(path) else None
    if not kind:
        return 0
    kinds = [kind_of(part) if part.isidentifier() else None for part in parts[:-1]]
    others = [other for other in kinds if other in ("vision", "audio", "text", "query")]
    if kind in others:
        return len(kinds) - kinds[::-1].index(kind)
    return 0 if kind == "text" and not others else None


def _template(
    parts: tuple[str, ...], attributes: dict[str, Any]
) -> tuple[Segment, tuple[int, ...], int | None]:
    places = tuple(int(part[1:]) for part in parts if part.startswith("#"))
    memory = ".".join("%s" if part.startswith("#") else part.replace("%", "%%") for part in parts)
    expert = attributes.get("expert")
    values: dict[str, Any] = {
        name: attributes[name]
        for name in ("stacked", "transposed", "maybe_transposed", "order")
        if name in attributes
    }
    for name in ("rows", "into", "columns"):
        if name in attributes:
            values[name] = Share.read(attributes[name])
    if "experts" in attributes:
        start, stop = attributes["experts"]
        values["experts"] = Fraction(start), Fraction(stop)
    if expert is not None and not expert.startswith("#"):
        return Segment(memory, int(expert), **values), places, None
    return Segment(memory, **values), places, None if expert is None else int(expert[1:])
