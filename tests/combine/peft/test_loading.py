"""PEFT loads what combine writes, key for key, and computes the weighted sum with it."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from helpers.models import Holder, close, read
from helpers.peft_live import (
    EPS,
    FLOAT32,
    PREFIX,
    embeddings,
    gpt_layers,
    holder,
    in_dtype,
    linears,
)
from helpers.peft_loading import (
    BESIDE,
    IDS,
    LAYERS,
    LOGITS,
    WEIGHTS,
    X12,
    Sources,
    assert_loads,
    on,
    output_of,
)
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import loratool


@pytest.mark.parametrize("keep_patterns", [False, True], ids=["uniform", "patterns"])
@pytest.mark.parametrize("name", [*LAYERS, *BESIDE])
def test_peft_computes_the_weighted_sum(name: str, keep_patterns: bool, tmp_path: Path) -> None:
    """PEFT loads what combine wrote, key for key, and computes base + Σ w·delta with it."""
    sources = {**LAYERS, **BESIDE}[name]
    adapters, out = sources.write(tmp_path), tmp_path / "out"
    loratool.combine(adapters, out, weights=WEIGHTS, keep_patterns=keep_patterns)
    found = output_of(assert_loads(sources.make, out), sources.inputs)
    expected = sources.expected(adapters, WEIGHTS)
    assert close(found, expected, LOGITS)
    assert not close(sources.plain(), expected, 1e-2)


@pytest.mark.parametrize("method", ["cat", "ties", "magnitude_prune_svd"])
@pytest.mark.parametrize("name", LAYERS)
def test_peft_loads_every_method(name: str, method: str, tmp_path: Path) -> None:
    """Results of other methods load as well, each module with a rank of its own."""
    sources, out = LAYERS[name], tmp_path / "out"
    options = {"density": 0.5} if "prune" in method or method == "ties" else {}
    adapters = sources.write(tmp_path)
    loratool.combine(adapters, out, weights=WEIGHTS, method=method, keep_patterns=True, **options)
    assert_loads(sources.make, out)


@pytest.mark.parametrize("keep_patterns", [False, True], ids=["uniform", "patterns"])
@pytest.mark.parametrize("name", LAYERS)
def test_peft_loads_ranks_chosen_by_energy(name: str, keep_patterns: bool, tmp_path: Path) -> None:
    """With `energy` each module may have its own rank, and PEFT gives it that."""
    sources, out = LAYERS[name], tmp_path / "out"
    adapters = sources.write(tmp_path)
    loratool.combine(adapters, out, weights=WEIGHTS, energy=0.8, keep_patterns=keep_patterns)
    assert_loads(sources.make, out)


#: Both adapters hold a copy of the embedding they adapt, as PEFT saves it. The copies are equal,
#: and `combine` keeps one; `merge` refuses two adapters that replace one tensor.
NOT_MERGED = ("token-embedding",)


@pytest.mark.parametrize("name", [n for n in (*LAYERS, *BESIDE) if n not in NOT_MERGED])
def test_combining_then_merging_is_merging_both(name: str, tmp_path: Path) -> None:
    """Merging the combination into a base equals merging the adapters with their weights."""
    sources = {**LAYERS, **BESIDE}[name]
    adapters = sources.write(tmp_path)
    base, out = tmp_path / "base", tmp_path / "out"
    write_model(base, sources.make())
    loratool.combine(adapters, out, weights=WEIGHTS)
    loratool.merge(base, out, tmp_path / "once", dtype="float32")
    loratool.merge(base, adapters, tmp_path / "both", weights=WEIGHTS, dtype="float32")
    once, both, before = read(tmp_path / "once"), read(tmp_path / "both"), read(base)
    assert once.keys() == both.keys() == before.keys()
    assert any(not torch.equal(both[key], before[key]) for key in both)
    for key in both:
        assert close(once[key], both[key], FLOAT32), key


def test_conv1d_is_still_announced(tmp_path: Path) -> None:
    """`fan_in_fan_out`, without which PEFT warns and corrects itself, is kept for Conv1D layers."""
    sources, out = LAYERS["conv1d-layers"], tmp_path / "out"
    loratool.combine(sources.write(tmp_path), out)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "fan_in_fan_out is set")
        assert_loads(gpt_layers, out)


def write_model(folder: Path, model: nn.Module) -> None:
    """A base directory, by transformers itself where the model is one of its own."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
        return
    folder.mkdir()
    save_file({k: v.clone() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    if any(isinstance(layer, Conv1D) for layer in model.children()):
        (folder / "config.json").write_text('{"model_type": "gpt2"}')


def test_tokens_and_embedding_factors_are_refused_together(tmp_path: Path) -> None:
    """Trained token rows and factors of one embedding, which PEFT cannot load, are refused."""
    sources = Sources(
        embeddings, IDS, (on("z", trainable_token_indices={"l": [3, 9]}), on("l", r=2))
    )
    adapters = sources.write(tmp_path)
    with pytest.raises(loratool.LoraToolError):
        loratool.combine(adapters, tmp_path / "out")


SAME_ENDINGS = holder(
    l=lambda: nn.Linear(12, 12), z=lambda: Holder(l=nn.Linear(12, 12)), e=lambda: nn.Linear(12, 5)
)


def test_ranks_of_modules_with_one_ending_are_told_apart(tmp_path: Path) -> None:
    """`l` beside `z.l`, like Flux's `proj_out`: the rank of one is not given to the other."""
    source = on("l", r=4, rank_pattern={"^l": 2})
    sources = Sources(SAME_ENDINGS, X12, (source, source))
    adapters, out = sources.write(tmp_path), tmp_path / "out"
    loratool.combine(adapters, out, weights=WEIGHTS, keep_patterns=True)
    found = output_of(assert_loads(SAME_ENDINGS, out), X12)
    assert close(found, sources.expected(adapters, WEIGHTS), LOGITS)


def test_targets_with_one_ending_are_told_apart(tmp_path: Path) -> None:
    """Of `l` and `z.l` only the one that was adapted is a target of the result."""
    source = {"target_modules": "l"}
    sources = Sources(SAME_ENDINGS, X12, (source, source))
    adapters, out = sources.write(tmp_path), tmp_path / "out"
    loratool.combine(adapters, out, weights=WEIGHTS)
    found = output_of(assert_loads(SAME_ENDINGS, out), X12)
    assert close(found, sources.expected(adapters, WEIGHTS), LOGITS)


def test_a_module_that_cancels_is_zero_and_loads(tmp_path: Path) -> None:
    """Where two adapters cancel in one module its factors are zeros of rank one, and load."""
    sources = Sources(linears, X12, (on("l", "z"), on("l", "z")))
    one, other = sources.write(tmp_path)
    state = read(other)
    shared = {k: v for k, v in read(one).items() if k.startswith(f"{PREFIX}l.")}
    save_file({**state, **shared}, other / "adapter_model.safetensors")
    for keep_patterns in (False, True):
        out = tmp_path / str(keep_patterns)
        loratool.combine([one, other], out, weights=[1.0, -1.0], keep_patterns=keep_patterns)
        model = assert_loads(linears, out)
        delta = model.get_submodule("base_model.model.l").get_delta_weight("default")
        assert float(delta.abs().max()) <= 1e-6
        assert close(output_of(model, X12), sources.expected([one, other], [1.0, -1.0]), LOGITS)


@pytest.mark.parametrize(
    ("stored", "written"),
    [
        ("float16", None), ("bfloat16", None), ("float16", "bfloat16"), ("bfloat16", "float16"),
        ("bfloat16", "float32"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["nn-conv2d", "embedding", "lora-bias"])
def test_half_precision_loads(name: str, stored: str, written: str | None, tmp_path: Path) -> None:
    """float16 and bfloat16 adapters keep their dtype unless another is asked for, and load."""
    sources = {**LAYERS, **BESIDE}[name]
    halves = [
        in_dtype(folder, tmp_path / f"half-{number}", stored)
        for number, folder in enumerate(sources.write(tmp_path))
    ]
    out = tmp_path / "out"
    report = loratool.combine(halves, out, weights=WEIGHTS, dtype=written)
    code = written or stored
    assert report.dtype == code
    state = read(out)
    assert {value.dtype for value in state.values()} == {getattr(torch, code)}
    found = output_of(assert_loads(sources.make, out), sources.inputs)
    # Each product of two rounded factors is off by 2·eps of its terms, the logits by less than
    # some such products in a row.
    tolerance = max(LOGITS, 8 * EPS[code])
    assert close(found, sources.expected(halves, WEIGHTS), tolerance)


def test_unlike_dtypes_become_float32(tmp_path: Path) -> None:
    """Adapters of different dtypes are combined in float32."""
    one, other = LAYERS["linear"].write(tmp_path)
    half = in_dtype(other, tmp_path / "half", "bfloat16")
    report = loratool.combine([one, half], tmp_path / "out", weights=WEIGHTS)
    assert report.dtype == "float32"
    found = output_of(assert_loads(linears, tmp_path / "out"), X12)
    assert close(found, LAYERS["linear"].expected([one, half], WEIGHTS), LOGITS)
