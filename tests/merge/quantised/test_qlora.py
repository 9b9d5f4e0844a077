"""A QLoRA as people train it: bitsandbytes' 4 bit, PEFT's adapter, the trained model's loss."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from helpers.losses import held_out_loss
from helpers.places import FIXTURES
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

import loratool

pytestmark = pytest.mark.quantised


def in_float32(folder: Path) -> PreTrainedModel:
    """A stored model with its arithmetic in float32, loaded anew and in training mode: outside of
    it bitsandbytes packs weights anew on some processors."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return model.train()


def quantised(source: Path, folder: Path, kind: str, nested: bool) -> Path:
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested
    )
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", quantization_config=settings)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "nested"), [("nf4", True), ("fp4", False)])
def test_the_merged_model_is_the_trained_one(kind: str, nested: bool, tmp_path: Path) -> None:
    """Its held-out loss is the trained model's within 0.001; training changed it by 300 times as
    much."""
    base = quantised(FIXTURES / "base", tmp_path / "base", kind, nested)
    torch.manual_seed(3)
    tables = (FIXTURES / "tasks" / "tables.txt").read_bytes()
    text = tmp_path / "held_out.txt"
    text.write_bytes(tables[:4200])
    ids = torch.tensor(list(tables[4200:]))
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(in_float32(base), config)
    before = held_out_loss(model, text)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(12):
        starts = torch.randint(len(ids) - 129, (4, 1))
        windows = ids[starts + torch.arange(129)]
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
        optimizer.zero_grad()
        cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten()).backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    trained = held_out_loss(
        peft.PeftModel.from_pretrained(in_float32(base), tmp_path / "adapter").train(), text
    )
    assert trained < before - 0.3
    loratool.merge(base, tmp_path / "adapter", tmp_path / "merged", verify=True)
    assert abs(held_out_loss(in_float32(tmp_path / "merged"), text) - trained) < 1e-3


def test_conv1d_is_stored_transposed(tmp_path: Path) -> None:
    """GPT-2's layers, square ones too: the merged model's logits are those of the adapter on the
    quantised one."""
    torch.manual_seed(4)
    config = GPT2Config(
        vocab_size=64, n_embd=64, n_layer=2, n_head=2, n_positions=32, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "plain")
    base = quantised(tmp_path / "plain", tmp_path / "base", "nf4", True)
    adapted = peft.get_peft_model(in_float32(base), peft.LoraConfig(
        r=4, target_modules=["c_attn", "c_proj", "c_fc"], task_type="CAUSAL_LM"
    ))  # fmt: skip
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    loratool.merge(base, tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    ids = torch.randint(0, 64, (2, 16))
    merged = in_float32(tmp_path / "merged")
    for model in (adapted, merged):  # GPT-2 has dropout
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    with torch.no_grad():
        expected, found = adapted(ids).logits, merged(ids).logits
    assert (found - expected).norm() < 1e-3 * expected.norm()
