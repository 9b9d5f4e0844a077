"""inspect: what an adapter is, what it does to which weights, and what is odd about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapters.adapter import Adapter
from loratool.adapters.effect import note_scales
from loratool.adapters.norms import DeltaNorms
from loratool.adapters.reading import read_adapter
from loratool.adapters.recognise import way_out
from loratool.adapters.told import NOTHING_TOLD, Told
from loratool.answers import Answer
from loratool.converting.possible import possible_targets
from loratool.errors import UsageError, explained_os_errors, shown
from loratool.models.checkpoint import Checkpoint
from loratool.notices import Notice
from loratool.paths import selected
from loratool.serving.programs import serving_words
from loratool.storage.fields import strict
from loratool.storage.tensors import TensorInfo
from loratool.verbs.inputs import as_texts, check_paths, model_at, told_of
from loratool.verbs.measuring import ModuleReport, check_others, described_module, measure_modules

if TYPE_CHECKING:
    from loratool.auditing.audit import Audit
    from loratool.merging.coverage import BaseReport


@dataclass(repr=False)
class InspectReport(Answer):
    """Everything `inspect` found. `to_dict()` is what `--json` prints."""

    ROWS = "modules"

    source: str
    file: str
    format: str
    description: str
    peft_type: str | None
    base_model: str | None
    modules: list[ModuleReport]
    saved: dict[str, list[int]]
    tensors: list[TensorInfo]
    parameters: int
    nbytes: int
    total_modules: int
    config: dict[str, Any]
    metadata: dict[str, str]
    #: Whether the values were read: norms are known, NaN and infinity would have been seen.
    measured: bool
    warnings: list[Notice] = field(default_factory=list)
    base: BaseReport | None = None
    #: Whether a dialect claims the file, so that its modules are known.
    is_read: bool = False
    #: The program that made it, where that is known.
    producer: str = ""
    #: What is no sum but makes a new weight of the base's: by path its algorithm.
    functions: dict[str, str] = field(default_factory=dict)
    #: What it could be converted to: by target how, or why not.
    conversions: dict[str, str] = field(default_factory=dict)
    #: Which programs load it, by their names as `lint` has them: "loads", or in a word why not.
    serving: dict[str, str] = field(default_factory=dict)
    #: What the config says, in lines for people.
    settings: list[tuple[str, str]] = field(default_factory=list)
    #: What is dead, too large or stands out, where that was asked.
    audit: Audit | None = None

    @property
    def dtypes(self) -> dict[str, int]:
        """Number of tensors by dtype."""
        return dict(Counter(t.dtype for t in self.tensors).most_common())

    def to_dict(self) -> dict[str, Any]:
        modules = [
            {
                k: list(v) if isinstance(v, tuple) else v
                for k, v in m.__dict__.items()
                if v is not None or k not in _OPTIONAL
            }
            for m in self.modules
        ]
        document: dict[str, Any] = {
            "schema_version": 1,
            "source": self.source,
            "format": self.format,
            "description": self.description,
            "producer": self.producer,
            "peft_type": self.peft_type,
            "base_model": self.base_model,
            "measured": self.measured,
            "modules": modules,
            "functions": self.functions,
            "conversions": self.conversions,
            "serving": self.serving,
            "saved": self.saved,
            "totals": {
                "modules": self.total_modules,
                "tensors": len(self.tensors),
                "parameters": self.parameters,
                "bytes": self.nbytes,
            },
            "dtypes": self.dtypes,
            "config": strict(self.config),
            "metadata": self.metadata,
            "warnings": [w.to_dict() for w in self.warnings],
            "tensors": [
                {"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in self.tensors
            ],
        }
        if self.base is not None:
            coverage = [c.__dict__ for c in self.base.coverage]
            document["base"] = {**self.base.__dict__, "coverage": coverage}
        if self.audit is not None:
            document["audit"] = self.audit.to_dict()
        return document


_OPTIONAL = {"singular_values", "relative_norm", "experts", "dead_experts", "expert_norms"}

#: Adapters on the Hub up to this many bytes are downloaded for their norms without being asked.
SMALL = 50_000_000


@explained_os_errors()
def inspect(
    source: str | Path,
    *,
    base: str | Path | None = None,
    components: str | Sequence[str] = (),
    spectrum: bool = False,
    audit: bool = False,
    norms: bool = False,
    layers: str | None = None,
    include: Sequence[str] = (),
    told: Told = NOTHING_TOLD,
    expert_b_layout: str | None = None,
) -> InspectReport:
    """Report what is in an adapter directory or weights file, here or on the Hub.

    Parameters
    ----------
    source: adapter directory, `.safetensors` or torch file, or a Hub id. Files that are no LoRA
        adapter are named in `format` and `description`; damaged ones raise FileError.
    base: base model directory or file, or a Hub id; adds coverage and, where its weights are on
        this disk, ‖ΔW‖/‖W‖.
    components: the only parts of the base that the adapter may go into.
    spectrum: keep each module's singular values, largest first.
    audit: look for what does nothing, takes too much room or stands out; see `loratool.auditing`.
    norms: download what norms need. Without it, headers are all that is read of a base on the Hub,
        and of an adapter there with more than `SMALL` bytes.
    layers: only modules of these layers, "3" or "0-5,7". include: only modules whose path, or a
        dotted end of it, matches one of these globs.
    told: what the user says of the adapter, because its file does not; see `merge`.
    expert_b_layout: how lora_B of expert stacks lies where an adapter does not tell, "rank-major"
        (PEFT's) or "grouped" (Unsloth's before unsloth-zoo 2026.9.6).

    Norms and singular values are computed in float64 from the r × r core, never from the dense
    product. No torch is imported.
    """
    check_paths([source], [source], "loratool inspect SOURCE")
    if components and base is None:
        raise UsageError("--components are parts of a base.", "Add --base BASE.")
    (said,) = told_of(told, [source], expert_b_layout)
    model = model_at(base)
    adapter = read_adapter(source, said, model)
    if spectrum or audit or norms or adapter.nbytes <= SMALL:
        adapter.fetch()
    measured = adapter.is_here
    paths = selected(list(adapter.modules), layers, include)
    chosen = [adapter.modules[path] for path in paths]
    notices = [*adapter.notices, *note_scales(adapter)]
    if not adapter.is_read:
        notices.append(Notice("not-an-adapter", way_out(adapter.format, source), adapter.label))
    modules = [described_module(path, adapter.modules[path]) for path in paths]
    found: dict[str, DeltaNorms] = {}
    broken: list[str] = []
    if measured:
        found = measure_modules(chosen, modules, spectrum or audit, notices)
        broken = check_others(adapter, _saved(adapter).values(), notices)
    report = InspectReport(
        source=adapter.label,
        file=shown(adapter.weights),
        format=adapter.format,
        description=adapter.description,
        peft_type=adapter.peft_type,
        base_model=adapter.declared.base_name,
        is_read=adapter.is_read,
        settings=list(adapter.declared.settings),
        producer=adapter.producer,
        functions={path: f.algorithm for path, f in adapter.functions.items()},
        conversions=possible_targets(adapter, model),
        serving=serving_words(adapter),
        modules=modules,
        saved={name: list(info.shape) for name, info in _saved(adapter).items()},
        tensors=list(adapter.tensors.values()),
        parameters=adapter.parameters,
        nbytes=adapter.nbytes,
        total_modules=len(adapter.modules) + len(adapter.functions),
        config=adapter.config,
        metadata=adapter.metadata,
        measured=measured,
        warnings=notices,
    )
    if not adapter.is_read and (audit or model is not None):
        what = "compare with a base" if model is not None else "audit"
        raise UsageError(
            f"{adapter.weights} is {adapter.description}; there is nothing to {what}.",
            "Omit --base." if model is not None else "Omit --audit.",
        )
    if model is not None:
        _add_base(report, adapter, model, norms, as_texts(components))
    if audit:
        from loratool.auditing.audit import audit_of  # what most do not ask for

        relative = {m.path: m.relative_norm for m in modules if m.relative_norm is not None}
        report.audit = audit_of(adapter, paths, found, relative, broken, str(base or ""))
    adapter.folder.refuse_changed()
    return report


def _saved(adapter: Adapter) -> dict[str, TensorInfo]:
    rows = {f"{path} (token rows)": r.rows for path, r in adapter.token_rows.items()}
    return {**adapter.replaced, **rows}


def _add_base(
    report: InspectReport, adapter: Adapter, base: Checkpoint, norms: bool, parts: Sequence[str]
) -> None:
    """What the adapter covers of the base, and ‖ΔW‖/‖W‖ of its modules."""
    from loratool.merging.coverage import cover  # a tenth of a second that most do not need

    found = cover(adapter, [m.path for m in report.modules], base, norms, parts)
    report.base = found.report
    if found.report.model_type:
        # The base's config.json settles what the adapter alone leaves open.
        report.warnings = [n for n in report.warnings if n.code != "square-conv1d"]
    report.warnings += found.notices
    for module in report.modules:
        length = found.lengths.get(module.path)
        if length and module.delta_norm is not None:
            module.relative_norm = module.delta_norm / length
