"""Adapters on copied layers (layer_replication), against PEFT's model in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import run_cli
from helpers.models import edit_config, read, read_json, tiny_llama, token_ids, write_json
from helpers.outcomes import refused
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    PreTrainedModel,
)

import loratool
from loratool.errors import AdapterError, MatchError, RestoreError, UsageError
from loratool.models.config import settings_by_layer, updated_config

RANGES = [[0, 3], [1, 4]]


def four_llama() -> PreTrainedModel:
    return tiny_llama(num_hidden_layers=4)


def four_bert() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24}
    return BertModel(BertConfig(num_hidden_layers=4, num_attention_heads=4, **sizes)).eval()


def four_gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2Model(GPT2Config(vocab_size=48, n_embd=16, n_layer=4, n_head=2)).eval()


def trained(folder: Path, make: Callable[[], PreTrainedModel], **options: Any) -> PeftModel:
    """A base, an adapter on its layers 0, 1, 2, 1, 2, 3, and the model in memory."""
    model = make()
    model.save_pretrained(folder / "base", max_shard_size=options.pop("shards", "1GB"))
    settings = {"target_modules": ["q_proj", "down_proj"], "r": 4, "init_lora_weights": False}
    config = LoraConfig(layer_replication=RANGES, **{**settings, **options})
    torch.manual_seed(1)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(folder / "adapter")
    return adapted.eval()


KINDS: dict[str, tuple[Callable[[], PreTrainedModel], Any, dict[str, Any]]] = {
    "layers": (four_llama, AutoModelForCausalLM, {}),
    "shards": (four_llama, AutoModelForCausalLM, {"shards": "8KB"}),
    "encoder": (four_bert, AutoModel, {"target_modules": ["query", "output.dense"]}),
    "h": (four_gpt2, AutoModel, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_merged_model_computes_what_peft_computes(kind: str, tmp_path: Path) -> None:
    """The copies are written, config.json counts them, and outputs are those of base + adapter."""
    make, auto, options = KINDS[kind]
    model = trained(tmp_path, make, **options)
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    report = loratool.merge(base, adapter, out, dtype="float32", replicate_layers=True, verify=True)
    assert report.config_changes["layers"] == [0, 1, 2, 1, 2, 3]
    merged = auto.from_pretrained(out).eval()
    assert merged.config.num_hidden_layers == 6
    with torch.no_grad():
        expected, found = model(token_ids())[0], merged(token_ids())[0]
    assert float((found - expected).abs().max()) <= 2e-6 * float(expected.abs().max())
    sizes = [max(p.stat().st_size for p in f.glob("*.safetensors")) for f in (base, out)]
    assert sizes[1] <= sizes[0] + 1000  # a header counts other names
    assert loratool.verify(out, base, adapter, replicate_layers=True).verdict == "yes"
    record = read_json(out / "loratool.json")
    assert record["options"]["replicate_layers"] is True
    assert record["base"]["tensors"] == len(read(base))


def test_layers_are_copied_on_request_only(tmp_path: Path) -> None:
    """Without --replicate-layers the error names it; without copied layers the option is wrong."""
    trained(tmp_path, four_llama)
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    refused(AdapterError, base, adapter, out, "--replicate-layers")
    done = run_cli("merge", base, adapter, "-o", out, "--replicate-layers", "--dtype", "base")
    assert done.exit_code == 0
    edit_config(adapter, layer_replication=None)
    refused(UsageError, base, adapter, tmp_path / "o", "layer_replication", replicate_layers=True)


def test_copies_are_not_taken_back(tmp_path: Path) -> None:
    """Neither an undo file nor subtraction gives the base back: both are refused."""
    trained(tmp_path, four_llama)
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    both = {"replicate_layers": True, "reversible": True}
    refused(UsageError, base, adapter, out, "--reversible", **both)
    loratool.merge(base, adapter, out, replicate_layers=True)
    with pytest.raises(RestoreError, match="copied layers"):
        loratool.unmerge(out, adapter, tmp_path / "back")


def test_adapters_that_count_other_layers_are_refused(tmp_path: Path) -> None:
    """One number must mean one layer for all adapters."""
    trained(tmp_path / "a", four_llama)
    trained(tmp_path / "b", four_llama)
    edit_config(tmp_path / "b" / "adapter", layer_replication=None)
    adapters = [tmp_path / name / "adapter" for name in "ab"]
    with pytest.raises(MatchError, match="two layers"):
        loratool.merge(tmp_path / "a" / "base", adapters, tmp_path / "o", replicate_layers=True)


@pytest.mark.parametrize("ranges", [[[0, 5]], [[0, 4]] * 2501])
def test_ranges_beyond_the_base_are_refused(ranges: list[list[int]], tmp_path: Path) -> None:
    """A range ends within the base, and there is an end to how many layers are made."""
    trained(tmp_path, four_llama)
    edit_config(tmp_path / "adapter", layer_replication=ranges)
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    refused(MatchError, base, adapter, out, "has 4 layers", replicate_layers=True)


@pytest.mark.parametrize("ranges", ["0-4", [[0]], [[2, 1]], [[0, True]], [[-1, 2]], [0, 4]])
def test_ranges_of_another_type_are_refused(ranges: Any, tmp_path: Path) -> None:
    """What is no list of ranges [start, end) is not read as one."""
    trained(tmp_path, four_llama)
    edit_config(tmp_path / "adapter", layer_replication=ranges)
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    refused(AdapterError, base, adapter, out, "layer_replication", replicate_layers=True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": 5}, "says 5"),
        ({"first_k_dense_replace": 1}, "first_k_dense_replace"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types"),
        ({"full_attention_interval": 4}, "full_attention_interval"),
        ({"mlp_only_layers": [1]}, "mlp_only_layers"),
    ],
)
def test_layers_that_differ_by_their_number_are_refused(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """A copy at another number would be another layer, if config.json says so by a rule."""
    trained(tmp_path, four_llama)
    path = tmp_path / "base" / "config.json"
    write_json(path, {**read_json(path), **changes})
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    refused(MatchError, base, adapter, out, reason, replicate_layers=True)


def test_lists_with_an_entry_per_layer_are_copied_too() -> None:
    """Types of layers go with the layers, and rules that they spell out are no obstacle."""
    types = ["sliding_attention", "full_attention", "sliding_attention", "linear_attention"]
    config = {
        "num_hidden_layers": 4, "layer_types": types, "full_attention_interval": 2,
        "layer_norm_eps": 1e-5, "layerdrop": 0.1, "max_window_layers": 3, "decoder_sparse_step": 1,
    }  # fmt: skip
    assert settings_by_layer(config) == []
    changed = updated_config(config, "base", {"layers": [0, 1, 0, 3, 3]})
    assert changed["num_hidden_layers"] == 5
    assert changed["layer_types"] == [types[n] for n in (0, 1, 0, 3, 3)]


def test_layers_of_several_kinds_need_a_list_of_them(tmp_path: Path) -> None:
    """Where a layer has other tensors, a copy of it at another number would not load."""
    trained(tmp_path, four_llama)
    state = read(tmp_path / "base")
    state["model.layers.2.mlp.gate.weight"] = torch.zeros(4, 16)
    save_file(state, tmp_path / "base" / "model.safetensors")
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    refused(MatchError, base, adapter, out, "not alike", replicate_layers=True)


def test_layers_that_peft_does_not_find_are_refused(tmp_path: Path) -> None:
    """A model whose layers have another name has no copies in PEFT either."""
    trained(tmp_path, four_llama)
    old = read(tmp_path / "base")
    state = {name.replace("layers", "blocks"): value for name, value in old.items()}
    save_file(state, tmp_path / "base" / "model.safetensors")
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    refused(MatchError, base, adapter, out, "as PEFT finds them", replicate_layers=True)
