"""The ways in which other tools round when they merge, computed block by block.

loratool rounds x = W + Δ once. Others round more often, and which way it was can be proven: a way
predicts every value, and it was that one if the prediction is right where it matters.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from loratool.merging.arithmetic import RunningJob
from loratool.merging.proof.findings import Stats
from loratool.merging.rounding import TORCH, ulp

#: A way that misses this share of a block cannot be it.
_HOPELESS = 0.05

#: Counted as missed by a way that is out of the question.
_NEVER = 1 << 60


class RoundingPaths:
    """All ways for one tensor; those that fail a block are not tried again."""

    def __init__(self, job: RunningJob) -> None:
        self.job = job
        self._dead: set[str] = set()

    def count(
        self, w: torch.Tensor, x: torch.Tensor, got: torch.Tensor, low: int, stats: Stats
    ) -> None:
        """Count for each way how many values of a block it misses.

        `w`, `x`, `got` are base, exact sum and merged values from element `low` on, in the working
        dtype.
        """
        cast = self._stored(w)
        stats.tried += len(w)
        if self.job.job.taken:
            w = self.job.as_trained(w.clone(), low, low + len(w))
        for name, values in self._predictions(w, x, low):
            hit = (values == got) & torch.isfinite(values)
            missed = len(w) - int(hit.sum())
            moved = values != cast
            if missed > _HOPELESS * len(w):
                self._dead.add(name)
                missed = _NEVER
            elif missed:
                off = (values - got).abs_()[~hit]
                near = off <= 2 * ulp(values[~hit], self.job.job.dtype)
                stats.astray[name] += int((~near).sum())
            stats.missed[name] += missed
            stats.moved[name] += int(moved.sum())
            stats.met[name] += int((moved & hit).sum())

    def _stored(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(TORCH[self.job.job.dtype]).to(values.dtype)

    def _predictions(
        self, w: torch.Tensor, x: torch.Tensor, low: int
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Names, and what the way leads to. "cast-BF16" is the base rounded to bfloat16 first."""
        adds = self.job.job.is_change
        delta = self._delta(w, x, low) if adds else x
        for code in ("BF16", "F16"):
            half = TORCH[code]

            def narrow(values: torch.Tensor, half: torch.dtype = half) -> torch.Tensor:
                return values.to(half).to(values.dtype)

            if half != TORCH[self.job.job.dtype] and self._may(f"through-{code}"):
                yield f"through-{code}", self._stored(narrow(x))
            if not adds:
                continue
            if self._may(f"delta-{code}"):
                yield f"delta-{code}", self._stored(w + narrow(delta))
            if self._may(f"product-{code}"):
                product = narrow(self._product_in(half, low, low + len(w), delta))
                yield f"product-{code}", self._stored(narrow(narrow(w) + product))
            if len(self.job.terms) > 1 and self._may(f"steps-{code}"):
                yield f"steps-{code}", self._stored(self._in_steps(half, w, low))
            if self.job.source.dtype != code:
                if self._may(f"cast-{code}"):
                    yield f"cast-{code}", self._stored(narrow(w) + delta)
                if self._may(f"both-{code}"):
                    yield f"both-{code}", self._stored(narrow(w) + narrow(delta))
            if half != TORCH[self.job.job.dtype]:
                if self._may(f"within-{code}"):
                    yield f"within-{code}", self._stored(narrow(narrow(w) + delta))
                if self._may(f"within-both-{code}"):
                    yield f"within-both-{code}", self._stored(narrow(narrow(w) + narrow(delta)))

    def _may(self, name: str) -> bool:
        return name not in self._dead

    def _delta(self, w: torch.Tensor, x: torch.Tensor, low: int) -> torch.Tensor:
        """Δ itself where it is a plain sum: x - W has lost the last bits of a small one."""
        terms, job = self.job.terms, self.job.job
        if (
            job.biases
            or job.before is not None
            or any(term.magnitude is not None for term in terms)
        ):
            return x - w
        total = torch.zeros_like(w)
        for term, part in self._parts(total, low):
            part += term
        return total

    def _parts(self, values: torch.Tensor, low: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The products that have a part in `values`, elements from `low` on, and that part."""
        columns = self.job.columns
        matrix = values.view(-1, columns)
        first, last = low // columns, (low + len(values)) // columns
        for _, term, window in self.job.terms.meeting(first, last):
            yield term.product(window), window.of(matrix)

    def _in_steps(self, half: torch.dtype, w: torch.Tensor, low: int) -> torch.Tensor:
        """One adapter merged after the other, each result rounded to `half`."""
        total = w.clone()
        for delta, part in self._parts(total, low):
            part += delta
            total.copy_(total.to(half))
        return total

    def _product_in(
        self, half: torch.dtype, low: int, high: int, delta: torch.Tensor
    ) -> torch.Tensor:
        """Δ from factors rounded to `half`, their product rounded too, then the scale applied."""
        terms = self.job.terms
        if not terms or any(term.magnitude is not None or term.b is None for term in terms):
            return delta
        columns = self.job.columns
        total = torch.zeros_like(delta)
        deltas = self.job.job.deltas
        for number, term, window in terms.meeting(low // columns, high // columns):
            part = window.of(total.view(-1, columns))
            part += term.rounded_product(window, half, deltas[number].scale)
        return total
