"""Files that are no LoRA adapter are called by their name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.adapters import write_adapter
from helpers.inspecting import LINEAR
from helpers.places import FIXTURES
from safetensors.numpy import save_file

import loratool
from loratool.adapters.recognise import way_out
from loratool.errors import AdapterError, FileError

OTHERS: dict[str, tuple[list[str], str]] = {
    "kohya": (["lora_unet_down_0.lora_down.weight", "lora_unet_down_0.lora_up.weight",
               "lora_unet_down_0.alpha"], "kohya"),
    "kohya text encoder": (["lora_te1_text_model_q.lora_down.weight"], "kohya"),
    "diffusers": (["unet.down.attn1.to_q.lora_A.weight", "unet.down.attn1.to_q.lora_B.weight"],
                  "diffusers"),
    "old diffusers": (["unet.mid.attn1.processor.to_q_lora.down.weight"], "diffusers"),
    "LLLite": (["lllite_unet_input_blocks_4_1.depth1.down.0.weight"], "lllite"),
    "T-LoRA": (["lora_unet_q.p_layer.weight", "lora_unet_q.q_layer.weight",
                "lora_unet_q.lambda_layer"], "t-lora"),
    "XLabs": (["double_blocks.0.processor.qkv_lora1.down.weight"], "xlabs"),
    "ComfyUI": (["diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
                 "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight"], "comfy"),
    "prompt tuning": (["prompt_embeddings"], "prompt-tuning"),
    "ia3": (["base_model.model.h.0.attn.ia3_l"], "ia3"),
    "AdaLoRA": (["base_model.model.q.lora_A", "base_model.model.q.lora_E"], "adalora"),
    "LoKr": (["lora.q.lokr_w1", "lora.q.lokr_w2"], "lycoris"),
    "optimizer": (["q.lora_A.default.weight.exp_avg", "q.lora_A.default.weight.step"],
                  "optimizer-state"),
    "base": (["model.embed_tokens.weight", "model.norm.weight"], "base-checkpoint"),
    "LLaMA-Adapter": (["base_model.model.model.layers.2.self_attn.adaption_gate"],
                      "llama-adapter"),
    "LLaMA-Adapter of its authors": (["adapter_query.weight", "layers.2.attention.gate"],
                                     "llama-adapter"),
    "IP-Adapter": (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "ip-adapter"),
    "Control-LoRA": (["input_blocks.1.0.in_layers.2.up", "lora_controlnet"], "control-lora"),
    "ControlNet": (["control_model.input_blocks.0.0.weight"], "controlnet"),
    "T2I-Adapter": (["adapter.body.0.block1.weight"], "t2i-adapter"),
    "Custom Diffusion": (["unet.a.to_k_custom_diffusion.weight"], "custom-diffusion"),
    "Nunchaku": (["blocks.0.q.qweight", "blocks.0.q.proj_down"], "nunchaku"),
    "hypernetwork": (["768.0.linear1.weight"], "hypernetwork"),
    "ComfyUI's differences": (["diffusion_model.blocks.0.q.diff"], "comfy"),
    "diffusion model": (["model.diffusion_model.input_blocks.0.0.weight"], "diffusion-model"),
    "bottlenecks": (["bert.layer.0.output.adapters.x.adapter_down.0.weight",
                     "bert.layer.0.output.adapters.x.adapter_up.weight"], "bottleneck-adapter"),
    "ReFT": (["layer.15.unit.0.rotate_layer.weight", "layer.15.learned_source.weight"], "reft"),
    "textual inversion": (["emb_params"], "textual-inversion"),
    "textual inversion of diffusers": (["<cat>"], "textual-inversion"),
    "P-tuning": (["prompt_encoder.embedding.weight"], "prompt-tuning"),
    "GGUF model": (["blk.0.attn_q.weight", "token_embd.weight"], "gguf-model"),
    "control vector": (["direction.1", "direction.2"], "control-vector"),
    "unknown": (["alpha", "beta", "gamma"], "unknown"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_called_by_their_name(name: str, tmp_path: Path) -> None:
    """A file that is no LoRA is named as what it is, merge refuses it by that name, and both say
    what to do with it."""
    keys, code = OTHERS[name]
    path = tmp_path / "x.safetensors"
    save_file({key: np.ones((2, 2), np.float32) for key in keys}, path)
    report = loratool.inspect(path)
    assert report.format == code
    assert report.modules == []
    with pytest.raises(loratool.LoraToolError) as error:
        loratool.merge(FIXTURES / "base", path, tmp_path / "out")
    assert report.description in error.value.message
    assert [n.message for n in report.warnings if n.code == "not-an-adapter"] == [error.value.hint]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("code", "words"),
    [("kohya", "sd-scripts"), ("prompt-tuning", "PeftModel"), ("base-checkpoint", "extract"),
     ("gguf-model", "Unsloth"), ("optimizer-state", "adapter_model"), ("unknown", "dialects.md")],
)  # fmt: skip
def test_each_kind_has_a_way_out(code: str, words: str) -> None:
    """What is no adapter leads on: to its program, to the adapter beside it, to extract."""
    assert words in way_out(code, "lora.pt")


def test_a_hint_to_look_at_the_names_can_be_pasted(tmp_path: Path) -> None:
    """Of a file that nobody knows the hint has the command with its path."""
    file = tmp_path / "my file.safetensors"
    save_file({"alpha": np.ones(2), "beta": np.ones(2)}, file)
    with pytest.raises(AdapterError) as caught:
        loratool.merge(FIXTURES / "base", file, tmp_path / "out")
    assert f"`loratool inspect '{file}' --tensors`" in caught.value.hint


@pytest.mark.parametrize("word", ["*", "cat"])
def test_a_textual_inversion_of_a1111_is_named(word: str, tmp_path: Path) -> None:
    """Its .pt holds tables of the words and of their embeddings."""
    torch.save(
        {"string_to_token": {word: torch.tensor(265)}, "step": 500, "name": "cat",
         "string_to_param": {word: torch.ones(2, 768)}},
        tmp_path / "ti.pt",
    )  # fmt: skip
    assert loratool.inspect(tmp_path / "ti.pt").format == "textual-inversion"


@pytest.mark.parametrize(
    ("peft_type", "words"),
    [("IA3", "(IA)³"), ("ADALORA", "AdaLoRA"), ("PROMPT_TUNING", "prompt tuning"),
     ("PREFIX_TUNING", "prefix tuning"), ("LOHA", "LoHa"), ("NEWTYPE", "NEWTYPE")],
)  # fmt: skip
def test_other_peft_types_are_named(peft_type: str, words: str, tmp_path: Path) -> None:
    """The config's peft_type decides, whatever the tensors are called."""
    folder = write_adapter(tmp_path / "a", LINEAR, {"peft_type": peft_type})
    report = loratool.inspect(folder)
    assert words in report.description
    assert report.peft_type == peft_type


def test_find_the_weights_of_a_directory(tmp_path: Path, adapter: Path) -> None:
    """A directory without adapter_model.* is an error that names what is there instead."""
    with pytest.raises(FileError, match="no such file"):
        loratool.inspect(tmp_path / "gone")
    with pytest.raises(FileError, match="no adapter weights"):
        loratool.inspect(tmp_path)
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors").write_bytes(
            (adapter / "adapter_model.safetensors").read_bytes()
        )
    with pytest.raises(FileError) as error:
        loratool.inspect(tmp_path)
    assert "one.safetensors" in error.value.message
    assert "one.safetensors" in error.value.hint
