"""How architectures name and lay out their weights.

An adapter's keys are module names of the transformers version it was trained with; a base file has
its own names. This module finds for each name of the one the tensor of the other. It knows which
weights are stored `[in, out]`, and which output head shares the input embedding's matrix. All of it
is declared per architecture; nothing is read off a shape.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from loratool.checkpoint.base import Checkpoint
from loratool.errors import BaseError

#: Modules of class transformers.pytorch_utils.Conv1D, whose weight is stored [in, out].
_CONV1D = {
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
_RENAMES: dict[str, list[tuple[str, str]]] = {
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
_IN_MEMORY: dict[str, list[tuple[str, str]]] = {
    "gpt_neox": [(r"^embed_out\.", "lm_head.")],
    "mixtral": [(r"\.block_sparse_moe\.gate\.", ".mlp.gate.")],
    "": [(r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")],
    **{kind: _VIT_IN_MEMORY for kind, rules in _RENAMES.items() if rules is _VIT},
    **{kind: [(rf"\.{re.escape(disk)}(?=\.|$)", f".{memory}") for disk, memory in parts]
       for kind, parts in _PARTS.items()},
}  # fmt: skip

#: Architectures whose files transformers 5 reads under other names, in ways not known here.
_RENAMED = {
    "aria", "aya_vision", "colqwen2", "conditional_detr", "d_fine", "deepseek_ocr2", "deepseek_v4",
    "deformable_detr", "detr", "emu3", "ernie4_5_moe", "ernie4_5_vl_moe", "esm", "fuyu", "gemma3n",
    "got_ocr2", "granitemoe", "granitemoehybrid", "granitemoeshared", "gte", "hunyuan_vl",
    "internvl", "jina_embeddings_v3", "kimi_k25", "kimi_linear", "lw_detr", "maskformer", "mimi",
    "mimo_v2_flash", "minimax", "minimax_m2", "mllama", "nemotron_h", "nomic_bert", "olmo_hybrid",
    "phimoe", "qwen2_audio", "qwen2_5_vl", "qwen2_vl", "qwen3_5_text", "rf_detr", "rt_detr",
    "rt_detr_v2", "sapiens2", "segformer", "timesfm2_5", "videomae", "video_llava", "yolos",
}  # fmt: skip
#: Models of text and images whose names are the same on disk and in memory.
_PLAIN_PAIRS = {"clip", "chinese_clip", "siglip", "siglip2", "metaclip_2", "xclip", "altclip"}

#: What the class with a head puts before the names of models that were saved without it.
_ROOTS = {
    "gpt2": "transformer", "openai-gpt": "transformer", "bloom": "transformer", "opt": "model",
    "bert": "bert", "roberta": "roberta", "xlm-roberta": "roberta", "distilbert": "distilbert",
    "electra": "electra",
}  # fmt: skip

_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|tokens_embed|embeddings)"
    r"\.weight$"
)
_HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|proj_out|cls\.predictions\.decoder|lm_head\.decoder|vocab_projector"
    r"|generator_lm_head|predictions\.decoder)\.weight$"
)
_HEAD_NAMES = {
    **dict.fromkeys(("bert", "deberta", "deberta-v2", "mobilebert"), "cls.predictions.decoder"),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert", "mpnet"), "lm_head.decoder"),
    "whisper": "proj_out", "distilbert": "vocab_projector", "electra": "generator_lm_head",
    "albert": "predictions.decoder", "gpt_neox": "embed_out",
}  # fmt: skip
_MASKED_CLASS = re.compile(r"(ForMaskedLM|ForPreTraining)$")
LM_CLASS = re.compile(
    r"(ForCausalLM|LMHeadModel|ForConditionalGeneration|ForMaskedLM|ForPreTraining)$"
)

#: Architectures that tie unless config.json says otherwise (only such configs leave the flag out).
_TIED_BY_DEFAULT = {"gpt2", "opt", "bloom", "bert", "roberta", "xlm-roberta", "whisper", "gemma",
                    "gemma2", "gpt_bigcode", "falcon", "mamba", "mamba2",
                    "falcon_mamba"}  # fmt: skip

#: Names under which encoder-decoder models reach their one shared matrix.
_SHARED = re.compile(r"(^|\.)(shared|encoder\.embed_tokens|decoder\.embed_tokens|lm_head)\.weight$")

#: Buffers of old checkpoints that no current model reads. They are carried over as they are: some
#: hold -inf or -1e9 by design, and casting a frequency table would only damage it.
LEGACY_BUFFER = re.compile(r"(^|\.)(masked_bias|inv_freq|(attn|attention)\.bias)$")

Naming = Callable[[str], str]


def is_legacy_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """True for causal masks and frequency tables that were saved although they are constants.

    `attn.bias` is one only with the mask's shape `[1, 1, n, n]`; elsewhere it is a real bias.
    """
    if name.endswith((".attn.bias", ".attention.bias")):
        return len(shape) == 4 and shape[:2] == (1, 1)
    return LEGACY_BUFFER.search(name) is not None


class Layout:
    """The names and orientations of one base, as seen from the adapters given to it."""

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self.tied = _find_tied(base)
        #: Where each architecture's modules are: models of several parts have a config for each.
        self._model_types = [("", base.model_type)] + [
            ("" if key.endswith("_config") else f"{key}.", str(value.get("model_type")))
            for key, value in base.config.items()
            if isinstance(value, dict)
        ]

    def choose_naming(self, names: Iterable[str]) -> Naming:
        """The renaming from adapter names to base names that places the most of `names`.

        Candidates, in this order: as they are; the architecture's renames; each of these with a
        leading component taken off or put before. The first that places all of them wins, else the
        one that places most.
        """
        wanted = list(names)
        best: Naming = _identity
        most = -1
        for naming in self._candidates(wanted):
            placed = sum(self.has(naming(name)) for name in wanted)
            if placed > most:
                best, most = naming, placed
            if placed == len(wanted):
                break
        return best

    def has(self, name: str) -> bool:
        """True if the base holds `name`, or ties it to a tensor it holds."""
        return name in self.base.tensors or (self.tied is not None and name == self.tied.head)

    def _candidates(self, names: list[str]) -> Iterable[Naming]:
        renames: list[Naming] = [_identity]
        for key in (self.base.model_type, ""):
            if key in _RENAMES:
                renames.append(_substitute(_RENAMES[key]))
        heads = {name.partition(".")[0] for name in names}
        roots = Counter(name.partition(".")[0] for name in self.base.tensors)
        yield from renames
        for root in sorted(heads - roots.keys()):
            for rename in renames:
                yield _strip(root + ".", rename)
        for root, _count in roots.most_common(3):
            for rename in renames:
                yield _add(root + ".", rename)

    def is_transposed(self, path: str, fan_in_fan_out: bool, square: bool) -> bool:
        """Whether the weight of the linear module at `path` is stored `[in, out]`.

        Where the base has no config.json to name its architecture, PEFT's `fan_in_fan_out` is asked
        (it is unreliable for single modules, but only wrong where shapes would show it), unless
        the matrix is square: then nothing could ever show the mistake, so BaseError is raised.
        """
        if self.base.model_type:
            return any(
                path.startswith(prefix) and re.search(_CONV1D[kind], path)
                for prefix, kind in self._model_types
                if kind in _CONV1D
            )
        if fan_in_fan_out and square:
            raise BaseError(
                f"{self.base.label}: {path} is square and the adapter says fan_in_fan_out, but "
                "without config.json there is no telling whether the weight is stored [in, out].",
                "Put the base's config.json (with its model_type) beside the weights.",
            )
        return fan_in_fan_out

    def shared_alias(self, name: str) -> bool:
        """True for names of the matrix that encoder-decoder models share between three places."""
        if name in self.base.tensors and self.base.config.get("tie_word_embeddings") is False:
            return name.endswith("shared.weight")
        has_shared = any(n in self.base.tensors for n in ("shared.weight", "model.shared.weight"))
        return has_shared and _SHARED.search(name) is not None


@dataclass(frozen=True)
class Tied:
    """An output head that is the input embedding's matrix, by config and not by file.

    `head_on_disk` is set where the file holds the head too, as a copy. `certain` is False where the
    base was saved without its head, so that only the adapter tells whether there is one.
    `separable` is False for masked-language-model heads, which share their bias too and which
    config.json cannot untie.
    """

    embedding: str
    head: str
    head_on_disk: bool
    certain: bool
    separable: bool


def in_memory(model: Checkpoint) -> Naming:
    """From names on disk to those of the class in config.json, as transformers 5 and PEFT see it.

    Some models were saved without their head, and so without the name under which the class with
    the head holds them.
    """
    rename = _substitute([*_IN_MEMORY.get(model.model_type, []), *_IN_MEMORY[""]])
    root = _ROOTS.get(model.model_type, "")
    architectures = [str(name) for name in model.config.get("architectures") or []]
    headless = not architectures or any(name.endswith("Model") and "LMHead" not in name
                                        for name in architectures)  # fmt: skip
    if not root or headless or any(name.startswith(f"{root}.") for name in model.tensors):
        return rename

    def rooted(name: str) -> str:
        inside = _HEAD.search(name) is None and not name.startswith(f"{root}.")
        return f"{root}.{rename(name)}" if inside else rename(name)

    return rooted


def has_unknown_names(model: Checkpoint) -> bool:
    """Whether transformers 5 may hold the modules of this model under names not known here."""
    config = model.config
    mixed = "vision_config" in config and ("text_config" in config or "llm_config" in config)
    return model.model_type in _RENAMED or (mixed and model.model_type not in _PLAIN_PAIRS)


def _find_tied(base: Checkpoint) -> Tied | None:
    """The tied pair of a base with a language-model head; None where nothing is tied."""
    text_config = base.config.get("text_config")
    flag = base.config.get("tie_word_embeddings")
    if flag is None and isinstance(text_config, dict):
        flag = text_config.get("tie_word_embeddings")
    architectures = base.config.get("architectures")
    architectures = architectures if isinstance(architectures, list) else []
    has_head = any(LM_CLASS.search(str(name)) for name in architectures)
    embeddings = [n for n in base.tensors if _EMBEDDING.search(n)]
    heads = [n for n in base.tensors if _HEAD.search(n)]
    headless = bool(architectures) and all(str(a).endswith("Model") for a in architectures)
    if flag is False or not (has_head or headless) or len(embeddings) != 1:
        return None
    if heads and flag is None and base.model_type not in _TIED_BY_DEFAULT:
        # Two matrices on disk and nothing said about tying: they are two.
        return None
    name = _HEAD_NAMES.get(base.model_type, "lm_head") + ".weight"
    masked = any(_MASKED_CLASS.search(str(name)) for name in architectures)
    head = heads[0] if heads else name
    separable = not masked and head.split(".")[-2] in ("lm_head", "embed_out", "proj_out")
    return Tied(embeddings[0], head, bool(heads), has_head, separable)


def _identity(name: str) -> str:
    return name


def _substitute(rules: list[tuple[str, str]]) -> Naming:
    def rename(name: str) -> str:
        for pattern, replacement in rules:
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        return name

    return rename


def _strip(prefix: str, then: Naming) -> Naming:
    return lambda name: then(name.removeprefix(prefix))


def _add(prefix: str, then: Naming) -> Naming:
    return lambda name: then(prefix + name)
