"""How extract chooses ranks: a rank for all, an energy, a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import WEIGHTS, codes, config_of
from helpers.extracting import (
    EVERYTHING,
    PREFIX,
    Q0,
    Pair,
    distance,
    model,
    moved,
    moves,
    products,
    random_for,
    ranks_of,
    selects,
    singular,
)
from helpers.outcomes import sha256s
from safetensors.torch import load_file

import loratool
from loratool.errors import UsageError


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


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_rank_above_all_widths_is_that_of_the_widest(tiny: Pair, dry_run: bool) -> None:
    """--rank 999 of matrices that are 8 to 16 wide gives rank 16, not a file of zeros, and one
    warning that names those with less."""
    report = tiny.extract(rank=999, dry_run=dry_run)
    if dry_run:
        assert report.proposals.keys() == {16}
        assert report.proposals[16] == tiny.extract(rank=16).bytes_written
        return
    assert set(ranks_of(report).values()) == {16}
    assert config_of(tiny.out)["r"] == 16
    (notice,) = [n for n in report.warnings if n.code.startswith("rank-")]
    assert notice.code == "rank-too-large"
    assert "rank 999; all get 16" in notice.message
    assert "model.layers.0.self_attn.k_proj: 8" in notice.message
    assert "q_proj" not in notice.message


def test_one_rank_is_what_every_program_reads(tmp_path: Path) -> None:
    """By energy and by budget all modules have one rank without being asked, with no pattern and no
    warning of it; --uniform is that default; --patterns is a warning that names the programs."""
    state = model()
    flat = {f"{Q0}.weight": moved(state, decay=0.9)[f"{Q0}.weight"]}
    pair = Pair(tmp_path, state, moved(state) | flat)
    for criterion in ({"energy": 0.8}, {"budget": "15KB"}):
        report = pair.extract(**criterion)
        assert len(set(ranks_of(report).values())) == 1
        assert config_of(pair.out)["rank_pattern"] == {}
        assert "ranks-differ" not in codes(report)
        digest = sha256s(pair.out)[WEIGHTS]
        pair.extract(uniform=True, **criterion)
        assert sha256s(pair.out)[WEIGHTS] == digest
        report = pair.extract(patterns=True, **criterion)
        assert config_of(pair.out)["rank_pattern"]
        text = next(n.message for n in report.warnings if n.code == "ranks-differ")
        assert all(name in text for name in ("llama.cpp", "Ollama", "SGLang", "vLLM"))


def test_the_rest_of_one_rank_is_filled_with_real_directions(tmp_path: Path) -> None:
    """A module that needs less for the energy than another gets its next singular values too, not
    zeros, as far as it has some."""
    state = {f"{n}.q_proj.weight": random_for(n, 24, 24).float() for n in ("steep", "flat")}
    tuned = moved(state, "steep.q_proj.weight", decay=0.5)
    tuned |= {"flat.q_proj.weight": moved(state, decay=0.95)["flat.q_proj.weight"]}
    pair = Pair(tmp_path, state, tuned)
    report = pair.extract(energy=0.8)
    assert report.rank is not None
    assert report.rank > 5
    made = singular(products(pair.out)["steep.q_proj.weight"])
    goal = singular(moves(state, tuned)["steep.q_proj.weight"])
    assert made[: report.rank].tolist() == pytest.approx(goal[: report.rank].tolist(), rel=1e-3)
    assert made[report.rank :].max() < 1e-6


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("cap", [None, 5])
@pytest.mark.parametrize("patterns", [False, True])
def test_energy_is_the_smallest_rank_that_keeps_it(
    tiny: Pair, energy: float, cap: int | None, patterns: bool
) -> None:
    """--energy: the smallest k with Σₖσ² ≥ share·Σσ² in every module, at most --max-rank; with
    --patterns each module its own."""
    report = tiny.extract(energy=energy, max_rank=cap, patterns=patterns, embeddings=True)
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
    if not patterns:
        wanted = dict.fromkeys(wanted, max(wanted.values()))
    assert ranks_of(report) == wanted
    assert products(tiny.out).keys() == {f"{path}.weight" for path in wanted}
    if cap is None:
        assert all(m.kept is not None and m.kept >= energy * (1 - 1e-6) for m in report.modules)


def one_rank(report: loratool.ExtractReport, width: int = 4) -> list[int]:
    return [width * sum(m.shape) for m in report.modules]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("budget", [7000, 11_111, "16KiB", "25 kB", "60KB"])
@pytest.mark.parametrize("options", [EVERYTHING, {}], ids=str)
def test_a_budget_is_kept_and_used(
    tiny: Pair, budget: int | str, options: dict[str, Any], dtype: str
) -> None:
    """The weights file is not larger than the budget, there is no room for another rank of all
    modules, or with --patterns of the cheapest one (but for some bytes of header); and then the
    total error is no larger than that of one rank for all in the same room."""
    sizes = {"16KiB": 16384, "25 kB": 25_000, "60KB": 60_000}
    limit = sizes[budget] if isinstance(budget, str) else budget
    even = tiny.extract(budget=budget, dtype=dtype, **options)
    assert even.bytes_written <= limit
    width = 4 if dtype == "float32" else 2
    assert (tiny.out / WEIGHTS).stat().st_size == even.bytes_written
    report = tiny.extract(budget=budget, dtype=dtype, **options, patterns=True)
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
            report = pair.extract(budget=budget, patterns=True)
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
    report = pair.extract(budget=2500, patterns=True, **EVERYTHING)
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


@pytest.mark.parametrize("patterns", [False, True])
def test_a_budget_beyond_all_ranks_is_not_filled_with_zeros(tiny: Pair, patterns: bool) -> None:
    """A budget that holds everything gives no module more than the largest rank of the model."""
    report = tiny.extract(budget="2MB", patterns=patterns, **EVERYTHING)
    assert report.rank == 16
    assert report.error is not None
    assert report.error < 1e-5


def test_max_rank_caps_a_budget(tiny: Pair) -> None:
    """--max-rank holds with --budget, alone and with --patterns."""
    assert set(ranks_of(tiny.extract(budget="1MB", max_rank=3)).values()) == {3}
    assert set(ranks_of(tiny.extract(budget="1MB", max_rank=3, patterns=True)).values()) == {3}


@pytest.mark.parametrize("patterns", [False, True])
@pytest.mark.parametrize("budget", [1, 800, "2KB"])
def test_a_budget_that_is_too_small_is_refused(
    tiny: Pair, budget: int | str, patterns: bool
) -> None:
    """A budget without room for one rank is refused in words."""
    tiny.fails(UsageError, "udget", rank=None, budget=budget, patterns=patterns)


def test_budgets_may_be_written_in_many_ways(tiny: Pair) -> None:
    """ "20KB", "20 kb", "0.02MB" and 20000 are one size, "20KiB" is a larger one."""
    digests = []
    for budget in ("20KB", "20 kb", "0.02MB", 20_000, "20000", "0.00002 GB"):
        tiny.extract(budget=budget, patterns=True)
        digests.append(sha256s(tiny.out)[WEIGHTS])
    assert len(set(digests)) == 1
    tiny.extract(budget="20KiB", patterns=True)
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
    report = pair.extract(budget="45KB", patterns=True)
    assert ranks_of(report)["m0.q_proj"] == report.rank
    assert (ranks_of(report)["m0.q_proj"] or 0) > 40


def test_progress_of_a_budget_ends_at_the_total(tmp_path: Path) -> None:
    """Modules that are done again for a budget do not take the bar beyond its end."""
    state = {f"m{i}.q_proj.weight": random_for(f"{i}", 96, 96).float() for i in range(4)}
    tuned = moved(state, rank=1)
    tuned["m0.q_proj.weight"] = moved(state, decay=0.97)["m0.q_proj.weight"]
    pair = Pair(tmp_path, state, tuned)
    calls: list[tuple[int, int, str]] = []
    pair.extract(budget="45KB", patterns=True, progress=lambda *call: calls.append(call))
    done, totals = [c[0] for c in calls], {c[1] for c in calls}
    assert done == sorted(done)
    assert {max(done)} == totals
