"""Places of a matrix, from a file or drawn from a seed as torch draws them on a CPU."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from loratool.adapters.dialects.peft.types.making import Numbers
from loratool.adapters.dialects.peft.types.sizes import Size
from loratool.errors import AdapterError


@lru_cache(8)
def random_places(shape: Size, seed: int, count: int) -> tuple[Numbers, Numbers]:
    """Rows and columns of the first `count` elements of a matrix in a random order.

    Source: `update_layer` in peft/tuners/fourierft/layer.py and peft/tuners/waveft/layer.py.
    """
    import torch

    order = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(seed))
    rows, columns = np.divmod(order[:count].numpy(), shape[1])
    return rows, columns


def refuse_outside(path: str, what: str, numbers: npt.NDArray[Any], count: int) -> None:
    """Raise AdapterError for numbers of a module's that are none of `count` elements."""
    if numbers.size and (numbers.min() < 0 or numbers.max() >= count):
        raise AdapterError(
            f"{path}: {what} has numbers from {int(numbers.min())} to {int(numbers.max())}, "
            f"expected 0 to {count - 1}.",
            "The file is damaged, or is for another model. Nothing was written.",
        )
