"""inspect: what an adapter is, what it does to which weights, and what is odd about it."""

from __future__ import annotations

import math
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loratool.adapters.adapter import Adapter
from loratool.adapters.effect import note_scales
from loratool.adapters.experts import ExpertStack
from loratool.adapters.factors import Factors
from loratool.adapters.norms import DeltaNorms, norms_of
from loratool.adapters.reading import read_adapter
from loratool.adapters.told import NOTHING_TOLD, Told
from loratool.answers import Answer
from loratool.converting.possible import possible_targets
from loratool.errors import UsageError, explained_os_errors, listed, shown
from loratool.models.checkpoint import Checkpoint
from loratool.notices import Notice
from loratool.paths import selected
from loratool.storage.fields import strict
from loratool.storage.tensors import FilePool, TensorInfo, blocks
from loratool.storage.values import count_not_finite
from loratool.verbs.inputs import as_texts, check_paths, model_at, told_of
from loratool.words import counted

if TYPE_CHECKING:
    from loratool.merging.coverage import BaseReport


@dataclass
class ModuleReport:
    """One adapted module. Norms are of `scale·B·A`, None where they cannot be computed.

    `shape` is `[out, in]` of ΔW. `stable_rank` is ‖ΔW‖_F² / σ₁²: how many directions carry the
    delta. `relative_norm` is ‖ΔW‖_F / ‖W‖_F, known with a base.

    A stack of `experts` is one module, with the shape and rank of one expert. Its `delta_norm` is
    that of all together, its `spectral_norm` the largest, its `stable_rank` the median and its
    `singular_values` the means of the experts'. `dead_experts` are those with a zero factor.
    """

    path: str
    kind: str
    rank: int
    shape: tuple[int, int]
    alpha: float | None
    scale: float | None
    shapes: dict[str, list[int]]
    dtype: str
    dora: bool
    parameters: int
    delta_norm: float | None = None
    spectral_norm: float | None = None
    stable_rank: float | None = None
    singular_values: list[float] | None = None
    relative_norm: float | None = None
    experts: int | None = None
    dead_experts: int | None = None
    #: Where the scale is from: "config", "option", …; "" where it is not known.
    scale_from: str = ""
    #: "LoRA", "DoRA", "LoHa", …
    algorithm: str = "LoRA"
    #: The smallest and the largest norm of an expert's delta.
    expert_norms: tuple[float, float] | None = None


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
    #: What the config says, in lines for people.
    settings: list[tuple[str, str]] = field(default_factory=list)

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
        return document


_OPTIONAL = {"singular_values", "relative_norm", "experts", "dead_experts", "expert_norms"}

_AT_A_TIME = 64  # modules that one thread measures in a go

#: Adapters on the Hub up to this many bytes are downloaded for their norms without being asked.
SMALL = 50_000_000


@explained_os_errors()
def inspect(
    source: str | Path,
    *,
    base: str | Path | None = None,
    components: str | Sequence[str] = (),
    spectrum: bool = False,
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
    if spectrum or norms or adapter.nbytes <= SMALL:
        adapter.fetch()
    measured = adapter.is_here
    paths = selected(list(adapter.modules), layers, include)
    chosen = [adapter.modules[path] for path in paths]
    notices = [*adapter.notices, *note_scales(adapter)]
    modules = [_describe(path, adapter.modules[path]) for path in paths]
    if measured:
        _measure(chosen, modules, spectrum, notices)
        _check_replaced(adapter, notices)
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
    if model is not None:
        if not adapter.is_read:
            raise UsageError(
                f"{adapter.weights} is {adapter.description}; there is nothing to compare with "
                "a base.",
                "Omit --base.",
            )
        _add_base(report, adapter, model, norms, as_texts(components))
    adapter.folder.refuse_changed()
    return report


def _saved(adapter: Adapter) -> dict[str, TensorInfo]:
    rows = {f"{path} (token rows)": r.rows for path, r in adapter.token_rows.items()}
    return {**adapter.replaced, **rows}


def _describe(path: str, module: Factors) -> ModuleReport:
    report = ModuleReport(
        path, module.kind, module.rank, module.shape, module.alpha, module.scale,
        {name: list(t.shape) for name, t in module.parts.items()}, module.dtype,
        module.magnitude is not None, module.parameters, scale_from=module.scale_from,
        algorithm=module.algorithm,
    )  # fmt: skip
    if isinstance(module, ExpertStack):
        report.experts = module.experts
    return report


def _measure(
    modules: list[Factors], reports: list[ModuleReport], spectrum: bool, notices: list[Notice]
) -> None:
    """Norms of all modules, each from its own factors; factors are read module by module."""
    sound = [(m, r) for m, r in zip(modules, reports, strict=True) if m.is_sound]
    with FilePool() as files, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        groups = [[m for m, _ in sound[low:high]] for low, high in blocks(len(sound), _AT_A_TIME)]
        found = [n for norms in pool.map(lambda g: norms_of(g, files), groups) for n in norms]
    broken, silent, dead = [], [], []
    for (_, report), norms in zip(sound, found, strict=True):
        if norms is None:
            continue
        if not norms.finite:
            broken.append(report.path)
            continue
        _fill(report, norms, spectrum)
        if norms.idle:
            silent.append(f"{report.path} ({norms.idle})")
        elif norms.dead:
            dead.append(f"{report.path}: {norms.dead} of {report.experts}")
    if broken:
        text = f"{counted(len(broken), 'module', 'holds')} NaN or infinity:\n{listed(broken)}"
        notices.append(Notice("not-finite", text, broken[0]))
    if silent:
        text = f"{counted(len(silent), 'module', 'has')} no effect: one of the factors is zero:\n"
        text += listed(silent)
        notices.append(Notice("zero-delta", text, silent[0].partition(" ")[0]))
    if dead:
        text = f"{counted(len(dead), 'stack', 'has')} experts without effect, with a factor of zero"
        text += f", as those have that no token was sent to:\n{listed(dead)}"
        notices.append(Notice("dead-experts", text, dead[0].partition(":")[0]))


def _fill(report: ModuleReport, norms: DeltaNorms, spectrum: bool) -> None:
    if report.experts is not None:
        report.dead_experts = norms.dead
    if norms.values is None:
        return
    squares: list[float] = np.sum(norms.values**2, axis=1).tolist()
    first: list[float] = norms.values[:, 0].tolist()
    report.delta_norm = math.sqrt(math.fsum(squares))
    report.spectral_norm = max(first)
    if any(first):
        stable = [s / f**2 for s, f in zip(squares, first, strict=True) if f]
        report.stable_rank = statistics.median(stable)
    if report.experts is not None:
        report.expert_norms = math.sqrt(min(squares)), math.sqrt(max(squares))
    if spectrum:
        report.singular_values = [float(v) for v in norms.values.mean(axis=0)]


def _check_replaced(adapter: Adapter, notices: list[Notice]) -> None:
    """NaN and infinity in what is not a factor: heads, biases, magnitudes, token rows."""
    others = [*_saved(adapter).values()]
    others += [t for m in adapter.modules.values() for t in (m.magnitude, m.bias) if t is not None]
    with FilePool() as files:
        broken = [t.name for t in others if count_not_finite(t, files)]
    if broken:
        text = f"{counted(len(broken), 'tensor', 'holds')} NaN or infinity:\n{listed(broken)}"
        notices.append(Notice("not-finite", text, broken[0]))


def _add_base(
    report: InspectReport,
    adapter: Adapter,
    base: Checkpoint,
    norms: bool,
    components: Sequence[str],
) -> None:
    """What the adapter covers of the base, and ‖ΔW‖/‖W‖ of its modules."""
    from loratool.merging.coverage import cover  # a tenth of a second that most do not need

    found = cover(adapter, [m.path for m in report.modules], base, norms, components)
    report.base = found.report
    if found.report.model_type:
        # The base's config.json settles what the adapter alone leaves open.
        report.warnings = [n for n in report.warnings if n.code != "square-conv1d"]
    report.warnings += found.notices
    for module in report.modules:
        length = found.lengths.get(module.path)
        if length and module.delta_norm is not None:
            module.relative_norm = module.delta_norm / length
