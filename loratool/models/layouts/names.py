"""Names of architectures, each list once: how they rename, store, tie and call their parts.

All of it is declared per `model_type`; nothing is read off a shape."""

from __future__ import annotations

import re

#: Modules of class transformers.pytorch_utils.Conv1D, whose weight is stored [in, out].
CONV1D = {
    "gpt2": r"(^|\.)(c_attn|c_proj|c_fc|q_attn)$",
    "openai-gpt": r"(^|\.)(c_attn|c_proj|c_fc)$",
    "imagegpt": r"(^|\.)(c_attn|c_proj|c_fc|q_attn)$",
    "decision_transformer": r"(^|\.)(c_attn|c_proj|c_fc|q_attn)$",
}


#: Parts of names on disk and in memory, for architectures that differ in nothing else.
_PARTS = {
    "dinov2": [
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
    ],
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
}  # fmt: skip


_PARTS["dinov2_with_registers"] = _PARTS["dinov2"]


_VIT = [
    (r"(^|\.)layers\.(\d+)\.attention\.q_proj\b", r"\1encoder.layer.\2.attention.attention.query"),
    (r"(^|\.)layers\.(\d+)\.attention\.k_proj\b", r"\1encoder.layer.\2.attention.attention.key"),
    (r"(^|\.)layers\.(\d+)\.attention\.v_proj\b", r"\1encoder.layer.\2.attention.attention.value"),
    (r"(^|\.)layers\.(\d+)\.attention\.o_proj\b", r"\1encoder.layer.\2.attention.output.dense"),
    (r"(^|\.)layers\.(\d+)\.mlp\.fc1\b", r"\1encoder.layer.\2.intermediate.dense"),
    (r"(^|\.)layers\.(\d+)\.mlp\.fc2\b", r"\1encoder.layer.\2.output.dense"),
    (r"(^|\.)layers\.(\d+)\.", r"\1encoder.layer.\2."),
]


#: From module names in memory (transformers 5) to the names on disk, where they differ, per
#: model_type. Source: transformers/conversion_mapping.py, read backwards.
RENAMES: dict[str, list[tuple[str, str]]] = {
    "gpt_neox": [(r"^lm_head\.", "embed_out.")],
    "mixtral": [(r"\.mlp\.gate\.", ".block_sparse_moe.gate.")],
    "": [(r"LayerNorm\.weight$", "LayerNorm.gamma"), (r"LayerNorm\.bias$", "LayerNorm.beta")],
    **dict.fromkeys(("vit", "deit", "beit", "ijepa", "vit_mae", "vit_msn", "vivit",
                     "audio-spectrogram-transformer"), _VIT),
    **{kind: [(rf"\.{re.escape(memory)}(?=\.|$)", f".{disk}") for disk, memory in parts]
       for kind, parts in _PARTS.items()},
}  # fmt: skip


_VIT_IN_MEMORY = [
    (r"(^|\.)encoder\.layer\.(\d+)\.attention\.attention\.query\b",
     r"\1layers.\2.attention.q_proj"),
    (r"(^|\.)encoder\.layer\.(\d+)\.attention\.attention\.key\b", r"\1layers.\2.attention.k_proj"),
    (r"(^|\.)encoder\.layer\.(\d+)\.attention\.attention\.value\b",
     r"\1layers.\2.attention.v_proj"),
    (r"(^|\.)encoder\.layer\.(\d+)\.attention\.output\.dense\b", r"\1layers.\2.attention.o_proj"),
    (r"(^|\.)encoder\.layer\.(\d+)\.intermediate\.dense\b", r"\1layers.\2.mlp.fc1"),
    (r"(^|\.)encoder\.layer\.(\d+)\.output\.dense\b", r"\1layers.\2.mlp.fc2"),
    (r"(^|\.)encoder\.layer\.(\d+)\.", r"\1layers.\2."),
]  # fmt: skip


#: The other way: from names on disk to those of modules in memory.
IN_MEMORY: dict[str, list[tuple[str, str]]] = {
    "gpt_neox": [(r"^embed_out\.", "lm_head.")],
    "mixtral": [(r"\.block_sparse_moe\.gate\.", ".mlp.gate.")],
    "": [(r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")],
    **{kind: _VIT_IN_MEMORY for kind, rules in RENAMES.items() if rules is _VIT},
    **{kind: [(rf"\.{re.escape(disk)}(?=\.|$)", f".{memory}") for disk, memory in parts]
       for kind, parts in _PARTS.items()},
}  # fmt: skip


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


EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|tokens_embed|embeddings)"
    r"\.weight$"
)


HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|proj_out|cls\.predictions\.decoder|lm_head\.decoder|vocab_projector"
    r"|generator_lm_head|predictions\.decoder)\.weight$"
)


HEAD_NAMES = {
    **dict.fromkeys(("bert", "deberta", "deberta-v2", "mobilebert"), "cls.predictions.decoder"),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert", "mpnet"), "lm_head.decoder"),
    "whisper": "proj_out", "distilbert": "vocab_projector", "electra": "generator_lm_head",
    "albert": "predictions.decoder", "gpt_neox": "embed_out",
}  # fmt: skip


MASKED_CLASS = re.compile(r"(ForMaskedLM|ForPreTraining)$")


LM_CLASS = re.compile(
    r"(ForCausalLM|LMHeadModel|ForConditionalGeneration|ForMaskedLM|ForPreTraining)$"
)


#: Architectures that tie unless config.json says otherwise (only such configs leave the flag out).
TIED_BY_DEFAULT = {"gpt2", "opt", "bloom", "bert", "roberta", "xlm-roberta", "whisper", "gemma",
                    "gemma2", "gpt_bigcode", "falcon", "mamba", "mamba2",
                    "falcon_mamba"}  # fmt: skip


#: Names under which encoder-decoder models reach their one shared matrix.
SHARED = re.compile(r"(^|\.)(shared|encoder\.embed_tokens|decoder\.embed_tokens|lm_head)\.weight$")


#: Ends of the names of heads that classify; PEFT saves them for such tasks without being asked.
CLASSIFIERS = ("classifier", "score", "qa_outputs")

#: Buffers of old checkpoints that no current model reads. They are carried over as they are: some
#: hold -inf or -1e9 by design, and casting a frequency table would only damage it.
LEGACY_BUFFER = re.compile(r"(^|\.)(masked_bias|inv_freq|(attn|attention)\.bias)$")
