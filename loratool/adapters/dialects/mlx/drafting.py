"""An adapter of any dialect as mlx-lm loads it: one rank, one scale, experts of a layer stacked.

mlx-lm gives every module of `keys` the rank and the scale of its config, and refuses factors of
other shapes; `num_layers` -1 and full paths as keys leave the choice to the file
(mlx_lm/tuner/utils.py, `load_adapters`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.drafting import (
    Fitted,
    common_rank,
    common_scale,
    fitted,
    known_scale,
    low_rank,
    refuse_all,
)
from loratool.adapters.dialects.mlx.names import expert_path, mlx_name, mlx_stack, name_on_hub
from loratool.adapters.dialects.stackparts import StackParts
from loratool.adapters.dialects.writing import Asked, Draft
from loratool.adapters.experts import ExpertStack
from loratool.adapters.factors import Factors, LowRank
from loratool.models.layouts.names import LANGUAGE_HEAD, is_lookup, is_token_embedding
from loratool.models.layouts.tying import head_of
from loratool.notices import Notice
from loratool.storage.composed import joined, transposed
from loratool.storage.filenames import ADAPTER_CONFIG
from loratool.storage.tensors import TensorInfo

_WEIGHTS = "adapters.safetensors"
_NO_PLACE = {
    "replaced": "MLX loads whole tensors or factors, and not both",
    "rows": "MLX has no adapters of single tokens",
    "functions": "MLX has LoRA and DoRA only; merge it, and extract a LoRA from the result",
}
_TIED = (
    "MLX changes embedding and head alike where they are one matrix, as in this base, and the "
    "adapter changes one of them"
)


@dataclass(frozen=True)
class _Piece:
    """A pair that is written, at a path of mlx-lm's, as one expert of a stack if `expert` is not
    None. Its own path is what its fate is called."""

    path: str
    expert: int | None
    pair: LowRank


def mlx_draft(adapter: Adapter, asked: Asked) -> Draft:
    """Refuses what has no place: convolutions, biases, whole tensors, magnitudes of columns."""
    draft = Draft("safetensors", _WEIGHTS, metadata={**adapter.metadata, "format": "mlx"})
    refuse_all(draft, adapter, _NO_PLACE)
    model_type = asked.base.model_type if asked.base is not None else ""
    mirrored = _settle_ties(draft, adapter, asked)
    parts = StackParts(adapter, asked.base)
    dora = any(module.magnitude is not None for module in adapter.modules.values())
    pieces: list[_Piece] = []
    refused = {fate.what for fate in draft.fates}
    for path, module in adapter.modules.items():
        if path in refused or path in mirrored:
            continue
        why, found = _pieces(path, module, parts, model_type)
        why = why or _why_not(module, dora)
        if why:
            draft.refuse(path, why)
        else:
            pieces += found
    layers = [piece for piece in pieces if piece.expert is None]
    stacks: dict[str, list[_Piece]] = defaultdict(list)
    for piece in pieces:
        if piece.expert is not None:
            stacks[piece.path].append(piece)
    rank = common_rank([piece.pair for piece in pieces])
    scale = common_scale([piece.pair for piece in pieces])
    for piece in layers:
        _add_layer(draft, piece, rank, scale, asked.dtype, model_type)
    for path, own in stacks.items():
        _add_stack(draft, path, own, rank, scale, asked.dtype, model_type)
    for head, embedding in mirrored.items():
        draft.pieces[head] = adapter.modules[head]  # type: ignore[assignment]
        draft.fates.append(replace(_fate(draft, embedding), what=head, detail="as its embedding"))
    keys = sorted({piece.path for piece in pieces})
    draft.documents[ADAPTER_CONFIG] = _config(adapter, rank, scale, keys, dora)
    return draft


def _config(
    adapter: Adapter, rank: int, scale: float, keys: list[str], dora: bool
) -> dict[str, Any]:
    named = {"model": adapter.declared.base_name} if adapter.declared.base_name else {}
    return {
        **named,
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys},
    }


def _pieces(
    path: str, module: Factors, parts: StackParts, model_type: str
) -> tuple[str, list[_Piece]]:
    """The pairs that a module is written as, or why it is not."""
    if isinstance(module, ExpertStack):
        experts = parts.of_stack(path, module)
        if isinstance(experts, str):
            return experts, []
    else:
        pair = low_rank(module)
        if pair is None:
            return "its change is no product of two factors", []
        name = parts.hub_path(module)
        if name is None:
            return "the base holds its weight as a part of another, or in parts", []
        if (place := mlx_stack(name, model_type)) is None:
            return "", [_Piece(mlx_name(name, model_type), None, pair)]
        experts = {name: pair}
    found = []
    for name, pair in experts.items():
        place = mlx_stack(name, model_type)
        if place is None:
            return f"mlx-lm has no stack for {name}", []
        found.append(_Piece(*place, pair))
    return "", found


def _why_not(module: Factors, dora: bool) -> str:
    """Why MLX has no place for a module; "" where it has. `dora` says that some have magnitudes."""
    if module.kind not in ("linear", "embedding", "experts"):
        return "MLX has adapters of linear layers, embeddings and experts only"
    if module.bias is not None:
        return "MLX has no biases beside factors"
    if dora and module.kind == "experts":
        return "MLX has no magnitudes of experts, and gives all modules magnitudes or none"
    if dora and module.magnitude is None:
        return "MLX gives all modules magnitudes (DoRA) or none, and this one has none"
    if module.magnitude is None:
        return ""
    if module.kind == "embedding":
        return "its magnitudes are of the embedding's columns, and MLX's are of tokens"
    if module.magnitude.numel != module.shape[0]:
        return "its magnitudes are not of the rows of the weight, and MLX's are"
    return ""


def _settle_ties(draft: Draft, adapter: Adapter, asked: Asked) -> dict[str, str]:
    """Heads that MLX changes by themselves along with an embedding, and that embedding.

    Refuses a change of one matrix alone, where both are one and MLX can only change both.
    """
    mirrored = {}
    for path, module in adapter.modules.items():
        if LANGUAGE_HEAD.search(f"{path}.weight") and asked.base is not None:
            embeddings = [p for p in adapter.modules if is_token_embedding(f"{p}.weight")]
            if head_of(asked.base, "model.embed_tokens") == path and not embeddings:
                draft.refuse(path, _TIED)
        if not is_token_embedding(f"{path}.weight"):
            continue
        if asked.base is None:
            if adapter.declared.ties_head:
                draft.refuse(path, "whether embedding and head are one matrix depends on --base")
            else:
                text = (
                    "MLX changes an output head along with the token embedding where both are one "
                    "matrix (tie_word_embeddings), and the adapter has factors of the embedding. "
                    "--base refuses what would be changed."
                )
                draft.notices.append(Notice("tied-embedding", text, path))
            continue
        head = head_of(asked.base, path)
        if head is not None and not _is_mirrored(module, adapter.modules.get(head)):
            draft.refuse(path, _TIED)
        elif head is not None:
            mirrored[head] = path
    return mirrored


def _is_mirrored(embedding: Factors, head: Factors | None) -> bool:
    """Whether a head's factors make the same change of the one matrix."""
    both = embedding.left_right(), head.left_right() if head is not None else None
    if head is None or both[0] is None or both[1] is None or head.scale != embedding.scale:
        return False
    b, a = both[0]
    if embedding.kind == "embedding":
        a, b = b.T, a.T
    return np.array_equal(b, both[1][0]) and np.array_equal(a, both[1][1])


def _fit(pair: LowRank, rank: int, scale: float, dtype: str | None) -> Fitted:
    """The factors at this rank and scale; in float32 where 16 bits would round the scale off."""
    found = fitted(pair, rank, scale, dtype)
    if dtype is None and known_scale(pair) != scale and found.fate.outcome == "rounded":
        found = fitted(pair, rank, scale, "F32")
    return found


def _add_layer(
    draft: Draft, piece: _Piece, rank: int, scale: float, dtype: str | None, model_type: str
) -> None:
    pair, path = piece.pair, piece.path
    found = _fit(pair, rank, scale, dtype)
    a, b = transposed(found.a), transposed(found.b)
    if pair.kind == "linear" and is_lookup(path):
        a, b = found.b, found.a  # [vocab, r] and [r, dim]
    draft.tensors[f"{path}.lora_a"], draft.tensors[f"{path}.lora_b"] = a, b
    if pair.magnitude is not None:
        draft.tensors[f"{path}.m"] = _flat(pair.magnitude)
    draft.pieces[name_on_hub(path, model_type)] = pair
    draft.fates.append(found.fate)


def _flat(magnitude: TensorInfo) -> TensorInfo:
    if len(magnitude.shape) == 1:
        return magnitude
    return joined(magnitude.name, (magnitude.numel,), [magnitude])


def _add_stack(
    draft: Draft,
    path: str,
    pieces: Sequence[_Piece],
    rank: int,
    scale: float,
    dtype: str | None,
    model_type: str,
) -> None:
    """The pairs of all experts of a layer as `lora_a [E, r, in]` and `lora_b [E, out, r]`."""
    by_number = {piece.expert: piece.pair for piece in pieces}
    missing = next((i for i in range(len(pieces)) if i not in by_number), None)
    shapes = {pair.shape for pair in by_number.values()}
    if missing is not None or len(shapes) > 1:
        unlike = f"expert {missing} has no factors" if missing is not None else "shapes differ"
        for what in dict.fromkeys(piece.pair.path for piece in pieces):
            draft.refuse(what, f"MLX has all experts of a layer in one stack, and {unlike}")
        return
    dtypes = {t.dtype for pair in by_number.values() for t in (pair.a, pair.b)}
    common = dtype or (None if len(dtypes) == 1 else "F32")
    found = [_fit(by_number[i], rank, scale, common) for i in range(len(pieces))]
    if len({t.dtype for one in found for t in (one.a, one.b)}) > 1:
        found = [_fit(by_number[i], rank, scale, "F32") for i in range(len(pieces))]
    out, width = shapes.pop()
    count = len(found)
    names = f"{path}.lora_a", f"{path}.lora_b"
    draft.tensors[names[0]] = joined(names[0], (count, rank, width), [one.a for one in found])
    draft.tensors[names[1]] = joined(names[1], (count, out, rank), [one.b for one in found])
    for number in range(count):
        draft.pieces[str(expert_path(path, number, model_type))] = by_number[number]
    draft.fates += {one.fate.what: one.fate for one in found}.values()


def _fate(draft: Draft, what: str) -> Any:
    return next(fate for fate in draft.fates if fate.what == what)
