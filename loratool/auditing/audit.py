"""The audit of an adapter: its modules' figures, what was found, what to do, what it cannot say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.adapters.norms import DeltaNorms
from loratool.auditing.findings import AuditFinding, found_in
from loratool.auditing.remedies import Remedy, Resizing, remedies_for
from loratool.auditing.spectra import ModuleAudit, audited
from loratool.linalg.noise import NO_EDGE_WORDS
from loratool.words import counted, enumerated


@dataclass
class Audit:
    """What an audit says. `remedies` has one entry for each code in `findings`; `notes` say what
    was not looked at, and where a figure does not mean what it seems to."""

    modules: list[ModuleAudit]
    findings: list[AuditFinding]
    remedies: list[Remedy]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {
            "modules": [m.to_dict() for m in self.modules],
            "findings": [f.to_dict() for f in self.findings],
            "remedies": [r.to_dict() for r in self.remedies],
            "notes": self.notes,
        }


def audit_of(
    adapter: Adapter,
    paths: Sequence[str],
    norms: Mapping[str, DeltaNorms],
    relative: Mapping[str, float],
    broken: Sequence[str],
    base: str = "",
) -> Audit:
    """The audit of the modules at `paths`.

    `norms` are those that have a pair of factors, `relative` ‖ΔW‖/‖W‖ of those that a base has, by
    path; `broken` names tensors beside the pairs that hold NaN or infinity, and `base` is what the
    user wrote of the base, for commands.
    """
    modules = [
        audited(adapter.modules[path], path, norms.get(path), relative.get(path)) for path in paths
    ]
    findings = found_in(modules)
    if broken:
        findings.insert(0, AuditFinding("not-finite", tuple(broken), "NaN or infinity"))
    whole = len(paths) == len(adapter.modules)
    remedies = remedies_for(findings, modules, Resizing(adapter, whole, base))
    return Audit(modules, findings, remedies, _notes(adapter, modules))


def _notes(adapter: Adapter, modules: Sequence[ModuleAudit]) -> list[str]:
    notes = []
    if adapter.functions:
        kinds = sorted({f.algorithm for f in adapter.functions.values()})
        count = counted(len({f.path for f in adapter.functions.values()}), "module", "is")
        notes.append(
            f"{count} no sum but made of the base's weight ({enumerated(kinds)}): there is no ΔW "
            "to audit."
        )
    left_out = [m for m in modules if m.finite and not m.measured]
    unsound = sum(not adapter.modules[m.path].is_sound for m in left_out)
    if unsound:
        notes.append(
            f"{counted(unsound, 'module', 'was')} not measured: shapes or dtypes of the factors do "
            "not fit, see the warnings."
        )
    without = Counter(m.algorithm for m in left_out if adapter.modules[m.path].is_sound)
    if without:
        count = counted(without.total(), "module", "was")
        notes.append(
            f"{count} not measured, having no product of two small factors "
            f"({enumerated(list(without))})."
        )
    if any(not m.adds for m in modules):
        notes.append(
            "Modules with a magnitude (DoRA): figures are of scale·B·A alone, and such a module "
            "changes its weight also where that is zero."
        )
    if any(m.measured and m.scale is None for m in modules):
        notes.append(
            "Where the scale is not known norms are not compared, and singular values are of B·A."
        )
    reasons = Counter(m.no_edge for m in modules if m.no_edge)
    if reasons:
        words = enumerated([f"{count} × {NO_EDGE_WORDS[why]}" for why, count in reasons.items()])
        notes.append(f"{counted(reasons.total(), 'module', 'has')} no noise edge: {words}.")
    return notes
