"""Merging equals PEFT, layer kind by layer kind and option by option.

Where PEFT rounds the sum once, the merged weights must be PEFT's bit for bit. Where PEFT rounds the
delta before it adds it (embeddings, attention, BD-LoRA, MiCA), loratool still rounds once: its
output is held against that formula exactly, and against PEFT within one unit in the last place.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    DTYPES,
    Holder,
    State,
    Trained,
    close,
    differing,
    edit_config,
    float64_oracle,
    lora,
    once_rounded,
    read,
    read_json,
    shake,
    step,
    tiny_llama,
    token_ids,
    train,
    train_on_disk,
    ulps,
    write_adapter,
    write_base,
    write_json,
)
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    TrainableTokensConfig,
    get_peft_model,
)
from peft.tuners.lora.config import BdLoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

import loratool
from loratool.errors import AdapterError, BaseError, LoraToolError, MatchError

GPT2 = {"model_type": "gpt2"}


@dataclass(frozen=True)
class Case:
    """A model of one layer kind and the LoRA options to adapt it with."""

    make: Callable[[], nn.Module]
    targets: tuple[str, ...] = ("l",)
    options: dict[str, Any] = field(default_factory=dict)
    base_config: dict[str, Any] | None = None

    def train(self, folder: Path, dtype: torch.dtype = torch.float32) -> Trained:
        torch.manual_seed(0)
        config = lora(*self.targets, **self.options)
        return train(folder, self.make(), config, dtype, self.base_config)


def linear(inner: int, outer: int, **options: Any) -> Case:
    return Case(lambda: Holder(l=nn.Linear(inner, outer)), options=options)


def conv1d(inner: int, outer: int, **options: Any) -> Case:
    """The `Conv1D` of GPT-2, whose weight is stored [in, out]."""
    return Case(lambda: Holder(c_fc=Conv1D(outer, inner)), ("c_fc",), options, GPT2)


def embedding(tokens: int, width: int, **options: Any) -> Case:
    return Case(lambda: Holder(l=nn.Embedding(tokens, width)), options=options)


def layer(make: Callable[[], nn.Module], **options: Any) -> Case:
    return Case(lambda: Holder(l=make()), options=options)


def two_linear(**options: Any) -> Case:
    """Two layers of which only the first is a target."""
    return Case(lambda: Holder(l=nn.Linear(12, 20), z=nn.Linear(20, 6)), options=options)


DORA = {"use_dora": True}

ROUNDED_ONCE = {
    "linear-wide": linear(40, 24),
    "linear-tall": linear(24, 40),
    "linear-square": linear(32, 32),
    "linear-rank-1": linear(24, 40, r=1),
    "linear-rank-above-width": linear(8, 12, r=24),
    "linear-one-row": linear(17, 1),
    "linear-one-column": linear(1, 17),
    "linear-rslora": linear(24, 32, use_rslora=True),
    "linear-float-alpha": linear(24, 32, lora_alpha=6.5),
    "linear-float-alpha-rslora": linear(24, 32, lora_alpha=6.5, r=5, use_rslora=True),
    "linear-alpha-pattern": linear(24, 32, alpha_pattern={"l": 2.5}),
    "linear-lora-bias": linear(24, 32, lora_bias=True),
    "linear-lora-bias-rslora": linear(24, 32, lora_bias=True, use_rslora=True),
    "conv1d-wide": conv1d(40, 24),
    "conv1d-tall": conv1d(24, 40),
    "conv1d-square": conv1d(32, 32),
    "conv1d-rank-1": conv1d(24, 40, r=1),
    "conv1d-rank-above-width": conv1d(8, 12, r=24),
    "conv1d-lora-bias": conv1d(24, 40, lora_bias=True),
    "nn-conv1d": layer(lambda: nn.Conv1d(6, 8, 3)),
    "nn-conv2d": layer(lambda: nn.Conv2d(6, 8, 3)),
    "nn-conv2d-1x1": layer(lambda: nn.Conv2d(6, 8, 1)),
    "nn-conv2d-oblong": layer(lambda: nn.Conv2d(8, 6, (3, 5), stride=2, padding=1, dilation=2)),
    "nn-conv2d-lora-bias": layer(lambda: nn.Conv2d(6, 8, 3), lora_bias=True),
    "nn-conv3d": layer(lambda: nn.Conv3d(4, 6, (1, 2, 3))),
    "dora-linear-wide": linear(40, 24, **DORA),
    "dora-linear-tall": linear(24, 40, **DORA),
    "dora-linear-square": linear(32, 32, **DORA),
    "dora-linear-rslora": linear(24, 32, use_rslora=True, **DORA),
    "dora-conv1d-wide": conv1d(40, 24, **DORA),
    "dora-conv1d-tall": conv1d(24, 40, **DORA),
    "dora-conv1d-square": conv1d(32, 32, **DORA),
    "dora-embedding": embedding(50, 24, **DORA),
    "dora-embedding-square": embedding(24, 24, **DORA),
    "dora-nn-conv1d": layer(lambda: nn.Conv1d(6, 8, 3), **DORA),
    "dora-nn-conv2d": layer(lambda: nn.Conv2d(6, 8, 3), **DORA),
    "dora-nn-conv3d": layer(lambda: nn.Conv3d(4, 6, (1, 2, 3)), **DORA),
    "bias-all": two_linear(bias="all"),
    "bias-lora-only": two_linear(bias="lora_only"),
    "modules-to-save": two_linear(modules_to_save=["z"]),
}


#: Where PEFT adds up in another order: it convolves the factors of convolutions, and takes norms
#: over stored columns at once. In float32, where nothing is rounded away, that shows.
ORDER_SHOWS = ("nn-conv", "dora-nn-conv", "dora-conv1d", "dora-embedding", "conv1d-rank-above")
#: Norms over stored columns reach a float16 or bfloat16 result where it lies on a tie.
COLUMN_NORMS = ("dora-conv1d", "dora-embedding")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROUNDED_ONCE)
def test_layer_merges_to_pefts_bits(name: str, dtype: str, tmp_path: Path) -> None:
    """Layers whose sum PEFT rounds once merge to the very bytes of PEFT's merge."""
    trained = ROUNDED_ONCE[name].train(tmp_path, DTYPES[dtype])
    found, peft = trained.merge(), trained.peft_merge()
    assert differing(found, trained.base_state()), "the adapter changed nothing"
    assert found.keys() == peft.keys()
    if dtype == "float32" and name.startswith(ORDER_SHOWS):
        assert all(close(found[key], peft[key], 1e-6) for key in peft)
    elif name.startswith(COLUMN_NORMS):
        for key in peft:
            steps = ulps(found[key], peft[key])
            assert int(steps.max()) <= 1
            assert int((steps > 0).sum()) <= steps.numel() // 200
    else:
        assert differing(found, peft) == {}


@pytest.mark.parametrize("kind", ["all", "lora_only"])
def test_trained_biases_replace_those_of_the_base(kind: str, tmp_path: Path) -> None:
    """bias="all" replaces every bias, bias="lora_only" only those of adapted layers."""
    trained = two_linear(bias=kind).train(tmp_path)
    changed = differing(trained.merge(), trained.base_state()).keys()
    expected = {"l.weight", "l.bias"} | ({"z.bias"} if kind == "all" else set())
    assert changed == expected


def test_square_conv1d_is_not_taken_for_linear(tmp_path: Path) -> None:
    """The same square weights merge differently as GPT-2's Conv1D and as a linear layer."""
    trained = conv1d(16, 16).train(tmp_path)
    as_conv1d = trained.merge()["c_fc.weight"]
    write_json(trained.base / "config.json", {"model_type": "llama"})
    as_linear = trained.merge(tmp_path / "linear")["c_fc.weight"]
    weight = trained.base_state()["c_fc.weight"]
    assert close(as_conv1d - weight, (as_linear - weight).T, 1e-5)
    assert not torch.equal(as_conv1d, as_linear)


def test_conv1d_of_a_base_without_config_follows_fan_in_fan_out(tmp_path: Path) -> None:
    """Without config.json a rectangular Conv1D merges right, a square one is refused."""
    for inner, outer in ((24, 40), (32, 32)):
        case = Case(lambda i=inner, o=outer: Holder(c_fc=Conv1D(o, i)), ("c_fc",))
        trained = case.train(tmp_path / str(outer))
        if inner == outer:
            with pytest.raises(BaseError, match="square"):
                trained.merge()
        else:
            assert differing(trained.merge(), trained.peft_merge()) == {}


# Layers where PEFT rounds the delta to the weight's dtype before it adds it.


def linear_delta(adapter: State, scale: float) -> dict[str, torch.Tensor]:
    return {"l.weight": scale * (adapter["l.lora_B.weight"] @ adapter["l.lora_A.weight"])}


def embedding_delta(adapter: State, scale: float) -> dict[str, torch.Tensor]:
    product = adapter["l.lora_embedding_B"] @ adapter["l.lora_embedding_A"]
    return {"l.weight": scale * product.T}


def attention_delta(adapter: State, scale: float) -> dict[str, torch.Tensor]:
    """PEFT's forward pass applies the delta of the output projection twice."""
    inner = {k.replace("l.base_layer.out_proj", "l"): v for k, v in adapter.items() if "out" in k}
    outer = {k: v for k, v in adapter.items() if "out_proj" not in k}
    return {
        "l.in_proj_weight": linear_delta(outer, scale)["l.weight"],
        "l.out_proj.weight": linear_delta(inner, 2 * scale)["l.weight"],
    }


def block_delta(side: str) -> Callable[[State, float], dict[str, torch.Tensor]]:
    """Two blocks on the diagonal of one factor, stored one above the other."""

    def delta(adapter: State, scale: float) -> dict[str, torch.Tensor]:
        key = f"l.lora_{side}.weight"
        return linear_delta({**adapter, key: torch.block_diag(*adapter[key].chunk(2))}, scale)

    return delta


def attention(**options: Any) -> Case:
    return layer(lambda: nn.MultiheadAttention(16, 2), lora_alpha=1, **options)


BLOCKS_A = BdLoraConfig(target_modules_bd_a=["l"], nblocks=2)
BLOCKS_B = BdLoraConfig(target_modules_bd_b=["l"], nblocks=2)

Delta = Callable[[State, float], dict[str, torch.Tensor]]

#: Case, scale and the deltas by tensor.
ROUNDED_TWICE: dict[str, tuple[Case, float, Delta]] = {
    "embedding-tall": (embedding(50, 24, lora_alpha=1), 1 / 4, embedding_delta),
    "embedding-wide": (embedding(24, 50, lora_alpha=1), 1 / 4, embedding_delta),
    "embedding-square": (embedding(24, 24, lora_alpha=1), 1 / 4, embedding_delta),
    "embedding-rank-1": (embedding(50, 24, r=1, lora_alpha=0.5), 0.5, embedding_delta),
    "embedding-rslora": (embedding(50, 24, lora_alpha=1, use_rslora=True), 0.5, embedding_delta),
    "attention": (attention(), 1 / 4, attention_delta),
    "attention-rslora": (attention(use_rslora=True), 1 / 2, attention_delta),
    "attention-patterns": (
        attention(rank_pattern={"l": 2}, alpha_pattern={"l": 3}), 3 / 2, attention_delta,
    ),
    "bdlora-a": (linear(24, 32, use_bdlora=BLOCKS_A), 6 / 4, block_delta("A")),
    "bdlora-b": (linear(24, 32, use_bdlora=BLOCKS_B), 6 / 4, block_delta("B")),
    "mica": (linear(24, 32, init_lora_weights="mica"), 6 / 4, linear_delta),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROUNDED_TWICE)
def test_layer_is_rounded_once_where_peft_rounds_twice(
    name: str, dtype: str, tmp_path: Path
) -> None:
    """Layers whose delta PEFT rounds first are still rounded once, one unit from PEFT at most."""
    case, scale, formula = ROUNDED_TWICE[name]
    trained = case.train(tmp_path, DTYPES[dtype])
    found, peft, base = trained.merge(), trained.peft_merge(), trained.base_state()
    adapter = {k.removeprefix("base_model.model."): v for k, v in read(trained.adapter).items()}
    deltas = formula(adapter, scale)
    expected = {**base, **{k: once_rounded(base[k], d) for k, d in deltas.items()}}
    assert differing(found, expected) == {}
    assert found.keys() == peft.keys()
    for key in found:
        # A unit of the largest summand: where W and delta cancel, those of the sum are finer.
        unit = step(torch.maximum(base[key].abs(), peft[key].abs()).maximum(
            deltas.get(key, torch.zeros(())).abs()), DTYPES[dtype])  # fmt: skip
        assert bool(((found[key].double() - peft[key].double()).abs() <= unit).all()), key


# Ranks and alphas of single modules.


def nested(*paths: str) -> nn.Module:
    """Linear layers under dotted paths, as deep as a transformer's."""
    root = Holder()
    for path in paths:
        *folders, leaf = path.split(".")
        place: nn.Module = root
        for name in folders:
            if name not in dict(place.named_children()):
                place.add_module(name, Holder())
            place = place.get_submodule(name)
        place.add_module(leaf, nn.Linear(12, 20))
    return root


ATTENTION = "model.layers.10.self_attn."
#: Whether a pattern means `model.layers.10.self_attn.q_proj`.
PATTERNS = {
    "q_proj": True,
    "10.self_attn.q_proj": True,
    "model.layers.10.self_attn.q_proj": True,
    "^model.layers.10.self_attn.q_proj": True,
    "q_proj|v_proj": True,
    "v_proj|q_proj": True,
    "layers.1.*": True,
    ".*": True,
    r"model\.layers\.\d+\.self_attn\.q_proj": True,
    "proj": False,
    "^q_proj": False,
    "layers.10": False,
    "1.self_attn.q_proj": False,
    "base_model.model.model.layers.10.self_attn.q_proj": False,
}


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
@pytest.mark.parametrize("key", PATTERNS)
def test_rank_and_alpha_patterns_mean_the_modules_that_peft_means(key: str, tmp_path: Path) -> None:
    """A key of rank_pattern or alpha_pattern is a regular expression for a dot-aligned suffix."""
    names = (f"{ATTENTION}q_proj", f"{ATTENTION}v_proj", "model.layers.1.self_attn.q_proj")
    for options in ({"rank_pattern": {key: 3}}, {"alpha_pattern": {key: 20}}):
        folder = tmp_path / next(iter(options))
        trained = train(folder, nested(*names), lora("q_proj", "v_proj", **options))
        module = trained.model.get_submodule(f"base_model.model.{names[0]}")
        met = module.r["default"] == 3 or module.lora_alpha["default"] == 20
        assert met == PATTERNS[key], "PEFT itself reads this pattern differently"
        assert differing(trained.merge(), trained.peft_merge()) == {}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_rank_and_alpha_are_looked_up_independently(use_rslora: bool, tmp_path: Path) -> None:
    """A module takes its rank from one pattern and its alpha from another, the first that fits."""
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qk"]
    config = lora(
        "q_proj", "k_proj",
        rank_pattern={"0.self_attn.q_proj": 2, "q_proj": 5},
        alpha_pattern={"layers.1.*": 11, "q_proj": 3, ".*q_proj": 99},
        use_rslora=use_rslora,
    )  # fmt: skip
    # PEFT saves tables in alphabetical order, and that order decides for who reads them.
    config.alpha_pattern = dict(sorted(config.alpha_pattern.items()))
    trained = train(tmp_path, nested(*names), config)
    assert differing(trained.merge(), trained.peft_merge()) == {}


# Several adapters.


def write_adapters(folder: Path, case: Case, *options: dict[str, Any]) -> list[Path]:
    """One adapter per table of options, all for the base of `case` in folder/base."""
    torch.manual_seed(0)
    model = case.make()
    write_base(folder / "base", model, case.base_config)
    found = []
    for i, changes in enumerate(options):
        torch.manual_seed(10 + i)
        config = lora(*case.targets, **{**case.options, **changes})
        write_adapter(folder / f"adapter-{i}", copy.deepcopy(model), config)
        found.append(folder / f"adapter-{i}")
    return found


def plain_adapter(folder: Path) -> State:
    return {k.removeprefix("base_model.model."): v for k, v in read(folder).items()}


@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, -1.3, 2.0], [0.0, 0.5, -0.5]])
def test_weighted_sum_of_adapters_is_rounded_once(
    weights: list[float], base_dtype: str, tmp_path: Path
) -> None:
    """Several adapters of unlike rank and alpha add up with their weights, of either sign."""
    case = Case(lambda: Holder(l=nn.Linear(64, 96)).to(DTYPES[base_dtype]))
    settings = [(4, 6), (1, 2.5), (9, 3)]
    adapters = write_adapters(
        tmp_path, case, *({"r": rank, "lora_alpha": alpha} for rank, alpha in settings)
    )
    out = tmp_path / "out"
    loratool.merge(tmp_path / "base", adapters, out, weights=weights, dtype="float16")
    terms = []
    for weight, (rank, alpha), folder in zip(weights, settings, adapters, strict=True):
        file = plain_adapter(folder)
        terms.append((weight * alpha / rank, file["l.lora_B.weight"], file["l.lora_A.weight"]))
    expected = float64_oracle(read(tmp_path / "base")["l.weight"], terms, "float16")
    steps = ulps(read(out)["l.weight"], expected)
    # float32 sums may fall on the other side of a tie, in which no one element is special.
    assert int(steps.max()) <= 1
    assert int((steps > 0).sum()) <= max(1, steps.numel() // 1000)


def test_weights_scale_trained_biases_too(tmp_path: Path) -> None:
    """The bias that lora_bias trains is added with the adapter's scale and weight."""
    adapters = write_adapters(tmp_path, linear(8, 6, lora_bias=True), {}, {"use_rslora": True})
    out = tmp_path / "out"
    loratool.merge(tmp_path / "base", adapters, out, weights=[0.5, -2.0], dtype="float32")
    one, other = (plain_adapter(folder)["l.lora_B.bias"] for folder in adapters)
    expected = read(tmp_path / "base")["l.bias"] + 0.5 * 6 / 4 * one - 2.0 * 6 / 2 * other
    assert close(read(out)["l.bias"], expected, 1e-6)


SEVERAL = {
    "two-dora": ({"use_dora": True}, {"use_dora": True, "r": 3}),
    "dora-and-plain": ({"use_dora": True}, {}),
    "plain-and-dora": ({"r": 3}, {"use_dora": True}),
    "three": ({"use_dora": True}, {"r": 3}, {"use_dora": True, "use_rslora": True}),
}

INPUTS = {
    "linear": (linear(12, 20), torch.randn(5, 12, generator=torch.Generator().manual_seed(0))),
    "conv1d": (conv1d(12, 20), torch.randn(5, 12, generator=torch.Generator().manual_seed(0))),
    "embedding": (embedding(30, 8), torch.arange(30)),
    "conv2d": (
        layer(lambda: nn.Conv2d(6, 8, 3)),
        torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(0)),
    ),
}


@pytest.mark.parametrize("weights", [None, [0.6, -1.4, 0.3]], ids=["plain", "weighted"])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", SEVERAL)
def test_several_adapters_with_dora_equal_pefts_forward_pass(
    name: str, kind: str, weights: list[float] | None, tmp_path: Path
) -> None:
    """DoRA beside other adapters gives the function of PEFT's forward pass with all of them."""
    case, x = INPUTS[kind]
    adapters = write_adapters(tmp_path, case, *SEVERAL[name])
    weights = weights and weights[: len(adapters)]
    loratool.merge(tmp_path / "base", adapters, tmp_path / "out", weights=weights, dtype="float32")
    with torch.no_grad():
        expected = all_active(case, tmp_path / "base", adapters, weights)(x)
        found = from_state(case, read(tmp_path / "out"))(x)
        base = from_state(case, read(tmp_path / "base"))(x)
    assert close(found, expected, 1e-5)
    assert not close(base, expected, 1e-2)


def from_state(case: Case, state: State) -> nn.Module:
    model = case.make()
    model.load_state_dict(state)
    return model.eval()


def all_active(
    case: Case, base: Path, adapters: list[Path], weights: list[float] | None
) -> nn.Module:
    """PEFT's model with all adapters active at once, each scaled with its weight."""
    model = PeftModel.from_pretrained(from_state(case, read(base)), adapters[0], "0")
    for i, folder in enumerate(adapters[1:], 1):
        model.load_adapter(folder, str(i))
    names = [str(i) for i in range(len(adapters))]
    model.base_model.set_adapter(names)
    for name, weight in zip(names, weights or [], strict=False):
        model.get_submodule(f"base_model.model.{case.targets[0]}").set_scale(name, weight)
    return model.eval()


# The same adapter and base, written in other ways.


@pytest.fixture(scope="module")
def dora_llama(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """An adapter with every kind of key: factors, magnitudes, embedding factors, a saved head."""
    config = lora("q_proj", "down_proj", "embed_tokens", use_dora=True, modules_to_save=["lm_head"])
    trained = train_on_disk(tmp_path_factory.mktemp("llama"), tiny_llama(), config)
    trained.merge()
    return trained


def adapter_name_in_keys(key: str) -> str:
    """As a raw state dict has them."""
    for leaf in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
        key = key.replace(f".{leaf}", f".{leaf}.default")
    key = key.replace(".lora_magnitude_vector", ".lora_magnitude_vector.default.weight")
    return key.replace(".lm_head.", ".lm_head.modules_to_save.default.")


KEY_VARIANTS: dict[str, Callable[[str], str]] = {
    "adapter-name": adapter_name_in_keys,
    "magnitude-weight": lambda k: k.replace("_vector", "_vector.weight"),
    "no-prefix": lambda k: k.removeprefix("base_model.model."),
    "no-prefix-adapter-name": lambda k: adapter_name_in_keys(k).removeprefix("base_model.model."),
    "compiled": lambda k: f"_orig_mod.{k}",
    "compiled-inside": lambda k: k.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled-layers": lambda k: k.replace(".self_attn.", "._orig_mod.self_attn."),
    "distributed": lambda k: f"module.{k}",
    "fsdp": lambda k: f"_fsdp_wrapped_module.{k}",
    "fsdp-layers": lambda k: k.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "fsdp-compiled": lambda k: f"_fsdp_wrapped_module._orig_mod.{k}",
    "distributed-compiled": lambda k: f"module._orig_mod.{k}",
    "compiled-distributed": lambda k: f"_orig_mod.module.{k}",
}


@pytest.mark.parametrize("name", KEY_VARIANTS)
def test_training_prefixes_and_adapter_names_change_nothing(
    name: str, dora_llama: Trained, tmp_path: Path
) -> None:
    """Keys with training frameworks' prefixes or the adapter's name give the same output bytes."""
    adapter = shutil.copytree(dora_llama.adapter, tmp_path / "adapter")
    tensors = read(adapter)
    renamed = {KEY_VARIANTS[name](key): value for key, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, adapter / "adapter_model.safetensors")
    Trained(dora_llama.base, adapter, dora_llama.model).merge(tmp_path / "out")
    plain = dora_llama.base.parent / "merged"
    assert digest(tmp_path / "out") == digest(plain)


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_torch_adapter_equals_safetensors(dora_llama: Trained, tmp_path: Path) -> None:
    """An adapter_model.bin merges to the same output bytes."""
    adapter = shutil.copytree(dora_llama.adapter, tmp_path / "adapter")
    torch.save(read(adapter), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    loratool.merge(dora_llama.base, adapter, tmp_path / "out", dtype="base")
    assert digest(tmp_path / "out") == digest(dora_llama.base.parent / "merged")


def test_one_adapter_file_equals_its_directory(dora_llama: Trained, tmp_path: Path) -> None:
    """An adapter may be named by its weights file, a base too."""
    weights = dora_llama.adapter / "adapter_model.safetensors"
    base = dora_llama.base / "model.safetensors"
    loratool.merge(base, weights, tmp_path / "out", dtype="base")
    assert digest(tmp_path / "out") == digest(dora_llama.base.parent / "merged")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_form_of_the_base_changes_nothing(
    shards: int, suffix: str, dora_llama: Trained, tmp_path: Path
) -> None:
    """A base in one file or in shards, of safetensors or of torch, merges to the same tensors."""
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy(dora_llama.base / "config.json", base)
    write_shards(dora_llama.base_state(), base, shards, suffix)
    loratool.merge(base, dora_llama.adapter, tmp_path / "out", dtype="base")
    assert differing(read(tmp_path / "out"), read(dora_llama.base.parent / "merged")) == {}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == shards
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert same_logits(model, dora_llama.model)


def write_shards(state: State, folder: Path, count: int, suffix: str) -> None:
    """Deal the tensors out to `count` files, with an index if there are several."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {}
    for i in range(count):
        name = f"{stem}-{i + 1:05d}-of-{count:05d}.{suffix}" if count > 1 else f"{stem}.{suffix}"
        part = {k: state[k] for k in sorted(state)[i::count]}
        if suffix == "bin":
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    if count > 1:
        write_json(folder / f"{stem}.{suffix}.index.json", {"weight_map": weight_map})


def same_logits(
    model: nn.Module, expected: nn.Module, vocabulary: int = 48, tolerance: float = 1e-5
) -> bool:
    """True if two models give the same logits for the same tokens."""
    ids = token_ids(vocabulary)
    with torch.no_grad():
        wanted = expected(input_ids=ids).logits
        return close(model(input_ids=ids).logits, wanted, tolerance)


# Vocabulary: token rows, resizing, tied matrices.


def merged_model(trained: Trained, auto: type = AutoModelForCausalLM) -> PreTrainedModel:
    out = trained.base.parent / "merged"
    trained.merge(out, dtype="float32")
    model: PreTrainedModel = auto.from_pretrained(out, dtype=torch.float32).eval()
    return model


TOKEN_ROWS: dict[str, list[int] | dict[str, list[int]]] = {
    "list": [7, 3, 11],
    "dict": {"embed_tokens": [40, 3, 4, 5]},
    "dict-path": {"model.embed_tokens": [40, 3]},
    "head-alike": {"embed_tokens": [9, 4], "lm_head": [9, 4]},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", TOKEN_ROWS)
def test_trained_token_rows_replace_those_of_the_embedding(
    name: str, tied: bool, tmp_path: Path
) -> None:
    """trainable_token_indices replaces rows in the config's order, in a tied head as PEFT does."""
    setting = TOKEN_ROWS[name]
    llama = tiny_llama(tie_word_embeddings=tied)
    trained = train_on_disk(tmp_path, llama, lora("q_proj", trainable_token_indices=setting))
    assert same_logits(merged_model(trained), trained.model)
    found, base = read(tmp_path / "merged"), trained.base_state()
    rows = (found["model.embed_tokens.weight"] != base["model.embed_tokens.weight"]).any(dim=1)
    wanted = setting if isinstance(setting, list) else next(iter(setting.values()))
    assert rows.nonzero().flatten().tolist() == sorted(wanted)


def test_trained_token_rows_of_the_head_alone(tmp_path: Path) -> None:
    """Rows of an output head of its own are replaced there and nowhere else."""
    rows = {"embed_tokens": [9, 4], "lm_head": [5]}
    trained = train_on_disk(tmp_path, tiny_llama(), lora("q_proj", trainable_token_indices=rows))
    assert same_logits(merged_model(trained), trained.model)


def test_trained_token_rows_reach_a_tied_head_that_is_adapted(tmp_path: Path) -> None:
    """PEFT ties trained rows to a tied head, also where LoRA adapts that head."""
    config = lora("q_proj", "lm_head", trainable_token_indices=[5, 7])
    trained = train_on_disk(tmp_path, tiny_llama(tie_word_embeddings=True), config)
    assert same_logits(merged_model(trained), trained.model)


def test_trained_token_rows_in_a_half_precision_base(tmp_path: Path) -> None:
    """Token rows in a bfloat16 embedding are PEFT's, bit for bit."""
    case = Case(
        lambda: Holder(embed_tokens=nn.Embedding(30, 8), l=nn.Linear(8, 8)),
        options={"trainable_token_indices": {"embed_tokens": [4, 2, 29]}},
    )
    trained = case.train(tmp_path, torch.bfloat16)
    assert differing(trained.merge(), trained.peft_merge()) == {}


def test_adapter_of_trained_tokens_alone(tmp_path: Path) -> None:
    """An adapter of PEFT's trainable-tokens type, without any low-rank part, merges too."""
    config = TrainableTokensConfig(token_indices=[5, 3], target_modules=["embed_tokens"])
    trained = train_on_disk(tmp_path, tiny_llama(), config)
    assert same_logits(merged_model(trained), trained.model)
    assert differing(read(tmp_path / "merged"), trained.base_state())


RESIZED = {
    "lora-elsewhere": lora("q_proj"),
    "lora-on-both": lora("q_proj", "embed_tokens", "lm_head"),
    "modules-to-save": lora("q_proj", modules_to_save=["embed_tokens", "lm_head"]),
    "token-rows": lora("q_proj", trainable_token_indices=[40, 3, 46]),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("size", [47, 64])
@pytest.mark.parametrize("name", RESIZED)
def test_resized_vocabulary_is_carried_over(
    name: str, size: int, tied: bool, tmp_path: Path
) -> None:
    """An embedding that grew or lost its padding replaces the base's, and config.json follows."""
    trained = train_resized(tmp_path, size, tied, copy.deepcopy(RESIZED[name]))
    model = merged_model(trained)
    assert same_logits(model, trained.model, min(size, 48))
    assert read_json(tmp_path / "merged" / "config.json")["vocab_size"] == size
    assert model.get_input_embeddings().weight.shape[0] == size
    assert model.get_output_embeddings().weight.shape[0] == size


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_one_resized_and_adapted_matrix_of_two_tied_ones(target: str, tmp_path: Path) -> None:
    """The other of two tied matrices is resized along, but has no part in the delta."""
    trained = train_resized(tmp_path, 53, True, lora("q_proj", target))
    assert same_logits(merged_model(trained), trained.model)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_resized_vocabulary_that_was_saved_by_half_is_refused(target: str, tmp_path: Path) -> None:
    """If embedding and head would end with unlike vocabularies, nothing loads; so no merge."""
    # PEFT saves only the one that LoRA adapts, and loses the other.
    trained = train_resized(tmp_path, 53, False, lora("q_proj", target))
    refuse(trained, LoraToolError, "rows|vocab")


def train_resized(folder: Path, size: int, tied: bool, config: LoraConfig) -> Trained:
    """Adapt a model whose vocabulary was resized after its base was written."""
    base, adapter = folder / "base", folder / "adapter"
    tiny_llama(tie_word_embeddings=tied).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    model.resize_token_embeddings(size)
    adapted = get_peft_model(model, config)
    shake(adapted)
    adapted.save_pretrained(adapter)
    return Trained(base, adapter, adapted.eval())


#: Options, and whether one matrix can still serve as embedding and head.
TIED: dict[str, tuple[LoraConfig, bool]] = {
    "neither": (lora("q_proj"), True),
    "embedding": (lora("q_proj", "embed_tokens"), False),
    "embedding-dora": (lora("q_proj", "embed_tokens", use_dora=True), False),
    "head": (lora("q_proj", "lm_head"), False),
    "both": (lora("embed_tokens", "lm_head"), False),
    "saved-embedding": (lora("q_proj", modules_to_save=["embed_tokens"]), False),
    "saved-head": (lora("q_proj", modules_to_save=["lm_head"]), False),
    "ensure-lora": (lora("q_proj", "embed_tokens", ensure_weight_tying=True), True),
    # Magnitudes belong to one dimension of the embedding and to the other one of the head.
    "ensure-dora": (
        lora("q_proj", "embed_tokens", use_dora=True, ensure_weight_tying=True), False,
    ),
    "ensure-both": (lora("embed_tokens", "lm_head", ensure_weight_tying=True), True),
    "ensure-saved": (
        lora("q_proj", modules_to_save=["embed_tokens"], ensure_weight_tying=True), True,
    ),
    "ensure-rows": (
        lora("q_proj", trainable_token_indices=[3, 9], ensure_weight_tying=True), True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TIED)
def test_tied_matrices_keep_pefts_function(name: str, tmp_path: Path) -> None:
    """A tied model gives the logits of PEFT's forward pass, and stays tied where it can."""
    config, stays_tied = TIED[name]
    trained = train_on_disk(tmp_path, tiny_llama(tie_word_embeddings=True), copy.deepcopy(config))
    assert "lm_head.weight" not in trained.base_state()
    model = merged_model(trained)
    assert same_logits(model, trained.model)
    assert read_json(tmp_path / "merged" / "config.json")["tie_word_embeddings"] == stays_tied
    assert ("lm_head.weight" in read(tmp_path / "merged")) != stays_tied


@pytest.mark.parametrize("name", TIED)
def test_tied_matrices_that_are_both_on_disk(name: str, tmp_path: Path) -> None:
    """A tied base whose file holds the head as a copy gives PEFT's logits all the same."""
    config, stays_tied = TIED[name]
    trained = train_on_disk(tmp_path, tiny_llama(tie_word_embeddings=True), copy.deepcopy(config))
    state = trained.base_state()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, trained.base / "model.safetensors", {"format": "pt"})
    model = merged_model(trained)
    assert same_logits(model, trained.model)
    found = read(tmp_path / "merged")
    alike = torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert alike == stays_tied
    assert read_json(tmp_path / "merged" / "config.json")["tie_word_embeddings"] == stays_tied


# Heads that the base lacks.


@pytest.mark.parametrize("saved", [None, ["score"]], ids=["automatic", "named"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_classification_head_that_the_base_lacks_is_added(
    saved: list[str] | None, tied: bool, tmp_path: Path
) -> None:
    """A classifier trained on a language model gives a loadable classifier with its labels."""
    trained = train_head(
        tmp_path, AutoModelForSequenceClassification, "SEQ_CLS", tied, modules_to_save=saved
    )
    model = merged_model(trained, AutoModelForSequenceClassification)
    assert same_logits(model, trained.model)
    config = read_json(tmp_path / "merged" / "config.json")
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert model.config.num_labels == 5
    assert len(config["id2label"]) == 5


def test_token_classification_head_that_the_base_lacks_is_added(tmp_path: Path) -> None:
    """A tagger trained on a language model loads as a tagger, with the bias of its head."""
    trained = train_head(tmp_path, AutoModelForTokenClassification, "TOKEN_CLS", False)
    model = merged_model(trained, AutoModelForTokenClassification)
    assert same_logits(model, trained.model)
    assert model.config.num_labels == 5


def test_biases_and_a_new_head_are_saved_by_one_adapter(tmp_path: Path) -> None:
    """bias="all" with a trained head, of which PEFT also writes an untrained copy, merges."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_llama(attention_bias=True).save_pretrained(base)
    torch.manual_seed(1)
    model = AutoModelForTokenClassification.from_pretrained(base, num_labels=5)
    config = lora("q_proj", task_type="TOKEN_CLS", bias="all")
    trained = Trained(base, adapter, write_adapter(adapter, model.float(), config))
    assert any("original_module" in key for key in read(adapter))
    assert same_logits(merged_model(trained, AutoModelForTokenClassification), trained.model)


def train_head(folder: Path, auto: type, task: str, tied: bool, **options: Any) -> Trained:
    base, adapter = folder / "base", folder / "adapter"
    tiny_llama(tie_word_embeddings=tied).save_pretrained(base)
    torch.manual_seed(1)
    model = auto.from_pretrained(base, num_labels=5, dtype=torch.float32)
    config = lora("q_proj", "v_proj", task_type=task, **options)
    adapted = get_peft_model(model, config)
    shake(adapted)
    adapted.save_pretrained(adapter)
    return Trained(base, adapter, adapted.eval())


# What cannot be merged honestly.


def refuse(trained: Trained, error: type[LoraToolError], reason: str) -> None:
    """Merging raises `error` for this reason and leaves nothing behind."""
    before = sorted(trained.base.parent.iterdir())
    with pytest.raises(error, match=reason) as caught:
        trained.merge()
    assert sorted(trained.base.parent.iterdir()) == before
    assert caught.value.hint


REFUSED_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "target_parameters": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
    "layer_replication": ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "arrow": ({"arrow_config": {"top_k": 3}}, "arrow_config"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "kasa": ({"kasa_config": {"beta": 0.1}}, "kasa_config"),
    "enable_lora": ({"enable_lora": [True, False, True]}, "enable_lora"),
    **{
        init: ({"init_lora_weights": init}, f"init_lora_weights='{init}'")
        for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "PiSSA")
    },
    "unknown-field": ({"use_novel_scaling": True}, "use_novel_scaling"),
    "unknown-number": ({"delta_gain": 2.0}, "delta_gain"),
    "wrong-rank": ({"r": 5}, "rank"),
    "pattern-rank": ({"rank_pattern": {"l": 3}}, "rank"),
    "dora-without-magnitude": ({"use_dora": True}, "magnitude"),
    "alpha-is-text": ({"lora_alpha": "16"}, "lora_alpha"),
    "rank-is-zero": ({"r": 0}, "rank"),
}


@pytest.mark.parametrize("name", REFUSED_FIELDS)
def test_config_that_rules_out_a_merge_is_refused(name: str, tmp_path: Path) -> None:
    """Settings under which W + scale·B·A is not the model are refused by name."""
    changes, reason = REFUSED_FIELDS[name]
    trained = linear(12, 20).train(tmp_path)
    edit_config(trained.adapter, **changes)
    refuse(trained, AdapterError, reason)


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_unknown_field_that_is_empty_is_no_obstacle(value: Any, tmp_path: Path) -> None:
    """A field of a later PEFT that is switched off does not stop a merge."""
    trained = linear(12, 20).train(tmp_path)
    edit_config(trained.adapter, use_novel_scaling=value)
    assert differing(trained.merge(), trained.peft_merge()) == {}


OTHER_TYPES = {
    "ia3": (IA3Config(target_modules=["l"], feedforward_modules=[]), "IA"),
    "adalora": (AdaLoraConfig(target_modules=["l"], total_step=10, init_r=4), "AdaLoRA"),
}


@pytest.mark.parametrize("name", OTHER_TYPES)
def test_other_peft_types_are_refused_by_name(name: str, tmp_path: Path) -> None:
    """(IA)³ and AdaLoRA adapters are not merged as if they were LoRA."""
    config, reason = OTHER_TYPES[name]
    trained = train(tmp_path, Holder(l=nn.Linear(12, 20)), copy.deepcopy(config))
    refuse(trained, AdapterError, reason)


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convolution_is_refused(groups: int, tmp_path: Path) -> None:
    """PEFT's adapter of a grouped convolution mixes groups, so no merged weight exists."""
    case = layer(lambda: nn.Conv2d(8, 8, 3, groups=groups))
    refuse(case.train(tmp_path), LoraToolError, "grouped convolution")


class Experts(nn.Module):
    """A stack of experts in one bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 8, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("eoi,bi->bo", self.stack, x)


def test_adapted_parameters_are_refused(tmp_path: Path) -> None:
    """An adapter that PEFT trained with target_parameters is refused, config or not."""
    config = lora(target_parameters=["experts.stack"])
    trained = train(tmp_path, Holder(experts=Experts()), config)
    refuse(trained, AdapterError, "target_parameters")
    edit_config(trained.adapter, target_parameters=None)
    refuse(trained, LoraToolError, "parameter")


def edit_adapter(trained: Trained, change: Callable[[State], State]) -> None:
    path = trained.adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def edit_base(trained: Trained, change: Callable[[State], State]) -> None:
    path = trained.base / "model.safetensors"
    save_file(change(load_file(path)), path)


@pytest.mark.parametrize("empty", [torch.zeros(0), torch.zeros(0, 12)], ids=["1-d", "2-d"])
def test_ungathered_factors_are_refused(empty: torch.Tensor, tmp_path: Path) -> None:
    """The empty factors that ZeRO-3 leaves when shards were not gathered are refused."""
    trained = linear(12, 20).train(tmp_path)
    edit_adapter(trained, lambda state: {key: empty.clone() for key in state})
    refuse(trained, AdapterError, "ZeRO-3")


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    """A lora_A without its lora_B is never dropped in silence."""
    trained = linear(12, 20).train(tmp_path)
    edit_adapter(trained, lambda s: {k: v for k, v in s.items() if "lora_B" not in k})
    refuse(trained, AdapterError, "partner")


QUANTISED_CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "bitsandbytes": {"quantization_config": {"load_in_4bit": True}},
    "text-config": {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
}


@pytest.mark.parametrize("name", QUANTISED_CONFIGS)
def test_base_whose_config_says_quantised_is_refused(name: str, tmp_path: Path) -> None:
    """A base with a quantization_config is refused even if its tensors look plain."""
    trained = linear(12, 20).train(tmp_path)
    write_json(trained.base / "config.json", QUANTISED_CONFIGS[name])
    refuse(trained, BaseError, "quantised")


PACKED = {
    "l.qweight": torch.zeros(4, 4, dtype=torch.int32),
    "l.weight_scale": torch.ones(4),
    "l.SCB": torch.ones(4),
    "l.weight.absmax": torch.ones(4),
    "l.weight_packed": torch.zeros(4, 4, dtype=torch.int32),
    "z.weight": torch.zeros(4, 4, dtype=torch.uint8),
    "f.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn),
}


@pytest.mark.parametrize("name", PACKED)
def test_base_with_packed_weights_is_refused(name: str, tmp_path: Path) -> None:
    """Packed weights and their scales are recognised without any config."""
    trained = linear(12, 20).train(tmp_path)
    edit_base(trained, lambda state: {**state, name: PACKED[name]})
    refuse(trained, BaseError, "quantised")


def test_trained_bias_without_a_bias_in_the_base_is_refused(tmp_path: Path) -> None:
    """lora_bias needs a bias to add to; one is neither invented nor dropped."""
    trained = linear(12, 20, lora_bias=True).train(tmp_path)
    edit_base(trained, lambda state: {"l.weight": state["l.weight"]})
    refuse(trained, MatchError, "bias")


@pytest.mark.parametrize("shape", [(20, 13), (21, 12), (12, 20), (240,), (20, 12, 1)])
def test_base_of_another_shape_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    """A base whose matrix does not have the shape of B·A is refused, transposed too."""
    trained = linear(12, 20).train(tmp_path)
    edit_base(trained, lambda state: {**state, "l.weight": torch.zeros(shape)})
    refuse(trained, MatchError, "do not fit")


def test_module_that_the_base_lacks_is_refused(tmp_path: Path) -> None:
    """An adapted module without a place in the base stops the merge, however many others fit."""
    trained = two_linear().train(tmp_path)
    other = {"base_model.model.l2.lora_A.weight": torch.zeros(4, 12),
             "base_model.model.l2.lora_B.weight": torch.zeros(20, 4)}  # fmt: skip
    edit_adapter(trained, lambda state: {**state, **other})
    refuse(trained, MatchError, "the base has no l2.weight")


@pytest.mark.parametrize(
    "options", [{"bias": "all"}, {"modules_to_save": ["z"]}], ids=["biases", "modules"]
)
def test_two_adapters_that_replace_the_same_tensor_are_refused(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """Of two replacements for one tensor neither is chosen in silence."""
    adapters = write_adapters(tmp_path, two_linear(**options), {}, {})
    with pytest.raises(MatchError, match="two adapters replace"):
        loratool.merge(tmp_path / "base", adapters, tmp_path / "out")
    assert not (tmp_path / "out").exists()
