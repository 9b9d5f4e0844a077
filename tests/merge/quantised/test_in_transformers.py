"""Mixed models in transformers, of bases that the libraries themselves quantised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.files import State, load

import loratool

pytestmark = pytest.mark.quantised


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from helpers.live_quantised import plain_llama

    return plain_llama(tmp_path_factory.mktemp("live") / "llama")


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from helpers.live_quantised import mxfp4, plain_gpt_oss

    room = tmp_path_factory.mktemp("live")
    mxfp4(plain_gpt_oss(room / "plain"), room / "mxfp4")
    return room


def assert_as_loaded(merged: Path, plain: Path, opened: State, tolerance: float) -> None:
    """transformers finds every tensor it looks for and no other, has the opened weights as they
    are in the file, and computes what it computes with the plain model, but for `tolerance`: of
    bfloat16, and of activations that some formats quantise too."""
    from helpers.live_quantised import loaded

    ids = torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(1))
    # Outside of training mode bitsandbytes packs weights anew on some processors.
    model, reference = loaded(merged).train(), loaded(plain).train()
    state = model.state_dict()
    for name, value in opened.items():
        assert state[name].dtype == value.dtype == torch.bfloat16, name
        assert torch.equal(state[name], value), name
    with torch.no_grad():
        found, expected = (m(ids).logits.float() for m in (model, reference))
    assert (found - expected).norm() < tolerance * expected.norm()


KINDS = ("nf4", "int8", "fp8_blocks", "ct_fp8_channel", "ct_int4", "torchao_int8")


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_llama(kind: str, llama: Path, tmp_path: Path) -> None:
    """q, v, gate and down of both layers are adapted; k and up are opened with them, o is not."""
    from helpers.live_quantised import BASES, adapter_of

    BASES[kind](llama, tmp_path / "base")
    adapter = adapter_of(llama, tmp_path / "adapter", "q_proj", "v_proj", "gate_proj", "down_proj")
    for how, dtype in (("keep", None), ("plain", "bfloat16")):
        loratool.merge(tmp_path / "base", adapter, tmp_path / how, quantised=how, dtype=dtype)
    files = load(tmp_path / "keep")
    opened = {n: t for n, t in files.items() if "_proj.weight" in n and "o_proj" not in n}
    assert len(opened) == 12
    assert_as_loaded(tmp_path / "keep", tmp_path / "plain", opened, 0.05)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "torchao_int8"])
def test_a_llama_quantised_again(kind: str, llama: Path, tmp_path: Path) -> None:
    """What loratool wrote in the base's own format, the libraries read as loratool reads it."""
    from helpers.live_quantised import BASES, adapter_of

    BASES[kind](llama, tmp_path / "base")
    adapter = adapter_of(llama, tmp_path / "adapter", "q_proj", "v_proj", "gate_proj", "down_proj")
    loratool.merge(
        tmp_path / "base", adapter, tmp_path / "again", quantised="requantise", force=True
    )
    assert load(tmp_path / "again").keys() == load(tmp_path / "base").keys()
    loratool.dequantise(tmp_path / "again", tmp_path / "plain", dtype="bfloat16")
    assert_as_loaded(tmp_path / "again", tmp_path / "plain", {}, 0.05)


def test_gpt_oss_with_attention_adapted(gpt_oss: Path, tmp_path: Path) -> None:
    """The experts are copied as they are."""
    from helpers.live_quantised import adapter_of

    adapter = adapter_of(gpt_oss / "plain", tmp_path / "adapter", "q_proj", "v_proj")
    loratool.merge(gpt_oss / "mxfp4", adapter, tmp_path / "out")
    loratool.merge(
        gpt_oss / "mxfp4", adapter, tmp_path / "plain", quantised="plain", dtype="bfloat16"
    )
    base, files = load(gpt_oss / "mxfp4"), load(tmp_path / "out")
    packed = [name for name in base if name.endswith(("_blocks", "_scales"))]
    assert all(torch.equal(files[name], base[name]) for name in packed)
    adapted = {name: files[name] for name in files if name.endswith("q_proj.weight")}
    assert_as_loaded(tmp_path / "out", tmp_path / "plain", adapted, 1e-3)


def test_gpt_oss_with_experts_adapted(gpt_oss: Path, tmp_path: Path) -> None:
    """Those of layer 0 become plain, all of them; those of layer 1 are copied."""
    from helpers.live_quantised import adapter_of

    parameter = "layers.0.mlp.experts.down_proj"
    adapter = adapter_of(gpt_oss / "plain", tmp_path / "adapter", "q_proj", parameters=(parameter,))
    for how, dtype in (("keep", None), ("plain", "bfloat16")):
        loratool.merge(gpt_oss / "mxfp4", adapter, tmp_path / how, quantised=how, dtype=dtype)
    files = load(tmp_path / "keep")
    opened = {n: t for n, t in files.items() if n.startswith("model.layers.0.mlp.experts.")}
    assert {n.rpartition(".")[2] for n in opened} >= {"gate_up_proj", "down_proj"}
    assert "model.layers.1.mlp.experts.down_proj_blocks" in files
    assert_as_loaded(tmp_path / "keep", tmp_path / "plain", opened, 1e-3)
