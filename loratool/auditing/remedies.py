"""What to do about what an audit finds: a sentence, and where there is one a command to paste."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.adapters.factors import Factors, LowRank
from loratool.adapters.told import NOTHING_TOLD
from loratool.auditing.findings import AuditFinding, Code
from loratool.auditing.spectra import ModuleAudit
from loratool.dtypes import DTYPE_BITS
from loratool.words import format_bytes

#: Dtypes that `resize` keeps if all factors have them; else it writes float32.
_KEPT = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Remedy:
    """What to do about all findings of one code. `saved` are bytes of factors, None where the
    command saves none, or its result is not known from here."""

    code: Code
    advice: str
    command: str = ""
    saved: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass(frozen=True)
class Resizing:
    """What `resize` could make of an adapter: `refused` says why nothing, "" if it can.

    `whole` says that all modules were looked at; only then is the result known.
    """

    adapter: Adapter
    whole: bool
    base: str

    @property
    def refused(self) -> str:
        adapter = self.adapter
        kinds = {type(m) for m in adapter.modules.values()}
        said = adapter.told
        if adapter.functions or any(n.refused for n in adapter.notices):
            return "resize refuses this adapter, see its warnings"
        if adapter.declared.changed_base:
            return "its initialisation also changed the base; merge it, or convert it first"
        if kinds - {LowRank}:
            return "resize takes products B·A alone, no expert stacks; train with a smaller r"
        if any(m.scale is None for m in adapter.modules.values()):
            return "its scale is not known; say --alpha or --scale, and resize cuts it"
        if said.enable_lora or said.fan_in_fan_out or said.expert_b_layout:
            return "`loratool resize` with the options given here cuts it"
        return ""

    def command(self, *options: str) -> str:
        """`loratool resize ADAPTER … -o OUT`, with what the user said of the adapter."""
        said = self.adapter.told
        told = {
            "--from": said.dialect, "--alpha": said.alpha, "--scale": said.scale,
            "--adapter-rank": said.rank, "--product": said.product, "--kind": said.kind,
        }  # fmt: skip
        more = [f"{name}={value}" for name, value in told.items() if value is not None]
        more += ["--override"] * (said != NOTHING_TOLD and said.override)
        more += ["--base", _operand(self.base)] * bool(self.base)
        words = ["loratool", "resize", _operand(self.adapter.label), *options, *more]
        return shlex.join([*words, "-o", _operand(f"{self.adapter.owner}-smaller")])

    def remedy(
        self, code: Code, advice: str, option: Sequence[str], wanted: dict[str, int]
    ) -> Remedy:
        """The command with the rank that each module needs by `wanted`, or with their largest,
        which all programs read, where that saves something too."""
        if self.refused:
            return Remedy(code, f"{advice} Here {self.refused}.")
        if not self.whole:
            return Remedy(code, advice, self.command(*option))
        modules = self.adapter.modules
        one = max(wanted.get(path, m.rank) for path, m in modules.items())
        uniform = self._saved(lambda m: one)
        shared: dict[str, int] = {}
        for path, m in modules.items():
            owner = m.outline.rank_owner
            shared[owner] = max(shared.get(owner, 1), wanted.get(path, m.rank))
        saved = self._saved(lambda m: shared[m.outline.rank_owner])
        if uniform > 0:
            text = f"{advice} Rank {one} for all does it and saves {format_bytes(uniform)}"
            text += f"; with --patterns {format_bytes(saved)}." if saved > uniform else "."
            return Remedy(code, text, self.command(*option), uniform)
        if saved <= 0:
            return Remedy(code, f"{advice} As a file of one dtype it would be no smaller.")
        text = (
            f"{advice} Some modules need rank {one}, so only a rank for each module saves room, "
            f"{format_bytes(saved)}."
        )
        return Remedy(code, text, self.command(*option, "--patterns"), saved)

    def _saved(self, rank: Callable[[Factors], int]) -> int:
        """Bytes of factors that a resize to these ranks takes off."""
        modules = self.adapter.modules.values()
        dtypes = {t.dtype for m in modules for t in m.parts.values()}
        dtype = next(iter(dtypes)) if len(dtypes) == 1 and dtypes <= set(_KEPT) else "F32"
        values = sum(rank(m) * sum(m.shape) for m in modules)
        others = {t.name for m in modules for t in (m.magnitude, m.bias) if t is not None}
        before = {
            t.name: t.nbytes
            for m in modules
            for t in (getattr(m, "stored", ()) or m.tensors)
            if t.name not in others
        }
        return sum(before.values()) - values * DTYPE_BITS[dtype] // 8


def _operand(text: str) -> str:
    """A path that is not taken for an option."""
    return f"./{text}" if text.startswith("-") else text


#: What to do where no command of this tool mends it, in the words of whoever trains.
_ADVICE: dict[Code, str] = {
    "not-finite": "Training diverged or the file is damaged: take an earlier checkpoint. `merge` "
    "and the others refuse this one.",
    "dead": "These change nothing: leave them out of target_modules, or train longer. If all are "
    "dead, this is the adapter as it was before training.",
    "dead-experts": "No token was sent to these experts in training: train on more, or leave them.",
    "faint": "Beside the others these change next to nothing: leave them out of target_modules in "
    "the next training.",
    "scale-outlier": "Is this meant? Look at alpha_pattern and rank_pattern in the config; "
    "alpha/rank is the scale.",
    "norm-outlier": "Look at these layers before the adapter is stacked on others, and at the "
    "learning rate they had.",
    "spike-outlier": "One direction of these is far stronger than in other layers: stacked on "
    "other adapters it decides what the layer does.",
    "spike": "One direction has nearly all. Beside other adapters it drowns theirs: combine with a "
    "smaller --weight, or by --method iso_c or tsv_m.",
    "large-against-base": "The delta rather replaces the weight than adjusts it. Merge with a "
    "smaller --weight, and not several such adapters together.",
    "all-noise": "No value stands above those of random factors of this shape: what the module "
    "learned, if anything, does not show in its spectrum.",
}


def remedies_for(
    findings: Sequence[AuditFinding], modules: Sequence[ModuleAudit], resizing: Resizing
) -> list[Remedy]:
    """What to do, once for each code, in the order of the findings."""
    codes = list(dict.fromkeys(finding.code for finding in findings))
    return [_remedy(code, modules, resizing) for code in codes]


def _remedy(code: Code, modules: Sequence[ModuleAudit], resizing: Resizing) -> Remedy:
    if code in _ADVICE:
        return Remedy(code, _ADVICE[code])
    if code == "rank-unused":
        advice = "The spectrum is zero beyond that, so a smaller rank loses nothing."
        wanted = {m.path: m.rank_used or 1 for m in modules}
        return resizing.remedy(code, advice, ("--max-rank", str(max(wanted.values()))), wanted)
    if code == "rank-excess":
        advice = "Half of the rank or less holds 99% of ‖ΔW‖²."
        wanted = {m.path: m.rank_enough or 1 for m in modules}
        return resizing.remedy(code, advice, ("--energy", "0.99"), wanted)
    advice = (
        "So many values, with that share of ‖ΔW‖², stand above the noise edge; the others could be "
        "those of random factors."
    )
    wanted = {m.path: max(1, _above(m)) for m in modules}
    return resizing.remedy(code, advice, ("--noise",), wanted)


def _above(m: ModuleAudit) -> int:
    """The rank that `resize --noise` gives a module."""
    return (m.rank_used or 1) if m.above_noise is None else m.above_noise
