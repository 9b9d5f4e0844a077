"""Several adapters in one server: how it must be started, and what keeps them apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.dtypes import dtype_name
from loratool.serving.hotswap import HOTSWAP, to_load_first, unlike
from loratool.serving.mlx import MLX
from loratool.serving.ollama import OLLAMA
from loratool.serving.sglang import SGLANG
from loratool.serving.traits import Traits
from loratool.serving.verdict import ServingProgram, Verdict
from loratool.serving.vllm import RANK_SETTINGS, VLLM, rank_setting
from loratool.words import counted, enumerated

#: Programs that have one adapter at a time.
_EACH_ALONE = {OLLAMA.name: "a model with its own ADAPTER for each", MLX.name: "one at a time"}


@dataclass(frozen=True)
class Company:
    """What one program makes of all the adapters: `start` are options to start it with, `apart` the
    reasons why it does not serve them together."""

    program: str
    title: str
    start: str
    apart: list[str]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass(frozen=True)
class Together:
    """What adapters have in common and in sum. `bases` and `dtypes` say how many have each; the
    targets are the last parts of the paths of all adapted modules."""

    largest_rank: int
    targets: list[str]
    dtypes: dict[str, int]
    bases: dict[str, int]
    nbytes: int
    companies: list[Company]

    def to_dict(self) -> dict[str, Any]:
        document = {k: v for k, v in self.__dict__.items() if k not in ("companies", "nbytes")}
        programs = [company.to_dict() for company in self.companies]
        return {**document, "bytes": self.nbytes, "programs": programs}


def served_together(
    adapters: Sequence[Adapter],
    programs: Sequence[ServingProgram],
    verdicts: Mapping[str, Sequence[Verdict]],
) -> Together:
    """What each program makes of all of them in one server; `verdicts` has those of each program,
    in the adapters' order."""
    all_traits = [Traits(adapter) for adapter in adapters]
    targets = {path.rpartition(".")[2] for a in adapters for path in a.modules}
    bases = Counter(a.declared.base_name or "not named" for a in adapters)
    dtypes = Counter(
        enumerated(sorted({dtype_name(m.dtype) for m in a.modules.values()})) for a in adapters
    )
    rank = max(t.largest_rank for t in all_traits)
    companies = []
    for program in programs:
        apart = _apart(all_traits, program, verdicts[program.name], bases)
        start = _start(program, all_traits, rank, sorted(targets))
        companies.append(Company(program.name, program.title, start, apart))
    return Together(
        rank, sorted(targets), dict(dtypes), dict(bases), sum(a.nbytes for a in adapters), companies
    )


def common_rank_limit(adapters: Sequence[Adapter]) -> int:
    """The largest rank that a server is started for, so that all fit as far as any setting goes."""
    return rank_setting(max(Traits(a).largest_rank for a in adapters)) or RANK_SETTINGS[-1]


def _start(
    program: ServingProgram, adapters: Sequence[Traits], rank: int, targets: Sequence[str]
) -> str:
    if program.name == VLLM.name and (setting := rank_setting(rank)):
        return f"--enable-lora --max-lora-rank {setting}"
    if program.name == SGLANG.name:
        named = [str(n) for t in adapters if isinstance(t.targets, list) for n in t.targets]
        asked = sorted({name.rpartition(".")[2] for name in named}) or targets
        whole = any(t.targets in ("all", "all-linear") for t in adapters)
        shown = "all" if whole else " ".join(asked)
        return f"--enable-lora --max-lora-rank {rank} --lora-target-modules {shown}"
    if program.name == HOTSWAP.name:
        return to_load_first(adapters)
    return _EACH_ALONE.get(program.name, "")


def _apart(
    adapters: Sequence[Traits],
    program: ServingProgram,
    verdicts: Sequence[Verdict],
    bases: Mapping[str, int],
) -> list[str]:
    failing = [t.label for t, v in zip(adapters, verdicts, strict=True) if v.outcome != "loads"]
    found = []
    if failing:
        found.append(f"{enumerated(failing, 3)} {'does' if len(failing) == 1 else 'do'} not load")
    named = [base for base in bases if base != "not named"]
    if len(named) > 1:
        found.append(f"they name {counted(len(named), 'base')}: {enumerated(named, 3)}")
    found += _other_shapes(adapters)
    if program.name == SGLANG.name:
        forms = {"in stacks" if t.on("experts") else "apart" for t in adapters
                 if t.on("experts") or t.one_expert_each}  # fmt: skip
        if len(forms) > 1:
            found.append("experts are in stacks here and apart there; a server takes one form")
    if program.name == HOTSWAP.name:
        found += unlike(adapters)
    return found


def _other_shapes(adapters: Sequence[Traits]) -> list[str]:
    """Modules whose weights cannot be of one base."""
    shapes: dict[str, tuple[int, int]] = {}
    for t in adapters:
        for path, module in t.adapter.modules.items():
            if shapes.setdefault(path, module.shape) != module.shape:
                return [f"{path} has other dimensions in {t.label}: they are of different bases"]
    return []
