"""Inputs of public bug reports, where their makers lie beside the project: the right value each."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.adapters import codes
from helpers.files import load
from helpers.places import SHARED
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import loratool
from loratool.errors import AdapterError

CASES = SHARED.parent / "cases"

# Their makers may not be copied into the project, so a clone of it alone cannot have them, CI's
# among them. Nothing is tested here alone: each is an example of a kind that has tests of its own,
# with right values, which run everywhere: two towers in merge/test_components, side weights and
# empty heads in adapters/test_companions, shards in adapters/test_shards, stale shards in
# models/test_checkpoint, templates and tokens in models/test_tokenizers, float16 in
# merge/test_precision.
pytestmark = pytest.mark.skipif(
    not CASES.is_dir(), reason="makers of public cases, no part of the project; see the list above"
)

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def case(tmp_path: Path) -> Callable[[str], Path]:
    def make(kind: str) -> Path:
        script = CASES / kind / "make.py"
        subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=120)
        return tmp_path

    return make


def merged(place: Path, **options: object) -> tuple[loratool.MergeReport, dict[str, torch.Tensor]]:
    report = loratool.merge(place / "base", place / "adapter", place / "merged", **options)
    return report, load(place / "merged")


def delta(factors: dict[str, torch.Tensor], path: str) -> torch.Tensor:
    name = f"base_model.model.{path}"
    a, b = (factors[f"{name}.lora_{x}.weight"].double() for x in "AB")
    return 2 * b @ a


def test_two_towers(case: Callable[[str], Path]) -> None:
    """The text tower, which the config's class names; the vision tower stays."""
    place = case("two-towers")
    base = load_file(place / "base" / "model.safetensors")
    path = "encoder.layers.0.self_attn.q_proj"
    factors = load_file(place / "adapter" / "adapter_model.safetensors")
    report, found = merged(place, dtype="float32")
    changed = {name for name in base if not torch.equal(base[name], found[name])}
    name = f"text_model.{path}.weight"
    assert changed == {name}
    wanted = base[name].double() + delta(factors, path)
    assert torch.allclose(found[name].double(), wanted, atol=1e-6)
    assert "component" in codes(report)


def test_side_weights(case: Callable[[str], Path]) -> None:
    """The projector of non_lora_trainables.bin is merged."""
    place = case("side-weights")
    new = torch.load(place / "adapter" / "non_lora_trainables.bin")
    _, found = merged(place, dtype="float32")
    assert torch.equal(found["model.mm_projector.0.weight"], next(iter(new.values())))


def test_sharded_adapter(case: Callable[[str], Path]) -> None:
    """Both shards are merged."""
    place = case("sharded-adapter")
    base = load_file(place / "base" / "model.safetensors")
    _, found = merged(place, dtype="float32")
    for number in (1, 2):
        file = place / "adapter" / f"adapter_model-0000{number}-of-00002.safetensors"
        path = f"model.layers.{number - 1}.self_attn.q_proj"
        wanted = base[f"{path}.weight"].double() + delta(load_file(file), path)
        assert torch.allclose(found[f"{path}.weight"].double(), wanted, atol=1e-6)


def test_stale_shards(case: Callable[[str], Path]) -> None:
    """model.safetensors is the base, and that there is another is said."""
    place = case("stale-shards")
    base = load_file(place / "base" / "model.safetensors")
    factors = load_file(place / "adapter" / "adapter_model.safetensors")
    report, found = merged(place, dtype="float32")
    wanted = base[Q].double() + delta(factors, Q.removesuffix(".weight"))
    assert torch.allclose(found[Q].double(), wanted, atol=1e-6)
    assert codes(report) == ["base-note"]


def test_empty_head(case: Callable[[str], Path]) -> None:
    """The empty head is refused by name."""
    with pytest.raises(AdapterError, match=r"zero3-placeholder[^~]*score\.weight"):
        merged(case("empty-head"))


def test_chat_template(case: Callable[[str], Path]) -> None:
    """The output has the adapter's template."""
    place = case("chat-template")
    merged(place)
    assert AutoTokenizer.from_pretrained(place / "merged").chat_template == "ADAPTER"


def test_tokens_without_rows(case: Callable[[str], Path]) -> None:
    """Five ids have no row, and are named."""
    report, _ = merged(case("tokens-without-rows"))
    (notice,) = report.warnings
    assert notice.code == "tokens-without-rows"
    assert all(f"({number})" in notice.message for number in range(300, 305))


def test_float16_activations(case: Callable[[str], Path]) -> None:
    """The model runs to finite logits; in float16, as asked, it does not, and is warned of."""
    place = case("float16-activations")
    report, _ = merged(place)
    assert codes(report) == ["float16-overflows"]
    ids = torch.arange(8)[None]
    for folder, finite in (("merged", True), ("half", False)):
        if not finite:
            loratool.merge(place / "base", place / "adapter", place / "half", dtype="float16")
        model = AutoModelForCausalLM.from_pretrained(place / folder, dtype="auto")
        with torch.no_grad():
            logits = model(ids).logits
        assert bool(torch.isfinite(logits).all()) == finite
    config = json.loads((place / "merged" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
