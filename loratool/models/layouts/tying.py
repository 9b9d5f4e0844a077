"""Heads that are their embedding's matrix, told by architecture and config."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.models.checkpoint import Checkpoint
from loratool.models.layouts.holding import Holdings
from loratool.models.layouts.names import (
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


def head_of(base: Checkpoint, path: str) -> str | None:
    """The path of the output head that is the same matrix as the token embedding at `path`; None
    where it has one of its own, or nothing is known of a head."""
    tied = find_tied(base, Holdings(base.tensors, base.config))
    if tied is None or not tied.certain or path.split(".")[-1] != tied.embedding.split(".")[-2]:
        return None
    return tied.head.removesuffix(".weight")


def find_tied(base: Checkpoint, holdings: Holdings) -> Tied | None:
    """The tied pair of a base with a language-model head; None where nothing is tied.

    The table has the names of both in memory; a model that it lacks, or that was saved without the
    name of its part, has them by their usual names.
    """
    flag = base.config.get("tie_word_embeddings")
    if flag is None:
        flag = (base.config.get("text_config") or {}).get("tie_word_embeddings")
    architectures = base.config.get("architectures") or []
    has_head = any(LM_CLASS.search(name) for name in architectures)
    entry = holdings.names.entry
    in_memory = f"{entry.head}.weight"
    if holdings.names.is_known and in_memory not in dict(entry.tied):
        return None  # its class ties other matrices, if any
    embedding = holdings.same(dict(entry.tied).get(in_memory, f"{entry.embedding}.weight"))
    if embedding is not None:
        embeddings = [embedding.name]
        known = holdings.same(in_memory)
        heads = [] if known is None else [known.name]
    else:
        embeddings = [n for n in base.tensors if TOKEN_EMBEDDING.search(n)]
        heads = [n for n in base.tensors if LANGUAGE_HEAD.search(n)]
    headless = bool(architectures) and all(a.endswith("Model") for a in architectures)
    if flag is False or not (has_head or headless) or len(embeddings) != 1:
        return None
    if heads and flag is None and base.model_type not in TIED_BY_DEFAULT:
        # Two matrices on disk and nothing said about tying: they are two.
        return None
    name = heads[0] if heads else _name_in_files(in_memory, embeddings[0], holdings)
    masked = any(MASKED_CLASS.search(name) for name in architectures)
    usual = name.split(".")[-2] in ("lm_head", "embed_out", "proj_out")
    shares_bias = any(tied.endswith(".bias") for tied, _ in entry.tied)
    separable = not masked and (usual or (embedding is not None and not shares_bias))
    return Tied(embeddings[0], name, bool(heads), has_head, separable)


def other_ties(base: Checkpoint, holdings: Holdings, main: Tied | None) -> dict[str, str]:
    """Matrices that are another tensor beside the head, as in BLIP and LUKE: their names, which no
    file has, and the tensor that each is.

    Those that more than two names have together (T5, SeamlessM4T) are none of them.
    """
    if base.config.get("tie_word_embeddings") is False:
        return {}
    pairs = holdings.names.entry.tied
    found = {}
    for name, of in pairs:
        there = holdings.same(of)
        alone = sum(other == of for _, other in pairs) == 1
        if name.endswith(".weight") and there is not None and alone and name not in holdings:
            found[name] = there.name
    if main is not None:
        found.pop(main.head, None)
        found = {name: of for name, of in found.items() if of != main.embedding}
    return found


def _name_in_files(head: str, embedding: str, holdings: Holdings) -> str:
    """How a head that the files do not hold is called there, if their names are not memory's."""
    segments = holdings.names.segments
    beside = f"{embedding.partition('.')[0]}.lm_head.weight"
    for name in ("embed_out.weight", beside):
        if name != head and [s.memory for s in segments(name)] == [head]:
            return name
    return head
