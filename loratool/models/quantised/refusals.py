"""What of quantised models is not read, and in which words that is said.

A method is told by its name in the config; where that names none, by tensors that no other method
has. What the weights of a model are is told by its tensors alone: a config that names a method and
files that are plain are no reason to refuse.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection
from typing import Any

from loratool.errors import BaseError
from loratool.models.checkpoint import CONVERT_GGUF, Checkpoint
from loratool.models.quantised.module import UNQUANTISED, Quantisation
from loratool.words import agreeing, counted

_CODEBOOKS = "Its weights are entries of codebooks over groups of them."
_TURNED = "Its weights are turned, and entries of codebooks."

#: Methods that are not read: how people call them, and what is in the way where that is known.
_UNREAD = {
    "aqlm": ("AQLM", _CODEBOOKS),
    "vptq": ("VPTQ", _CODEBOOKS),
    "quip": ("QuIP#", _TURNED),
    "quip-sharp": ("QuIP#", _TURNED),
    "spqr": ("SpQR", ""),
    "higgs": ("HIGGS", _TURNED),
    "fp-quant": ("FP-Quant", "Its weights and their inputs are turned."),
    "bitnet": ("BitNet", "Its weights are made −1, 0 and 1, which no adapter's changes survive."),
    "quark": ("Quark", ""),
    "eetq": ("EETQ", "Its bytes are permuted for the kernel, which only a GPU undoes."),
    "quanto": ("Quanto", ""),
    "sinq": ("SINQ", ""),
    "exl2": ("EXL2", ""),
    "exl3": ("EXL3", _TURNED),
    "auto-round": ("AutoRound", ""),
    "intel/auto-round": ("AutoRound", ""),
    "paroquant": ("ParoQuant", "The inputs of its weights are turned."),
    "gguf": ("GGUF", ""),
}

#: Methods whose tensors are read, by one format or another.
_READ = {
    "", "bitsandbytes", "gptq", "awq", "hqq", "torchao", "fp8", "fbgemm-fp8", "mxfp4", "mxfp8",
    "nvfp4", "compressed-tensors",
}  # fmt: skip

#: Last parts of tensors' names that only one method has, all of them in one module.
_TOLD_BY: tuple[tuple[str, frozenset[str]], ...] = (
    ("aqlm", frozenset({"codes", "codebooks"})),
    ("vptq", frozenset({"centroids", "indices"})),
    ("quip", frozenset({"Qidxs"})),
    ("spqr", frozenset({"dense_weights", "row_offsets"})),
    ("higgs", frozenset({"tables2"})),
    ("fp-quant", frozenset({"forward_hadamard_matrix"})),
    ("eetq", frozenset({"weight", "weight_scales"})),
    ("quanto", frozenset({"_data", "_scale"})),
    ("exl2", frozenset({"q_weight", "q_scale"})),
    ("exl3", frozenset({"trellis"})),
    ("paroquant", frozenset({"theta", "pairs", "channel_scales"})),
)
_TELLING = frozenset().union(*(parts for _, parts in _TOLD_BY))

#: Layouts of GPTQ and AWQ that are made for a kernel, by what a config calls them.
_KERNELS = {
    "marlin", "marlin-24", "bitblas", "gemv", "gemv-fast", "llm-awq", "exllama", "exllamav2",
    "qqq", "gptq-p",
}  # fmt: skip

#: Tensors that only quantised checkpoints have, beside or instead of `….weight`.
_PACKED = re.compile(
    r"\.(qweight|qzeros|g_idx|SCB|absmax|quant_map|quant_state\..+|nested_absmax|nested_quant_map|"
    r"weight_packed|weight_scale|weight_scale_inv|weight_scale_2|input_scale|weight_format|scales|"
    r"W_q|_\w+_(qdata|scale|zero_point)|weight_scales|qscale_weight|pre_quant_scale|"
    r"weight_global_scale|had_[KUL]|had_(left|right))$|_(blocks|scales|scale_inv)$"
)
#: Names of what a plain model holds as floats.
_WEIGHT = re.compile(r"([._]weight|_proj)$")
_GGML = re.compile(r"blk(\.\d+\..+)?\.weight")


def packed_among(base: Checkpoint, names: Collection[str]) -> list[str]:
    """Those of these tensors that look like parts of quantised weights."""
    tensors = base.tensors
    return [
        name
        for name in names
        if _PACKED.search(name) or (_WEIGHT.search(name) and not tensors[name].is_float)
    ]


def is_plain(base: Checkpoint) -> bool:
    """Whether no tensor looks like a part of a quantised weight that no format claims."""
    return not (
        packed_among(base, base.tensors) or _told_by_tensors(base) or _has_names_of_ggml(base)
    )


def refuse_method(base: Checkpoint, settings: Quantisation) -> None:
    """Raise BaseError for a model that holds quantised weights of a method that is not read."""
    if _has_names_of_ggml(base):
        raise BaseError(
            f"{base.label}: a GGUF base: its tensors have llama.cpp's names.", CONVERT_GGUF
        )
    if settings.contradiction:
        raise BaseError(
            f"{base.label}: {settings.contradiction}.",
            "Remove the one that its weights are not stored by.",
        )
    method = settings.method
    if method in _READ or method.startswith("modelopt"):
        method = _told_by_tensors(base)
    if method:
        name, why = _UNREAD.get(method, (method[:40], ""))
        raise BaseError(
            f"{base.label} is quantised with {name}, which loratool cannot read."
            + (f" {why}" if why else ""),
            UNQUANTISED,
        )
    kernel = _kernel(settings.table)
    if kernel:
        raise BaseError(
            f"{base.label} is quantised with {settings.method}: its weights are packed for a "
            f"kernel ({kernel}), in an order that loratool does not read.",
            UNQUANTISED,
        )


def refuse_online(base: Checkpoint, settings: Quantisation) -> None:
    """Raise BaseError for a model of plain weights that are quantised each time they are used."""
    if settings.method == "bitnet":
        refuse_method(base, settings)


def refuse_unread(base: Checkpoint, settings: Quantisation, names: Collection[str]) -> None:
    """Raise BaseError where tensors that are in no quantised weight look like parts of one."""
    packed = packed_among(base, names)
    if packed:
        method = settings.method[:40]
        kinds = Counter(base.tensors[n].dtype for n in packed).most_common(1)[0][0]
        raise BaseError(
            f"{base.label} is quantised{f' with {method}' if method else ''}, in a form that "
            f"loratool cannot read: {counted(len(packed), 'tensor')} such as {packed[0]!r} "
            f"({kinds}) {agreeing(len(packed), 'holds')} packed weights or their scales"
            f"{'' if method else ', and its config.json names no method'}.",
            UNQUANTISED,
        )


def _told_by_tensors(base: Checkpoint) -> str:
    """The method that only has tensors of the names that are there; "" for none."""
    modules: dict[str, set[str]] = defaultdict(set)
    for name, info in base.tensors.items():
        module, _, last = name.rpartition(".")
        if last in _TELLING and not (last == "weight" and info.is_float):
            modules[module].add(last)
    for parts in modules.values():
        for method, needed in _TOLD_BY:
            if needed <= parts:
                return method
    return ""


def _has_names_of_ggml(base: Checkpoint) -> bool:
    return any(_GGML.fullmatch(name) for name, info in base.tensors.items() if not info.is_float)


def _kernel(table: dict[str, Any]) -> str:
    """The kernel that weights are packed for, by what the config says; "" for none. (`backend` is
    what they are run with, but for llm-awq's.)"""
    if table.get("is_marlin_format"):
        return "marlin"
    for key in ("checkpoint_format", "format", "version", "backend"):
        said = table.get(key)
        if isinstance(said, str):
            name = said.lower().replace("_", "-")
            if name in _KERNELS and (key != "backend" or name == "llm-awq"):
                return said.lower()
    return ""
