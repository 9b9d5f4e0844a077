"""llama.cpp's own runtime computes what PEFT computes, of all that lint says it loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.llama_runtime import adapter_as_gguf, model_as_gguf, runtime_loss
from helpers.places import FIXTURES
from peft import PeftModel
from transformers import AutoModelForCausalLM

import loratool

pytestmark = pytest.mark.llamacpp

BASE, ADAPTER = FIXTURES / "base", FIXTURES / "adapter"
WINDOWS = 24


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return outputs(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_as_gguf(BASE, tmp_path_factory.mktemp("gguf") / "base.gguf")


def outputs(folder: Path) -> dict[str, Path]:
    """The fixture, and what combine, resize and extract make of the fixtures by default."""
    made = {"adapter": ADAPTER}
    for name in ("combine", "resize", "extract"):
        made[name] = folder / name
    loratool.combine([ADAPTER, FIXTURES / "tasks" / "html"], made["combine"], base=BASE)
    loratool.resize(ADAPTER, made["resize"], rank=4)
    loratool.extract(BASE, FIXTURES / "tuned", made["extract"], rank=8)
    return made


def peft_loss(adapter: Path) -> float:
    """The same windows through transformers and PEFT."""
    tokens = torch.tensor(list((FIXTURES / "heldout.txt").read_bytes())[: 256 * WINDOWS + 1])
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), adapter
    )
    inputs, targets = tokens[:-1].view(WINDOWS, 256), tokens[1:].view(WINDOWS, 256)
    with torch.inference_mode():
        logits = model(inputs, use_cache=False).logits.float()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))


@pytest.mark.parametrize("name", ["adapter", "combine", "resize", "extract"])
def test_losses_through_llama_cpp_are_peft_s(
    tmp_path: Path,
    model: Path,
    made: dict[str, Path],
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """To 1e-3 nats, where an adapter that is not applied at all is far off; lint says "loads"."""
    adapter = made[name]
    assert loratool.lint([adapter], programs=["llamacpp"]).passes
    gguf = adapter_as_gguf(adapter, BASE, tmp_path / "adapter.gguf")
    found, wanted = runtime_loss(model, gguf, FIXTURES / "heldout.txt"), peft_loss(adapter)
    plain = runtime_loss(model, None, FIXTURES / "heldout.txt")
    with capsys.disabled():
        print(f"\n{name}: llama.cpp {found:.5f}, PEFT {wanted:.5f}, base alone {plain:.5f}")
    assert abs(found - wanted) < 1e-3
    assert abs(plain - wanted) > 0.05
