"""Layers of PEFT's other types that no fixture has: convolutions, and butterflies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import Holder, close, read, train, write_base, write_json
from peft import BOFTConfig, HRAConfig, IA3Config, LoHaConfig, LoKrConfig, OFTConfig
from peft.tuners.boft import layer as boft_layer
from safetensors.torch import save_file
from torch import nn

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
