"""The largest singular values of a large matrix by a block Krylov method, and a bound on the rest.

Every pass over the matrix D multiplies an orthonormal block V with the Gram operator G = DᵀD, and
the next block is what is new in G·V. The blocks together span the Krylov space of a random start,
in which the best approximation of D is found exactly (Musco and Musco, 2015). A pass reads D once:
each block of rows is multiplied from both sides while it is in the cache.

The blocks and their projections are float64, and the products float32. So singular values down to
about 1e-7 of the largest one are right, because later blocks are orthogonal to what the first ones
found and are not drowned by its rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch


class Matrix(Protocol):
    """A matrix `[rows, columns]` that is read in blocks of rows, in float32."""

    rows: int
    columns: int
    device: torch.device
    #: All of it, where it is in memory.
    held: torch.Tensor | None

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The first row of each block, and the block `[n, columns]`; valid until the next one."""
        ...


def through(matrix: Matrix, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(D·V [rows, c], Dᵀ·D·V [columns, c])` in one pass, of `right` V `[columns, c]` float32."""
    images = torch.empty(matrix.rows, right.shape[1], device=matrix.device)
    back = torch.zeros_like(right)
    for low, block in matrix.blocks():
        image = torch.mm(block, right, out=images[low : low + len(block)])
        back.addmm_(block.T, image)
    return images, back


class BlockKrylov:
    """The Krylov space of `matrix` so far, `width` dimensions in blocks of `size`.

    `squares [width]` are the squared singular values of D restricted to that space, largest first
    and float64 on the CPU: never above those of D. `coupling` is what of G·V, V the last block,
    lies outside of the space.
    """

    def __init__(self, matrix: Matrix, size: int, generator: torch.Generator) -> None:
        self.matrix = matrix
        self.size = size
        self.steps = 0
        self.basis = torch.empty(matrix.columns, 0, dtype=torch.float64, device=matrix.device)
        self.images = torch.empty(matrix.rows, 0, device=matrix.device)
        self.gram = torch.empty(0, 0, dtype=torch.float64)
        start = torch.randn(matrix.columns, size, generator=generator, dtype=torch.float64)
        self._next = torch.linalg.qr(start.to(matrix.device))[0]
        #: G·V of the last block is `basis·(…) + next·coupling`.
        self.coupling = torch.empty(0, 0, dtype=torch.float64)

    @property
    def width(self) -> int:
        return self.basis.shape[1]

    def step(self) -> None:
        """Take in one more block: one pass over the matrix."""
        image, back = through(self.matrix, self._next.float())
        self.basis = torch.cat([self.basis, self._next], dim=1)
        self.images = torch.cat([self.images, image], dim=1)
        self.gram = self._extended_gram(image)
        values, vectors = torch.linalg.eigh(self.gram)
        self.squares = values.flip(0).clamp(min=0.0)
        self._vectors = vectors.flip(1)
        self._next, coupling = self._orthogonalised(back.double())
        self.coupling = coupling.cpu()
        self.steps += 1

    def _extended_gram(self, image: torch.Tensor) -> torch.Tensor:
        """`(D·Q)ᵀ(D·Q)` of the whole basis, of which only the products with `image` are new."""
        width, size = self.images.shape[1], image.shape[1]
        products = torch.zeros(width, size, dtype=torch.float64, device=image.device)
        for low in range(0, len(image), _SLICE):
            rows = slice(low, low + _SLICE)
            products += self.images[rows].double().T @ image[rows].double()
        gram = torch.empty(width, width, dtype=torch.float64)
        old = width - size
        gram[:old, :old] = self.gram
        gram[:, old:] = products.cpu()
        gram[old:, :old] = gram[:old, old:].T
        return gram

    def _orthogonalised(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(V, R)` with `block = basis·(…) + V·R`, V orthonormal and orthogonal to the basis."""
        coupling = torch.eye(block.shape[1], dtype=torch.float64, device=block.device)
        for _ in range(3):  # where little is new, what rounding leaves must be taken off again
            block = block - self.basis @ (self.basis.T @ block)
            block, triangle = torch.linalg.qr(block)
            coupling = triangle @ coupling
        return block, coupling

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`(U·√Σ [rows, rank], V·√Σ [columns, rank])` of the largest `rank` singular values."""
        vectors = self._vectors[:, :rank]
        fourth = self.squares[:rank].clamp(min=torch.finfo(torch.float64).tiny) ** 0.25
        left = (vectors / fourth).to(self.matrix.device)
        right = (vectors * fourth).to(self.matrix.device)
        return self.images @ left.float(), (self.basis @ right).float()

    def bound(self, rank: int, energy: float, generator: torch.Generator) -> float:
        """A number that Σσ² of the `rank` largest singular values of D does not exceed.

        `energy` is ‖D‖². It holds with a probability of at least 1 - rank/10⁷, over the generator.

        G is `[T Eᵀ; E H]` with T the Gram matrix of the basis, E its `coupling` with the rest, and
        H what is left of G outside of the basis. For every s > 0 that is at most
        `diag(T + EᵀE/s, H + s)`, so the largest eigenvalues of G are at most the largest of T
        + EᵀE/s and H + s together (Weyl; Ky Fan for their sum).

        The eigenvalues μ of H come from random probes Y `[columns, 16]`: with the Chebyshev
        polynomial p of degree d that is small up to t, ‖p(H)·Y‖² is at least the sum over the
        eigenvectors x of p(μ)²·‖xᵀY‖², and each ‖xᵀY‖² is one or more but for one in 10⁷ (it is
        χ²-distributed). So Σp(μ)² over any j eigenvalues is at most ‖p(H)·Y‖², and since p² is
        lies above its tangents at and beyond t, their mean is at most p⁻¹(√(‖p(H)·Y‖²/j)).
        """
        self._rounded = self.basis.float()
        held = float(self.squares[:rank].sum())
        level = float(self.squares[min(max(rank, self.size), self.width - 1)])
        level = max(level, 1e-14 * float(self.squares[0]))
        probes = torch.randn(self.matrix.columns, _PROBES, generator=generator)
        last = self._outside(probes.to(self.matrix.device))
        now = self._shifted(last, level)
        best = energy
        for degree in range(1, _DEGREES + 1):
            if degree > 1:
                last, now = now, 2 * self._shifted(now, level) - last
            size = float(torch.linalg.vector_norm(now, dtype=torch.float64)) ** 2
            if not math.isfinite(size):
                break
            best = min(best, self._majorant(rank, size, degree, level))
            if energy - held <= _TIGHT**2 * (energy - best):
                break
        return max(best, held)

    def _outside(self, block: torch.Tensor) -> torch.Tensor:
        return block - self._rounded @ (self._rounded.T @ block)

    def _shifted(self, block: torch.Tensor, level: float) -> torch.Tensor:
        """`(2H/level - 1)·block`: H with `[0, level]` mapped to `[-1, 1]`."""
        return self._outside(through(self.matrix, block)[1]) * (2 / level) - block

    def _majorant(self, rank: int, size: float, degree: int, level: float) -> float:
        """The bound on the sum of the `rank` largest eigenvalues that these probes give."""
        means = [0.0]  # of the j largest eigenvalues outside
        for j in range(1, rank + 1):
            root = math.acosh(math.sqrt(max(size / j, 1.0)))
            means.append(level / 2 * (1 + math.cosh(root / degree)))
        square = self.coupling.T @ self.coupling
        best = math.inf
        for share in (0.01, 0.03, 0.1, 0.3, 1.0):
            shift = share * float(self.squares[rank - 1])
            if shift <= 0:
                continue
            inside = self.gram.clone()
            inside[-self.size :, -self.size :] += square / shift
            values = torch.linalg.eigvalsh(inside).flip(0)[:rank]
            sums = [0.0, *torch.cumsum(values, 0).tolist()]
            worst = max(
                sums[rank - j] + (j * (means[j] + shift) if j else 0.0) for j in range(rank + 1)
            )
            best = min(best, worst)
        return best


#: Rows that are widened to float64 at a time.
_SLICE = 8192
#: Random vectors that look for large singular values outside of the basis. For 16 of them the
#: squared length of a projection, χ² with 16 degrees of freedom, is below 1 once in 10⁷.
_PROBES = 16
#: Passes that the bound may take.
_DEGREES = 3
#: The ratio of errors, found to best possible, at which the bound is good enough to stop.
_TIGHT = 1.002
