"""The modules of an adapter, described and measured: what inspect reports of each."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from loratool.adapters.adapter import Adapter
from loratool.adapters.experts import ExpertStack
from loratool.adapters.factors import Factors
from loratool.adapters.norms import DeltaNorms, norms_of
from loratool.adapters.structured import Structured
from loratool.errors import listed
from loratool.notices import Notice
from loratool.storage.tensors import FilePool, TensorInfo, blocks
from loratool.storage.values import count_not_finite
from loratool.words import counted

#: Modules that one thread measures in a go.
_AT_A_TIME = 64


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


def described_module(path: str, module: Factors) -> ModuleReport:
    report = ModuleReport(
        path, module.kind, module.rank, module.shape, module.alpha, module.scale,
        {name: list(t.shape) for name, t in module.parts.items()}, module.dtype,
        module.magnitude is not None, module.parameters, scale_from=module.scale_from,
        algorithm=module.algorithm,
    )  # fmt: skip
    if isinstance(module, ExpertStack):
        report.experts = module.experts
    return report


def measure_modules(
    modules: list[Factors], reports: list[ModuleReport], spectrum: bool, notices: list[Notice]
) -> dict[str, DeltaNorms]:
    """Norms of all modules that have a pair, by path; factors are read module by module."""
    sound = [(m, r) for m, r in zip(modules, reports, strict=True) if m.is_sound]
    with FilePool() as files, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        groups = [[m for m, _ in sound[low:high]] for low, high in blocks(len(sound), _AT_A_TIME)]
        found = [n for norms in pool.map(lambda g: norms_of(g, files), groups) for n in norms]
    measured = {r.path: norms for (_, r), norms in zip(sound, found, strict=True) if norms}
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
    return measured


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


def check_others(adapter: Adapter, saved: Iterable[TensorInfo], notices: list[Notice]) -> list[str]:
    """The tensors with NaN and infinity of what is not in a pair of factors: what is `saved` whole,
    biases, magnitudes, parts of other products and of functions."""
    others = [*saved]
    others += [t for m in adapter.modules.values() for t in (m.magnitude, m.bias) if t is not None]
    for made in (m for m in adapter.modules.values() if isinstance(m, Structured)):
        others += [t for t in made.tensors if t.is_float]
    for function in adapter.functions.values():
        others += [t for t in function.tensors if t.is_float]
    with FilePool() as files:
        broken = [t.name for t in others if count_not_finite(t, files)]
    if broken:
        text = f"{counted(len(broken), 'tensor', 'holds')} NaN or infinity:\n{listed(broken)}"
        notices.append(Notice("not-finite", text, broken[0]))
    return broken
