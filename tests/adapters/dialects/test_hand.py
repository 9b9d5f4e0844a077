"""Hand-written LoRA: the classes of tutorials, their files, and what decides the product."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.adapters import codes
from helpers.dialects import DialectCase, added_to, apart, cases
from helpers.files import load, write_base
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

import loratool
from loratool.adapters.dialects.hand.products import readings
from loratool.adapters.reading import read_adapter
from loratool.adapters.told import Told
from loratool.errors import LoraToolError
from loratool.storage.folder import Folder
from loratool.storage.values import read_float32
from loratool.storage.weights import read_contents

DIM, KV, INNER, RANK, ALPHA = 8, 4, 12, 2, 6.0
SQUARE = {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}
SEVERAL = SQUARE | {"model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj"}
State = dict[str, Tensor]


def normal(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


class Subclass(nn.Linear):
    """(i) Bare parameters in a subclass of the layer, as loralib has them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.lora_A = normal(RANK, linear.in_features)
        self.lora_B = normal(linear.out_features, RANK)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + ALPHA / RANK * (x @ self.lora_A.T @ self.lora_B.T)


class OutFirst(Subclass):
    """(ii) W + α/r·A·B with A [out, r]."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Linear.__init__(self, linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.A, self.B = normal(linear.out_features, RANK), normal(RANK, linear.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight + ALPHA / RANK * self.A @ self.B)


class Wrapper(nn.Module):
    """(iii) W + α/r·B·A beside the layer that is wrapped."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.orig_linear = linear
        self.A, self.B = normal(RANK, linear.in_features), normal(linear.out_features, RANK)

    def forward(self, x: Tensor) -> Tensor:
        return self.orig_linear(x) + ALPHA / RANK * nn.functional.linear(x, self.B @ self.A)


class InputFirst(Wrapper):
    """(iii) x·A·B, with A [in, r]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.A, self.B = normal(linear.in_features, RANK), normal(RANK, linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.orig_linear(x) + ALPHA / RANK * (x @ self.A @ self.B)


class Layer(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.lora_A = normal(linear.in_features, RANK)
        self.lora_B = normal(RANK, linear.out_features)
        self.register_buffer("scaling", torch.tensor(ALPHA / RANK))

    def forward(self, x: Tensor) -> Tensor:
        return ALPHA / RANK * (x @ self.lora_A @ self.lora_B)


class WithLayer(nn.Module):
    """(iv) A layer of LoRA beside the linear one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.lora = linear, Layer(linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.lora(x)


class Children(nn.Module):
    """(v) Factors that are linear layers, beside the layer by its own name."""

    def __init__(self, linear: nn.Linear, name: str = "linear", bias: bool = False) -> None:
        super().__init__()
        self.name = name
        setattr(self, name, linear)
        self.lora_A = nn.Linear(linear.in_features, RANK, bias=bias)
        self.lora_B = nn.Linear(RANK, linear.out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.name)(x) + ALPHA / RANK * self.lora_B(self.lora_A(x))


class DownUp(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.original_layer = linear
        self.lora_down = nn.Linear(linear.in_features, RANK, bias=False)
        self.lora_up = nn.Linear(RANK, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.original_layer(x) + ALPHA / RANK * self.lora_up(self.lora_down(x))


class Parametrization(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.lora_A = normal(RANK, linear.in_features)
        self.lora_B = normal(linear.out_features, RANK)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + ALPHA / RANK * (self.lora_B @ self.lora_A)


def parametrized(linear: nn.Linear) -> nn.Module:
    """As the tutorials of torch.nn.utils.parametrize have it."""
    parametrize.register_parametrization(linear, "weight", Parametrization(linear))
    return linear


LAYOUTS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "subclass": Subclass,
    "out-first": OutFirst,
    "wrapper": Wrapper,
    "input-first": InputFirst,
    "layer": WithLayer,
    "children": Children,
    "children-own-name": lambda linear: Children(linear, "q_proj"),
    "down-up": DownUp,
    "parametrized": parametrized,
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(DIM, DIM, bias=False)
        self.v_proj = nn.Linear(DIM, KV, bias=False)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(DIM, INNER, bias=False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), Mlp()
        self.input_layernorm = nn.LayerNorm(DIM, bias=False)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(20, DIM)
        self.layers = nn.ModuleList([Block(), Block()])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Inner()


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def base(model: Model, tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", model.state_dict())


def adapted(model: Model, wrap: Any, paths: set[str]) -> tuple[State, State]:
    """The state dict of the model with wrapped layers, and the weights that these compute with."""
    wrapped = copy.deepcopy(model)
    computed = {}
    for path in sorted(paths):
        owner, _, leaf = path.rpartition(".")
        layer = wrap(wrapped.get_submodule(path))
        setattr(wrapped.get_submodule(owner), leaf, layer)
        with torch.no_grad():
            zero = layer(torch.zeros(1, DIM))
            computed[f"{path}.weight"] = (layer(torch.eye(DIM)) - zero).T.contiguous()
    return wrapped.state_dict(), computed


def factors_only(state: State, plain: State) -> State:
    return {k: v for k, v in state.items() if "weight" not in k or "lora" in k}


def merged(base: Path, file: Path, **said: Any) -> tuple[State, loratool.MergeReport]:
    out = file.parent / "merged"
    report = loratool.merge(
        base, file, out, dtype="float32", told=Told(**said), overwrite=True, verify=True
    )
    return load(out), report


def assert_merged(found: State, plain: State, computed: State) -> None:
    assert found.keys() == plain.keys()
    for name, tensor in found.items():
        expected = computed.get(name, plain[name])
        assert torch.allclose(tensor, expected, rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("whole", [True, False], ids=["everything", "factors"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_merges_with_alpha_alone(
    layout: str, whole: bool, model: Model, base: Path, tmp_path: Path
) -> None:
    state, computed = adapted(model, LAYOUTS[layout], SEVERAL)
    file = tmp_path / "sentiment_lora.pth"
    torch.save(state if whole else factors_only(state, model.state_dict()), file)
    found, _ = merged(base, file, alpha=ALPHA)
    assert_merged(found, model.state_dict(), computed)


@pytest.mark.parametrize("whole", [True, False], ids=["everything", "factors"])
@pytest.mark.parametrize(
    "layout", [x for x in LAYOUTS if x not in ("out-first", "input-first", "layer")]
)
def test_square_weights_alone_need_no_more_where_the_input_comes_first(
    layout: str, whole: bool, model: Model, base: Path, tmp_path: Path
) -> None:
    state, computed = adapted(model, LAYOUTS[layout], SQUARE)
    file = tmp_path / "lora.pt"
    torch.save(state if whole else factors_only(state, model.state_dict()), file)
    found, _ = merged(base, file, alpha=ALPHA)
    assert_merged(found, model.state_dict(), computed)


@pytest.mark.parametrize(("layout", "product"), [("out-first", "AB"), ("layer", "ABt")])
def test_square_weights_in_the_other_order_are_asked_for(
    layout: str, product: Any, model: Model, base: Path, tmp_path: Path
) -> None:
    state, computed = adapted(model, LAYOUTS[layout], SQUARE)
    file = tmp_path / "lora.pt"
    torch.save(state, file)
    with pytest.raises(LoraToolError, match="product-unknown") as error:
        merged(base, file, alpha=ALPHA)
    assert "say --product AB or --product ABt:" in str(error.value)
    found, _ = merged(base, file, alpha=ALPHA, product=product)
    assert_merged(found, model.state_dict(), computed)


def test_one_weight_that_is_not_square_decides_and_is_named(
    model: Model, base: Path, tmp_path: Path
) -> None:
    state, _ = adapted(model, InputFirst, SEVERAL)
    torch.save(state, tmp_path / "lora.pt")
    _, report = merged(base, tmp_path / "lora.pt", alpha=ALPHA)
    notice = next(n for n in report.warnings if n.code == "product-decided")
    assert notice.where in SEVERAL - SQUARE
    assert "(A·B)ᵀ" in notice.message


def test_modules_that_disagree_decide_nothing_for_others(
    model: Model, base: Path, tmp_path: Path
) -> None:
    state, _ = adapted(model, InputFirst, SEVERAL)
    path = "model.layers.1.mlp.up_proj"
    state[f"{path}.A"], state[f"{path}.B"] = torch.randn(INNER, RANK), torch.randn(RANK, DIM)
    torch.save(state, tmp_path / "lora.pt")
    with pytest.raises(LoraToolError, match="product-unknown"):
        merged(base, tmp_path / "lora.pt", alpha=ALPHA)


def test_inspect_without_a_base_shows_what_is_open(model: Model, tmp_path: Path) -> None:
    state, _ = adapted(model, OutFirst, SEVERAL)
    torch.save(factors_only(state, model.state_dict()), tmp_path / "lora.pt")
    report = loratool.inspect(tmp_path / "lora.pt")
    assert report.format == "hand"
    assert {"product-unknown", "no-alpha"} <= set(codes(report))
    assert {m.rank for m in report.modules} == {RANK}
    assert {m.scale for m in report.modules} == {None}


def test_frozen_weights_of_the_file_decide_without_a_base(model: Model, tmp_path: Path) -> None:
    state, _ = adapted(model, InputFirst, SEVERAL)
    torch.save(state, tmp_path / "lora.pt")
    report = loratool.inspect(tmp_path / "lora.pt", told=Told(alpha=ALPHA))
    assert "product-unknown" not in codes(report)
    shapes = {m.path: m.shape for m in report.modules}
    assert shapes["model.layers.1.mlp.up_proj"] == (INNER, DIM)
    assert {m.scale for m in report.modules} == {ALPHA / RANK}
    factors = [v.numel() for k, v in state.items() if k.endswith((".A", ".B"))]
    assert report.parameters == sum(factors)


# --- what is frozen, and what was trained too -----------------------------------------------------


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.orig_linear.weight", "model.embed_tokens.weight"]
)
def test_frozen_weights_of_another_base_are_refused(
    name: str, model: Model, base: Path, tmp_path: Path
) -> None:
    state, _ = adapted(model, Wrapper, SEVERAL)
    state[name] = state[name].clone()
    state[name][0, 0] += 1e-3
    torch.save(state, tmp_path / "lora.pt")
    with pytest.raises(LoraToolError, match=name.replace(".", r"\.")) as error:
        merged(base, tmp_path / "lora.pt", alpha=ALPHA)
    assert "trained or merged" in error.value.hint


def test_frozen_weights_may_be_rounded(model: Model, base: Path, tmp_path: Path) -> None:
    state, computed = adapted(model, Wrapper, SEVERAL)
    state = {k: v if k.endswith((".A", ".B")) else v.half() for k, v in state.items()}
    torch.save(state, tmp_path / "lora.pt")
    found, _ = merged(base, tmp_path / "lora.pt", alpha=ALPHA)
    assert_merged(found, model.state_dict(), computed)


def test_what_is_saved_beside_factors_alone_was_trained(
    model: Model, base: Path, tmp_path: Path
) -> None:
    state, computed = adapted(model, Wrapper, SEVERAL)
    norm = "model.layers.0.input_layernorm.weight"
    chosen = factors_only(state, model.state_dict())
    chosen |= {norm: torch.full((DIM,), 3.0), "score.weight": torch.ones(2, DIM)}
    torch.save(chosen, tmp_path / "lora.pt")
    found, _ = merged(base, tmp_path / "lora.pt", alpha=ALPHA)
    assert found[norm].eq(3).all()
    assert found.pop("score.weight").eq(1).all()
    assert_merged(found, model.state_dict() | {norm: found[norm]}, computed)


def test_what_was_trained_too_goes_along_when_adapters_are_combined(
    model: Model, base: Path, tmp_path: Path
) -> None:
    state, _ = adapted(model, Wrapper, SEVERAL)
    chosen = factors_only(state, model.state_dict()) | {"score.weight": torch.ones(2, DIM)}
    torch.save(chosen, tmp_path / "lora.pt")
    told = Told(alpha=ALPHA)
    loratool.combine([tmp_path / "lora.pt"], tmp_path / "one", told=told)
    loratool.merge(base, tmp_path / "one", tmp_path / "out", dtype="float32")
    found, _ = merged(base, tmp_path / "lora.pt", alpha=ALPHA)
    assert_merged(load(tmp_path / "out"), found, {})


def test_a_magnitude_is_not_taken_for_a_weight_of_the_base(model: Model, tmp_path: Path) -> None:
    state, _ = adapted(model, Wrapper, SEVERAL)
    state["model.layers.0.self_attn.q_proj.m"] = torch.ones(1, DIM)
    torch.save(state, tmp_path / "lora.pt")
    assert "unknown-tensors" in codes(loratool.inspect(tmp_path / "lora.pt"))


def test_a_tensor_that_no_base_has_is_refused(model: Model, base: Path, tmp_path: Path) -> None:
    state, _ = adapted(model, Wrapper, SEVERAL)
    state["model.layers.0.self_attn.q_proj.m"] = torch.ones(1, DIM)  # a magnitude, perhaps
    torch.save(state, tmp_path / "lora.pt")
    with pytest.raises(LoraToolError, match=r"self_attn\.q_proj\.m$"):
        merged(base, tmp_path / "lora.pt", alpha=ALPHA)


def test_biases_of_factors_are_added_or_refused(model: Model, base: Path, tmp_path: Path) -> None:
    state, _ = adapted(model, lambda linear: Children(linear, bias=True), SEVERAL)
    torch.save(state, tmp_path / "lora.pt")
    with pytest.raises(LoraToolError, match="has none to add it to"):
        merged(base, tmp_path / "lora.pt", alpha=ALPHA)
    plain = model.state_dict() | {f"{p}.bias": torch.randn(model.get_submodule(p).out_features)
                                  for p in SEVERAL}  # fmt: skip
    biased = write_base(tmp_path / "biased", plain)
    found, _ = merged(biased, tmp_path / "lora.pt", alpha=ALPHA)
    for path in SEVERAL:
        a, b = state[f"{path}.lora_A.bias"], state[f"{path}.lora_B.bias"]
        added = ALPHA / RANK * (state[f"{path}.lora_B.weight"] @ a + b)
        assert torch.allclose(found[f"{path}.bias"], plain[f"{path}.bias"] + added, atol=1e-5)


# --- scales and ranks -----------------------------------------------------------------------------


def test_alpha_is_asked_for(model: Model, base: Path, tmp_path: Path) -> None:
    state, _ = adapted(model, Wrapper, SEVERAL)
    torch.save(state, tmp_path / "lora.pt")
    with pytest.raises(LoraToolError, match=r"training script.*--alpha A or --scale S"):
        merged(base, tmp_path / "lora.pt")


def test_a_scale_in_the_file_counts_and_is_not_contradicted(
    model: Model, base: Path, tmp_path: Path
) -> None:
    state, computed = adapted(model, WithLayer, SEVERAL)
    torch.save(state, tmp_path / "lora.pt")
    found, _ = merged(base, tmp_path / "lora.pt")
    assert_merged(found, model.state_dict(), computed)
    with pytest.raises(LoraToolError, match="--alpha 8 makes its scale 4"):
        merged(base, tmp_path / "lora.pt", alpha=8)
    merged(base, tmp_path / "lora.pt", alpha=8, override=True)


def test_numbers_may_be_integers(model: Model, base: Path, tmp_path: Path) -> None:
    state, computed = adapted(model, Wrapper, SEVERAL)
    numbers = {"alpha": torch.tensor(int(ALPHA)), "rank": torch.tensor(RANK)}
    torch.save(state | numbers, tmp_path / "lora.pt")
    found, _ = merged(base, tmp_path / "lora.pt")
    assert_merged(found, model.state_dict(), computed)
    torch.save(state | {"rank": torch.tensor(RANK + 1)}, tmp_path / "lora.pt")
    with pytest.raises(LoraToolError, match="the file gives rank 3, its factors have 2"):
        merged(base, tmp_path / "lora.pt", alpha=ALPHA)


@pytest.mark.parametrize("value", [float("nan"), 0.0, float("inf")])
def test_a_scale_that_is_none_is_refused(
    value: float, model: Model, base: Path, tmp_path: Path
) -> None:
    state, _ = adapted(model, Wrapper, SEVERAL)
    state["alpha"] = torch.tensor(value)
    torch.save(state, tmp_path / "lora.pt")
    with pytest.raises(LoraToolError, match=r"alpha: \S+ is no scale"):
        merged(base, tmp_path / "lora.pt")


@pytest.mark.parametrize(
    ("said", "words"),
    [({"product": "AB"}, "--product AB"), ({"rank": 3}, "--adapter-rank 3")],
)
def test_what_shapes_contradict_is_refused(
    said: dict[str, Any], words: str, model: Model, base: Path, tmp_path: Path
) -> None:
    state, _ = adapted(model, Wrapper, SEVERAL)
    torch.save(state, tmp_path / "lora.pt")
    with pytest.raises(LoraToolError, match=words):
        merged(base, tmp_path / "lora.pt", alpha=ALPHA, **said)


# --- how the file is made -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "state_dict.", "net_state_dict.model."]
)
def test_prefixes_of_training_are_taken_off(
    prefix: str, model: Model, base: Path, tmp_path: Path
) -> None:
    state, computed = adapted(model, InputFirst, SEVERAL)
    save_file({prefix + k: v for k, v in state.items()}, tmp_path / "lora.safetensors")
    found, _ = merged(base, tmp_path / "lora.safetensors", alpha=ALPHA)
    assert_merged(found, model.state_dict(), computed)


def test_a_checkpoint_of_a_run_is_read_by_its_model(
    model: Model, base: Path, tmp_path: Path
) -> None:
    state, computed = adapted(model, InputFirst, SEVERAL)
    moments = {"state": {0: {"exp_avg": torch.zeros(3), "step": torch.tensor(4.0)}}}
    torch.save({"epoch": 3, "model": state, "optimizer_state_dict": moments}, tmp_path / "lora.pt")
    found, _ = merged(base, tmp_path / "lora.pt", alpha=ALPHA)
    assert_merged(found, model.state_dict(), computed)


def test_half_a_pair_is_refused(model: Model, base: Path, tmp_path: Path) -> None:
    state, _ = adapted(model, Wrapper, SEVERAL)
    del state["model.layers.0.self_attn.q_proj.B"]
    torch.save(state, tmp_path / "lora.pt")
    with pytest.raises(LoraToolError, match=r"half-a-pair[\s\S]*q_proj"):
        merged(base, tmp_path / "lora.pt", alpha=ALPHA)


def test_two_pairs_for_one_layer_are_refused(model: Model, base: Path, tmp_path: Path) -> None:
    state, _ = adapted(model, Wrapper, SEVERAL)
    state["model.layers.0.self_attn.q_proj.lora.A"] = torch.randn(RANK, DIM)
    torch.save(state, tmp_path / "lora.pt")
    with pytest.raises(LoraToolError, match=r"unknown-tensors[\s\S]*q_proj\.lora\.A"):
        merged(base, tmp_path / "lora.pt", alpha=ALPHA)


def test_the_base_may_have_the_wrapper_too(model: Model, tmp_path: Path) -> None:
    state, computed = adapted(model, WithLayer, SEVERAL)
    plain = {k: v for k, v in state.items() if ".lora." not in k}
    base = write_base(tmp_path / "wrapped", plain)
    torch.save(state, tmp_path / "lora.pt")
    found, _ = merged(base, tmp_path / "lora.pt", alpha=ALPHA)
    inner = {k.replace(".weight", ".linear.weight"): v for k, v in computed.items()}
    assert_merged(found, plain, inner)


def test_layers_beside_a_scale_or_an_optimizer_are_no_file_of_peft(
    model: Model, base: Path, tmp_path: Path
) -> None:
    """(v) without the wrapped layers is named as PEFT names its own, and has more beside it."""
    state, computed = adapted(model, Children, SEVERAL)
    factors = {k: v for k, v in state.items() if ".lora_" in k}
    for names in (SEVERAL, {""}):
        numbers = {f"{n}.scaling".lstrip("."): torch.tensor(ALPHA / RANK) for n in names}
        torch.save(factors | numbers, tmp_path / "lora.pt")
        found, _ = merged(base, tmp_path / "lora.pt")
        assert_merged(found, model.state_dict(), computed)
    run = {"state": {0: {"exp_avg": torch.ones(3, 4)}}, "param_groups": [{"lr": 1e-3}]}
    torch.save({"model": factors, "optimizer": run, "epoch": 3}, tmp_path / "run.pt")
    found, _ = merged(base, tmp_path / "run.pt", alpha=ALPHA)
    assert_merged(found, model.state_dict(), computed)


def test_a_holder_may_be_called_adapter(model: Model, base: Path, tmp_path: Path) -> None:
    state, computed = adapted(model, Subclass, SEVERAL)
    factors = factors_only(state, model.state_dict())
    held = {k.replace(".lora_", ".adapter.lora_"): v for k, v in factors.items()}
    torch.save(held, tmp_path / "lora.pt")
    found, _ = merged(base, tmp_path / "lora.pt", alpha=ALPHA)
    assert_merged(found, model.state_dict(), computed)
    # A layer of that name in the base is the one that is meant.
    plain = {k.replace(".weight", ".adapter.weight"): v for k, v in model.state_dict().items()}
    own = write_base(tmp_path / "own", plain)
    found, _ = merged(own, tmp_path / "lora.pt", alpha=ALPHA)
    inner = {k.replace(".weight", ".adapter.weight"): v for k, v in computed.items()}
    assert_merged(found, plain, inner)


def test_peft_stays_peft(model: Model, tmp_path: Path) -> None:
    """Keys of PEFT without a config are no tutorial's, with or without its prefix."""
    for prefix in ("base_model.model.", ""):
        pair = {"lora_A.weight": torch.randn(RANK, DIM), "lora_B.weight": torch.randn(DIM, RANK)}
        path = tmp_path / "adapter.safetensors"
        save_file(
            {f"{prefix}model.layers.0.self_attn.q_proj.{k}": v for k, v in pair.items()}, path
        )
        assert read_adapter(path, Told(alpha=1)).format == "peft"


def test_a_user_may_say_whose_a_file_is(model: Model, base: Path, tmp_path: Path) -> None:
    state, computed = adapted(model, Subclass, SEVERAL)
    torch.save(factors_only(state, model.state_dict()), tmp_path / "lora.pt")
    found, _ = merged(base, tmp_path / "lora.pt", alpha=ALPHA, dialect="loralib")
    assert_merged(found, model.state_dict(), computed)
    with pytest.raises(LoraToolError, match="--from mlx: the file is a state dict of hand-written"):
        merged(base, tmp_path / "lora.pt", alpha=ALPHA, dialect="mlx")


def test_a_merge_is_verified_and_taken_back_without_saying_it_again(
    model: Model, base: Path, tmp_path: Path
) -> None:
    state, _ = adapted(model, OutFirst, SQUARE)
    torch.save(state, tmp_path / "lora.pt")
    out = tmp_path / "out"
    told = Told(alpha=ALPHA, product="AB")
    loratool.merge(base, tmp_path / "lora.pt", out, dtype="base", told=told, reversible=True)
    assert loratool.verify(out, base, tmp_path / "lora.pt").verdict == "yes"
    loratool.unmerge(out, tmp_path / "lora.pt", tmp_path / "back")
    back = load(tmp_path / "back")
    assert all(torch.equal(back[k], v) for k, v in model.state_dict().items())
    loratool.unmerge(out, tmp_path / "lora.pt", tmp_path / "less", subtract=True)
    assert_merged(load(tmp_path / "less"), model.state_dict(), {})


def test_other_verbs_know_what_multiplies(model: Model, base: Path, tmp_path: Path) -> None:
    state, computed = adapted(model, InputFirst, SEVERAL)
    file = tmp_path / "lora.pt"
    torch.save(state, file)
    told = Told(alpha=ALPHA)
    loratool.combine([file, file], tmp_path / "half", weights=[0.5, 0.5], told=told)
    found = tmp_path / "found"
    loratool.merge(base, tmp_path / "half", found, dtype="float32")
    assert_merged(load(found), model.state_dict(), computed)
    loratool.resize(file, tmp_path / "one", rank=1, told=told)
    report = loratool.compare([file, tmp_path / "half"], told=[told, Told()])
    assert report is not None


# --- the project's fixtures -----------------------------------------------------------------------

WRITTEN = ("hand", "loralib", "multiplicative")


@pytest.mark.parametrize("case", cases(*WRITTEN, merges=True), ids=lambda case: case.name)
def test_a_merge_adds_what_the_forward_pass_does(case: DialectCase, tmp_path: Path) -> None:
    told = Told.from_dict(case.options)
    loratool.merge(case.base, case.adapter, tmp_path / "out", dtype="float32", told=told)
    assert apart(added_to(case, tmp_path / "out"), case.expected()) < 1e-6


@pytest.mark.parametrize("case", cases(*WRITTEN, merges=False), ids=lambda case: case.name)
def test_what_cannot_be_known_is_refused(case: DialectCase, tmp_path: Path) -> None:
    with pytest.raises(LoraToolError):
        loratool.merge(case.base, case.adapter, tmp_path / "out", told=Told.from_dict(case.options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("product", ["BA", "AB", "ABt"])
@pytest.mark.parametrize("turned", [False, True])
def test_factors_are_arranged_for_every_reading(product: str, turned: bool, tmp_path: Path) -> None:
    """B'·A' of the arranged factors is the product that was meant, or its transpose for a table."""
    rng = np.random.default_rng(0)
    shapes = ((3, 5), (7, 3)) if product == "BA" else ((5, 3), (3, 7))
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    both = {"A": torch.from_numpy(a), "B": torch.from_numpy(b)}
    save_file(both, tmp_path / "x.safetensors")
    held = read_contents(Folder(tmp_path), "x.safetensors").tensors
    found = [
        one
        for one in readings(a.shape, b.shape, layers=False, lookup=turned)
        if one.product == product and one.turned == turned
    ]
    assert len(found) == 1
    new_a, new_b = (read_float32(info) for info in found[0].arranged(held["A"], held["B"]))
    right = b @ a if product == "BA" else a @ b
    right = right.T if (product == "ABt") != turned else right
    assert np.allclose(new_b @ new_a, right, atol=1e-6)
