"""Names of architectures, each list once: how they rename, store, tie and call their parts.

All of it is declared, per `model_type` where that matters; nothing is read off a shape.
"""

from __future__ import annotations

import re

Rules = list[tuple[str, str]]

# --- orientation and renames ----------------------------------------------------------------------

#: Modules of class transformers.pytorch_utils.Conv1D, whose weight is stored [in, out].
CONV1D = {
    "gpt2": r"(^|\.)(c_attn|c_proj|c_fc|q_attn)$",
    "openai-gpt": r"(^|\.)(c_attn|c_proj|c_fc)$",
    "imagegpt": r"(^|\.)(c_attn|c_proj|c_fc|q_attn)$",
    "decision_transformer": r"(^|\.)(c_attn|c_proj|c_fc|q_attn)$",
}

_DINOV2 = [
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
]
_VIT = [
    *((f"encoder.layer.#.{disk}", f"layers.#.{memory}") for disk, memory in _DINOV2),
    ("encoder.layer.#.intermediate.dense", "layers.#.mlp.fc1"),
    ("encoder.layer.#.output.dense", "layers.#.mlp.fc2"),
    ("encoder.layer.#", "layers.#"),
]

#: Parts of names on disk and in memory (transformers 5) where they differ, by model_type; "#" is a
#: number, and the first row that fits is taken. "" is for all. Source: transformers'
#: conversion_mapping.py.
_RENAMED_PARTS = {
    "gpt_neox": [("embed_out", "lm_head")],
    "mixtral": [("block_sparse_moe.gate", "mlp.gate")],
    "": [("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")],
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "swin": [
        ("attention.self.query", "attention.q_proj"),
        ("attention.self.key", "attention.k_proj"),
        ("attention.self.value", "attention.v_proj"),
        ("attention.self.relative_position_bias_table",
         "attention.relative_position_bias.relative_position_bias_table"),
        ("attention.output.dense", "attention.o_proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
    ],
    **dict.fromkeys(("vit", "deit", "beit", "ijepa", "vit_mae", "vit_msn", "vivit",
                     "audio-spectrogram-transformer"), _VIT),
}  # fmt: skip


def _rules(rows: Rules, to_disk: bool) -> Rules:
    """Patterns and replacements of these rows, one way or the other."""
    found = []
    for disk, memory in rows:
        old, new = (memory, disk) if to_disk else (disk, memory)
        pattern = re.escape(old).replace(r"\#", r"(\d+)")
        found.append((rf"(^|\.){pattern}(?=\.|$)", r"\1" + new.replace("#", r"\2")))
    return found


#: From names in memory to those on disk, and the other way, by model_type.
ON_DISK = {kind: _rules(rows, True) for kind, rows in _RENAMED_PARTS.items()}
IN_MEMORY = {kind: _rules(rows, False) for kind, rows in _RENAMED_PARTS.items()}

#: Architectures whose files transformers 5 reads under other names, in ways not known here.
RENAMED = {
    "aria", "aya_vision", "colqwen2", "conditional_detr", "d_fine", "deepseek_ocr2", "deepseek_v4",
    "deformable_detr", "detr", "emu3", "ernie4_5_moe", "ernie4_5_vl_moe", "esm", "fuyu", "gemma3n",
    "got_ocr2", "granitemoe", "granitemoehybrid", "granitemoeshared", "gte", "hunyuan_vl",
    "internvl", "jina_embeddings_v3", "kimi_k25", "kimi_linear", "lw_detr", "maskformer", "mimi",
    "mimo_v2_flash", "minimax", "minimax_m2", "mllama", "nemotron_h", "nomic_bert", "olmo_hybrid",
    "phimoe", "qwen2_audio", "qwen2_5_vl", "qwen2_vl", "qwen3_5_text", "rf_detr", "rt_detr",
    "rt_detr_v2", "sapiens2", "segformer", "timesfm2_5", "videomae", "video_llava", "yolos",
}  # fmt: skip

#: Models of text and images whose names are the same on disk and in memory.
PLAIN_PAIRS = {"clip", "chinese_clip", "siglip", "siglip2", "metaclip_2", "xclip", "altclip"}

#: What the class with a head puts before the names of models that were saved without it.
ROOTS = {
    "gpt2": "transformer", "openai-gpt": "transformer", "bloom": "transformer", "opt": "model",
    "bert": "bert", "roberta": "roberta", "xlm-roberta": "roberta", "distilbert": "distilbert",
    "electra": "electra",
}  # fmt: skip

# --- embeddings and heads -------------------------------------------------------------------------

#: Modules with a row for every token: the last part of their path.
_TOKENS = (
    "embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "tokens_embed",
    "embeddings",
)  # fmt: skip

#: The same of XLNet, whose head (`lm_loss`) is never called by a name of `_LANGUAGE_HEADS`.
_APART = "word_embedding"

#: The one matrix that encoder-decoder models use for both sides and the head.
_SHARED_TOKENS = "shared"

#: Modules that look up something else: positions, kinds of tokens, distances.
_OTHER_LOOKUPS = (
    "wpe", "embed_positions", "positions_embed", "embed", "relative_attention_bias",
)  # fmt: skip

#: The token embedding of a model whose head may be tied to it.
TOKEN_EMBEDDING = re.compile(rf"(^|\.)({'|'.join(_TOKENS)})\.weight$")

#: Heads with a row for every token, by path.
_LANGUAGE_HEADS = (
    "lm_head", "embed_out", "proj_out", r"cls\.predictions\.decoder", r"lm_head\.(decoder|linear)",
    "vocab_projector", "generator_lm_head", r"predictions\.decoder",
)  # fmt: skip
LANGUAGE_HEAD = re.compile(rf"(^|\.)({'|'.join(_LANGUAGE_HEADS)})\.weight$")

#: The head of an architecture where it is not lm_head.
HEAD_NAMES = {
    **dict.fromkeys(("bert", "deberta", "deberta-v2", "mobilebert"), "cls.predictions.decoder"),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert", "mpnet"), "lm_head.decoder"),
    "whisper": "proj_out", "distilbert": "vocab_projector", "electra": "generator_lm_head",
    "albert": "predictions.decoder", "gpt_neox": "embed_out",
}  # fmt: skip

#: A part of the head that has a column for every token.
TOKENS_BY_COLUMN = {"mobilebert": "cls.predictions.dense.weight"}

#: Ends of the names of heads that classify; PEFT saves them for such tasks without being asked.
CLASSIFIERS = ("classifier", "score", "qa_outputs")

#: Last layers of classifiers, with a row per label.
LABEL_HEAD = re.compile(r"(^|\.)(classifier|score)(\.out_proj)?\.weight$")

#: Modules on top of a model, which another class of the same model may lack.
HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|score|classifier|qa_outputs|classification_head|pooler)\b"
)
#: What pretraining leaves on top of an encoder, which a classifier made of it does not have.
PRETRAINING = re.compile(
    r"^(cls|lm_head|predictions|sop_classifier|discriminator_predictions|generator_\w+|vocab_\w+)\."
)

_VOCABULARY = re.compile(
    # Models with several codebooks number their embeddings and heads: embed_tokens.3, lm_head.3.
    rf"(^|\.)({'|'.join((*_TOKENS, _APART, _SHARED_TOKENS, *_LANGUAGE_HEADS))})"
    r"(\.\d+)?\.(weight|bias)$"
)
_TOKEN_MATRIX = re.compile(rf"(^|\.)({'|'.join((*_TOKENS, _APART, _SHARED_TOKENS))})\.weight$")
#: Also with something before it: decoder_embed_tokens, position_embedding.
_LOOKUP = re.compile(
    r"(.*_)?(embeddings?|embed_tokens|embed_positions|tok_embeddings|tokens_embed|positions_embed)"
    rf"|{'|'.join((*_TOKENS, _APART, _SHARED_TOKENS, *_OTHER_LOOKUPS))}"
)


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has a row per token: of the token embedding or of a language-model head."""
    return _VOCABULARY.search(name) is not None


def is_vocabulary_bias(name: str) -> bool:
    """Whether a vector has a value per token: it is added to what a language-model head gives."""
    return name.endswith(".bias") and (
        is_vocabulary(name) or name.split(".")[-2] in ("predictions", "decoder")
    )


def is_token_embedding(name: str) -> bool:
    """Whether a tensor is the token embedding's matrix, the shared one of two sides included."""
    return _TOKEN_MATRIX.search(name) is not None


def is_label_head(name: str) -> bool:
    """Whether a tensor is the last layer of a classifier, with a row per label."""
    return LABEL_HEAD.search(name) is not None


def is_value_head(name: str) -> bool:
    """Whether a tensor is of the value head of reinforcement learning, which no base has: TRL reads
    it from beside the language model's own tensors."""
    return name.startswith("v_head.")


def is_lookup(path: str) -> bool:
    """Whether the module at a path looks rows up: of tokens, positions, kinds, distances."""
    return _LOOKUP.fullmatch(path.rpartition(".")[2]) is not None


# --- classes and ties -----------------------------------------------------------------------------

MASKED_CLASS = re.compile(r"(ForMaskedLM|ForPreTraining)$")
LM_CLASS = re.compile(
    r"(ForCausalLM|LMHeadModel|ForConditionalGeneration|ForMaskedLM|ForPreTraining)$"
)

#: Architectures that tie unless config.json says otherwise (only such configs leave the flag out).
TIED_BY_DEFAULT = {
    "gpt2", "opt", "bloom", "bert", "roberta", "xlm-roberta", "whisper", "gemma", "gemma2",
    "gpt_bigcode", "falcon", "mamba", "mamba2", "falcon_mamba",
}  # fmt: skip

#: Names under which encoder-decoder models reach their one shared matrix.
SHARED = re.compile(r"(^|\.)(shared|encoder\.embed_tokens|decoder\.embed_tokens|lm_head)\.weight$")

# --- buffers --------------------------------------------------------------------------------------

#: Buffers of old checkpoints that no current model reads. They are carried over as they are: some
#: hold -inf or -1e9 by design, and casting a frequency table would only damage it.
LEGACY_BUFFER = re.compile(r"(^|\.)(masked_bias|inv_freq|(attn|attention)\.bias)$")


def is_legacy_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """True for causal masks and frequency tables that were saved although they are constants.

    `attn.bias` is one only with the mask's shape `[1, 1, n, n]`; elsewhere it is a real bias.
    """
    if name.endswith((".attn.bias", ".attention.bias")):
        return len(shape) == 4 and shape[:2] == (1, 1)
    return LEGACY_BUFFER.search(name) is not None
