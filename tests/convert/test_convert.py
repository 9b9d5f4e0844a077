"""What convert promises of any target: exact is exact, all or nothing, each file proves itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.adapters import PREFIX, Q, lora, pair, write_adapter
from helpers.dialects import CASES
from helpers.places import FIXTURES
from safetensors.numpy import load_file, save_file

import loratool
from loratool import Told
from loratool.adapters.dialects.writing import Draft
from loratool.converting import readback
from loratool.converting.files import write_weights
from loratool.converting.readback import relative_difference
from loratool.errors import (
    AdapterError,
    OutputError,
    UsageError,
    ValueRangeError,
    VerifyError,
)

convert_verb = import_module("loratool.verbs.convert")  # the package has a function so called
ADAPTER = FIXTURES / "adapter"


def test_what_is_not_asked_for_stays_to_the_byte(tmp_path: Path) -> None:
    """Metadata alone is a conversion: new entries; bytes and config stay as they were."""
    report = loratool.convert(ADAPTER, tmp_path / "out", set_metadata={"licence": "mit"})
    assert (report.error, report.counts) == (0.0, {"exact": 28})
    old, new = load_file(ADAPTER / report.file), load_file(tmp_path / "out" / report.file)
    assert old.keys() == new.keys()
    assert all(old[k].tobytes() == new[k].tobytes() for k in old)
    config = "adapter_config.json"
    assert (tmp_path / "out" / config).read_bytes() == (ADAPTER / config).read_bytes()
    assert loratool.inspect(tmp_path / "out").metadata["licence"] == "mit"


def test_mlx_becomes_peft_and_merges_to_the_same(tmp_path: Path) -> None:
    """The scale of MLX is alpha/r of the new config, and the merged models are equal."""
    case = CASES["mlx-lora"]
    report = loratool.convert(case.adapter, tmp_path / "peft", to="peft")
    assert set(report.counts) == {"exact"}
    assert report.error == 0.0
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    found = loratool.inspect(tmp_path / "peft")
    assert config["lora_alpha"] / config["r"] == found.modules[0].scale
    assert found.format == "peft"
    for adapter, out in ((case.adapter, "a"), (tmp_path / "peft", "b")):
        loratool.merge(case.base, adapter, tmp_path / out, dtype="float32")
    one, other = (load_file(tmp_path / out / "model.safetensors") for out in "ab")
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_dora_keeps_its_magnitudes(tmp_path: Path) -> None:
    case = CASES["mlx-dora"]
    report = loratool.convert(case.adapter, tmp_path / "peft", to="peft")
    assert report.error == 0.0
    assert all(m.dora for m in loratool.inspect(tmp_path / "peft").modules)


def test_the_record_says_where_it_is_from(tmp_path: Path) -> None:
    """Provenance has the old metadata, config and hashes; nothing of it is a path or a date."""
    case = CASES["mlx-lora"]
    loratool.convert(case.adapter, tmp_path / "peft", to="peft")
    record = json.loads((tmp_path / "peft/loratool.json").read_text())
    (entry,) = record["adapters"]
    assert record["command"] == "convert"
    assert entry["format"] == "mlx"
    assert entry["config"]["lora_parameters"]["scale"] == entry["modules"][0]["scale"]
    assert str(tmp_path) not in (tmp_path / "peft/loratool.json").read_text()


def test_same_inputs_same_bytes(tmp_path: Path) -> None:
    case = CASES["mlx-lora"]
    for threads, out in ((1, "a"), (4, "b")):
        loratool.convert(case.adapter, tmp_path / out, to="peft", threads=threads)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_another_dtype_is_rounded_and_measured(tmp_path: Path) -> None:
    """bfloat16 has 8 bits: the error is of that size, and said for each module."""
    report = loratool.convert(ADAPTER, tmp_path / "out", to="peft", dtype="bfloat16")
    assert report.counts == {"rounded": 28}
    assert report.dtypes == ["bfloat16"]
    assert report.error is not None
    assert 2.0**-12 < report.error < 2.0**-7
    assert all(fate.error for fate in report.fates)


def test_a_value_too_large_for_the_dtype_is_refused(tmp_path: Path) -> None:
    source = lora(tmp_path / "in", extra=None)
    tensors = load_file(source / "adapter_model.safetensors")
    tensors[f"{PREFIX}{Q}.lora_B.weight"][0, 0] = 1e6
    write_adapter(source, tensors, {"target_modules": ["q_proj"]})
    with pytest.raises(ValueRangeError, match=r"q_proj.* too large for float16"):
        loratool.convert(source, tmp_path / "out", to="peft", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_ranks_above_the_limit_are_refused_or_cut(tmp_path: Path) -> None:
    """--max-rank refuses; with --allow-lossy the best of that rank is written, and its error is
    that of the singular values left out."""
    with pytest.raises(AdapterError, match="rank 8; --allow-lossy cuts it to 4"):
        loratool.convert(ADAPTER, tmp_path / "out", to="peft", max_rank=4)
    assert not (tmp_path / "out").exists()
    report = loratool.convert(ADAPTER, tmp_path / "out", to="peft", max_rank=4, allow_lossy=True)
    spectra = {m.path: m.singular_values for m in loratool.inspect(ADAPTER, spectrum=True).modules}
    for fate in report.fates:
        values = np.array(spectra[fate.what])
        lost = np.sqrt((values[4:] ** 2).sum() / (values**2).sum())
        assert (fate.outcome, fate.new_rank) == ("cut", 4)
        assert fate.error == pytest.approx(lost, rel=1e-4)
    smaller = loratool.inspect(tmp_path / "out", spectrum=True).modules
    for module in smaller:
        assert module.singular_values == pytest.approx(spectra[module.path][:4], rel=1e-5)


def test_unlike_scales_get_an_alpha_each(tmp_path: Path) -> None:
    """Every module keeps factors and scale to the last bit, whatever alphas that takes."""
    k = Q.replace("q_proj", "k_proj")
    tensors = pair(Q, 12, 10, rank=4) | pair(k, 12, 10, rank=3, seed=1)
    config = {
        "r": 4, "lora_alpha": 7, "rank_pattern": {"k_proj": 3}, "alpha_pattern": {"k_proj": 1.1},
        "use_rslora": True, "target_modules": ["q_proj", "k_proj"],
    }  # fmt: skip
    source = write_adapter(tmp_path / "in", tensors, config)
    # As an adapter of another dialect would be: nothing of the config is taken over.
    report = loratool.convert(source, tmp_path / "out", to="peft", max_rank=3, allow_lossy=True)
    assert {f.what: f.outcome for f in report.fates} == {Q: "cut", k: "exact"}
    old = {m.path: m.scale for m in loratool.inspect(source).modules}
    new = {m.path: m for m in loratool.inspect(tmp_path / "out").modules}
    assert new[k].scale == old[k]
    assert new[Q].scale == old[Q]


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    report = loratool.convert(ADAPTER, tmp_path / "out", to="peft", dry_run=True)
    assert report.error is None
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "Nothing to convert to"),
        ({"to": "pfet"}, "peft"),
        ({"to": "peft", "dtype": "int8"}, "int8"),
        ({"to": "peft", "max_rank": 0}, "max-rank"),
        ({"to": "peft", "allow_lossy": True}, "--max-rank"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(
    options: dict[str, object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        loratool.convert(tmp_path / "absent", tmp_path / "out", **options)  # type: ignore[arg-type]
    assert words in f"{caught.value.message} {caught.value.hint}"


def test_an_output_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    out = lora(tmp_path / "out")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(OutputError, match="exists"):
        loratool.convert(ADAPTER, out, to="peft", dtype="float16")
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}


def test_what_cannot_be_used_is_not_converted(tmp_path: Path) -> None:
    """An adapter without alpha has no scale to write; with --alpha it has."""
    source = write_adapter(tmp_path / "in", pair(Q, 12, 10), None)
    with pytest.raises(AdapterError, match="--alpha"):
        loratool.convert(source, tmp_path / "out", to="peft")
    told = Told(alpha=6)
    loratool.convert(source, tmp_path / "out", to="peft", told=told, max_rank=2, allow_lossy=True)
    assert loratool.inspect(tmp_path / "out").modules[0].scale == 1.5


def test_a_file_that_is_not_the_adapter_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If what is read back differs beyond rounding, there is an error and no output."""
    real = readback._difference
    monkeypatch.setattr(readback, "_difference", lambda *a: real(*a) + 0.1)
    with pytest.raises(VerifyError, match=r"0\.1 off"):
        loratool.convert(CASES["mlx-lora"].adapter, tmp_path / "out", to="peft")
    assert not (tmp_path / "out").exists()


def test_the_difference_of_products_is_right() -> None:
    """Against dense products in float64; equal products in other factors differ by rounding only,
    and equal factors by nothing at all."""
    rng = np.random.default_rng(3)
    b, a = rng.standard_normal((9, 3), np.float32), rng.standard_normal((3, 7), np.float32)
    near = b + np.float32(1e-5) * rng.standard_normal((9, 3), np.float32)
    wide = [matrix.astype(np.float64) for matrix in (b, a, near)]
    exact = np.linalg.norm((wide[0] - wide[2]) @ wide[1]) / np.linalg.norm(wide[0] @ wide[1])
    assert relative_difference((b, a), 2.0, (near / 2, a), 4.0) == pytest.approx(exact, rel=1e-5)
    padded = np.pad(b, [(0, 0), (0, 2)]), np.pad(a, [(0, 2), (0, 0)])
    assert relative_difference((b, a), 0.3, padded, 0.3) == 0.0


@pytest.mark.parametrize("case", ["peft-loha", "peft-lokr", "peft-adalora"])
def test_what_is_a_product_after_all_becomes_lora(case: str, tmp_path: Path) -> None:
    """LoHa and LoKr have a larger rank as LoRA, and the merged model is the same to rounding."""
    found = CASES[case]
    report = loratool.convert(found.adapter, tmp_path / "lora", to="peft")
    assert report.counts.keys() == {"expanded"}
    assert {m.algorithm for m in loratool.inspect(tmp_path / "lora").modules} == {"LoRA"}
    loratool.merge(found.base, tmp_path / "lora", tmp_path / "out", dtype="float32")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, right in found.merged().items():
        assert np.allclose(merged[name], right, rtol=2e-6, atol=2e-6)


def test_what_is_no_sum_is_refused(tmp_path: Path) -> None:
    """OFT has no factors: merge and extract are named as the way."""
    with pytest.raises(AdapterError, match="OFT is no sum; merge it, and extract"):
        loratool.convert(CASES["peft-oft"].adapter, tmp_path / "out", to="peft")
    assert not any(tmp_path.iterdir())


def test_stacks_in_another_dtype_are_measured(tmp_path: Path) -> None:
    """The error of a stack is that of all its experts' products, against float64."""
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((12, 8), np.float32), rng.standard_normal((6, 12), np.float32)
    path = f"{PREFIX}model.layers.0.mlp.experts"
    tensors = {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    config = {"r": 3, "target_modules": [], "target_parameters": ["experts.down_proj"]}
    source = write_adapter(tmp_path / "in", tensors, config)
    report = loratool.convert(source, tmp_path / "out", to="peft", dtype="float16")
    near = load_file(tmp_path / "out" / "adapter_model.safetensors")
    new_a, new_b = (near[key].astype(np.float64) for key in tensors)
    pairs = [(b[:, e::4] @ a[3 * e : 3 * e + 3], new_b[:, e::4] @ new_a[3 * e : 3 * e + 3])
             for e in range(4)]  # fmt: skip
    off = sum(np.linalg.norm(new - old.astype(np.float64)) ** 2 for old, new in pairs)
    size = sum(np.linalg.norm(old.astype(np.float64)) ** 2 for old, _ in pairs)
    assert report.counts == {"rounded": 1}
    assert report.error == pytest.approx(np.sqrt(off / size), rel=2e-2)


@pytest.mark.parametrize("options", [{"dry_run": True}, {}, {"dtype": "bfloat16"}])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_refused(
    value: float, options: dict[str, Any], tmp_path: Path
) -> None:
    """In a dry run, in a copy and in another dtype alike; nothing is left."""
    source = lora(tmp_path / "in")
    tensors = load_file(source / "adapter_model.safetensors")
    tensors[f"{PREFIX}{Q}.lora_B.weight"][3, 1] = value
    write_adapter(source, tensors, {"target_modules": ["q_proj"]})
    with pytest.raises(ValueRangeError, match="NaN or infinity"):
        loratool.convert(source, tmp_path / "out", set_metadata={"a": "b"}, **options)
    assert not (tmp_path / "out").exists()


def _without(tensors: dict[str, np.ndarray]) -> None:
    for side in "AB":
        del tensors[f"{PREFIX}{LAST}.lora_{side}.weight"]


def _with_more(tensors: dict[str, np.ndarray]) -> None:
    for side in "AB":
        key = f"{PREFIX}{LAST}.lora_{side}.weight"
        tensors[key.replace("layers.1", "layers.0")] = tensors[key]


def _with_a_bit_turned(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{PREFIX}{LAST}.lora_B.weight"].view(np.uint32)[2, 1] ^= 1


LAST = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(_without, "is not there"), (_with_more, "was not in the adapter")],
)
def test_a_file_that_lacks_or_has_more_is_not_left(
    spoil: Callable[[dict[str, np.ndarray]], None],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is written is read again: all modules, and no others."""
    _spoiled(monkeypatch, spoil)
    with pytest.raises(VerifyError, match=words):
        loratool.convert(CASES["mlx-lora"].adapter, tmp_path / "out", to="peft")
    assert not (tmp_path / "out").exists()


def test_a_copy_with_one_bit_turned_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy has the bytes of the adapter, all of them."""
    loratool.convert(CASES["mlx-lora"].adapter, tmp_path / "in", to="peft")
    _spoiled(monkeypatch, _with_a_bit_turned)
    with pytest.raises(VerifyError, match="q_proj"):
        loratool.convert(tmp_path / "in", tmp_path / "out", set_metadata={"a": "b"})
    assert not (tmp_path / "out").exists()


def _spoiled(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[dict[str, np.ndarray]], None]
) -> None:
    """Let the file that a conversion writes be another one."""

    def write(draft: Draft, folder: Path, *others: Any) -> None:
        write_weights(draft, folder, *others)
        tensors = {key: np.array(value) for key, value in load_file(folder / draft.weights).items()}
        spoil(tensors)
        save_file(tensors, folder / draft.weights)

    monkeypatch.setattr(convert_verb, "write_weights", write)
