"""All that a model class tells about its layout, collected into one table by model_type."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import transformers
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN

from helpers.tiny.build import Case
from helpers.tiny.by_hand import ALIASES, corrected
from helpers.tiny.facts import Fact, Name, below, facts_of, is_below
from helpers.tiny.reversal import SPELLINGS, Part, Reversal, Step
from helpers.tiny.rules import Unclear, rules_for
from loratool.models.layouts.table import Part as TablePart
from loratool.models.layouts.table import usual_embedding

#: What every model's files may have, whatever its type: transformers' "legacy" conversions.
GENERAL = [
    ["LayerNorm.beta", "LayerNorm.bias"],
    ["LayerNorm.gamma", "LayerNorm.weight"],
    ["weight_g.$", "parametrizations.weight.original0"],
    ["weight_v.$", "parametrizations.weight.original1"],
    ["^.language_model.model.model", "model.language_model"],
    ["^.model.language_model.model", "model.language_model"],
]


@dataclass
class Seen:
    """What is known of one class, alone or as a part of another one."""

    facts: dict[Fact, None] = field(default_factory=dict)
    memory: dict[Name, None] = field(default_factory=dict)
    known: dict[str, Any] = field(default_factory=dict)
    is_root: bool = False
    #: Ends of names that files may have transposed.
    either_way: dict[str, None] = field(default_factory=dict)


@dataclass
class Survey:
    """The classes so far, by model_type and class."""

    types: dict[str, dict[str, Seen]] = field(default_factory=dict)
    #: Config and spellings of each class, to try the table on.
    spellings: dict[str, tuple[dict[str, Any], list[Step]]] = field(default_factory=dict)
    #: Types whose classes have layouts that no one list of rules can say.
    split: set[str] = field(default_factory=set)

    def add(self, name: str, case: Case) -> None:
        """Look at a class, in two sizes where it can be made in both."""
        one = Reversal(case.make())
        try:
            other = Reversal(case.make(other_sizes=True))
        except (ValueError, RuntimeError, TypeError):
            other = None
        for wanted in SPELLINGS:
            steps = one.steps(wanted)
            others = other.steps(wanted) if other else [None] * len(steps)
            for step, second in zip(steps, others, strict=True):
                self._seen(step.part).facts.update(dict.fromkeys(facts_of(step, second)))
        for part in one.parts:
            for full in one.memory:
                if is_below(full, part.path):
                    self._seen(part).memory[below(full, part.path)] = None
        root = self._seen(one.parts[0])
        root.known, root.is_root = _known(one), True
        for full in one.maybe_transposed():
            owner = max(
                (part for part in one.parts if is_below(full, part.path)), key=lambda p: len(p.path)
            )
            self._seen(owner).either_way[".".join(full.split(".")[-2:])] = None
        self.spellings[name] = spellings_of(one)

    def _seen(self, part: Part) -> Seen:
        return self.types.setdefault(part.model_type, {}).setdefault(part.model, Seen())

    def table(self) -> dict[str, Any]:
        """The table's data: types with the same rules stand together."""
        entries = {}
        for kind, classes in sorted(self.types.items()):
            try:
                entries[kind] = _entry(list(classes.values()))
            except Unclear:
                self.split.add(kind)
                ordered = sorted(classes, key=lambda name: (not classes[name].is_root, name))
                for name in ordered:
                    entries[kind if name == ordered[0] else name] = _entry([classes[name]])
        for kind, entry in entries.items():
            entry["rules"] = corrected(kind, entry["rules"])
        # What transformers reads as another type, and no class here showed.
        for kind, as_kind in {**_MODEL_TO_CONVERSION_PATTERN, **ALIASES}.items():
            rules = entries.get(as_kind, {}).get("rules")
            if rules and kind[0].islower() and not entries.get(kind, {}).get("rules"):
                entries[kind] = {**entries.get(kind, {}), "rules": rules}
        for kind, entry in entries.items():
            parts = [part for part in entry.pop("parts", ()) if not _is_idle(part, kind, entries)]
            for part in parts:
                part[3:] = [] if part[3] not in entries else part[3:]
            if parts:
                entry["parts"] = parts
        groups: dict[str, dict[str, Any]] = {}
        for kind, entry in entries.items():
            if entry["rules"] or len(entry) > 1 or kind not in self.types:
                key = json.dumps(entry, sort_keys=True)
                groups.setdefault(key, {"types": [], **entry})["types"].append(kind)
        return {
            "transformers": transformers.__version__,
            "groups": [{"types": ["*"], "rules": GENERAL}, *groups.values()],
        }


def spellings_of(model: Reversal) -> tuple[dict[str, Any], list[Step]]:
    """The config.json of a model, and all that its tensors may be called."""
    config = json.loads(model.model.config.to_json_string(use_diff=False))
    config["architectures"] = [type(model.model).__name__]
    return config, list(model.spellings())


def _is_idle(part: Sequence[str], kind: str, entries: Mapping[str, Any]) -> bool:
    """Whether a part says nothing: its config is always of this one class, and has no entry."""
    key, _, model_type = part[:3]
    own = {key: value for key, value in entries.get(model_type, {}).items() if value}
    return not own and key != "text_config" and model_type.startswith(kind)


def _entry(classes: list[Seen]) -> dict[str, Any]:
    facts = _distinct(fact for seen in classes for fact in seen.facts)
    memory = dict.fromkeys(name for seen in classes for name in seen.memory)
    known: dict[str, Any] = {}
    for seen in classes:
        known.update(seen.known)
    either = sorted(name for seen in classes for name in seen.either_way)
    rules = rules_for(facts, memory)
    rules += [[f"{name}.$", name, {"maybe_transposed": True}] for name in dict.fromkeys(either)]
    return {"rules": rules, **known}


def _distinct(facts: Iterable[Fact]) -> list[Fact]:
    """Facts that are not the same but for a number."""
    found: dict[Any, Fact] = {}
    for fact in facts:
        names = [fact.disk, *(memory for memory, _ in fact.meanings)]
        wild = [tuple("#" if part.isdecimal() else part for part in name) for name in names]
        if len({tuple(part for part in name if part.isdecimal()) for name in names}) > 1:
            wild = names  # some of its numbers are words in memory
        found.setdefault((tuple(wild), tuple(text for _, text in fact.meanings)), fact)
    return list(found.values())


# --- beside the names -----------------------------------------------------------------------------


def _known(reversal: Reversal) -> dict[str, Any]:
    """What the table says of a model beside its rules; nothing that is as usual."""
    model = reversal.model
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, Any] = {}
    parts = [[part.key, part.path, part.model_type, part.model] for part in reversal.parts[1:]]
    if parts:
        found["parts"] = parts
    head = _name_of(names, model.get_output_embeddings)
    embedding = _name_of(names, model.get_input_embeddings)
    usual = usual_embedding([TablePart(*part) for part in parts])
    if head not in ("", "lm_head"):
        found["head"] = head
    if embedding not in ("", usual):
        found["embedding"] = embedding
    tied = getattr(model, "_tied_weights_keys", None)
    pairs = [[str(name), str(of)] for name, of in tied.items()] if isinstance(tied, Mapping) else []
    if (pairs or head) and pairs != [[f"{head}.weight", f"{embedding}.weight"]]:
        found["tied"] = sorted(pairs)
    stacks = {}
    for name, module in model.named_modules():
        own = [key for key, value in module.named_parameters(recurse=False) if value.ndim >= 2]
        in_layer = any(part.isdecimal() for part in name.split("."))
        if len(own) > 1 and in_layer and type(module).__module__.partition(".")[0] != "torch":
            above, _, last = name.rpartition(".")
            above = above.rpartition(".")[2]
            stacks[last if above.isdecimal() else f"{above}.{last}"] = own
        if getattr(module, "is_transposed", False):
            found["transposed_experts"] = True
    if stacks:
        found["parameters"] = dict(sorted(stacks.items()))
    return found


def _name_of(names: Mapping[int, str], get: Callable[[], Any]) -> str:
    """The path of the module that a method of the class gives; empty if it gives none."""
    try:
        return names.get(id(get()), "")
    except (AttributeError, NotImplementedError, TypeError):
        # How transformers' classes say that they have no such module; any other error is a fault.
        return ""
