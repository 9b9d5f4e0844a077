"""What a merge makes before torch is imported: the bytes and the counts that torch makes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.digests import blake3s
from safetensors.torch import save_file

import loratool
from loratool.errors import ValueRangeError
from loratool.merging.arithmetic import Merging
from loratool.merging.casting import Casting
from loratool.merging.counts import Counts
from loratool.merging.plan import Job
from loratool.storage.header import read_header
from loratool.storage.tensors import FilePool
from loratool.streams.workers import Workers

KINDS = {"F16": torch.float16, "BF16": torch.bfloat16}


def job_of(folder: Path, bits: np.ndarray, source: str, dtype: str, checked: bool = True) -> Job:
    values = torch.from_numpy(bits.view(np.int16)).view(KINDS[source])
    save_file({"w": values}, folder / "w.safetensors")
    info = read_header(folder / "w.safetensors")[0]["w"]
    return Job("w", dtype, info, "cast", checked=checked)


def made(part: Casting | Merging) -> tuple[bytes, Counts]:
    data = np.empty(part.length * part.itemsize, np.uint8)
    with Workers(1) as workers:
        task = part.begin(0, part.length, workers)
        task.compute(0, part.length, data)
    return data.tobytes(), task.counts


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("dtype", KINDS)
def test_every_number_is_cast_as_torch_casts_it(tmp_path: Path, source: str, dtype: str) -> None:
    """All finite numbers of 16 bits that fit, with what is subnormal or zero then."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = torch.from_numpy(bits.view(np.int16)).view(KINDS[source])
    fits = torch.isfinite(values.to(KINDS[dtype])) & torch.isfinite(values)
    job = job_of(tmp_path, bits[fits.numpy()], source, dtype)
    assert Casting.fits(job)
    with FilePool() as files:
        assert made(Casting(job, files)) == made(Merging(job, files))


@pytest.mark.parametrize("dtype", KINDS)
def test_values_that_do_not_fit_are_refused_with_their_reason(tmp_path: Path, dtype: str) -> None:
    """In the words of a merge that has torch from the start."""
    bits = np.array([0x3F80, 0x7F00 if dtype == "F16" else 0x7FC0], np.uint16)
    job = job_of(tmp_path, bits, "BF16", dtype)
    said = []
    with FilePool() as files:
        for kind in (Casting, Merging):
            with pytest.raises(ValueRangeError) as refused:
                made(kind(job, files))
            said.append(str(refused.value))
    assert said[0] == said[1]
    assert ("overflows F16" if dtype == "F16" else "NaN") in said[0]


def test_what_needs_arithmetic_does_not_fit(tmp_path: Path) -> None:
    """Sums, and dtypes that a table would be too large for."""
    job = job_of(tmp_path, np.zeros(4, np.uint16), "BF16", "F32")
    assert not Casting.fits(job)


@pytest.mark.process
def test_torch_is_imported_beside_the_first_tensors(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """Slowly imported, it is waited for; the output is the same, and torch's threads too."""
    program = (
        "import sys, time, threading, json\n"
        "import loratool.streams.torch_import as t, loratool.merging.casting as c\n"
        "real = t._import\n"
        "t._import = lambda: (time.sleep(1), real())\n"
        "cast = []\n"
        "begin = c.Casting.begin\n"
        "c.Casting.begin = lambda *x: (cast.append(x[0].job.name), begin(*x))[1]\n"
        "import loratool\n"
        "loratool.merge(*sys.argv[1:])\n"
        "import torch\n"
        "alone = torch.get_num_threads()\n"
        "print(json.dumps([cast, alone]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, base, adapter, tmp_path / "early"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    cast, threads = json.loads(done.stdout)
    expected = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.get_num_threads())"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert cast  # the embedding, at least
    assert threads == int(expected.stdout)
    loratool.merge(base, adapter, tmp_path / "late")
    assert blake3s(tmp_path / "early") == blake3s(tmp_path / "late")
