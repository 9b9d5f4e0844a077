"""The config of a linear adapter."""

from __future__ import annotations

from helpers.adapters import pair

LINEAR = pair("model.layers.0.self_attn.q_proj", 6, 5)
