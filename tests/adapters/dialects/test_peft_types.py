"""PEFT's types beside LoRA: what they make of weights, against PEFT's own merge in float64."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.dialects import CASES, DialectCase, cases
from safetensors.numpy import load_file, save_file

import loratool
from loratool import Told
from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.peft.types import METHODS
from loratool.adapters.reading import read_adapter
from loratool.errors import AdapterError, LoraToolError, ValueRangeError
from loratool.models.checkpoint import open_checkpoint

Tensors = dict[str, np.ndarray]
#: What PEFT makes of a seed and of the order of a class's modules, or of singular vectors.
UNTOLD = ("unilora", "adamss")
TYPED = [
    case
    for case in cases("peft", merges=True)
    if json.loads((case.adapter / "adapter_config.json").read_text())["peft_type"] in METHODS
    and case.name.removeprefix("peft-") not in UNTOLD
]
#: One of each way in which a weight changes.
SAMPLE = (
    "loha", "lokr-full", "oft", "ia3-bias", "ia3-gpt2", "ln-tuning", "vera", "oft-embedding",
    "road-bias", "hira", "miss-bat", "deft", "osf", "randlora", "fourierft-patterns", "supertuning",
)  # fmt: skip
FUNCTIONS = ("oft", "boft", "hra", "ia3", "road-1", "hira", "glora", "deft", "osf", "peanut")


def called(*names: str) -> list[DialectCase]:
    return [CASES[f"peft-{name}"] for name in names]


def name_of(case: DialectCase) -> str:
    return case.name.removeprefix("peft-")


def apart(found: Tensors, right: Tensors, before: Tensors) -> float:
    """The largest error of a tensor as a share of its change, but for float32's rounding."""
    assert found.keys() == right.keys()
    worst = 0.0
    for name, expected in right.items():
        change = np.linalg.norm(expected - before[name])
        rounding = 2.0**-24 * np.linalg.norm(expected)
        error = max(0.0, float(np.linalg.norm(found[name] - expected)) - rounding)
        worst = max(worst, error / change if change else error)
    return worst


def copied(case: DialectCase, folder: Path) -> Path:
    return Path(shutil.copytree(case.adapter, folder / "adapter"))


def rewrite(adapter: Path, **tensors: np.ndarray | None) -> None:
    """Change tensors of an adapter by the ends of their names; None leaves them out."""
    path = adapter / "adapter_model.safetensors"
    held = load_file(path)
    for end, value in tensors.items():
        for name in [name for name in held if name.endswith(end)]:
            if value is None:
                del held[name]
            else:
                held[name] = value
    save_file(held, path)


def configure(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def reasons(adapter: Adapter) -> dict[str, str]:
    return {notice.code: notice.message for notice in adapter.notices if notice.refused}


@pytest.mark.parametrize("case", TYPED, ids=name_of)
def test_what_is_merged_is_what_peft_merges(case: DialectCase, tmp_path: Path) -> None:
    """Every element of the merged model is PEFT's in float64, and `verify` knows the result."""
    loratool.merge(case.base, case.adapter, tmp_path / "out", dtype="float32")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert apart(found, case.merged(), case.base_tensors()) < 1e-6
    report = loratool.verify(tmp_path / "out", case.base, case.adapter)
    assert report.verdict == "yes"
    assert {f.code for f in report.findings if f.adapted} <= {"once", "same"}


@pytest.mark.parametrize("case", called(*SAMPLE), ids=name_of)
def test_verify_tells_pefts_merge_from_the_base(case: DialectCase, tmp_path: Path) -> None:
    """PEFT's float32 model is the merged one, whatever the order of its sums; the base is not."""
    peft = Path(shutil.copytree(case.base, tmp_path / "peft"))
    rounded = {name: value.astype(np.float32) for name, value in case.merged().items()}
    save_file(rounded, peft / "model.safetensors", {"format": "pt"})
    assert loratool.verify(peft, case.base, case.adapter).verdict == "yes"
    assert loratool.verify(case.base, case.base, case.adapter).verdict == "no"


@pytest.mark.parametrize("case", called(*SAMPLE), ids=name_of)
def test_the_base_comes_back_bit_for_bit(case: DialectCase, tmp_path: Path) -> None:
    """An undo file holds what a change that is no sum takes, and predicts the others."""
    loratool.merge(case.base, case.adapter, tmp_path / "out", reversible=True)
    loratool.unmerge(tmp_path / "out", case.adapter, tmp_path / "back")
    before, back = case.base_tensors(), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == back.keys()
    assert all(before[name].tobytes() == back[name].tobytes() for name in before)


@pytest.mark.parametrize("case", called(*FUNCTIONS), ids=name_of)
def test_what_is_no_sum_is_no_part_of_sums(case: DialectCase, tmp_path: Path) -> None:
    """Rotations and rescaling are not combined, resized, compared, weighted or subtracted."""
    adapter, out = case.adapter, tmp_path / "out"
    words = METHODS[read_adapter(adapter).peft_type or ""].words
    for verb in (
        lambda: loratool.combine([adapter, adapter], out),
        lambda: loratool.resize(adapter, out, rank=2),
        lambda: loratool.compare([adapter, adapter]),
        lambda: loratool.merge(case.base, adapter, out, weights=[0.5]),
        lambda: loratool.unmerge(case.base, adapter, out, subtract=True),
    ):
        with pytest.raises(LoraToolError) as caught:
            verb()
        assert words in str(caught.value)
        assert not out.exists()


def test_factors_that_are_products_combine(tmp_path: Path) -> None:
    """A LoHa of low rank is B·A to everybody: its sum with itself is twice as much."""
    case = CASES["peft-loha"]
    loratool.combine([case.adapter, case.adapter], tmp_path / "twice", weights=[1.0, 1.0])
    loratool.merge(case.base, tmp_path / "twice", tmp_path / "out", dtype="float32")
    found = load_file(tmp_path / "out" / "model.safetensors")
    before, added = case.base_tensors(), case.expected()
    for name, change in added.items():
        gained = found[name] - before[name].astype(np.float64)
        assert np.allclose(gained, 2 * change, atol=3e-6 * np.abs(change).max())


def test_a_kronecker_product_says_that_it_is_none_of_small_factors(tmp_path: Path) -> None:
    """Combining a LoKr whose factors would be larger than the weight names it."""
    adapter = CASES["peft-lokr-full"].adapter
    with pytest.raises(AdapterError, match="LoKr is no product of two factors"):
        loratool.combine([adapter, adapter], tmp_path / "out")


@pytest.mark.parametrize("case", cases("peft", merges=False), ids=name_of)
def test_what_has_no_merged_form_is_refused_by_name(case: DialectCase, tmp_path: Path) -> None:
    """Prompts, prefixes and mixtures are named, and nothing is written."""
    with pytest.raises(AdapterError, match="adapter_model"):
        loratool.merge(case.base, case.adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", called(*UNTOLD), ids=name_of)
def test_what_the_machine_decides_is_refused(case: DialectCase, tmp_path: Path) -> None:
    """Where PEFT's result depends on more than file and base, it is said on what."""
    words = r"order|clustering"
    with pytest.raises(AdapterError, match=words):
        loratool.merge(case.base, case.adapter, tmp_path / "out")


OUTSIDE = [
    ("shira", "q_proj.shira_indices", np.full((2, 80), 24, np.int32)),
    ("supertuning", "q_proj.supertuning_indices", np.full(38, -1, np.int32)),
    ("unilora-indices", "q_proj.unilora_indices_A", np.full((2, 16), 24)),
    ("vblora-topk", "q_proj.vblora_logits_A_topk_indices", np.full((2, 4, 2), 6, np.uint8)),
]


@pytest.mark.parametrize(("name", "slot", "numbers"), OUTSIDE)
def test_numbers_that_count_nothing_are_an_error(
    name: str, slot: str, numbers: np.ndarray, tmp_path: Path
) -> None:
    """Places outside of a matrix, or of a bank, are neither wrapped around nor left out."""
    case = CASES[f"peft-{name}"]
    adapter = copied(case, tmp_path)
    rewrite(adapter, **{slot: numbers})
    with pytest.raises(ValueRangeError, match=r"has numbers from"):
        loratool.merge(case.base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_sum_has_no_scale() -> None:
    """A scale that is said of a rotation is an error, not a word in the wind."""
    with pytest.raises(AdapterError, match="OFT is no sum, so it has no scale"):
        read_adapter(CASES["peft-oft"].adapter, Told(scale=2.0))
    scaled = read_adapter(CASES["peft-loha"].adapter, Told(scale=2.0, override=True))
    assert {module.scale for module in scaled.modules.values()} == {2.0}
    with pytest.raises(AdapterError, match="--scale 2 makes its scale 2"):
        read_adapter(CASES["peft-loha"].adapter, Told(scale=2.0))


WRONG_FIELDS = {
    "loha": [("r", "3"), ("alpha", None), ("rank_pattern", {"q_proj": "2"}), ("rank_pattern", 2)],
    "adalora": [("init_r", "4"), ("lora_alpha", [6]), ("rank_pattern", [1])],
    "oft": [("coft", "false"), ("eps", "big"), ("num_cayley_neumann_terms", -1)],
    "ia3": [("feedforward_modules", 3), ("target_modules", 7)],
    "vera": [("r", 4.5), ("save_projection", "no"), ("projection_prng_key", -3)],
}


@pytest.mark.parametrize(
    ("name", "field", "value"), [(n, f, v) for n, found in WRONG_FIELDS.items() for f, v in found]
)
def test_a_wrong_type_is_an_error(name: str, field: str, value: Any, tmp_path: Path) -> None:
    """What a field of a type means cannot be known where it has another type than PEFT's."""
    adapter = copied(CASES[f"peft-{name}"], tmp_path)
    configure(adapter, **{field: value})
    with pytest.raises(AdapterError, match=field):
        read_adapter(adapter)


@pytest.mark.parametrize("name", ["loha", "adalora", "oft", "hra", "vera", "ln-tuning"])
def test_a_field_that_nobody_knows_is_refused(name: str, tmp_path: Path) -> None:
    """A field of a later PEFT may change the arithmetic of these types too."""
    adapter = copied(CASES[f"peft-{name}"], tmp_path)
    configure(adapter, use_novel_turn=True)
    assert "use_novel_turn" in reasons(read_adapter(adapter))["unknown-config-field"]


HALVES = {
    "loha": "hada_w2_a", "lokr": "lokr_w2_b", "adalora": "lora_E", "boft": "boft_s",
    "vera": "vera_lambda_d",
}  # fmt: skip


@pytest.mark.parametrize("name", HALVES)
def test_half_a_module_is_refused(name: str, tmp_path: Path) -> None:
    """Where a tensor is missing nothing is computed from the others."""
    adapter = copied(CASES[f"peft-{name}"], tmp_path)
    rewrite(adapter, **{HALVES[name]: None})
    assert f"no {HALVES[name]}" in reasons(read_adapter(adapter))["half-a-pair"]


WRONG_SHAPES = [
    ("loha", "hada_w1_a", (24, 2), "pair-mismatch"),
    ("loha", "q_proj.hada_w1_b", (3, 15), "pair-mismatch"),
    ("loha", "hada_w1_b", (3, 0), "zero3-placeholder"),
    ("lokr", "lokr_w2_b", (3, 4), "pair-mismatch"),
    ("adalora", "lora_E", (4,), "pair-mismatch"),
    ("adalora", "lora_A", (5, 16), "pair-mismatch"),
    ("oft", "oft_R.weight", (4, 7), "pair-mismatch"),
    ("boft", "boft_R", (1, 4, 4, 3), "pair-mismatch"),
    ("boft", "boft_R", (3, 6, 2, 2), "pair-mismatch"),
    ("hra", "hra_u", (16, 3), "rank-mismatch"),
    ("ia3", "ia3_l", (3, 4), "pair-mismatch"),
    ("ia3", "ia3_l", (), "pair-mismatch"),
    ("vera", "vera_lambda_d", (5,), "rank-mismatch"),
    ("vera", "vera_B", (3, 4), "pair-mismatch"),
]


@pytest.mark.parametrize(("name", "slot", "shape", "code"), WRONG_SHAPES)
def test_shapes_that_do_not_belong_together_are_refused(
    name: str, slot: str, shape: tuple[int, ...], code: str, tmp_path: Path
) -> None:
    """Tensors of other shapes make no weight, however many elements they have."""
    adapter = copied(CASES[f"peft-{name}"], tmp_path)
    rewrite(adapter, **{slot: np.ones(shape, np.float32)})
    assert code in reasons(read_adapter(adapter))


@pytest.mark.parametrize(
    ("name", "slot", "shape"),
    [("oft", "q_proj.oft_R.weight", (5, 6)), ("hra", "q_proj.hra_u", (17, 4)),
     ("ia3", "q_proj.ia3_l", (23, 1)), ("oft-shared", "q_proj.oft_R.weight", (1, 10))],
)  # fmt: skip
def test_a_function_of_another_weight_is_refused(
    name: str, slot: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """Whether a rotation fits, the base tells: of another size it is not applied."""
    case = CASES[f"peft-{name}"]
    adapter = copied(case, tmp_path)
    rewrite(adapter, **{slot: np.ones(shape, np.float32)})
    with pytest.raises(LoraToolError, match=r"q_proj"):
        loratool.merge(case.base, adapter, tmp_path / "out")


def test_shared_projections_need_the_base() -> None:
    """How wide the weights are, VeRA's file does not tell: what is shown without is said to be."""
    adapter = read_adapter(CASES["peft-vera"].adapter)
    assert "--base" in reasons(adapter)["needs-base"]
    base = open_checkpoint(CASES["peft-vera"].base)
    known = read_adapter(CASES["peft-vera"].adapter, base=base)
    assert not reasons(known)
    assert {m.shape for m in known.modules.values()} == {(16, 32), (24, 16)}
    unsaved = CASES["peft-vera-unsaved"]
    assert "needs-base" in reasons(read_adapter(unsaved.adapter))


def test_algorithms_have_their_names() -> None:
    """What a module is, is said by the name that its authors gave it."""
    for name, algorithm in (("loha", "LoHa"), ("lokr-full", "LoKr"), ("adalora", "AdaLoRA")):
        adapter = read_adapter(CASES[f"peft-{name}"].adapter)
        assert {m.algorithm for m in adapter.modules.values()} == {algorithm}
        assert adapter.description == f"a PEFT {algorithm} adapter"
    oft = read_adapter(CASES["peft-oft"].adapter)
    assert {f.algorithm for f in oft.functions.values()} == {"OFT"}
    assert oft.peft_type == "OFT"


def test_the_series_before_0_18_ends_otherwise(tmp_path: Path) -> None:
    """Until PEFT 0.18 the last term of Cayley's series counted twice."""
    case = CASES["peft-oft-neumann"]
    adapter = copied(case, tmp_path)
    rewrite(adapter, **{"down_proj.oft_R.weight": None})
    upper = load_file(adapter / "adapter_model.safetensors").popitem()[1].astype(np.float64)
    configure(adapter, peft_version="0.17.1")
    loratool.merge(case.base, adapter, tmp_path / "out", dtype="float32")
    s = np.zeros((4, 4, 4))
    rows, columns = np.triu_indices(4, 1)
    s[:, rows, columns] = upper
    s -= s.transpose(0, 2, 1)
    turns = np.eye(4) + 2 * (s + s @ s + s @ s @ s + s @ s @ s @ s)
    name = "model.layers.1.self_attn.q_proj.weight"
    before = case.base_tensors()[name].astype(np.float64)
    right = np.einsum("okb,kcb->okc", before.reshape(24, 4, 4), turns).reshape(24, 16)
    found = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert np.allclose(found, right, rtol=0, atol=1e-6)


def test_an_old_oft_is_refused(tmp_path: Path) -> None:
    """OFT of PEFT before 0.14 meant another matrix by the same name."""
    adapter = copied(CASES["peft-oft"], tmp_path)
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["oft_block_size"]
    path.write_text(json.dumps(config))
    assert "0.14" in reasons(read_adapter(adapter))["peft-options"]
