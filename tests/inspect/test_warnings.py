"""What is odd about an adapter is reported under its stable code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.adapters import codes, pair, write_adapter
from helpers.inspecting import LINEAR

import loratool


def altered(change: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**LINEAR, **change}


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
ODD: dict[str, tuple[dict[str, np.ndarray], dict[str, Any], str]] = {
    "B all zero": (
        altered({f"{KEY}B.weight": np.zeros((6, 4), np.float32)}), {}, "zero-delta"),
    "NaN in a factor": (
        altered({f"{KEY}A.weight": np.full((4, 5), np.nan, np.float32)}), {}, "not-finite"),
    "infinity in a saved head": (
        altered({"base_model.model.score.weight": np.full((2, 5), np.inf, np.float32)}),
        {"modules_to_save": ["score"]}, "not-finite"),
    "config rank is not the tensors'": (LINEAR, {"r": 8}, "rank-mismatch"),
    "target without tensors": (LINEAR, {"target_modules": ["q_proj", "v_proj"]}, "target-absent"),
    "saved module without tensors": (
        LINEAR, {"modules_to_save": ["lm_head"]}, "saved-module-absent"),
    "bias mode without biases": (LINEAR, {"bias": "lora_only"}, "bias-absent"),
    "DoRA without magnitudes": (LINEAR, {"use_dora": True}, "magnitude-absent"),
    "square Conv1D": (
        pair("transformer.h.0.attn.c_proj", 6, 6), {"fan_in_fan_out": True}, "square-conv1d"),
    "a few rows of an embedding": (
        altered({"base_model.model.model.embed_tokens.weight": np.ones((5, 5), np.float32)}), {},
        "partial-embedding-rows"),
    "ZeRO-3 placeholder": (
        altered({f"{KEY}A.weight": np.zeros(0, np.float32)}), {}, "zero3-placeholder"),
    "unknown config field": (LINEAR, {"use_magic": True}, "unknown-config-field"),
    "half a pair": ({f"{KEY}A.weight": LINEAR[f"{KEY}A.weight"]}, {}, "half-a-pair"),
    "ranks of A and B differ": (
        altered({f"{KEY}B.weight": np.ones((6, 3), np.float32)}), {}, "pair-mismatch"),
    "unknown lora tensor": (
        altered({"base_model.model.x.lora_secret": np.ones(3, np.float32)}), {},
        "unknown-tensors"),
    "two tensors for one place": (
        altered({f"module.{KEY}A.weight": LINEAR[f"{KEY}A.weight"] + 1}), {}, "unknown-tensors"),
    "several adapters in one file": (
        {k.replace(".weight", f".{n}.weight"): v for k, v in LINEAR.items() for n in "xy"}, {},
        "several-adapters"),
    "no config": (LINEAR, None, "no-config"),  # type: ignore[dict-item]
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_has_a_code(name: str, tmp_path: Path) -> None:
    """Every oddity is reported under its stable code, and nothing sound is."""
    tensors, config, code = ODD[name]
    report = loratool.inspect(write_adapter(tmp_path / "odd", tensors, config))
    assert code in codes(report)
    json.dumps(report.to_dict(), allow_nan=False)
    sound = loratool.inspect(write_adapter(tmp_path / "sound", LINEAR, {}))
    assert codes(sound) == []


def test_half_a_pair_is_one_warning_with_the_right_number(tmp_path: Path) -> None:
    """Modules that lack their lora_B are counted once, and neither their tensors are called unknown
    nor their targets absent."""
    tensors = {}
    for name in ("q_proj", "k_proj", "v_proj"):
        tensors |= pair(f"model.layers.0.self_attn.{name}", 6, 6)
    for name in ("k_proj", "v_proj"):
        del tensors[f"base_model.model.model.layers.0.self_attn.{name}.lora_B.weight"]
    config = {"target_modules": ["q_proj", "k_proj", "v_proj"]}
    report = loratool.inspect(write_adapter(tmp_path / "odd", tensors, config))
    (notice,) = report.warnings
    assert notice.code == "half-a-pair"
    assert notice.message.startswith("2 modules have only one of lora_A and lora_B")
    assert "k_proj, model.layers.0.self_attn.v_proj: only lora_A.weight" in notice.message
