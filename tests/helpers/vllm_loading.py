"""vLLM itself: what its worker does with an adapter before the model sees it.

vLLM wants a GPU and other versions of what this project uses, so it has a Python of its own, which
`VLLM_PYTHON` names; `.ci/vllm` makes one. Its check of configs and its reader of adapters run there
without a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_SCRIPT = """
import json, logging, sys
logging.disable(logging.CRITICAL)
import torch, vllm
from vllm.config.lora import LoRAConfig
from vllm.lora import lora_model
from vllm.lora.peft_helper import PEFTHelper

lora_model.PIN_MEMORY = False  # there is no device to copy to from there
MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
           "embed_tokens", "lm_head", "experts"}

def norm(layer):
    delta = layer.scaling * (layer.lora_b.double() @ layer.lora_a.double())
    return float(delta.norm())

def loaded(folder, rank, vocabulary):
    try:
        helper = PEFTHelper.from_local_dir(folder, 4096)
        helper.validate_legal(LoRAConfig(max_lora_rank=rank, max_loras=1))
        model = lora_model.LoRAModel.from_local_checkpoint(
            folder, MODULES, helper, lora_model_id=1, device="cpu", model_vocab_size=vocabulary)
    except Exception as error:
        return {"refusal": f"{type(error).__name__}: {error}", "norms": {}}
    return {"refusal": "", "norms": {name: norm(layer) for name, layer in model.loras.items()}}

asked = json.load(sys.stdin)
print(json.dumps([vllm.__version__, {name: loaded(*call) for name, call in asked.items()}]))
"""


@dataclass(frozen=True)
class LoadedByVllm:
    """Why it is refused, "" where it loads; and then the norms of the deltas by module."""

    refusal: str
    norms: dict[str, float]


def loaded_by_vllm(
    asked: Mapping[str, tuple[Path, int, int]],
) -> tuple[str, dict[str, LoadedByVllm]]:
    """The version of vLLM, and how each adapter fares in a server that was started with so much for
    --max-lora-rank, for a model of so many tokens. To import vLLM takes seconds: ask all at once.
    """
    texts = {name: (str(folder), *numbers) for name, (folder, *numbers) in asked.items()}
    hidden = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [os.environ["VLLM_PYTHON"], "-c", _SCRIPT],
        input=json.dumps(texts), capture_output=True, text=True, env=hidden,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    version, found = json.loads(done.stdout.splitlines()[-1])
    return version, {name: LoadedByVllm(**entry) for name, entry in found.items()}
