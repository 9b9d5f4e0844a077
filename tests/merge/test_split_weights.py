"""Deltas of weights that a base cuts otherwise: a part of a fused one, or in another order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.stacked import (
    HIDDEN,
    RANK,
    SCALE,
    Arrays,
    merged,
    refused,
    same,
    values,
    write_adapter,
    write_base,
)
from safetensors.numpy import load_file

import loratool
from loratool.errors import MatchError

SPLIT = "encoder.layers.0"
#: In memory nomic_bert has q, k and v apart.
Q, WQKV = "layers.0.self_attn.q_proj", f"{SPLIT}.attn.Wqkv"


def qkv_base(folder: Path) -> tuple[Path, np.ndarray]:
    weight = values(3 * HIDDEN, HIDDEN)
    tensors = {f"{WQKV}.weight": weight, f"{WQKV}.bias": values(3 * HIDDEN)}
    return write_base(folder, tensors, model_type="nomic_bert"), weight


def test_dora_of_one_third_of_a_fused_weight(tmp_path: Path) -> None:
    """The rows of q are scaled to their magnitudes, those of k and v stay."""
    base, weight = qkv_base(tmp_path / "base")
    a, b = values(RANK, HIDDEN), values(HIDDEN, RANK)
    magnitude = np.abs(values(HIDDEN)) + 1
    adapter = write_adapter(
        tmp_path / "lora",
        {f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b,
         f"{Q}.lora_magnitude_vector": magnitude},
        target_modules=["q_proj"], use_dora=True,
    )  # fmt: skip
    out = merged(base, adapter)[f"{WQKV}.weight"]
    direction = weight[:HIDDEN].astype(np.float64) + SCALE * b.astype(np.float64) @ a
    expected = direction * (magnitude / np.linalg.norm(direction, axis=1))[:, None]
    assert same(out[:HIDDEN], expected)
    assert np.array_equal(out[HIDDEN:], weight[HIDDEN:])


def test_a_trained_bias_of_one_third_of_a_fused_one(tmp_path: Path) -> None:
    """What the adapter does not replace of a tensor is the base's own."""
    base, _ = qkv_base(tmp_path / "base")
    before = load_file(base / "model.safetensors")[f"{WQKV}.bias"]
    trained = values(HIDDEN)
    adapter = write_adapter(
        tmp_path / "lora",
        {f"{Q}.lora_A.weight": values(RANK, HIDDEN), f"{Q}.lora_B.weight": values(HIDDEN, RANK),
         f"{Q}.bias": trained},
        target_modules=["q_proj"], bias="lora_only",
    )  # fmt: skip
    out = merged(base, adapter)[f"{WQKV}.bias"]
    assert np.array_equal(out, np.concatenate([trained, before[HIDDEN:]]))


def test_half_of_a_tensor_in_another_dtype(tmp_path: Path) -> None:
    base, _ = qkv_base(tmp_path / "base")
    adapter = write_adapter(
        tmp_path / "lora",
        {f"{Q}.lora_A.weight": values(RANK, HIDDEN), f"{Q}.lora_B.weight": values(HIDDEN, RANK),
         f"{Q}.bias": values(HIDDEN).astype(np.float16)},
        target_modules=["q_proj"], bias="lora_only",
    )  # fmt: skip
    refused(base, adapter, MatchError, "dtypes")


def test_a_bias_beside_the_factors_of_a_part(tmp_path: Path) -> None:
    base, _ = qkv_base(tmp_path / "base")
    adapter = write_adapter(
        tmp_path / "lora",
        {f"{Q}.lora_A.weight": values(RANK, HIDDEN), f"{Q}.lora_B.weight": values(HIDDEN, RANK),
         f"{Q}.lora_B.bias": values(HIDDEN)},
        target_modules=["q_proj"], lora_bias=True,
    )  # fmt: skip
    refused(base, adapter, MatchError, "lora_bias")


def test_pissa_on_a_part_of_a_tensor_is_derived_from_its_rows(tmp_path: Path) -> None:
    """q of a fused weight is a matrix of its own for PEFT."""
    base, weight = qkv_base(tmp_path / "base")
    u, s, v = np.linalg.svd(weight[:HIDDEN].astype(np.float64))
    left, right = u[:, :RANK] * np.sqrt(s[:RANK]), np.sqrt(s[:RANK])[:, None] * v[:RANK]
    drift = 0.05 * values(HIDDEN, RANK)
    b, a = (left / np.sqrt(SCALE) + drift).astype(np.float32), right / np.sqrt(SCALE)
    adapter = write_adapter(
        tmp_path / "lora",
        {f"{Q}.lora_A.weight": a.astype(np.float32), f"{Q}.lora_B.weight": b},
        target_modules=["q_proj"], init_lora_weights="pissa",
    )  # fmt: skip
    out = merged(base, adapter)[f"{WQKV}.weight"]
    expected = weight[:HIDDEN] - left @ right + SCALE * b.astype(np.float64) @ a
    assert np.allclose(out[:HIDDEN], expected, atol=1e-5)
    assert np.array_equal(out[HIDDEN:], weight[HIDDEN:])


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_4"])
def test_undo_of_an_initialisation_of_a_part(how: str, tmp_path: Path) -> None:
    """What was taken off q alone goes back onto q alone, derived or given."""
    base, weight = qkv_base(tmp_path / "base")
    a, b = values(RANK, HIDDEN), values(HIDDEN, RANK)
    factors = {f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b}
    before = write_adapter(tmp_path / "before", factors, target_modules=["q_proj"])
    drifted = {name: value + 0.1 * values(*value.shape) for name, value in factors.items()}
    adapter = write_adapter(
        tmp_path / "lora", drifted, target_modules=["q_proj"], init_lora_weights=how
    )
    options = {"initial": before} if how != "pissa" else {}
    if how == "pissa":  # what lies in the factors must be what was taken off
        u, s, v = np.linalg.svd(weight[:HIDDEN].astype(np.float64))
        root = np.sqrt(s[:RANK] / SCALE)
        adapter = write_adapter(
            tmp_path / "pissa",
            {f"{Q}.lora_A.weight": (root[:, None] * v[:RANK]).astype(np.float32),
             f"{Q}.lora_B.weight": (u[:, :RANK] * root).astype(np.float32)},
            target_modules=["q_proj"], init_lora_weights=how,
        )  # fmt: skip
    out = tmp_path / "out"
    loratool.merge(base, adapter, out, dtype="float32", reversible=True, **options)
    loratool.unmerge(out, adapter, tmp_path / "back")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert np.array_equal(after[f"{WQKV}.weight"], weight)


# --- parts of unequal sizes -----------------------------------------------------------------------

FUSED, ROWS = "model.layers.0.attention.query_key_value", {"q": 8, "k": 4, "v": 4}


def grouped(folder: Path, **config: int) -> tuple[Path, np.ndarray]:
    """A base with grouped heads in one matrix, whose config tells how many or does not."""
    weight = values(16, HIDDEN)
    base = write_base(folder, {f"{FUSED}.weight": weight}, model_type="sarvam_moe", **config)
    return base, weight


def on(folder: Path, **rows: int) -> tuple[Path, Arrays]:
    """An adapter on some of q, k and v, with so many rows; and the deltas."""
    tensors, deltas = {}, {}
    for letter, count in rows.items():
        a, b = values(RANK, HIDDEN), values(count, RANK)
        path = f"model.layers.0.self_attn.{letter}_proj"
        tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
        deltas[letter] = SCALE * b.astype(np.float64) @ a
    names = [f"{letter}_proj" for letter in rows]
    return write_adapter(folder, tensors, target_modules=names), deltas


@pytest.mark.parametrize("letters", ["q", "k", "v", "qv", "qkv"])
def test_heads_of_the_config_divide_a_matrix(letters: str, tmp_path: Path) -> None:
    base, weight = grouped(tmp_path / "base", num_attention_heads=4, num_key_value_heads=2)
    adapter, deltas = on(tmp_path / "lora", **{letter: ROWS[letter] for letter in letters})
    expected = weight.astype(np.float64)
    for letter, start in (("q", 0), ("k", 8), ("v", 12)):
        if letter in letters:
            expected[start : start + ROWS[letter]] += deltas[letter]
    assert same(merged(base, adapter)[f"{FUSED}.weight"], expected)


@pytest.mark.parametrize("letters", ["qv", "qk", "kv", "qkv"])
def test_without_them_the_parts_divide_it(letters: str, tmp_path: Path) -> None:
    """Two of three tell the third."""
    base, weight = grouped(tmp_path / "base")
    adapter, deltas = on(tmp_path / "lora", **{letter: ROWS[letter] for letter in letters})
    expected = weight.astype(np.float64)
    for letter, start in (("q", 0), ("k", 8), ("v", 12)):
        if letter in letters:
            expected[start : start + ROWS[letter]] += deltas[letter]
    assert same(merged(base, adapter)[f"{FUSED}.weight"], expected)


@pytest.mark.parametrize(
    "rows", [{"q": 8}, {"v": 4}, {"q": 8, "k": 4, "v": 2}, {"q": 12, "v": 4}, {"q": 12, "k": 8}]
)
def test_parts_that_do_not_make_the_whole(rows: dict[str, int], tmp_path: Path) -> None:
    """One alone may lie anywhere, and those of another model do not add up."""
    base, _ = grouped(tmp_path / "base")
    adapter, _ = on(tmp_path / "lora", **rows)
    refused(base, adapter, MatchError, "which rows are whose")


def test_a_magnitude_of_another_length(tmp_path: Path) -> None:
    base, _ = qkv_base(tmp_path / "base")
    adapter = write_adapter(
        tmp_path / "lora",
        {f"{Q}.lora_A.weight": values(RANK, HIDDEN), f"{Q}.lora_B.weight": values(HIDDEN, RANK),
         f"{Q}.lora_magnitude_vector": values(HIDDEN + 1)},
        target_modules=["q_proj"], use_dora=True,
    )  # fmt: skip
    refused(base, adapter, MatchError, "magnitude")


def test_a_saved_bias_of_rows_in_another_order(tmp_path: Path) -> None:
    """Kimi's q and k lie in rotary order in the file: a saved bias of v alone leaves them so."""
    key = "vision_tower.encoder.blocks.0.wqkv.bias"
    bias = values(3 * HIDDEN)
    base = write_base(
        tmp_path / "base", {key: bias, "model.x.weight": values(4, 4)}, model_type="kimi_k25",
        vision_config={"num_attention_heads": 2},
    )  # fmt: skip
    trained = values(HIDDEN)
    adapter = write_adapter(
        tmp_path / "lora", {"model.vision_tower.layers.0.attn.v_proj.bias": trained,
                            "model.x.lora_A.weight": values(RANK, 4),
                            "model.x.lora_B.weight": values(4, RANK)},
        target_modules=["x"], bias="all",
    )  # fmt: skip
    refused(base, adapter, MatchError, "replaces a part of it", "reordered")
