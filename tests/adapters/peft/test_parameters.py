"""target_parameters: which parameter each pair of a file adapts, and what cannot be told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.adapters import PREFIX, Q, Tensors, codes, pair, write_adapter
from helpers.experts import DOWN, EXPERTS, GATE_UP, TARGETS, Pairs, expert_pairs, packed, stacks
from helpers.models import edit_config

import loratool
from loratool.adapters.adapter import Adapter
from loratool.adapters.experts import ExpertStack
from loratool.adapters.reading import read_adapter
from loratool.adapters.told import Told
from loratool.errors import AdapterError
from loratool.storage.tensors import FilePool

H, INNER, E, R = 8, 6, 3, 4
UP, DN = expert_pairs(E, 2 * INNER, H, R), expert_pairs(E, H, INNER, R, seed=1)


def refusals(adapter: Adapter) -> dict[str, str]:
    return {n.code: n.message for n in adapter.notices if n.refused}


def stack_of(adapter: Adapter, path: str) -> ExpertStack:
    found = adapter.modules[path]
    assert isinstance(found, ExpertStack)
    return found


def assert_holds(adapter: Adapter, path: str, pairs: Pairs) -> None:
    """The stack has these pairs, expert by expert."""
    stack = stack_of(adapter, path)
    assert stack.experts == len(pairs)
    with FilePool() as files:
        for index, (b, a) in enumerate(pairs):
            left, right = stack.expert(index).left_right(files)
            assert np.array_equal(left, b)
            assert np.array_equal(right, a)


@pytest.mark.parametrize("targets", [TARGETS, ["gate_up_proj", "down_proj"], None])
def test_the_first_registered_parameter_is_innermost(targets: Any, tmp_path: Path) -> None:
    """Nested wrappers are gate_up and down whatever the order in the config, or without it."""
    adapter = read_adapter(stacks(tmp_path, UP, DN, target_parameters=targets))
    assert adapter.notices == []
    assert_holds(adapter, GATE_UP, UP)
    assert_holds(adapter, DOWN, DN)
    assert stack_of(adapter, DOWN).weight_name == DOWN


def test_shapes_have_the_last_word(tmp_path: Path) -> None:
    """In a model that registers down first the inner wrapper is down."""
    assert_holds(read_adapter(stacks(tmp_path, DN, UP)), DOWN, DN)


def test_ranks_and_scales_are_of_the_parameter(tmp_path: Path) -> None:
    """Patterns are held against module and parameter; r is that of an expert, with rsLoRA too."""
    double = expert_pairs(E, 2 * INNER, H, 2 * R)
    source = stacks(
        tmp_path, double, DN, use_rslora=True,
        rank_pattern={r".*\.gate_up_proj": 2 * R}, alpha_pattern={"mlp.experts.down_proj": 6},
    )  # fmt: skip
    adapter = read_adapter(source)
    assert refusals(adapter) == {}
    up, down = stack_of(adapter, GATE_UP), stack_of(adapter, DOWN)
    assert (up.rank, up.alpha, up.scale) == (2 * R, 8, 8 / np.sqrt(2 * R))
    assert (down.rank, down.alpha, down.scale) == (R, 6, 6 / np.sqrt(R))
    assert_holds(adapter, GATE_UP, double)


def test_layers_beside_experts_stay_layers(tmp_path: Path) -> None:
    """A list of target_modules, or an expression, keeps short names of parameters to experts."""
    tensors = packed(f"{EXPERTS}.base_layer", UP) | packed(EXPERTS, DN)
    tensors |= pair(Q, 12, 10) | pair("model.layers.0.mlp.gate", E, H)
    names = ["gate_up_proj", "down_proj", "gate.weight"]
    for number, modules in enumerate((["q_proj"], r".*\.self_attn\.q_proj", "all-linear")):
        config = {"target_modules": modules, "target_parameters": names}
        adapter = read_adapter(write_adapter(tmp_path / str(number), tensors, config))
        assert refusals(adapter) == {}
        kinds = {path: m.kind for path, m in adapter.modules.items()}
        assert kinds == {
            GATE_UP: "experts", DOWN: "experts", Q: "linear", "model.layers.0.mlp.gate": "linear",
        }  # fmt: skip
        assert adapter.modules["model.layers.0.mlp.gate"].weight_name.endswith("mlp.gate.weight")


def test_four_parameters_follow_the_order_of_gpt_oss(tmp_path: Path) -> None:
    """Biases of experts are matrices of their own, after what they belong to."""
    biases = [expert_pairs(1, E, n, R, seed=n) for n in (2 * INNER, H)]
    order = ["gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"]
    pairs = [UP, biases[0], DN, biases[1]]
    tensors: Tensors = {}
    for depth, found in zip((3, 2, 1, 0), pairs, strict=True):
        tensors |= packed(EXPERTS + ".base_layer" * depth, found)
    config = {"target_parameters": sorted(order), "target_modules": []}
    adapter = read_adapter(write_adapter(tmp_path, tensors, config))
    assert refusals(adapter) == {}
    for name, found in zip(order, pairs, strict=True):
        assert_holds(adapter, f"{EXPERTS}.{name}", found)


def in_three_axes(path: str, pairs: Pairs, expert_first: bool) -> Tensors:
    """A [E, r, in], and B [E, out, r] or [out, r, E]."""
    a = np.stack([a for _, a in pairs])
    b = np.stack([b for b, _ in pairs], axis=0 if expert_first else 2)
    return {f"{PREFIX}{path}.lora_A.weight": a, f"{PREFIX}{path}.lora_B.weight": b}


def test_other_programs_files_are_read(tmp_path: Path) -> None:
    """Factors with an axis for experts, under PEFT's keys (Megatron) or the parameters' (SkyRL)."""
    megatron = in_three_axes(f"{EXPERTS}.base_layer", UP, False) | in_three_axes(EXPERTS, DN, False)
    skyrl = in_three_axes(GATE_UP, UP, True) | in_three_axes(DOWN, DN, True)
    for name, tensors in {"megatron": megatron, "skyrl": skyrl}.items():
        adapter = read_adapter(write_adapter(tmp_path / name, tensors, {"target_modules": []}))
        assert refusals(adapter) == {}, name
        assert_holds(adapter, GATE_UP, UP)
        assert_holds(adapter, DOWN, DN)


def test_an_a_that_all_experts_share_is_told_by_its_shape(tmp_path: Path) -> None:
    """One A of rank r beside a B with an axis for experts is every expert's."""
    key = f"{PREFIX}{EXPERTS}.lora_"
    tensors = {f"{key}A.weight": UP[0][1], f"{key}B.weight": np.stack([b for b, _ in UP])}
    config = {"target_parameters": TARGETS[1:], "target_modules": []}
    adapter = read_adapter(write_adapter(tmp_path, tensors, config))
    assert refusals(adapter) == {}
    assert_holds(adapter, GATE_UP, [(b, UP[0][1]) for b, _ in UP])


def test_experts_of_their_own_stay_modules(tmp_path: Path) -> None:
    """Adapters with a module for each expert are ordinary ones."""
    path = f"{EXPERTS}.2.gate_proj"
    adapter = read_adapter(
        write_adapter(tmp_path, pair(path, INNER, H), {"target_modules": [path]})
    )
    assert adapter.notices == []
    assert adapter.modules[path].kind == "linear"


UNCLEAR: dict[str, tuple[dict[str, Any], str, str]] = {
    "three names for two": (
        {"target_parameters": ["gate_up_proj", "down_proj", "up_proj"]}, "target-parameters",
        "names gate_up_proj, down_proj and up_proj"),
    "unknown names": (
        {"target_parameters": ["experts.x", "experts.y"]}, "target-parameters", "inner"),
    "no multiple": ({"r": 5}, "rank-mismatch", "no multiple"),
    "DoRA": ({"use_dora": True}, "parameter-options", "use_dora"),
    "transposed": ({"fan_in_fan_out": True}, "parameter-options", "fan_in_fan_out"),
    "biases": ({"lora_bias": True}, "parameter-options", "lora_bias"),
    "unknown layout": ({"lora_B_layout": "diagonal"}, "unknown-expert-layout", "grouped_by_expert"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_cannot_be_told_is_refused(name: str, tmp_path: Path) -> None:
    """Each reason for which a stack has no meaning is said in words, and alone."""
    change, code, words = UNCLEAR[name]
    found = refusals(read_adapter(stacks(tmp_path, UP, DN, **change)))
    assert words in found.pop(code)
    assert set(found) <= {"magnitude-absent"}


def test_more_experts_than_there_are_is_a_wrong_rank(tmp_path: Path) -> None:
    """A rank that would make a file of 200,000 experts is refused before work per expert."""
    tensors = {f"{PREFIX}{EXPERTS}.lora_A.weight": np.ones((200_000, 1), np.float16),
               f"{PREFIX}{EXPERTS}.lora_B.weight": np.ones((1, 200_000), np.float16)}  # fmt: skip
    config = {"r": 1, "target_parameters": ["down_proj"] * 2, "target_modules": []}
    adapter = read_adapter(write_adapter(tmp_path, tensors, config))
    assert "200000 experts" in refusals(adapter)["rank-mismatch"]


def test_a_wrapper_that_is_missing_is_refused(tmp_path: Path) -> None:
    """Without the outer wrapper nothing says what the inner one is."""
    tensors = packed(f"{EXPERTS}.base_layer", UP)
    config = {"target_parameters": TARGETS, "target_modules": []}
    adapter = read_adapter(write_adapter(tmp_path, tensors, config))
    assert "not in the file" in refusals(adapter)["target-parameters"]


def test_a_bias_of_a_wrapper_is_refused(tmp_path: Path) -> None:
    """PEFT gives a parameter no bias; one in the file is never dropped in silence."""
    tensors = packed(EXPERTS, DN) | {f"{PREFIX}{EXPERTS}.lora_B.bias": np.ones(H, np.float32)}
    config = {"target_parameters": ["down_proj"], "target_modules": []}
    assert "unknown-tensors" in refusals(read_adapter(write_adapter(tmp_path, tensors, config)))


def test_a_target_that_is_not_there_is_a_warning(tmp_path: Path) -> None:
    """A parameter that the config names and the file does not hold is said."""
    config = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    adapter = read_adapter(write_adapter(tmp_path, pair(Q, 6, 5), config))
    assert [n.code for n in adapter.notices] == ["target-absent"]


# --- Unsloth's older files ------------------------------------------------------------------------


def test_a_layout_is_taken_from_field_or_option(tmp_path: Path) -> None:
    """lora_B_layout is honoured; where it is missing, the user's word is."""
    old = stacks(tmp_path / "old", UP, DN, grouped=True)
    assert_holds(read_adapter(old, Told(expert_b_layout="grouped")), GATE_UP, UP)
    edit_config(old, lora_B_layout="grouped_by_expert")
    assert_holds(read_adapter(old), DOWN, DN)
    new = stacks(tmp_path / "new", UP, DN, lora_B_layout="rank_major")
    assert_holds(read_adapter(new, Told(expert_b_layout="rank-major")), GATE_UP, UP)
    with pytest.raises(AdapterError, match="lora_B_layout"):
        read_adapter(new, Told(expert_b_layout="grouped"))


@pytest.mark.parametrize("where", ["config", "card", "nowhere"])
def test_unsloth_without_a_layout_is_a_warning(where: str, tmp_path: Path) -> None:
    """Config or card that name Unsloth make the packing doubtful, unless somebody says it."""
    base = "unsloth/Qwen3-30B-A3B" if where == "config" else "org/base"
    source = stacks(tmp_path, UP, DN, base_model_name_or_path=base)
    text = "Trained 2x faster with [Unsloth](https://unsloth.ai)" if where == "card" else "A model."
    (source / "README.md").write_text(text)
    assert codes(loratool.inspect(source)) == ["expert-layout"] * (where != "nowhere")
    assert codes(loratool.inspect(source, expert_b_layout="rank-major")) == []
    edit_config(source, lora_B_layout="rank_major")
    assert codes(loratool.inspect(source)) == []
