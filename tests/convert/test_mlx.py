"""convert --to mlx: one rank and scale, stacks of experts, and what MLX has no place for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.adapters import PREFIX, Q, pair, write_adapter
from helpers.dialects import CASES, DIALECTS
from helpers.experts import expert_pairs, stacks
from safetensors.numpy import load_file, save_file

import loratool
from loratool.adapters.dialects.mlx.names import expert_path, mlx_name, mlx_stack, name_on_hub
from loratool.errors import AdapterError

LLAMA, QWEN = DIALECTS / "bases/llama", DIALECTS / "bases/qwen3-moe"
SHAPES = {k: v.shape for k, v in load_file(LLAMA / "model.safetensors").items()}
WEIGHTS = "adapters.safetensors"
K = Q.replace("q_proj", "k_proj")
EMBEDDING = "model.embed_tokens"


def on(*paths: str, ranks: tuple[int, ...] = (2, 2), **more: np.ndarray) -> dict[str, np.ndarray]:
    tensors = dict(more)
    for seed, (path, rank) in enumerate(zip(paths, ranks, strict=False)):
        tensors |= pair(path, *SHAPES[f"{path}.weight"], rank=rank, seed=seed)
    return tensors


def unlike(folder: Path) -> Path:
    """An adapter whose modules have other ranks and scales."""
    config = {"r": 2, "lora_alpha": 4, "rank_pattern": {K: 1}, "alpha_pattern": {K: 8}}
    return write_adapter(folder, on(Q, K, ranks=(2, 1)), config)


def stacked(folder: Path) -> Path:
    """An adapter of all experts of a layer of Qwen3's."""
    gate_up, down = expert_pairs(3, 40, 16, 2), expert_pairs(3, 16, 20, 2, seed=1)
    return stacks(folder, gate_up, down, r=2, lora_alpha=4)


def merged(base: Path, adapter: Path, out: Path) -> dict[str, np.ndarray]:
    loratool.merge(base, adapter, out, dtype="float32")
    return load_file(out / "model.safetensors")


def equal(base: Path, one: Path, other: Path, work: Path) -> None:
    """That both adapters merge to the same model, up to what float32 rounds."""
    a, b = (merged(base, adapter, work / n) for adapter, n in ((one, "one"), (other, "other")))
    assert a.keys() == b.keys()
    assert all(np.allclose(a[k], b[k], rtol=1e-6, atol=1e-6) for k in a)


@pytest.mark.parametrize(
    "name", ["mlx-lora", "mlx-bf16", "mlx-dora", "mlx-embedding", "mlx-mixtral", "mlx-qwen3-moe"]
)
def test_through_peft_and_back_every_byte_is_the_same(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    there = loratool.convert(case.adapter, tmp_path / "peft", to="peft", base=case.base)
    back = loratool.convert(tmp_path / "peft", tmp_path / "mlx", to="mlx", base=case.base)
    assert (there.error, back.error, set(back.counts)) == (0.0, 0.0, {"exact"})
    old, new = (_raw(folder / WEIGHTS) for folder in (case.adapter, tmp_path / "mlx"))
    assert old == new


def _raw(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    return {
        key: (one["dtype"], one["shape"], data[8 + size :][slice(*one["data_offsets"])])
        for key, one in header.items()
        if key != "__metadata__"
    }


def test_unlike_ranks_and_scales_become_one(tmp_path: Path) -> None:
    """Zeros fill ranks up, and powers of two between scales go into B: nothing is rounded."""
    source = unlike(tmp_path / "in")
    report = loratool.convert(source, tmp_path / "out", to="mlx")
    assert (report.error, {f.outcome for f in report.fates}) == (0.0, {"exact"})
    said = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert said["lora_parameters"] == {
        "rank": 2, "scale": 2.0, "dropout": 0.0, "keys": sorted([Q, K]),
    }  # fmt: skip
    assert (said["fine_tune_type"], said["num_layers"]) == ("lora", -1)
    b = load_file(tmp_path / "out" / WEIGHTS)[f"{K}.lora_b"]
    assert np.array_equal(b[0], 4 * load_file(source / "adapter_model.safetensors")[
        f"{PREFIX}{K}.lora_B.weight"
    ][:, 0])  # fmt: skip
    assert not b[1].any()
    equal(LLAMA, source, tmp_path / "out", tmp_path)


def test_a_scale_that_16_bits_would_round_is_written_in_32(tmp_path: Path) -> None:
    tensors = {k: v.astype(np.float16) for k, v in on(Q, K).items()}
    config = {"r": 2, "lora_alpha": 2, "alpha_pattern": {K: 6.2}}
    source = write_adapter(tmp_path / "in", tensors, config)
    report = loratool.convert(source, tmp_path / "out", to="mlx")
    assert report.error is not None
    assert report.error < 1e-7
    found = load_file(tmp_path / "out" / WEIGHTS)
    dtypes = {str(found[f"{path}.lora_b"].dtype) for path in (Q, K)}
    assert dtypes == {"float16", "float32"}


def test_stacks_of_peft_become_stacks_of_layers(tmp_path: Path) -> None:
    """B of gate and up is cut into rows, A is the same for both; the merged models are equal."""
    source = stacked(tmp_path / "in")
    report = loratool.convert(source, tmp_path / "out", to="mlx", base=QWEN)
    assert (report.error, {f.outcome for f in report.fates}) == (0.0, {"exact"})
    found = load_file(tmp_path / "out" / WEIGHTS)
    owner = "model.layers.0.mlp.switch_mlp"
    assert found.keys() == {
        f"{owner}.{leaf}_proj.lora_{side}" for leaf in ("gate", "up", "down") for side in "ab"
    }
    gate_up = expert_pairs(3, 40, 16, 2)
    assert np.array_equal(found[f"{owner}.up_proj.lora_b"][1], gate_up[1][0][20:])
    equal(QWEN, source, tmp_path / "out", tmp_path)
    with pytest.raises(AdapterError, match="--base"):
        loratool.convert(source, tmp_path / "no", to="mlx")


def test_experts_of_a_layer_must_all_be_there(tmp_path: Path) -> None:
    paths = [f"model.layers.0.mlp.experts.{i}.up_proj" for i in (0, 2)]
    tensors = {k: v for s, p in enumerate(paths) for k, v in pair(p, 20, 16, 2, seed=s).items()}
    source = write_adapter(tmp_path / "in", tensors, {"r": 2})
    with pytest.raises(AdapterError, match="expert 1 has no factors"):
        loratool.convert(source, tmp_path / "out", to="mlx", base=QWEN)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "config", "why"),
    [
        ({f"{PREFIX}{Q}.lora_B.bias": np.ones(16, np.float32)}, {"lora_bias": True}, "no biases"),
        ({f"{PREFIX}lm_head.weight": np.ones((48, 16), np.float32)},
         {"modules_to_save": ["lm_head"]}, "whole tensors or factors"),
        ({f"{PREFIX}{EMBEDDING}.trainable_tokens_delta": np.ones((2, 16), np.float32)},
         {"trainable_token_indices": {"embed_tokens": [1, 3]}}, "single tokens"),
        ({f"{PREFIX}conv.lora_A.weight": np.ones((2, 3, 3), np.float32),
          f"{PREFIX}conv.lora_B.weight": np.ones((4, 2, 1), np.float32)}, {}, "layers"),
    ],
)  # fmt: skip
def test_what_mlx_has_no_place_for_is_refused(
    more: dict[str, np.ndarray], config: dict[str, Any], why: str, tmp_path: Path
) -> None:
    source = write_adapter(tmp_path / "in", on(Q) | more, {"r": 2} | config)
    with pytest.raises(AdapterError, match=why):
        loratool.convert(source, tmp_path / "out", to="mlx")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ties", [False, True])
def test_an_embedding_alone_has_no_place_where_it_is_the_head(ties: bool, tmp_path: Path) -> None:
    """PEFT changes what is looked up alone; MLX would change the head as well."""
    base = tmp_path / "base"
    base.mkdir()
    tensors = load_file(LLAMA / "model.safetensors")
    vocabulary, dim = tensors[f"{EMBEDDING}.weight"].shape
    if ties:
        del tensors["lm_head.weight"]
    save_file(tensors, base / "model.safetensors")
    config = json.loads((LLAMA / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": ties}))
    a, b = np.ones((2, vocabulary), np.float32), np.ones((dim, 2), np.float32)
    key = f"{PREFIX}{EMBEDDING}.lora_embedding_"
    alone = write_adapter(tmp_path / "alone", {f"{key}A": a, f"{key}B": b}, {"r": 2})
    if not ties:
        loratool.convert(alone, tmp_path / "out", to="mlx", base=base)
        equal(base, alone, tmp_path / "out", tmp_path)
        return
    with pytest.raises(AdapterError, match="changes one of them"):
        loratool.convert(alone, tmp_path / "out", to="mlx", base=base)
    # Tied in training, PEFT writes both, and MLX needs one.
    head = {f"{PREFIX}lm_head.lora_A.weight": b.T, f"{PREFIX}lm_head.lora_B.weight": a.T}
    both = write_adapter(
        tmp_path / "both", {f"{key}A": a, f"{key}B": b} | head,
        {"r": 2, "ensure_weight_tying": True},
    )  # fmt: skip
    report = loratool.convert(both, tmp_path / "out", to="mlx", base=base)
    assert report.error == 0.0
    assert not any("lm_head" in key for key in load_file(tmp_path / "out" / WEIGHTS))
    equal(base, both, tmp_path / "out", tmp_path)


@pytest.mark.parametrize(
    ("path", "model_type"),
    [
        ("model.layers.0.mlp.experts.1.up_proj", ""),
        ("model.layers.0.block_sparse_moe.experts.1.w3", ""),
        ("model.layers.0.block_sparse_moe.experts.1.w2", "kimi_linear"),
        ("model.layers.0.feed_forward.experts.1.w1", "lfm2_moe"),
        ("backbone.layers.0.mixer.experts.1.up_proj", "nemotron_h"),
        ("model.layers.0.mlp.experts.1.gate_proj", "afmoe"),
        ("model.layers.0.experts.1.gate_proj", "gemma4"),
    ],
)
def test_names_of_experts_go_both_ways(path: str, model_type: str) -> None:
    found = mlx_stack(path, model_type)
    assert found is not None
    assert expert_path(*found, model_type) == path


@pytest.mark.parametrize("path", ["gpt_neox.layers.0.attention.dense", "embed_out",
                                  "gpt_neox.embed_in"])  # fmt: skip
def test_names_of_pythia_go_both_ways(path: str) -> None:
    assert name_on_hub(mlx_name(path, "gpt_neox"), "gpt_neox") == path


@pytest.mark.dialects
@pytest.mark.parametrize(
    ("made", "base"),
    [
        (unlike, "llama"), (stacked, "qwen3-moe"), ("mlx-dora", "llama"),
        ("mlx-embedding", "llama"), ("mlx-mixtral", "mixtral"),
    ],
)  # fmt: skip
def test_mlx_lm_computes_what_the_merged_model_does(
    made: str | Callable[[Path], Path], base: str, tmp_path: Path
) -> None:
    """Its own `load_adapters` takes the folder; logits are those of the model that merge writes."""
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model = DIALECTS / "bases" / base
    source = tmp_path / "peft"
    if isinstance(made, str):
        loratool.convert(CASES[made].adapter, source, to="peft", base=model)
    else:
        made(source)
    loratool.convert(source, tmp_path / "mlx", to="mlx", base=model)
    loratool.merge(model, source, tmp_path / "merged", dtype="float32")
    tokens = mx.array([[1, 5, 7, 3, 9, 2]])
    with mx.stream(mx.cpu):
        plain, merged = (
            np.array(load_model(m)[0](tokens)) for m in (model, tmp_path / "merged")
        )  # fmt: skip
        adapted = np.array(load_adapters(load_model(model)[0], str(tmp_path / "mlx"))(tokens))
    change = np.linalg.norm(merged - plain)
    assert change > 1e-2
    assert np.linalg.norm(adapted - merged) < 1e-5 * change


def test_experts_one_by_one_are_said(tmp_path: Path) -> None:
    """PEFT on transformers 5 would not find them, and say little of it."""
    report = loratool.convert(CASES["mlx-mixtral"].adapter, tmp_path / "out", to="peft")
    assert "experts-apart" in {notice.code for notice in report.warnings}
    plain = loratool.convert(CASES["mlx-lora"].adapter, tmp_path / "plain", to="peft")
    assert "experts-apart" not in {notice.code for notice in plain.warnings}
