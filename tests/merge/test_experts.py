"""Deltas of experts, and of weights that a base cuts otherwise: each place, and each refusal.

The bases are made of random matrices and declare an architecture; what should come out is computed
here in float64, from what PEFT's packing means.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratool
from loratool.errors import AdapterError, MatchError

EXPERTS, HIDDEN, INNER, RANK, SCALE = 3, 8, 6, 2, 1.5
LAYER = "model.layers.0.mlp"
Arrays = dict[str, np.ndarray]
random = np.random.default_rng(5)


def values(*shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


@dataclass
class Stack:
    """Random factors of a parameter `[E, out, in]`, as PEFT packs them, and its deltas."""

    out: int
    width: int
    experts: int = EXPERTS
    a: np.ndarray = field(init=False)
    b: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.a = values(self.experts * RANK, self.width)
        self.b = values(self.out, RANK * self.experts)

    def delta(self, expert: int) -> np.ndarray:
        a = self.a[expert * RANK : (expert + 1) * RANK].astype(np.float64)
        delta: np.ndarray = SCALE * self.b[:, expert :: self.experts].astype(np.float64) @ a
        return delta


def write_base(folder: Path, tensors: Arrays, **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "qwen3_moe", "hidden_size": HIDDEN, **config}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_adapter(folder: Path, tensors: Arrays, **config: Any) -> Path:
    folder.mkdir()
    prefixed = {f"base_model.model.{name}": value for name, value in tensors.items()}
    save_file(prefixed, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": SCALE * RANK, "peft_version": "0.21.2",
        "target_modules": [], **config,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def stacks(
    folder: Path, gate_up: Stack, down: Stack | None, at: str = LAYER, **config: Any
) -> Path:
    """An adapter on the two parameters of `experts`, or on gate_up_proj alone."""
    inner = f"{at}.experts.base_layer" if down else f"{at}.experts"
    tensors = {f"{inner}.lora_A.weight": gate_up.a, f"{inner}.lora_B.weight": gate_up.b}
    names = ["mlp.experts.gate_up_proj"]
    if down:
        tensors |= {f"{at}.experts.lora_A.weight": down.a, f"{at}.experts.lora_B.weight": down.b}
        names.append("mlp.experts.down_proj")
    return write_adapter(folder, tensors, target_parameters=names, **config)


def single(experts: Sequence[int] = range(EXPERTS), at: str = LAYER) -> Arrays:
    """Experts with a tensor each."""
    return {
        f"{at}.experts.{expert}.{name}_proj.weight": values(*shape)
        for expert in experts
        for name, shape in (
            ("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER)),
        )
    }  # fmt: skip


def merged(base: Path, adapter: Path, **options: Any) -> Arrays:
    out = base.parent / "out"
    loratool.merge(base, adapter, out, dtype="float32", **options)
    return load_file(out / "model.safetensors")


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.allclose(found, expected, rtol=1e-6, atol=1e-6))


# --- places ---------------------------------------------------------------------------------------


def test_stacks_go_to_a_tensor_per_expert(tmp_path: Path) -> None:
    """Gate has the upper rows of an expert's product, up the lower ones."""
    tensors = single()
    gate_up, down = Stack(2 * INNER, HIDDEN), Stack(HIDDEN, INNER)
    out = merged(write_base(tmp_path / "base", tensors), stacks(tmp_path / "lora", gate_up, down))
    for expert in range(EXPERTS):
        path = f"{LAYER}.experts.{expert}"
        delta = gate_up.delta(expert)
        for name, part in (
            ("gate", delta[:INNER]), ("up", delta[INNER:]), ("down", down.delta(expert)),
        ):  # fmt: skip
            key = f"{path}.{name}_proj.weight"
            assert same(out[key], tensors[key] + part)


@pytest.mark.parametrize("kind", ["a_moe_of_next_year", ""])
def test_a_model_that_is_not_known_has_the_usual_experts(kind: str, tmp_path: Path) -> None:
    """Names of one expert and of their stack say all that is needed; config.json may be missing."""
    tensors, stack = single(), Stack(2 * INNER, HIDDEN)
    base = write_base(tmp_path / "base", tensors, model_type=kind)
    if not kind:
        (base / "config.json").unlink()
    out = merged(base, stacks(tmp_path / "lora", stack, None))
    key = f"{LAYER}.experts.2.up_proj.weight"
    assert same(out[key], tensors[key] + stack.delta(2)[INNER:])


@pytest.mark.parametrize("turned", [False, True])
def test_stacks_go_to_stacks_either_way_round(turned: bool, tmp_path: Path) -> None:
    """The shapes say whether a product is added as it is or transposed (PEFT 0.18)."""
    tensors = {f"{LAYER}.experts.gate_up_proj": values(EXPERTS, 2 * INNER, HIDDEN)}
    stack = Stack(HIDDEN, 2 * INNER) if turned else Stack(2 * INNER, HIDDEN)
    out = merged(write_base(tmp_path / "base", tensors), stacks(tmp_path / "lora", stack, None))
    for expert in range(EXPERTS):
        delta = stack.delta(expert)
        (key,) = tensors
        assert same(out[key][expert], tensors[key][expert] + (delta.T if turned else delta))


@pytest.mark.parametrize(
    ("version", "kind", "turned"),
    [("0.18.1", "qwen3_moe", True), ("0.21.2", "qwen3_moe", False), ("0.19.0", "gpt_oss", False),
     ("0.21.2", "gpt_oss", True), ("0.18.0", "gpt_oss", True)],
)  # fmt: skip
def test_the_version_of_peft_tells_square_stacks(
    version: str, kind: str, turned: bool, tmp_path: Path
) -> None:
    tensors = {f"{LAYER}.experts.gate_up_proj": values(EXPERTS, HIDDEN, HIDDEN)}
    stack = Stack(HIDDEN, HIDDEN)
    base = write_base(tmp_path / "base", tensors, model_type=kind)
    out = merged(base, stacks(tmp_path / "lora", stack, None, peft_version=version))
    (key,) = tensors
    for expert in range(EXPERTS):
        delta = stack.delta(expert)
        assert same(out[key][expert], tensors[key][expert] + (delta.T if turned else delta))


@pytest.mark.parametrize("turned", [False, True])
def test_a_sibling_tells_a_square_stack_without_a_version(turned: bool, tmp_path: Path) -> None:
    """All stacks of one file are added the same way."""
    inner = HIDDEN // 2
    tensors = {
        f"{LAYER}.experts.gate_up_proj": values(EXPERTS, 2 * inner, HIDDEN),
        f"{LAYER}.experts.down_proj": values(EXPERTS, HIDDEN, inner),
    }
    square, down = Stack(HIDDEN, HIDDEN), Stack(*((inner, HIDDEN) if turned else (HIDDEN, inner)))
    base = write_base(tmp_path / "base", tensors)
    out = merged(base, stacks(tmp_path / "lora", square, down, peft_version=None))
    key = f"{LAYER}.experts.gate_up_proj"
    delta = square.delta(1)
    assert same(out[key][1], tensors[key][1] + (delta.T if turned else delta))


def test_adapters_of_single_experts_go_into_a_stack(tmp_path: Path) -> None:
    """Each its rows of its matrix; the other experts stay bit for bit."""
    key = f"{LAYER}.experts.gate_up_proj"
    tensors = {key: values(EXPERTS, 2 * INNER, HIDDEN)}
    a, b = values(RANK, HIDDEN), values(INNER, RANK)
    path = f"{LAYER}.experts.1.up_proj"
    adapter = write_adapter(
        tmp_path / "lora", {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b},
        target_modules=["up_proj"],
    )  # fmt: skip
    out = merged(write_base(tmp_path / "base", tensors), adapter)
    expected = tensors[key].astype(np.float64)
    expected[1, INNER:] += SCALE * b.astype(np.float64) @ a
    assert same(out[key], expected)
    assert np.array_equal(out[key][[0, 2]], tensors[key][[0, 2]])


def test_a_text_adapter_goes_below_the_prefix_of_a_model_of_images(tmp_path: Path) -> None:
    """Its experts as well, which the file names one by one."""
    prefix = "language_model.model.layers.0.mlp"
    tensors = single(at=prefix) | {"vision_tower.vision_model.x.weight": values(4, 4)}
    stack = Stack(2 * INNER, HIDDEN)
    base = write_base(
        tmp_path / "base", tensors, model_type="llava",
        text_config={"model_type": "qwen3_moe", "hidden_size": HIDDEN},
        vision_config={"model_type": "clip_vision_model"},
    )  # fmt: skip
    out = merged(base, stacks(tmp_path / "lora", stack, None))
    key = f"{prefix}.experts.2.up_proj.weight"
    assert same(out[key], tensors[key] + stack.delta(2)[INNER:])


def test_saved_stacks_are_cut_for_a_base_with_a_tensor_per_expert(tmp_path: Path) -> None:
    """modules_to_save of the experts replaces each expert's tensors with its part."""
    tensors = single()
    whole = values(EXPERTS, 2 * INNER, HIDDEN)
    adapter = write_adapter(
        tmp_path / "lora",
        {f"{LAYER}.experts.gate_up_proj": whole,
         "model.q_proj.lora_A.weight": values(RANK, 4),
         "model.q_proj.lora_B.weight": values(4, RANK)},
        modules_to_save=["experts"], target_modules=["q_proj"],
    )  # fmt: skip
    tensors["model.q_proj.weight"] = values(4, 4)
    out = merged(write_base(tmp_path / "base", tensors), adapter)
    for expert in range(EXPERTS):
        path = f"{LAYER}.experts.{expert}"
        assert np.array_equal(out[f"{path}.gate_proj.weight"], whole[expert, :INNER])
        assert np.array_equal(out[f"{path}.up_proj.weight"], whole[expert, INNER:])
        key = f"{path}.down_proj.weight"
        assert np.array_equal(out[key], tensors[key])


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


# --- refusals -------------------------------------------------------------------------------------


def refused(base: Path, adapter: Path, error: type[Exception], *words: str) -> None:
    before = sorted(base.parent.iterdir())
    with pytest.raises(error) as found:
        merged(base, adapter)
    for word in words:
        assert word in str(found.value)
    assert sorted(base.parent.iterdir()) == before


Change = Callable[[Arrays], Arrays]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {n: v for n, v in t.items() if ".experts.1." not in n},
         ["expert 1", "is missing"]),
        (lambda t: {n: v for n, v in t.items() if ".experts.2." not in n},
         ["3 experts", "has 2"]),
        (lambda t: {n: v for n, v in t.items() if "2.up_proj" not in n}, ["only in part"]),
        (lambda t: {n: v[:, :-1] if "1.up_proj" in n else v for n, v in t.items()},
         ["different shapes"]),
        (lambda t: {n: v for n, v in t.items() if "gate" not in n and "up" not in n},
         ["the base has no"]),
    ],
    ids=["one in between", "the last", "half of one", "another shape", "all"],
)  # fmt: skip
def test_experts_that_the_base_lacks(change: Change, words: list[str], tmp_path: Path) -> None:
    """The number of experts is that of all names; what is missing is named."""
    tensors = {name: np.ascontiguousarray(value) for name, value in change(single()).items()}
    adapter = stacks(tmp_path / "lora", Stack(2 * INNER, HIDDEN), None)
    refused(write_base(tmp_path / "base", tensors), adapter, MatchError, *words)


def test_square_stacks_that_nothing_tells(tmp_path: Path) -> None:
    tensors = {f"{LAYER}.experts.gate_up_proj": values(EXPERTS, HIDDEN, HIDDEN)}
    adapter = stacks(tmp_path / "lora", Stack(HIDDEN, HIDDEN), None, peft_version=None)
    refused(write_base(tmp_path / "base", tensors), adapter, MatchError, "square", "peft_version")


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


def test_two_adapters_on_one_stack_are_rounded_once(tmp_path: Path) -> None:
    key = f"{LAYER}.experts.gate_up_proj"
    tensors = {key: values(EXPERTS, 2 * INNER, HIDDEN)}
    base = write_base(tmp_path / "base", tensors)
    one, two = Stack(2 * INNER, HIDDEN), Stack(2 * INNER, HIDDEN)
    adapters = [
        stacks(tmp_path / name, stack, None) for name, stack in (("one", one), ("two", two))
    ]
    loratool.merge(base, adapters, tmp_path / "out", weights=[0.5, -2], dtype="float32")
    out = load_file(tmp_path / "out" / "model.safetensors")[key]
    for expert in range(EXPERTS):
        delta = 0.5 * one.delta(expert) - 2 * two.delta(expert)
        assert same(out[expert], tensors[key][expert] + delta)


def test_a_config_that_names_no_such_parameter(tmp_path: Path) -> None:
    """What a wrapper adapts is told by the config; where it says something else, nothing does."""
    stack = Stack(2 * INNER, HIDDEN)
    adapter = write_adapter(
        tmp_path / "lora",
        {f"{LAYER}.experts.lora_A.weight": stack.a, f"{LAYER}.experts.lora_B.weight": stack.b},
        target_parameters=["mlp.gate.weight"],
    )
    base = write_base(tmp_path / "base", single())
    refused(base, adapter, (AdapterError, MatchError), "experts")  # type: ignore[arg-type]
