"""What the factors of an extracted adapter hold."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from helpers.adapters import WEIGHTS
from helpers.extracting import (
    AT,
    BF16,
    EVERYTHING,
    F16,
    F32,
    PREFIX,
    Q0,
    Pair,
    cast,
    distance,
    model,
    moved,
    moves,
    products,
    random_for,
    saved,
    singular,
    square,
    write,
)
from helpers.files import load
from safetensors.torch import save_file

import loratool

LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.mark.parametrize("rank", [3, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_merged_adapter_comes_back(tmp_path: Path, dtype: str, rank: int) -> None:
    """merge, then extract at the adapter's rank or above, gives its B·A up to what storing the
    merged weights rounded off; modules that it did not adapt are not in the file."""
    stored = getattr(torch, dtype)
    base = write(tmp_path / "base", cast(model(), stored), "shards")
    paths = [AT.format(n) + leaf for n in range(2) for leaf in LINEAR[:3]][1:]
    tensors = {}
    for path in paths:
        out, width = model()[f"{path}.weight"].shape
        tensors[f"{PREFIX}{path}.lora_A.weight"] = 0.1 * random_for(path, 3, width).float()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = random_for(path, out, 3, seed=2).float()
    lora = tmp_path / "lora"
    lora.mkdir()
    save_file(tensors, lora / WEIGHTS)
    (lora / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": paths,
                    "rank_pattern": {}, "alpha_pattern": {}})
    )  # fmt: skip
    loratool.merge(base, lora, tmp_path / "merged", dtype="base")
    loratool.extract(base, tmp_path / "merged", tmp_path / "out", rank=rank, dtype="float32")
    wanted, found = products(lora), products(tmp_path / "out")
    assert found.keys() == wanted.keys()
    assert saved(tmp_path / "out") == {}
    before, merged = load(base), load(tmp_path / "merged")
    for name, delta in wanted.items():
        noise = float((merged[name].double() - before[name].double() - delta).norm())
        limit = 2 * noise + 1e-5 * float(delta.norm())
        assert noise < (0.3 if dtype == "bfloat16" else 0.05) * float(delta.norm())
        assert float((found[name] - delta).norm()) <= limit, name
        if dtype == "float32":
            assert float((found[name] - delta).norm()) <= 1e-5 * float(delta.norm()), name


@pytest.mark.parametrize(
    ("base_kind", "base_dtype", "tuned_kind", "tuned_dtype"),
    [
        ("single", F32, "shards", F32), ("shards", BF16, "shards-sorted", F32),
        ("bin", F16, "single", BF16), ("bare", F32, "bin", BF16), ("shards", BF16, "bare", F16),
        ("bin", F32, "bin", F32),
    ],
)  # fmt: skip
def test_factors_are_the_best_ones_for_any_files_and_dtypes(
    tmp_path: Path,
    base_kind: str,
    base_dtype: torch.dtype,
    tuned_kind: str,
    tuned_dtype: torch.dtype,
) -> None:
    """Whatever the formats, splits and dtypes of the two, B·A is the SVD of tuned - base cut."""
    state = model()
    base, tuned = cast(state, base_dtype), cast(moved(state), tuned_dtype)
    report = loratool.extract(
        write(tmp_path / "base", base, base_kind), write(tmp_path / "tuned", tuned, tuned_kind),
        tmp_path / "out", rank=4, dtype="float32", **EVERYTHING,
    )  # fmt: skip
    found, goal = products(tmp_path / "out"), moves(base, tuned)
    assert len(found) == 10
    for name, product in found.items():
        u, s, v = torch.linalg.svd(goal[name], full_matrices=False)
        best = (u[:, :4] * s[:4]) @ v[:4]
        assert float((product - best).norm()) <= 1e-5 * float(goal[name].norm()), name
    assert report.unchanged == 0
    assert distance(base, tuned, tmp_path / "out") == pytest.approx(report.error, rel=1e-4)
    assert saved(tmp_path / "out").keys() == goal.keys() - found.keys()


@pytest.mark.parametrize("exact", [False, True])
def test_large_matrices_get_nearly_the_best_error(tmp_path: Path, exact: bool) -> None:
    """The randomised method is within a thousandth of the best error, the full one is the best,
    and what the report calls the best possible is not above what is possible."""
    state = {f"{Q0}.weight": (0.1 * random_for("q", 160, 200)).float()}
    pair = Pair(tmp_path, state, moved(state, decay=0.97))
    report = pair.extract(rank=6, exact=exact)
    delta = moves(pair.before, pair.after)[f"{Q0}.weight"]
    values = singular(delta)
    best = float(values[6:].norm() / values.norm())
    real = distance(pair.before, pair.after, pair.out)
    assert best * (1 - 1e-6) <= real <= best * (1 + (1e-6 if exact else 1e-3))
    assert report.error == pytest.approx(real, rel=1e-4)
    assert report.best_error is not None
    assert 0.99 * best <= report.best_error <= best * (1 + 1e-6)
    assert report.best_error == pytest.approx(report.modules[0].best_error, rel=1e-9)
    assert (report.best_error < report.error) is not exact
    found = report.modules[0].singular_values
    assert found[:6] == pytest.approx(values[:6].tolist(), rel=1e-3)


@pytest.mark.parametrize("size", [1e-12, 1e6])
def test_very_small_and_large_changes_are_no_different(tmp_path: Path, size: float) -> None:
    """The size of weights and changes does not matter: squares neither vanish nor overflow."""
    state = model()
    base = {n: (t * size) for n, t in state.items()}
    tuned = {n: (t * size) for n, t in moved(state).items()}
    pair = Pair(tmp_path, base, tuned)
    report = pair.extract(rank=4)
    assert distance(base, tuned, pair.out) == pytest.approx(report.error, rel=1e-3)
    assert report.norm == pytest.approx(math.sqrt(square(moves(base, tuned).values())), rel=1e-5)
