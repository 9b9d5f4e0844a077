"""What litgpt says beside the factors: hyperparameters.yaml and model_config.yaml.

The first holds the command's arguments, the second the model as litgpt describes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loratool.errors import AdapterError
from loratool.models.heads import Heads, heads_of
from loratool.storage.fields import ABSENT, BOOLEAN, COUNT, NUMBER, TEXT, check_fields
from loratool.storage.folder import Folder

HYPERPARAMETERS = "hyperparameters.yaml"
MODEL_CONFIG = "model_config.yaml"
#: Which modules have factors: those of qkv in the order of their rows, then the others.
QKV_FLAGS = ("lora_query", "lora_key", "lora_value")
OTHER_FLAGS = ("lora_projection", "lora_mlp", "lora_head")

_OF_RUN = {
    "lora_r": COUNT | ABSENT, "lora_alpha": NUMBER | ABSENT, "checkpoint_dir": TEXT | ABSENT,
    **dict.fromkeys((*QKV_FLAGS, *OTHER_FLAGS), BOOLEAN | ABSENT),
}  # fmt: skip
_OF_MODEL = {
    **dict.fromkeys(("n_head", "n_query_groups", "n_embd", "head_size"), COUNT | ABSENT),
    "name": TEXT | ABSENT, "mlp_class_name": TEXT | ABSENT,
}  # fmt: skip


@dataclass(frozen=True)
class LitConfig:
    """The two files, {} for one that is not there."""

    run: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)

    @property
    def alpha(self) -> float | None:
        return self.run.get("lora_alpha") if self.run.get("lora_r") else None

    @property
    def enabled(self) -> tuple[bool, ...] | None:
        """Which of q, k and v have factors; None where it does not say."""
        if not any(flag in self.run for flag in QKV_FLAGS):
            return None
        return tuple(bool(self.run.get(flag)) for flag in QKV_FLAGS)

    @property
    def heads(self) -> Heads | None:
        """As litgpt fills in what is not there (litgpt/config.py)."""
        said = {
            "num_attention_heads": self.model.get("n_head"),
            "num_key_value_heads": self.model.get("n_query_groups"),
            "head_dim": self.model.get("head_size"),
            "hidden_size": self.model.get("n_embd"),
        }
        return heads_of(said)


def is_of_litgpt(folder: Folder) -> bool:
    """Whether a run of litgpt's saved this folder."""
    return folder.has(HYPERPARAMETERS) and "lora_r" in folder.yaml(HYPERPARAMETERS)


def lit_config(folder: Folder) -> LitConfig:
    """Raises AdapterError for a field of a wrong type, FileError for what is no YAML."""
    found = []
    for name, types in ((HYPERPARAMETERS, _OF_RUN), (MODEL_CONFIG, _OF_MODEL)):
        values = folder.yaml(name) if folder.has(name) else {}
        check_fields(values, types, folder.path / name, AdapterError)
        found.append(values)
    return LitConfig(*found)
