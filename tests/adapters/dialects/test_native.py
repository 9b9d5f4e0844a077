"""Adapters and bases in the names of Meta's and Mistral's own code, and row orders between them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.native import (
    hub_adapter,
    hub_base,
    hub_state,
    native_adapter,
    native_base,
    native_factors,
    native_logits,
    native_state,
)
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import loratool
from loratool.errors import AdapterError, BaseError, FileError, MatchError

SCALE = 0.75
TOKENS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    native_base(folder / "native")
    native_base(folder / "meta", torch_file=True)
    hub_base(folder / "hub")
    native_adapter(folder / "lora", SCALE)
    hub_adapter(folder / "peft", SCALE)
    return folder


def merged(base: Path, adapter: Path, output: Path, **options: object) -> dict[str, torch.Tensor]:
    loratool.merge(base, adapter, output, dtype="float32", **options)  # type: ignore[arg-type]
    (weights,) = output.glob("*.safetensors")
    return load_file(weights)


def assert_equal(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert found.keys() == right.keys()
    for name, value in right.items():
        assert torch.allclose(found[name], value, rtol=0, atol=2e-6), name


def test_the_oracles_agree(files: Path) -> None:
    """Meta's forward pass of the native weights is transformers' of the reordered ones."""
    theirs = LlamaForCausalLM.from_pretrained(files / "hub", dtype=torch.float64)
    with torch.no_grad():
        logits = theirs(TOKENS[None]).logits[0]
    assert torch.allclose(logits, native_logits(native_state(), TOKENS), atol=1e-5)


@pytest.mark.parametrize("adapter", ["lora", "peft"])
@pytest.mark.parametrize("base", ["native", "meta"])
def test_either_adapter_goes_into_a_native_base(
    files: Path, tmp_path: Path, base: str, adapter: str
) -> None:
    """Into native weights a native adapter goes as it is, PEFT's with its rows in pairs; what
    comes out is native again, params.json and tokenizer beside it."""
    output = tmp_path / "out"
    found = merged(files / base, files / adapter, output)
    assert_equal(found, native_factors(SCALE)[1])
    names = sorted(path.name for path in output.iterdir() if path.name != "loratool.json")
    assert names == ["consolidated.safetensors", "params.json", "tokenizer.model"]


@pytest.mark.parametrize("adapter", ["lora", "peft"])
def test_either_adapter_goes_into_the_hub_base(files: Path, tmp_path: Path, adapter: str) -> None:
    assert_equal(
        merged(files / "hub", files / adapter, tmp_path / "out"),
        hub_state(native_factors(SCALE)[1]),
    )


def test_merged_models_compute_the_same(files: Path, tmp_path: Path) -> None:
    """The forward pass of the native merge is that of the merge into transformers' weights."""
    native = merged(files / "native", files / "peft", tmp_path / "a")
    merged(files / "hub", files / "lora", tmp_path / "b")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float64)
    with torch.no_grad():
        logits = theirs(TOKENS[None]).logits[0]
    assert torch.allclose(logits, native_logits(native, TOKENS), atol=1e-4)
    before = native_logits(native_state(), TOKENS)
    assert (logits - before).abs().max() > 0.1


def test_it_verifies_and_comes_off_again(files: Path, tmp_path: Path) -> None:
    loratool.merge(files / "native", files / "peft", tmp_path / "out", reversible=True)
    assert loratool.verify(tmp_path / "out", files / "native", files / "peft").verdict == "yes"
    loratool.unmerge(tmp_path / "out", files / "peft", tmp_path / "back")
    back = load_file(tmp_path / "back" / "consolidated.safetensors")
    for name, value in native_state().items():
        assert torch.equal(back[name], value)
    assert (tmp_path / "back" / "params.json").read_bytes() == (
        files / "native" / "params.json"
    ).read_bytes()


def test_both_adapters_are_one(files: Path) -> None:
    """Compared by the names and rows of transformers, the two files hold the same adapter."""
    report = loratool.compare([files / "lora", files / "peft"])
    assert report.equal
    assert report.verdicts == ["same"]


def test_what_inspect_says(files: Path) -> None:
    report = loratool.inspect(files / "lora")
    assert report.format == "native"
    assert len(report.modules) == 14
    assert {m["scale"] for m in report.to_dict()["modules"]} == {SCALE}
    assert not [w for w in report.warnings if w.refused]


def alone(files: Path, folder: Path) -> Path:
    """The adapter's weights without params.json."""
    folder.mkdir()
    shutil.copy(files / "lora" / "lora.safetensors", folder)
    return folder


def test_without_params_scale_and_heads_are_asked_for(files: Path, tmp_path: Path) -> None:
    lora = alone(files, tmp_path / "lora")
    refused = {w.code for w in loratool.inspect(lora).warnings if w.refused}
    assert refused == {"no-alpha", "row-order"}
    with pytest.raises(AdapterError, match="--scale S"):
        loratool.merge(files / "hub", lora, tmp_path / "out")
    found = merged(files / "hub", lora, tmp_path / "out", told=loratool.Told(scale=SCALE))
    assert_equal(found, hub_state(native_factors(SCALE)[1]))


def test_a_contradiction_of_the_scale_is_an_error(files: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"--scale 2 .*params\.json of the adapter says 0\.75"):
        loratool.merge(
            files / "hub", files / "lora", tmp_path / "out", told=loratool.Told(scale=2.0)
        )


def test_the_heads_of_another_model_are_refused(files: Path, tmp_path: Path) -> None:
    """Rows would be taken for others, and nothing would show it."""
    base = native_base(tmp_path / "base", n_heads=2, n_kv_heads=1)
    with pytest.raises(BaseError, match="has 12 rows, and by the config it has 1 head of 6 rows"):
        loratool.merge(base, files / "peft", tmp_path / "out")
    lora = tmp_path / "lora"
    shutil.copytree(files / "lora", lora)
    params = json.loads((lora / "params.json").read_text())
    (lora / "params.json").write_text(json.dumps(params | {"n_heads": 2, "n_kv_heads": 1}))
    refused = {w.code: w.message for w in loratool.inspect(lora).warnings if w.refused}
    assert "24 rows, 2 heads of 6" in refused["row-order"]


def test_a_base_without_params_takes_what_needs_no_heads(files: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy(files / "native" / "consolidated.safetensors", base)
    with pytest.raises(MatchError, match="num_attention_heads"):
        loratool.merge(base, files / "peft", tmp_path / "out")
    report = loratool.merge(base, files / "peft", tmp_path / "out", allow_unmatched=True)
    assert report.modules == 10


def test_parts_of_tensor_parallel_models_are_refused_by_name(files: Path, tmp_path: Path) -> None:
    base = native_base(tmp_path / "base", torch_file=True)
    shutil.copy(base / "consolidated.00.pth", base / "consolidated.01.pth")
    for place in (base, base / "consolidated.00.pth", base / "consolidated.01.pth"):
        with pytest.raises(FileError, match=r"2 files .*piece of every weight"):
            loratool.merge(place, files / "peft", tmp_path / "out")


def test_transformers_weights_win_where_both_are(files: Path, tmp_path: Path) -> None:
    """Mistral's repositories hold the model twice; the one that transformers loads is merged, and
    nothing is said of the other."""
    base = tmp_path / "base"
    shutil.copytree(files / "hub", base)
    shutil.copy(files / "native" / "consolidated.safetensors", base)
    shutil.copy(files / "native" / "params.json", base)
    report = loratool.merge(base, files / "lora", tmp_path / "out")
    assert not [w for w in report.warnings if "consolidated" in w.message]
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "consolidated.safetensors").exists()


def test_half_a_pair_and_other_ranks_are_refused(files: Path, tmp_path: Path) -> None:
    lora = tmp_path / "lora"
    shutil.copytree(files / "lora", lora)
    factors = load_file(lora / "lora.safetensors")
    del factors["layers.0.attention.wo.lora_B.weight"]
    factors["layers.1.attention.wv.lora_A.weight"] = torch.ones(2, 24)
    factors["layers.1.attention.wv.lora_B.weight"] = torch.ones(12, 2)
    factors["layers.1.attention.odd.lora_A.weight"] = torch.ones(2, 24)
    factors["layers.1.attention.odd.lora_B.weight"] = torch.ones(12, 2)
    save_file(factors, lora / "lora.safetensors")
    refused = {w.code: w.message for w in loratool.inspect(lora).warnings if w.refused}
    assert refused.keys() == {"half-a-pair", "rank-mismatch", "unknown-tensors"}
    assert "layers.0.attention.wo: only lora_A" in refused["half-a-pair"]
    assert "params.json gives 3, lora_A has 2" in refused["rank-mismatch"]


@pytest.mark.parametrize("value", ["4", -1, 2.5, True])
def test_wrong_types_in_params_are_one_clear_error(
    files: Path, tmp_path: Path, value: object
) -> None:
    base = native_base(tmp_path / "base", n_heads=value)
    with pytest.raises(BaseError, match=r"params\.json: n_heads is"):
        loratool.merge(base, files / "peft", tmp_path / "out")


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    """Mistral's experts are Mixtral's, w1 being gate, w2 down and w3 up."""
    rng = np.random.default_rng(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    experts = "layers.0.feed_forward.experts"
    state = {"layers.0.attention.wq.weight": random(8, 8), "layers.0.feed_forward.gate.weight":
             random(2, 8)}  # fmt: skip
    factors = {}
    hub: dict[str, torch.Tensor] = {}
    for e in range(2):
        for w, shape in (("w1", (6, 8)), ("w2", (8, 6)), ("w3", (6, 8))):
            state[f"{experts}.{e}.{w}.weight"] = random(*shape)
            hub[f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight"] = state[
                f"{experts}.{e}.{w}.weight"
            ]
            factors[f"{experts}.{e}.{w}.lora_A.weight"] = random(2, shape[1])
            factors[f"{experts}.{e}.{w}.lora_B.weight"] = random(shape[0], 2)
    for folder in ("base", "hub", "lora"):
        (tmp_path / folder).mkdir()
    save_file(state, tmp_path / "base" / "consolidated.safetensors")
    params = {"dim": 8, "n_layers": 1, "n_heads": 2, "moe": {"num_experts": 2}}
    (tmp_path / "base" / "params.json").write_text(json.dumps(params))
    save_file(hub, tmp_path / "hub" / "model.safetensors")
    (tmp_path / "hub" / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    save_file(factors, tmp_path / "lora" / "lora.safetensors")
    told = loratool.Told(scale=SCALE)
    native = merged(tmp_path / "base", tmp_path / "lora", tmp_path / "a", told=told)
    theirs = merged(tmp_path / "hub", tmp_path / "lora", tmp_path / "b", told=told)
    for name, value in hub.items():
        own = name.replace("model.", "", 1).replace("block_sparse_moe", "feed_forward")
        path = own.removesuffix(".weight")
        delta = factors[f"{path}.lora_B.weight"] @ factors[f"{path}.lora_A.weight"]
        right = value + SCALE * delta
        assert torch.allclose(native[own], right, atol=1e-6)
        assert torch.allclose(theirs[name], right, atol=1e-6)
