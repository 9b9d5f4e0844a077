"""What a merge writes: whole, the same every time, and nothing else."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from helpers.adapters import Q, pair, write_adapter
from helpers.bases import small_base
from helpers.files import (
    ADAPTED,
    NORM,
    OTHER,
    load,
    random_of,
    same,
    small_lora,
    small_state,
    write_base,
)
from helpers.merging import BASE, large_lora
from helpers.outcomes import sha256s
from helpers.processes import start_merge
from safetensors.torch import save_file

import loratool
from loratool.errors import ValueRangeError


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "in" / "base", small_state())


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return small_lora(tmp_path / "in" / "lora")


@pytest.mark.process
def test_the_result_does_not_depend_on_threads_or_on_the_run(tmp_path: Path) -> None:
    """Two processes, and 1, 2 and 4 threads, write the same bytes, loratool.json included."""
    base, lora = tmp_path / "base", large_lora(tmp_path / "lora")
    odd = {
        ADAPTED: random_of(torch.bfloat16, 1024, 1024), OTHER: random_of(torch.float32, 700, 1900),
        "model.embed_tokens.weight": random_of(torch.float16, 1_300_003),
    }  # fmt: skip
    write_base(base, odd, {NORM: random_of(torch.float64, 77)})
    runs = []
    for number, threads in enumerate((1, 2, 4)):
        folder = tmp_path / str(number) / "out"
        loratool.merge(base, lora, folder, threads=threads)
        runs.append(sha256s(folder))
    for number in (3, 4):
        folder = tmp_path / str(number) / "out"
        with start_merge(base, lora, folder, env={"PYTHONHASHSEED": str(number)}) as process:
            said, _ = process.communicate(timeout=60)
        assert (process.returncode, said) == (0, "")
        runs.append(sha256s(folder))
    assert len(runs[0]) == 5
    assert all(run == runs[0] for run in runs)


def test_an_output_is_complete(fixture_merged: Path) -> None:
    """All tensors and side files are there, and nothing else, nor beside it."""
    names = {p.name for p in fixture_merged.iterdir()}
    assert names == {p.name for p in BASE.iterdir()} | {"loratool.json"}
    shapes = {n: t.shape for n, t in load(BASE).items()}
    merged = load(fixture_merged)
    assert {n: t.shape for n, t in merged.items()} == shapes
    assert {t.dtype for t in merged.values()} == {torch.float16}
    assert os.listdir(fixture_merged.parent) == ["out"]


def test_the_index_fits_the_shards(fixture_merged: Path) -> None:
    """total_size is the bytes of all tensors, weight_map lists each in the shard that holds it."""
    index = json.loads((fixture_merged / "model.safetensors.index.json").read_text())
    merged = load(fixture_merged)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in merged.values())
    there = {n: p.name for p in fixture_merged.glob("*.safetensors") for n in load_one(p)}
    assert index["weight_map"] == there
    assert there == json.loads((BASE / "model.safetensors.index.json").read_text())["weight_map"]


def load_one(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without it
        return list(file.keys())


def test_a_single_file_has_no_index(tmp_path: Path, base: Path, lora: Path) -> None:
    """A base in one file gives one file; total_size of nothing is written nowhere."""
    loratool.merge(base, lora, tmp_path / "out")
    assert set(sha256s(tmp_path / "out")) == {"model.safetensors", "config.json", "loratool.json"}
    load_one(tmp_path / "out" / "model.safetensors")


def test_inputs_are_not_touched(tmp_path: Path, base: Path, lora: Path) -> None:
    """Neither content nor times of the inputs change, nor does a file appear among them."""

    def state() -> list[tuple[str, int, str]]:
        files = sha256s(tmp_path / "in")
        return [(n, (tmp_path / "in" / n).stat().st_mtime_ns, h) for n, h in files.items()]

    before = state()
    loratool.merge(base, lora, tmp_path / "out")
    assert state() == before


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], ids=oct)
def test_permissions_are_those_of_any_new_file(
    tmp_path: Path, base: Path, lora: Path, umask: int
) -> None:
    """The umask decides, not the private staging directory nor the mode of the input files."""
    for path in base.iterdir():
        path.chmod(0o400)
    (base / "sub").mkdir()
    (base / "sub" / "tool.py").write_text("x")
    before = os.umask(umask)
    try:
        loratool.merge(base, lora, tmp_path / "out")
        assert os.umask(umask) == umask  # unchanged by the run
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask
    assert stat.S_IMODE((tmp_path / "out" / "sub").stat().st_mode) == 0o777 & ~umask
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o666 & ~umask}


def test_missing_parents_are_made(tmp_path: Path, base: Path, lora: Path) -> None:
    """An output in directories that do not exist yet is made with them."""
    loratool.merge(base, lora, tmp_path / "new" / "deeper" / "out")
    assert (tmp_path / "new" / "deeper" / "out" / "model.safetensors").is_file()
    assert os.listdir(tmp_path / "new" / "deeper") == ["out"]


def test_a_refused_merge_makes_no_parents(tmp_path: Path, base: Path, lora: Path) -> None:
    """A run that fails while writing takes away the parent directories it made."""
    state = small_state() | {OTHER: torch.full((8, 8), torch.nan)}
    save_file(state, base / "model.safetensors")
    with pytest.raises(ValueRangeError):
        loratool.merge(base, lora, tmp_path / "new" / "deeper" / "out")
    assert not (tmp_path / "new").exists()


def test_a_dry_run_writes_nothing(tmp_path: Path, base: Path, lora: Path) -> None:
    """A dry run reports the bytes that a run writes, and touches no disk."""
    output = tmp_path / "new" / "out"
    planned = loratool.merge(base, lora, output, dry_run=True)
    assert not (tmp_path / "new").exists()
    done = loratool.merge(base, lora, output)
    assert planned.bytes_written == done.bytes_written
    assert done.bytes_written == sum(t.nbytes for t in load(output).values())


def test_progress_ends_at_the_total(tmp_path: Path, base: Path, lora: Path) -> None:
    """Progress grows to exactly the bytes announced, so that a bar ends full."""
    calls: list[tuple[int, int, str]] = []
    report = loratool.merge(base, lora, tmp_path / "out", progress=lambda *call: calls.append(call))
    assert [c[0] for c in calls] == sorted(c[0] for c in calls)
    assert calls[-1] == (report.bytes_written, report.bytes_written, "model.safetensors")


def test_a_name_with_the_tensor_norm_is_the_same_in_and_out(
    tmp_path: Path, base: Path, lora: Path
) -> None:
    """With dtype base, tensors that the adapter does not touch keep every bit."""
    loratool.merge(base, lora, tmp_path / "out", dtype="base")
    untouched = {OTHER, NORM}
    merged = load(tmp_path / "out")
    assert same({n: merged[n] for n in untouched}, {n: small_state()[n] for n in untouched})


def test_base_of_one_numbered_shard_keeps_its_index(tmp_path: Path) -> None:
    """model-00001-of-00001.safetensors is found by its index only, so the output has one too."""
    base = small_base(tmp_path / "base")
    shard = "model-00001-of-00001.safetensors"
    (base / "model.safetensors").rename(base / shard)
    index = {"metadata": {}, "weight_map": {f"{Q}.weight": shard}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    adapter = write_adapter(tmp_path / "adapter", pair(Q, 6, 5), {})
    loratool.merge(base, adapter, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert written == {"metadata": {"total_size": 60}, "weight_map": index["weight_map"]}
