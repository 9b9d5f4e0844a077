"""What kind of tensor a name and a shape stand for, by what an adapter can hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from loratool.adapters.dialects import WRITTEN
from loratool.extracting.parameters import ModelParameter, is_bare
from loratool.models.layouts.names import CLASSIFIERS, is_lookup

Group = Literal["linears", "convs", "embeddings", "norms", "biases", "heads", "others"]
#: Groups whose weights can become factors.
FACTORED: tuple[Group, ...] = ("linears", "convs", "embeddings")
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
    # These give the weights of layers to a function, past what PEFT puts around the layers.
    "dory": re.compile(r"(^|\.)lm_head$"),
    "mobilebert": re.compile(r"(^|\.)cls\.predictions\.dense$"),
    "wavlm": re.compile(r"\.attention\.(k_proj|v_proj|q_proj|out_proj)$"),
    # Its layers are of classes of its own.
    "ibert": re.compile(r"^ibert\."),
    "whisper": re.compile(r"\.(conv1|conv2)$"),
}


def group_of(
    path: str, parameter: ModelParameter, parameters: Mapping[str, ModelParameter], model_type: str
) -> Group:
    """The group of a parameter whose name in an adapter is `path`; `parameters` are those of its
    model by their names in memory."""
    module, _, leaf = path.rpartition(".")
    own = parameter.name.rpartition(".")[0]
    weight = parameters.get(f"{own}.weight")
    if leaf in ("gamma", "beta") or (weight is not None and len(weight.info.shape) == 1):
        return "norms"
    if is_bare(path) and leaf.endswith("bias"):
        return "biases"
    if parameter.members:
        return "linears" if len(parameter.info.shape) == 3 else "others"
    if WRITTEN.saved_unit(module) != module or module.endswith(CLASSIFIERS):
        return "heads"
    if leaf == "bias":
        return "biases"
    parent = own.rpartition(".")[0]
    attention = any(f"{p}.in_proj_weight" in parameters for p in (own, parent))
    fixed = _UNADAPTABLE.get(model_type)
    if leaf != "weight" or attention or _routes(own, parameters):
        return "others"
    if fixed and fixed.search(module):
        return "others"
    shape = parameter.info.shape
    if len(shape) == 2:
        return "embeddings" if is_lookup(module) else "linears"
    # Convolutions with one input channel are grouped ones, whose factors PEFT cannot shape, and
    # other weights of three axes are not called so.
    axes = len(shape)
    convolves = axes in (4, 5) or (axes == 3 and "conv" in module.rpartition(".")[2])
    return "convs" if convolves and shape[1] > 1 else "others"


def _routes(path: str, parameters: Mapping[str, ModelParameter]) -> bool:
    """Whether a module chooses among experts: by its name, or as what is called so beside them."""
    if _ROUTER.search(path):
        return True
    parent, _, leaf = path.rpartition(".")
    beside = f"{parent}.experts." if parent else "experts."
    return leaf in ("gate", "router") and any(name.startswith(beside) for name in parameters)
