"""What engines leave out that read pairs of factors on linear layers, and nothing else."""

from __future__ import annotations

from loratool.serving.traits import Traits
from loratool.serving.verdict import Setting


def ignored_beside_pairs(t: Traits, setting: Setting) -> str:
    held = t.held("heads", "tokens", "norms", "biases", "others", "beside")
    found = ["DoRA's magnitudes"] * t.has_dora + ["lora_bias"] * t.has_factor_bias
    found += ["trained biases"] * bool(t.trains_biases) + [held] * bool(held)
    found += ["token rows"] * bool(t.token_rows)
    found += ["factors on the embedding"] * bool(t.on("embedding"))
    found += ["factors of experts"] * bool(t.on("experts") or t.one_expert_each)
    return f"ignored with no message: {', '.join(found)}" if found else ""


def on_base_as_published(t: Traits, setting: Setting) -> str:
    found = t.changed_base or "layer_replication" * t.sets("layer_replication")
    return f"{found}: it is applied to the base as published" if found else ""
