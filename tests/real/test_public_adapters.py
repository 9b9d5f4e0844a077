"""Real public files, where they lie beside the project: each gets the right verdict."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.adapters import pair, write_adapter
from helpers.places import SHARED

import loratool
from loratool.errors import AdapterError, FileError, LoraToolError

# Other people's files may not be copied into the project, so a clone of it alone cannot have them,
# CI's among them. Nothing is tested here alone: the formats that they are examples of are tested on
# made-up files in adapters/ and inspect/, which run everywhere.
pytestmark = pytest.mark.skipif(
    not SHARED.is_dir(), reason="other people's files, no part of the project; see adapters/"
)

#: What each file is, and the warnings it must get.
VERDICTS = [
    ("gpt2-cattn-cproj-seqcls-deepbiolab", "peft", {"square-conv1d"}, 36),
    ("bloom560m-enable_lora-bin-wujindou", "peft", {"enable-lora"}, 24),
    ("openai-privacy-filter-moe-branbot6", "peft", set(), 32),
    ("tinyllama-v0-added-tokens-fms", "peft", {"target-absent", "partial-embedding-rows"}, 1),
    ("tinyllama-v0-fsdp-dump-fms", "peft", set(), 16),
    ("prompt-tuning-bloomz560m-tgis", "prompt-tuning", set(), 0),
    ("prompt-prefix-tinyllama-safetensors-tgis", "prompt-tuning", set(), 0),
    ("prompt-prefix-decoder-pt-tgis/decoder.pt", "bare-tensor", set(), 0),
    ("ia3-t0-3b-tfew", "ia3", set(), 0),
    ("sd15-cloneofsimo-disney", "cloneofsimo", set(), 0),
    ("sd15-cloneofsimo-pt-list/lora_illust.pt", "positional", set(), 0),
    ("sd15-cloneofsimo-pt-list/lora_kiriko2.ti.pt", "textual-inversion", set(), 0),
    ("mlx-qwen25-05b-wyek1n", "mlx", {"unused-alpha"}, 8),
    ("empty-header-16-bytes-ostris", "empty", set(), 0),
    ("optimizer-default-names-fms", "optimizer-state", set(), 0),
    ("sam-lora-rank4-mathieunlp", "positional", set(), 0),
    ("base-tiny-llama-hf2q", "base-checkpoint", set(), 0),
    ("base-tiny-BloomForCausalLM-caikit", "base-checkpoint", set(), 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "code", "warned", "modules"), VERDICTS)
def test_verdict(name: str, code: str, warned: set[str], modules: int) -> None:
    """Every public file is called by its name, and warned of for what is odd in it."""
    report = loratool.inspect(SHARED / name, spectrum=True)
    assert report.format == code
    assert {w.code for w in report.warnings} == (warned if report.is_read else {"not-an-adapter"})
    assert report.total_modules == modules
    assert report.parameters == sum(t.numel for t in report.tensors)


def test_text_in_the_place_of_weights() -> None:
    """Thirteen bytes of text are not read as a header of petabytes."""
    with pytest.raises(FileError, match="not a safetensors file"):
        loratool.inspect(SHARED / "fake-13-bytes-granite-tgis")


@pytest.mark.parametrize(
    ("name", "words"),
    [("bloom560m-enable_lora-bin-wujindou", "enable_lora"),
     ("prompt-tuning-bloomz560m-tgis", "prompt tuning"),
     ("ia3-t0-3b-tfew", "(IA)³"),
     ("optimizer-default-names-fms", "optimizer")],
)  # fmt: skip
def test_merge_refuses_by_name(name: str, words: str, tmp_path: Path) -> None:
    """What cannot be merged is refused with the reason, and nothing is written."""
    with pytest.raises(AdapterError) as error:
        loratool.merge(SHARED / "base-tiny-llama-hf2q", SHARED / name, tmp_path / "out")
    assert words in error.value.message
    assert list(tmp_path.iterdir()) == []


def test_partial_embedding_is_refused(tmp_path: Path) -> None:
    """Five saved rows of an embedding do not silently become the embedding."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = SHARED / "tinyllama-v0-added-tokens-fms"
    (tmp_path / "config").mkdir()
    shutil.copyfile(folder / "base_config.json", tmp_path / "config" / "config.json")
    config = AutoConfig.from_pretrained(tmp_path / "config")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    with pytest.raises(LoraToolError) as error:
        loratool.merge(tmp_path / "base", folder, tmp_path / "out")
    assert "5 rows" in error.value.message
    assert not (tmp_path / "out").exists()


def test_fsdp_dump_merges_like_peft(tmp_path: Path) -> None:
    """A raw FSDP state dict merges, given as a file, to what PEFT computes with it."""
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = SHARED / "tinyllama-v0-fsdp-dump-fms"
    (tmp_path / "config").mkdir()
    shutil.copyfile(folder / "base_config.json", tmp_path / "config" / "config.json")
    config = AutoConfig.from_pretrained(tmp_path / "config")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    model.save_pretrained(tmp_path / "base")
    dump = folder / "pytorch_model_fsdp.bin"
    report = loratool.merge(tmp_path / "base", dump, tmp_path / "out", dtype="float32")
    assert report.modules == 16
    (tmp_path / "adapter").mkdir()
    shutil.copyfile(folder / "adapter_config.json", tmp_path / "adapter" / "adapter_config.json")
    shutil.copyfile(dump, tmp_path / "adapter" / "adapter_model.bin")
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.arange(1, 20)[None]
    with torch.no_grad():
        expected, found = adapted(tokens).logits, merged(tokens).logits
        with adapted.disable_adapter():
            before = adapted(tokens).logits
    assert (expected - found).abs().max() < 1e-5
    assert (expected - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "target", "shape"),
    [("base-tiny-llama-hf2q", "model.layers.0.self_attn.q_proj", (8, 8)),
     ("base-sharded-named-of-4-hf2q", "model.layers.1.self_attn.q_proj", (8, 8)),
     ("base-tiny-BertForSequenceClassification-caikit",
      "bert.encoder.layer.0.attention.self.query", (32, 32)),
     ("base-tiny-BloomForCausalLM-caikit", "transformer.h.0.self_attention.query_key_value",
      (96, 32)),
     ("base-tiny-bert-coldfire", "encoder.layer.0.attention.self.query", (32, 32))],
)  # fmt: skip
def test_public_bases_are_merged_into(
    name: str, target: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    """Small public bases of all file kinds take an adapter; one tensor changes, the rest stays."""
    import numpy as np
    from safetensors.numpy import load_file

    from loratool.models.checkpoint import open_checkpoint
    from loratool.storage.values import read_raw

    original = open_checkpoint(SHARED / name).tensors
    folder = write_adapter(tmp_path / "adapter", pair(target, *shape), {})
    loratool.merge(SHARED / name, folder, tmp_path / "out", dtype="base")
    merged: dict[str, np.ndarray] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        merged |= load_file(path)
    assert merged.keys() == original.keys()
    changed = [n for n in merged if merged[n].tobytes() != read_raw(original[n]).tobytes()]
    assert changed == [f"{target}.weight"]
