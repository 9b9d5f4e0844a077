"""Models and modules that were never merged, merged otherwise or swapped are named."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.adapters import write_adapter
from helpers.files import State, random_of, write_base
from helpers.places import FIXTURES
from helpers.verifying import (
    DTYPES,
    K,
    Q,
    all_of,
    bad,
    check,
    codes,
    deltas,
    merged,
    only,
    original,
)

import loratool

O = "model.layers.1.self_attn.o_proj.weight"  # noqa: E741
V = "model.layers.1.self_attn.v_proj.weight"


def randomised(seed: int = 0) -> State:
    """Deltas of another adapter: random, of the same ranks and norms."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, delta in deltas().items():
        b = torch.randn(delta.shape[0], 8, generator=generator)
        other = b @ torch.randn(8, delta.shape[1], generator=generator)
        found[name] = other * (delta.norm() / other.norm())
    return found


def swapped(pairs: Sequence[tuple[str, str]]) -> State:
    """The deltas with those of each pair exchanged."""
    found = dict(deltas())
    for one, other in pairs:
        found[one], found[other] = deltas()[other], deltas()[one]
    return found


def test_unmodified_base_was_never_merged(tmp_path: Path) -> None:
    """The unmodified base in its own dtype was never merged, and the report says so."""
    report = check(tmp_path / "m", dict(original()))
    assert report.verdict == "no"
    assert bad(report) == all_of("not-merged")
    assert report.summary == ["all 28 modules were never merged"]
    assert all(abs(f.applied or 0.0) < 0.001 for f in report.findings)
    assert all(f.lost == pytest.approx(1, abs=1e-3) for f in report.findings)


@pytest.mark.parametrize("dtype", DTYPES)
def test_base_that_was_merely_cast_was_never_merged(dtype: str, tmp_path: Path) -> None:
    """The base in another dtype is told from a merge in that dtype."""
    report = check(tmp_path / "m", {n: v.to(DTYPES[dtype]) for n, v in original().items()})
    assert report.verdict == "no"
    assert bad(report) == all_of("not-merged")
    assert report.summary == ["all 28 modules were never merged"]


WEIGHTS = {
    "rounded-twice": (2.0, "all 28 modules were merged twice, or with twice the weight"),
    "half": (0.5, "all 28 modules were merged with 0.50 times the weight"),
    "rslora-misread": (math.sqrt(8), "all 28 modules were merged with 2.83 times the weight"),
    "rslora-unseen": (1 / math.sqrt(8), "all 28 modules were merged with 0.35 times the weight"),
    "subtracted": (-1.0, "all 28 modules were merged with -1.00 times the weight"),
    "a-tenth-more": (1.1, "all 28 modules were merged with 1.10 times the weight"),
    "a-twentieth-less": (0.95, "all 28 modules were merged with 0.95 times the weight"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_another_weight_is_measured(name: str, dtype: str, tmp_path: Path) -> None:
    """A delta that was added with another factor gives that factor, in one sentence."""
    weight, sentence = WEIGHTS[name]
    report = check(tmp_path / "m", merged(DTYPES[dtype], weight))
    assert report.verdict == "no"
    assert bad(report) == all_of("weight")
    assert all(f.applied == pytest.approx(weight, abs=0.005) for f in report.findings)
    assert all((f.unexplained or 0.0) < 0.01 for f in report.findings)
    assert report.summary == [sentence]


@pytest.mark.parametrize("weight", [0.98, 1.02])
def test_weight_that_is_hardly_off_is_not_the_right_one(weight: float, tmp_path: Path) -> None:
    """A weight 2 % off is told from the right one wherever the dtype resolves it."""
    report = check(tmp_path / "m", merged(torch.float16, weight))
    assert report.verdict == "no"


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_adapter_is_told(dtype: str, tmp_path: Path) -> None:
    """A random adapter of the same norms is nothing that this one explains."""
    report = check(tmp_path / "m", merged(DTYPES[dtype], added=randomised()))
    assert report.verdict == "no"
    assert bad(report) == all_of("other")
    assert report.summary == ["all 28 modules changed in a way that the adapters do not explain"]
    assert all((f.unexplained or 0.0) > 0.8 for f in report.findings)


def test_fully_trained_model_is_not_the_merge(tmp_path: Path) -> None:
    """tuned/, trained from the same base on the same text, is another model in every tensor."""
    report = loratool.verify(FIXTURES / "tuned", FIXTURES / "base", FIXTURES / "adapter")
    assert report.verdict == "no"
    found = codes(report)
    assert found["other"] == 28
    assert found["changed"] >= 9
    assert "once" not in found


#: Which deltas get which factor, the finding of these modules, and the first sentence.
SOME: dict[str, tuple[Callable[[str], bool], float, str, str]] = {
    "one-skipped": (
        lambda n: n == K, 0.0, "not-merged",
        "1 of 28 modules was never merged: model.layers.1.self_attn.k_proj",
    ),
    "kind-skipped": (
        lambda n: "down_proj" in n, 0.0, "not-merged",
        "4 of 28 modules were never merged: all of mlp.down_proj",
    ),
    "two-kinds-skipped": (
        lambda n: "down_proj" in n or "q_proj" in n, 0.0, "not-merged",
        "8 of 28 modules were never merged: all of mlp.down_proj, all of self_attn.q_proj",
    ),
    "some-layers-skipped": (
        lambda n: "o_proj" in n and ".2." not in n, 0.0, "not-merged",
        "3 of 28 modules were never merged: model.layers.{0-1,3}.self_attn.o_proj",
    ),
    "last-layer-skipped": (
        lambda n: ".3." in n, 0.0, "not-merged",
        "7 of 28 modules were never merged: ",
    ),
    "kind-twice": (
        lambda n: "v_proj" in n, 2.0, "weight",
        "4 of 28 modules were merged twice, or with twice the weight: all of self_attn.v_proj",
    ),
    "one-half": (
        lambda n: n == Q, 0.5, "weight",
        "1 of 28 modules was merged with 0.50 times the weight: model.layers.1.self_attn.q_proj",
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SOME)
def test_modules_merged_otherwise_are_named(name: str, dtype: str, tmp_path: Path) -> None:
    """The modules that were skipped, doubled or halved are found and named, and no others."""
    chosen, weight, code, sentence = SOME[name]
    report = check(tmp_path / "m", merged(DTYPES[dtype], added=only(chosen, weight)))
    assert report.verdict == "no"
    assert bad(report) == {n: code for n in deltas() if chosen(n)}
    assert report.summary[0].startswith(sentence)
    rest = 28 - len(bad(report))
    assert report.summary[1:] == [f"{rest} of 28 modules are the once-rounded result"]


SWAPS = {
    "q-and-o": [(Q, O)],
    "k-and-v": [(K, V)],
    "layers": [(K, K.replace(".1.", ".2."))],
}


@pytest.mark.parametrize("what", ["deltas", "results"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SWAPS)
def test_swapped_modules_are_told(name: str, dtype: str, what: str, tmp_path: Path) -> None:
    """Deltas, or merged tensors, that went to each other's place are no merge of these modules."""
    pairs = SWAPS[name]
    state = merged(DTYPES[dtype], added=swapped(pairs) if what == "deltas" else None)
    if what == "results":
        for one, other in pairs:
            state[one], state[other] = state[other], state[one]
    report = check(tmp_path / "m", state)
    assert report.verdict == "no"
    assert bad(report) == {n: "other" for pair in pairs for n in pair}
    assert report.summary[0].startswith(
        "2 of 28 modules changed in a way that the adapters do not explain: "
    )


def test_swapped_experts_are_told(tmp_path: Path) -> None:
    """Two experts of one shape whose deltas are exchanged are both found, and no other expert."""
    names = [f"model.layers.0.mlp.experts.{i}.up_proj" for i in range(6)]
    rng = np.random.default_rng(0)
    state = {f"{n}.weight": random_of(torch.bfloat16, 24, 16, seed=i) for i, n in enumerate(names)}
    factors = {}
    for name in names:
        factors[f"base_model.model.{name}.lora_A.weight"] = rng.standard_normal((2, 16))
        factors[f"base_model.model.{name}.lora_B.weight"] = rng.standard_normal((24, 2)) / 50
    lists = {n: v.astype(np.float32) for n, v in factors.items()}
    adapter = write_adapter(tmp_path / "a", lists, {"r": 2, "lora_alpha": 2})
    base = write_base(tmp_path / "base", state)
    loratool.merge(base, adapter, tmp_path / "right", dtype="bfloat16")
    assert loratool.verify(tmp_path / "right", base, adapter).verdict == "yes"
    crossed = {}
    for key, value in lists.items():
        swap = {"experts.2.": "experts.5.", "experts.5.": "experts.2."}
        crossed[next((key.replace(a, b) for a, b in swap.items() if a in key), key)] = value
    other = write_adapter(tmp_path / "b", crossed, {"r": 2, "lora_alpha": 2})
    loratool.merge(base, other, tmp_path / "wrong", dtype="bfloat16")
    report = loratool.verify(tmp_path / "wrong", base, adapter)
    assert bad(report) == {f"{names[i]}.weight": "other" for i in (2, 5)}
    assert "model.layers.0.mlp.experts.{2,5}.up_proj" in report.summary[0]
