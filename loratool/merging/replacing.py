"""Tensors that an adapter replaces whole: trained heads, biases, embeddings, routers."""

from __future__ import annotations

from collections import defaultdict

from loratool.adapters.adapter import Adapter
from loratool.merging.match import Match, no_such, outside_of
from loratool.models.layouts.assembly import assembled, rest_of
from loratool.models.layouts.holding import Holdings
from loratool.models.layouts.layout import Layout
from loratool.models.layouts.names import is_value_head, is_vocabulary, is_vocabulary_bias
from loratool.models.layouts.parameter import MisfitError
from loratool.models.tasks import CLASSIFYING
from loratool.storage.tensors import TensorInfo


def place_replaced(found: Match, layout: Layout) -> None:
    """Find for each tensor that the adapter replaces the one whose place it takes."""
    base = layout.base
    elsewhere: dict[str, TensorInfo] = {}
    for name, info in found.adapter.replaced.items():
        target_name = found.naming(name)
        target_name = layout.name_of(target_name) or layout.name_of(name) or target_name
        target = base.tensors.get(target_name)
        if target is None and target_name in layout.aliases:
            target = base.tensors[layout.aliases[target_name]].renamed(target_name)
        if target is None and layout.has(target_name):
            elsewhere[target_name] = info
        elif target is None and (_is_saved_head(found.adapter, name) or is_value_head(name)):
            found.added[name] = info
        elif not layout.admits(target_name):
            found.unmatched.append((info.name, outside_of(target_name, layout)))
        elif target is None:
            found.unmatched.append((info.name, no_such(found, target_name, base)))
        elif reason := _replacement_misfit(found.adapter, name, info, target):
            found.unmatched.append((info.name, reason))
        else:
            found.replaced[target.name] = info
    if elsewhere:
        _place_parts(found, layout, elsewhere)


def _place_parts(found: Match, layout: Layout, replaced: dict[str, TensorInfo]) -> None:
    """Put tensors together that the base cuts otherwise: all experts of a stack, a part of a qkv.

    What the adapter does not replace of such a tensor is the base's own.
    """
    segments = layout.holdings.names.segments
    sources: dict[str, list[str]] = defaultdict(list)
    for name in replaced:
        for segment in segments(name):
            sources[segment.memory].append(name)
    for name, info in layout.base.tensors.items():
        used = {source for s in segments(name) for source in sources.get(s.memory, ())}
        if not used:
            continue
        if not layout.admits(name):
            found.unmatched.append((name, outside_of(name, layout)))
            continue
        try:
            pieces = {key: replaced[key] for key in used}
            pieces |= rest_of(layout.holdings, name, sources)
            pieces = {key: piece.renamed(key) for key, piece in pieces.items()}
            own = Holdings(pieces, layout.base.config)
            found.replaced[name], _ = assembled(own, name, info.shape, layout.holdings)
        except MisfitError as error:
            found.unmatched.append((name, f"the adapter replaces a part of it, and {error}"))


def place_functions(found: Match, layout: Layout) -> None:
    """Put in the place of each weight that a function changes what the function makes of it."""
    for path, function in found.adapter.functions.items():
        name = found.naming(function.weight_name)
        name = layout.name_of(name) or name
        # What the adapter replaces it changes as it is then.
        target = found.replaced.get(name) or layout.base.tensors.get(layout.aliases.get(name, name))
        if not layout.admits(name):
            found.unmatched.append((path, outside_of(name, layout)))
        elif target is None and function.optional and not layout.has(name):
            continue
        elif target is None:
            reason = f"{function.algorithm} is known for weights that are one tensor, and the base "
            reason += f"holds {name} otherwise"
            found.unmatched.append(
                (path, reason if layout.has(name) else no_such(found, name, layout.base))
            )
        else:
            flag, matrix = found.adapter.declared.transposes, len(target.shape) == 2
            square = matrix and target.shape[0] == target.shape[1]
            transposed = matrix and layout.is_transposed(name.rpartition(".")[0], flag, square)
            try:
                changed = function.applied(target, transposed)
            except MisfitError as error:
                found.unmatched.append((path, str(error)))
            else:
                found.replaced[name] = changed
                found.computed.add(name)


def _replacement_misfit(adapter: Adapter, name: str, info: TensorInfo, target: TensorInfo) -> str:
    """Why `info` cannot take the place of `target`; "" where it can.

    A trained head may have another number of classes. An embedding may have grown, or lost the
    padding of its vocabulary (less than a tenth), but fewer rows than that are not an embedding.
    """
    if info.is_float != target.is_float:
        return f"it is {info.dtype}, {target.name} is {target.dtype}"
    if info.shape == target.shape:
        return ""
    same_width = len(info.shape) == len(target.shape) and info.shape[1:] == target.shape[1:]
    if not same_width:
        return f"it is {list(info.shape)}, {target.name} is {list(target.shape)}"
    if is_vocabulary(name) or is_vocabulary_bias(name):
        if info.shape[0] * 10 >= target.shape[0] * 9:
            return ""
        if _is_saved_head(adapter, name) and adapter.declared.task in CLASSIFYING:
            return ""  # a classifier that is called like a language model's head
        return (
            f"it has {info.shape[0]} rows, {target.name} has {target.shape[0]}: perhaps only the "
            "added tokens were saved. Save the whole embedding (modules_to_save)"
        )
    if _is_saved_head(adapter, name):
        return ""
    return f"it is {list(info.shape)}, {target.name} is {list(target.shape)}"


def _is_saved_head(adapter: Adapter, name: str) -> bool:
    # The names are endings: "classifier" saves "pre_classifier" too.
    parts = name.split(".")
    parents = [".".join(parts[:i]) for i in range(1, len(parts))]
    return any(parent.endswith(module) for parent in parents for module in adapter.declared.heads)
