"""Headers by range requests: large files are looked at without their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.adapters import Q, pair, write_adapter
from helpers.hub import HubServer
from helpers.hub_runs import call, config, downloads, factors, paths, run, sparse


def test_inspecting_200_mb_moves_less_than_one(hub: HubServer, home: Path, tmp_path: Path) -> None:
    """The header alone, by a range; and the report is the local one without norms."""
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
    file = sparse(
        tmp_path / "big" / "adapter_model.safetensors", factors(names, 200_000, 200_000, 64), "F16"
    )
    assert file.stat().st_size > 200_000_000
    (tmp_path / "big" / "adapter_config.json").write_text(config(r=64))
    hub.add("org/big", dict(paths(tmp_path / "big")))
    local = run(hub, home, "inspect", tmp_path / "big", "--json").json
    assert hub.log == []
    for name in ("org/big", "hf://org/big/adapter_model.safetensors"):
        hub.clear()
        done = run(hub, home, "inspect", name, "--json")
        assert 0 < hub.sent() < 1_000_000
        assert downloads(hub) == []
        assert done.err == ""
        _assert_same_facts(done.json, local)
    text = run(hub, home, "inspect", "org/big").out
    assert "--norms" in text
    assert "org/big" in text
    assert not list(home.rglob("*.safetensors"))


def _assert_same_facts(found: dict[str, Any], local: dict[str, Any]) -> None:
    """All that headers tell; norms are not there, and said not to be."""
    assert found["measured"] is False
    norms = ("delta_norm", "spectral_norm", "stable_rank")
    assert all(m[key] is None for m in found["modules"] for key in norms)
    for document in (found, local):
        for module in document["modules"]:
            for key in norms:
                module.pop(key, None)
        document["warnings"] = [w for w in document["warnings"] if w["code"] != "zero-delta"]
    gone = {"source", "measured"}
    assert {k: v for k, v in found.items() if k not in gone} == {
        k: v for k, v in local.items() if k not in gone
    }


def test_norms_are_downloaded_when_asked_for(hub: HubServer, home: Path, tmp_path: Path) -> None:
    """Above 50 MB only with --norms or --spectrum, once, and without a bar in a pipe."""
    big = tmp_path / "big"
    sparse(big / "adapter_model.safetensors", factors([Q], 200_000, 200_000, 33), "F32")
    (big / "adapter_config.json").write_text(config(r=33))
    hub.add("org/above", dict(paths(big)))
    assert run(hub, home, "inspect", "org/above", "--json").json["measured"] is False
    assert downloads(hub) == []
    done = run(hub, home, "inspect", "org/above", "--norms", "--json")
    assert (done.json["measured"], done.err) == (True, "")
    assert done.json["modules"][0]["delta_norm"] == 0
    assert downloads(hub) == ["adapter_model.safetensors"]
    # Now that it is here, nothing more needs to be asked for.
    done = run(hub, home, "inspect", "org/above", "--spectrum", "--json")
    assert len(done.json["modules"][0]["singular_values"]) == 33
    assert run(hub, home, "inspect", "org/above", "--json").json["measured"] is True
    assert downloads(hub) == ["adapter_model.safetensors"]


def test_a_small_adapter_is_measured_unasked(hub: HubServer, home: Path, places: Path) -> None:
    """The whole report is the local one, norms to the last digit."""
    found = run(hub, home, "inspect", "org/adapter", "--json").json
    local = run(hub, home, "inspect", places / "adapter", "--json").json
    assert found.pop("source") == "org/adapter"
    assert local.pop("source") == str(places / "adapter")
    assert found == local
    assert "org/adapter/adapter_model.safetensors" in run(hub, home, "inspect", "org/adapter").out


def test_coverage_from_the_headers_of_a_large_base(
    hub: HubServer, home: Path, tmp_path: Path
) -> None:
    """Shards of several hundred megabytes give their headers and nothing else."""
    base, shards = tmp_path / "base", 4
    weight_map = {}
    for i in range(shards):
        names = [f"model.layers.{i}.self_attn.{p}.weight" for p in ("q_proj", "v_proj")]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        sparse(base / file, {name: [5_000, 5_000] for name in names}, "F16")
        weight_map |= dict.fromkeys(names, file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    paths_ = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    sparse(tmp_path / "a" / "adapter_model.safetensors", factors(paths_, 5_000, 5_000, 4), "F16")
    (tmp_path / "a" / "adapter_config.json").write_text(config())
    hub.add("org/large", dict(paths(base)))
    local = run(hub, home, "inspect", tmp_path / "a", "--base", base, "--json").json
    done = run(hub, home, "inspect", tmp_path / "a", "--base", "org/large", "--json")
    assert sum(p.stat().st_size for p in base.iterdir()) > 390_000_000
    assert 0 < hub.sent() < 1_000_000
    assert downloads(hub) == []
    found = done.json
    assert (found["base"].pop("measured"), local["base"].pop("measured")) == (False, True)
    assert (found["base"].pop("source"), local["base"].pop("source")) == ("org/large", str(base))
    assert found["base"] == local["base"]
    assert [c["adapted"] for c in found["base"]["coverage"]] == [3, 0]
    assert "relative_norm" not in found["modules"][0]


def test_norms_of_a_base_fetch_the_shards_that_are_adapted(
    hub: HubServer, home: Path, tmp_path: Path, places: Path
) -> None:
    """--norms with --base downloads the shards of adapted weights alone, and says ‖ΔW‖/‖W‖."""
    where = {}
    index = json.loads((places / "base" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        where.setdefault(file, []).append(name)
    file, names = next((f, n) for f, n in where.items() if f"{Q}.weight" in n)
    adapter = write_adapter(tmp_path / "a", pair(Q, 128, 128), {})
    arguments = ["inspect", adapter, "--json", "--norms", "--base"]
    found = run(hub, home, *arguments, "org/base").json
    local = run(hub, home, *arguments, places / "base").json
    assert downloads(hub) == [file]
    assert found["base"]["measured"] is True
    assert found["modules"] == local["modules"]
    assert found["modules"][0]["relative_norm"] > 0
    assert names


_HEADERS = """
from loratool.adapters.reading import read_adapter
told = {}
for length in sys.argv[2:]:
    found = read_adapter(f"{sys.argv[1]}/h{length}")
    tensors = [(t.name, t.dtype, t.shape, t.start, t.nbytes) for t in found.tensors.values()]
    told[length] = [found.format, found.metadata, tensors]
print(json.dumps(told))
"""

#: Around one hundred thousand bytes, with and without the 8 of the length and the 64 read first.
_LENGTHS = [
    *(99_900, 99_928, 99_936, *range(99_988, 100_011), *range(100_054, 100_075)),
    *(100_200, 163_840, 199_990, 200_000, 200_010, 200_128, 300_000, 2_000_000),
]


@pytest.mark.parametrize("width", [6, 60_000])
def test_headers_around_the_first_guess(
    hub: HubServer, warm: Path, tmp_path: Path, width: int
) -> None:
    """However long a header is, short of the file's end or far from it, it is read right."""
    shapes = factors([Q], 5, width, 4)
    for length in _LENGTHS:
        folder = tmp_path / "headers" / f"h{length}"
        sparse(folder / "adapter_model.safetensors", shapes, "F32", length)
        (folder / "adapter_config.json").write_text(config())
    name = f"org/headers-{width}"
    hub.add(name, dict(paths(tmp_path / "headers")))
    lengths = list(map(str, _LENGTHS))
    found = call(hub, warm, _HEADERS, f"hf://{name}", *lengths)
    assert downloads(hub) == []
    assert found == call(hub, warm, _HEADERS, str(tmp_path / "headers"), *lengths)
    assert all(told[0] == "peft" for told in found.values())


@pytest.mark.parametrize("length", [100_100, 2_000_000])
def test_inspect_with_a_long_header(
    hub: HubServer, home: Path, tmp_path: Path, length: int
) -> None:
    """A header of many tensors, most of them beyond the first range."""
    folder = tmp_path / "long"
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(length // 400)]
    shapes = factors(names, 40, 40, 2)
    shapes |= factors(["model.layers.0.mlp.up_proj"], 3_000_000, 3_000_000, 3)
    sparse(folder / "adapter_model.safetensors", shapes, "F32")
    (folder / "adapter_config.json").write_text(config(r=2))
    hub.add(f"org/long-{length}", dict(paths(folder)))
    local = run(hub, home, "inspect", folder, "--json", "--include", "up_proj").json
    found = run(hub, home, "inspect", f"org/long-{length}", "--json", "--include", "up_proj").json
    assert downloads(hub) == []
    assert hub.sent() < 1_000_000 + length
    _assert_same_facts(found, local)
