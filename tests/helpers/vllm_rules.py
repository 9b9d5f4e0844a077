"""How vLLM reads which modules of a quantised model are plain: its own functions.

SPDX-License-Identifier: Apache-2.0
SPDX-FileCopyrightText: Copyright contributors to the vLLM project

From vllm 0.33.0, model_executor/layers/quantization: `is_layer_skipped` (utils/quant_utils.py),
`is_equal_or_regex_match` and `find_matching_patterns` (utils/config_utils.py),
`should_ignore_layer` (compressed_tensors/utils.py), `flatten_list`, `get_dynamic_override` and
`is_layer_gptq_quantized` (utils/gptq_utils.py), `should_skip` (torchao.py). The package itself is
336 MB and needs the libraries of a GPU. `is_plain` calls them as vLLM's classes of configs do.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatch
from types import MappingProxyType, SimpleNamespace
from typing import Any, Literal

AutoGPTQConfig = Any

#: `packed_modules_mapping` of vLLM's LlamaForCausalLM.
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def is_plain(table: dict[str, Any], prefix: str, packed: Collection[str] = ()) -> bool:
    """Whether vLLM makes a plain layer of the module `prefix`, by a quantization_config.

    `packed` are the modules that hold quantised tensors, which GPTQ looks up in the files. Raises
    ValueError where parts of a fused module differ.
    """
    method = table["quant_method"]
    listed = table.get("modules_to_not_convert") or []
    if method == "gptq":
        packed = table.get("modules_in_block_to_quantize") or list(packed)
        config = SimpleNamespace(dynamic=table.get("dynamic") or {})
        return get_dynamic_override(config, prefix) is False or not is_layer_gptq_quantized(
            prefix, packed, FUSED
        )
    if method == "compressed-tensors":
        return should_ignore_layer(prefix, table["ignore"], FUSED)
    if method == "torchao":
        return should_skip(prefix, listed)
    if method == "awq":
        return is_layer_skipped(prefix, listed, FUSED, match_mode="substring")
    if method == "modelopt":
        excluded = table.get("ignore", table.get("exclude_modules", []))
        return is_layer_skipped(prefix, excluded, FUSED) or any(
            one in prefix or fnmatch(prefix, one) for one in excluded
        )
    assert method in ("fp8", "fbgemm_fp8"), method
    return is_layer_skipped(prefix, table.get("ignored_layers") or listed, FUSED)


# --- vLLM's own -----------------------------------------------------------------------------------


def is_layer_skipped(
    prefix: str,
    ignored_layers: list[str],
    fused_mapping: Mapping[str, list[str]] = MappingProxyType({}),
    *,
    match_mode: Literal["exact", "substring", "suffix"] = "exact",
) -> bool:
    def prefix_full_match(prefix: str, ignored_layers: list[str]) -> bool:
        return prefix in ignored_layers

    # For case like: ignored_layers = ["self_attn"]
    def substr_match(prefix: str, ignored_layers: list[str]) -> bool:
        return any(layer in prefix for layer in ignored_layers)

    # Match abbreviated module paths at a component boundary. For example,
    # ``b_proj`` matches ``model.layers.0.self_attn.b_proj`` but not
    # ``model.layers.0.self_attn.q_b_proj``.
    def suffix_match(prefix: str, ignored_layers: list[str]) -> bool:
        return any(prefix == layer or prefix.endswith(f".{layer}") for layer in ignored_layers)

    if match_mode == "exact":
        match_func = prefix_full_match
    elif match_mode == "substring":
        match_func = substr_match
    elif match_mode == "suffix":
        match_func = suffix_match
    else:
        raise ValueError(f"Unsupported layer skip match mode: {match_mode}")

    # prefix: model.layers.0.self_attn.q_proj
    # proj_name: q_proj
    proj_name = prefix.split(".")[-1]

    # Fused layers like gate_up_proj or qkv_proj will not be fused
    # in the safetensors checkpoint. So, we convert the name
    # from the fused version to unfused + check to make sure that
    # each shard of the fused layer has the same scheme.
    #
    # Some checkpoints (e.g. block-FP8 Step-3.5-Flash) already list the
    # fused name (e.g. ``self_attn.qkv_proj``) directly in
    # ``modules_to_not_convert``. Honor that fused-name match first so
    # those layers are still correctly skipped even when a
    # ``packed_modules_mapping`` is registered on the model.
    if proj_name in fused_mapping and match_func(prefix, ignored_layers):
        is_skipped = True
    elif proj_name in fused_mapping:
        shard_prefixes = [
            prefix.replace(proj_name, shard_proj_name)
            for shard_proj_name in fused_mapping[proj_name]
        ]

        is_skipped = None
        for shard_prefix in shard_prefixes:
            is_shard_skipped = match_func(shard_prefix, ignored_layers)

            if is_skipped is None:
                is_skipped = is_shard_skipped
            elif is_shard_skipped != is_skipped:
                raise ValueError(
                    f"Detected some but not all shards of {prefix} "
                    "are quantized. All shards of fused layers "
                    "to have the same precision."
                )
    elif "experts" in prefix and match_mode == "exact":
        expert_ignore_layers = filter(lambda layer_name: "experts" in layer_name, ignored_layers)
        return any(prefix in layer_name for layer_name in expert_ignore_layers)
    else:
        is_skipped = match_func(prefix, ignored_layers)

    assert is_skipped is not None
    return is_skipped


def is_equal_or_regex_match(
    value: str,
    target: str,
    check_contains: bool = False,
    use_fnmatch: bool = False,
) -> bool:
    """Checks whether a value is exactly equal or a regex match for target
    if target starts with 're:'. If check_contains is set to True,
    additionally checks if the target string is contained within the value.
    If use_fnmatch is set, supports shell-style patterns in target.
    """
    if target.startswith("re:"):
        pattern = target[3:]
        if re.match(pattern, value):
            return True
    elif check_contains:
        if target.lower() in value.lower():
            return True
    elif target == value or (use_fnmatch and fnmatch(value, target)):
        return True
    return False


def find_matching_patterns(
    layer_name: str,
    patterns: Iterable[str],
    fused_mapping: Mapping[str, list[str]] = MappingProxyType({}),
    use_fnmatch: bool = False,
) -> list[set[str]]:
    """Return matching patterns for a layer or each shard of a fused layer.

    A pattern matching the fused layer directly takes precedence. Otherwise,
    return one set of matching patterns for every shard.
    """
    patterns = list(patterns)
    matches = [
        pattern
        for pattern in patterns
        if is_equal_or_regex_match(layer_name, pattern, use_fnmatch=use_fnmatch)
    ]
    if matches:
        return [set(matches)]

    proj_name = layer_name.split(".")[-1]
    if proj_name not in fused_mapping:
        return [set()]

    shard_names = [
        layer_name.replace(proj_name, shard_proj_name)
        for shard_proj_name in fused_mapping[proj_name]
    ]
    return [
        {
            pattern
            for pattern in patterns
            if is_equal_or_regex_match(shard_name, pattern, use_fnmatch=use_fnmatch)
        }
        for shard_name in shard_names
    ]


def should_ignore_layer(
    layer_name: str | None,
    ignore: Iterable[str] = (),
    fused_mapping: Mapping[str, list[str]] = MappingProxyType({}),
    use_fnmatch: bool = False,
) -> bool:
    if layer_name is None:
        return False
    per_shard_matches = find_matching_patterns(
        layer_name, ignore, fused_mapping, use_fnmatch=use_fnmatch
    )
    shards_ignored = [len(matches) > 0 for matches in per_shard_matches]
    if any(shards_ignored) and not all(shards_ignored):
        raise ValueError(
            f"Found different quantization schemes for the shards of "
            f"{layer_name}. vLLM requires all to use the same scheme."
        )
    return all(shards_ignored)


def flatten_list(lst: list[Any]) -> list[Any]:
    output = []

    def _flatten(lst: list[Any]):
        for i in lst:
            if isinstance(i, list):
                _flatten(i)
            else:
                output.append(i)

    _flatten(lst)
    return output


def get_dynamic_override(
    config: AutoGPTQConfig,
    layer_name: str,
    key: str | None = None,
    default_value: int | bool | None = None,
) -> dict | int | bool | None:
    for pattern, pattern_dict in config.dynamic.items():
        # Negative match: matched modules are excluded from quantized init
        if pattern.startswith("-:"):
            if re.match(pattern.removeprefix("-:"), layer_name):
                return False
        # Positive match: matched modules have quant properties overrides
        # base quant config
        elif re.match(pattern.removeprefix("+:"), layer_name):
            if key is None:
                return pattern_dict
            return pattern_dict.get(key, default_value)
    return default_value


def is_layer_gptq_quantized(
    prefix: str,
    quantized_layers: list[str],
    fused_mapping: Mapping[str, list[str]] = MappingProxyType({}),
) -> bool:
    # prefix: model.layers.0.self_attn.q_proj
    # proj_name: q_proj

    # GPTQ's `modules_in_block_to_quantize`:
    # Substr: ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"]
    # Full prefix ["model.layers.0.self_attn.q_proj"]

    proj_name = prefix.split(".")[-1]

    quantized_layers = flatten_list(quantized_layers)

    # Empty means no metadata could be read at all, not that the checkpoint
    # holds no quantized layer, and loading GPTQ weights unquantized cannot work.
    if not quantized_layers:
        return True

    # Fused layers like gate_up_proj or qkv_proj will not be fused
    # in the safetensors checkpoint. So, we convert the name
    # from the fused version to unfused + check to make sure that
    # each shard of the fused layer has the same scheme.
    if proj_name in fused_mapping:
        shard_prefixes = [
            prefix.replace(proj_name, shard_proj_name)
            for shard_proj_name in fused_mapping[proj_name]
        ]

        is_quantized = None
        for shard_prefix in shard_prefixes:
            is_shard_quantized = any(layer in shard_prefix for layer in quantized_layers)

            if is_quantized is None:
                is_quantized = is_shard_quantized
            elif is_shard_quantized != is_quantized:
                raise ValueError(
                    f"Detected some but not all shards of {prefix} "
                    "are quantized. All shards of fused layers "
                    "to have the same precision."
                )
    else:
        is_quantized = any(layer in prefix for layer in quantized_layers)

    assert is_quantized is not None
    return is_quantized


def should_skip(prefix: str, skip_modules: list[str]) -> bool:
    """Robust skipping logic:
    should_skip("model.model.layers.1.q_proj",
                ["model.model.layers.1.q_proj"])  # True
    should_skip("model.model.layers.10.o_proj", ["o_proj"])  -> True
    should_skip("visual.model.layers.1.q_proj", ["visual"])   -> True
    should_skip("model.model.layers.1.q_proj", ["layers.1"])  -> True
    should_skip("model.model.layers.11.q_proj", ["layers.1"]) -> False
    """
    for s in skip_modules:
        if prefix == s:
            return True
        if f".{s}." in f".{prefix}.":
            return True
    return False
