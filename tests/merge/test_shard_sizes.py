"""`--max-shard-size`: other files than the base's, and all that goes by them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from helpers.cli import run_cli
from helpers.files import load, same, small_lora, small_state, write_base
from helpers.layer_cases import write_shards
from helpers.outcomes import refused, sha256s
from helpers.places import FIXTURES
from helpers.quantised import adapter_on, llama_state, write_nf4_base

import loratool
from loratool.errors import UsageError
from loratool.storage.header import read_header
from loratool.storage.tensors import TensorInfo

BASE, ADAPTER = FIXTURES / "base", FIXTURES / "adapter"
SIZE = 20_000


def held(output: Path) -> dict[str, list[str]]:
    """The names of the tensors in each shard, in the order of their data."""
    return {name: list(header) for name, header in headers(output).items()}


def headers(output: Path) -> dict[str, dict[str, TensorInfo]]:
    return {path.name: read_header(path)[0] for path in sorted(output.glob("*.safetensors"))}


def tensor_bytes(output: Path) -> dict[str, list[int]]:
    return {name: [info.nbytes for info in of.values()] for name, of in headers(output).items()}


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("split") / "out"
    report = loratool.merge(BASE, ADAPTER, output, max_shard_size=SIZE, reversible=True)
    assert report.shards == list(held(output))
    return output


def test_shards_are_filled_up_to_the_size(split: Path) -> None:
    """None is larger unless it is one tensor, and none would have had room for the next one."""
    sizes = tensor_bytes(split)
    count = len(sizes)
    assert count > 3
    assert list(sizes) == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    assert all(sum(of) <= SIZE or len(of) == 1 for of in sizes.values())
    assert any(sum(of) > SIZE for of in sizes.values())
    assert all(sum(of) + after[0] > SIZE for of, after in pairwise(sizes.values()))


def test_the_index_names_every_tensor(split: Path) -> None:
    """It says where each lies, and how many bytes there are."""
    index = json.loads((split / "model.safetensors.index.json").read_text())
    places = {name: shard for shard, names in held(split).items() for name in names}
    assert index["weight_map"] == places
    assert index["metadata"]["total_size"] == sum(map(sum, tensor_bytes(split).values()))


def test_values_and_order_are_those_of_the_base(split: Path, tmp_path: Path) -> None:
    """Only the files differ from a merge without the option."""
    loratool.merge(BASE, ADAPTER, tmp_path / "plain")
    assert same(load(split), load(tmp_path / "plain"))
    now, before = (
        [name for names in held(output).values() for name in names]
        for output in (split, tmp_path / "plain")
    )
    assert now == before


def test_the_base_comes_back_in_its_own_files(split: Path, tmp_path: Path) -> None:
    """The undo file gives shards, index and names of the base, bit for bit."""
    assert loratool.unmerge(split, ADAPTER, tmp_path / "back").exact
    assert sha256s(tmp_path / "back") == sha256s(BASE)


def test_verify_and_subtraction_take_other_shards(split: Path, tmp_path: Path) -> None:
    """A merge is known whatever its files are; subtraction keeps the shards that are there."""
    assert loratool.verify(split, BASE, ADAPTER).verdict == "yes"
    loratool.unmerge(split, ADAPTER, tmp_path / "back", subtract=True)
    assert held(tmp_path / "back").keys() == held(split).keys()


def test_the_record_says_it(split: Path) -> None:
    """A later look at the output tells why its files are others."""
    record = json.loads((split / "loratool.json").read_text())
    assert record["options"]["max_shard_size"] == SIZE
    assert list(record["shards"]) == list(held(split))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("count", [1, 3])
def test_all_in_one_file_has_no_index(count: int, suffix: str, tmp_path: Path) -> None:
    """Where all fits, there is one file of the usual name; the base's form comes back."""
    base = write_base(tmp_path / "base", small_state())
    (base / "model.safetensors").unlink()
    write_shards(small_state(), base, count, suffix)
    adapter, out, back = small_lora(tmp_path / "adapter"), tmp_path / "out", tmp_path / "back"
    loratool.merge(base, adapter, out, max_shard_size="1 GB", reversible=True, dtype="base")
    assert list(held(out)) == ["model.safetensors"]
    assert not list(out.glob("*index*"))
    loratool.unmerge(out, adapter, back)
    assert same(load(back), small_state())
    assert len(held(back)) == count
    if suffix == "safetensors":
        assert sha256s(back) == sha256s(base)


def test_a_file_of_another_name_is_split_too(tmp_path: Path) -> None:
    """One weights file as the base gives the usual names, and comes back under its own."""
    base = write_base(tmp_path / "base", small_state())
    (base / "model.safetensors").rename(base / "mine.safetensors")
    adapter, out, back = small_lora(tmp_path / "adapter"), tmp_path / "out", tmp_path / "back"
    given = base / "mine.safetensors"
    loratool.merge(given, adapter, out, max_shard_size="300B", dtype="base", reversible=True)
    assert list(held(out)) == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    loratool.unmerge(out, adapter, back)
    assert (back / "mine.safetensors").read_bytes() == given.read_bytes()


def test_workers_and_a_stopped_run_make_the_same(split: Path, tmp_path: Path) -> None:
    """Shares are of the new shards, and a size that differs is another merge."""
    out = tmp_path / "out"
    for number in (1, 2):
        report = loratool.merge(
            BASE, ADAPTER, out, max_shard_size=SIZE, reversible=True, worker=f"{number}/2"
        )
        assert report.share is not None
    assert sha256s(out) == sha256s(split)


def test_parts_of_a_quantised_weight_stay_together(tmp_path: Path) -> None:
    """Programs that load a quantised model look for codes and scales in one file; a plain model of
    it is split by tensors."""
    state = llama_state(layers=2)
    write_nf4_base(tmp_path / "base", state)
    wanted = tmp_path / "plain", tmp_path / "split"
    loratool.dequantise(tmp_path / "base", wanted[0])
    report = loratool.dequantise(tmp_path / "base", wanted[1], max_shard_size="20kB")
    assert len(report.shards) > 2
    assert same(load(wanted[0]), load(wanted[1]))
    adapter = adapter_on(tmp_path / "adapter", {"model.layers.0.self_attn.q_proj": (64, 64)})
    out = tmp_path / "kept"
    loratool.merge(tmp_path / "base", adapter, out, quantised="keep", max_shard_size="6kB")
    homes: dict[str, set[str]] = {}
    for shard, names in held(out).items():
        for name in names:
            homes.setdefault(name.partition(".weight")[0], set()).add(shard)
    assert len(held(out)) > 4
    assert {len(shards) for shards in homes.values()} == {1}


@pytest.mark.parametrize(("size", "said"), [("0", "0 bytes"), ("much", "'much'"), ("-1", "'-1'")])
def test_a_size_that_is_none_is_refused(size: str, said: str, tmp_path: Path) -> None:
    """Before anything is read."""
    refused(UsageError, BASE, ADAPTER, tmp_path / "out", said, max_shard_size=size)


@pytest.mark.parametrize("size", ["5", "50000"])
def test_a_size_without_its_unit_is_refused(size: str, tmp_path: Path) -> None:
    """Nobody means a file for each tensor by 5; with a unit, or as a number, it is taken."""
    error = refused(UsageError, BASE, ADAPTER, tmp_path / "out", "unit", max_shard_size=size)
    assert "5GB" in error.hint
    assert f"{size}B" in error.hint
    for meant in ("50000B", 50000):
        assert loratool.merge(BASE, ADAPTER, tmp_path / "o", max_shard_size=meant, dry_run=True)


def test_the_command_takes_sizes_as_people_write_them(tmp_path: Path) -> None:
    """20kB, and a dry run that counts the files."""
    options = ["-o", str(tmp_path / "out"), "--max-shard-size", "20kB", "--json"]
    done = run_cli("merge", str(BASE), str(ADAPTER), *options, "--dry-run")
    assert done.exit_code == 0, done.stderr
    shards = json.loads(done.stdout)["shards"]
    assert len(shards) > 3
    shown = run_cli("merge", str(BASE), str(ADAPTER), *options[:-1], "--dry-run").stdout
    assert f" in {len(shards)} files, " in shown
