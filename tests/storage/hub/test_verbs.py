"""Every command takes ids where it takes paths, for models of all shapes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.adapters import Q
from helpers.hub import HubServer
from helpers.hub_runs import (
    assert_same_output,
    contents,
    downloads,
    paths,
    refused,
    run,
    small,
    sparse,
)
from helpers.places import FIXTURES
from helpers.quantised import llama_state, write_nf4_base

import loratool


def test_one_safetensors_file_of_any_name(hub: HubServer, home: Path, tmp_path: Path) -> None:
    """A base whose only weights are called otherwise, as a repository and as that file."""
    base = tmp_path / "odd"
    sparse(base / "weights-v2.safetensors", {f"{Q}.weight": [12, 10]}, "F32")
    (base / "config.json").write_text('{"model_type": "llama"}')
    hub.add("org/odd", {**paths(base), "onnx/model.onnx": b"x" * 20_000})
    adapter = small(tmp_path / "a")
    for name in ("org/odd", "hf://org/odd/weights-v2.safetensors"):
        found = run(hub, home, "inspect", adapter, "--base", name, "--json").json["base"]
        assert [c["adapted"] for c in found["coverage"]] == [1]
        assert found["model_type"] == "llama"
    assert downloads(hub) == []


def test_a_quantised_base_is_known_from_headers(hub: HubServer, home: Path, tmp_path: Path) -> None:
    """Its format and what is adapted of it need the descriptions of its weights, by ranges, and no
    weights; --norms fetches the shards of what is adapted."""
    base, adapter = tmp_path / "base", small(tmp_path / "a")
    state = {n: t for n, t in llama_state(64, layers=6).items() if n != f"{Q}.weight"}
    state |= {f"{Q}.weight": torch.full((12, 10), 0.5), "extra.weight": torch.ones(512, 512)}
    write_nf4_base(base, state, shard_of=lambda name: int("extra" in name))
    hub.add("org/nf4", dict(paths(base)))
    command = ["inspect", adapter, "--base", "org/nf4", "--json"]
    found = run(hub, home, *command).json["base"]
    assert (found["quantised"], found["quantised_weights"]) == ("NF4", 42)
    assert (found["quantised_adapted"], found["measured"]) == (1, False)
    assert [n for n in downloads(hub) if n.endswith(".safetensors")] == []
    assert len(hub.requests("/cdn/", "GET")) < 20
    found = run(hub, home, *command, "--norms").json
    assert found["base"]["measured"]
    weights = {n for n in downloads(hub) if n.endswith(".safetensors")}
    assert weights == {"model-00001-of-00002.safetensors"}
    ratios = [m["relative_norm"] for m in found["modules"]]
    assert [m.relative_norm for m in loratool.inspect(adapter, base=base).modules] == ratios


def test_torch_files(hub: HubServer, home: Path, tmp_path: Path) -> None:
    """Sharded .bin bases and .bin adapters merge to the same bytes as from the disk."""
    import torch
    from safetensors.torch import load_file

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    weight_map = {}
    for i in (1, 2):
        name = f"model.layers.{i}.self_attn.q_proj.weight"
        file = f"pytorch_model-0000{i}-of-00002.bin"
        torch.save({name: torch.full((128, 128), float(i))}, base / file)
        weight_map[name] = file
    (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (base / "config.json").write_text('{"model_type": "llama"}')
    state = load_file(FIXTURES / "adapter" / "adapter_model.safetensors")
    state = {n: t for n, t in state.items() if "layers.1.self_attn.q_proj" in n}
    torch.save(state, adapter / "adapter_model.bin")
    shutil.copy(FIXTURES / "adapter" / "adapter_config.json", adapter)
    hub.add("org/torch-base", dict(paths(base)))
    hub.add("org/torch-adapter", dict(paths(adapter)))
    run(hub, home, "merge", base, adapter, "-o", tmp_path / "local" / "out")
    assert hub.log == []
    command = ["merge", "org/torch-base", "org/torch-adapter", "-o", tmp_path / "out"]
    run(hub, home, *command)
    found, local = contents(tmp_path / "out"), contents(tmp_path / "local" / "out")
    assert {n for n in found if found[n] != local[n]} == {"loratool.json"}
    assert len(downloads(hub)) == 3


@pytest.mark.parametrize(
    "command",
    [["resize", "adapter", "--rank", "4"],
     ["combine", "html", "tables", "--weight", "0.7", "--weight", "0.4"],
     ["extract", "base", "tuned", "--rank", "4", "--base-name", "org/base"]],
    ids=lambda command: command[0],
)  # fmt: skip
def test_adapters_made_from_ids_equal_those_from_paths(
    hub: HubServer, warm: Path, places: Path, tmp_path: Path, command: list[str]
) -> None:
    """Adapter weights, config and tokenizer to the byte; the record adds where they come from."""
    verb, *rest = command
    names = [word for word in rest if (places / word).is_dir()]
    options = [word for word in rest if word not in names]
    at_hub = [f"org/{name}" for name in names]
    run(hub, warm, verb, *at_hub, *options, "-o", tmp_path / "out")
    run(hub, warm, verb, *(places / n for n in names), *options, "-o", tmp_path / "local" / "out")
    record = assert_same_output(tmp_path / "out", tmp_path / "local" / "out")
    text = json.dumps(record)
    for name in at_hub:
        assert f'"{name}"' in text
        assert hub.branches(name)["main"] in text


def test_an_extracted_adapter_names_its_base_by_id(
    hub: HubServer, warm: Path, tmp_path: Path
) -> None:
    """base_model_name_or_path is what others can load, not a folder of the cache."""
    run(hub, warm, "extract", "org/base", "org/tuned", "--rank", "2", "-o", tmp_path / "out")
    told = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == "org/base"


def test_compare_with_ids(hub: HubServer, warm: Path, places: Path) -> None:
    """The numbers are those of the paths, with the base and without; torch is not needed."""
    gone = {"adapters", "base", "verdicts", "warnings"}
    for base in ([], ["--base"]):
        found = run(
            hub, warm, "compare", "org/html", "org/tables", *base, *(["org/base"] if base else []),
            "--json",
        ).json  # fmt: skip
        local = run(
            hub, warm, "compare", places / "html", places / "tables",
            *base, *([places / "base"] if base else []), "--json",
        ).json  # fmt: skip
        assert found["adapters"] == ["org/html", "org/tables"]
        assert {k: v for k, v in found.items() if k not in gone} == {
            k: v for k, v in local.items() if k not in gone
        }


def test_verify_and_unmerge_what_lies_on_the_hub(
    merged: tuple[Path, Path, list[str], int], hub: HubServer, home: Path, tmp_path: Path
) -> None:
    """A reversible merge was uploaded with its undo folder; the base comes back bit for bit."""
    files = {n: p for n, p in paths(merged[1]).items() if n != "README.md"}
    assert any(name.startswith("loratool/") for name in files)
    hub.add("org/merged", {**files, "onnx/model.onnx": b"x" * 20_000})
    done = run(hub, home, "verify", "org/merged", "--base", "org/base", "org/adapter", "--json")
    assert done.err == ""
    run(hub, home, "unmerge", "org/merged", "org/adapter", "-o", tmp_path / "out")
    found = contents(tmp_path / "out")
    for name, path in paths(FIXTURES / "base").items():
        assert found[name] == path.read_bytes(), name
    assert "model.onnx" not in downloads(hub)
    wrong = refused(hub, home, "unmerge", "org/merged", "org/html", "-o", tmp_path / "no")
    assert "org/merged" in wrong["message"] + wrong["hint"] or "html" in wrong["message"]
    assert not (tmp_path / "no").exists()
    # By subtraction the originals may lie on the Hub too.
    command = ["unmerge", "org/merged", "org/adapter", "--subtract", "--base", "org/base"]
    done = run(hub, home, *command, "-o", tmp_path / "back", "--json")
    assert done.json["exact"] is True
    assert (
        contents(tmp_path / "back")["model-00001-of-00003.safetensors"]
        == (FIXTURES / "base" / "model-00001-of-00003.safetensors").read_bytes()
    )


def test_checkpoints_of_a_repository_are_listed_with_their_addresses(
    hub: HubServer, home: Path, tmp_path: Path
) -> None:
    """Several are an error whose command can be run; the only one is taken, and that is said."""
    made = dict(paths(small(tmp_path / "a")))
    for number, names in (("one", [500]), ("run", [1000, 200])):
        files = {f"checkpoint-{n}/{name}": file for n in names for name, file in made.items()}
        hub.add(f"org/{number}", files)
    done = run(hub, home, "inspect", "org/run", code=1)
    assert "2 adapters could be meant:\n  - checkpoint-200\n  - checkpoint-1000\n" in done.err
    address = "hf://org/run/checkpoint-1000"
    assert f"loratool inspect {address}" in " ".join(done.err.split())
    assert run(hub, home, "inspect", address).err == ""
    assert "checkpoint-500 holds the only adapter" in run(hub, home, "inspect", "org/one").err
    assert [n for n in downloads(hub) if n.endswith("optimizer.pt")] == []
