"""What config.json says of modules that are plain in a quantised model: lists of what to ignore.

Every method has a list of its own. Entries are whole paths, as the files have them and, where they
differ, as memory has them: transformers asks with the one, vLLM with either.
Source: transformers/quantizers/quantizers_utils.py (`should_convert_module`);
vllm/model_executor/layers/quantization (`is_layer_skipped`, `should_ignore_layer`,
`get_dynamic_override`, torchao's `should_skip`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from loratool.models.quantised.fused import fused_paths
from loratool.models.quantised.module import Quantisation

#: The keys of the list by method; all that are there are written, otherwise the first.
_KEYS = {
    "fp8": ("modules_to_not_convert", "ignored_layers"),
    "fbgemm-fp8": ("modules_to_not_convert",),
    "mxfp4": ("modules_to_not_convert",),
    "awq": ("modules_to_not_convert",),
    "torchao": ("modules_to_not_convert",),
    "hqq": ("skip_modules",),
    "bitsandbytes": ("llm_int8_skip_modules",),
    "compressed-tensors": ("ignore",),
    "modelopt": ("ignore", "exclude_modules"),
}

#: Methods of which vLLM asks for q, k and v, or gate and up, by the name of their one matrix.
_FUSED_BY_NAME = ("gptq", "torchao")

#: Methods for which transformers skips heads and what is tied where there is no list. A list takes
#: the place of that, so it must name all that was plain before too.
_SKIPPED_WITHOUT_LIST = ("fp8", "fbgemm-fp8", "mxfp4", "awq", "torchao", "hqq", "bitsandbytes")


def with_ignored(
    settings: Quantisation, paths: Sequence[str], plain: Sequence[str] = ()
) -> dict[str, Any]:
    """The table of config.json with these modules as plain ones; `plain` are those that were."""
    return _added(copy.deepcopy(settings.table), settings.method, paths, plain)


def can_ignore(settings: Quantisation) -> bool:
    """Whether it is known where a model says which of its modules are plain."""
    return settings.method in (*_KEYS, "gptq")


def exported_with_ignored(document: dict[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """ModelOpt's hf_quant_config.json, which says the same beside config.json."""
    found = copy.deepcopy(document)
    table = found.get("quantization")
    if isinstance(table, dict):
        found["quantization"] = _listed(table, "exclude_modules", paths)
    return found


def _added(
    table: dict[str, Any], method: str, paths: Sequence[str], plain: Sequence[str]
) -> dict[str, Any]:
    if method in _FUSED_BY_NAME:
        paths = (*paths, *fused_paths(paths))
    if method == "gptq":
        rules = table.get("dynamic")
        own: dict[str, Any] = {f"-:^{re.escape(path)}$": {} for path in paths}
        # The first rule that fits counts.
        table["dynamic"] = {**own, **(rules if isinstance(rules, dict) else {})}
        return table
    keys = _KEYS[method]
    without = method in _SKIPPED_WITHOUT_LIST and not any(table.get(key) for key in keys)
    usual = ("lm_head", *plain) if without else ()
    there = [key for key in keys if key in table] or [keys[0]]
    # transformers reads the first alone, vLLM the other one before it.
    there += [keys[0]] if method == "fp8" and keys[0] not in there else []
    for key in there:
        table = _listed(table, key, (*usual, *paths))
    return table


def _listed(table: dict[str, Any], key: str, paths: Sequence[str]) -> dict[str, Any]:
    before = table.get(key)
    known = list(before) if isinstance(before, list) else []
    table[key] = [*known, *dict.fromkeys(path for path in paths if path not in known)]
    return table
