"""llama.cpp's adapters: read as its runtime reads them, and written as its script writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.adapters import write_adapter
from helpers.dialects import CASES, DialectCase, added_to, apart, cases
from safetensors.numpy import load_file

import loratool
from loratool.adapters.dialects.gguf.names import ARCHITECTURES, named_here, named_there
from loratool.adapters.reading import read_adapter
from loratool.adapters.told import Told
from loratool.errors import AdapterError, LoraToolError
from loratool.models.checkpoint import open_checkpoint
from loratool.storage.ggufwriting import TypedValue, write_gguf
from loratool.storage.outgoing import Outgoing
from loratool.storage.values import read_float32, same_bytes

LLAMA, MIXTRAL = (CASES[name].base for name in ("gguf-f32", "gguf-experts"))
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
Arrays = dict[str, np.ndarray]
USUAL = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}


def gguf_file(path: Path, tensors: Arrays, alpha: Any = 8.0, **values: str) -> Path:
    """A GGUF file of these tensors; an alpha of None is not there."""
    said = {k: TypedValue("string", v) for k, v in (USUAL | values).items()}
    if alpha is not None:
        kind = "string" if isinstance(alpha, str) else "float32"
        said["adapter.lora.alpha"] = TypedValue(kind, alpha)
    write_gguf(path, said, {
        name: Outgoing("F32", value.shape, lambda value=value: [  # type: ignore[misc]
            np.ascontiguousarray(value, np.float32).reshape(-1).view(np.uint8)])
        for name, value in tensors.items()
    })  # fmt: skip
    return path


def factors(tensor: str = "blk.0.attn_v", out: int = 8, width: int = 16, rank: int = 2) -> Arrays:
    rng = np.random.default_rng(3)
    return {
        f"{tensor}.weight.lora_a": rng.standard_normal((rank, width)),
        f"{tensor}.weight.lora_b": rng.standard_normal((out, rank)),
    }


def codes(adapter: Path, base: Path | None = None) -> dict[str, str]:
    """What makes it impossible to merge, by code."""
    found = read_adapter(adapter, base=base and open_checkpoint(base))
    return {notice.code: notice.message for notice in found.notices if notice.refused}


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("gguf", merges=True), ids=lambda case: case.name)
def test_a_merge_adds_what_the_script_was_given(case: DialectCase, tmp_path: Path) -> None:
    """All kinds of numbers, rows in rotary pairs, experts, and the embedding's turned A."""
    loratool.merge(case.base, case.adapter, tmp_path / "out", dtype="float32")
    assert apart(added_to(case, tmp_path / "out"), case.expected()) < 1e-6
    assert loratool.verify(tmp_path / "out", case.base, case.adapter).verdict == "yes"


@pytest.mark.parametrize("case", cases("gguf", merges=False), ids=lambda case: case.name)
def test_what_acts_on_some_tokens_only_is_refused(case: DialectCase, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="activated LoRA"):
        loratool.merge(case.base, case.adapter, tmp_path / "out")


def test_inspect_says_what_it_is() -> None:
    report = loratool.inspect(CASES["gguf-f32"].adapter)
    assert (report.format, report.to_dict()["modules"][0]["scale"]) == ("gguf", 7 / 3)


def test_rows_in_pairs_need_a_base() -> None:
    """Without the number of heads nobody knows which rows are a pair; qwen2's lie as they are."""
    assert "--base" in codes(CASES["gguf-f32"].adapter)["row-order"]
    assert codes(CASES["gguf-f32"].adapter, LLAMA) == {}
    assert codes(CASES["gguf-qwen2"].adapter) == {}


def test_another_architecture_s_adapter_is_refused() -> None:
    """Names are the same in llama and qwen2, rows are not."""
    found = codes(CASES["gguf-qwen2"].adapter, LLAMA)
    assert "architecture qwen2" in found["gguf-architecture"]


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "a.gguf", factors(), **{"general.architecture": "mamba"})
    assert "'mamba'" in codes(path)["gguf-architecture"]


@pytest.mark.parametrize("alpha", [0.0, None])
def test_without_alpha_the_scale_is_1(alpha: float | None, tmp_path: Path) -> None:
    """As in llama.cpp's runtime; it is said, and the user has the last word."""
    path = gguf_file(tmp_path / "a.gguf", factors(), alpha)
    found = read_adapter(path)
    assert found.modules[V].scale == 1
    assert [n.code for n in found.notices] == ["alpha-absent"]
    assert read_adapter(path, Told(alpha=6)).modules[V].scale == 3


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), "8"])
def test_an_alpha_that_is_no_number_is_an_error(alpha: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"adapter\.lora\.alpha is"):
        read_adapter(gguf_file(tmp_path / "a.gguf", factors(), alpha))


def test_another_alpha_than_the_file_s_is_an_error(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "a.gguf", factors())
    with pytest.raises(AdapterError, match=r"blk\.0\.attn_v: --alpha 2 makes its scale 1"):
        read_adapter(path, Told(alpha=2))


def test_norms_are_passed_over_as_by_llama_cpp(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "a.gguf", factors() | {"blk.0.attn_norm.weight": np.ones(16)})
    found = read_adapter(path)
    assert [n.code for n in found.notices] == ["norms-passed-over"]
    assert not found.replaced


def test_damage_is_said_in_words(tmp_path: Path) -> None:
    broken = factors() | factors("blk.0.attn_output")
    del broken["blk.0.attn_output.weight.lora_b"]
    broken |= factors("blk.0.ffn_up", rank=3)
    broken["blk.0.ffn_up.weight.lora_b"] = np.ones((8, 2))
    broken |= factors("blk.0.no_such")
    broken |= {"blk.0.ffn_up_exps.weight.lora_a": np.ones((2, 2, 16)),
               "blk.0.ffn_up_exps.weight.lora_b": np.ones((3, 8, 2))}  # fmt: skip
    found = codes(gguf_file(tmp_path / "a.gguf", broken))
    assert found.keys() == {"half-a-pair", "pair-mismatch", "unknown-tensors"}
    assert "blk.0.attn_output: only lora_a" in found["half-a-pair"]
    assert "blk.0.no_such" in found["unknown-tensors"]


def test_rows_that_are_no_heads_are_refused(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "a.gguf", factors("blk.0.attn_q", out=10))
    assert "10 rows, 4 heads of 6" in codes(path, LLAMA)["row-order"]


@pytest.mark.parametrize(
    ("tensors", "values", "format_"),
    [
        ({"blk.0.attn_q.weight": np.ones((4, 4))}, {"general.type": "model"}, "gguf-model"),
        ({"direction.1": np.ones(8)}, {"adapter.type": "control_vector"}, "control-vector"),
        (factors(), {"adapter.type": "other"}, "gguf-other"),
    ],
)
def test_other_files_of_llama_cpp_are_named(
    tensors: Arrays, values: dict[str, str], format_: str, tmp_path: Path
) -> None:
    path = gguf_file(tmp_path / "a.gguf", tensors, **values)
    assert read_adapter(path).format == format_


def test_names_lead_both_ways() -> None:
    for architecture in ARCHITECTURES.values():
        for own in [*architecture.ends, *(f"blk.7.{name}" for name in architecture.modules)]:
            named = named_there(own, architecture)
            assert named is not None
            assert named_here(named.path.format(5), architecture) == own


# --- writing --------------------------------------------------------------------------------------


def peft(folder: Path, base: Path, *paths: str, ranks: tuple[int, ...] = (), **config: Any) -> Path:
    """A PEFT adapter on these modules of a base, of rank 4 or as `ranks` says."""
    rng = np.random.default_rng(5)
    weights = load_file(base / "model.safetensors")
    tensors = {}
    for path, rank in zip(paths, ranks or (4,) * len(paths), strict=True):
        out, width = weights[f"{path}.weight"].shape
        for side, shape in (("A", (rank, width)), ("B", (out, rank))):
            tensors[f"base_model.model.{path}.lora_{side}.weight"] = rng.standard_normal(
                shape
            ).astype(np.float32)
    ends = sorted({path.rpartition(".")[2] for path in paths})
    return write_adapter(
        folder, tensors, {"target_modules": ends, "task_type": "CAUSAL_LM"} | config
    )


def converted(adapter: Path, base: Path | None, output: Path, **options: Any) -> Path:
    loratool.convert(adapter, output, to="gguf", base=base, **options)
    return output / "adapter.gguf"


@pytest.mark.parametrize("name", ["gguf-f32", "gguf-embedding", "gguf-experts", "gguf-qwen2"])
def test_the_script_s_own_files_come_out_again(name: str, tmp_path: Path) -> None:
    """From GGUF to PEFT and back: the bytes of all tensors are those that the script wrote."""
    case = CASES[name]
    loratool.convert(case.adapter, tmp_path / "peft", to="peft", base=case.base)
    path = converted(tmp_path / "peft", case.base, tmp_path / "gguf")
    ours, theirs = read_adapter(path), read_adapter(case.adapter)
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(same_bytes(ours.tensors[key], info) for key, info in theirs.tensors.items())
    for key, value in theirs.values.items():
        if key.startswith(("adapter.", "general.arch", "general.type")):
            assert ours.values[key] == value


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({"use_rslora": True, "lora_alpha": 8}, (4.0, 4.0)),
        ({"lora_alpha": 8, "alpha_pattern": {Q: 32}}, (8.0, 2.0)),
    ],
)
def test_what_the_script_loses_of_scales_is_in_b(
    config: dict[str, Any], scales: tuple[float, float], tmp_path: Path
) -> None:
    """rsLoRA and alpha_pattern: alpha/rank of the file is not the scale, and B has the rest."""
    adapter = peft(tmp_path / "peft", LLAMA, Q, V, **config)
    report = loratool.convert(adapter, tmp_path / "out", to="gguf", base=LLAMA)
    assert {fate.outcome for fate in report.fates} == {"exact"}
    found = read_adapter(tmp_path / "out" / "adapter.gguf", base=open_checkpoint(LLAMA))
    given = load_file(adapter / "adapter_model.safetensors")
    for path, scale in zip((Q, V), scales, strict=True):
        module = found.modules[path]
        product = module.scale * read_float32(module.parts["B"])
        assert np.array_equal(product, scale * given[f"base_model.model.{path}.lora_B.weight"])


def test_modules_have_ranks_of_their_own(tmp_path: Path) -> None:
    """The runtime divides alpha by the rank of each pair."""
    adapter = peft(tmp_path / "peft", LLAMA, Q, V, ranks=(4, 2), rank_pattern={V: 2})
    found = read_adapter(converted(adapter, LLAMA, tmp_path / "out"))
    assert [found.modules[path].rank for path in (Q, V)] == [4, 2]
    assert [found.modules[path].scale for path in (Q, V)] == [2.0, 4.0]


def test_a_scale_of_zero_is_not_taken_for_one(tmp_path: Path) -> None:
    """llama.cpp takes an alpha of 0 for none, and so for a scale of 1."""
    adapter = peft(tmp_path / "peft", LLAMA, V, lora_alpha=0)
    found = read_adapter(converted(adapter, LLAMA, tmp_path / "out")).modules[V]
    assert found.scale != 0
    assert not read_float32(found.parts["B"]).any()


def test_experts_without_factors_are_zeros(tmp_path: Path) -> None:
    """llama.cpp has one tensor for all experts of a layer."""
    path = "model.layers.0.block_sparse_moe.experts.1.w2"
    adapter = peft(tmp_path / "peft", MIXTRAL, path)
    found = read_adapter(converted(adapter, MIXTRAL, tmp_path / "out"))
    assert found.tensors["blk.0.ffn_down_exps.weight.lora_a"].shape[0] == 3
    parts = {name: module for name, module in found.modules.items() if module.path != path}
    assert len(parts) == 2
    assert not any(read_float32(m.parts["B"]).any() for m in parts.values())


def test_a_dtype_is_one_of_llama_cpp_s(tmp_path: Path) -> None:
    adapter = peft(tmp_path / "peft", LLAMA, V)
    report = loratool.convert(adapter, tmp_path / "out", to="gguf", base=LLAMA, dtype="float16")
    assert report.fates[0].outcome == "rounded"
    found = read_adapter(tmp_path / "out" / "adapter.gguf")
    assert {info.dtype for info in found.tensors.values()} == {"F16"}


def test_what_llama_cpp_has_no_place_for_is_refused(tmp_path: Path) -> None:
    """All of it in one error, and nothing is written."""
    plain = peft(tmp_path / "peft", LLAMA, V)
    state = load_file(plain / "adapter_model.safetensors")
    key = f"base_model.model.{V}"
    rows = state[f"{key}.lora_B.weight"].shape[0]
    for more, config, why in (
        ({f"{key}.lora_magnitude_vector": np.ones(rows, np.float32)}, {"use_dora": True},
         "magnitudes"),
        ({f"{key}.lora_B.bias": np.ones(rows, np.float32)}, {"lora_bias": True}, "biases"),
        ({"base_model.model.model.norm.weight": np.ones(16, np.float32)}, {}, "factors only"),
    ):  # fmt: skip
        adapter = write_adapter(tmp_path / why, state | more, config)
        with pytest.raises(AdapterError, match=why):
            converted(adapter, LLAMA, tmp_path / "out")
    for base, why in ((None, "say --base"), (other_base(tmp_path / "b", "mamba"), "mamba")):
        with pytest.raises(AdapterError, match=why):
            converted(plain, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def other_base(folder: Path, kind: str = "llama", **config: Any) -> Path:
    """The base of the cases with another config.json."""
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(LLAMA / "model.safetensors")
    said = json.loads((LLAMA / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"model_type": kind} | config))
    return folder


def test_heads_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    adapter = peft(tmp_path / "peft", LLAMA, Q)
    base = other_base(tmp_path / "base", num_attention_heads=3, num_key_value_heads=3)
    with pytest.raises(LoraToolError, match="rows of the heads"):
        converted(adapter, base, tmp_path / "out")


def test_a_head_that_is_the_embedding_is_refused(tmp_path: Path) -> None:
    """llama.cpp has one tensor for both and applies its pair to both, in one orientation."""
    adapter = peft(tmp_path / "peft", LLAMA, "lm_head")
    base = other_base(tmp_path / "base", tie_word_embeddings=True)
    with pytest.raises(AdapterError, match="one matrix"):
        converted(adapter, base, tmp_path / "out")
