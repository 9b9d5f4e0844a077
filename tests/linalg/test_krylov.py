"""Krylov spaces bound the sum of the largest squares, and stay orthonormal."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers.truncating import Blocks, directed, known, matrix

from loratool.linalg.krylov import BlockKrylov

SPACES = {
    "gaussian": lambda: matrix("gaussian", (300, 300)),
    "flat": lambda: matrix("flat", (300, 300)),
    "power 1": lambda: matrix("power 1", (300, 520)),
    "step": lambda: matrix("step", (520, 300)),
    "outlier": lambda: matrix("outlier 1e3", (300, 520)),
    "pairs": lambda: known(
        directed(np.repeat(0.8 ** np.arange(60), 2), 300, 300).astype(np.float32)
    ),
}


@pytest.mark.parametrize("kind", SPACES)
def test_bound_holds_for_every_seed(kind: str) -> None:
    """Spaces of one block or more, of any seed, bound the sum of the largest squares from above."""
    dense = SPACES[kind]()
    for seed, steps, rank in itertools.product(range(6), (1, 3), (1, 6)):
        generator = torch.Generator().manual_seed(seed)
        space = BlockKrylov(Blocks(dense.matrix, 512), 8, generator)
        for _ in range(steps):
            space.step()
        true = dense.energy - dense.least(rank)
        # 2e-7: products are float32.
        assert space.squares[:rank].sum() <= true * (1 + 2e-7)
        bound = space.bound(rank, dense.energy, generator)
        assert true * (1 - 2e-7) <= bound <= dense.energy * (1 + 2e-7)


def test_blocks_of_the_space_are_orthonormal() -> None:
    """So they stay where the matrix has no more to give: of rank 10, after 40 dimensions."""
    dense = matrix("low rank", (300, 520))
    space = BlockKrylov(Blocks(dense.matrix), 8, torch.Generator().manual_seed(0))
    for _ in range(5):
        space.step()
    gram = space.basis.T @ space.basis
    assert float((gram - torch.eye(40)).abs().max()) <= 1e-12
    # The Gram matrix is of the images that are kept, in float64.
    images = space.images.double()
    assert torch.allclose(images.T @ images, space.gram, rtol=0, atol=1e-12)
    assert np.allclose(space.squares[:10].sqrt(), dense.values[:10], rtol=1e-6)
