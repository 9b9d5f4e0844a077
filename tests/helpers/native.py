"""A tiny model in the names of Meta's own code, with that code's arithmetic: rotary pairs lie side
by side and are turned as complex numbers (llama/model.py). None of it is loratool's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.functional import silu

State = dict[str, torch.Tensor]

LAYERS, DIM, HEADS, KV, SIZE, HIDDEN, VOCABULARY = 2, 24, 4, 2, 6, 40, 32
EPS, THETA = 1e-5, 10000.0

#: As Mistral writes it.
PARAMS: dict[str, Any] = {
    "dim": DIM, "n_layers": LAYERS, "head_dim": SIZE, "hidden_dim": HIDDEN, "n_heads": HEADS,
    "n_kv_heads": KV, "norm_eps": EPS, "vocab_size": VOCABULARY, "rope_theta": THETA,
}  # fmt: skip
#: config.json of the same model.
CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": DIM,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV,
    "head_dim": SIZE, "intermediate_size": HIDDEN, "vocab_size": VOCABULARY, "rms_norm_eps": EPS,
    "rope_theta": THETA, "tie_word_embeddings": False,
}  # fmt: skip

#: Linear layers of a layer, natively and in transformers, and their shapes.
LINEARS = {
    "attention.wq": ("self_attn.q_proj", (HEADS * SIZE, DIM)),
    "attention.wk": ("self_attn.k_proj", (KV * SIZE, DIM)),
    "attention.wv": ("self_attn.v_proj", (KV * SIZE, DIM)),
    "attention.wo": ("self_attn.o_proj", (DIM, HEADS * SIZE)),
    "feed_forward.w1": ("mlp.gate_proj", (HIDDEN, DIM)),
    "feed_forward.w2": ("mlp.down_proj", (DIM, HIDDEN)),
    "feed_forward.w3": ("mlp.up_proj", (HIDDEN, DIM)),
}
_OTHERS = {
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def native_state(seed: int = 0) -> State:
    torch.manual_seed(seed)
    state = {
        "tok_embeddings.weight": torch.randn(VOCABULARY, DIM),
        "norm.weight": 1 + 0.1 * torch.randn(DIM),
        "output.weight": 0.3 * torch.randn(VOCABULARY, DIM),
    }
    for n in range(LAYERS):
        for name, (_, shape) in LINEARS.items():
            state[f"layers.{n}.{name}.weight"] = 0.3 * torch.randn(shape)
        for name in _OTHERS:
            state[f"layers.{n}.{name}.weight"] = 1 + 0.1 * torch.randn(DIM)
    return state


def halves_apart(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """`permute` of transformers' convert_llama_weights_to_hf.py."""
    rows, columns = weight.shape
    parts = weight.view(heads, rows // heads // 2, 2, columns)
    return parts.transpose(1, 2).reshape(rows, columns).clone()


def hub_state(native: State) -> State:
    """The same model under transformers' names, its rows in transformers' order."""
    ends = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    state = {}
    for name, weight in native.items():
        path = name.removesuffix(".weight")
        if path in ends:
            state[f"{ends[path]}.weight"] = weight
            continue
        _, n, inner = path.split(".", 2)
        heads = {"attention.wq": HEADS, "attention.wk": KV}.get(inner)
        hub = _OTHERS.get(inner) or LINEARS[inner][0]
        moved = weight if heads is None else halves_apart(weight, heads)
        state[f"model.layers.{n}.{hub}.weight"] = moved
    return state


def native_factors(scale: float, rank: int = 3, seed: int = 7) -> tuple[State, State]:
    """Factors on all linear layers, by native names; and the state they make of the model."""
    merged = native_state()
    torch.manual_seed(seed)
    factors = {}
    for name in list(merged):
        path = name.removesuffix(".weight")
        if not name.startswith("layers.") or path.endswith("norm"):
            continue
        out, width = merged[name].shape
        a, b = 0.3 * torch.randn(rank, width), 0.3 * torch.randn(out, rank)
        factors[f"{path}.lora_A.weight"], factors[f"{path}.lora_B.weight"] = a, b
        merged[name] = merged[name] + scale * b @ a
    return factors, merged


def native_logits(state: State, tokens: torch.Tensor) -> torch.Tensor:
    """Meta's forward pass of one sequence, in float64."""
    w = {name: value.to(torch.float64) for name, value in state.items()}
    count = len(tokens)
    x = w["tok_embeddings.weight"][tokens]
    angles = torch.outer(
        torch.arange(count, dtype=torch.float64),
        THETA ** (-torch.arange(0, SIZE, 2, dtype=torch.float64) / SIZE),
    )
    turns = torch.polar(torch.ones_like(angles), angles)
    masked = torch.full((count, count), float("-inf"), dtype=torch.float64).triu(1)
    for n in range(LAYERS):
        at = f"layers.{n}"
        h = _normed(x, w[f"{at}.attention_norm.weight"])
        q = _turned((h @ w[f"{at}.attention.wq.weight"].T).view(count, HEADS, SIZE), turns)
        k = _turned((h @ w[f"{at}.attention.wk.weight"].T).view(count, KV, SIZE), turns)
        v = (h @ w[f"{at}.attention.wv.weight"].T).view(count, KV, SIZE)
        k, v = (t.repeat_interleave(HEADS // KV, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / SIZE**0.5 + masked
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(count, -1)
        x = x + mixed @ w[f"{at}.attention.wo.weight"].T
        h = _normed(x, w[f"{at}.ffn_norm.weight"])
        gate, up = (h @ w[f"{at}.feed_forward.{m}.weight"].T for m in ("w1", "w3"))
        x = x + (silu(gate) * up) @ w[f"{at}.feed_forward.w2.weight"].T
    return _normed(x, w["norm.weight"]) @ w["output.weight"].T


def _normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def _turned(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns[:, None, :]).flatten(-2)


# --- on the disk ----------------------------------------------------------------------------------


def native_base(folder: Path, torch_file: bool = False, **params: Any) -> Path:
    """The model as Mistral publishes it, or as Meta does, in one torch file."""
    folder.mkdir(parents=True)
    if torch_file:
        torch.save(native_state(), folder / "consolidated.00.pth")
    else:
        save_file(native_state(), folder / "consolidated.safetensors")
    (folder / "params.json").write_text(json.dumps(PARAMS | params))
    (folder / "tokenizer.model").write_bytes(b"a vocabulary")
    return folder


def hub_base(folder: Path) -> Path:
    """The same model as transformers has it."""
    folder.mkdir(parents=True)
    save_file(hub_state(native_state()), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def native_adapter(folder: Path, scale: float, *, params: bool = True) -> Path:
    """An adapter as mistral-finetune saves it."""
    folder.mkdir(parents=True)
    factors, _ = native_factors(scale)
    save_file(factors, folder / "lora.safetensors")
    if params:
        told = PARAMS | {"lora": {"enable": True, "rank": 3, "dropout": 0.0, "scaling": scale}}
        (folder / "params.json").write_text(json.dumps(told))
    return folder


def hub_adapter(folder: Path, scale: float) -> Path:
    """The same adapter as PEFT has it."""
    folder.mkdir(parents=True)
    factors, _ = native_factors(scale)
    found = {}
    for name, factor in factors.items():
        _, n, inner = name.split(".", 2)
        path, _, side = inner.removesuffix(".weight").rpartition(".")
        heads = {"attention.wq": HEADS, "attention.wk": KV}.get(path)
        moved = halves_apart(factor, heads) if heads and side == "lora_B" else factor
        found[f"base_model.model.model.layers.{n}.{LINEARS[path][0]}.{side}.weight"] = moved
    save_file(found, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "r": 3, "lora_alpha": 3 * scale, "task_type": "CAUSAL_LM",
        "target_modules": [hub.rpartition(".")[2] for hub, _ in LINEARS.values()],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
