"""Deltas of experts: each place, and each refusal.

The bases are made of random matrices and declare an architecture; what should come out is computed
here in float64, from what PEFT's packing means.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.adapters import codes
from helpers.stacked import (
    EXPERTS,
    HIDDEN,
    INNER,
    LAYER,
    RANK,
    SCALE,
    Arrays,
    Stack,
    merged,
    refused,
    same,
    single,
    stacks,
    values,
    write_adapter,
    write_base,
)
from safetensors.numpy import load_file

import loratool
from loratool.errors import AdapterError, MatchError

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
    adapter = stacks(tmp_path / "lora", stack, None)
    report = loratool.merge(base, adapter, tmp_path / "out", dtype="float32")
    assert codes(report) == ["usual-experts"]  # which is said, because it is an assumption
    out = load_file(tmp_path / "out" / "model.safetensors")
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


@pytest.mark.parametrize("name", ["gate", "up", "down"])
@pytest.mark.parametrize(
    ("kind", "place"),
    [("gpt_oss", "turns"), ("llama4_text", "columns"), ("aria_text", "columns"),
     ("openai_privacy_filter", "columns"), ("mistral4", "rows"), ("gemma4_text", "rows")],
)  # fmt: skip
def test_an_adapter_of_one_expert_goes_into_stacks_of_every_sort(
    kind: str, place: str, name: str, tmp_path: Path
) -> None:
    """[out, in] and [in, out], gate above up, beside it, or with it in turns: as the forward pass
    of each model reads them."""
    both, down = (EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)
    if place != "rows":
        both, down = (EXPERTS, HIDDEN, 2 * INNER), (EXPERTS, INNER, HIDDEN)
    at = LAYER.replace("mlp", "feed_forward") if kind == "llama4_text" else LAYER
    tensors = {
        f"{at}.experts.gate_up_proj": values(*both),
        f"{at}.experts.down_proj": values(*down),
    }
    out, width = (HIDDEN, INNER) if name == "down" else (INNER, HIDDEN)
    a, b = values(RANK, width), values(out, RANK)
    path = f"{at}.experts.2.{name}_proj"
    adapter = write_adapter(
        tmp_path / "lora", {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b},
        target_modules=[f"{name}_proj"],
    )  # fmt: skip
    found = merged(write_base(tmp_path / "base", tensors, model_type=kind), adapter)
    delta = SCALE * b.astype(np.float64) @ a
    key = f"{at}.experts.{'down_proj' if name == 'down' else 'gate_up_proj'}"
    expected = tensors[key].astype(np.float64)
    matrix = expected[2] if place == "rows" else expected[2].T
    first = name == "gate"
    if name == "down":
        matrix += delta
    elif place == "turns":
        matrix[0 if first else 1 :: 2] += delta
    else:
        matrix[slice(0, INNER) if first else slice(INNER, None)] += delta
    assert same(found[key], expected)
    other = next(name for name in tensors if name != key)
    assert np.array_equal(found[other], tensors[other])


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


# --- refusals -------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("kind", "version"), [("qwen3_moe", None), ("a_moe_of_next_year", "0.21.2")]
)
def test_square_stacks_that_nothing_tells(kind: str, version: str | None, tmp_path: Path) -> None:
    """PEFT's versions differ, and in which way depends on the architecture."""
    tensors = {f"{LAYER}.experts.gate_up_proj": values(EXPERTS, HIDDEN, HIDDEN)}
    adapter = stacks(tmp_path / "lora", Stack(HIDDEN, HIDDEN), None, peft_version=version)
    base = write_base(tmp_path / "base", tensors, model_type=kind)
    refused(base, adapter, MatchError, "square", "peft_version")


def test_stacks_that_files_have_both_ways_round_need_a_hidden_size(tmp_path: Path) -> None:
    """Qwen3-VL-MoE is published transposed and saved otherwise: an expert's rows are chosen only
    where config.json tells which it is."""
    key = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    tensors = {key: values(EXPERTS, HIDDEN, 2 * INNER)}
    a, b = values(RANK, HIDDEN), values(INNER, RANK)
    path = "model.language_model.layers.0.mlp.experts.1.up_proj"
    adapter = write_adapter(
        tmp_path / "lora", {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b},
        target_modules=["up_proj"],
    )  # fmt: skip
    text = {"model_type": "qwen3_vl_moe_text"}
    config = {"model_type": "qwen3_vl_moe", "hidden_size": None, "text_config": text}
    refused(write_base(tmp_path / "base", tensors, **config), adapter, MatchError, "both ways")
    config["text_config"] = {**text, "hidden_size": HIDDEN}
    out = merged(write_base(tmp_path / "told", tensors, **config), adapter)
    expected = tensors[key].astype(np.float64)
    expected[1][:, INNER:] += (SCALE * b.astype(np.float64) @ a).T
    assert same(out[key], expected)


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
