"""What differs from the base by rounding alone is left out; what was trained is kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import WEIGHTS, codes, config_of
from helpers.cli import run_cli
from helpers.extracting import (
    BF16,
    EVERYTHING,
    F16,
    F32,
    Q0,
    UP1,
    Pair,
    assert_accounted,
    cast,
    distance,
    model,
    moved,
    moves,
    products,
    random_for,
    saved,
    square,
)
from helpers.files import NORM

from loratool.errors import ValueRangeError

#: How the base is stored, and how the fine-tune: from the stored base, or from the model before.
STORED = [
    (F32, F16, False), (F32, BF16, False), (BF16, F16, False), (F16, BF16, False),
    (BF16, F16, True), (F16, BF16, True), (BF16, F32, True), (F16, F32, True),
    (torch.float64, F32, False),
]  # fmt: skip


def stored(
    base: torch.dtype, tuned: torch.dtype, before: bool, *trained: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A base and a fine-tune of it in which the tensors whose names end so were trained."""
    exact = cast(model(size=32), torch.float64)
    given = cast(exact, base)
    source = exact if before else cast(given, torch.float64)
    return given, cast(moved(source, *trained) if trained else source, tuned)


def trained_paths(report: Any) -> set[str]:
    return {m.path for m in report.modules}


@pytest.mark.parametrize(("base", "tuned", "before"), STORED, ids=str)
def test_only_what_was_trained_has_factors(
    tmp_path: Path, base: torch.dtype, tuned: torch.dtype, before: bool
) -> None:
    """In every pair of dtypes the modules that nobody trained are left out and named, norms and
    biases among them; --verify agrees, and --keep-noise brings them back."""
    given, fine = stored(base, tuned, before, f"{Q0}.weight", "mlp.up_proj.weight")
    pair = Pair(tmp_path, given, fine)
    report = pair.extract(rank=32, verify=True, **EVERYTHING)
    assert trained_paths(report) == {Q0, UP1, UP1.replace(".1.", ".0.")}
    assert report.saved == []
    assert {t.why for t in report.left} <= {"rounding"}
    assert_accounted(report, given, fine)
    assert products(pair.out).keys() == {f"{path}.weight" for path in trained_paths(report)}
    assert report.groups == []
    lost = square(d for n, d in moves(given, fine).items() if n in {t.name for t in report.left})
    assert report.error == pytest.approx(math.sqrt(lost) / report.norm, rel=1e-3, abs=1e-5)
    assert report.verified == pytest.approx(distance(given, fine, pair.out), rel=1e-3, abs=1e-5)
    changed = moves(given, fine).keys() - {f"{path}.weight" for path in trained_paths(report)}
    assert {t.name for t in report.left} == changed
    if changed:
        (notice,) = [n for n in report.warnings if n.code == "rounding-only"]
        assert notice.where in changed
        assert "--keep-noise" in notice.message
    size = report.bytes_written
    kept = pair.extract(rank=32, **EVERYTHING, keep_noise=True)
    assert kept.left == []
    assert {f"{m.path}.weight" for m in kept.modules} | saved(pair.out).keys() >= changed
    assert "rounding-only" not in codes(kept)
    if any(n.endswith("_proj.weight") for n in changed):
        assert kept.bytes_written > 2 * size


def test_what_keeps_rounding_is_all_that_it_takes(tmp_path: Path) -> None:
    """Of norms, biases and embeddings that differ by rounding the notice and the refusal name the
    options that go with --keep-noise; with them these are in the adapter."""
    given = model(size=32)
    pair = Pair(tmp_path / "some", given, cast(moved(given, f"{Q0}.weight"), F16))
    (notice,) = [n for n in pair.extract(rank=4).warnings if n.code == "rounding-only"]
    options = "--save norms, --save biases and --embeddings"
    assert f"--keep-noise with {options} keeps them." in notice.message
    assert pair.extract(rank=4, keep_noise=True, **EVERYTHING).left == []
    tokens = "model.embed_tokens.weight"
    rounded = given | {tokens: cast(given, F16)[tokens]}
    alone = Pair(tmp_path / "one", given, rounded)
    error = alone.fails(ValueRangeError, "The two models are the same", rank=4)
    assert "--keep-noise with --embeddings makes an adapter" in error.hint
    report = alone.extract(rank=4, keep_noise=True, embeddings=True)
    assert [m.path for m in report.modules] == ["model.embed_tokens"]


def test_a_half_precision_in_between_is_rounding_too(tmp_path: Path) -> None:
    """Weights that went through bfloat16 on their way into a float32 or float16 file."""
    given = model(size=32)
    for number, tuned in enumerate((F32, F16)):
        between = cast(cast(given, BF16), tuned)
        fine = between | {f"{Q0}.weight": moved(between)[f"{Q0}.weight"]}
        report = Pair(tmp_path / str(number), given, fine).extract(rank=2)
        assert trained_paths(report) == {Q0}


def small(value: torch.Tensor, where: int = 5) -> torch.Tensor:
    """A copy in which one value is the next one of its dtype."""
    found = value.clone()
    flat = found.view(-1)
    flat[where] = torch.nextafter(flat[where], torch.tensor(math.inf, dtype=found.dtype))
    return found


@pytest.mark.parametrize(
    ("base", "tuned"), [(BF16, BF16), (F16, F16), (F32, F16), (F32, BF16), (BF16, F16), (F32, F32)],
    ids=str,
)  # fmt: skip
def test_the_smallest_change_is_no_rounding(
    tmp_path: Path, base: torch.dtype, tuned: torch.dtype
) -> None:
    """One value that is one unit off is a change, however little of the rounding's norm it is."""
    given, fine = stored(base, tuned, False)
    name = f"{UP1}.weight"
    fine[name] = small(fine[name])
    report = Pair(tmp_path, given, fine).extract(rank=2)
    assert trained_paths(report) == {UP1}
    assert report.noise <= 1


def test_a_norm_that_float32_moved_a_little_is_no_rounding(tmp_path: Path) -> None:
    """Trained in float32 on a bfloat16 base, a norm moves by less than bfloat16 tells apart. That
    is no rounding: rounding would have spread over the whole unit."""
    size = 512
    ones = torch.ones(size) + 0.2 * random_for("n", size).float().abs()
    given = {f"{Q0}.weight": random_for("q", 8, size).to(BF16), NORM: ones.to(BF16)}
    moved_norm = given[NORM].float() + 5e-4 * random_for("m", size).float()
    assert (moved_norm - given[NORM].float()).abs().max() < 2**-8
    fine = {f"{Q0}.weight": moved(cast(given, F32))[f"{Q0}.weight"], NORM: moved_norm}
    report = Pair(tmp_path, given, fine).extract(rank=2, save=["norms"])
    assert [t.name for t in report.saved] == [NORM]
    assert report.left == []


@pytest.mark.parametrize(("base", "tuned"), [(F32, F16), (BF16, BF16)], ids=str)
def test_an_embedding_of_which_some_rows_changed_is_kept(
    tmp_path: Path, base: torch.dtype, tuned: torch.dtype
) -> None:
    """Two trained rows of forty are enough, and the noise stated is a share, not 1,000 %."""
    name = "model.embed_tokens.weight"
    given, fine = stored(base, tuned, False, f"{Q0}.weight")
    fine[name][[3, 17]] += 2e-3
    report = Pair(tmp_path, given, fine).extract(rank=2, verify=True, embeddings=True)
    assert trained_paths(report) == {Q0, "model.embed_tokens"}
    (embedding,) = [m for m in report.modules if m.kind == "embedding"]
    assert embedding.noise < 0.5


def test_a_sparse_change_has_little_noise(tmp_path: Path) -> None:
    """`noise` counts the values that differ: an embedding of which one value moved by a little was
    said to be thousands of percent noise."""
    given = cast(model(size=64, vocabulary=2000), BF16)
    fine = {n: t.clone() for n, t in given.items()}
    fine["lm_head.weight"] = small(fine["lm_head.weight"])
    report = Pair(tmp_path, given, fine).extract(rank=1)
    (head,) = report.modules
    assert 0 < head.noise < 0.65  # of a change by one unit
    assert report.noise == head.noise


@pytest.mark.parametrize("dry_run", [False, True])
def test_nothing_but_rounding_is_refused(tmp_path: Path, dry_run: bool) -> None:
    """A copy of the base in another dtype is no fine-tune; --keep-noise takes it all the same."""
    given, fine = stored(F32, F16, False)
    pair = Pair(tmp_path, given, fine)
    error = pair.fails(
        ValueRangeError, "the same beyond rounding", f"{len(given)} of {len(given)} tensors",
        dry_run=dry_run,
    )  # fmt: skip
    assert "--keep-noise" in error.hint
    report = pair.extract(rank=2, keep_noise=True, embeddings=True, dry_run=dry_run)
    assert len(report.modules) == 10
    assert {m.noise for m in report.modules} == {1.0}
    assert report.noise == 1.0


def test_norms_alone_beside_rounding_are_refused(tmp_path: Path) -> None:
    """Where the weights differ by rounding alone, what did change is named, and that there is
    rounding."""
    given, fine = stored(F32, F16, False, "norm.weight")
    error = Pair(tmp_path, given, fine).fails(
        ValueRangeError, "could become factors differs beyond rounding but only these", NORM
    )
    assert "lm_head" not in error.message
    left = Pair(tmp_path / "left", *stored(F32, F16, False, f"{UP1}.weight"))
    left.fails(ValueRangeError, "beyond rounding in what was selected", exclude=["up_proj"])


def test_a_saved_module_is_complete_all_the_same(tmp_path: Path) -> None:
    """A norm whose weight alone was trained is saved with the bias that was only rounded."""
    at = "model.layers.0.post_norm."
    exact = model() | {f"{at}weight": random_for("w", 16).float(), f"{at}bias": torch.ones(16)}
    exact[f"{at}bias"] *= 0.3
    pair = Pair(tmp_path, exact, cast(moved(exact, f"{Q0}.weight", f"{at}weight"), F16))
    report = pair.extract(rank=2, save=["norms"], verify=True)
    assert {t.name for t in report.saved} == {f"{at}weight", f"{at}bias"}
    assert config_of(pair.out)["modules_to_save"] == ["post_norm"]


def test_a_dry_run_and_a_budget_know_of_it(tmp_path: Path) -> None:
    """A dry run leaves the same out, and a budget is spent on what was trained."""
    pair = Pair(tmp_path, *stored(F32, F16, False, f"{Q0}.weight", f"{UP1}.weight"))
    planned = pair.extract(dry_run=True)
    report = pair.extract(rank=8)
    assert planned.left == report.left
    assert planned.proposals[8] == report.bytes_written
    even = pair.extract(budget=report.bytes_written)
    assert (even.rank, even.bytes_written) == (8, report.bytes_written)


def test_the_terminal_names_it(tmp_path: Path) -> None:
    """A line of its own with number and share, a warning with the names, and the flag."""
    pair = Pair(tmp_path, *stored(F32, F16, False, f"{Q0}.weight"))
    arguments = ["extract", str(pair.base), str(pair.tuned), "--rank", "2", "-o", str(pair.out)]
    done = run_cli(*arguments)
    assert done.exit_code == 0
    assert "rounding only" in done.stdout
    assert "[rounding-only]" in done.stderr
    assert "14 tensors differ from" not in done.stderr
    assert "14 tensors differ by rounding alone (float16, float32) and are left out" in done.stderr
    assert "mlp.up_proj.weight" in done.stderr
    done = run_cli(*arguments, "--keep-noise", "--overwrite")
    assert done.exit_code == 0
    assert "rounding" not in done.stderr
    assert (pair.out / WEIGHTS).is_file()
