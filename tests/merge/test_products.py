"""Deltas at their places: block by block, in float32 and exactly, through merge, check and undo."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.merging import Here
from helpers.places import ROOT
from safetensors.numpy import load_file, save_file

from loratool.adapters.factors import Kind, LowRank, Matrix, ModuleShape, Part
from loratool.extracting.difference import Difference
from loratool.merging.executor import Care, execute
from loratool.merging.match import Delta
from loratool.merging.plan import Plan
from loratool.merging.planning import build_plan
from loratool.merging.products import ExactProduct, LoadedDelta, Placement, Terms
from loratool.merging.proof.checking import Pair, measure
from loratool.merging.proof.findings import judge
from loratool.merging.undo.assembling import assemble
from loratool.merging.undo.file import read_undo
from loratool.merging.undo.recording import UndoRecorder
from loratool.merging.undo.restoring import restore
from loratool.merging.undo.sidefiles import Kept
from loratool.models.checkpoint import open_checkpoint
from loratool.models.layouts.place import Place
from loratool.storage.header import read_header
from loratool.storage.tensors import Bytes, FilePool, TensorInfo
from loratool.storage.values import Values, read_float32, values_of
from loratool.streams.run import Run

#: Places and the shape of the tensor they are in. Every way has a square matrix among them.
PLACES = {
    "plain": (Place("w"), (24, 10)),
    "square": (Place("w"), (12, 12)),
    "transposed": (Place("w", transposed=True), (10, 24)),
    "transposed-square": (Place("w", transposed=True), (12, 12)),
    "fused": (Place("w", rows=range(8, 16)), (24, 10)),
    "interleaved": (Place("w", rows=range(1, 24, 2)), (24, 10)),
    "swapped-halves": (Place("w", rows=(*range(6, 12), *range(6))), (12, 10)),
    "rotary": (Place("w", rows=tuple(8 + 4 * (i % 2) + i // 2 for i in range(8))), (24, 10)),
    "backwards": (Place("w", rows=range(11, -1, -1)), (12, 12)),
    "expert": (Place("w", expert=2), (4, 12, 10)),
    "expert-rows": (Place("w", expert=1, rows=range(6, 12)), (3, 12, 10)),
    "expert-transposed": (Place("w", expert=3, transposed=True), (4, 12, 12)),
    "expert-interleaved": (
        Place("w", expert=1, rows=range(1, 12, 2), transposed=True), (2, 10, 12),
    ),
    "convolution": (Place("w"), (8, 3, 2, 2)),
}  # fmt: skip


@dataclass(frozen=True)
class Dense:
    """Factors of a kind that loratool has never heard of: Δ itself, without B and A."""

    path: str
    whole: TensorInfo
    scale: float = 0.75
    kind: Kind = "linear"
    algorithm: str = "dense"
    alpha: float | None = None
    magnitude: TensorInfo | None = None
    bias: TensorInfo | None = None
    rank: int = 0
    adds: bool = True
    is_sound: bool = True

    @property
    def outline(self) -> ModuleShape:
        return ModuleShape(self.path, self.kind, self.shape[0], (self.shape[1],))

    @property
    def shape(self) -> tuple[int, int]:
        return self.whole.shape[0], self.whole.shape[1]

    @property
    def dtype(self) -> str:
        return self.whole.dtype

    @property
    def parts(self) -> dict[str, TensorInfo]:
        return {"Δ": self.whole}

    @property
    def tensors(self) -> list[TensorInfo]:
        return [self.whole]

    @property
    def parameters(self) -> int:
        return self.whole.numel

    @property
    def weight_name(self) -> str:
        return f"{self.path}.weight"

    def left_right(self, files: FilePool | None = None) -> tuple[Matrix, Matrix] | None:
        return None

    def part_of(self, files: FilePool) -> Part:
        values = read_float32(self.whole, files)
        return lambda rows, columns: values[rows][:, columns]


def factors_at(folder: Path, shape: tuple[int, int], dora: bool = False) -> LowRank:
    """Factors of rank 3 for a delta of this shape."""
    rng = np.random.default_rng(7)
    tensors = {
        "a": rng.standard_normal((3, shape[1])).astype(np.float32),
        "b": rng.standard_normal((shape[0], 3)).astype(np.float32),
        "m": rng.uniform(0.5, 2, shape[0]).astype(np.float32),
    }
    save_file(tensors, folder / "factors.safetensors")
    found, _ = read_header(folder / "factors.safetensors")
    magnitude = found["m"] if dora else None
    return LowRank("m", "linear", found["a"], found["b"], 3.0, 1.5, magnitude)


def dense_of(folder: Path, factors: LowRank) -> Dense:
    b, a = factors.left_right()
    save_file({"delta": b @ a}, folder / "dense.safetensors")
    return Dense("m", read_header(folder / "dense.safetensors")[0]["delta"])


def test_a_tensor_without_deltas_is_asked_nothing() -> None:
    """However long it is: what is only cast has no rows, and every element would be looked up."""
    assert list(Terms[LoadedDelta]().meeting(0, 10**15)) == []


@pytest.mark.parametrize("size", [1, 5, 7, 1000])
@pytest.mark.parametrize("name", PLACES)
def test_blocks_of_a_delta_add_up_to_it(name: str, size: int, tmp_path: Path) -> None:
    """However the stored rows are cut, every element of Δ is added once, at its place."""
    place, stored = PLACES[name]
    factors = factors_at(tmp_path, place.shape(stored))
    b, a = factors.left_right()
    wanted = np.zeros(stored)
    matrix = place.part(wanted)
    numbers = place.part(np.arange(wanted.size).reshape(stored))
    assert matrix.shape == (len(b), a.shape[1])
    wanted.reshape(-1)[numbers] += 2 * 1.5 * (b.astype(np.float64) @ a)
    rows = stored[0] * (stored[1] if place.expert is not None else 1)
    columns = wanted.size // rows
    delta = Delta(place, factors, 2.0)
    with FilePool() as files:
        loaded = LoadedDelta(delta, stored, files, torch.float32)
        exact = ExactProduct(delta, stored, files)
    found = torch.zeros(rows, columns)
    exactly = torch.zeros(rows, columns, dtype=torch.float64)
    for low in range(0, rows, size):
        high = min(low + size, rows)
        loaded.add_to(found[low:high], low, high)
        window = exact.window(low, high)
        if window is not None:
            part = window.of(exactly[low:high])
            part += exact.product(window, torch.float64)
    assert np.allclose(found.numpy().reshape(stored), wanted, rtol=0, atol=1e-5)
    assert np.allclose(exactly.numpy().reshape(stored), wanted, rtol=0, atol=1e-5)
    assert np.array_equal(found.numpy().reshape(stored) != 0, wanted != 0)


def test_rows_that_are_no_permutation_of_a_range_are_refused() -> None:
    """A place that says the same row twice, or leaves odd gaps, is a mistake of the layout."""
    for rows in ((0, 0, 1), (0, 1, 3)):
        with pytest.raises(ValueError, match="no permutation"):
            Placement(Place("w", rows=rows), (8, 4))


def plan_of(folder: Path, place: Place, stored: tuple[int, ...], *deltas: Delta) -> Plan:
    """The plan of a merge into one tensor, with deltas that no adapter on the disk could have."""
    base = folder / "base"
    base.mkdir()
    rng = np.random.default_rng(3)
    save_file({"w": rng.standard_normal(stored).astype(np.float32)}, base / "model.safetensors")
    plan = build_plan(open_checkpoint(base), [], [], "float16")
    (shard,) = plan.shards
    plan.shards[shard] = [replace(plan.jobs[0], deltas=deltas, action="merge")]
    return plan


def merged_in(plan: Plan, folder: Path) -> np.ndarray:
    folder.mkdir()
    with UndoRecorder(plan, folder) as recorder:
        written = execute(plan.outputs, Here(folder), Run(threads=2), Care(recorder))
    kept = Kept(folder / "undo.safetensors", {}, {})
    assemble(plan, kept, written.recorded, folder, Run(threads=2))
    return load_file(folder / "model.safetensors")["w"]


@pytest.mark.parametrize("kind", ["plain", "dora", "dense", "two"])
@pytest.mark.parametrize("name", PLACES)
def test_a_delta_at_any_place_is_merged_proven_and_taken_back(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merge rounds W + Δ once, verify says so, and the undo file gives the base back bit for bit:
    for every place, for DoRA, for two deltas, and for factors that are no pair."""
    monkeypatch.setattr("loratool.storage.tensors.BLOCK_ELEMENTS", 50)
    place, stored = PLACES[name]
    low_rank = factors_at(tmp_path, place.shape(stored), kind == "dora")
    factors: Any = dense_of(tmp_path, low_rank) if kind == "dense" else low_rank
    deltas = [Delta(place, factors, 0.5)] * (2 if kind == "two" else 1)
    plan = plan_of(tmp_path, place, stored, *deltas)
    got = merged_in(plan, tmp_path / "out")

    w = read_float32(plan.base.tensors["w"])
    wanted = w.astype(np.float64)
    b, a = low_rank.left_right()
    change = sum(d.scale for d in deltas) * (b.astype(np.float64) @ a)
    after = place.part(wanted) + change
    if kind == "dora":
        gain = read_float32(low_rank.magnitude) / np.linalg.norm(after, axis=1)
        after = after * gain[:, None]
    wanted.reshape(-1)[place.part(np.arange(w.size).reshape(stored))] = after
    assert got.dtype == np.float16
    assert np.abs(got - wanted).max() <= np.abs(wanted).max() * 2.0**-11
    untouched = np.ones(stored, bool)
    untouched.reshape(-1)[place.part(np.arange(w.size).reshape(stored))] = False
    assert np.array_equal(got[untouched], w.astype(np.float16)[untouched])

    merged = open_checkpoint(tmp_path / "out" / "model.safetensors")
    stats = measure([Pair(plan.jobs[0], merged.tensors["w"])], Run())
    assert judge(plan.jobs[0], stats["w"]).code == "once"
    assert stats["w"].equal == w.size

    undo = read_undo(tmp_path / "out" / "undo.safetensors")
    (tmp_path / "back").mkdir()
    restore(plan, merged, undo, undo.shards, Here(tmp_path / "back"), Run())
    originals = [p / "model.safetensors" for p in (tmp_path / "base", tmp_path / "back")]
    assert len({hashlib.sha256(path.read_bytes()).hexdigest() for path in originals}) == 1


@pytest.mark.process
def test_a_shard_can_be_made_by_another_process(tmp_path: Path) -> None:
    """What says "this output shard, from these inputs" goes through a pickle, and a process that
    knows nothing else writes the same bytes."""
    place, stored = PLACES["expert-rows"]
    factors = factors_at(tmp_path, place.shape(stored))
    plan = plan_of(tmp_path, place, stored, Delta(place, factors))
    (shard,) = plan.outputs
    assert shard.sources == {tmp_path / "base" / "model.safetensors"}
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    here = execute(plan.outputs, Here(tmp_path / "here"), Run())
    program = (
        "import pickle, sys; from pathlib import Path\n"
        "from loratool.merging.executor import execute\n"
        "from loratool.streams.run import Run\n"
        "shard = pickle.load(sys.stdin.buffer)\n"
        "from helpers.merging import Here\n"
        "print(execute([shard], Here(Path(sys.argv[1])), Run()).shards[shard.name])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "there"],
        input=pickle.dumps(shard), capture_output=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))},
    )  # fmt: skip
    assert done.stdout.decode().strip() == here.shards[shard.name]
    made = [(tmp_path / where / shard.name).read_bytes() for where in ("here", "there")]
    assert made[0] == made[1]


@dataclass(frozen=True)
class Packed(TensorInfo):
    """A tensor of a kind that loratool has never heard of: bytes that stand for multiples of ⅛."""

    @property
    def itemsize(self) -> int:
        return 4

    @property
    def nbytes(self) -> int:
        return 4 * self.numel


class Eighths(Values):
    """What the bytes stand for, as float32."""

    def __init__(self, info: Packed, files: FilePool) -> None:
        super().__init__(info)
        self._files = files

    def read_into(self, low: int, high: int, raw: Bytes) -> None:
        packed = np.empty(high - low, np.uint8)
        self._files.read_into(self.info, low, packed.data)
        raw.view(np.float32)[:] = packed.view(np.int8) / np.float32(8)


@values_of.register
def _(info: Packed, files: FilePool) -> Values:
    return Eighths(info, files)


def test_a_tensor_that_is_stored_otherwise_is_merged_proven_and_compared(tmp_path: Path) -> None:
    """Whatever gives its values by range is read by merge, verify and extract alike."""
    rng = np.random.default_rng(2)
    stored = rng.integers(-100, 100, (24, 10), dtype=np.int8)
    (tmp_path / "packed").write_bytes(b"head" + stored.tobytes())
    info = Packed("w", "F32", (24, 10), tmp_path / "packed", 4)
    factors = factors_at(tmp_path, (24, 10))
    plan = plan_of(tmp_path, Place("w"), (24, 10), Delta(Place("w"), factors))
    (shard,) = plan.shards
    job = replace(plan.jobs[0], source=info, dtype="F32")
    plan.shards[shard] = [job]
    (tmp_path / "out").mkdir()
    execute(plan.outputs, Here(tmp_path / "out"), Run())
    got = load_file(tmp_path / "out" / shard)["w"]
    b, a = factors.left_right()
    assert np.allclose(got, stored / 8 + 1.5 * b @ a, rtol=0, atol=1e-5)

    merged = read_header(tmp_path / "out" / shard)[0]["w"]
    stats = measure([Pair(job, merged)], Run())
    assert judge(job, stats["w"]).code == "once"
    with FilePool() as files:
        size = Difference(info, merged, files, torch.device("cpu")).measure()
    assert np.isclose(size.energy, np.sum((1.5 * b @ a) ** 2), rtol=1e-5)
    assert np.array_equal(read_float32(info), stored / np.float32(8))
