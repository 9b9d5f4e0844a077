"""verify: what is base + adapters passes, what is not fails, and each fault is called by its name.

The models here are computed from the trained fixtures by the formula itself, then broken on
purpose. What other tools make of the formula is in test_verify_tools.py.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import FIXTURES, run_cli, write_adapter
from files import (
    ADAPTED,
    NORM,
    OTHER,
    State,
    assert_clean,
    assert_clear,
    load,
    lora_on,
    random_of,
    small_lora,
    small_state,
    write_base,
)
from safetensors.torch import load_file, save_file

import loratool
from loratool.cli.main import cli
from loratool.errors import LoraToolError, VerifyError
from loratool.merging.proof.findings import Finding
from loratool.rendering import terminal as common
from loratool.storage.shardfile import ShardWriter
from loratool.verbs.verify import VerifyReport

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}

K = "model.layers.1.self_attn.k_proj.weight"
Q = "model.layers.1.self_attn.q_proj.weight"
O = "model.layers.1.self_attn.o_proj.weight"  # noqa: E741
V = "model.layers.1.self_attn.v_proj.weight"
UNTOUCHED = "model.embed_tokens.weight"


@cache
def original() -> State:
    return load(FIXTURES / "base")


@cache
def deltas() -> State:
    """scale·B·A of the fixture's adapter, by the tensor it is added to."""
    factors = load_file(FIXTURES / "adapter" / "adapter_model.safetensors")
    found = {}
    for name, a in factors.items():
        if name.endswith(".lora_A.weight"):
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[f"{path}.weight"] = 2.0 * (factors[name.replace("_A.", "_B.")] @ a)
    assert len(found) == 28
    return found


def merged(
    dtype: torch.dtype = torch.float16, weight: float = 1.0, added: State | None = None
) -> State:
    """The fixtures merged by the formula: weight·Δ added in float32, rounded once."""
    found = {n: value.to(dtype) for n, value in original().items()}
    for name, delta in (deltas() if added is None else added).items():
        found[name] = (original()[name].float() + weight * delta).to(dtype)
    return found


def written(folder: Path, state: State, config: Path | None = FIXTURES / "base") -> Path:
    """A model directory of one file."""
    folder.mkdir(parents=True)
    if config is not None:
        shutil.copy(config / "config.json", folder)
    save_file({n: v.contiguous() for n, v in state.items()}, folder / "model.safetensors")
    return folder


def check(folder: Path, state: State, **options: Any) -> VerifyReport:
    """Write `state` to a folder and verify it as the fixtures' merge."""
    model = written(folder, state)
    return loratool.verify(model, FIXTURES / "base", [FIXTURES / "adapter"], **options)


def codes(report: VerifyReport) -> Counter[str]:
    return Counter(f.code for f in report.findings)


def bad(report: VerifyReport) -> dict[str, str]:
    """The code of every finding that says no, by tensor."""
    return {f.tensor: f.code for f in report.findings if not f.sound}


def finding(report: VerifyReport, tensor: str) -> Finding:
    (one,) = [f for f in report.findings if f.tensor == tensor]
    return one


def flipped(value: torch.Tensor, bit: int, index: int) -> torch.Tensor:
    """A copy with one bit of one element turned over."""
    copy = value.clone()
    bits = copy.view(-1).view(INTEGERS[value.dtype])
    width = 8 * value.dtype.itemsize
    mask = 1 << bit if bit < width - 1 else -(1 << bit)
    bits[index] = bits[index] ^ mask
    return copy


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


def only(names: Callable[[str], bool], weight: float) -> State:
    """All deltas, those that `names` picks times `weight`."""
    return {n: d * weight if names(n) else d for n, d in deltas().items()}


# ------------------------------------------------------------------------------- what is right


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "base"])
def test_own_output_is_the_once_rounded_result(dtype: str, tmp_path: Path) -> None:
    """What `merge` writes is verified value by value, in every dtype."""
    out = tmp_path / "out"
    loratool.merge(FIXTURES / "base", FIXTURES / "adapter", out, dtype=dtype)
    report = loratool.verify(out, FIXTURES / "base", FIXTURES / "adapter")
    assert report.verdict == "yes"
    assert report.summary == ["all 28 modules are the once-rounded result"]
    assert codes(report) == {"once": 28}
    assert (report.modules, report.untouched, report.equal) == (28, 11, 1.0)
    assert all(f.applied == pytest.approx(1, abs=1e-3) for f in report.findings)
    assert all(f.ulps == {**dict.fromkeys(f.ulps, 0), "0": f.elements} for f in report.findings)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_formula_by_hand_is_the_once_rounded_result(dtype: str, tmp_path: Path) -> None:
    """What torch computes by the formula passes; this file's broken models start from it."""
    report = check(tmp_path / "m", merged(DTYPES[dtype]))
    assert report.verdict == "yes"
    assert codes(report) == {"once": 28}


@pytest.mark.parametrize("weights", [[0.7, -0.4], [-1.0, 1.5], [0.3, 0.3]])
def test_several_adapters_are_verified_with_their_weights(
    weights: list[float], tmp_path: Path
) -> None:
    """Weights of either sign are part of what is verified: swapped, they are not the same merge."""
    base = write_base(tmp_path / "base", small_state(64))
    rng = np.random.default_rng(3)
    adapters = [
        lora_on(tmp_path / f"a{i}", rng.standard_normal((64, 4)), rng.standard_normal((4, 64)))
        for i in range(2)
    ]
    loratool.merge(base, adapters, tmp_path / "out", weights=weights)
    assert loratool.verify(tmp_path / "out", base, adapters, weights=weights).verdict == "yes"
    for wrong in (weights[::-1], [1.0, 1.0], [-w for w in weights]):
        report = loratool.verify(tmp_path / "out", base, adapters, weights=wrong)
        assert report.verdict == ("yes" if wrong == weights else "no")


@pytest.mark.parametrize("missing", [0, 1])
def test_one_of_two_adapters_missing_is_seen(missing: int, tmp_path: Path) -> None:
    """A model that holds only one of two adapters is not the merge of both."""
    base = write_base(tmp_path / "base", small_state(64))
    rng = np.random.default_rng(3)
    adapters = [
        lora_on(tmp_path / f"a{i}", rng.standard_normal((64, 4)), rng.standard_normal((4, 64)))
        for i in range(2)
    ]
    loratool.merge(base, adapters[1 - missing], tmp_path / "out")
    report = loratool.verify(tmp_path / "out", base, adapters)
    assert report.verdict == "no"
    (one,) = report.findings
    assert one.code == "weights"
    assert one.applied is not None
    assert 0.2 < one.applied < 0.8
    # Both weights were 1 in the plan; of what is there, one is 1 and the other 0.
    names = ("1.00 × a0", "0.00 × a1") if missing else ("0.00 × a0", "1.00 × a1")
    assert " and ".join(names) in report.summary[0]


def test_two_adapters_on_different_modules_show_which_one_is_missing(tmp_path: Path) -> None:
    """Where two adapters adapt different modules, those of the missing one were never merged."""
    base = write_base(tmp_path / "base", small_state(32))
    rng = np.random.default_rng(3)
    b, a = rng.standard_normal((32, 2)), rng.standard_normal((2, 32))
    adapters = [lora_on(tmp_path / "q", b, a), lora_on(tmp_path / "k", b, a, OTHER)]
    loratool.merge(base, adapters[0], tmp_path / "out")
    report = loratool.verify(tmp_path / "out", base, adapters)
    assert bad(report) == {OTHER: "not-merged"}


# ------------------------------------------------------------------------ faults of whole models


def all_of(code: str) -> dict[str, str]:
    return dict.fromkeys(deltas(), code)


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


# ----------------------------------------------------------------------- faults of some modules

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


# ------------------------------------------------------------------------------------ single bits

#: The bits of the fraction and of the exponent.
LAYOUT = {"float16": (10, 5), "bfloat16": (7, 8), "float32": (23, 8)}


@pytest.mark.parametrize("bit", ["lowest", "highest-of-fraction", "exponent", "sign"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bit_of_an_untouched_tensor_is_seen(dtype: str, bit: str, tmp_path: Path) -> None:
    """Any flipped bit of a tensor that no adapter touches is found."""
    fraction, exponent = LAYOUT[dtype]
    number = {
        "lowest": 0, "highest-of-fraction": fraction - 1,
        "exponent": fraction, "sign": fraction + exponent,
    }[bit]  # fmt: skip
    state = merged(DTYPES[dtype])
    state[UNTOUCHED] = flipped(state[UNTOUCHED], number, 1234)
    report = check(tmp_path / "m", state)
    assert report.verdict == "no"
    assert bad(report) == {UNTOUCHED: "changed"}
    one = finding(report, UNTOUCHED)
    assert one.elements - round(one.equal * one.elements) == 1
    assert report.summary[0] == f"1 tensor changed although no adapter touches it: {UNTOUCHED}"
    assert report.untouched == 10


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_no_flipped_bit_passes_for_a_rounding(dtype: str, tmp_path: Path) -> None:
    """A flipped bit is found even where the wrong value is what bfloat16 would make of it."""
    state = {**small_state(64, DTYPES[dtype])}
    base = write_base(tmp_path / "base", state)
    adapter = small_lora(tmp_path / "a", 64)
    loratool.merge(base, adapter, tmp_path / "right", dtype="base")
    right = load(tmp_path / "right")
    kinds = [torch.bfloat16] if dtype == "float16" else [torch.bfloat16, torch.float16]
    tried = 0
    for half in kinds:
        flat = state[OTHER].view(-1)
        there = flat.to(half).to(flat.dtype)
        changed = flat.view(INTEGERS[flat.dtype]) ^ there.view(INTEGERS[flat.dtype])
        for index in torch.nonzero((changed & (changed - 1) == 0) & (changed != 0)).view(-1)[:3]:
            value = right[OTHER].clone()
            value.view(-1)[index] = there[index]
            model = written(tmp_path / f"m{tried}", {**right, OTHER: value}, base)
            report = loratool.verify(model, base, adapter)
            assert (report.verdict, bad(report)) == ("no", {OTHER: "changed"})
            tried += 1
    assert tried or dtype == "float32"


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_untouched_tensor_one_unit_off_everywhere_is_seen(
    dtype: str, direction: int, tmp_path: Path
) -> None:
    """One unit in the last place is a change, where nothing should change."""
    state = merged(DTYPES[dtype])
    norm = "model.norm.weight"
    state[norm] = state[norm].clone()
    state[norm].view(INTEGERS[DTYPES[dtype]]).add_(direction)
    report = check(tmp_path / "m", state)
    assert bad(report) == {norm: "changed"}
    one = finding(report, norm)
    assert (one.equal, one.largest_ulp) == (0.0, 1)
    assert one.ulps["1"] == one.elements


@pytest.mark.parametrize("bit", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_high_bit_of_an_adapted_tensor_is_seen(dtype: str, bit: int, tmp_path: Path) -> None:
    """A merged tensor with one wrong value is merged but damaged, whatever the value became."""
    state = merged(DTYPES[dtype])
    width = 8 * DTYPES[dtype].itemsize
    state[Q] = flipped(state[Q], width - bit, 77)
    report = check(tmp_path / "m", state)
    assert report.verdict == "no"
    assert bad(report) == {Q: "damaged"}
    assert finding(report, Q).off == 1
    name = Q.removesuffix(".weight")
    assert report.summary == [
        f"1 of 28 modules is merged, but some of its values are off: {name}",
        "27 of 28 modules are the once-rounded result",
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tensor", [Q, UNTOUCHED])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_seen(
    dtype: str, tensor: str, value: float, tmp_path: Path
) -> None:
    """NaN or infinity in the merged model is found, and the report stays strict JSON."""
    state = merged(DTYPES[dtype])
    state[tensor] = state[tensor].clone()
    state[tensor][3, 5] = value
    report = check(tmp_path / "m", state)
    assert report.verdict == "no"
    assert bad(report) == {tensor: "damaged" if tensor == Q else "changed"}
    json.dumps(report.to_dict(), allow_nan=False)


# ------------------------------------------------------------------- tensors as a whole, and files


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    """A tensor that is not there is missing, adapted or not."""
    state = merged()
    del state[Q], state[UNTOUCHED]
    report = check(tmp_path / "m", state)
    assert report.verdict == "no"
    assert bad(report) == {Q: "missing", UNTOUCHED: "missing"}
    assert report.summary[0].startswith("2 tensors are missing: ")
    assert Q in report.summary[0]
    assert UNTOUCHED in report.summary[0]


def test_added_tensors_are_named(tmp_path: Path) -> None:
    """A tensor that the base does not have is named."""
    report = check(tmp_path / "m", {**merged(), "model.extra.weight": torch.zeros(3)})
    assert report.verdict == "no"
    assert bad(report) == {"model.extra.weight": "added"}
    assert report.summary[0] == "1 tensor is not in the base: model.extra.weight"


@pytest.mark.parametrize("tensor", [Q, K, UNTOUCHED])
def test_tensors_of_another_shape_are_named(tensor: str, tmp_path: Path) -> None:
    """A tensor with another shape is named with both shapes, even with as many elements."""
    state = merged()
    rows, columns = state[tensor].shape
    state[tensor] = state[tensor].reshape(rows // 2, columns * 2)
    report = check(tmp_path / "m", state)
    assert report.verdict == "no"
    assert bad(report) == {tensor: "shape"}
    note = f"{[rows // 2, columns * 2]} instead of {[rows, columns]}"
    assert finding(report, tensor).note == note
    assert report.summary[0] == f"1 tensor has another shape: {tensor}"


def test_integers_in_place_of_floats_are_named(tmp_path: Path) -> None:
    """A float tensor that became integers cannot hold the result, and one sentence says it."""
    base = write_base(tmp_path / "base", {**small_state(16), "model.bias": torch.ones(16)})
    adapter = small_lora(tmp_path / "a", 16)
    loratool.merge(base, adapter, tmp_path / "out")
    state = {**load(tmp_path / "out"), "model.bias": torch.ones(16, dtype=torch.int32)}
    report = loratool.verify(written(tmp_path / "m", state, base), base, adapter)
    assert bad(report) == {"model.bias": "dtype"}
    assert report.summary[0] == "1 tensor has a dtype that cannot hold it: model.bias"


@pytest.mark.parametrize("cut", [1, 5000])
def test_truncated_shard_is_no_merge(cut: int, tmp_path: Path) -> None:
    """A shard that ends early is exit 3, the verdict no, and the reason names the file."""
    out = tmp_path / "out"
    loratool.merge(FIXTURES / "base", FIXTURES / "adapter", out)
    shard = sorted(out.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-cut])
    report = loratool.verify(out, FIXTURES / "base", FIXTURES / "adapter")
    assert report.verdict == "no"
    assert shard.name in " ".join(report.summary)
    said = said_by(out, columns=200)
    assert said.exit_code == 3
    assert str(shard) in said.stdout
    assert ".." not in said.stdout


def test_sentence_that_begins_with_a_path_keeps_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The path of a truncated file is printed as it is, without a capital put into it."""
    loratool.merge(FIXTURES / "base", FIXTURES / "adapter", tmp_path / "out")
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    monkeypatch.chdir(tmp_path)
    said = said_by(Path("out"), columns=200)
    assert f"out/{shard.name}" in said.stdout
    assert "Out/" not in said.stdout


def test_missing_shard_is_no_yes(tmp_path: Path) -> None:
    """A shard that the index names and that is not there is never a yes."""
    out = tmp_path / "out"
    loratool.merge(FIXTURES / "base", FIXTURES / "adapter", out)
    shard = sorted(out.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(LoraToolError) as caught:
        loratool.verify(out, FIXTURES / "base", FIXTURES / "adapter")
    assert_clear(caught.value, shard.name)
    assert caught.value.exit_code == 1


# --------------------------------------------------- what adapters hold beside factors, when lost


def with_saved(folder: Path, saved: State, base: State) -> tuple[Path, Path]:
    """A base and an adapter that also holds whole tensors."""
    adapter = small_lora(folder / "a", len(base[ADAPTED]))
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors |= {f"base_model.model.{n}": v for n, v in saved.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["modules_to_save"] = sorted({n.split(".")[-2] for n in saved})
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return write_base(folder / "base", base), adapter


@pytest.mark.parametrize("dtype", DTYPES)
def test_trained_head_that_was_dropped_was_never_merged(dtype: str, tmp_path: Path) -> None:
    """A saved module of which the base's value is still there was never merged."""
    state = {**small_state(16), "lm_head.weight": random_of(torch.float32, 20, 16, seed=8)}
    head = {"lm_head.weight": random_of(torch.float32, 20, 16, seed=9)}
    base, adapter = with_saved(tmp_path, head, state)
    loratool.merge(base, adapter, tmp_path / "out", dtype=dtype)
    report = loratool.verify(tmp_path / "out", base, adapter)
    assert report.verdict == "yes"
    assert codes(report) == {"once": 1, "same": 1}
    right = load(tmp_path / "out")
    dropped = {**right, "lm_head.weight": state["lm_head.weight"].to(DTYPES[dtype])}
    report = loratool.verify(written(tmp_path / "m", dropped, base), base, adapter)
    assert bad(report) == {"lm_head.weight": "not-merged"}
    assert report.summary[0] == "1 of 2 modules was never merged: lm_head"
    neither = {**right, "lm_head.weight": right["lm_head.weight"] * 1.5}
    report = loratool.verify(written(tmp_path / "n", neither, base), base, adapter)
    assert bad(report) == {"lm_head.weight": "other"}


@pytest.fixture
def rows(tmp_path: Path) -> tuple[Path, Path, torch.Tensor]:
    """A base, an adapter that trained three token rows, and these rows."""
    embedding = "model.embed_tokens"
    state = {**small_state(16), f"{embedding}.weight": random_of(torch.bfloat16, 20, 16, seed=8)}
    trained = random_of(torch.float32, 3, 16, seed=9)
    adapter = small_lora(tmp_path / "a", 16)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[f"base_model.model.{embedding}.token_adapter.trainable_tokens_delta"] = trained
    save_file(tensors, adapter / "adapter_model.safetensors")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["trainable_token_indices"] = {"embed_tokens": [2, 3, 11]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return write_base(tmp_path / "base", state), adapter, trained


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "base"])
def test_trained_token_rows_pass(
    rows: tuple[Path, Path, torch.Tensor], dtype: str, tmp_path: Path
) -> None:
    """An embedding with its trained rows put in is as the adapter holds it."""
    base, adapter, _ = rows
    loratool.merge(base, adapter, tmp_path / "out", dtype=dtype)
    report = loratool.verify(tmp_path / "out", base, adapter)
    assert (report.verdict, codes(report)) == ("yes", {"once": 1, "same": 1})


def test_trained_token_rows_that_were_dropped_were_never_merged(
    rows: tuple[Path, Path, torch.Tensor], tmp_path: Path
) -> None:
    """An embedding that is still the base's, or has an untrained row changed, is found."""
    base, adapter, _ = rows
    loratool.merge(base, adapter, tmp_path / "out", dtype="base")
    right, name = load(tmp_path / "out"), "model.embed_tokens.weight"
    dropped = written(tmp_path / "m", {**right, name: load(base)[name]}, base)
    report = loratool.verify(dropped, base, adapter)
    assert bad(report) == {name: "not-merged"}
    off = written(tmp_path / "n", {**right, name: flipped(right[name], 0, 5)}, base)
    report = loratool.verify(off, base, adapter)
    assert list(bad(report)) == [name]


def test_trained_token_rows_rounded_on_the_way_pass(
    rows: tuple[Path, Path, torch.Tensor], tmp_path: Path
) -> None:
    """Rows that a bfloat16 model rounded before it was stored as float32 pass as rounded twice."""
    base, adapter, trained = rows
    loratool.merge(base, adapter, tmp_path / "out", dtype="float32")
    state, name = load(tmp_path / "out"), "model.embed_tokens.weight"
    state[name][[2, 3, 11]] = trained.bfloat16().float()
    report = loratool.verify(written(tmp_path / "m", state, base), base, adapter)
    assert report.verdict == "yes"
    assert finding(report, name).code in ("rounded-twice", "same-rounded")


# ------------------------------------------------------------------------------------ small deltas


def small_deltas(folder: Path, ratio: float, size: int, dtype: torch.dtype) -> tuple[Path, Path]:
    """A bfloat16-sized problem: Δ has a root mean square of `ratio` units of a typical weight."""
    generator = torch.Generator().manual_seed(5)
    state, factors = {}, {}
    for i in range(4):
        path = f"model.layers.{i}.mlp.up_proj"
        state[f"{path}.weight"] = (torch.randn(size, size, generator=generator) * 0.02).to(dtype)
        b = torch.randn(size, 8, generator=generator) * (ratio * 0.02 * 2**-8 / math.sqrt(8))
        factors[f"base_model.model.{path}.lora_B.weight"] = b.numpy()
        a = torch.randn(8, size, generator=generator)
        factors[f"base_model.model.{path}.lora_A.weight"] = a.numpy()
    adapter = write_adapter(folder / "a", factors, {"r": 8, "lora_alpha": 8})
    return write_base(folder / "base", state), adapter


@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("ratio", [0.1, 0.3, 1.0])
def test_deltas_that_bfloat16_nearly_eats_are_still_told(
    ratio: float, base_dtype: str, tmp_path: Path
) -> None:
    """With deltas of a tenth of a unit, merged, not merged and merged twice are three findings."""
    base, adapter = small_deltas(tmp_path, ratio, 128, DTYPES[base_dtype])
    expected = {"1": "once", "2": "weight", "-1": "weight", "1.5": "weight"}
    for weight, code in expected.items():
        out = tmp_path / f"out{weight}"
        loratool.merge(base, adapter, out, weights=[float(weight)], dtype="bfloat16")
        report = loratool.verify(out, base, adapter)
        assert codes(report) == {code: 4}, weight
        assert report.verdict == ("yes" if weight == "1" else "no")
    cast = {n: v.bfloat16() for n, v in load(base).items()}
    report = loratool.verify(written(tmp_path / "cast", cast, base), base, adapter)
    assert codes(report) == {"not-merged": 4}
    assert report.summary == ["all 4 modules were never merged"]


@pytest.mark.parametrize("size", [8, 16, 32])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 1.0])
def test_small_modules_with_small_deltas_are_still_told(
    ratio: float, size: int, tmp_path: Path
) -> None:
    """What was never merged is no merge, also where few values could tell."""
    base, adapter = small_deltas(tmp_path, ratio, size, torch.float32)
    loratool.merge(base, adapter, tmp_path / "out", dtype="bfloat16")
    state = {n: v.bfloat16() for n, v in load(base).items()}
    right = load(tmp_path / "out")
    unlike = {n for n in state if not torch.equal(state[n], right[n])}
    report = loratool.verify(written(tmp_path / "m", state, base), base, adapter)
    assert bad(report) == dict.fromkeys(unlike, "not-merged")


def test_delta_that_bfloat16_eats_whole_is_merged_and_lost(tmp_path: Path) -> None:
    """Where rounding leaves nothing of a delta, the base is the right result, and all is lost."""
    state = {**small_state(32), ADAPTED: torch.ones(32, 32)}
    base = write_base(tmp_path / "base", state)
    rng = np.random.default_rng(5)
    adapter = lora_on(
        tmp_path / "a", rng.uniform(-1, 1, (32, 1)) * 1e-3, rng.uniform(-1, 1, (1, 32))
    )
    loratool.merge(base, adapter, tmp_path / "out", dtype="bfloat16")
    assert torch.equal(load(tmp_path / "out")[ADAPTED], torch.ones(32, 32).bfloat16())
    report = loratool.verify(tmp_path / "out", base, adapter)
    assert (report.verdict, codes(report)) == ("yes", {"once": 1})
    assert report.lost == pytest.approx(1.0)
    assert report.findings[0].applied == pytest.approx(0.0)
    json.dumps(report.to_dict(), allow_nan=False)


def test_tiny_delta_in_float32_is_told_from_none(tmp_path: Path) -> None:
    """In float32 a delta of a few units in the last place is there or is not there."""
    base = write_base(tmp_path / "base", small_state(64))
    rng = np.random.default_rng(5)
    b, a = rng.standard_normal((64, 2)) * 5e-7, rng.standard_normal((2, 64))
    adapter = lora_on(tmp_path / "a", b, a)
    loratool.merge(base, adapter, tmp_path / "out", dtype="float32")
    assert loratool.verify(tmp_path / "out", base, adapter).verdict == "yes"
    report = loratool.verify(base, base, adapter)
    assert bad(report) == {ADAPTED: "not-merged"}


# ----------------------------------------------------------------------------- numbers of a report


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_numbers_are_those_of_a_float64_oracle(dtype: str, tmp_path: Path) -> None:
    """Equal share, histogram, largest deviation, weight, lost: all as computed by hand."""
    base = write_base(tmp_path / "base", small_state(48))
    rng = np.random.default_rng(5)
    b, a = (rng.standard_normal(s).astype(np.float32) for s in ((48, 2), (2, 48)))
    adapter = lora_on(tmp_path / "a", b * np.float32(0.1), a)
    b = load_file(adapter / "adapter_model.safetensors")[
        f"base_model.model.{ADAPTED.removesuffix('weight')}lora_B.weight"
    ].numpy()
    w = load(base)[ADAPTED]
    delta = b.astype(np.float64) @ a.astype(np.float64)
    x = w.double().numpy() + delta
    once = torch.from_numpy(x).float().to(DTYPES[dtype])
    got = once.clone()
    bits = got.view(-1).view(torch.int16)
    # 5 values 1 unit off, 4 by 2, 3 by 3, 2 by 10, 1 by 100, 1 by 300: away from zero.
    steps = [1] * 5 + [2] * 4 + [3] * 3 + [10] * 2 + [100, 300]
    for i, step in enumerate(steps):
        bits[11 * i + 2] += step
    loratool.merge(base, adapter, tmp_path / "out", dtype=dtype)
    assert torch.equal(load(tmp_path / "out")[ADAPTED], once), "the oracle itself must be right"
    model = written(tmp_path / "m", {**load(tmp_path / "out"), ADAPTED: got}, base)
    one = finding(loratool.verify(model, base, adapter), ADAPTED)
    assert one.elements == 48 * 48
    assert one.equal == 1 - len(steps) / 48**2
    assert one.ulps == {
        "0": 48**2 - 16, "1": 5, "2": 4, "4": 3, "16": 2, "256": 1, "more": 1,
    }  # fmt: skip
    assert one.largest_ulp == 300
    m = got.double().numpy()
    assert one.largest == pytest.approx(np.abs(m - once.double().numpy()).max(), rel=1e-6)
    change = m - w.double().numpy()
    assert one.applied == pytest.approx((change * delta).sum() / (delta**2).sum(), rel=1e-5)
    lost = np.linalg.norm(m - x) / np.linalg.norm(delta)
    assert one.lost == pytest.approx(lost, rel=1e-4)
    assert not one.sound


def test_unexplained_is_the_share_across_the_delta(tmp_path: Path) -> None:
    """A change half along the delta and half across it is unexplained by the half across."""
    base = write_base(tmp_path / "base", {**small_state(64), ADAPTED: torch.zeros(64, 64)})
    b, a = np.zeros((64, 1)), np.zeros((1, 64))
    b[:32], a[:] = 1, 1
    adapter = lora_on(tmp_path / "a", b, a)
    state = load(base)
    state[ADAPTED][:32] = 1
    state[ADAPTED][32:] = 1
    one = finding(loratool.verify(written(tmp_path / "m", state, base), base, adapter), ADAPTED)
    assert one.code == "other"
    assert one.applied == pytest.approx(1)
    assert one.unexplained == pytest.approx(math.sqrt(0.5))
    assert one.off == 32 * 64


def test_totals_are_those_of_the_findings(tmp_path: Path) -> None:
    """The report's equal share and loss are over all adapted weights, and over merged ones."""
    state = merged(torch.bfloat16, added=only(lambda n: n == K, 0.0))
    report = check(tmp_path / "m", state)
    adapted = [f for f in report.findings if f.adapted]
    equal = sum(f.equal * f.elements for f in adapted) / sum(f.elements for f in adapted)
    assert report.equal == pytest.approx(equal)
    lost = delta = 0.0
    for name, d in deltas().items():
        if name != K:
            x = original()[name].double() + d.double()
            lost += float((state[name].double() - x).square().sum())
            delta += float(d.double().square().sum())
    assert report.lost == pytest.approx(math.sqrt(lost / delta), rel=1e-4)
    assert report.bytes_read == sum(v.numel() * 2 for v in state.values())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_merge_reports_the_loss_that_verify_measures(dtype: str, tmp_path: Path) -> None:
    """What `merge` says rounding took, from a sample, is what `verify` finds on all values."""
    done = loratool.merge(FIXTURES / "base", FIXTURES / "adapter", tmp_path / "out", dtype=dtype)
    report = loratool.verify(tmp_path / "out", FIXTURES / "base", FIXTURES / "adapter")
    assert report.lost is not None
    assert 0 < report.lost < 0.1
    assert done.lost == pytest.approx(report.lost, rel=0.1)


def test_threads_change_nothing(tmp_path: Path) -> None:
    """The whole report, to the last digit, is the same with one thread and with many."""
    state = merged(torch.bfloat16, added=only(lambda n: "q_proj" in n, 0.7))
    state[UNTOUCHED] = flipped(state[UNTOUCHED], 0, 5)
    model = written(tmp_path / "m", state)
    documents = []
    for threads in (1, 2, 7):
        report = loratool.verify(
            model, FIXTURES / "base", [FIXTURES / "adapter"], threads=threads
        ).to_dict()
        del report["seconds"]
        documents.append(json.dumps(report))
    assert len(set(documents)) == 1


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    """Progress grows to the bytes of the merged model and names its tensors."""
    calls: list[tuple[int, int, str]] = []
    report = check(tmp_path / "m", merged(), progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert {call[1] for call in calls} == {report.bytes_read}
    assert done[-1] == report.bytes_read
    assert {call[2] for call in calls} >= set(original())


# ------------------------------------------------------------------------------------ command line


def said_by(
    model: Path, *options: str, columns: int = 80, base: Path = FIXTURES / "base"
) -> Result:
    """What the command prints, run in this process, which is faster; errors are raised."""
    arguments = ["verify", str(model), "--base", str(base), str(FIXTURES / "adapter"), *options]
    with mock.patch.object(common.out, "_width", columns):
        return CliRunner().invoke(cli, arguments)


def test_exit_codes_say_yes_and_no(tmp_path: Path) -> None:
    """Exit 0 for yes and 3 for no; each time the last line says it."""
    yes = written(tmp_path / "yes", merged())
    no = written(tmp_path / "no", merged(added=only(lambda n: n == K, 0.0)))
    adapter = FIXTURES / "adapter"
    said = said_by(yes)
    assert (said.exit_code, said.stderr) == (0, "")
    assert said.stdout.splitlines()[-1] == "yes: the merged model is base + adapters"
    said = run_cli("verify", str(no), "--base", str(FIXTURES / "base"), str(adapter))
    assert said.exit_code == 3
    assert said.stdout.splitlines()[-3:] == [
        "1 of 28 modules was never merged: model.layers.1.self_attn.k_proj.",
        "27 of 28 modules are the once-rounded result.",
        "no: the merged model is not base + adapters",
    ]


@pytest.mark.parametrize("fault", [False, True])
def test_json_is_strict(fault: bool, tmp_path: Path) -> None:
    """`--json` prints one strict JSON document, with every finding, also for NaN in the model."""
    state = merged()
    if fault:
        state[Q] = torch.full_like(state[Q], math.nan)
        state[UNTOUCHED] = torch.full_like(state[UNTOUCHED], math.inf)
    model = written(tmp_path / "m", state)
    said = said_by(model, "--json")
    assert said.exit_code == (3 if fault else 0)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    document = json.loads(said.stdout, parse_constant=refuse)
    assert document["schema_version"] == 1
    assert document["verdict"] == ("no" if fault else "yes")
    assert len(document["findings"]) == 28 + fault
    assert {"tensor", "code", "ulps", "applied", "unexplained", "lost"} <= set(
        document["findings"][0]
    )


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_output_fits_the_terminal(columns: int, tmp_path: Path) -> None:
    """No line of facts or table is wider than the terminal; sentences wrap by themselves."""
    state = merged(added=only(lambda n: "q_proj" in n and ".0." not in n, 0.0))
    state[Q] = flipped(state[Q], 14, 3)
    model = written(tmp_path / "m", state)
    extra = ["--full"] if columns == 80 else []
    said = said_by(model, *extra, columns=columns)
    assert said.exit_code == 3
    for line in said.stdout.split("no: ")[0].splitlines():
        sentence = line.endswith(".") and line[0].isdigit()
        assert len(line) <= columns or sentence, line
    assert "self_attn.q_proj" in said.stdout


def test_one_module_alone_is_said_in_good_english(tmp_path: Path) -> None:
    """A model with one adapted module needs no counting: "1 of 1 modules" is never said."""
    base = write_base(tmp_path / "base", small_state(32))
    adapter = small_lora(tmp_path / "a", 32)
    loratool.merge(base, adapter, tmp_path / "out")
    for model in (tmp_path / "out", base):
        report = loratool.verify(model, base, adapter)
        assert len(report.summary) == 1
        assert "1 modules" not in report.summary[0]
        assert " are " not in report.summary[0]
        assert " were " not in report.summary[0]


# ------------------------------------------------------------------------------ no telling at all


def telling_fails(*arguments: Any, parts: Sequence[str] = (), **options: Any) -> LoraToolError:
    with pytest.raises(LoraToolError) as caught:
        loratool.verify(*arguments, **options)
    assert_clear(caught.value, *parts)
    assert caught.value.exit_code in (1, 2)
    return caught.value


@pytest.mark.parametrize("missing", ["merged", "base", "adapter"])
def test_missing_paths_are_named(missing: str, tmp_path: Path) -> None:
    """A path that is not there gives one error that names it, whichever it is."""
    paths = {"merged": FIXTURES / "tuned", "base": FIXTURES / "base"}
    paths["adapter"] = FIXTURES / "adapter"
    paths[missing] = tmp_path / "nowhere"
    telling_fails(*paths.values(), parts=[str(tmp_path / "nowhere")])


SWAPPED = {
    "adapter-as-model": ("adapter", "base", "base"),
    "adapter-as-base": ("tuned", "adapter", "base"),
    "model-as-adapter": ("base", "base", "tuned"),
    "adapter-as-both": ("adapter", "adapter", "adapter"),
    "adapter-for-merged": ("adapter", "base", "adapter"),
}


@pytest.mark.parametrize("name", SWAPPED)
def test_arguments_in_each_others_place_are_refused(name: str) -> None:
    """Arguments in the wrong order are an error with the path that is at the wrong place."""
    paths = [FIXTURES / part for part in SWAPPED[name]]
    telling_fails(*paths)


def test_errors_on_the_command_line_are_one_message_each() -> None:
    """Arguments in the wrong order exit with 1 and say why on stderr, nothing on stdout."""
    adapter = str(FIXTURES / "adapter")
    said = run_cli("verify", adapter, "--base", str(FIXTURES / "base"), adapter)
    assert said.exit_code == 1
    assert said.stderr.startswith("error: ")
    assert said.stderr.count("error: ") == 1
    assert "Traceback" not in said.stderr
    assert said.stdout == ""


def test_base_and_merged_exchanged_is_no_merge(tmp_path: Path) -> None:
    """With MERGED and BASE exchanged, what is seen is the adapter taken away."""
    model = written(tmp_path / "m", merged(torch.float32))
    report = loratool.verify(FIXTURES / "base", model, FIXTURES / "adapter")
    assert report.verdict == "no"
    assert bad(report) == all_of("weight")
    assert report.summary == ["all 28 modules were merged with -1.00 times the weight"]


def test_adapter_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    """An adapter for another model leaves nothing to tell."""
    adapter = lora_on(tmp_path / "a", np.ones((5, 1)), np.ones((1, 7)))
    model = written(tmp_path / "m", merged())
    telling_fails(model, FIXTURES / "base", adapter)


def test_quantised_models_are_refused(tmp_path: Path) -> None:
    """A quantised MERGED is said to be that, not compared."""
    model = written(tmp_path / "m", merged())
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (model / "config.json").write_text(json.dumps(config))
    error = telling_fails(model, FIXTURES / "base", FIXTURES / "adapter", parts=[str(model)])
    assert "quantised" in error.message


def test_wrong_weights_and_threads_are_usage_errors() -> None:
    """Weights that do not go with the adapters, and no threads, are refused before reading."""
    paths = (FIXTURES / "tuned", FIXTURES / "base", FIXTURES / "adapter")
    assert telling_fails(*paths, weights=[1.0, 2.0]).exit_code == 2
    assert telling_fails(*paths, weights=[math.nan]).exit_code == 2
    assert telling_fails(*paths, threads=0).exit_code == 2
    assert telling_fails(FIXTURES / "tuned", FIXTURES / "base", []).exit_code == 2


def test_adapter_with_nan_is_an_error(tmp_path: Path) -> None:
    """An adapter that holds NaN leaves nothing to tell."""
    base = write_base(tmp_path / "base", small_state(8))
    b = np.ones((8, 1))
    b[3] = np.nan
    adapter = lora_on(tmp_path / "a", b, np.ones((1, 8)))
    telling_fails(base, base, adapter, parts=["NaN"])


# ---------------------------------------------------------------------------------- merge --verify


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "base"])
def test_merge_verifies_what_it_wrote(dtype: str, reversible: bool, tmp_path: Path) -> None:
    """`merge(verify=True)` passes good output on, and gives the same bytes as without."""
    base, adapter = FIXTURES / "base", FIXTURES / "adapter"
    options: dict[str, Any] = {"dtype": dtype, "reversible": reversible}
    report = loratool.merge(base, adapter, tmp_path / "a", verify=True, **options)
    assert report.verified
    plain = loratool.merge(base, adapter, tmp_path / "b", **options)
    assert not plain.verified
    one, other = load(tmp_path / "a"), load(tmp_path / "b")
    assert all(torch.equal(one[n], other[n]) for n in one.keys() | other.keys())


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("bit", [0, 6])
def test_merge_leaves_nothing_if_a_byte_was_written_wrong(
    bit: int, reversible: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A bit that turns over on its way to the disk fails the merge, and nothing appears."""
    write, calls = ShardWriter.write, [0]

    def wrong(self: ShardWriter, offset: int, data: memoryview) -> None:
        calls[0] += 1
        if calls[0] == 20:
            broken = np.array(np.frombuffer(data, np.uint8))
            broken[len(broken) // 4 * 2] ^= 1 << bit
            data = broken.data
        write(self, offset, data)

    base, adapter = FIXTURES / "base", FIXTURES / "adapter"
    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "write", wrong)
        with pytest.raises(VerifyError) as caught:
            loratool.merge(base, adapter, tmp_path / "out", verify=True, reversible=reversible)
        assert calls[0] >= 20
    assert_clear(caught.value, "1 values")
    assert caught.value.exit_code == 3
    assert_clean(tmp_path / "out")


def test_merge_without_verify_does_not_notice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same bit passes without --verify, and `verify` finds it afterwards."""
    write, calls = ShardWriter.write, [0]

    def wrong(self: ShardWriter, offset: int, data: memoryview) -> None:
        calls[0] += 1
        if offset == 0:
            broken = np.array(np.frombuffer(data, np.uint8))
            broken[1] ^= 0x40
            data = broken.data
        write(self, offset, data)

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "write", wrong)
        loratool.merge(FIXTURES / "base", FIXTURES / "adapter", tmp_path / "out")
    report = loratool.verify(tmp_path / "out", FIXTURES / "base", FIXTURES / "adapter")
    assert report.verdict == "no"
    assert len(bad(report)) == 3  # the first tensor of each shard


def test_command_line_verifies_a_merge(tmp_path: Path) -> None:
    """`loratool merge --verify` exits with 0 and says that the output was verified."""
    base, adapter = FIXTURES / "base", FIXTURES / "adapter"
    said = run_cli("merge", str(base), str(adapter), "-o", str(tmp_path / "out"), "--verify")
    assert said.exit_code == 0
    assert "verified" in said.stdout


# ------------------------------------------------------------------------------------- norms alone


def test_norm_of_a_small_base_is_untouched(tmp_path: Path) -> None:
    """Tensors that no adapter touches are counted, not listed, while they are as in the base."""
    base = write_base(tmp_path / "base", small_state(16))
    adapter = small_lora(tmp_path / "a", 16)
    loratool.merge(base, adapter, tmp_path / "out")
    report = loratool.verify(tmp_path / "out", base, adapter)
    assert [f.tensor for f in report.findings] == [ADAPTED]
    assert (report.untouched, report.tensors) == (2, 3)
    state = {**load(tmp_path / "out"), NORM: load(tmp_path / "out")[NORM] + 1}
    report = loratool.verify(written(tmp_path / "m", state, base), base, adapter)
    assert bad(report) == {NORM: "changed"}
