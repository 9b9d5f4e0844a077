"""All that a model class tells about its layout, collected into one table by model_type."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers

from helpers.tiny.build import Case
from helpers.tiny.facts import Fact, Name, below, facts_of, is_below
from helpers.tiny.reversal import Part, Reversal, Step
from helpers.tiny.rules import Unclear, rules_for

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
        for prefixes in (True, False):
            steps = one.steps(prefixes)
            others = other.steps(prefixes) if other else [None] * len(steps)
            for step, second in zip(steps, others, strict=True):
                self._seen(step.part).facts.update(dict.fromkeys(facts_of(step, second)))
        for part in one.parts:
            for full in one.memory:
                if is_below(full, part.path):
                    self._seen(part).memory[below(full, part.path)] = None
        root = self._seen(one.parts[0])
        root.known, root.is_root = _known(one), True
        config = json.loads(one.model.config.to_json_string(use_diff=False))
        config["architectures"] = [type(one.model).__name__]
        self.spellings[name] = config, list(one.spellings())

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
        for entry in entries.values():
            for part in entry.get("parts", ()):
                part[3:] = [] if part[3] not in entries else part[3:]
        groups: dict[str, dict[str, Any]] = {}
        for kind, entry in entries.items():
            if entry["rules"] or len(entry) > 1:
                key = json.dumps(entry, sort_keys=True)
                groups.setdefault(key, {"types": [], **entry})["types"].append(kind)
        return {
            "transformers": transformers.__version__,
            "groups": [{"types": ["*"], "rules": GENERAL}, *groups.values()],
        }


def _entry(classes: list[Seen]) -> dict[str, Any]:
    facts = _distinct(fact for seen in classes for fact in seen.facts)
    memory = dict.fromkeys(name for seen in classes for name in seen.memory)
    known: dict[str, Any] = {}
    for seen in classes:
        known.update(seen.known)
    return {"rules": rules_for(facts, memory), **known}


def _distinct(facts: Iterable[Fact]) -> list[Fact]:
    """Facts that are not the same but for a number."""
    found: dict[Any, Fact] = {}
    for fact in facts:
        wild = [
            tuple("#" if part.isdecimal() else part for part in name)
            for name in (fact.disk, *(memory for memory, _ in fact.meanings))
        ]
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
    for key, get, usual in (
        ("head", model.get_output_embeddings, "lm_head"),
        ("embedding", model.get_input_embeddings, "model.embed_tokens"),
    ):
        try:
            name = names.get(id(get()), "")
        except (AttributeError, NotImplementedError, TypeError):
            name = ""
        if name not in ("", usual):
            found[key] = name
    tied = getattr(model, "_tied_weights_keys", None)
    if isinstance(tied, Mapping) and tied:
        pairs = sorted([str(name), str(of)] for name, of in tied.items())
        if pairs != [["lm_head.weight", "model.embed_tokens.weight"]]:
            found["tied"] = pairs
    stacks = {}
    for name, module in model.named_modules():
        own = [key for key, value in module.named_parameters(recurse=False) if value.ndim >= 2]
        if len(own) > 1 and type(module).__module__.partition(".")[0] != "torch":
            if any(part.isdecimal() for part in name.split(".")):
                end = ".".join(name.split(".")[-2:])
                stacks[end.rpartition(".")[2] if end.split(".")[0].isdecimal() else end] = own
        if getattr(module, "is_transposed", False):
            found["transposed_experts"] = True
    if stacks:
        found["parameters"] = dict(sorted(stacks.items()))
    return found
