"""Layers of PEFT's other types that no fixture has: convolutions, and butterflies."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import (
    Holder,
    close,
    edit_config,
    read,
    tiny_llama,
    token_ids,
    train,
    train_on_disk,
    write_base,
    write_json,
)
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    FourierFTConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    OFTConfig,
    RandLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    WaveFTConfig,
)
from peft.tuners.boft import layer as boft_layer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import loratool
from loratool.errors import MatchError

CONVOLUTIONS: dict[str, Any] = {
    "loha-flat": LoHaConfig(r=2, alpha=3),
    "loha-tucker": LoHaConfig(r=2, alpha=3, use_effective_conv2d=True),
    "loha-dense": LoHaConfig(r=6, alpha=3, use_effective_conv2d=True),
    "lokr-flat": LoKrConfig(r=1, alpha=3),
    "lokr-tucker": LoKrConfig(r=1, alpha=3, use_effective_conv2d=True),
    "lokr-full": LoKrConfig(r=8, alpha=3),
    "boft": BOFTConfig(boft_block_size=4),
    "hra": HRAConfig(r=2),
    "ia3": IA3Config(feedforward_modules=[]),
    "ia3-inputs": IA3Config(feedforward_modules=["l"]),
    "ia3-pattern": IA3Config(feedforward_modules="l|k"),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_are_merged_as_peft_does(name: str, tmp_path: Path) -> None:
    """Kernels are flattened for all of these types, whatever lies in the file."""
    config = CONVOLUTIONS[name]
    config.target_modules = {"l"}
    config.init_weights = name.startswith("ia3")
    torch.manual_seed(0)
    trained = train(tmp_path, Holder(l=nn.Conv2d(8, 12, 3)), config)
    found, right = trained.merge(), trained.peft_merge()
    for tensor in right:
        assert close(found[tensor], right[tensor], 2e-6), tensor
    assert not torch.equal(found["l.weight"], trained.base_state()["l.weight"])
    report = loratool.verify(tmp_path / "merged", trained.base, trained.adapter)
    assert report.verdict == "yes"


def test_oft_of_a_kernel_has_no_merged_form(tmp_path: Path) -> None:
    """PEFT's forward pass adds up overlapping patches there; its own merge is another model."""
    config = OFTConfig(target_modules=["l"], oft_block_size=4)
    trained = train(tmp_path, Holder(l=nn.Conv2d(4, 6, 3)), config)
    with pytest.raises(MatchError, match="overlapping patches"):
        trained.merge()


def test_oft_of_a_pointwise_convolution_is_merged(tmp_path: Path) -> None:
    config = OFTConfig(target_modules=["l"], oft_block_size=4, init_weights=False)
    trained = train(tmp_path, Holder(l=nn.Conv2d(8, 6, 1)), config)
    found, right = trained.merge(), trained.peft_merge()
    assert close(found["l.weight"], right["l.weight"], 2e-6)


@pytest.mark.parametrize(("factor", "size"), [(2, 4), (3, 2)])
def test_a_butterfly_of_several_stages_is_pefts(
    factor: int, size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What PEFT computes with its CUDA extension, which here only has to make blocks diagonal."""

    class BlockDiagonal:
        @staticmethod
        def apply(blocks: torch.Tensor) -> torch.Tensor:
            return torch.stack([torch.block_diag(*one) for one in blocks])

    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(boft_layer, "FastBlockDiag", BlockDiagonal)
    config = BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=factor)
    layer = boft_layer.Linear(nn.Linear(16, 10, bias=False), "a", config)
    with torch.no_grad():
        layer.boft_R["a"].normal_(std=0.3)
        layer.boft_s["a"].uniform_(0.5, 2)
        write_base(tmp_path / "base", Holder(l=layer.get_base_layer()))
        state = {f"base_model.model.l.{n}": getattr(layer, n)["a"] for n in ("boft_R", "boft_s")}
        (tmp_path / "adapter").mkdir()
        save_file(state, tmp_path / "adapter" / "adapter_model.safetensors")
        write_json(tmp_path / "adapter" / "adapter_config.json", {"peft_type": "BOFT"})
        loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="float32")
        layer.double().merge()
    found = read(tmp_path / "out")["l.weight"]
    assert close(found, layer.get_base_layer().weight.detach(), 1e-6)


GPT2 = {"model_type": "gpt2"}
STORED_IN_OUT: dict[str, Any] = {
    "adalora": AdaLoraConfig(init_r=4, target_r=2, total_step=10),
    "fourierft": FourierFTConfig(n_frequency=3, scaling=30.0),
    "fourierft-dense": FourierFTConfig(n_frequency=40, scaling=30.0),
    "hira": HiraConfig(r=3),
    "ia3": IA3Config(feedforward_modules=[]),
    "ia3-inputs": IA3Config(feedforward_modules=["c_fc"]),
    "randlora": RandLoraConfig(r=3, randlora_alpha=5, very_sparse=True, save_projection=False),
    "vblora": VBLoRAConfig(r=2, num_vectors=7, vector_length=4, topk=3),
    "vera": VeraConfig(r=3, save_projection=False, projection_prng_key=11),
    "waveft": WaveFTConfig(n_frequency=9, scaling=5.0),
}


@pytest.mark.parametrize("name", STORED_IN_OUT)
@pytest.mark.parametrize("shape", [(12, 20), (16, 16), (20, 12)], ids=str)
def test_weights_stored_in_out_are_changed_there(
    name: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    """GPT-2's Conv1D: the same change, in a weight that is stored the other way round."""
    config = copy.deepcopy(STORED_IN_OUT[name])
    config.target_modules, config.fan_in_fan_out = {"c_fc"}, True
    trained = train(tmp_path, Holder(c_fc=Conv1D(shape[1], shape[0])), config, base_config=GPT2)
    found, right = trained.merge(), trained.peft_merge()
    for tensor in right:
        assert close(found[tensor], right[tensor], 3e-6), tensor
    assert not torch.equal(found["c_fc.weight"], trained.base_state()["c_fc.weight"])
    report = loratool.verify(tmp_path / "merged", trained.base, trained.adapter)
    assert report.verdict == "yes"


@pytest.mark.parametrize("shape", [(7, 9), (8, 5), (5, 8)], ids=str)
@pytest.mark.parametrize("name", ["waveft", "randlora", "fourierft", "miss", "vera"])
def test_odd_sizes_are_filled_as_peft_fills_them(
    name: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    """What is padded, cut or repeated at an edge that blocks do not fit."""
    config = copy.deepcopy({**STORED_IN_OUT, "miss": MissConfig(r=3)}[name])
    config.target_modules = {"l"}
    config.fan_in_fan_out = False
    trained = train(tmp_path, Holder(l=nn.Linear(*shape)), config)
    found, right = trained.merge(), trained.peft_merge()
    assert close(found["l.weight"], right["l.weight"], 3e-6)


def test_bone_is_miss_by_another_name(tmp_path: Path) -> None:
    """Adapters of PEFT's releases that had Bone are read, with its block's old name."""
    trained = train(tmp_path, Holder(l=nn.Linear(10, 12)), MissConfig(r=4, target_modules=["l"]))
    path = trained.adapter / "adapter_model.safetensors"
    held = {name.replace("miss_", "bone_"): value for name, value in load_file(path).items()}
    save_file(held, path)
    edit_config(trained.adapter, peft_type="BONE", mini_r=None, miss_dropout=None)
    assert close(trained.merge()["l.weight"], trained.peft_merge()["l.weight"], 1e-6)


@pytest.mark.parametrize("config", [OFTConfig(oft_block_size=4), HiraConfig(r=2)], ids=str)
def test_a_tied_head_stays_what_it_was(config: Any, tmp_path: Path) -> None:
    """An embedding that is turned is no longer the head, which PEFT's forward pass leaves alone."""
    config.target_modules = {"embed_tokens"}
    config.init_weights = False
    model = tiny_llama(tie_word_embeddings=True)
    trained = train_on_disk(tmp_path, model, config)
    out = tmp_path / "out"
    loratool.merge(trained.base, trained.adapter, out, dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = token_ids()
    with torch.no_grad():
        found, right = merged(ids).logits, trained.model.eval()(ids).logits
    assert close(found, right, 1e-5)
