"""How what a card describes is used: the classes of transformers, and code that loads it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass

from loratool.adapters.adapter import Adapter
from loratool.models.checkpoint import Checkpoint
from loratool.models.layouts.names import is_label_head, is_token_embedding
from loratool.models.layouts.native import NATIVE_NAMES
from loratool.models.quantised.base import Dequantised
from loratool.models.quantised.refusals import is_plain
from loratool.models.tasks import TEXT_TO_TEXT
from loratool.publishing.cards.facts import CardFacts, address, part, texts
from loratool.serving.programs import serving_line, serving_words
from loratool.sheet import CodeBlock, Piece, code, said


@dataclass(frozen=True)
class Use:
    """The class of transformers that loads a model, and what the Hub calls its task.

    `pipeline` is None where the class alone does not say. `text` says that it reads text only, so
    that a tokenizer is all it needs.
    """

    auto: str
    pipeline: str | None = None
    text: bool = True
    certain: bool = True


_CAUSAL = Use("AutoModelForCausalLM", "text-generation")
#: Translation, summaries, answers: the class does not say which.
_TEXT_TO_TEXT = Use("AutoModelForSeq2SeqLM")
_LABELS = Use("AutoModelForSequenceClassification", "text-classification")
_TOKENS = Use("AutoModelForTokenClassification", "token-classification")
_ANSWERS = Use("AutoModelForQuestionAnswering", "question-answering")
_SEEING = Use("AutoModelForImageTextToText", "image-text-to-text", text=False)

_BY_TASK = {
    "CAUSAL_LM": _CAUSAL,
    "SEQ_2_SEQ_LM": _TEXT_TO_TEXT,
    "SEQ_CLS": _LABELS,
    "TOKEN_CLS": _TOKENS,
    "QUESTION_ANS": _ANSWERS,
    "FEATURE_EXTRACTION": Use("AutoModel", "feature-extraction"),
}
_BY_CLASS = {
    "ForCausalLM": _CAUSAL,
    "LMHeadModel": _CAUSAL,
    "ForMaskedLM": Use("AutoModelForMaskedLM", "fill-mask"),
    "ForSequenceClassification": _LABELS,
    "ForTokenClassification": _TOKENS,
    "ForQuestionAnswering": _ANSWERS,
    "ForImageClassification": Use("AutoModelForImageClassification", "image-classification", False),
    "ForSpeechSeq2Seq": Use("AutoModelForSpeechSeq2Seq", "automatic-speech-recognition", False),
}
#: What loads the dialects that are not PEFT's, and its command line.
_PROGRAMS = {
    "mlx": ("mlx-lm", "mlx_lm.generate --model {base} --adapter-path {place} --prompt Hello"),
    "gguf": ("llama.cpp", "llama-cli -m base.gguf --lora {place}/{file} -p Hello"),
    "litgpt": ("litgpt", ""),
    "torchtune": ("torchtune", ""),
    "tinker": ("Tinker", ""),
}

#: Modules of a model that sees, and the decoder of a model that writes.
_VISION = re.compile(r"(^|\.)(visual|vision_\w+|language_model|mm_projector)(\.|$)")
_DECODER = re.compile(r"(model|transformer|gpt_neox|model\.decoder)\.(layers|h|blocks)\.\d")


def use_of(facts: CardFacts) -> Use | None:
    """How the model is loaded; None where nothing tells, or where transformers cannot."""
    if facts.model is not None:
        config = facts.model.config
        if not (config.get("model_type") or config.get("architectures")) or NATIVE_NAMES in config:
            return None
        named = texts(config.get("architectures"))
        found = _by_class(named[0] if named else "", facts.model.model_type)
        if "vision_config" in config and found in (None, _CAUSAL):
            return Use(_SEEING.auto, None, False) if found else _SEEING
        return found or Use("AutoModel", text=False, certain=bool(named))
    assert facts.adapter is not None
    return _use_of_adapter(facts, facts.adapter)


def _use_of_adapter(facts: CardFacts, adapter: Adapter) -> Use | None:
    if not adapter.declared.library:
        return None
    found = _BY_TASK.get(str(adapter.declared.task))
    if found is _CAUSAL and any(_VISION.search(path) for path in adapter.modules):
        return Use(_SEEING.auto, None, False)
    if found is not None:
        return found
    declared, base = adapter.declared, part(facts.record, "base")
    if not (declared.model_library or "transformers").startswith("transformers"):
        return None
    named = [declared.model_class, *texts(base.get("architectures"))]
    name = next(filter(None, named), "")
    found = _by_class(name, str(base.get("model_type")))
    if found is None and any(_VISION.search(path) for path in adapter.modules):
        return Use(_SEEING.auto, None, False, certain=False)
    if found is None and not name and any(_DECODER.match(path) for path in adapter.modules):
        return Use(_CAUSAL.auto, None, certain=False)
    return found or Use("AutoModel", text=False, certain=bool(name))


def _by_class(name: str, model_type: str) -> Use | None:
    """By the name of a class of transformers."""
    if name.endswith("ForConditionalGeneration"):
        if model_type == "whisper":
            return _BY_CLASS["ForSpeechSeq2Seq"]
        return _TEXT_TO_TEXT if model_type in TEXT_TO_TEXT else None
    return next((use for end, use in _BY_CLASS.items() if name.endswith(end)), None)


def how_to_use(facts: CardFacts, place: str) -> list[Piece]:
    """The code that loads it from `place`, a Hub id or a path."""
    if facts.model is not None:
        return _model_usage(facts, facts.model, place)
    assert facts.adapter is not None
    adapter = facts.adapter
    return [
        *_adapter_usage(facts, adapter, place),
        *_merging(facts, adapter, place),
        *_serving(adapter),
    ]


def _model_usage(facts: CardFacts, model: Checkpoint, place: str) -> list[Piece]:
    use = use_of(facts)
    if use is None:
        says = " here that says how to build the model of these weights."
        return [said("There is no ", code("config.json"), says)]
    tokenizer = facts.tokenizer
    lines = [
        f"from transformers import {use.auto}" + (", AutoTokenizer" if tokenizer else ""),
        "",
        f"name = {_quoted(place)}",
        f"model = {use.auto}.from_pretrained(name)",
    ]
    if tokenizer:
        lines.append("tokenizer = AutoTokenizer.from_pretrained(name)")
    pieces: list[Piece] = [CodeBlock("python", lines)]
    if isinstance(model, Dequantised) or not is_plain(model):
        needs = "Weights of it are quantised, so what loads it needs the library of that method"
        method = model.settings.method if isinstance(model, Dequantised) else ""
        named = (" (", code(method), " in its ", code("config.json"), ")") if method else ()
        pieces.append(said(needs, named, "."))
    if model.config.get("auto_map"):
        own = ("The model has code of its own, so ", code("from_pretrained"), " asks for ")
        pieces.append(said(own, code("trust_remote_code=True"), ": read that code first."))
    return pieces


def _adapter_usage(facts: CardFacts, adapter: Adapter, place: str) -> list[Piece]:
    use = use_of(facts)
    if adapter.format in _PROGRAMS:
        return _of_other_programs(facts, adapter, place)
    if not adapter.declared.library:
        names = " here names a type of PEFT's."
        return [said("PEFT cannot load this: no ", code("adapter_config.json"), names)]
    if use is None:
        base = code(adapter.declared.model_class or "its base")
        loading = code("PeftModel.from_pretrained(model, …)")
        return [said("Load the base model (", base, "), then ", loading, ".")]
    lines = [
        "from peft import PeftModel",
        f"from transformers import {use.auto}" + (", AutoTokenizer" if use.text else ""),
        "",
    ]
    if facts.base is None:
        lines.append("# Which base model this is for is not recorded: its Hub id or its folder.")
    lines += [f"base = {_quoted(facts.base or 'path/to/base')}", f"adapter = {_quoted(place)}", ""]
    if not use.certain:
        lines.append("# No task is recorded; this class fits the names of the modules.")
    options = f", revision={_quoted(facts.revision)}" if facts.revision else ""
    options += f", subfolder={_quoted(facts.subfolder)}" if facts.subfolder else ""
    labels = _rows(adapter, is_label_head) if use in (_LABELS, _TOKENS) else None
    if labels:
        options += f", num_labels={labels}"
    lines.append(f"model = {use.auto}.from_pretrained(base{options})")
    tokens = _rows(adapter, is_token_embedding)
    partial = any(notice.code == "partial-embedding-rows" for notice in adapter.notices)
    if tokens and not partial:
        # PEFT leaves the base as it is, also where the vocabulary grew in training.
        lines += [
            f"# The adapter brings an embedding of {tokens} tokens.",
            f"if model.get_input_embeddings().weight.shape[0] != {tokens}:",
            f"    model.resize_token_embeddings({tokens})",
        ]
    lines.append("model = PeftModel.from_pretrained(model, adapter)")
    if use.text:
        source = "adapter" if facts.tokenizer else "base"
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({source})")
    return [CodeBlock("python", lines)]


def _of_other_programs(facts: CardFacts, adapter: Adapter, place: str) -> list[Piece]:
    program, line = _PROGRAMS[adapter.format]
    convert = _command("loratool", "convert", place, "--to", "peft", "-o", "adapter")
    loads = f"{program} loads it as it is"
    does_not = "PEFT does not; this makes an adapter for PEFT of it:"
    if not line:
        return [said(f"{loads}, and {does_not}"), convert]
    names = {"base": facts.base or "path/to/base", "place": place, "file": adapter.weights.name}
    loading = _command(*(part.format(**names) for part in line.split()))
    return [said(f"{loads}:"), loading, said(does_not), convert]


def _rows(adapter: Adapter, fits: Callable[[str], bool]) -> int | None:
    """The number of rows of a tensor that the adapter brings whole."""
    found = [info for key, info in adapter.replaced.items() if fits(key)]
    return found[0].shape[0] if found and len(found[0].shape) == 2 else None


def _merging(facts: CardFacts, adapter: Adapter, place: str) -> list[Piece]:
    refused = any(notice.refused for notice in adapter.notices)
    known = adapter.declared.library or adapter.format in _PROGRAMS
    if not adapter.is_read or not known or refused:
        return []
    base = "path/to/base"
    if facts.base:
        base = address(facts.base, facts.revision, facts.subfolder)
    command = _command("loratool", "merge", base, place, "-o", "merged")
    return [said("To merge it into the base's weights:"), command]


def _serving(adapter: Adapter) -> list[Piece]:
    """Which programs load it as it is; nothing for what is not read."""
    words = serving_words(adapter)
    if not words:
        return []
    line = serving_line(words, everyone=True)
    return [said("As it is, by the rules of ", code("loratool lint"), f": {line}.")]


def _command(*words: str) -> CodeBlock:
    return CodeBlock("sh", [shlex.join(words)])


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
