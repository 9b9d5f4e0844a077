"""Where mlx-lm's models call weights otherwise than the files of the Hub, or change their values.

Its models have the names of the Hub but for what their `sanitize` renames on loading. Experts of a
layer are one stack for each of gate, up and down there.
"""

from __future__ import annotations

import re

#: Stacks of experts: below these names, or below "experts" itself.
_STACK = re.compile(r"(?P<owner>.+)\.(?P<stack>switch_mlp|switch_glu|experts)\.(?P<leaf>[^.]+)")
#: What files call the experts' layers where they are not called as in mlx-lm.
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_NEMOTRON = {"fc1": "up_proj", "fc2": "down_proj"}

#: Models whose files say "block_sparse_moe" where mlx-lm says "mlp".
_SPARSE = ("kimi_linear", "kimi_k3")
#: Models with the names of Mixtral's experts below "feed_forward".
_FEED_FORWARD = ("lfm2_moe",)

_EXPERT = re.compile(
    r"(?P<owner>.+)\.experts\.(?P<number>\d{1,6})\.(?P<leaf>(gate|up|down)_proj|w[123])"
)
#: Where mlx-lm's models have the stacks, if not below "switch_mlp".
_PLACES = {
    "gemma4": "experts.switch_glu", "afmoe": "experts", "dots1": "experts", "Klear": "experts",
    "llama4": "experts", "gpt_oss": "experts", "muse_spark": "experts",
}  # fmt: skip

_NEOX = re.compile(r"model\.h\.(?=\d+\.(attention|mlp)\.(query_key_value|dense))")

#: Whose weights mlx-lm changes when it loads them, and how: what was trained there is a change of
#: other weights than those in the files.
_CHANGED = {
    "falcon_h1": ("", "multiplies with the factors in its config"),
    "baichuan_m1": (r"(^|\.)lm_head$", "normalises"),
    "bailing_moe": (r"(^|\.)lm_head$", "normalises"),
    "bailing_moe_linear": (r"(^|\.)lm_head$", "normalises"),
}
#: The same of tensors that are trained whole: norms that mlx-lm keeps with one added.
_NORMS = re.compile(r"norm[^.]*\.weight$")
_SHIFTED = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "step3p5")


def name_on_hub(path: str, model_type: str = "") -> str:
    """The path that a module which is no stack has in the files of the Hub."""
    if model_type == "gpt_neox" and path == "model.embed_out":
        return "embed_out"
    if model_type == "gpt_neox" and path == "model.embed_in":
        return "gpt_neox.embed_in"
    return _NEOX.sub("gpt_neox.layers.", path)


def mlx_name(path: str, model_type: str = "") -> str:
    """The path in mlx-lm's model of a module that files of the Hub call so; no expert's."""
    if model_type in ("gpt2", "gptj"):
        return path if path.startswith("model.") else f"model.{path.removeprefix('transformer.')}"
    if model_type == "gpt_neox" and path == "embed_out":
        return "model.embed_out"
    if model_type.startswith("qwen3_5"):
        return re.sub(r"^model\.language_model\.", "language_model.model.", path)
    return re.sub(r"^gpt_neox\.(layers\.)?", lambda m: f"model.{'h.' * bool(m[1])}", path)


def mlx_stack(path: str, model_type: str = "") -> tuple[str, int] | None:
    """Of one expert's layer: the path of its stack in mlx-lm's model, and which of it it is."""
    found = _EXPERT.fullmatch(path)
    if found is None:
        return None
    owner, leaf = found["owner"], found["leaf"]
    leaf = {w: name for name, w in _MIXTRAL.items()}.get(leaf, leaf)
    if model_type == "nemotron_h":
        leaf = {name: fc for fc, name in _NEMOTRON.items()}.get(leaf, leaf)
    if model_type in _SPARSE:
        owner = re.sub(r"\.block_sparse_moe$", ".mlp", owner)
    stack = _PLACES.get(model_type.removesuffix("_text"), "switch_mlp")
    return f"{mlx_name(owner, model_type)}.{stack}.{leaf}", int(found["number"])


def expert_path(path: str, expert: int, model_type: str = "") -> str | None:
    """The path of one expert's layer in the files of the Hub; None for what is no stack's."""
    found = _STACK.fullmatch(path)
    if found is None:
        return None
    owner, leaf = found["owner"], found["leaf"]
    if found["stack"] != "experts":
        owner = owner.removesuffix(".experts")  # Gemma 4
    if model_type in _SPARSE:
        owner = re.sub(r"\.mlp$", ".block_sparse_moe", owner)
    if owner.endswith("block_sparse_moe") or model_type in _FEED_FORWARD:
        leaf = _MIXTRAL.get(leaf, leaf)
    elif owner.endswith(".moe") and leaf.startswith("fc"):  # Phixtral
        return f"{owner}.mlp.{expert}.{leaf}"
    return f"{owner}.experts.{expert}.{_NEMOTRON.get(leaf, leaf)}"


def why_changed(path: str, model_type: str) -> str:
    """What mlx-lm does to the weight of a module when it loads it; "" where nothing."""
    pattern, does = _CHANGED.get(model_type, ("$^", ""))
    return does if re.search(pattern, path) else ""


def is_shifted(name: str, model_type: str) -> bool:
    """Whether mlx-lm keeps this tensor with one added to what files have."""
    return model_type in _SHIFTED and _NORMS.search(name) is not None
