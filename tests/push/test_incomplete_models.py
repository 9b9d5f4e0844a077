"""Half a model, or an adapter that cannot be used, is not published."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.adapters import pair, write_adapter
from helpers.hub import HubServer
from helpers.hub_runs import refused, run
from helpers.places import FIXTURES
from helpers.pushing import SHARD, WEIGHTS, add, assert_read_only, lora, text_of


def _truncate(folder: Path) -> None:
    os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - 10)


def _flip(folder: Path) -> None:
    data = bytearray((folder / SHARD).read_bytes())
    data[-100] ^= 1
    (folder / SHARD).write_bytes(data)


def _index_names_more(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.self_attn.q_proj.weight"] = SHARD
    path.write_text(json.dumps(index))


INCOMPLETE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncate, SHARD),
    "empty": (lambda f: os.truncate(f / SHARD, 0), SHARD),
    "missing": (lambda f: (f / SHARD).unlink(), SHARD),
    "no-index": (lambda f: (f / "model.safetensors.index.json").unlink(), "index"),
    "flipped": (_flip, SHARD),
    "index": (_index_names_more, "layers.9"),
    "record": (lambda f: add(f, "loratool.json", '{"half'), "loratool.json"),
}


@pytest.mark.parametrize("kind", INCOMPLETE)
def test_incomplete_models_are_refused(
    hub: HubServer, home: Path, merged: Path, repo: str, kind: str
) -> None:
    """Whatever is missing, short or not what was written: named, before anything is sent."""
    damage, word = INCOMPLETE[kind]
    damage(merged)
    found = refused(hub, home, "push", merged, repo)
    assert word in found["message"]
    assert_read_only(hub)
    assert not hub.exists(repo)


def test_what_a_killed_run_left_is_refused(
    hub: HubServer, home: Path, merged: Path, repo: str
) -> None:
    """A staging directory may look whole; it is not. Also from within and with a slash."""
    partial = merged.rename(merged.with_name(".merged.loratool-partial-ab12"))
    found = refused(hub, home, "push", f"{partial}/", repo)
    assert found["error"] == "not-pushed"
    refused(hub, home, "push", ".", repo, cwd=partial)
    refused(hub, home, "push", merged.with_name(partial.name), repo, "--dry-run")
    work = partial.with_name(".merged.loratool-work")
    work.mkdir()
    partial.rename(work / "output")
    refused(hub, home, "push", work, repo)
    refused(hub, home, "push", work / "output", repo)
    assert not hub.exists(repo)


def _nan(folder: Path) -> None:
    tensors = pair("model.layers.0.self_attn.q_proj", 128, 64)
    next(iter(tensors.values()))[1, 2] = np.nan
    config = json.loads((folder / "adapter_config.json").read_text())
    write_adapter(folder, tensors, config)


def _no_b(folder: Path) -> None:
    tensors = pair("model.layers.0.self_attn.q_proj", 128, 64)
    config = json.loads((folder / "adapter_config.json").read_text())
    write_adapter(folder, {n: t for n, t in tensors.items() if "lora_A" in n}, config)


def _wrong_rank(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 16}))


BAD_ADAPTERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nan": (_nan, "NaN"),
    "no-b": (_no_b, "lora_A"),
    "rank": (_wrong_rank, ""),
    "no-config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json"),
    "no-weights": (lambda f: (f / WEIGHTS).unlink(), WEIGHTS),
    "truncated": (lambda f: os.truncate(f / WEIGHTS, 5000), WEIGHTS),
}


@pytest.mark.parametrize("kind", BAD_ADAPTERS)
def test_adapters_that_cannot_be_used_are_refused(
    hub: HubServer, home: Path, adapter: Path, repo: str, kind: str
) -> None:
    """What inspect says cannot be merged, and what no one could load, is not published."""
    damage, word = BAD_ADAPTERS[kind]
    damage(adapter)
    found = refused(hub, home, "push", adapter, repo)
    assert word in text_of(found)
    assert_read_only(hub)
    assert not hub.exists(repo)


def test_a_record_of_other_weights(hub: HubServer, home: Path, repo: str, tmp_path: Path) -> None:
    """An adapter that loratool made and somebody changed is not what its record says."""
    lora(tmp_path / "one")
    run(hub, home, "resize", tmp_path / "one", "--rank", "2", "-o", tmp_path / "two")
    data = bytearray((tmp_path / "two" / WEIGHTS).read_bytes())
    data[-4] ^= 1
    (tmp_path / "two" / WEIGHTS).write_bytes(data)
    found = refused(hub, home, "push", tmp_path / "two", repo)
    assert WEIGHTS in found["message"]
    assert "loratool.json" in found["message"]
    assert not hub.exists(repo)


@pytest.mark.parametrize("version", [1, 2])
def test_a_model_is_held_against_its_record(
    hub: HubServer, home: Path, merged: Path, repo: str, tmp_path: Path, version: int
) -> None:
    """Shards with a sha256 (version 1) or a BLAKE3 go up, and are on the Hub by their sha256; one
    that was changed since does not."""
    model = merged
    if version == 1:
        model = Path(shutil.copytree(FIXTURES / "schema1" / "plain", tmp_path / "plain"))
    run(hub, home, "push", model, repo)
    shards = sorted(model.glob("*.safetensors"))
    assert all(hub.files(repo)[path.name] == path.read_bytes() for path in shards)
    again = run(hub, home, "push", model, repo, "--json").json
    states = {f["name"]: f["state"] for f in again["files"]}
    assert {states[path.name] for path in shards} == {"there"}
    data = bytearray(shards[0].read_bytes())
    data[-1] ^= 1
    shards[0].write_bytes(data)
    found = refused(hub, home, "push", model, repo)
    assert shards[0].name in found["message"]
    assert "loratool.json" in found["message"]


def test_what_is_needed_cannot_be_left_out(
    hub: HubServer, home: Path, merged: Path, adapter: Path, repo: str
) -> None:
    """--exclude does not make half a model."""
    for folder, pattern in (
        (merged, "model-00001*"),
        (merged, "*.json"),
        (adapter, "adapter_config.json"),
        (adapter, "*.safetensors"),
    ):
        refused(hub, home, "push", folder, repo, "--exclude", pattern, code=2)
    assert not hub.exists(repo)
