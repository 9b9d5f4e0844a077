"""What kind of tensor a name and a shape stand for, by what an adapter can hold."""

from __future__ import annotations

import re
from typing import Literal

from loratool.adapters.dialects import WRITTEN
from loratool.models.checkpoint import Checkpoint
from loratool.models.layouts.names import CLASSIFIERS, is_lookup
from loratool.storage.tensors import TensorInfo

Group = Literal["linears", "convs", "embeddings", "norms", "biases", "heads", "others"]
#: Linear maps that are no module of their own in current models: PEFT could not adapt them.
_ROUTER = re.compile(
    r"(^|\.)(mlp|feed_forward|block_sparse_moe|moe)\.(gate|router(\.classifier)?)$"
)
#: Modules that PEFT refuses to adapt, or whose models do without it.
_UNADAPTABLE = {
    **dict.fromkeys(("falcon_h1", "mamba2", "nemotron_h"), re.compile(r"\.(out_proj|conv1d)$")),
    # These multiply with the weights of two more layers themselves.
    **dict.fromkeys(("mamba", "falcon_mamba"), re.compile(r"\.(out_proj|conv1d|dt_proj|x_proj)$")),
    "jamba": re.compile(r"\.dt_proj$"),
    "whisper": re.compile(r"\.(conv1|conv2)$"),
}


def group_of(name: str, info: TensorInfo, tuned: Checkpoint) -> Group:
    tensors = tuned.tensors
    path, _, leaf = name.rpartition(".")
    own = info.name.rpartition(".")[0]
    weight = tensors.get(f"{own}.weight")
    if info.name.endswith((".gamma", ".beta")) or (weight is not None and len(weight.shape) == 1):
        return "norms"
    if WRITTEN.saved_unit(path) != path or path.endswith(CLASSIFIERS):
        return "heads"
    if leaf == "bias":
        return "biases"
    parent = own.rpartition(".")[0]
    attention = any(f"{p}.in_proj_weight" in tensors for p in (own, parent))
    fixed = _UNADAPTABLE.get(tuned.model_type)
    if leaf != "weight" or attention or _ROUTER.search(path) or (fixed and fixed.search(path)):
        return "others"
    if len(info.shape) == 2:
        return "embeddings" if is_lookup(path) else "linears"
    # Convolutions with one input channel are grouped ones, whose factors PEFT cannot shape, and
    # weights of three axes that are not called so are experts.
    axes = len(info.shape)
    convolves = axes in (4, 5) or (axes == 3 and "conv" in path.rpartition(".")[2])
    return "convs" if convolves and info.shape[1] > 1 else "others"
