"""Names that files have in the folders of models and adapters, each written here once."""

from __future__ import annotations

import re
from collections.abc import Iterable

#: The config of a model, and the file that says which tensor lies in which shard.
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"

#: A model in one file.
MODEL = "model.safetensors"

#: What a model directory is looked for: the first that is there is what transformers loads
#: (modeling_utils.py, `_get_resolved_checkpoint_files`).
MODEL_ENTRIES = (MODEL, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")

#: The same of Meta's and Mistral's own files, which transformers passes over where others are.
PARAMS = "params.json"
NATIVE = "consolidated.safetensors"
NATIVE_ENTRIES = (NATIVE, "consolidated.safetensors.index.json", "consolidated.00.pth")
#: One of the parts that Meta's models are in for several GPUs.
NATIVE_PART = re.compile(r"consolidated\.(?P<number>\d\d)\.pth")

#: Adapters as litgpt saves them, beside the model that it has merged; and as torchtune does, beside
#: its export for PEFT.
LITGPT = "lit_model.pth.lora"
LITGPT_MERGED = "lit_model.pth"
TORCHTUNE = re.compile(r"adapter_(model|\d+)\.pt")

#: The config and the weights of an adapter; the first of the weights that exists is read.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_MODEL = "adapter_model.safetensors"
ADAPTER_ENTRIES = (
    ADAPTER_MODEL, "adapter_model.bin", "adapters.safetensors", "adapters.npz", LITGPT,
    "lora.safetensors",
)  # fmt: skip
#: The indexes of adapters in shards.
ADAPTER_INDICES = ("adapter_model.safetensors.index.json", "adapter_model.bin.index.json")

#: The name of one of several files that hold a model or an adapter together.
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(safetensors|bin)")

#: The value head of reinforcement learning (TRL, LLaMA-Factory), beside an adapter or a model: no
#: part of the language model, but read by those who train on.
VALUE_HEAD = re.compile(r"(value_head|v_head)\.(bin|pt|pth|safetensors)")

#: Files with a vocabulary: a folder with one of them brings a tokenizer.
VOCABULARY = re.compile(
    r"tokenizer\.json|tokenizer\.model(\.v\d+)?|vocab\.(json|txt|bpe)|(spiece|sentencepiece\.bpe|"
    r"spm|source|target)\.(model|spm)|tekken\.json|.+\.tiktoken|tiktoken\.model"
)
#: All files of a tokenizer, and what lies beside one: how its inputs are made, how texts are.
TOKENIZER = re.compile(
    rf"({VOCABULARY.pattern}|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|"
    r"merges\.txt|bpe\.codes|normalizer\.json|chat_template\.(jinja|json)|"
    r"additional_chat_templates/[^/]+\.jinja)$"
)
PROCESSOR = re.compile(
    r"((image_|video_|feature_)?(pre)?processor_config|video_preprocessor_config|"
    r"(image_processor|feature_extractor)_config)\.json$"
)
GENERATION = re.compile(r"generation_config\.json$")
#: What must go along with a model wherever it goes.
LEGAL = re.compile(
    r"(.*[-_ ])?(licen[cs]e|notice|copying|copyright|us(e|age)[-_ ]?policy|prohibited[-_ ]?uses?|"
    r"terms([-_ ]of[-_ ]use)?)([-_ ].*)?(\.(txt|md|rst|pdf|html))?",
    re.IGNORECASE,
)
#: Of a sentence-transformers model: what its parts are, and how they are used.
SENTENCE_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")

#: What a training run needs to go on, and nobody else: no weights of a model.
OF_A_RUN = re.compile(
    r"(training_args|custom_optimizer|scheduler|lr_scheduler|scaler|sampler|dl_state_dict|"
    r"random_states?|rng_state|training_state)([._-].*)?\.(pt|pth|bin|pkl|safetensors)"
    r"|(optimizer|optim_states).*|(rng_state|random_states).*|events\.out\.tfevents.*"
    r"|.*_(optim_states|model_states|rng_state)\.pt|.*\.distcp|\d{7}_adapters\.(safetensors|npz)"
)

#: Endings of files that torch pickles; the last is that of litgpt's adapters.
TORCH_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".lora"})
#: Of zip archives of NumPy arrays, and of the container of llama.cpp.
NPZ_SUFFIX = ".npz"
GGUF_SUFFIX = ".gguf"
#: Endings of all files with weights.
WEIGHTS_SUFFIXES = TORCH_SUFFIXES | {".safetensors", NPZ_SUFFIX, GGUF_SUFFIX}

#: What tools write beside a quantised model of how it was made and is stored.
QUANTISATION = (
    "hf_quant_config.json", "recipe.yaml", "quantize_config.json", "quant_config.json",
    "quantization_config.json",
)  # fmt: skip

#: How an output came about; written by every command that makes one.
PROVENANCE = "loratool.json"

#: Where the undo file of a reversible merge lies in an output: in a folder of its own, because
#: programs that load a model take every safetensors file beside it for weights.
UNDO_FOLDER = "loratool"
UNDO = "undo.safetensors"
#: What the base had of these itself, because it was the result of a reversible merge.
BEFORE = "before"

#: What systems leave in every folder that somebody looks into, or downloads.
_LITTER = {".DS_Store", "Thumbs.db", "desktop.ini", ".gitattributes"}
_OF_A_MODEL = re.compile(
    r"(adapter_|pytorch_)?model\.(safetensors|bin)|(consolidated|lora)\.safetensors"
    rf"|adapters\.(safetensors|npz)|{TORCHTUNE.pattern}|{re.escape(LITGPT)}|[^/]+\.gguf"
    r"|(hyperparameters|model_config)\.yaml|.*\.(safetensors|bin)\.index\.json"
    rf"|{SHARD.pattern}|{VALUE_HEAD.pattern}|{UNDO_FOLDER}/.+"
    r"|\d+_[A-Z]\w*/[^/]+\.(json|safetensors|bin|txt)"
)


def needs_index(shards: Iterable[str]) -> bool:
    """Whether an index must say which tensor of a model lies in which of its files."""
    return list(shards) not in ([MODEL], [NATIVE])


def shard_names(count: int) -> list[str]:
    """What the files of a model are called that is written in so many."""
    if count == 1:
        return [MODEL]
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def is_of_a_model(name: str) -> bool:
    """Whether a file by this relative path is a usual part of a model or of an adapter."""
    named = {CONFIG, PARAMS, ADAPTER_CONFIG, PROVENANCE, *SENTENCE_FILES, *QUANTISATION, *_LITTER}
    return name in named or any(
        pattern.fullmatch(name)
        for pattern in (_OF_A_MODEL, TOKENIZER, PROCESSOR, GENERATION, LEGAL)
    )
