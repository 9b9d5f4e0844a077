"""Completeness: every part of an adapter lands, or the merge fails before it writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import FIXTURES, pair, run_cli, write_adapter
from safetensors.numpy import load_file

import loratool
from loratool.errors import MatchError

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def astray(tmp_path: Path) -> Path:
    """One module that fits the fixtures' base, and seven whose names do not."""
    tensors = pair(Q, 128, 128)
    for layer in range(7):
        tensors |= pair(f"model.layers.{layer}.self_attn.q_project", 128, 128)
    return write_adapter(tmp_path / "adapter", tensors, {"base_model_name_or_path": "some/model"})


def test_first_five_are_named_with_the_nearest_name(astray: Path, tmp_path: Path) -> None:
    """The error counts what is lost, names five with what they may have meant, and the base."""
    with pytest.raises(MatchError) as error:
        loratool.merge(FIXTURES / "base", astray, tmp_path / "out")
    message = error.value.message
    assert message.startswith("7 parts of the adapter do not fit the base")
    assert message.count("the base has no") == 5
    assert "(nearest: model.layers.0.self_attn.q_proj.weight)" in message
    assert "and 2 more" in message
    assert "some/model" in error.value.hint
    assert "--allow-unmatched" in error.value.hint
    assert not (tmp_path / "out").exists()


def test_allow_unmatched_merges_the_rest_and_records_it(astray: Path, tmp_path: Path) -> None:
    """What fits is merged; what does not is a warning in the report and in loratool.json."""
    report = loratool.merge(FIXTURES / "base", astray, tmp_path / "out", allow_unmatched=True)
    assert report.modules == 1
    assert [w.code for w in report.warnings] == ["unmatched"]
    record = json.loads((tmp_path / "out" / "loratool.json").read_text())
    assert record["result"]["warnings"][0]["code"] == "unmatched"
    assert "q_project" in record["result"]["warnings"][0]["message"]


def test_allow_unmatched_also_covers_tensors_without_meaning(tmp_path: Path) -> None:
    """A tensor nobody knows stops the merge, unless it is allowed to stay behind."""
    tensors = {**pair(Q, 128, 128), "base_model.model.x.lora_secret": np.ones(3, np.float32)}
    adapter = write_adapter(tmp_path / "adapter", tensors, {})
    arguments = ["merge", str(FIXTURES / "base"), str(adapter), "-o", str(tmp_path / "out")]
    assert "unknown-tensors" in run_cli(*arguments).stderr
    allowed = run_cli(*arguments, "--allow-unmatched")
    assert allowed.exit_code == 0
    assert "unknown-tensors" in allowed.stderr


def test_wrong_shapes_say_expected_and_found(tmp_path: Path) -> None:
    """A module of another width is refused with both shapes; nothing is transposed to fit."""
    adapter = write_adapter(
        tmp_path / "adapter", pair("model.layers.0.self_attn.k_proj", 128, 64), {}
    )
    with pytest.raises(MatchError, match=r"B·A gives \[128, 64\], .* is \[64, 128\]"):
        loratool.merge(FIXTURES / "base", adapter, tmp_path / "out")


def test_the_adapters_tokenizer_wins_and_its_config_stays(tmp_path: Path) -> None:
    """Tokenizer files of the adapter replace the base's; its own config never comes along."""
    adapter = write_adapter(tmp_path / "adapter", pair(Q, 128, 128), {})
    (adapter / "added_tokens.json").write_text('{"<new>": 256}')
    (adapter / "tokenizer_config.json").write_text('{"from": "the adapter"}')
    (adapter / "README.md").write_text("of the adapter")
    loratool.merge(FIXTURES / "base", adapter, tmp_path / "out")
    out = tmp_path / "out"
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"from": "the adapter"}
    assert (out / "added_tokens.json").is_file()
    assert (out / "tokenizer.json").read_bytes() == (
        FIXTURES / "base" / "tokenizer.json"
    ).read_bytes()
    assert not (out / "adapter_config.json").exists()
    assert not (out / "README.md").exists()


def test_provenance_names_inputs_by_hash(tmp_path: Path) -> None:
    """loratool.json has versions, options, hashes of adapter files, base identity, shard hashes,
    and neither a path nor a date."""
    import hashlib

    loratool.merge(FIXTURES / "base", FIXTURES / "adapter", tmp_path / "out", weights=[0.5])
    text = (tmp_path / "out" / "loratool.json").read_text()
    record = json.loads(text)
    adapter = FIXTURES / "adapter" / "adapter_model.safetensors"
    expected = hashlib.sha256(adapter.read_bytes()).hexdigest()
    assert record["adapters"][0]["files"]["adapter_model.safetensors"] == expected
    options = {"dtype": "float16", "weights": [0.5], "allow_unmatched": False}
    assert record["options"] == options
    assert record["versions"].keys() == {"loratool", "torch", "numpy"}
    assert len(record["base"]["header_sha256"]) == 64
    assert record["shards"].keys() == {p.name for p in (tmp_path / "out").glob("*.safetensors")}
    assert str(tmp_path) not in text
    assert str(FIXTURES) not in text
    for name, digest in record["shards"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest
        assert load_file(tmp_path / "out" / name)
