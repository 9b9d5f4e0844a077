"""What a file is that no dialect claims, told from its tensor names.

One rule per line, the first that fits wins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from loratool.errors import shown_argument
from loratool.storage.tensors import TensorInfo

_TOKENS = "it puts trained tokens before the text"
_ELSEWHERE = (
    "; merge it with PEFT on the machine that trained it, and `loratool extract` makes a LoRA "
    "of that"
)
#: PEFT's types without a merged form, in the words of their authors, and why they have none.
PEFT_TYPES = {
    "PROMPT_TUNING": ("prompt tuning", _TOKENS),
    "MULTITASK_PROMPT_TUNING": ("multitask prompt tuning", _TOKENS),
    "P_TUNING": ("P-tuning", _TOKENS),
    "CPT": ("context-aware prompt tuning", _TOKENS),
    "PREFIX_TUNING": ("prefix tuning", "it puts trained keys and values before those of the text"),
    "CARTRIDGE": ("Cartridge", "it puts trained keys and values before those of the text"),
    "ADAPTION_PROMPT": ("LLaMA-Adapter", "it adds to the attention what no weight does"),
    "XLORA": ("X-LoRA", "it mixes several adapters, for each token anew"),
    "POLY": ("Poly", "it mixes skills, for each task anew"),
    "LILY": ("LILY", "which of its factors count depends on the input"),
    "SHADOW": ("Shadow", "another model runs beside this one"),
    "ADAMSS": (
        "AdaMSS", "which rows its factors are for is found by clustering singular vectors of a "
        f"weight{_ELSEWHERE}",
    ),
}  # fmt: skip

_KOHYA = r"^((lora|lycoris|oft)_(unet|te\d?|prior_unet|transformer)_|lycoris_)"
#: Language models of GPT-2's kind call their body `transformer` too, and its layers `h`.
_DIFFUSERS = re.compile(
    r"(unet|transformer(?!\.(h\.\d|wte\.|word_embeddings\.))(_\d)?|text_encoder(_\d)?|prior)\."
)
_OPTIMIZER = r"(^|\.)(exp_avg|exp_avg_sq|momentum_buffer|max_exp_avg_sq)$"

#: Tensors of trained words: of SDXL's in safetensors, of diffusers (<word>), of A1111's .pt.
_INVERSION = re.compile(r"emb_params$|clip_[gl]$|<|string_to_(param|token)\.")

#: What to do with a model that was tuned whole.
EXTRACT = "`loratool extract BASE TUNED -o OUT` makes an adapter of a model that was tuned whole."
_WITH_PEFT = "Nothing merges it; PEFT uses it beside its base (PeftModel.from_pretrained)."
_PICTURES = (
    "loratool is for adapters of language models; use this with the program that it is for "
    "(diffusers, ComfyUI, sd-scripts)."
)
_OTHERWISE = (
    "docs/dialects.md lists what is read, and --from DIALECT says which of them a file is; "
    "`loratool inspect {} --tensors` lists its names."
)
#: What to do with a file that is no adapter, by the code of what it is.
_WAYS_OUT = {
    "optimizer-state": "Give the adapter that was saved beside it: adapter_model.safetensors.",
    "base-checkpoint": f"Give the adapter. {EXTRACT}",
    "gguf-model": "Give the adapter that save_pretrained wrote; save_pretrained_gguf of Unsloth "
    "writes a model into which it is merged already.",
    "empty": "Save the adapter again: whoever wrote this held no trained weights.",
    "adalora": "PEFT's own are read by the adapter_config.json beside them: give the folder.",
    "ia3": "PEFT's own are read by the adapter_config.json beside them: give the folder.",
    "positional": "Nothing says which weight they are of; save the state dict, with its names.",
    "bare-tensor": "Nothing says which weight it is of; save the state dict, with its names.",
    "control-vector": "llama.cpp uses it as it is: --control-vector.",
    "bottleneck-adapter": "Nothing merges it; the adapters library uses it beside its base.",
    "reft": "Nothing merges it; pyreft uses it beside its base.",
    "llama-adapter": "Nothing merges it; it is used beside its base by what trained it.",
    **dict.fromkeys((
        "kohya", "cloneofsimo", "lycoris", "xlabs", "comfy", "diffusers", "lllite", "t-lora",
        "textual-inversion", "ip-adapter", "control-lora", "controlnet", "t2i-adapter",
        "custom-diffusion", "nunchaku", "hypernetwork", "diffusion-model",
    ), _PICTURES),
}  # fmt: skip

Test = Callable[[Collection[str]], bool]


def _any(*patterns: str) -> Test:
    """Whether one of the patterns, in which nothing matches a line break, is found in a name.

    All names are searched at once, each behind a line break: Python looks for a letter far quicker
    than for the beginning of a line, or for one pattern or the other.
    """
    quick = [p.replace(r"(^|\.)", r"[\n.]").replace("^", r"\n") for p in patterns]
    compiled = [re.compile(pattern, re.MULTILINE) for pattern in quick]

    def test(names: Collection[str]) -> bool:
        text = "\n".join(["", *names])
        return any(pattern.search(text) for pattern in compiled)

    return test


Rule = tuple[str, str, Test]

#: Files that are something else whatever other names they hold, lora_A and lora_B among them.
_FOREIGN: list[Rule] = [
    ("empty", "a safetensors file without tensors", lambda names: not names),
    ("optimizer-state", "optimizer state of a training run, not an adapter",
     _any(_OPTIMIZER)),
    ("prompt-tuning", "prompt tuning (trained prompt embeddings), not a LoRA adapter",
     _any(r"(^|\.)prompt_embeddings$", r"^prompt_encoder\.")),
    ("lllite", "a ControlNet-LLLite file for a diffusion model, which is no change of weights",
     _any(r"^lllite_")),
    ("t-lora", "a T-LoRA for a diffusion model, whose change depends on the timestep",
     _any(r"\.lambda_layer$")),
    ("kohya", "a kohya-style LoRA for a diffusion model",
     _any(_KOHYA)),
    ("cloneofsimo", "a cloneofsimo/lora file for a diffusion model",
     _any(r"^(unet|text_encoder):\d+:(up|down)$")),
    ("adalora", "an AdaLoRA adapter, not plain LoRA", _any(r"\.lora_E(\.|$)")),
    ("lycoris", "a LyCORIS adapter (LoHa or LoKr)", _any(r"\.(hada_w\d|lokr_w\d)")),
    ("ia3", "an (IA)³ adapter, which rescales activations; not LoRA",
     _any(r"\.(ia3_l|multi_lora_[ab])(\.|$)")),
    ("xlabs", "an XLabs (x-flux) LoRA for a diffusion model",
     _any(r"^(double|single)_blocks\.\d+\.processor\..*lora")),
    ("comfy", "a LoRA for a diffusion model in ComfyUI's names", _any(r"^diffusion_model\..*lora")),
    ("diffusers", "a diffusers LoRA for a diffusion model", lambda names: any(
        _DIFFUSERS.match(n) and ("lora" in n) for n in names)),
]  # fmt: skip

_RULES: list[Rule] = [
    ("llama-adapter", "a LLaMA-Adapter, which adds to the attention what no weight does; not LoRA",
     _any(r"(^|\.)adaption_(prompt|gate)$", r"^adapter_query\.")),
    ("ip-adapter", "an IP-Adapter for a diffusion model: attention to pictures, not LoRA",
     _any(r"^(ip_adapter|image_proj)\.")),
    ("control-lora", "a Control-LoRA (a ControlNet in low-rank factors) for a diffusion model",
     lambda names: "lora_controlnet" in names),
    ("controlnet", "a ControlNet for a diffusion model, not an adapter of weights",
     _any(r"^(control_model\.|controlnet_(cond|down|mid)_)")),
    ("t2i-adapter", "a T2I-Adapter for a diffusion model: a network of its own, not LoRA",
     _any(r"^(adapter\.)?body\.\d+\.(block[12]|in_conv|resnets)\b")),
    ("custom-diffusion", "a Custom Diffusion file for a diffusion model, not LoRA",
     _any(r"custom_diffusion")),
    ("nunchaku", "a quantised diffusion model (Nunchaku), not an adapter",
     lambda names: {"qweight", "proj_down"} <= {n.rpartition(".")[2] for n in names}),
    ("hypernetwork", "a hypernetwork for a diffusion model, not LoRA",
     lambda names: all(re.match(r"(320|640|768|1024|1280)\.\d\.", n) for n in names)),
    ("comfy", "changes of whole weights for a diffusion model in ComfyUI's names",
     _any(r"^diffusion_model\..*\.(diff|diff_b)$")),
    ("diffusion-model", "the weights of a diffusion model, not an adapter",
     _any(r"^(model\.diffusion_model|first_stage_model|cond_stage_model)\.")),
    ("bottleneck-adapter", "bottleneck adapters (Houlsby, Pfeiffer), layers of their own between "
     "those of the model; not LoRA", _any(r"\.adapters?\.(.+\.)?adapter_(down|up)\.")),
    ("reft", "a ReFT intervention, which changes activations; not LoRA",
     _any(r"\b(rotate_layer|learned_source)\.")),
    ("gguf-other", "a llama.cpp adapter of another kind than LoRA", _any(r"\.weight\.lora_[ab]$")),
    ("gguf-model", "a whole model in llama.cpp's names (GGUF), not an adapter",
     _any(r"^blk\.\d+\.\w+\.weight$")),
    ("control-vector", "a control vector of llama.cpp, which is added to activations; not LoRA",
     _any(r"^direction\.\d+$")),
    ("megatron", "an adapter of Megatron or NeMo as it trains them; export it there to PEFT's form",
     _any(r"\.adapter\.((adapter|linear)_\w+\.)?linear_(in|out)\.weight$")),
    ("lora-down-up", "a LoRA with lora_down/lora_up names, not in PEFT's layout",
     _any(r"\.lora[._](down|up)")),
    ("positional", "low-rank factors named by position only (as SAM-LoRA scripts save them)",
     _any(r"^w_[ab]_\d+$")),
    ("textual-inversion", "a textual inversion (trained embeddings of new words), not LoRA",
     lambda names: all(_INVERSION.match(name) for name in names)),
    ("base-checkpoint", "model weights, not an adapter",
     lambda names: sum(n.endswith((".weight", ".bias")) for n in names) > len(names) // 2),
]  # fmt: skip


def is_foreign(names: Collection[str]) -> bool:
    """Whether the names mark a file as something that must not be read by its other names."""
    return any(fits(names) for _, _, fits in _FOREIGN)


def recognise(tensors: dict[str, TensorInfo], config: dict[str, Any], top: str) -> tuple[str, str]:
    """`(format, description)` of a weights file.

    `top` is the top object of a torch file ("dict", "list", "tensor"); `config` the
    adapter_config.json beside it, or {}.
    """
    if top == "tensor":
        return "bare-tensor", "a single tensor without a name (perhaps a trained prompt prefix)"
    if top in ("list", "tuple"):
        return "positional", "a list of tensors without names (as cloneofsimo/lora saves them)"
    peft_type = (config.get("peft_type") or "LORA").upper()
    if peft_type != "LORA":
        words, why = PEFT_TYPES.get(peft_type, (peft_type, "a type that loratool does not know"))
        return peft_type.lower().replace("_", "-"), f"a PEFT {words} adapter: {why}"
    for code, words, fits in (*_FOREIGN, *_RULES):
        if fits(tensors):
            return code, words
    return "unknown", "no adapter format that loratool knows"


def way_out(code: str, source: str | Path) -> str:
    """What to do with a file that no dialect claims, by the code that `recognise` gives it.

    `source` is what the user called it.
    """
    if code.replace("-", "_").upper() in PEFT_TYPES:
        return _WITH_PEFT
    return _WAYS_OUT.get(code) or _OTHERWISE.format(shown_argument(source))
