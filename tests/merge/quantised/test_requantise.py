"""Weights that go back into their format: their bytes, what they keep of the delta, refusals."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import write_adapter
from helpers.cli import run_cli
from helpers.files import State, load
from helpers.golden import golden
from helpers.merging import Here
from helpers.outcomes import refused
from helpers.quantised import fp8, llama_state, nf4, write_fp8_base, write_nf4_base
from safetensors.torch import save_file

import loratool
from loratool.adapters.reading import read_lora
from loratool.errors import BaseError, UsageError, ValueRangeError
from loratool.merging.executor import execute
from loratool.merging.planning import build_plan
from loratool.models.checkpoint import open_checkpoint
from loratool.models.quantised.base import dequantised
from loratool.models.quantised.treatment import Quantised
from loratool.storage.values import read_float32
from loratool.streams.run import Run

LAYER = "model.layers.0"
Q, K, V = (f"{LAYER}.self_attn.{side}_proj" for side in "qkv")
UP, DOWN = f"{LAYER}.mlp.up_proj", f"{LAYER}.mlp.down_proj"
BACK: dict[str, Any] = {"quantised": "requantise"}
FORCED: dict[str, Any] = {**BACK, "force": True}


def lora(folder: Path, state: State, *modules: str, size: float = 0.02, **config: Any) -> Path:
    """A random adapter of rank 16 whose deltas are `size` times as long as the weights."""
    made = torch.Generator().manual_seed(3)
    tensors: dict[str, Any] = dict(config.pop("extra", {}))
    for module in modules:
        weight = state[f"{module}.weight"].float()
        a = torch.randn(16, weight.shape[1], generator=made)
        b = torch.randn(weight.shape[0], 16, generator=made)
        b *= size * torch.linalg.norm(weight) / torch.linalg.norm(b @ a)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    targets = sorted({module.rpartition(".")[2] for module in modules})
    settings = {"r": 16, "lora_alpha": 16, "target_modules": targets, **config}
    return write_adapter(folder, tensors, settings)


def read(folder: Path) -> State:
    """The plain model that a folder stands for, as float32."""
    base = dequantised(open_checkpoint(folder))
    return {n: torch.from_numpy(read_float32(t)) for n, t in base.tensors.items()}


def differing(one: Path, other: Path) -> set[str]:
    """The tensors of two folders that are not the same bytes."""
    a, b = load(one), load(other)
    assert a.keys() == b.keys()
    assert all((a[n].dtype, a[n].shape) == (b[n].dtype, b[n].shape) for n in a)
    return {
        n for n in a
        if not torch.equal(a[n].reshape(-1).view(torch.uint8), b[n].reshape(-1).view(torch.uint8))
    }  # fmt: skip


def kept(base: State, adapter: State, result: State, name: str) -> tuple[float, float]:
    """Share and error of the delta that a weight holds, in float64."""
    a, b = (adapter[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    delta = (b @ a).reshape(-1)
    realised = (result[f"{name}.weight"].double() - base[f"{name}.weight"].double()).reshape(-1)
    error = torch.linalg.norm(realised - delta) / torch.linalg.norm(delta)
    return float(realised @ delta / (delta @ delta)), float(error)


@pytest.fixture
def state() -> State:
    return llama_state()


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_nf4_comes_back_as_nf4(tmp_path: Path, state: State, nested: bool) -> None:
    """Adapted weights have the nearest levels under new scales; tensors that describe them, all
    others and config.json are the same; what is kept is what the files say."""
    base, out = tmp_path / "base", tmp_path / "out"
    plain = write_nf4_base(base, state, nested=nested)
    adapter = lora(tmp_path / "adapter", state, Q, V, size=0.1)
    report = loratool.merge(base, adapter, out, verify=True, **FORCED)
    scales = ["absmax", *(["nested_absmax"] if nested else [])]
    changed = {f"{m}.weight" for m in (Q, V)}
    changed |= {f"{m}.weight.{scale}" for m in (Q, V) for scale in scales}
    assert differing(base, out) <= changed
    assert {f"{Q}.weight", f"{V}.weight.absmax"} <= differing(base, out)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, out)]
    assert configs[0] == configs[1]
    factors, result = load(adapter), read(out)
    for module in (Q, V):
        a, b = (factors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        merged = plain[f"{module}.weight"] + b @ a
        expected = nf4(merged, nested=False, dtype=torch.bfloat16, storage=torch.uint8)[1]
        found = result[f"{module}.weight"]
        # Nested scales are themselves rounded, to 8 bits.
        assert (
            torch.allclose(found, expected, rtol=0.02 if nested else 0, atol=1e-7)
            or ((found - expected).abs() > 0.02 * expected.abs() + 1e-7).float().mean() < 0.002
        )
    assert report.kept_of_delta is not None
    shares = [kept(plain, factors, result, module) for module in (Q, V)]
    low, high = sorted(share for share, _ in shares)
    assert low - 1e-3 <= report.kept_of_delta.share <= high + 1e-3
    low, high = sorted(error for _, error in shares)
    assert low - 1e-3 <= report.kept_of_delta.error <= high + 1e-3
    assert report.lost == pytest.approx(report.kept_of_delta.error, rel=1e-6)
    assert [w.code for w in report.warnings] == ["quantised-base", "delta-lost"]
    record = json.loads((out / "loratool.json").read_text())
    assert record["options"]["quantised"] == "requantise"
    assert record["result"]["kept_of_delta"] == report.kept_of_delta.to_dict()


@pytest.mark.parametrize("block", [(16, 32), (128, 128), None])
def test_fp8_comes_back_as_fp8(tmp_path: Path, state: State, block: tuple[int, int] | None) -> None:
    """New scales, of blocks and of a whole tensor, and the nearest codes under them."""
    base, out = tmp_path / "base", tmp_path / "out"
    plain = write_fp8_base(base, state, block=block)
    adapter = lora(tmp_path / "adapter", state, Q, DOWN, size=0.1)
    report = loratool.merge(base, adapter, out, verify=True, **BACK)
    names = {f"{m}.{part}" for m in (Q, DOWN) for part in ("weight", "weight_scale_inv")}
    assert differing(base, out) <= names
    factors, written, result = load(adapter), load(out), read(out)
    for module in (Q, DOWN):
        a, b = (factors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        codes, scales, expected = fp8(plain[f"{module}.weight"] + b @ a, block)
        assert torch.allclose(written[f"{module}.weight_scale_inv"], scales, rtol=1e-5)
        unlike = written[f"{module}.weight"].view(torch.uint8) != codes.view(torch.uint8)
        assert unlike.float().mean() < 0.002  # of values half way between two codes
        assert torch.allclose(result[f"{module}.weight"], expected, rtol=0.13, atol=1e-7)
    assert report.kept_of_delta is not None
    assert report.kept_of_delta.share > 0.97
    assert "delta-lost" not in [w.code for w in report.warnings]


@pytest.mark.parametrize(
    ("name", "size", "share", "error"),
    [("nf4", 0.02, 0.04, 1.08), ("nf4", 0.1, 0.82, 0.78), ("fp8", 0.02, 0.67, 0.73),
     ("fp8", 0.05, 0.95, 0.48)],
)  # fmt: skip
def test_what_is_kept_is_as_measured_elsewhere(
    tmp_path: Path, name: str, size: float, share: float, error: float
) -> None:
    """Normal weights and a random delta: the shares that were measured with the libraries."""
    normal = torch.randn(256, 512, generator=torch.Generator().manual_seed(1)) * 0.02
    state = {f"{Q}.weight": normal.bfloat16(), "lm_head.weight": torch.ones(4, 4)}
    write = {"nf4": write_nf4_base, "fp8": write_fp8_base}[name]
    write(tmp_path / "base", state)
    adapter = lora(tmp_path / "adapter", state, Q, size=size)
    report = loratool.merge(tmp_path / "base", adapter, tmp_path / "out", **FORCED)
    assert report.kept_of_delta is not None
    assert report.kept_of_delta.share == pytest.approx(share, abs=0.04)
    assert report.kept_of_delta.error == pytest.approx(error, abs=0.06)


@pytest.mark.parametrize("write", [write_nf4_base, write_fp8_base])
def test_without_a_delta_the_bytes_stay(tmp_path: Path, state: State, write: Any) -> None:
    """A weight of zero: every tensor of the base, also where a format has no identity."""
    write(tmp_path / "base", state)
    adapter = lora(tmp_path / "adapter", state, Q, UP)
    report = loratool.merge(tmp_path / "base", adapter, tmp_path / "out", weights=[0], **BACK)
    assert differing(tmp_path / "base", tmp_path / "out") == set()
    assert report.kept_of_delta is None


def test_rows_that_nothing_changes_keep_their_bytes(tmp_path: Path) -> None:
    """A delta of some rows: the codes and the scales of the others stay."""
    state = {"lm_head.weight": torch.ones(4, 4)}
    state[f"{Q}.weight"] = llama_state(width=64)[f"{Q}.weight"]
    write_nf4_base(tmp_path / "base", state, nested=False)
    b = torch.zeros(64, 16)
    b[32:] = 0.1
    factors = {
        f"base_model.model.{Q}.lora_A.weight": torch.ones(16, 64),
        f"base_model.model.{Q}.lora_B.weight": b,
    }
    config = {"r": 16, "lora_alpha": 16, "target_modules": ["q_proj"]}
    adapter = write_adapter(tmp_path / "adapter", factors, config)
    loratool.merge(tmp_path / "base", adapter, tmp_path / "out", **FORCED)
    before, after = load(tmp_path / "base"), load(tmp_path / "out")
    for part in ("weight", "weight.absmax"):
        old, new = (some[f"{Q}.{part}"].reshape(2, -1) for some in (before, after))
        assert torch.equal(old[0], new[0])
        assert not torch.equal(old[1], new[1])


@pytest.mark.parametrize("name", ["ct-int4-group-asym", "gptq-v1-4bit-asym-order", "ct-int8-w8a8"])
def test_calibrated_grids_stay(tmp_path: Path, name: str) -> None:
    """Integers: only codes change, each by the nearest step of its old grid."""
    base = golden(name).lay(tmp_path / "base")
    plain = read(base)
    modules = [n.removesuffix(".weight") for n in dequantised(open_checkpoint(base)).tensors
               if n.endswith(".weight") and plain[n].ndim == 2]  # fmt: skip
    adapter = lora(tmp_path / "adapter", plain, *modules, size=0.2, target_modules=modules)
    loratool.merge(base, adapter, tmp_path / "out", verify=True, **FORCED)
    roles = {n.rpartition(".")[2] for n in differing(base, tmp_path / "out")}
    assert roles in ({"weight_packed"}, {"qweight"}, {"weight"})
    factors, result = load(adapter), read(tmp_path / "out")
    for module in modules:
        share, error = kept(plain, factors, result, module)
        assert 0.6 < share < 1.1
        assert error < 0.7


def test_same_bytes_with_any_threads_and_shards(tmp_path: Path, state: State) -> None:
    """One, two and five threads; and scales in a file of their own."""
    write_nf4_base(tmp_path / "base", state)
    apart = {"shard_of": lambda name: int("absmax" in name)}
    write_nf4_base(tmp_path / "apart", state, **apart)
    adapter = lora(tmp_path / "adapter", state, Q, K, V, DOWN, size=0.1)
    for threads in (1, 2, 5):
        loratool.merge(
            tmp_path / "base", adapter, tmp_path / str(threads), threads=threads, **FORCED
        )
    files = {(tmp_path / n / "model.safetensors").read_bytes() for n in ("1", "2", "5")}
    assert len(files) == 1
    loratool.merge(tmp_path / "apart", adapter, tmp_path / "2 shards", verify=True, **FORCED)
    assert differing(tmp_path / "1", tmp_path / "2 shards") == set()


@pytest.mark.parametrize("width", [80, 33])
def test_blocks_that_straddle_rows(tmp_path: Path, width: int) -> None:
    """Rows that are no multiple of a block, and an odd number of values."""
    state = llama_state(width)
    base, out = tmp_path / "base", tmp_path / "out"
    plain = write_nf4_base(base, state, nested=False)
    adapter = lora(tmp_path / "adapter", state, Q, DOWN, size=0.3)
    loratool.merge(base, adapter, out, verify=True, **FORCED)
    factors, result = load(adapter), read(out)
    for module in (Q, DOWN):
        share, error = kept(plain, factors, result, module)
        assert share == pytest.approx(1, abs=0.1)
        assert error < 0.5


def test_another_process_can_make_a_shard(tmp_path: Path, state: State) -> None:
    """A shard of the plan is all that is needed, also of weights whose parts lie elsewhere."""
    write_nf4_base(tmp_path / "base", state, shard_of=lambda name: int("absmax" in name))
    adapter = lora(tmp_path / "adapter", state, Q, size=0.1)
    loratool.merge(tmp_path / "base", adapter, tmp_path / "out", **FORCED)
    base = dequantised(open_checkpoint(tmp_path / "base"))
    plan = build_plan(base, [read_lora(adapter)], [1.0], quantised=Quantised("requantise"))
    (tmp_path / "made").mkdir()
    for shard in plan.outputs:
        execute([pickle.loads(pickle.dumps(shard))], Here(tmp_path / "made"), Run(1))
        made = (tmp_path / "made" / shard.name).read_bytes()
        assert made == (tmp_path / "out" / shard.name).read_bytes()


# --- everything that a merge does to weights ------------------------------------------------------


def test_dora(tmp_path: Path, state: State) -> None:
    """Weights are rescaled by their norms before they go back."""
    base = tmp_path / "base"
    plain = write_fp8_base(base, state, block=(16, 32))
    magnitude = torch.linalg.norm(plain[f"{Q}.weight"], dim=1) * 1.3
    extra = {f"base_model.model.{Q}.lora_magnitude_vector": magnitude}
    adapter = lora(tmp_path / "adapter", state, Q, size=0.3, extra=extra, use_dora=True)
    loratool.merge(base, adapter, tmp_path / "out", verify=True, **BACK)
    loratool.merge(base, adapter, tmp_path / "plain", quantised="plain", dtype="float32")
    expected, result = load(tmp_path / "plain")[f"{Q}.weight"], read(tmp_path / "out")
    assert torch.allclose(torch.linalg.norm(expected, dim=1), magnitude, rtol=1e-3)
    scale = expected.abs().max()
    assert torch.allclose(result[f"{Q}.weight"], expected, rtol=2**-4, atol=2e-3 * float(scale))


def test_a_weight_that_is_replaced(tmp_path: Path, state: State) -> None:
    """modules_to_save of a quantised weight: the saved one is quantised; what is kept counts from
    the base's."""
    base = tmp_path / "base"
    write_fp8_base(base, state, block=(16, 32))
    saved = state[f"{V}.weight"].float() * 2
    extra = {f"base_model.model.{V}.weight": saved}
    adapter = lora(
        tmp_path / "adapter", state, Q, size=0.3, extra=extra, modules_to_save=["v_proj"]
    )
    report = loratool.merge(base, adapter, tmp_path / "out", verify=True, **BACK)
    result = read(tmp_path / "out")
    assert torch.allclose(result[f"{V}.weight"], saved, rtol=2**-4, atol=2e-3)
    assert f"{V}.weight" in report.changes["replace"]
    assert report.kept_of_delta is not None
    assert report.kept_of_delta.share == pytest.approx(1, abs=0.02)


def test_several_adapters_are_rounded_once(tmp_path: Path, state: State) -> None:
    """Two adapters go in together, before anything is quantised."""
    base = tmp_path / "base"
    plain = write_fp8_base(base, state, block=(16, 32))
    one = lora(tmp_path / "one", state, Q, size=0.03)
    two = lora(tmp_path / "two", state, Q, V, size=0.05)
    loratool.merge(base, [one, two], tmp_path / "out", weights=[1, -0.5], verify=True, **BACK)
    delta = torch.zeros(64, 64)
    for adapter, weight in ((load(one), 1), (load(two), -0.5)):
        a, b = (adapter[f"base_model.model.{Q}.lora_{x}.weight"] for x in "AB")
        delta += weight * (b @ a)
    codes, scales, _ = fp8(plain[f"{Q}.weight"] + delta, (16, 32))
    written = load(tmp_path / "out")
    assert torch.allclose(written[f"{Q}.weight_scale_inv"], scales, rtol=1e-5)
    unlike = written[f"{Q}.weight"].view(torch.uint8) != codes.view(torch.uint8)
    assert unlike.float().mean() < 0.002


def test_what_an_initialisation_took_is_taken_off_first(tmp_path: Path, state: State) -> None:
    """--initial: the base less the factors before training, plus those after, goes back; the record
    says so."""
    base = tmp_path / "base"
    plain = write_fp8_base(base, state, block=(16, 32))
    init = {"init_lora_weights": "pissa_niter_2"}
    before = lora(tmp_path / "before", state, Q, size=0.5, **init)
    after = load(before)
    after[f"base_model.model.{Q}.lora_B.weight"] *= 1.5
    config = json.loads((before / "adapter_config.json").read_text())
    trained = write_adapter(tmp_path / "trained", after, config)
    options = {"initial": before, **BACK}
    loratool.merge(base, trained, tmp_path / "out", verify=True, **options)
    factors = load(before)
    a, b = (factors[f"base_model.model.{Q}.lora_{x}.weight"] for x in "AB")
    expected = plain[f"{Q}.weight"] + 0.5 * (b @ a)
    result = read(tmp_path / "out")[f"{Q}.weight"]
    assert torch.allclose(result, expected, rtol=2**-4, atol=2e-3)
    record = json.loads((tmp_path / "out" / "loratool.json").read_text())
    assert record["adapters"][0]["taken"] == "given"


def test_an_undo_file_brings_the_base_back(tmp_path: Path, state: State) -> None:
    """--reversible: the packed tensors, bit for bit."""
    write_nf4_base(tmp_path / "base", state)
    adapter = lora(tmp_path / "adapter", state, Q, size=0.1)
    out = tmp_path / "out"
    loratool.merge(tmp_path / "base", adapter, out, reversible=True, **FORCED)
    loratool.unmerge(out, adapter, tmp_path / "back")
    one, other = (tmp_path / n / "model.safetensors" for n in ("base", "back"))
    assert one.read_bytes() == other.read_bytes()


def test_verify_proves_it(tmp_path: Path, state: State) -> None:
    """What was quantised again is recomputed, byte by byte; one other code is a finding."""
    base, out = tmp_path / "base", tmp_path / "out"
    write_nf4_base(base, state)
    adapter = lora(tmp_path / "adapter", state, Q, V, size=0.3)
    loratool.merge(base, adapter, out, **FORCED)
    report = loratool.verify(out, base, adapter)
    assert report.verdict == "yes"
    assert {f.code for f in report.findings} == {"requantised"}
    tensors = load(out)
    tensors[f"{Q}.weight"][7] ^= 1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    report = loratool.verify(out, base, adapter)
    assert report.verdict == "no"
    codes = {f.tensor: f.code for f in report.findings}
    assert codes[f"{V}.weight"] == "requantised"
    assert codes[f"{Q}.weight"] != "requantised"


@pytest.mark.parametrize("nested", [False, True])
def test_what_others_quantise_again_is_known(tmp_path: Path, nested: bool) -> None:
    """Sums in bfloat16, scales that are rounded otherwise: merged all the same. With another weight
    it is not, and the base itself is not either."""
    state = llama_state(width=128)
    base = tmp_path / "base"
    plain = write_nf4_base(base, state, nested=nested)
    adapter = lora(tmp_path / "adapter", state, Q, UP, size=0.3)
    loratool.merge(base, adapter, tmp_path / "plain", dtype="bfloat16")
    merged = {**{n: t.bfloat16() for n, t in plain.items()}, **load(tmp_path / "plain")}
    write_nf4_base(tmp_path / "theirs", merged, nested=nested)
    others, ours = load(tmp_path / "theirs"), load(base)
    # What they do not touch they would not quantise again.
    kept = {n: t for n, t in ours.items() if not n.startswith((Q, UP))}
    (tmp_path / "theirs" / "model.safetensors").unlink()
    save_file({**others, **kept}, tmp_path / "theirs" / "model.safetensors", {"format": "pt"})
    report = loratool.verify(tmp_path / "theirs", base, adapter)
    assert report.verdict == "yes"
    assert {f.code for f in report.findings} == {"requantised"}
    assert loratool.verify(tmp_path / "theirs", base, adapter, weights=[0.8]).verdict == "no"
    assert loratool.verify(base, base, adapter).verdict == "no"


def test_a_delta_that_is_lost_was_not_merged(tmp_path: Path) -> None:
    """Where quantising again takes all of a delta, the result is the base, and verify says so."""
    base = golden("ct-int4-group").lay(tmp_path / "base")
    plain = read(base)
    modules = [n.removesuffix(".weight") for n in plain if n.endswith(".weight")]
    adapter = lora(tmp_path / "adapter", plain, *modules, size=0.002, target_modules=modules)
    report = loratool.merge(base, adapter, tmp_path / "out", **FORCED)
    assert report.kept_of_delta is not None
    assert report.kept_of_delta.share == 0
    assert differing(base, tmp_path / "out") == set()
    assert loratool.verify(tmp_path / "out", base, adapter).verdict == "no"


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("dry_run", [True, False])
def test_four_bits_are_refused_with_what_they_would_keep(
    tmp_path: Path, state: State, dry_run: bool
) -> None:
    """The share of the delta, measured on it, and what to do instead; nothing is written."""
    base = tmp_path / "base"
    write_nf4_base(base, state)
    adapter = lora(tmp_path / "adapter", state, Q, V, UP)
    error = refused(
        BaseError, base, adapter, tmp_path / "out", "NF4", "would keep about", "of the delta",
        dry_run=dry_run, **BACK,
    )  # fmt: skip
    assert "--force" in error.hint
    assert "--quantised plain" in error.hint
    report = loratool.merge(base, adapter, tmp_path / "out", dry_run=True, **FORCED)
    done = loratool.merge(base, adapter, tmp_path / "out", **FORCED)
    assert report.kept_of_delta is not None
    # A sample of a model so small is all of it.
    assert report.kept_of_delta == done.kept_of_delta
    said = error.message.partition("about ")[2].partition("%")[0]
    assert float(said) == pytest.approx(100 * report.kept_of_delta.share, abs=0.05)


def test_eight_bits_are_not_refused(tmp_path: Path, state: State) -> None:
    """FP8 says what it took: on the terminal before and after, and in JSON."""
    base, out = tmp_path / "base", tmp_path / "out"
    write_fp8_base(base, state)
    adapter = lora(tmp_path / "adapter", state, Q)
    given = ["merge", base, adapter, "-o", out, "--quantised", "requantise"]
    before = run_cli(*given, "--dry-run")
    after = run_cli(*given)
    assert "would keep about" in before.stdout
    assert "of the delta (error" in after.stdout
    assert "[delta-lost]" in after.stderr
    again = run_cli(*given, "--overwrite", "--json")
    found = json.loads(again.stdout)["kept_of_delta"]
    assert 0.5 < found["share"] < 0.9
    assert f"{100 * found['share']:.3g}%" in after.stdout


def test_formats_that_are_only_read(tmp_path: Path) -> None:
    """HQQ rounds twice, in 16 bits, so no code is nearest: refused by name, with a way out."""
    base = golden("hqq-4bit").lay(tmp_path / "base")
    plain = read(base)
    module = next(n for n in plain if plain[n].ndim == 2).removesuffix(".weight")
    adapter = lora(tmp_path / "adapter", plain, module)
    error = refused(BaseError, base, adapter, tmp_path / "out", "HQQ 4 bit", **FORCED)
    assert "--quantised keep" in error.hint


def test_options_that_mean_nothing(tmp_path: Path, state: State) -> None:
    """--force without requantise; a dtype, where every tensor keeps its own."""
    write_fp8_base(tmp_path / "base", state)
    adapter = lora(tmp_path / "adapter", state, Q)
    out = tmp_path / "out"
    refused(UsageError, tmp_path / "base", adapter, out, "--force", force=True)
    refused(
        UsageError, tmp_path / "base", adapter, out, "every weight keeps", dtype="float16", **BACK
    )


def test_nothing_touched_is_nothing_quantised(tmp_path: Path, state: State) -> None:
    """An adapter on the head alone: everything is copied, four bits too, and nothing is asked."""
    write_nf4_base(tmp_path / "base", state)
    adapter = lora(tmp_path / "adapter", state, "lm_head")
    report = loratool.merge(tmp_path / "base", adapter, tmp_path / "out", **BACK)
    assert "copied as it is" in report.quantised
    assert report.kept_of_delta is None
    assert differing(tmp_path / "base", tmp_path / "out") == {"lm_head.weight"}


def test_a_product_that_float32_cannot_hold(tmp_path: Path, state: State) -> None:
    """Found before it becomes a code; nothing is left behind."""
    write_fp8_base(tmp_path / "base", state)
    factors = load(lora(tmp_path / "small", state, Q))
    huge = {name: value * 1e21 for name, value in factors.items()}
    config = {"r": 16, "lora_alpha": 16, "target_modules": ["q_proj"]}
    adapter = write_adapter(tmp_path / "adapter", huge, config)
    refused(ValueRangeError, tmp_path / "base", adapter, tmp_path / "out", Q, **BACK)
