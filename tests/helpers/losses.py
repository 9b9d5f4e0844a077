"""The loss of a model on a text that it was not trained on."""

from __future__ import annotations

from pathlib import Path

import torch

from helpers.places import FIXTURES


def held_out_loss(model: torch.nn.Module, text: Path = FIXTURES / "heldout.txt") -> float:
    """Mean nats per byte on a held-out text, in windows of 256 predicted bytes."""
    tokens = torch.tensor(list(text.read_bytes()))
    count = (len(tokens) - 1) // 256
    inputs = tokens[: count * 256].view(count, 256)
    targets = tokens[1 : count * 256 + 1].view(count, 256)
    total = 0.0
    with torch.inference_mode():
        # Eight windows and what the model makes of them stay in the cache of one core.
        for x, y in zip(inputs.split(8), targets.split(8), strict=True):
            logits = model(x, use_cache=False).logits.float()
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), y.flatten(), reduction="sum"
            ).item()
    return total / (count * 256)
