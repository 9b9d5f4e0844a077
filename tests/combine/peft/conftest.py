"""Live PEFT models of every layer kind, with their adapters on disk."""

from __future__ import annotations

import pytest
from helpers.models import lora
from helpers.peft_live import KINDS, Live, live


@pytest.fixture(scope="session")
def lives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Live]:
    """For each kind of layer three adapters of one rank, with different alphas and targets."""
    made = {}
    for kind, (make, targets, fewer) in KINDS.items():
        folder = tmp_path_factory.mktemp(kind)
        made[kind] = live(
            folder, make,
            lora(*targets, lora_alpha=6), lora(*targets, lora_alpha=2.5),
            lora(*fewer, lora_alpha=9),
        )  # fmt: skip
    return made
