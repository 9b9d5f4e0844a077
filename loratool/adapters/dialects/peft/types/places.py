"""Places of a matrix that PEFT draws from a seed, as torch draws them on a CPU."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from loratool.adapters.dialects.peft.types.making import Numbers
from loratool.adapters.dialects.peft.types.sizes import Size


@lru_cache(8)
def random_places(shape: Size, seed: int, count: int) -> tuple[Numbers, Numbers]:
    """Rows and columns of the first `count` elements of a matrix in a random order.

    Source: `update_layer` in peft/tuners/fourierft/layer.py and peft/tuners/waveft/layer.py.
    """
    import torch

    order = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(seed))
    rows, columns = np.divmod(order[:count].numpy(), shape[1])
    return rows, columns
