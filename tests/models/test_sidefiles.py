"""What lies beside the weights: what comes along, what stays behind, and that it is said."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.adapters import Q, pair, write_adapter
from helpers.bases import small_base
from helpers.places import FIXTURES

import loratool


def test_other_weights_are_left_out_and_said_so(tmp_path: Path) -> None:
    """Other formats and checkpoints of a training run stay behind; parts that modules.json names
    come along; everything left is listed."""
    base = small_base(tmp_path / "base")
    (base / "model.gguf").write_bytes(b"x")
    for folder in ("checkpoint-10", "2_Dense", "1_Pooling"):
        (base / folder).mkdir()
        (base / folder / "config.json").write_text("{}")
    for folder in ("checkpoint-10", "2_Dense"):
        (base / folder / "model.safetensors").write_bytes(b"x")
    (base / "modules.json").write_text(json.dumps([{"path": "2_Dense"}, {"path": "1_Pooling"}]))
    adapter = write_adapter(tmp_path / "adapter", pair(Q, 6, 5), {})
    report = loratool.merge(base, adapter, tmp_path / "out")
    assert set(report.left_out) == {"model.gguf", "checkpoint-10/"}
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").read_bytes() == b"x"
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
    assert not (tmp_path / "out" / "checkpoint-10").exists()


def test_the_adapters_tokenizer_wins_and_its_config_stays(tmp_path: Path) -> None:
    """The adapter's tokenizer takes the place of the base's, all of it; its own config never comes
    along."""
    adapter = write_adapter(tmp_path / "adapter", pair(Q, 128, 128), {})
    (adapter / "tokenizer.json").write_text('{"from": "the adapter"}')
    (adapter / "added_tokens.json").write_text('{"<new>": 255}')
    (adapter / "README.md").write_text("of the adapter")
    loratool.merge(FIXTURES / "base", adapter, tmp_path / "out")
    out = tmp_path / "out"
    assert json.loads((out / "tokenizer.json").read_text()) == {"from": "the adapter"}
    assert (out / "added_tokens.json").is_file()
    assert (FIXTURES / "base" / "tokenizer_config.json").is_file()
    assert not (out / "tokenizer_config.json").exists()
    assert not (out / "adapter_config.json").exists()
    assert not (out / "README.md").exists()
