"""Names of architectures that the table lacks: how they store, tie and call their parts.

All of it is declared, per `model_type` where that matters; nothing is read off a shape.
"""

from __future__ import annotations

import re

# --- orientation and roots ------------------------------------------------------------------------

#: Modules of class transformers.pytorch_utils.Conv1D, whose weight is stored [in, out].
CONV1D = {
    "gpt2": r"(^|\.)(c_attn|c_proj|c_fc|q_attn)$",
    "openai-gpt": r"(^|\.)(c_attn|c_proj|c_fc)$",
    "imagegpt": r"(^|\.)(c_attn|c_proj|c_fc|q_attn)$",
    "decision_transformer": r"(^|\.)(c_attn|c_proj|c_fc|q_attn)$",
}

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
    if not name.endswith(("bias", "inv_freq")):
        return False
    if name.endswith((".attn.bias", ".attention.bias")):
        return len(shape) == 4 and shape[:2] == (1, 1)
    return LEGACY_BUFFER.search(name) is not None
