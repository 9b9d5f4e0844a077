"""Heads that are their embedding's matrix, told by architecture and config."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.models.checkpoint import Checkpoint
from loratool.models.layouts.names import (
    HEAD_NAMES,
    LANGUAGE_HEAD,
    LM_CLASS,
    MASKED_CLASS,
    TIED_BY_DEFAULT,
    TOKEN_EMBEDDING,
)


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


def find_tied(base: Checkpoint) -> Tied | None:
    """The tied pair of a base with a language-model head; None where nothing is tied."""
    flag = base.config.get("tie_word_embeddings")
    if flag is None:
        flag = (base.config.get("text_config") or {}).get("tie_word_embeddings")
    architectures = base.config.get("architectures") or []
    has_head = any(LM_CLASS.search(name) for name in architectures)
    embeddings = [n for n in base.tensors if TOKEN_EMBEDDING.search(n)]
    heads = [n for n in base.tensors if LANGUAGE_HEAD.search(n)]
    headless = bool(architectures) and all(a.endswith("Model") for a in architectures)
    if flag is False or not (has_head or headless) or len(embeddings) != 1:
        return None
    if heads and flag is None and base.model_type not in TIED_BY_DEFAULT:
        # Two matrices on disk and nothing said about tying: they are two.
        return None
    name = HEAD_NAMES.get(base.model_type, "lm_head") + ".weight"
    masked = any(MASKED_CLASS.search(name) for name in architectures)
    head = heads[0] if heads else name
    separable = not masked and head.split(".")[-2] in ("lm_head", "embed_out", "proj_out")
    return Tied(embeddings[0], head, bool(heads), has_head, separable)
