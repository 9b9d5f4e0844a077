"""What the tensors of an MLX adapter mean: factors by module, experts one by one, whole tensors."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.mlx.config import (
    is_of_mlx,
    kind_of_training,
    lora_settings,
    scale_of,
)
from loratool.adapters.dialects.mlx.names import expert_path, is_shifted, name_on_hub, why_changed
from loratool.adapters.dialects.stacks import check_experts
from loratool.adapters.dialects.troubles import (
    refuse_empty,
    refuse_halves,
    refuse_modules,
    refuse_shapes,
    refuse_unknown,
    refuse_without_scale,
)
from loratool.adapters.factors import Kind, LowRank
from loratool.adapters.told import scaling
from loratool.models.checkpoint import Checkpoint
from loratool.models.layouts.names import CONV1D, is_lookup, is_token_embedding
from loratool.models.layouts.tying import head_of
from loratool.notices import Notice
from loratool.storage.composed import member, transposed, view
from loratool.storage.filenames import ADAPTER_CONFIG
from loratool.storage.tensors import TensorInfo

#: A factor of mlx-lm's. GGUF's are of "X.weight".
FACTOR = re.compile(r"(?P<path>.+)(?<!\.weight)\.lora_(?P<slot>[ab])")
#: The same of older versions of mlx-vlm.
OF_VLM = re.compile(r"(?P<path>.+)\.(?P<slot>[AB])")
_MAGNITUDE = re.compile(r"(?P<path>.+)\.m")

#: The tensors of one module by slot: "a", "b", "m".
_Parts = dict[str, TensorInfo]
#: Path, kind of layer, A, B and magnitude of a pair.
_Pair = tuple[str, Kind, TensorInfo, TensorInfo, TensorInfo | None]


def read_factors(adapter: Adapter, base: Checkpoint | None) -> None:
    """Fill `modules` with pairs, and `replaced` with what was trained whole beside them."""
    model_type = base.model_type if base is not None else ""
    scale, why = scale_of(adapter.config)
    halves = {}
    troubles: dict[str, list[str]] = defaultdict(list)
    for path, parts in _by_module(adapter, model_type).items():
        if not {"a", "b"} <= parts.keys():
            halves[path] = [t.name.removeprefix(f"{path}.") for t in parts.values()]
            continue
        trouble = _trouble(path, parts)
        if trouble:
            shapes = f"{path}: A {list(parts['a'].shape)}, B {list(parts['b'].shape)}"
            troubles[trouble].append(shapes)
            continue
        if len(parts["b"].shape) == 3:
            check_experts(adapter, len(adapter.modules) + parts["b"].shape[0])
        for own, kind, a, b, magnitude in _pairs(path, parts, model_type):
            if own in adapter.modules:
                adapter.unknown += [parts["a"].name, parts["b"].name]
                break
            said = scaling(adapter.told, a.shape[0], scale=scale, where=own)
            adapter.modules[own] = LowRank(
                own, kind, a, b, said.alpha, said.scale, magnitude, scale_from=said.origin
            )
    _mirror(adapter, base)
    refuse_halves(adapter, halves, "lora_a and lora_b")
    refuse_shapes(adapter, troubles)
    refuse_empty(adapter)
    refuse_without_scale(adapter, why)
    refuse_unknown(adapter)
    _refuse_unlike_config(adapter)
    _note_unused_alpha(adapter, scale)
    _refuse_changed(adapter, model_type)


def read_whole(adapter: Adapter, model_type: str) -> None:
    """Fill `replaced` with all tensors, by the names that files of the Hub have for them."""
    for name in adapter.tensors:
        _replace(adapter, name, model_type)
    refuse_empty(adapter)
    refuse_unknown(adapter)
    _refuse_changed(adapter, model_type)


def _by_module(adapter: Adapter, model_type: str) -> dict[str, _Parts]:
    """The tensors of each module. Others were trained whole, as mlx-vlm saves them too."""
    of_vlm = not is_of_mlx(adapter.config) and not any(map(FACTOR.fullmatch, adapter.tensors))
    pattern = OF_VLM if of_vlm else FACTOR
    modules: dict[str, _Parts] = defaultdict(dict)
    for name, info in adapter.tensors.items():
        found = pattern.fullmatch(name) or _MAGNITUDE.fullmatch(name)
        if found is None and ("lora_" in name or OF_VLM.fullmatch(name)):
            adapter.unknown.append(name)
        elif found is None:
            _replace(adapter, name, model_type)
        else:
            modules[found["path"]][found.groupdict().get("slot", "m").lower()] = info
    if kind_of_training(adapter.config) == "lora":
        # mlx-lm would not load magnitudes beside this config: one of the two is wrong.
        adapter.unknown += [parts.pop("m").name for parts in modules.values() if "m" in parts]
    return {path: parts for path, parts in modules.items() if parts}


def _trouble(path: str, parts: _Parts) -> str:
    """Why two tensors are no factors of a layer or of a stack of them, by its code; "" if they are.

    Those of a stack are `lora_a [E, r, in]`, `[E·r, in]` in older files, and `lora_b [E, out, r]`.
    """
    a, b = parts["a"].shape, parts["b"].shape
    if 0 in (*a, *b):
        return "zero3-placeholder"
    if len(a) == len(b) == 2:
        return ""
    if len(b) != 3 or len(a) not in (2, 3) or "m" in parts:
        return "pair-mismatch"
    if a[:-1] not in ((b[0], b[2]), (b[0] * b[2],)):
        return "pair-mismatch"
    return "" if expert_path(path, 0) else "target-parameters"


def _pairs(path: str, parts: _Parts, model_type: str) -> Iterator[_Pair]:
    """The factors of a layer, or of each expert of a stack, in the orientation of the house."""
    a, b, magnitude = parts["a"], parts["b"], parts.get("m")
    if len(b.shape) == 3:
        count, _, rank = b.shape
        stack = a if len(a.shape) == 3 else _unfolded(a, rank)
        for expert in range(count):
            own = expert_path(path, expert, model_type)
            yield str(own), "linear", member(stack, expert), member(b, expert), None
        return
    path = name_on_hub(path, model_type)
    if not is_lookup(path):
        yield path, "linear", transposed(a), transposed(b), magnitude
    elif magnitude is None:
        yield path, "embedding", transposed(a), transposed(b), None
    else:
        # Its magnitudes are of tokens, those of an embedding in PEFT are of the columns. As a layer
        # whose rows are tokens, with Δ = lora_a·lora_b, it is what MLX computes.
        yield path, "linear", b, a, magnitude


def _mirror(adapter: Adapter, base: Checkpoint | None) -> None:
    """Change the head along with an embedding that is the same matrix, as MLX does."""
    for path, module in list(adapter.modules.items()):
        if not is_token_embedding(f"{path}.weight") or not isinstance(module, LowRank):
            continue
        if base is None:
            text = (
                "MLX changes an output head along with the token embedding where both are one "
                "matrix (tie_word_embeddings). --base says whether they are."
            )
            adapter.notices.append(Notice("tied-embedding", text, path))
        elif (head := head_of(base, path)) is not None and head not in adapter.modules:
            a, b = module.a, module.b
            if module.kind == "embedding":
                a, b = transposed(b), transposed(a)
            adapter.modules[head] = replace(module, path=head, kind="linear", a=a, b=b)
            adapter.declared = replace(adapter.declared, ties_head=True)


def _unfolded(a: TensorInfo, rank: int) -> TensorInfo:
    """`[E·r, in]` as `[E, r, in]`."""
    row, column = a.strides or (a.shape[1], 1)
    shape = (a.shape[0] // rank, rank, a.shape[1])
    return view(a, shape, 0, None if a.strides is None else (rank * row, row, column))


def _replace(adapter: Adapter, name: str, model_type: str) -> None:
    """Take a tensor for one that replaces the base's, or those of the experts of a stack."""
    info = adapter.tensors[name]
    path, _, leaf = name.rpartition(".")
    if leaf == "weight" and len(info.shape) == 3 and expert_path(path, 0):
        check_experts(adapter, len(adapter.replaced) + info.shape[0])
        new = {
            f"{expert_path(path, expert, model_type)}.weight": member(info, expert)
            for expert in range(info.shape[0])
        }
    else:
        if len(info.shape) == 2 and re.search(CONV1D.get(model_type, "$^"), path):
            info = transposed(info)  # mlx-lm keeps it as a linear layer's
        new = {f"{name_on_hub(path, model_type)}.{leaf}": info}
    if new.keys() & adapter.replaced.keys():
        adapter.unknown.append(name)
    else:
        adapter.replaced |= new


def _refuse_unlike_config(adapter: Adapter) -> None:
    """Refuse modules of which the config speaks otherwise: it may be another adapter's."""
    rank = lora_settings(adapter.config).get("rank")
    modules = adapter.modules.items()
    other = [f"{p}: rank {m.rank}, not {rank}" for p, m in modules if rank not in (None, m.rank)]
    refuse_modules(
        adapter, "rank-mismatch",
        "has another rank than the config gives. Put the config of this adapter beside it", other,
    )  # fmt: skip
    if kind_of_training(adapter.config) == "dora":
        refuse_modules(
            adapter, "magnitude-absent", "has no magnitudes (m), though fine_tune_type is dora",
            [path for path, module in modules if module.magnitude is None],
        )  # fmt: skip


def _note_unused_alpha(adapter: Adapter, scale: float | None) -> None:
    """Say what is made of an alpha that others would divide by the rank."""
    said = lora_settings(adapter.config)
    alpha, rank = said.get("alpha"), said.get("rank")
    if scale is not None and alpha and rank and alpha / rank != scale:
        text = (
            f"The scale is {scale:g}, as the config says; its alpha {alpha:g} is one that mlx-lm "
            "wrote and never used."
        )
        adapter.notices.append(Notice("unused-alpha", text, ADAPTER_CONFIG))


def _refuse_changed(adapter: Adapter, model_type: str) -> None:
    """Refuse what was trained on weights that mlx-lm changes when it loads a model."""
    names = {path: path for path in adapter.modules}
    names |= {name: name.rpartition(".")[0] for name in adapter.replaced}
    does = {name: why_changed(path, model_type) for name, path in names.items()}
    does |= {name: "adds one to" for name in adapter.replaced if is_shifted(name, model_type)}
    for how in sorted({*does.values()} - {""}):
        refuse_modules(
            adapter, "changed-by-mlx",
            f"belongs to weights that mlx-lm {how} when it loads {model_type}, so it is no change "
            "of the base's own", [name for name, own in does.items() if own == how],
        )  # fmt: skip
