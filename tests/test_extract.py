"""extract: what the factors hold, what the report says, where every tensor goes, and mistakes.

All checkpoints are written here. The oracles are float64, computed from files that the safetensors
library reads.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import WEIGHTS, codes, config_of
from files import State, assert_clean, assert_clear, load, sha256s, write_base
from safetensors.torch import load_file, save_file

import loratool
from loratool.adapters.dialects.peft.targets import extracted_config
from loratool.errors import (
    LoraToolError,
    MatchError,
    UsageError,
    VerifyError,
)
from loratool.extracting import output as extracted_output
from loratool.storage.values import raw_blocks

AT = "model.layers.{}."
Q0 = "model.layers.0.self_attn.q_proj"
UP1 = "model.layers.1.mlp.up_proj"
PREFIX = "base_model.model."
LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")


def random_for(name: str, *shape: int, seed: int = 0) -> torch.Tensor:
    made = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    return torch.randn(shape, generator=made, dtype=torch.float64)


def model(size: int = 16, layers: int = 2, vocabulary: int = 40) -> State:
    """The tensors of a tiny llama with biases on k_proj, in float32."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, size)}
    for number in range(layers):
        at = AT.format(number)
        shapes |= {
            at + "self_attn.q_proj.weight": (size, size),
            at + "self_attn.k_proj.weight": (size // 2, size),
            at + "self_attn.k_proj.bias": (size // 2,),
            at + "mlp.up_proj.weight": (2 * size, size),
            at + "mlp.down_proj.weight": (size, 2 * size),
            at + "input_layernorm.weight": (size,),
        }
    shapes |= {"model.norm.weight": (size,), "lm_head.weight": (vocabulary, size)}
    return {name: (0.1 * random_for(name, *shape)).float() for name, shape in shapes.items()}


def moved(state: State, *ends: str, decay: float = 0.7, rank: int | None = None) -> State:
    """A copy in which the tensors whose names end so (all if none is given) have changed:
    matrices with the singular values 0.05, 0.05·decay, …, as many as `rank`."""
    found = {}
    for name, value in state.items():
        found[name] = value.clone()
        if not value.is_floating_point() or (ends and not name.endswith(ends)):
            continue
        noise = random_for(name, *value.shape, seed=1)
        if value.ndim >= 2:
            u, _, v = torch.linalg.svd(noise.reshape(len(value), -1), full_matrices=False)
            sizes = 0.05 * decay ** torch.arange(u.shape[1], dtype=torch.float64)
            sizes[len(sizes) if rank is None else rank :] = 0
            noise = ((u * sizes) @ v).reshape(value.shape)
        else:
            noise *= 0.01
        found[name] = (value.double() + noise).to(value.dtype)
    return found


def cast(state: State, dtype: torch.dtype) -> State:
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}


def write(folder: Path, state: State, kind: str = "single", **config: Any) -> Path:
    """A checkpoint of this kind: one file, several shards with their index, torch, or bare."""
    if kind.startswith("shards"):
        names = sorted(state) if kind == "shards-sorted" else list(state)
        parts = [{n: state[n] for n in names[i::3]} for i in range(3)]
        return write_base(folder, *parts, config=config)
    if kind == "bare":
        folder.mkdir(parents=True)
        save_file(state, folder / "weights.safetensors")
        return folder / "weights.safetensors"
    write_base(folder, state, config=config)
    if kind == "bin":
        (folder / "model.safetensors").unlink()
        # Stored transposed, as a view: strides count.
        views = {n: t.t().contiguous().t() if t.ndim == 2 else t for n, t in state.items()}
        torch.save(views, folder / "pytorch_model.bin")
    return folder


def moves(base: State, tuned: State) -> State:
    """tuned - base in float64 of all tensors that both have in one shape and that differ."""
    return {
        name: tuned[name].double() - value.double()
        for name, value in base.items()
        if name in tuned
        and tuned[name].shape == value.shape
        and not torch.equal(tuned[name].double(), value.double())
    }


def products(folder: Path) -> State:
    """scale·B·A by weight name, as the weight is shaped in the file; checks rank and scale too."""
    config, tensors = config_of(folder), load_file(folder / WEIGHTS)
    found = {}
    for name, a in tensors.items():
        if ".lora_A." not in name and "lora_embedding_A" not in name:
            continue
        b = tensors[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
        path = re.split(r"\.lora_(?:embedding_)?A", name.removeprefix(PREFIX))[0]
        rank = of_pattern(config["rank_pattern"], path, config["r"])
        alpha = of_pattern(config["alpha_pattern"], path, config["lora_alpha"])
        assert (a.shape[0], b.shape[1]) == (rank, rank), path
        assert alpha == rank, path
        delta = b.double().reshape(len(b), -1) @ a.double().reshape(len(a), -1)
        if "embedding" in name:
            delta = delta.T
        found[f"{path}.weight"] = delta.reshape(len(delta), *a.shape[1:]) if a.ndim > 2 else delta
    return found


def of_pattern(patterns: dict[str, int], path: str, default: int) -> int:
    """PEFT's rule (get_pattern_key): the first key that is the path or a dotted end of it."""
    keys = (key for key in patterns if re.match(rf"(.*\.)?({key})$", path))
    return patterns.get(next(keys, ""), default)


def saved(folder: Path) -> State:
    """The tensors of an adapter that are no factors, by the name in the model."""
    return {
        name.removeprefix(PREFIX).replace(".base_layer.", "."): value
        for name, value in load_file(folder / WEIGHTS).items()
        if "lora_" not in name
    }


def singular(delta: torch.Tensor) -> torch.Tensor:
    values: torch.Tensor = torch.linalg.svdvals(delta.reshape(len(delta), -1))
    return values


def square(tensors: Any) -> float:
    return math.fsum(float(t.double().square().sum()) for t in tensors)


def distance(base: State, tuned: State, folder: Path) -> float:
    """‖base + adapter - tuned‖/‖tuned - base‖ in float64."""
    goal, have = moves(base, tuned), products(folder)
    whole = saved(folder)
    off = [
        (whole[n].double() - tuned[n].double()) if n in whole else have.get(n, 0.0) - delta
        for n, delta in goal.items()
    ]
    return math.sqrt(square(off) / square(goal.values()))


def selects(config: dict[str, Any], path: str) -> bool:
    """PEFT's rule of target_modules, exclude_modules and modules_to_save."""

    def fits(wanted: list[str] | str | None) -> bool:
        if isinstance(wanted, str):
            return re.fullmatch(wanted, path) is not None
        return any(path == name or path.endswith(f".{name}") for name in wanted or [])

    saved = config["modules_to_save"] or []
    if any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", path) for name in saved):
        return False
    return fits(config["target_modules"]) and not fits(config["exclude_modules"])


class Pair:
    """A base and a fine-tune on disk, and their tensors."""

    def __init__(self, folder: Path, base: State, tuned: State, **config: Any) -> None:
        self.out = folder / "out"
        self.before, self.after = base, tuned
        self.base = write(folder / "in" / "base", base, **config)
        self.tuned = write(folder / "in" / "fine", tuned, **config)

    def extract(self, **options: Any) -> loratool.ExtractReport:
        shutil.rmtree(self.out, ignore_errors=True)
        return loratool.extract(self.base, self.tuned, self.out, **{"dtype": "float32", **options})

    def fails(self, kind: type[LoraToolError], *parts: str, **options: Any) -> LoraToolError:
        """Extract, expecting this clear error with `parts` in it, and nothing on the disk."""
        before = sha256s(self.out.parent / "in")
        arguments = {"base": self.base, "tuned": self.tuned, "output": self.out, "rank": 2}
        with pytest.raises(LoraToolError) as caught:
            loratool.extract(**{**arguments, **options})
        assert isinstance(caught.value, kind), caught.value
        assert_clear(caught.value, *parts)
        assert_clean(self.out)
        assert sha256s(self.out.parent / "in") == before
        return caught.value


@pytest.fixture
def tiny(tmp_path: Path) -> Pair:
    """A model in which everything changed."""
    state = model()
    return Pair(tmp_path, state, moved(state))


def ranks_of(report: loratool.ExtractReport) -> dict[str, int | None]:
    return {m.path: m.rank for m in report.modules}


# --- what the factors hold -----------------------------------------------------------------------


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


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


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
        tmp_path / "out", rank=4, dtype="float32",
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


# --- how the rank is chosen ----------------------------------------------------------------------


def test_rank_is_the_same_for_every_module(tiny: Pair) -> None:
    """--rank gives every module K, with zeros where it has fewer singular values."""
    report = tiny.extract(rank=12)
    assert set(ranks_of(report).values()) == {12}
    assert codes(report).count("rank-too-large") == 1
    text = next(n.message for n in report.warnings if n.code == "rank-too-large")
    assert "k_proj" in text
    tensors = load_file(tiny.out / WEIGHTS)
    a = tensors[f"{PREFIX}model.layers.0.self_attn.k_proj.lora_A.weight"]
    assert a.shape == (12, 16)
    assert a[:8].abs().sum(1).min() > 0
    assert not a[8:].any()
    assert config_of(tiny.out)["rank_pattern"] == {}
    assert "rank-too-large" not in codes(tiny.extract(rank=8))


def test_a_change_of_lower_rank_is_filled_up_with_zeros(tmp_path: Path) -> None:
    """A module whose change has rank 2 gets K rows, of which only two are not zero."""
    state = model()
    pair = Pair(tmp_path, state, moved(state, f"{Q0}.weight", "up_proj.weight", rank=2))
    report = pair.extract(rank=7)
    assert "rank-too-large" not in codes(report)
    assert {m.rank for m in report.modules} == {7}
    assert report.error is not None
    assert report.error < 1e-5
    assert config_of(pair.out)["r"] == 7


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("cap", [None, 5])
@pytest.mark.parametrize("uniform", [False, True])
def test_energy_is_the_smallest_rank_that_keeps_it(
    tiny: Pair, energy: float, cap: int | None, uniform: bool
) -> None:
    """--energy: the smallest k with Σₖσ² ≥ share·Σσ², at most --max-rank; --uniform the largest."""
    report = tiny.extract(energy=energy, max_rank=cap, uniform=uniform)
    wanted = {}
    for name, delta in moves(tiny.before, tiny.after).items():
        if delta.ndim == 2:
            sums = singular(delta).square().cumsum(0)
            least = int((sums < energy * (1 - 1e-9) * sums[-1]).sum()) + 1
            wanted[name.removesuffix(".weight")] = min(least, cap or least)
    if energy == 1:  # float32 leaves the smallest values uncertain
        if cap is None:
            assert all(m.kept is not None and m.kept >= 1 - 1e-6 for m in report.modules)
        return
    if uniform:
        wanted = dict.fromkeys(wanted, max(wanted.values()))
    assert ranks_of(report) == wanted
    assert products(tiny.out).keys() == {f"{path}.weight" for path in wanted}
    if cap is None:
        assert all(m.kept is not None and m.kept >= energy * (1 - 1e-6) for m in report.modules)


def one_rank(report: loratool.ExtractReport, width: int = 4) -> list[int]:
    return [width * sum(m.shape) for m in report.modules]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("budget", [7000, 11_111, "16KiB", "25 kB", "60KB"])
@pytest.mark.parametrize("skip", [[], ["norms", "biases"]])
def test_a_budget_is_kept_and_used(
    tiny: Pair, budget: int | str, skip: list[str], dtype: str
) -> None:
    """The weights file is not larger than the budget, there is no room for another rank of the
    cheapest module (but for some bytes of header), and the total error is no larger than that of
    one rank for all in the same room."""
    sizes = {"16KiB": 16384, "25 kB": 25_000, "60KB": 60_000}
    limit = sizes[budget] if isinstance(budget, str) else budget
    even = tiny.extract(budget=budget, uniform=True, skip=skip, dtype=dtype)
    assert even.bytes_written <= limit
    width = 4 if dtype == "float32" else 2
    assert (tiny.out / WEIGHTS).stat().st_size == even.bytes_written
    report = tiny.extract(budget=budget, skip=skip, dtype=dtype)
    size = (tiny.out / WEIGHTS).stat().st_size
    assert size == report.bytes_written <= limit
    full = all(m.rank == min(m.shape) for m in report.modules)
    slack = 16 * len(report.modules)
    assert full or limit - size < min(one_rank(report, width)) + slack
    assert report.error is not None
    assert even.error is not None
    assert report.error <= even.error * (1 + 1e-9)
    # One rank more for all modules would not have fitted.
    if even.rank is not None and even.rank < 16:
        assert limit - even.bytes_written < sum(one_rank(even, width)) + slack
    assert distance(tiny.before, tiny.after, tiny.out) == pytest.approx(
        report.error, abs=1e-5 if dtype == "float32" else 5e-3
    )


def two(tmp_path: Path, one: tuple[int, int], other: tuple[int, int]) -> Pair:
    state = {
        "a.q_proj.weight": random_for("a", *one).float(),
        "b.up_proj.weight": random_for("b", *other).float(),
    }
    tuned = moved(state, "q_proj.weight", decay=0.9) | {
        "b.up_proj.weight": moved(state, decay=0.5)["b.up_proj.weight"]
    }
    return Pair(tmp_path, state, tuned)


@pytest.mark.parametrize("shapes", [((6, 6), (6, 6)), ((6, 6), (5, 11)), ((4, 4), (12, 20))])
def test_a_budget_is_spent_as_well_as_by_brute_force(
    tmp_path: Path, shapes: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    """No other two ranks keep more in the bytes that were taken; where ranks cost differently,
    by more than the last of them would bring."""
    pair = two(tmp_path, *shapes)
    squares = [singular(d).square().tolist() for d in moves(pair.before, pair.after).values()]
    costs = [4 * sum(shape) for shape in shapes]
    seen = set()
    for budget in range(700, 1500, 40):
        try:
            report = pair.extract(budget=budget)
        except UsageError:
            continue
        ranks = [m.rank or 0 for m in report.modules]
        seen.add(tuple(ranks))
        room = sum(c * r for c, r in zip(costs, ranks, strict=True))
        kept = sum(sum(s[:r]) for s, r in zip(squares, ranks, strict=True))
        best = max(
            sum(squares[0][:i]) + sum(squares[1][:j])
            for i in range(len(squares[0]) + 1)
            for j in range(len(squares[1]) + 1)
            if i * costs[0] + j * costs[1] <= room
        )
        last = 0.0 if costs[0] == costs[1] else max(s[0] for s in squares)
        assert kept >= best * (1 - 1e-6) - last
    assert len(seen) > 4


def test_a_module_that_the_budget_leaves_nothing_is_named(tmp_path: Path) -> None:
    """A module that gets no rank is in neither file nor config, and a warning names it; its bias,
    which is saved, has the name that PEFT gives it in a module that is not adapted."""
    state = {
        "a.q_proj.weight": random_for("a", 32, 32).float(), "a.q_proj.bias": torch.zeros(32),
        "b.k_proj.weight": random_for("b", 32, 32).float(), "b.k_proj.bias": torch.zeros(32),
    }  # fmt: skip
    tuned = moved(state, decay=0.9)
    small = tuned["b.k_proj.weight"].double() - state["b.k_proj.weight"].double()
    tuned["b.k_proj.weight"] = (state["b.k_proj.weight"].double() + 1e-3 * small).float()
    pair = Pair(tmp_path, state, tuned)
    report = pair.extract(budget=2500)
    assert ranks_of(report)["b.k_proj"] == 0
    assert "no-budget" in codes(report)
    assert products(pair.out).keys() == {"a.q_proj.weight"}
    keys = load_file(pair.out / WEIGHTS).keys()
    assert f"{PREFIX}a.q_proj.base_layer.bias" in keys
    assert not selects(config_of(pair.out), "b.k_proj")
    assert f"{PREFIX}b.k_proj.bias" in keys
    assert distance(state, tuned, pair.out) == pytest.approx(report.error, rel=1e-3)


def test_unchanged_modules_take_nothing_of_the_budget(tmp_path: Path) -> None:
    """A budget for a model of which one module changed is spent on that one, however many stay."""
    state = model(size=32, layers=12)
    pair = Pair(tmp_path, state, moved(state, f"{Q0}.weight", decay=0.95))
    report = pair.extract(budget=3000)
    assert ranks_of(report).keys() == {Q0}
    assert 3000 - report.bytes_written < one_rank(report)[0] + 16


@pytest.mark.parametrize("uniform", [False, True])
def test_a_budget_beyond_all_ranks_is_not_filled_with_zeros(tiny: Pair, uniform: bool) -> None:
    """A budget that holds everything gives no module more than the largest rank of the model."""
    report = tiny.extract(budget="2MB", uniform=uniform)
    assert report.rank == 16
    assert report.error is not None
    assert report.error < 1e-5


def test_max_rank_caps_a_budget(tiny: Pair) -> None:
    """--max-rank holds with --budget, alone and with --uniform."""
    assert set(ranks_of(tiny.extract(budget="1MB", max_rank=3)).values()) == {3}
    assert set(ranks_of(tiny.extract(budget="1MB", max_rank=3, uniform=True)).values()) == {3}


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("budget", [1, 800, "2KB"])
def test_a_budget_that_is_too_small_is_refused(
    tiny: Pair, budget: int | str, uniform: bool
) -> None:
    """A budget without room for one rank is refused in words."""
    tiny.fails(UsageError, "udget", rank=None, budget=budget, uniform=uniform)


def test_budgets_may_be_written_in_many_ways(tiny: Pair) -> None:
    """ "20KB", "20 kb", "0.02MB" and 20000 are one size, "20KiB" is a larger one."""
    digests = []
    for budget in ("20KB", "20 kb", "0.02MB", 20_000, "20000", "0.00002 GB"):
        tiny.extract(budget=budget)
        digests.append(sha256s(tiny.out)[WEIGHTS])
    assert len(set(digests)) == 1
    tiny.extract(budget="20KiB")
    assert 20_000 < (tiny.out / WEIGHTS).stat().st_size <= 20_480


def test_deep_budgets_are_as_exact_as_shallow_ones(tmp_path: Path) -> None:
    """Where one of many modules takes nearly all of the budget, its later ranks are found too."""
    names = [f"m{i}.q_proj.weight" for i in range(8)]
    state = {n: random_for(n, 96, 96).float() for n in names}
    tuned = moved(state, decay=0.95)
    for name in names[1:]:
        tuned[name] = (0.999 * state[name].double() + 0.001 * tuned[name].double()).float()
        tuned[name] = state[name] + 1e-3 * (tuned[name] - state[name])
    pair = Pair(tmp_path, state, tuned)
    report = pair.extract(budget="45KB")
    assert ranks_of(report)["m0.q_proj"] == report.rank
    assert (ranks_of(report)["m0.q_proj"] or 0) > 40


def test_progress_of_a_budget_ends_at_the_total(tmp_path: Path) -> None:
    """Modules that are done again for a budget do not take the bar beyond its end."""
    state = {f"m{i}.q_proj.weight": random_for(f"{i}", 96, 96).float() for i in range(4)}
    tuned = moved(state, rank=1)
    tuned["m0.q_proj.weight"] = moved(state, decay=0.97)["m0.q_proj.weight"]
    pair = Pair(tmp_path, state, tuned)
    calls: list[tuple[int, int, str]] = []
    pair.extract(budget="45KB", progress=lambda *call: calls.append(call))
    done, totals = [c[0] for c in calls], {c[1] for c in calls}
    assert done == sorted(done)
    assert {max(done)} == totals


# --- the config ----------------------------------------------------------------------------------


def assert_selected(folder: Path, state: State) -> None:
    """By PEFT's rules the config means exactly the modules with factors, and those saved."""
    config = config_of(folder)
    modules = {name.rpartition(".")[0] for name in state}
    adapted = {name.removesuffix(".weight") for name in products(folder)}
    assert {m for m in modules if selects(config, m)} == adapted
    wanted = config["modules_to_save"] or []
    whole = {m for m in modules if any(m.endswith(name) for name in wanted)}
    names = saved(folder).keys()
    assert {n for n in names if n.rpartition(".")[0] in whole} == {
        n for n in state if n.rpartition(".")[0] in whole
    }


@pytest.mark.parametrize(
    "ends",
    [(), ("q_proj.weight",), (f"{Q0}.weight",), (f"{Q0}.weight", f"{UP1}.weight", "k_proj.bias"),
     ("q_proj.weight", "norm.weight"), ("q_proj.weight", "1.input_layernorm.weight"),
     ("1.self_attn.k_proj.weight", "1.self_attn.k_proj.bias", "lm_head.weight"),
     ("embed_tokens.weight", "model.norm.weight")],
    ids=str,
)  # fmt: skip
def test_the_config_means_the_modules_of_the_file(tmp_path: Path, ends: tuple[str, ...]) -> None:
    """target_modules, exclude_modules, modules_to_save and bias mean what is in the file."""
    state = model()
    pair = Pair(tmp_path, state, moved(state, *ends))
    report = pair.extract(energy=0.8)
    assert_selected(pair.out, state)
    config = config_of(pair.out)
    assert config["r"] == config["lora_alpha"] == report.rank
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert not config["use_rslora"]
    assert not config["use_dora"]
    assert (config["task_type"], config["peft_type"]) == ("CAUSAL_LM", "LORA")
    merged = loratool.merge(pair.base, pair.out, tmp_path / "merged", dtype="float32")
    assert merged
    back = load(tmp_path / "merged")
    parts = products(pair.out)
    for name, value in load(pair.base).items():
        expected = saved(pair.out).get(name, value).double() + parts.get(name, 0.0)
        assert torch.allclose(back[name].double(), expected, rtol=1e-6, atol=1e-7), name


@pytest.mark.parametrize(
    ("ends", "bias"),
    [
        (("k_proj.weight",), "none"),
        (("k_proj.weight", "k_proj.bias"), "lora_only"),
        (("k_proj.weight", "0.self_attn.k_proj.bias"), "lora_only"),
        (("q_proj.weight", "k_proj.bias"), "all"),
        (("0.self_attn.k_proj.weight", "k_proj.bias"), "all"),
    ],
    ids=str,
)
def test_bias_says_whose_biases_are_in_the_file(
    tmp_path: Path, ends: tuple[str, ...], bias: str
) -> None:
    """`bias` is lora_only where only biases of adapted layers changed, and all where others did;
    those of adapted layers have `base_layer` in their name, the others not."""
    state = model()
    pair = Pair(tmp_path, state, moved(state, *ends))
    pair.extract(rank=2)
    adapted = {n.removesuffix(".weight") for n in products(pair.out)}
    for name in load_file(pair.out / WEIGHTS):
        if name.endswith(".bias"):
            path = name.removeprefix(PREFIX).removesuffix(".bias").removesuffix(".base_layer")
            assert (".base_layer." in name) == (path in adapted)
    assert config_of(pair.out)["bias"] == bias


@pytest.mark.parametrize(
    ("names", "changed"),
    [
        (["proj", "enc.proj"], ["enc.proj"]),
        (["proj", "enc.proj"], ["proj"]),
        (["0.proj", "enc.0.proj", "enc.1.proj"], ["enc.0.proj", "enc.1.proj"]),
        (["layers.0.q", "enc.layers.0.q", "enc.layers.1.q"], ["enc.layers.0.q", "enc.layers.1.q"]),
        (["layers.0.q", "enc.layers.0.q", "enc.layers.1.q", "x.q"], ["layers.0.q"]),
        (["enc.0", "enc.1", "enc.2"], ["enc.1"]),
        (["enc.0", "enc.10", "dec.0"], ["enc.0", "dec.0"]),
    ],
    ids=str,
)
def test_paths_that_end_like_others_are_told_apart(
    tmp_path: Path, names: list[str], changed: list[str]
) -> None:
    """A path that is the end of another one is neither selected nor excluded by mistake."""
    state = {f"{n}.weight": random_for(n, 6, 6).float() for n in names}
    tuned = {n: t.clone() for n, t in state.items()}
    for name in changed:
        tuned[f"{name}.weight"] = moved(state)[f"{name}.weight"]
    pair = Pair(tmp_path, state, tuned)
    pair.extract(rank=2)
    assert products(pair.out).keys() == {f"{n}.weight" for n in changed}
    assert_selected(pair.out, state)


def test_different_ranks_are_told_apart_by_path(tmp_path: Path) -> None:
    """Where one path ends like another and both have ranks of their own, the patterns agree."""
    state = {f"{n}.weight": random_for(n, 9, 9).float() for n in ("q", "a.q", "b.a.q")}
    tuned = {n: moved(state, decay=d)[n] for n, d in zip(state, (0.3, 0.6, 0.9), strict=True)}
    pair = Pair(tmp_path, state, tuned)
    report = pair.extract(energy=0.9)
    assert len(set(ranks_of(report).values())) == 3
    assert len(products(pair.out)) == 3  # which checks every rank and alpha


def test_the_base_is_named(tmp_path: Path) -> None:
    """base_model_name_or_path is --base-name, else the config's name, else the folder's."""
    state = model()
    pair = Pair(tmp_path, state, moved(state))
    names = []
    for options in ({}, {"base_name": "org/mine"}):
        pair.extract(rank=1, **options)
        names.append(config_of(pair.out)["base_model_name_or_path"])
    named = Pair(tmp_path / "named", state, moved(state), _name_or_path="org/tiny")
    named.extract(rank=1)
    names.append(config_of(named.out)["base_model_name_or_path"])
    assert names == ["base", "org/mine", "org/tiny"]


# --- the report ----------------------------------------------------------------------------------


def test_the_report_is_what_float64_finds(tiny: Pair) -> None:
    """Norms, shares, errors and singular values of every module, and their sums, are right."""
    report = tiny.extract(rank=4, verify=True)
    goal, have = moves(tiny.before, tiny.after), products(tiny.out)
    for m in report.modules:
        name = f"{m.path}.weight"
        delta, values = goal[name], singular(goal[name])
        size = float(delta.norm())
        off = float((delta - have[name]).norm()) / size
        assert m.shape in (tuple(delta.shape), tuple(delta.shape)[::-1])
        assert m.norm == pytest.approx(size, rel=1e-5)
        assert m.relative == pytest.approx(size / float(tiny.before[name].norm()), rel=1e-5)
        assert m.error == pytest.approx(off, rel=1e-4)
        assert m.kept == pytest.approx(1 - off**2, rel=1e-5)
        assert m.best_error is not None
        assert m.error is not None
        best = float(values[4:].norm()) / size
        assert m.best_error <= m.error * (1 + 1e-12)
        assert m.best_error * (1 - 1e-4) <= best <= m.error * (1 + 1e-4)
        assert m.stable_rank == pytest.approx((size / float(values[0])) ** 2, rel=1e-4)
        assert m.singular_values == pytest.approx(values.tolist(), rel=1e-3)
        assert m.rounding is None
    total = square(goal.values())
    assert report.norm == pytest.approx(math.sqrt(total), rel=1e-5)
    cut = sum((m.error or 0) ** 2 * m.norm**2 for m in report.modules)
    assert report.error == pytest.approx(math.sqrt(cut / total), rel=1e-5)
    assert report.held == pytest.approx(1 - cut / total, rel=1e-6)
    assert report.best_error is not None
    assert report.error is not None
    assert report.best_error <= report.error
    assert report.verified == pytest.approx(distance(tiny.before, tiny.after, tiny.out), rel=1e-4)
    assert report.verified == pytest.approx(report.error, rel=1e-3)
    whole = saved(tiny.out)
    assert {t.name for t in report.saved} == goal.keys() & whole.keys()
    for t in report.saved:
        assert t.norm == pytest.approx(float(goal[t.name].norm()), rel=1e-5)
        assert (t.shape, t.nbytes) == (tuple(goal[t.name].shape), whole[t.name].nbytes)
    assert report.bytes_tuned == (tiny.tuned / "model.safetensors").stat().st_size
    assert report.bytes_written == (tiny.out / WEIGHTS).stat().st_size
    assert (report.rank, report.uniform, report.left, report.unchanged) == (4, True, [], 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_is_what_the_dtype_of_the_factors_takes(
    tmp_path: Path, tiny: Pair, dtype: str
) -> None:
    """`rounding` is ‖B'A' - BA‖/‖BA‖, of a module and in all; `verified` has it, `error` not."""
    exact = tiny.extract(rank=4)
    before = products(tiny.out)
    report = tiny.extract(rank=4, dtype=dtype, verify=True)
    after = products(tiny.out)
    assert {t.dtype for n, t in load_file(tiny.out / WEIGHTS).items() if "lora_" in n} == {
        getattr(torch, dtype)
    }
    for m in report.modules:
        name = f"{m.path}.weight"
        lost = float((after[name] - before[name]).norm() / before[name].norm())
        assert m.rounding == pytest.approx(lost, rel=0.02)
    lost = math.sqrt(square(after[n] - d for n, d in before.items()) / square(before.values()))
    assert report.rounding == pytest.approx(lost, rel=0.02)
    assert report.error == pytest.approx(exact.error, rel=1e-6)
    assert report.verified == pytest.approx(distance(tiny.before, tiny.after, tiny.out), rel=1e-4)


@pytest.mark.parametrize(("dtype", "low", "high"), [(F32, 1e-7, 1e-5), (F16, 0, 1), (BF16, 0, 1)])
def test_noise_is_what_storing_the_tuned_weights_took(
    tmp_path: Path, dtype: torch.dtype, low: float, high: float
) -> None:
    """`noise` is ‖rounding of TUNED‖/‖Δ‖, estimated; checked against the unrounded weights."""
    state = cast(model(64), torch.float64)
    exact = moved(state)
    tuned = cast(exact, dtype)
    pair = Pair(tmp_path, cast(state, F32), tuned)
    report = pair.extract(rank=4)
    goal = moves(cast(state, F32), tuned)
    lost = {n: tuned[n].double() - exact[n] for n in goal}
    goal = {n: d for n, d in goal.items() if n in {f"{m.path}.weight" for m in report.modules}}
    lost = {n: lost[n] for n in goal}
    real = math.sqrt(square(lost.values()) / square(goal.values()))
    assert report.noise == pytest.approx(real, rel=0.15)
    assert low < report.noise < high
    for m in report.modules:
        name = f"{m.path}.weight"
        assert m.noise == pytest.approx(float(lost[name].norm() / goal[name].norm()), rel=0.2)


LEFT: list[dict[str, Any]] = [
    {"skip": ["norms"]}, {"skip": ["biases"]}, {"skip": ["norms", "biases"]},
    {"skip": ["embeddings"]}, {"include": ["q_proj"]}, {"exclude": ["q_proj", "model.norm"]},
    {"include": ["model.layers.1.*"], "exclude": ["mlp.*"], "skip": ["biases"]},
    {"exclude": ["lm_head", "embed_tokens"]},
]  # fmt: skip


@pytest.mark.parametrize("options", LEFT, ids=str)
def test_what_is_left_out_is_missing_from_what_is_held(tiny: Pair, options: Any) -> None:
    """What --skip, --include and --exclude leave out is listed, is not in the file, and lowers
    `held` by exactly its share of ‖Δ‖²; base + adapter is that far off."""
    full = tiny.extract(rank=16)
    report = tiny.extract(rank=16, verify=True, **options)
    goal = moves(tiny.before, tiny.after)
    gone = {t.name for t in report.left}
    assert gone
    there = products(tiny.out).keys() | saved(tiny.out).keys()
    assert there | gone == set(goal)
    assert not there & gone
    share = square(goal[n] for n in gone) / square(goal.values())
    assert full.held == pytest.approx(1, abs=1e-9)
    assert report.held == pytest.approx(1 - share, rel=1e-6)
    assert report.error == pytest.approx(math.sqrt(share), rel=1e-4)
    assert report.norm == full.norm
    assert report.verified == pytest.approx(math.sqrt(share), rel=1e-4)
    assert distance(tiny.before, tiny.after, tiny.out) == pytest.approx(math.sqrt(share), rel=1e-4)
    group = (options.get("skip") or [""])[0]
    if group == "norms" and len(options["skip"]) == 1:
        assert gone == {n for n in goal if "norm" in n}
    if group == "embeddings":
        assert gone == {"model.embed_tokens.weight"}
    assert_selected(tiny.out, tiny.after)


def test_saved_tensors_keep_every_bit(tmp_path: Path) -> None:
    """--save and what cannot be factors: bytes and dtype of the tuned tensors, not of factors."""
    state = model()
    pair = Pair(tmp_path, state, cast(moved(state), BF16))
    report = pair.extract(rank=2, save=["lm_head", "layers.1.mlp.*"], dtype="float16", verify=True)
    whole = saved(pair.out)
    assert {"lm_head.weight", f"{UP1}.weight", "model.norm.weight"} <= whole.keys()
    for name, value in whole.items():
        assert value.dtype == BF16
        assert torch.equal(value.view(torch.int16), pair.after[name].view(torch.int16))
    assert {t.name for t in report.saved} == whole.keys()
    assert "lm_head" in config_of(pair.out)["modules_to_save"]
    assert report.verified == pytest.approx(distance(pair.before, pair.after, pair.out), rel=1e-4)
    assert_selected(pair.out, state)


def test_the_document_is_strict_json(tiny: Pair) -> None:
    """to_dict survives strict JSON and has all that the report has."""
    for options in ({"rank": 3}, {"dry_run": True}, {"energy": 0.5, "skip": ["norms"]}):
        report = tiny.extract(**options)
        document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert document["schema_version"] == 1
        assert document.keys() == {"schema_version", *report.__dict__}
        assert [m["path"] for m in document["modules"]] == [m.path for m in report.modules]
        assert document["error"] == report.error


def test_the_record_says_what_was_done(tiny: Pair) -> None:
    """loratool.json has the options, the ranks, what was saved and left, and the files' hashes."""
    report = tiny.extract(energy=0.7, max_rank=4, skip=["norms"], seed=3)
    record = json.loads((tiny.out / "loratool.json").read_text())
    assert record["command"] == "extract"
    assert (record["options"]["energy"], record["options"]["seed"]) == (0.7, 3)
    assert {p: m["rank"] for p, m in record["result"]["modules"].items()} == ranks_of(report)
    assert record["result"]["left"] == [t.name for t in report.left]
    assert record["result"]["saved"] == [t.name for t in report.saved]
    hashes = sha256s(tiny.out)
    assert record["files"] == {n: hashes[n] for n in (WEIGHTS, "adapter_config.json")}
    assert str(tiny.base.parent) not in json.dumps(record)


# --- where every tensor goes ---------------------------------------------------------------------


def odd_model() -> State:
    """A model with one of everything."""
    at = "model.layers.0."
    return model() | {
        "model.vision.conv.weight": random_for("c", 8, 3, 2, 2).float(),
        "model.vision.conv.bias": random_for("cb", 8).float(),
        "model.audio.conv1.weight": random_for("c1", 6, 4, 3).float(),
        "model.vision.depthwise.weight": random_for("dw", 8, 1, 3, 3).float(),
        "model.scale": random_for("s", 5).float(),
        "model.temperature": random_for("t", 1).float().reshape(()),
        at + "mlp.experts.gate_up_proj": random_for("e", 3, 8, 6).float(),
        at + "mlp.gate.weight": random_for("r", 3, 16).float(),
        at + "post_norm.weight": random_for("pw", 16).float(),
        at + "post_norm.bias": random_for("pb", 16).float(),
        "model.position_ids": torch.arange(12),
        "model.embed_positions.weight": random_for("p", 12, 16).float(),
        "classifier.dense.weight": random_for("h1", 16, 16).float(),
        "classifier.dense.bias": random_for("h2", 16).float(),
        "score.weight": random_for("h3", 3, 16).float(),
    }


def assert_accounted(report: loratool.ExtractReport, base: State, tuned: State) -> None:
    """Every tensor that differs is in modules, saved or left, once; all others are counted."""
    names = [f"{m.path}.weight" for m in report.modules]
    names += [t.name for t in (*report.saved, *report.left)]
    assert len(set(names)) == len(names)
    differ = {
        n for n, t in tuned.items()
        if n not in base or t.shape != base[n].shape or not torch.equal(t, base[n])
    }  # fmt: skip
    assert differ <= set(names)
    assert len(names) + report.unchanged == len(tuned)


@pytest.mark.parametrize("options", [{}, {"skip": ["norms", "others"]}, {"include": ["layers.*"]}])
@pytest.mark.parametrize("name", [*odd_model(), ""])
def test_every_kind_of_tensor_is_accounted_for(tmp_path: Path, name: str, options: Any) -> None:
    """A change of any one tensor beside q_proj, or of all, is held, saved or listed as left out."""
    state = odd_model()
    tuned = moved(state, f"{Q0}.weight", *([name] if name else list(state)))
    if name in ("model.position_ids", ""):
        tuned["model.position_ids"] = state["model.position_ids"] + 1
    pair = Pair(tmp_path, state, tuned)
    report = pair.extract(rank=16, verify=True, **options)
    assert_accounted(report, state, tuned)
    if not options:
        assert not report.left
        assert report.held == pytest.approx(1, abs=1e-8)
        assert distance(state, tuned, pair.out) < 2e-5
        for key, value in saved(pair.out).items():
            assert torch.equal(value, tuned[key])
    if name:
        assert report.unchanged >= len(state) - 4
    assert_selected(pair.out, {n: t for n, t in state.items() if n.rpartition(".")[0] != "model"})


def test_each_kind_goes_where_peft_can_load_it(tmp_path: Path) -> None:
    """Linear layers, convolutions and token embeddings become factors; norms, biases, bare
    parameters, expert stacks, routers, depthwise convolutions, buffers and heads are whole."""
    state = odd_model()
    tuned = moved(state) | {"model.position_ids": state["model.position_ids"] + 1}
    pair = Pair(tmp_path, state, tuned)
    report = pair.extract(rank=3)
    kinds = {m.path: m.kind for m in report.modules if m.kind != "linear"}
    assert kinds == {
        "model.embed_tokens": "embedding", "model.vision.conv": "conv", "model.audio.conv1": "conv",
    }  # fmt: skip
    whole = {t.name for t in report.saved}
    assert whole >= {
        "model.scale", "model.temperature", "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.gate.weight", "model.vision.depthwise.weight", "model.position_ids",
        "model.embed_positions.weight", "classifier.dense.weight", "score.weight",
        "model.vision.conv.bias",
    }  # fmt: skip
    assert not any(f"{m.path}.weight" in whole for m in report.modules)


@pytest.mark.parametrize(
    ("kind", "path"),
    [("jetmoe", "mlp.input_linear"), ("granitemoe", "block_sparse_moe.input_linear")],
)
def test_experts_that_are_one_weight_are_no_convolution(
    tmp_path: Path, kind: str, path: str
) -> None:
    """JetMoE's and GraniteMoE's files keep all experts in `input_linear.weight` [experts, out, in].
    PEFT has no adapter for such a module, so it is saved whole."""
    name = f"model.layers.0.{path}.weight"
    state = model() | {name: random_for("e", 3, 8, 6).float()}
    pair = Pair(tmp_path, state, moved(state, name, f"{Q0}.weight"), model_type=kind)
    report = pair.extract(rank=2)
    assert [m.path for m in report.modules] == [Q0]
    assert [t.shape for t in report.saved] == [(3, 8, 6)]


def test_a_grown_vocabulary_is_saved_whole(tmp_path: Path) -> None:
    """New tokens: embedding and head are saved as they are, with a warning of both shapes."""
    state, grown = model(), moved(model(vocabulary=43))
    tuned = moved(state) | {n: grown[n] for n in ("model.embed_tokens.weight", "lm_head.weight")}
    pair = Pair(tmp_path, state, tuned)
    report = pair.extract(rank=16, verify=True)
    assert_accounted(report, state, tuned)
    assert torch.equal(saved(pair.out)["lm_head.weight"], tuned["lm_head.weight"])
    assert torch.equal(
        saved(pair.out)["model.embed_tokens.weight"], tuned["model.embed_tokens.weight"]
    )
    text = next(n.message for n in report.warnings if n.code == "shape-changed")
    assert "another shape" in text
    assert "[40, 16]" in text
    assert "[43, 16]" in text
    assert {t.norm for t in report.saved if "lm_head" in t.name} == {None}
    assert report.norm == pytest.approx(math.sqrt(square(moves(state, tuned).values())), rel=1e-5)


@pytest.mark.parametrize("rows", [37, 43])
@pytest.mark.parametrize("verify", [False, True])
def test_another_vocabulary_may_be_left_out(tmp_path: Path, rows: int, verify: bool) -> None:
    """Embeddings of another shape that are excluded are listed as left, and verify copes."""
    state, other = model(), moved(model(vocabulary=rows))
    tuned = moved(state) | {n: other[n] for n in ("model.embed_tokens.weight", "lm_head.weight")}
    pair = Pair(tmp_path, state, tuned)
    report = pair.extract(rank=16, verify=verify, exclude=["lm_head", "embed_tokens"])
    assert_accounted(report, state, tuned)
    assert {t.name for t in report.left} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert report.verified is None or report.verified < 2e-5


@pytest.mark.parametrize("head", ["score", "classifier.out_proj"])
def test_a_head_with_other_classes_is_saved(tmp_path: Path, head: str) -> None:
    """A classifier of another number of classes is saved whole, its bias too."""
    config = {"architectures": ["LlamaForSequenceClassification"]}
    state = model() | {f"{head}.weight": torch.ones(2, 16), f"{head}.bias": torch.ones(2)}
    tuned = moved(state, f"{Q0}.weight") | {
        f"{head}.weight": torch.zeros(5, 16), f"{head}.bias": torch.zeros(5),
    }  # fmt: skip
    pair = Pair(tmp_path, state, tuned, **config)
    report = pair.extract(rank=2, verify=True)
    assert_accounted(report, state, tuned)
    assert {t.name for t in report.saved} == {f"{head}.weight", f"{head}.bias"}
    assert saved(pair.out)[f"{head}.weight"].shape == (5, 16)
    assert "shape-changed" in codes(report)
    assert config_of(pair.out)["task_type"] == "SEQ_CLS"


def test_a_new_head_is_saved_and_a_dropped_one_is_a_notice(tmp_path: Path) -> None:
    """A classifier made of a language model: its head is saved, and the old one is said to be
    gone."""
    state = model()
    tuned = moved(state, f"{Q0}.weight") | {"score.weight": torch.ones(3, 16)}
    del tuned["lm_head.weight"]
    base = write(tmp_path / "base", state)
    fine = write(tmp_path / "fine", tuned, architectures=["LlamaForSequenceClassification"])
    report = loratool.extract(base, fine, tmp_path / "out", rank=2)
    assert_accounted(report, state, tuned)
    assert [t.name for t in report.saved] == ["score.weight"]
    assert "head-dropped" in codes(report)
    assert config_of(tmp_path / "out")["modules_to_save"] == ["score"]


def test_a_new_bias_is_refused(tmp_path: Path) -> None:
    """A bias that the base's layer lacks cannot be in an adapter."""
    state = model()
    pair = Pair(tmp_path, state, moved(state) | {f"{Q0}.bias": torch.ones(16)})
    pair.fails(MatchError, f"{Q0}.bias", "only in the tuned model", "[16]")


@pytest.mark.parametrize("options", [{"exclude": ["q_proj"]}, {"skip": ["biases"]}], ids=str)
def test_a_new_bias_may_be_left_out(tmp_path: Path, options: Any) -> None:
    """The refusal says `leave them out`, and then it is possible: it is listed as left."""
    state = model()
    tuned = moved(state) | {f"{Q0}.bias": torch.ones(16)}
    pair = Pair(tmp_path, state, tuned)
    report = pair.extract(rank=2, **options)
    assert f"{Q0}.bias" in {t.name for t in report.left}


def test_a_tensor_that_only_the_base_has_is_refused_unless_excluded(tmp_path: Path) -> None:
    """A module that the tuned model lacks is refused; --exclude says that it is meant."""
    state = model()
    tuned = {n: t for n, t in moved(state).items() if n != f"{UP1}.weight"}
    pair = Pair(tmp_path, state, tuned)
    pair.fails(MatchError, f"{UP1}.weight", "only in the base", "[32, 16]")
    pair.extract(rank=2, exclude=["layers.1.mlp.*"])
    assert f"{UP1}.weight" not in products(pair.out)


def test_a_module_that_only_the_base_has_can_be_excluded_by_its_path(tmp_path: Path) -> None:
    """--exclude with exactly the path that the refusal names is no `matches no module`."""
    state = model()
    tuned = {n: t for n, t in moved(state).items() if n != f"{UP1}.weight"}
    Pair(tmp_path, state, tuned).extract(rank=2, exclude=[UP1])


@pytest.mark.parametrize("broken", ["saved", "factors"])
def test_verify_sees_what_was_not_written_as_it_was_computed(
    tiny: Pair, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """A saved tensor with one wrong bit and factors of another scale fail, and nothing stays."""
    if broken == "saved":

        def blocks(info: Any) -> Any:
            for raw in raw_blocks(info):
                raw[0] ^= 1
                yield raw

        monkeypatch.setattr(extracted_output, "raw_blocks", blocks)
    else:

        def config(*args: Any, **options: Any) -> dict[str, Any]:
            return {**extracted_config(*args, **options), "lora_alpha": 3}

        monkeypatch.setattr(extracted_output, "extracted_config", config)
    tiny.fails(VerifyError, verify=True)


def test_verify_sees_a_wrong_bit_of_an_integer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A buffer of integers is compared byte for byte."""
    state = odd_model()
    tuned = moved(state) | {"model.position_ids": state["model.position_ids"] + 1}

    def blocks(info: Any) -> Any:
        for raw in raw_blocks(info):
            raw[0] ^= info.dtype == "I64"
            yield raw

    monkeypatch.setattr(extracted_output, "raw_blocks", blocks)
    error = Pair(tmp_path, state, tuned).fails(VerifyError, "model.position_ids", verify=True)
    assert "weight" not in error.message


def test_verify_reads_views_of_torch_files(tmp_path: Path) -> None:
    """A tuned matrix that a torch file stores transposed, several blocks long, is read in order."""
    state = {f"{Q0}.weight": (0.1 * random_for("q", 1100, 1000)).float()}
    pair = Pair(tmp_path, state, moved(state, decay=0.5))
    value = pair.after[f"{Q0}.weight"]
    torch.save({f"{Q0}.weight": value.T.contiguous().T}, tmp_path / "view.bin")
    report = loratool.extract(pair.base, tmp_path / "view.bin", pair.out, rank=3, verify=True)
    assert not value.T.is_contiguous()
    assert report.verified == pytest.approx(distance(state, pair.after, pair.out), rel=1e-4)


def test_a_tied_head_that_is_excluded_takes_its_embedding_along(tmp_path: Path) -> None:
    """The two are one matrix, so --exclude with the name of either leaves both out."""
    state = model()
    del state["lm_head.weight"]
    pair = Pair(tmp_path, state, moved(state), tie_word_embeddings=True)
    for name in ("lm_head", "embed_tokens"):
        report = pair.extract(rank=2, exclude=[name], overwrite=True)
        assert [t.name for t in report.left] == ["model.embed_tokens.weight"]
        assert not any("embed" in m.path or "head" in m.path for m in report.modules)


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    """Tied models: one change, counted once, in factors for both places, one the transpose."""
    state = {n: t for n, t in model().items() if n != "lm_head.weight"}
    pair = Pair(tmp_path, state, moved(state), tie_word_embeddings=True)
    report = pair.extract(rank=16, verify=True)
    have = products(pair.out)
    assert torch.allclose(
        have["lm_head.weight"], have["model.embed_tokens.weight"], rtol=0, atol=1e-9
    )
    assert report.norm == pytest.approx(
        math.sqrt(square(moves(state, pair.after).values())), rel=1e-5
    )
    assert report.verified is not None
    assert report.verified < 2e-5
    assert distance(state, pair.after, pair.out) < 2e-5
    assert config_of(pair.out)["ensure_weight_tying"]


def test_weights_that_are_stored_transposed_are_told_by_the_architecture(tmp_path: Path) -> None:
    """GPT-2 stores [in, out]: the factors are those of the transposed matrix, square ones too."""
    at = "transformer.h.0."
    shapes = {"attn.c_attn": (8, 24), "attn.c_proj": (8, 8), "mlp.c_fc": (8, 32)}
    state = {f"{at}{n}.weight": random_for(n, *s).float() for n, s in shapes.items()}
    state["transformer.wpe.weight"] = random_for("wpe", 10, 8).float()
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    pair = Pair(tmp_path, state, moved(state), **config)
    report = pair.extract(rank=8, verify=True)
    assert config_of(pair.out)["fan_in_fan_out"] is True
    goal = moves(state, pair.after)
    for path, product in products(pair.out).items():
        assert torch.allclose(product.T, goal[path], rtol=0, atol=1e-6)
    assert {m.path: m.shape for m in report.modules} == {
        f"{at}{n}": s[::-1] for n, s in shapes.items()
    }
    assert [t.name for t in report.saved] == ["transformer.wpe.weight"]
    assert report.verified is not None
    assert report.verified < 1e-5


def test_norms_are_saved_with_both_tensors(tmp_path: Path) -> None:
    """PEFT saves whole modules: a norm whose weight alone changed is saved with its bias."""
    state = odd_model()
    pair = Pair(tmp_path, state, moved(state, f"{Q0}.weight", "post_norm.weight"))
    report = pair.extract(rank=2)
    at = "model.layers.0.post_norm."
    assert {t.name for t in report.saved} == {at + "weight", at + "bias"}
    assert_accounted(report, state, pair.after)
