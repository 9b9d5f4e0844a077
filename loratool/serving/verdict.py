"""What a program makes of an adapter, as values: rules, what they found, a verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from loratool.models.checkpoint import Checkpoint
from loratool.models.config import layer_count
from loratool.models.layouts.holding import Holdings
from loratool.models.layouts.names import TOKEN_EMBEDDING
from loratool.models.layouts.tying import find_tied
from loratool.serving.traits import Traits

#: How an adapter fares in a program. "differs" is loaded and computes something else, "unknown" is
#: what nobody tried and no source settles.
Served = Literal["loads", "differs", "refused", "unknown"]

#: The worst first: a verdict is the worst of what was found.
WORST_FIRST: tuple[Served, ...] = ("refused", "differs", "unknown", "loads")

#: What mends a finding; of several the last in this order mends all of them. "" is nothing.
Cure = Literal["", "convert", "resize", "merge"]
CURES: tuple[Cure, ...] = ("", "convert", "resize", "merge")


@dataclass(frozen=True)
class Setting:
    """How the program is run: the largest rank that it was started for, None for its default, and
    the base, None where nobody named one."""

    max_rank: int | None = None
    base: Checkpoint | None = None

    @property
    def model_type(self) -> str:
        return self.base.model_type if self.base else ""

    @cached_property
    def layers(self) -> int | None:
        if self.base is None:
            return None
        config = self.base.config
        return layer_count(config) or layer_count(config.get("text_config") or {})

    @cached_property
    def vocabulary(self) -> int | None:
        """Rows of the base's token embedding; None where they are not known."""
        tensors = self.base.tensors if self.base else {}
        rows = [i.shape[0] for n, i in tensors.items() if TOKEN_EMBEDDING.search(n) and i.shape]
        return rows[0] if rows else None

    @cached_property
    def is_tied(self) -> bool | None:
        """Whether the base's head is its embedding; None without a base."""
        if self.base is None:
            return None
        return find_tied(self.base, Holdings(self.base.tensors, self.base.config)) is not None


@dataclass(frozen=True)
class ServingRule:
    """One rule of a program, as data.

    `why` says in a sentence what becomes of an adapter that the rule is about, "" for any other.
    `short` is the same in a few words. The outcome "loads" is a condition: it loads if so. `source`
    is where the rule is read, `ran` whether it was seen in a run too.
    """

    outcome: Served
    short: str
    why: Callable[[Traits, Setting], str]
    cure: Cure = ""
    source: str = ""
    ran: bool = False


@dataclass(frozen=True)
class ServingProgram:
    """A program that adapters are loaded into, in the version whose source was read.

    `name` is what it is called on the command line. `reads` are the dialects that it takes, and
    `entries` the names of the weights files that it looks for, () for any. `native` is the dialect
    that `convert` makes for it.
    """

    name: str
    title: str
    version: str
    rules: tuple[ServingRule, ...]
    reads: tuple[str, ...] = ("peft",)
    entries: tuple[str, ...] = ()
    native: str = "peft"
    source: str = ""


@dataclass(frozen=True)
class Remark:
    """What one rule found."""

    outcome: Served
    short: str
    why: str
    cure: Cure = ""
    source: str = ""
    ran: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {"outcome": self.outcome, "why": self.why, "source": self.source,
                "seen": "run" if self.ran else "source"}  # fmt: skip


@dataclass
class Verdict:
    """What a program makes of an adapter. `mend` is the command that mends it, "" where it loads or
    nothing does; `conditions` are what it takes beside."""

    program: str
    title: str
    version: str
    outcome: Served
    remarks: list[Remark] = field(default_factory=list)
    mend: str = ""

    @property
    def conditions(self) -> list[str]:
        return [remark.why for remark in self.remarks if remark.outcome == "loads"]

    @property
    def reasons(self) -> list[str]:
        """Why it does not load, or computes something else; the worst first."""
        return [remark.why for remark in self.troubles]

    @property
    def troubles(self) -> list[Remark]:
        found = [remark for remark in self.remarks if remark.outcome != "loads"]
        return sorted(found, key=lambda remark: WORST_FIRST.index(remark.outcome))

    @property
    def cure(self) -> Cure:
        """The command that mends all that was found; "" where one thing cannot be mended."""
        cures = [remark.cure for remark in self.troubles]
        return "" if "" in cures else max(cures, key=CURES.index, default="")

    def to_dict(self) -> dict[str, Any]:
        return {
            "program": self.program,
            "title": self.title,
            "version": self.version,
            "outcome": self.outcome,
            "reasons": [remark.to_dict() for remark in self.troubles],
            "conditions": self.conditions,
            "mend": self.mend,
        }


def verdict_of(program: ServingProgram, remarks: list[Remark]) -> Verdict:
    """The worst of what was found, without the command that mends it."""
    found = {remark.outcome for remark in remarks} | {"loads"}
    worst = next(outcome for outcome in WORST_FIRST if outcome in found)
    return Verdict(program.name, program.title, program.version, worst, remarks)
