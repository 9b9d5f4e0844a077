"""Does vLLM take for plain what the lists of a mixed model name, and nothing else?"""

from __future__ import annotations

from typing import Any

import pytest
from helpers.golden import golden
from helpers.vllm_rules import FUSED, is_plain

from loratool.models.quantised.ignoring import with_ignored
from loratool.models.quantised.module import Quantisation

#: A config of each method that vLLM reads, as its library wrote it.
CASES = (
    "fp8-block-128", "fp8-tensor-static", "fp8-rows-fbgemm", "ct-fp8-channel", "ct-int4-group",
    "ct-nvfp4", "modelopt-fp8-tensor", "modelopt-nvfp4", "gptq-v1-4bit", "awq-gemm", "torchao-int8",
)  # fmt: skip

#: The modules of a layer in vLLM, and in the files.
MODULES = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
FILES = {
    f"{block}.{part}": f"{block}.{name}"
    for block, _, name in (module.partition(".") for module in MODULES)
    for part in FUSED.get(name, [name])
}


def check(table: dict[str, Any], chosen: str) -> None:
    """With the parts of one module of layer 1 opened, vLLM finds that one plain, and no other."""
    method = table["quant_method"].lower().replace("_", "-")
    opened = [f"model.layers.1.{file}" for file, module in FILES.items() if module == chosen]
    result = with_ignored(Quantisation(method, table, "quantization_config"), opened)
    everything = {f"model.layers.{layer}.{file}" for layer in range(12) for file in FILES}
    for layer in range(12):
        for module in MODULES:
            path = f"model.layers.{layer}.{module}"
            expected = layer == 1 and module == chosen
            assert is_plain(result, path, everything - {*opened}) == expected, path


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chosen", MODULES)
def test_vllm_finds_the_opened_modules_plain(name: str, chosen: str) -> None:
    """Fused modules too, of which the list names the parts; layer 1 is neither 10 nor 11."""
    check(golden(name).config["quantization_config"], chosen)


@pytest.mark.parametrize("chosen", MODULES)
def test_where_a_gptq_model_lists_what_is_quantised(chosen: str) -> None:
    """Older files do, by the last parts of names, so that the rule alone can make an exception."""
    table = golden("gptq-v1-4bit").config["quantization_config"]
    check({**table, "modules_in_block_to_quantize": [[file] for file in FILES]}, chosen)
