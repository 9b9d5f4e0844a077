"""Formats, ranks, errors and losses of extracted adapters, as PEFT finds them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.losses import held_out_loss
from helpers.models import read
from helpers.places import FIXTURES
from helpers.tuning import EXACT, MODELS, WARNINGS, computed, load_peft, tune
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, PreTrainedModel

import loratool


def as_bin(folder: Path) -> None:
    torch.save(read(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_shards(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("store", [as_bin, as_shards])
def test_bases_and_tuned_models_in_other_files(
    store: Callable[[Path], None], dtype: torch.dtype, tmp_path: Path
) -> None:
    """How a base is stored, and in which dtype the tuned model is, makes no difference."""
    work = tune(tmp_path, MODELS["llama"], dtype=dtype)
    store(work.base)
    work.extract()
    work.check()


@pytest.mark.parametrize("name", ["llama", "gpt2", "clip", "resnet", "bert", "whisper", "albert"])
def test_ranks_of_their_own_load(name: str, tmp_path: Path) -> None:
    """With rank_pattern each module has in PEFT the rank that the report states."""
    work = tune(tmp_path, MODELS[name])
    report = work.extract(energy=0.7, patterns=True)
    assert len({m.rank for m in report.modules}) > 1
    base = work.found.load(work.base)
    inputs = work.found.inputs()
    before = computed(base, inputs)
    model = load_peft(base, work.adapter, *WARNINGS.get(name, ()))
    own = model.get_base_model()
    for module in report.modules:
        layer = own.get_submodule(module.path)
        assert isinstance(layer, LoraLayer)
        assert (layer.r["default"], layer.scaling["default"]) == (module.rank, 1.0)
    found, expected = computed(model, inputs), computed(work.merged(), inputs)
    assert (found - expected).norm() < EXACT * (expected - before).norm()


@pytest.mark.parametrize(
    ("name", "whole"),
    [("llama", ""), ("clip", ""), ("llama-tied", "model.embed_tokens"), ("gpt2", "*.wte")],
)
def test_peft_s_own_merge_gives_the_tuned_weights(name: str, whole: str, tmp_path: Path) -> None:
    """merge_and_unload gives the tuned model, for tied matrices where they are saved whole.

    PEFT's merge (0.21.2) adds the factors of a tied matrix twice, those of its own training too.
    """
    work = tune(tmp_path, MODELS[name])
    work.extract(save=[whole] if whole else [])
    base = work.found.load(work.base)
    before = computed(base, work.found.inputs())
    merged: Any = load_peft(base, work.adapter).merge_and_unload()
    assert work.error(merged, before) < EXACT


@pytest.mark.parametrize("name", ["llama", "clip"])
def test_error_of_the_report_is_that_of_the_weights(name: str, tmp_path: Path) -> None:
    """The weights that PEFT has differ from the tuned ones by the error that was stated."""
    work = tune(tmp_path, MODELS[name])
    report = work.extract(rank=6)
    base, tuned = work.found.load(work.base), work.found.load(work.tuned)
    given = {k: v.detach().clone() for k, v in base.named_parameters()}
    model = load_peft(base, work.adapter, *WARNINGS.get(name, ()))
    merged = model.merge_and_unload().state_dict()
    pairs = [(merged[k], given[k], v.detach()) for k, v in tuned.named_parameters()]
    off = sum(float((found - v).double().square().sum()) for found, _, v in pairs)
    change = sum(float((before - v).double().square().sum()) for _, before, v in pairs)
    assert (off / change) ** 0.5 == pytest.approx(report.error, rel=1e-3)
    assert report.verified == pytest.approx(report.error, rel=1e-3)


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Losses on held-out text of the base, the tuned model and adapters of several ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    text = folder / "part.txt"
    text.write_bytes((FIXTURES / "heldout.txt").read_bytes()[: 64 * 256 + 1])

    def load(name: str) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            FIXTURES / name, dtype=torch.float32
        )
        return model

    result = {side: held_out_loss(load(side), text) for side in ("base", "tuned")}
    asked: dict[str, dict[str, Any]] = {str(r): {"rank": r} for r in (1, 4, 16, 64)}
    asked["full"] = {"energy": 1.0, "save": ["norms"], "embeddings": True}
    for name, options in asked.items():
        loratool.extract(FIXTURES / "base", FIXTURES / "tuned", folder / name, **options)
        result[name] = held_out_loss(load_peft(load("base"), folder / name), text)
    return result


@pytest.mark.long
def test_loss_falls_with_the_rank(losses: dict[str, float]) -> None:
    """Each larger adapter of a real fine-tune is nearer to it, on text that none has seen."""
    row = [losses[name] for name in ("base", "1", "4", "16", "64")]
    assert all(before > after for before, after in pairwise(row)), row
    assert abs(losses["64"] - losses["tuned"]) < 0.05 * (losses["base"] - losses["tuned"])


@pytest.mark.long
def test_full_rank_has_the_loss_of_the_tuned_model(losses: dict[str, float]) -> None:
    """In float16 factors of full rank, nothing of a real fine-tune is lost."""
    assert losses["full"] == pytest.approx(losses["tuned"], abs=1e-3)
