"""How far apart methods of one name are: `combine`'s, and those of mergekit and of the authors.

    python benchmarks/namesakes.py        # the table in docs/combining.md

What the others compute is written here in NumPy, float64, after their code as of 2026, on the dense
deltas of the three adapters in fixtures/. Modules that an adapter lacks are zero, as they are for
who merges whole models. Random masks are those of loratool. Prints Markdown.

- mergekit: `merge_methods/generalized_task_arithmetic.py` and `sparsify.py`, defaults.
- TIES: `src/utils/merge_utils.py` of prateeky2806/ties-merging.
- KnOTS and Core Space: `task_merger.py` and `merging_functions.py` of gstoica27/KnOTS and
  apanariello4/core-space-merging.
- TSV-M and Iso-C: `src/utils/TSVM_utils.py`, `iso.py` of AntoAndGar/task_singular_vectors.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

import loratool
from loratool.linalg.methods import Settings

Matrix = npt.NDArray[np.float64]
Deltas = dict[str, Matrix]

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
ADAPTERS = [FIXTURES / "adapter", FIXTURES / "tasks" / "html", FIXTURES / "tasks" / "tables"]
ONES = [1.0, 1.0, 1.0]


def factors_in(folder: Path) -> dict[str, tuple[float, Matrix, Matrix]]:
    """Scale, B and A of every module."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / (
        math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    )
    found = {}
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[path] = (scale, b.astype(np.float64), a.astype(np.float64))
    return found


FACTORS = [factors_in(folder) for folder in ADAPTERS]
PATHS = sorted({path for own in FACTORS for path in own})
SHAPES = {path: (len(b), a.shape[1]) for own in FACTORS for path, (_, b, a) in own.items()}
DELTAS: list[Deltas] = [
    {
        path: own[path][0] * own[path][1] @ own[path][2] if path in own else np.zeros(SHAPES[path])
        for path in PATHS
    }
    for own in FACTORS
]


def here(method: str, weights: Sequence[float] = ONES, **options: Any) -> Deltas:
    """What loratool makes, at a rank that cuts nothing."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "out"
        if method.endswith("_svd"):
            options["rank"] = max(min(shape) for shape in SHAPES.values())
        loratool.combine(ADAPTERS, out, weights=weights, method=method, dtype="float32", **options)
        return {path: s * b @ a for path, (s, b, a) in factors_in(out).items()}


def apart(theirs: Deltas, ours: Deltas) -> float:
    """‖theirs − ours‖/‖ours‖ over all modules."""
    off = sum(float(np.sum((theirs[path] - ours[path]) ** 2)) for path in ours)
    return math.sqrt(off / sum(float(np.sum(x**2)) for x in ours.values()))


def by_module(rule: Callable[[str, list[Matrix]], Matrix]) -> Deltas:
    return {path: rule(path, [own[path] for own in DELTAS]) for path in PATHS}


# --- what they compute ----------------------------------------------------------------------------


def largest(x: Matrix, density: float) -> Matrix:
    kept = int(density * x.size)
    return np.where(np.abs(x) >= np.sort(np.abs(x), axis=None)[-kept], x, 0.0)


def largest_of_all(deltas: Deltas, density: float) -> Deltas:
    sizes = np.sort(np.abs(np.concatenate([x.ravel() for x in deltas.values()])))
    limit = sizes[-int(density * sizes.size)]
    return {path: np.where(np.abs(x) >= limit, x, 0.0) for path, x in deltas.items()}


def elected_mean(stack: Sequence[Matrix]) -> Matrix:
    """The authors' TIES after trimming: no weights; a tie has the sign that most entries have."""
    sign = np.sign(sum(stack))
    sign = np.where(sign == 0, np.sign(sign.sum()), sign)
    same = [np.where(sign > 0, x > 0, x < 0) for x in stack]
    count = np.maximum(sum(s.astype(int) for s in same), 1)
    return np.asarray(sum(x * s for x, s in zip(stack, same, strict=True)) / count)


def mergekit(
    stack: Sequence[Matrix], weights: Sequence[float], elect: bool, normalise: bool
) -> Matrix:
    weighted = [w * x for w, x in zip(weights, stack, strict=True)]
    if not elect:
        return np.asarray(sum(weighted))
    sign = np.where(sum(weighted) >= 0, 1, -1)
    same = [np.sign(x) == sign for x in weighted]
    total = sum(x * s for x, s in zip(weighted, same, strict=True))
    divisor = sum(w * s for w, s in zip(weights, same, strict=True))
    return np.asarray(total / np.where(divisor == 0, 1, divisor) if normalise else total)


def peft(stack: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    """`merge_utils.ties`: the vote is on what is not weighted."""
    sign = np.where(sum(stack) >= 0, 1, -1)
    same = [np.sign(x) == sign for x in stack]
    total = sum(w * x * s for w, x, s in zip(weights, stack, same, strict=True))
    return np.asarray(total / np.maximum(sum(s.astype(int) for s in same), 1))


def dropped(path: str, index: int, x: Matrix, density: float) -> Matrix:
    draws = Settings(path, 0, seed=0).random(index, 0)
    return np.where(draws.random(x.shape, dtype=np.float32) < density, x, 0.0)


def rescaled_l1(x: Matrix, kept: Matrix) -> Matrix:
    left = np.abs(kept).sum()
    return kept * (np.abs(x).sum() / left) if left > 1e-7 else kept


def mergekit_dare(density: float, weights: Sequence[float], elect: bool) -> Deltas:
    return by_module(
        lambda path, xs: mergekit(
            [rescaled_l1(x, dropped(path, i, x, density)) for i, x in enumerate(xs)],
            weights, elect, False,
        )
    )  # fmt: skip


def dare_then_trimmed(density: float, top: float) -> Deltas:
    """The DARE-TIES of KnOTS and Core Space: what DARE leaves is trimmed before the vote."""
    return by_module(
        lambda path, xs: elected_mean(
            [largest(dropped(path, i, x, density) / density, top) for i, x in enumerate(xs)]
        )
    )


def knots(top: float) -> Deltas:
    """TIES on the parts Σ·Vᵢᵀ, trimmed over all modules together."""
    bases, parts = {}, [dict[str, Matrix]() for _ in DELTAS]
    for path in PATHS:
        u, s, v = np.linalg.svd(np.hstack([own[path] for own in DELTAS]), full_matrices=False)
        kept = s > 1e-5
        bases[path] = u[:, kept]
        for own, part in zip(parts, np.split(s[kept, None] * v[kept], len(DELTAS), 1), strict=True):
            own[path] = part
    trimmed = [largest_of_all(own, top) for own in parts]
    return {path: bases[path] @ elected_mean([own[path] for own in trimmed]) for path in PATHS}


def core(density: float) -> Deltas:
    """TIES in the bases of the factors as stored."""
    result = {}
    for path in PATHS:
        held = [own[path] for own in FACTORS if path in own]
        u = np.linalg.svd(np.hstack([b for _, b, _ in held]), full_matrices=False)[0]
        v = np.linalg.svd(np.vstack([a for _, _, a in held]), full_matrices=False)[2]
        cores = [largest(s * (u.T @ b) @ (a @ v.T), density) for s, b, a in held]
        result[path] = u @ elected_mean(cores) @ v
    return result


def iso_c() -> Deltas:
    """The mean is over all min(out, in) singular values, the zeros of a low rank among them."""

    def flat(path: str, xs: list[Matrix]) -> Matrix:
        u, s, v = np.linalg.svd(sum(xs), full_matrices=False)
        kept = s > 1e-6 * s[0]  # the other directions are whatever LAPACK gives
        return np.asarray(s.mean() * u[:, kept] @ v[kept])

    return by_module(flat)


def iso_c_whole() -> Deltas:
    def flat(path: str, xs: list[Matrix]) -> Matrix:
        u, s, v = np.linalg.svd(sum(xs), full_matrices=False)
        return np.asarray(s.mean() * u @ v)

    return by_module(flat)


def tsv_m(turned: bool = False) -> Deltas:
    """The first min(out, in)/n singular vectors of each, also those of singular value zero."""

    def merged(path: str, xs: list[Matrix]) -> Matrix:
        share = min(xs[0].shape) // len(xs)
        columns, sizes, rows = [], [], []
        for x in xs:
            # The same matrix, rows in another order: null vectors come out differently.
            order = np.arange(len(x))[::-1] if turned else np.arange(len(x))
            u, s, v = np.linalg.svd(x[order], full_matrices=False)
            columns.append(u[np.argsort(order), :share])
            sizes.append(s[:share])
            rows.append(v[:share].T)
        u, _, w = np.linalg.svd(np.hstack(columns), full_matrices=False)
        p, _, q = np.linalg.svd(np.hstack(rows), full_matrices=False)
        return np.asarray((u @ w) * np.concatenate(sizes) @ (p @ q).T)

    return by_module(merged)


# --- the table ------------------------------------------------------------------------------------


def main() -> None:
    print("| method | theirs | ‖theirs − ours‖ / ‖ours‖ |\n|---|---|--:|")

    def row(method: str, theirs: str, other: Deltas, ours: Deltas) -> None:
        print(f"| `{method}` | {theirs} | {100 * apart(other, ours):.3g} % |", flush=True)

    half, mixed, minus = [0.5] * 3, [1.0, 0.5, 0.25], [1.0, -0.5, 1.0]
    for weights in (ONES, half, mixed, minus):
        other = by_module(
            lambda _, xs, w=weights: mergekit([largest(x, 0.5) for x in xs], w, True, True)  # type: ignore[misc]
        )
        name = ", ".join(f"{w:g}" for w in weights)
        row("ties_svd", f"mergekit `ties`, weights {name}", other,
            here("ties_svd", weights, density=0.5))  # fmt: skip
    other = by_module(lambda _, xs: peft([largest(x, 0.5) for x in xs], minus))
    row("ties_svd", "PEFT, weights 1, -0.5, 1", other, here("ties_svd", minus, density=0.5))
    for top in (0.5, 0.2):
        trimmed = [largest_of_all(own, top) for own in DELTAS]
        other = {path: elected_mean([own[path] for own in trimmed]) for path in PATHS}
        row("ties_svd", f"TIES' authors, density {top:g}", other, here("ties_svd", density=top))
    for density in (0.5, 0.1):
        row("dare_linear_svd", f"mergekit `dare_linear`, density {density:g}",
            mergekit_dare(density, ONES, False),
            here("dare_linear_svd", density=density))  # fmt: skip
    for weights in (ONES, half):
        name = ", ".join(f"{w:g}" for w in weights)
        row("dare_ties_svd", f"mergekit `dare_ties`, weights {name}",
            mergekit_dare(0.5, weights, True),
            here("dare_ties_svd", weights, density=0.5))  # fmt: skip
    row("dare_ties_svd", "KnOTS' and Core Space's authors, trimmed to 20 % after DARE",
        dare_then_trimmed(0.5, 0.2), here("dare_ties_svd", density=0.5))  # fmt: skip
    row("knots_ties", "KnOTS' authors, density 0.5", knots(0.5), here("knots_ties", density=0.5))
    row("knots_ties", "KnOTS' authors, density 0.2", knots(0.2), here("knots_ties", density=0.2))
    row("ties_core", "Core Space's authors, density 0.5", core(0.5), here("ties_core", density=0.5))
    row("ties_core", "Core Space's authors, density 1", core(1.0), here("ties_core", density=1.0))
    ours = here("iso_c")
    row("iso_c", "Iso-C's authors, the sum's own directions", iso_c(), ours)
    row("iso_c", "Iso-C's authors, all directions", iso_c_whole(), ours)
    ours = here("tsv_m")
    row("tsv_m", "TSV-M's authors", tsv_m(), ours)
    print(f"\nTSV-M's authors, rows in another order: {100 * apart(tsv_m(True), tsv_m()):.3g} %")


if __name__ == "__main__":
    main()
