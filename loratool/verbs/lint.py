"""lint: does a server load this adapter as it is, and compute the same?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.adapters.reading import read_adapter
from loratool.answers import Answer
from loratool.converting.possible import possible_targets
from loratool.errors import AdapterError, LoraToolError, UsageError, explained_os_errors
from loratool.models.checkpoint import Checkpoint
from loratool.serving.mending import mend_of
from loratool.serving.programs import chosen_programs, verdict_on
from loratool.serving.together import Together, common_rank_limit, served_together
from loratool.serving.traits import Traits
from loratool.serving.verdict import ServingProgram, Setting, Verdict
from loratool.verbs.inputs import Source, as_list, as_texts, check_paths, model_at
from loratool.verbs.mergeable import merge_verdict


@dataclass
class AdapterLint:
    """What each program makes of one adapter, and whether merge takes it."""

    source: str
    format: str
    description: str
    verdicts: list[Verdict]
    merge: Verdict

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "format": self.format,
            "description": self.description,
            "programs": [verdict.to_dict() for verdict in self.verdicts],
            "merge": self.merge.to_dict(),
        }


@dataclass(repr=False)
class LintReport(Answer):
    """All adapters in their order; in place of one that cannot be read the error. `asked` are the
    programs that must load it, and `base` the base that merge must take it for."""

    ROWS = "adapters"

    adapters: list[AdapterLint | LoraToolError]
    sources: list[str]
    asked: list[str] = field(default_factory=list)
    base: str | None = None
    together: Together | None = None

    @property
    def unread(self) -> list[LoraToolError]:
        return [found for found in self.adapters if isinstance(found, LoraToolError)]

    @property
    def passes(self) -> bool:
        """Whether every adapter was read, and all that was asked for loads it and computes it."""
        read = [found for found in self.adapters if isinstance(found, AdapterLint)]
        verdicts = [v for one in read for v in one.verdicts if v.program in self.asked]
        verdicts += [one.merge for one in read if self.base is not None]
        apart = [c for c in (self.together.companies if self.together else []) if c.apart]
        return (
            not self.unread
            and all(verdict.outcome == "loads" for verdict in verdicts)
            and not any(company.program in self.asked for company in apart)
        )

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        entries = [
            {"source": source, **found.to_dict()}
            for source, found in zip(self.sources, self.adapters, strict=True)
        ]
        document: dict[str, Any] = {
            "schema_version": 1,
            "passes": self.passes,
            "asked": self.asked,
            "base": self.base,
            "adapters": entries,
        }
        if self.together is not None:
            document["together"] = self.together.to_dict()
        return document


@explained_os_errors()
def lint(
    adapters: str | Path | Sequence[str | Path],
    *,
    base: str | Path | None = None,
    programs: str | Sequence[str] = (),
    together: bool = False,
    max_rank: int | None = None,
) -> LintReport:
    """Say of each program whether it loads these adapters as they are, and computes the same.

    Parameters
    ----------
    adapters: directories, files or Hub ids, of any dialect that loratool reads.
    base: the base model; what depends on it is settled then, and a merge into it is planned.
    programs: "vllm", "sglang", "llamacpp", "lorax", "tgi", "exllama", "ollama", "peft-hotswap",
        "mlx"; all of them if none is given. `passes` of the report is about those that are given.
    together: whether one server takes all of the adapters, and how it must be started.
    max_rank: what the server was started with, as vLLM's --max-lora-rank; its default (16) if not
        given, or with `together` what all adapters need.

    The answer is from headers and configs; no weights are read. Of several adapters one that cannot
    be read is a LoraToolError in its place, the only one is raised.

    Raises
    ------
    UsageError: an unknown program, no adapter. FileError, AdapterError: what cannot be read.
    """
    sources = as_list(adapters)
    check_paths([*sources, *([] if base is None else [base])], sources, "loratool lint ADAPTER")
    asked = as_texts(programs)
    chosen = chosen_programs(asked)
    if max_rank is not None and max_rank < 1:
        raise UsageError(f"--max-rank {max_rank} is no rank.", "Give a number above 0.")
    if together and len(sources) < 2:
        raise UsageError("--together is about several adapters.", "Give two or more.")
    model = model_at(base)
    read = [_read(source, model) for source in sources]
    there = [found for found in read if isinstance(found, Adapter)]
    if len(read) == 1 and not there:
        raise next(found for found in read if isinstance(found, LoraToolError))
    if together and there and max_rank is None:
        max_rank = common_rank_limit(there)
    setting = Setting(max_rank, model)
    found = [_linted(one, chosen, setting) if isinstance(one, Adapter) else one for one in read]
    report = LintReport(
        found, [str(source) for source in sources], [p.name for p in chosen] if asked else [],
        None if model is None else model.label,
    )  # fmt: skip
    if together and there:
        lints = [one for one in found if isinstance(one, AdapterLint)]
        by_program = {p.name: [one.verdicts[i] for one in lints] for i, p in enumerate(chosen)}
        report.together = served_together(there, chosen, by_program)
    for one in there:
        one.folder.refuse_changed()
    return report


def _read(source: Source, base: Checkpoint | None) -> Adapter | LoraToolError:
    """The adapter, or the error that there is in its place."""
    try:
        adapter = read_adapter(source, base=base)
        if not adapter.is_read:
            raise AdapterError(
                f"{adapter.weights}: this is {adapter.description}.",
                "docs/dialects.md lists what loratool reads.",
            )
    except LoraToolError as error:
        return error
    return adapter


def _linted(adapter: Adapter, programs: Sequence[ServingProgram], setting: Setting) -> AdapterLint:
    traits = Traits(adapter)
    verdicts = [verdict_on(traits, program, setting) for program in programs]
    bad = [verdict for verdict in verdicts if verdict.outcome != "loads"]
    conversions = possible_targets(adapter, setting.base) if bad else {}
    for program, verdict in zip(programs, verdicts, strict=True):
        verdict.mend = mend_of(adapter, program, verdict, setting, conversions)
    merge = merge_verdict(adapter, setting.base)
    return AdapterLint(adapter.label, adapter.format, adapter.description, verdicts, merge)
