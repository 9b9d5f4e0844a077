"""Seeds, threads and processes: the same bytes where they shall be, others where not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.adapters import PREFIX, WEIGHTS, K, Q, lora, pair, write_adapter
from helpers.cli import run_cli
from helpers.outcomes import sha256s
from safetensors.numpy import load_file

import loratool
from loratool.linalg.methods import METHODS


def test_random_methods_follow_their_seed(tmp_path: Path) -> None:
    """dare gives the same bytes for a seed with 1 or 2 threads and in another process, and others
    for another seed."""
    paths = [f"model.layers.{n}.q_proj" for n in range(6)]
    sources = [lora(tmp_path / str(n), *paths, seed=n) for n in range(2)]
    options: dict[str, Any] = {"method": "dare_ties_core", "density": 0.5}
    runs = []
    for number, threads in enumerate((1, 2)):
        out = tmp_path / f"run{number}"
        loratool.combine(sources, out, seed=7, threads=threads, **options)
        runs.append(sha256s(out))
    out = tmp_path / "process"
    done = run_cli(
        "combine", *map(str, sources), "-o", str(out), "--method", "dare_ties_core", "--density",
        "0.5", "--seed", "7",
    )  # fmt: skip
    assert done.exit_code == 0
    assert runs[0] == runs[1] == sha256s(out)
    loratool.combine(sources, tmp_path / "seed", seed=8, **options)
    assert sha256s(tmp_path / "seed")[WEIGHTS] != runs[0][WEIGHTS]


@pytest.mark.parametrize("method", METHODS)
def test_threads_do_not_matter(tmp_path: Path, method: str) -> None:
    """Every method gives the same bytes with 1 and with 3 threads."""
    paths = [f"model.layers.{n}.q_proj" for n in range(5)]
    sources = [lora(tmp_path / str(n), *paths, seed=n, rank=3 + n) for n in range(3)]
    density = 0.4 if METHODS[method].prunes else None
    for threads in (1, 3):
        out = tmp_path / f"threads{threads}"
        loratool.combine(sources, out, method=method, density=density, threads=threads)
    assert sha256s(tmp_path / "threads1") == sha256s(tmp_path / "threads3")


def test_random_numbers_differ_between_modules_and_adapters(tmp_path: Path, out: Path) -> None:
    """Copies of one module, in one adapter or in two, are not pruned at the same places."""
    one = pair(Q, 12, 10, 4, 0)
    both = one | {name.replace(Q, K): value for name, value in one.items()}
    source = write_adapter(tmp_path / "one", both, {})
    loratool.combine(source, out, method="dare_linear", density=0.5)
    tensors = load_file(out / WEIGHTS)
    kept = [tensors[f"{PREFIX}{path}.lora_A.weight"] != 0 for path in (Q, K)]
    assert (kept[0] != kept[1]).any()
    copy = write_adapter(tmp_path / "two", one, {})
    twice = write_adapter(tmp_path / "three", one, {})
    loratool.combine([copy, twice], tmp_path / "sum", method="dare_linear", density=0.5)
    values = load_file(tmp_path / "sum" / WEIGHTS)[f"{PREFIX}{Q}.lora_A.weight"]
    single = one[f"{PREFIX}{Q}.lora_A.weight"] * math.sqrt(2)
    multiples = np.unique(np.round(values / single, 3))
    np.testing.assert_allclose(multiples, [0, 2, 4])  # 2 where one of them is pruned
