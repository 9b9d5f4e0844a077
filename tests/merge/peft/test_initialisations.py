"""Initialisations that change the base, against PEFT: PiSSA, OLoRA and their kin."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import run_cli
from helpers.models import State, differing, edit_config, read, tiny_llama, write_base
from helpers.outcomes import refused
from helpers.peft_live import gpt2, llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import loratool
from loratool.errors import AdapterError, MatchError, RestoreError, ValueRangeError

LINEARS = ["q_proj", "k_proj", "down_proj", "up_proj"]


@dataclass(frozen=True)
class Scene:
    """A base, what the initialisation left of it, and an adapter before and after training."""

    folder: Path
    before: State
    model: PeftModel

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def residual(self) -> Path:
        return self.folder / "residual"

    @property
    def initial(self) -> Path:
        return self.folder / "initial"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def expected(self) -> State:
        """What PEFT's own merge makes of the model in training."""
        with torch.no_grad():
            merged = copy.deepcopy(self.model).merge_and_unload()
        return {name: value.detach() for name, value in merged.state_dict().items()}

    def merge(self, base: Path | None = None, **options: Any) -> State:
        loratool.merge(
            base or self.base, self.adapter, self.folder / "out", dtype="base", overwrite=True,
            **options,
        )  # fmt: skip
        return read(self.folder / "out")


def scene(
    folder: Path, make: Callable[[], nn.Module], init: str, dtype: torch.dtype, **options: Any
) -> Scene:
    model = make().to(dtype)
    architectures = [type(model).__name__]
    write_base(folder / "base", model, {**model.config.to_dict(), "architectures": architectures})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {"target_modules": LINEARS, "r": 4, "lora_alpha": 6, **options}
    adapted = get_peft_model(model, LoraConfig(init_lora_weights=init, **settings))
    config = adapted.peft_config["default"]
    config.init_lora_weights = True  # PEFT asks for that in what was before training
    adapted.save_pretrained(folder / "initial")
    config.init_lora_weights = init
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * float(parameter.detach().std()) * torch.randn(parameter.shape)
    adapted.save_pretrained(folder / "adapter")
    write_base(folder / "residual", copy.deepcopy(adapted).unload(), model.config.to_dict())
    return Scene(folder, before, adapted.eval())


def assert_peft(found: State, expected: State, before: State) -> None:
    """Equal to PEFT's up to what its decomposition in float32 is off by, as a share of the base's
    values; bfloat16 up to a few values that lay on an edge when the base was rounded."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        size = float(before[name].float().abs().max())
        apart = (found[name].float() - values.float()).abs()
        if values.dtype == torch.float32:
            assert float(apart.max()) <= 1e-5 * size, name
        else:
            assert int((apart > 0).sum()) <= 0.005 * apart.numel(), name
            assert float(apart.max()) <= 2.0**-8 * size, name


CASES: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any]]] = {
    "pissa": (llama, "pissa", {}),
    "olora": (llama, "olora", {}),
    "pissa-patterns": (
        llama, "pissa",
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}},
    ),
    "olora-patterns": (
        llama, "olora",
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}},
    ),
    "pissa-gpt2": (
        gpt2, "pissa", {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True},
    ),
    "olora-gpt2": (
        gpt2, "olora", {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True},
    ),
    "pissa-dora": (llama, "pissa", {"use_dora": True}),
    "pissa-embedding": (llama, "pissa", {"target_modules": ["q_proj", "embed_tokens"]}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_the_base_is_made_as_peft_makes_it(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """On the published base the merge is PEFT's, verify agrees, and unmerge gives the base back."""
    make, init, options = CASES[case]
    found = scene(tmp_path, make, init, dtype, **options)
    merged = found.merge(reversible=True, verify=True)
    assert_peft(merged, found.expected(), found.before)
    loratool.unmerge(found.folder / "out", found.adapter, tmp_path / "back")
    assert differing(read(tmp_path / "back"), found.before) == {}
    write_base(tmp_path / "pefts", copy.deepcopy(found.model).merge_and_unload())
    assert loratool.verify(tmp_path / "pefts", found.base, found.adapter).verdict == "yes"
    assert loratool.verify(found.base, found.base, found.adapter).verdict == "no"
    assert loratool.verify(found.residual, found.base, found.adapter).verdict == "no"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["pissa", "olora", "pissa-gpt2", "olora-gpt2"])
def test_residual_base_is_merged_as_it_is(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """What PEFT left of the base is told from the base, and nothing is taken off it again."""
    make, init, options = CASES[case]
    found = scene(tmp_path, make, init, dtype, **options)
    merged = found.merge(found.residual)
    assert differing(merged, found.expected()) == {}
    report = loratool.merge(found.residual, found.adapter, tmp_path / "o", dry_run=True)
    assert [n.code for n in report.warnings] == ["residual-base"]
    assert report.derivation is None
    verified = loratool.verify(tmp_path / "out", found.residual, found.adapter)
    assert verified.verdict == "yes"
    back = tmp_path / "back"
    loratool.unmerge(tmp_path / "out", found.adapter, back)  # by subtraction: nothing was taken
    with pytest.raises(MatchError, match="is off already"):
        found.merge(found.residual, initial=found.initial)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_3", "olora"])
def test_initial_adapter_says_what_was_taken(init: str, tmp_path: Path) -> None:
    """`--initial` takes scale·B·A of before training off the base, and so merges what PEFT did."""
    found = scene(tmp_path, llama, init, torch.float32)
    merged = found.merge(initial=found.initial, reversible=True)
    assert_peft(merged, found.expected(), found.before)
    out = tmp_path / "out"
    verified = loratool.verify(out, found.base, found.adapter, initial=found.initial)
    assert (verified.verdict, verified.equal) == ("yes", 1.0)
    loratool.unmerge(out, found.adapter, tmp_path / "back")  # it needs no --initial
    assert differing(read(tmp_path / "back"), found.before) == {}
    assert (
        loratool.verify(found.base, found.base, found.adapter, initial=found.initial).verdict
        == "no"
    )
    record = json.loads((out / "loratool.json").read_text())
    assert record["options"]["initial"]["name"] == "initial"
    with pytest.raises(RestoreError, match="changed the base"):
        loratool.unmerge(out, found.adapter, tmp_path / "s", subtract=True)


@pytest.mark.parametrize("init", ["pissa_niter_3", "corda", "lora_ga", "loftq"])
def test_without_the_initial_adapter_the_hint_names_it(init: str, tmp_path: Path) -> None:
    """What the base does not tell is refused without `--initial`, and merged with it."""
    found = scene(tmp_path, llama, "pissa_niter_3", torch.float32)
    edit_config(found.adapter, init_lora_weights=init)
    error = refused(AdapterError, found.base, found.adapter, tmp_path / "o", init)
    assert "--initial" in str(error)
    merged = found.merge(initial=found.initial)
    assert_peft(merged, found.expected(), found.before)


def test_loftq_says_that_the_base_was_quantised(tmp_path: Path) -> None:
    """The trained change goes onto the base as it is, and a warning says that."""
    found = scene(tmp_path, llama, "pissa_niter_3", torch.float32)
    edit_config(found.adapter, init_lora_weights="loftq")
    report = loratool.merge(found.base, found.adapter, tmp_path / "o", initial=found.initial)
    assert "loftq-base" in [n.code for n in report.warnings]


def _shifted(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: change(value) for name, value in load_file(path).items()}, path)


def test_initial_adapter_of_another_training_is_refused(tmp_path: Path) -> None:
    """Other modules, ranks or scales, and the trained adapter itself, are no beginning of it."""
    found = scene(tmp_path / "a", llama, "pissa", torch.float32)
    other = scene(tmp_path / "b", llama, "pissa", torch.float32, target_modules=["q_proj"])
    ranks = scene(tmp_path / "c", llama, "pissa", torch.float32, r=2)
    scales = scene(tmp_path / "d", llama, "pissa", torch.float32, lora_alpha=8)
    for beginning, reason in (
        (other.initial, "k_proj"),
        (ranks.initial, "rank 2"),
        (scales.initial, "scale 2"),
        (found.adapter, "same adapter"),
    ):
        refused(MatchError, found.base, found.adapter, tmp_path / "o", reason, initial=beginning)


def test_weights_and_two_such_adapters_have_no_meaning(tmp_path: Path) -> None:
    """A weight would scale the part of the base in the factors; two would take it off twice."""
    found = scene(tmp_path / "a", llama, "pissa", torch.float32)
    for base in (found.base, found.residual):
        refused(AdapterError, base, found.adapter, tmp_path / "o", "weight 0.5", weights=[0.5])
    other = scene(tmp_path / "b", llama, "olora", torch.float32)
    with pytest.raises(AdapterError, match="a base of its own"):
        loratool.merge(found.base, [found.adapter, other.adapter], tmp_path / "o")


def test_plain_adapter_beside_it_is_added_to_the_same_base(tmp_path: Path) -> None:
    """PEFT adds an ordinary adapter to the base that the other one's initialisation left."""
    found = scene(tmp_path, llama, "pissa", torch.float32)
    config = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    found.model.add_adapter("plain", config)
    found.model.save_pretrained(tmp_path, selected_adapters=["plain"])
    merged = copy.deepcopy(found.model)
    merged.base_model.set_adapter(["default", "plain"])
    expected = merged.merge_and_unload().state_dict()
    out = tmp_path / "o"
    loratool.merge(found.base, [found.adapter, tmp_path / "plain"], out, dtype="base")
    assert_peft(read(out), expected, found.before)
    verified = loratool.verify(out, found.base, [found.adapter, tmp_path / "plain"])
    assert verified.verdict == "yes"


def test_base_that_is_neither_is_refused(tmp_path: Path) -> None:
    """A base that is unlike both, as after training that led far away, is not guessed at."""
    found = scene(tmp_path, llama, "pissa", torch.float32)
    torch.manual_seed(5)
    _shifted(found.adapter, lambda value: torch.randn(value.shape) * value.std())
    error = refused(MatchError, found.base, found.adapter, tmp_path / "o", "neither")
    assert "--initial" in error.hint


def test_equal_singular_values_leave_it_open_what_was_taken(tmp_path: Path) -> None:
    """Where σ_r = σ_{r+1} any of many parts may have been taken; the merge stops and says so."""
    found = scene(tmp_path, llama, "pissa", torch.float32, target_modules=["q_proj"])
    state = load_file(found.base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    left, values, right = torch.linalg.svd(state[name].double())
    values[4] = values[3]
    state[name] = (left @ torch.diag(values) @ right).float()
    save_file(state, found.base / "model.safetensors")
    refused(ValueRangeError, found.base, found.adapter, tmp_path / "o", "singular values 4 and 5")
    merged = found.merge(initial=found.initial)  # which tells it
    assert name in merged


def test_dependent_columns_leave_it_open_what_olora_took(tmp_path: Path) -> None:
    """QR of first columns that depend on each other has no answer."""

    def make() -> nn.Module:
        model = llama()
        weight = model.get_parameter("model.layers.0.self_attn.q_proj.weight").data
        weight[:, 1] = 2 * weight[:, 0]
        return model

    found = scene(tmp_path, make, "olora", torch.float32, target_modules=["q_proj"])
    error = refused(ValueRangeError, found.base, found.adapter, tmp_path / "o", "first 4 columns")
    assert "--initial" in error.hint


@pytest.mark.parametrize("case", ["pissa", "olora", "pissa-gpt2"])
def test_what_was_taken_is_that_of_float64(case: str, tmp_path: Path) -> None:
    """The decompositions are right to float32, whatever PEFT's own are off by."""
    make, init, options = CASES[case]
    found = scene(tmp_path, make, init, torch.float32, **options)
    merged = found.merge()
    for path, module in found.model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        name = f"{path.removeprefix('base_model.model.')}.weight"
        turned = case.endswith("gpt2")
        weight = found.before[name].double().T if turned else found.before[name].double()
        b, a = (f["default"].weight.detach().double() for f in (module.lora_B, module.lora_A))
        if init == "pissa":
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            taken = left[:, :4] @ torch.diag(values[:4]) @ right[:4]
        else:
            q, r = torch.linalg.qr(weight)
            taken = 1.5 * q[:, :4] @ r[:4]
        expected = weight - taken + 1.5 * (b @ a)
        got = merged[name].double().T if turned else merged[name].double()
        assert float((got - expected).abs().max()) <= 2.0**-22 * float(weight.abs().max()), name


def test_turned_olora_is_refused_with_its_initial_adapter(tmp_path: Path) -> None:
    """On [in, out] weights PEFT's OLoRA takes off another product than that of the factors."""
    options = CASES["olora-gpt2"][2]
    found = scene(tmp_path, gpt2, "olora", torch.float32, **options)
    refused(
        MatchError, found.base, found.adapter, tmp_path / "o", "stored [in, out]",
        initial=found.initial,
    )  # fmt: skip


def test_float64_base_is_refused(tmp_path: Path) -> None:
    """PEFT does not initialise float64 that way."""
    found = scene(tmp_path, llama, "pissa", torch.float32)
    state = {n: v.double() for n, v in load_file(found.base / "model.safetensors").items()}
    save_file(state, found.base / "model.safetensors")
    refused(MatchError, found.base, found.adapter, tmp_path / "o", "F64")


def test_tied_head_is_refused(tmp_path: Path) -> None:
    """PEFT changes the one matrix for embedding and head alike; no derivation is that."""
    found = scene(
        tmp_path, lambda: tiny_llama(num_hidden_layers=1, tie_word_embeddings=True), "pissa",
        torch.float32, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM",
    )  # fmt: skip
    state = load_file(found.adapter / "adapter_model.safetensors")
    kept = {n: v for n, v in state.items() if "lora_" in n}
    save_file(kept, found.adapter / "adapter_model.safetensors")
    refused(MatchError, found.base, found.adapter, tmp_path / "o", "embedding and head")


def test_bytes_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    """Decompositions beside each other come out as one after the other."""
    found = scene(tmp_path, llama, "pissa", torch.bfloat16)
    outputs = []
    for threads in (1, 4):
        loratool.merge(found.base, found.adapter, tmp_path / f"o{threads}", threads=threads)
        outputs.append((tmp_path / f"o{threads}" / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]


def test_dry_run_says_what_the_decompositions_cost(tmp_path: Path) -> None:
    """Matrices, operations by the formula, and time; the report on a terminal has them too."""
    found = scene(tmp_path, llama, "pissa", torch.float32)
    shown = run_cli("merge", found.base, found.adapter, "-o", tmp_path / "o", "--dry-run")
    assert "PiSSA: one decomposition of each of 4 matrices" in " ".join(shown.stdout.split())
    report = loratool.merge(found.base, found.adapter, tmp_path / "o", dry_run=True)
    # q 16×16, k 8×16, down 16×24, up 24×16
    flops = sum(2 * n * n * m + 9 * n**3 for n, m in ((16, 16), (8, 16), (16, 24), (16, 24)))
    assert report.derivation is not None
    assert (report.derivation.how, report.derivation.matrices) == ("pissa", 4)
    assert report.derivation.flops == flops
    assert report.to_dict()["derivation"]["seconds"] > 0
    given = loratool.merge(
        found.base, found.adapter, tmp_path / "o", dry_run=True, initial=found.initial
    )
    assert given.derivation is None
    undo = loratool.merge(found.base, found.adapter, tmp_path / "o", dry_run=True, reversible=True)
    found.merge(reversible=True)
    real = (tmp_path / "out" / "loratool" / "undo.safetensors").stat().st_size
    assert 0.5 * real < undo.undo_bytes < 2 * real


def test_other_verbs_do_not_take_the_factors_for_the_change(tmp_path: Path) -> None:
    """combine and resize refuse factors that hold a part of the base."""
    found = scene(tmp_path, llama, "pissa", torch.float32)
    with pytest.raises(AdapterError, match="also changed the base"):
        loratool.combine([found.adapter, found.adapter], tmp_path / "o")
    with pytest.raises(AdapterError, match="also changed the base"):
        loratool.resize(found.adapter, tmp_path / "o", rank=2)


def test_command_line_takes_the_initial_adapter(tmp_path: Path) -> None:
    """merge and verify have `--initial`; an initial adapter among several cannot be placed."""
    found = scene(tmp_path, llama, "pissa_niter_3", torch.float32)
    out = tmp_path / "o"
    run_cli("merge", found.base, found.adapter, "--initial", found.initial, "-o", out)
    shown = run_cli("verify", out, "--base", found.base, found.adapter, "--initial", found.initial)
    assert shown.exit_code == 0
    edit_config(found.adapter, init_lora_weights=True)
    with pytest.raises(AdapterError, match="--initial"):
        loratool.merge(
            found.base, [found.adapter, found.residual.parent / "initial"], tmp_path / "p",
            initial=found.initial,
        )  # fmt: skip


def test_parts_of_an_adapter_take_their_part_of_the_base(tmp_path: Path) -> None:
    """On the published base what is not chosen stays whole, derived or given; on what was left of
    it, it would lack what was taken, so the whole adapter is asked for."""
    found = scene(tmp_path, llama, "pissa", torch.float32)
    expected = found.expected()
    for options in ({}, {"initial": found.initial}):
        merged = found.merge(include="q_proj", reversible=True, **options)
        back = tmp_path / f"back{len(options)}"
        assert loratool.unmerge(tmp_path / "out", found.adapter, back).exact
        assert read(back).keys() == found.before.keys()
        assert all(torch.equal(value, found.before[n]) for n, value in read(back).items())
        wanted = {n: (expected if "q_proj" in n else found.before)[n] for n in expected}
        assert_peft(merged, wanted, found.before)
        assert all(torch.equal(merged[n], found.before[n]) for n in expected if "q_proj" not in n)
        check = loratool.verify(
            tmp_path / "out", found.base, found.adapter, include="q_proj", **options
        )
        assert check.verdict == "yes"
    text = "would lack what was taken"
    refused(
        MatchError, found.residual, found.adapter, tmp_path / "no", text, exclude="q_proj",
        dtype="base",
    )  # fmt: skip
