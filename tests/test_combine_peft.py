"""combine and resize beside PEFT: equal where PEFT is right, right where it is not, and PEFT loads
everything they write.

Values are compared with `add_weighted_adapter` of a live model whose adapters loratool reads from
files; where PEFT is wrong or refuses, with `Σ wᵢsᵢBᵢAᵢ` in float64. Loading is compared by what the
model computes: its logits with the new adapter are those of a plain model with PEFT's own deltas.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import (
    Holder,
    State,
    close,
    lora,
    read,
    read_json,
    step,
    tiny_llama,
    token_ids,
    write_adapter,
)
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import BdLoraConfig
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import loratool
from loratool.linalg.methods import Settings

#: Sums of a few float32 products, as shares of the largest element: two roundings per term.
FLOAT32 = 2.0**-21

FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
DENSE = ("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
PREFIX = "base_model.model."

Products = dict[str, torch.Tensor]
Make = Callable[[], nn.Module]


# Models and their adapters.


def llama() -> nn.Module:
    return tiny_llama(num_hidden_layers=1)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=48, n_embd=16, n_layer=1, n_head=2, n_inner=24, n_positions=16,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def holder(**layers: Callable[[], nn.Module]) -> Make:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Holder(**{name: layer() for name, layer in layers.items()}).eval()

    return make


class Attention(nn.Module):
    """Self-attention as PEFT's MultiheadAttention layer adapts it."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.l(x, x, x)[0]


convolutions = holder(l=lambda: nn.Conv2d(5, 7, 3), z=lambda: nn.Conv2d(7, 6, 1))
convolution = holder(l=lambda: nn.Conv1d(5, 7, 3), z=lambda: nn.Conv1d(7, 6, 1))
embeddings = holder(l=lambda: nn.Embedding(30, 8), z=lambda: nn.Linear(8, 6))
linears = holder(l=lambda: nn.Linear(12, 20), z=lambda: nn.Linear(20, 6))
gpt_layers = holder(c_fc=lambda: Conv1D(20, 12), c_proj=lambda: Conv1D(12, 20))
blocks = holder(l=lambda: nn.Linear(24, 32))
attention = holder(attn=Attention)

#: Model and two sets of targets, of which the third adapter has only the second.
KINDS: dict[str, tuple[Make, list[str], list[str]]] = {
    "linear": (llama, ["q_proj", "v_proj", "down_proj"], ["q_proj", "up_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_fc", "mlp.c_proj"], ["c_fc"]),
    "conv2d": (convolutions, ["l", "z"], ["l"]),
    "embedding": (embeddings, ["l", "z"], ["l"]),
}


@dataclass(frozen=True)
class Live:
    """A PEFT model with the adapters "a", "b" and "c", and the same adapters on disk."""

    model: PeftModel
    folder: Path

    def paths(self, names: Sequence[str]) -> list[Path]:
        return [self.folder / name for name in names]

    def peft(self, names: Sequence[str], weights: Sequence[float], how: str, **options: Any) -> Any:
        """The tensors of what `add_weighted_adapter` makes, and its config."""
        self.model.add_weighted_adapter(list(names), list(weights), "new", how, **options)
        try:
            state = get_peft_model_state_dict(
                self.model, adapter_name="new", save_embedding_layers=False
            )
            cloned = {name: value.detach().clone() for name, value in state.items()}
            return cloned, self.model.peft_config["new"]
        finally:
            self.model.delete_adapter("new")

    def modules(self) -> Iterator[tuple[str, LoraLayer]]:
        for name, module in self.model.named_modules():
            if isinstance(module, LoraLayer):
                yield name.removeprefix(PREFIX), module

    def sums(self, names: Sequence[str], weights: Sequence[float]) -> Products:
        """`Σ wᵢsᵢBᵢAᵢ` in float64, by module, with the scales that PEFT gave its layers."""
        found: Products = {}
        for path, module in self.modules():
            for name, weight in zip(names, weights, strict=True):
                if name not in module.scaling:
                    continue
                b, a = factors_of(module, name)
                delta = weight * module.scaling[name] * (b.double() @ a.double())
                found[path] = found.get(path, 0) + delta
        return found


def factors_of(module: LoraLayer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`B [out, r]` and `A [r, in]` of an adapter of a live layer."""
    if name in module.lora_embedding_A:
        return module.lora_embedding_B[name].detach(), module.lora_embedding_A[name].detach()
    b, a = module.lora_B[name].weight.detach(), module.lora_A[name].weight.detach()
    return b.flatten(1), a.flatten(1)


def live(folder: Path, make: Make, *configs: LoraConfig) -> Live:
    """Give `make()` adapters named a, b, c, … and save each of them."""
    torch.manual_seed(1)
    first, *others = configs
    model = get_peft_model(make(), first, adapter_name="a")
    for name, config in zip("bcd", others, strict=False):
        model.add_adapter(name, config)
    model.save_pretrained(folder, save_embedding_layers=False)
    return Live(model.eval(), folder)


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Live]:
    """For each kind of layer three adapters of one rank, with different alphas and targets."""
    made = {}
    for kind, (make, targets, fewer) in KINDS.items():
        folder = tmp_path_factory.mktemp(kind)
        made[kind] = live(
            folder, make,
            lora(*targets, lora_alpha=6), lora(*targets, lora_alpha=2.5),
            lora(*fewer, lora_alpha=9),
        )  # fmt: skip
    return made


def products(state: State) -> Products:
    """`B·A` in float64, by module, of the tensors of a file whose scale is one."""
    found = {}
    for key, a in state.items():
        if ".lora_A." in key or key.endswith(".lora_embedding_A"):
            b = state[key.replace("lora_A.", "lora_B.").replace("embedding_A", "embedding_B")]
            path = re.sub(r"\.lora_(A\.weight|embedding_A)$", "", key).removeprefix(PREFIX)
            found[path] = b.double().flatten(1) @ a.double().flatten(1)
    return found


def combined(sources: Sequence[Path], output: Path, **options: Any) -> State:
    """The factors of what loratool makes, after a look at the config: every scale is one."""
    loratool.combine(sources, output, **options)
    config = read_json(output / "adapter_config.json")
    assert config["r"] == config["lora_alpha"]
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert not config["use_rslora"]
    return {k: v for k, v in read(output).items() if ".lora_" in k}


def assert_same(found: Products, expected: Products, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert bool(value.any()), f"{path}: nothing to compare"
        assert close_double(found[path], value, tolerance), path


def close_double(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    apart = float((found - expected).abs().max())
    return apart <= tolerance * float(expected.abs().max())


@contextmanager
def pefts_masks(
    scene: Live, names: Sequence[str], method: str, density: float, seed: int
) -> Iterator[None]:
    """Let `torch.bernoulli` give the masks that loratool draws, in the order in which PEFT asks:
    module by module, and of the factors first all A, then all B."""
    masks: list[torch.Tensor] = []
    for path, module in scene.modules():
        draws = Settings(path, 0, seed=seed).random
        held = [name for name in names if name in module.scaling]
        flip = bool(getattr(module, "fan_in_fan_out", False)) or bool(module.lora_embedding_A)
        if method.endswith("svd"):
            for name in held:
                b, a = factors_of(module, name)
                mask = draws(names.index(name), 0).random((len(b), a.shape[1]), dtype=np.float32)
                masks.append(torch.from_numpy(np.ascontiguousarray(mask.T if flip else mask)))
        else:
            for side in (0, 1):
                for name in held:
                    b, a = factors_of(module, name)
                    shape = a.shape if side == 0 else b.T.shape
                    mask = draws(names.index(name), side).random(tuple(shape), dtype=np.float32)
                    masks.append(torch.from_numpy(mask if side == 0 else mask.T.copy()))
    masks.reverse()

    def drawn(probability: torch.Tensor) -> torch.Tensor:
        return (masks.pop() < density).reshape(probability.shape).to(probability.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bernoulli", drawn)
        yield
    assert not masks, "PEFT drew less often than loratool"


# The combination types of PEFT, value for value.

MIXES: dict[str, tuple[str, list[float]]] = {
    "plain": ("ab", [1.0, 1.0]),
    "negative": ("ab", [0.7, -1.3]),
    "three": ("abc", [0.05, 2.0, -0.6]),
    "three-other-order": ("cba", [-3.0, 0.4, 1.0]),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_cat_equals_pefts_factors(
    kind: str, mix: str, lives: dict[str, Live], tmp_path: Path
) -> None:
    """`cat` stacks the scaled A and the B as PEFT does, zeros behind where an adapter has none."""
    names, weights = MIXES[mix]
    peft, config = lives[kind].peft(names, weights, "cat")
    found = combined(lives[kind].paths(names), tmp_path / "out", weights=weights, method="cat")
    assert read_json(tmp_path / "out" / "adapter_config.json")["r"] == config.r
    assert_same_factors(found, peft)
    assert_same(products(found), lives[kind].sums(names, weights), FLOAT32)


def assert_same_factors(found: State, peft: State) -> None:
    assert found.keys() == peft.keys()
    for key, value in peft.items():
        assert found[key].dtype == torch.float32
        assert close(found[key], value, FLOAT32), key


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_linear_equals_pefts_factors(
    kind: str, mix: str, lives: dict[str, Live], tmp_path: Path
) -> None:
    """`linear` gives PEFT's sums of the A and of the B, signs on the A."""
    names, weights = MIXES[mix]
    peft, config = lives[kind].peft(names, weights, "linear")
    found = combined(lives[kind].paths(names), tmp_path / "out", weights=weights, method="linear")
    assert read_json(tmp_path / "out" / "adapter_config.json")["r"] == config.r
    assert_same_factors(found, peft)


@pytest.mark.parametrize("mix", ["negative", "three"])
@pytest.mark.parametrize("method", FACTORS[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_pruned_factors_equal_pefts(
    kind: str, method: str, mix: str, lives: dict[str, Live], tmp_path: Path
) -> None:
    """Pruned and sign-elected factors are PEFT's, at every density and by both majorities."""
    scene, (names, weights) = lives[kind], MIXES[mix]
    for number, options in enumerate(variants(method)):
        with drawn_alike(scene, names, method, options["density"], number):
            peft, _ = scene.peft(names, weights, method, **options)
        found = combined(
            scene.paths(names), tmp_path / str(number), weights=weights, method=method,
            seed=number, **options,
        )  # fmt: skip
        assert_same_factors(found, peft)


def variants(method: str) -> list[dict[str, Any]]:
    """Densities, and for methods that elect signs how they do."""
    densities = [{"density": density} for density in (0.3, 0.5, 0.9)]
    if "ties" not in method:
        return densities
    signs = ("frequency", "total", "frequency")
    return [{**d, "majority_sign_method": s} for d, s in zip(densities, signs, strict=True)]


@contextmanager
def drawn_alike(scene: Live, names: str, method: str, density: float, seed: int) -> Iterator[None]:
    if "dare" not in method:
        yield
        return
    with pefts_masks(scene, names, method, density, seed):
        yield


@pytest.mark.parametrize("method", FACTORS[1:])
def test_density_one_prunes_nothing(method: str, lives: dict[str, Live], tmp_path: Path) -> None:
    """At density 1 all entries stay, in PEFT and here, and nothing is drawn."""
    scene, (names, weights) = lives["linear"], MIXES["three"]
    peft, _ = scene.peft(names, weights, method, density=1.0)
    sources = scene.paths(names)
    found = combined(sources, tmp_path / "out", weights=weights, method=method, density=1.0)
    assert_same_factors(found, peft)


@pytest.mark.parametrize("rank", [None, 2, 5])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_svd_equals_pefts_delta(
    kind: str, mix: str, rank: int | None, lives: dict[str, Live], tmp_path: Path
) -> None:
    """`svd` has the delta of PEFT's `svd`, at the largest rank of the adapters and at any other."""
    scene, (names, weights) = lives[kind], MIXES[mix]
    peft, config = scene.peft(names, weights, "svd", svd_rank=rank)
    out = tmp_path / "out"
    found = combined(scene.paths(names), out, weights=weights, method="svd", rank=rank)
    assert read_json(out / "adapter_config.json")["r"] == config.r == (rank or 4)
    assert_same(products(found), products(peft), SVD32)


#: PEFT cuts by a float32 SVD. Its rounding, about 2⁻²³ of σ₁, is enlarged in a cut delta by
#: σₖ/(σₖ-σₖ₊₁), which for these matrices is up to a few dozen.
SVD32 = 1e-5


@pytest.mark.parametrize("mix", ["negative", "three"])
@pytest.mark.parametrize("method", DENSE)
@pytest.mark.parametrize("kind", KINDS)
def test_pruned_deltas_equal_pefts(
    kind: str, method: str, mix: str, lives: dict[str, Live], tmp_path: Path
) -> None:
    """The `*_svd` methods prune and elect in the dense deltas as PEFT does, and cut alike.

    Which entry is the last one kept could turn on the last bit of a delta; with these seeds no two
    magnitudes at the threshold and no sum of entries are so close to each other or to zero.
    """
    scene, (names, weights) = lives[kind], MIXES[mix]
    for number, options in enumerate(variants(method)):
        rank = (None, 2, 5)[number]
        with drawn_alike(scene, names, method, options["density"], number):
            peft, config = scene.peft(names, weights, method, svd_rank=rank, **options)
        out = tmp_path / str(number)
        found = combined(
            scene.paths(names), out, weights=weights, method=method, seed=number, rank=rank,
            **options,
        )  # fmt: skip
        assert read_json(out / "adapter_config.json")["r"] == config.r == (rank or 4)
        assert_same(products(found), products(peft), SVD32)


def test_methods_that_prune_differ_from_the_sum(lives: dict[str, Live], tmp_path: Path) -> None:
    """No two methods of PEFT give one result here, so a comparison tells them apart."""
    names, weights = MIXES["three"]
    found = []
    for method in ("sum", *FACTORS, *DENSE):
        options = {"density": 0.5} if method not in ("sum", "linear") else {}
        out = tmp_path / method
        sources = lives["linear"].paths(names)
        state = combined(sources, out, weights=weights, method=method, **options)
        found.append(products(state)["model.layers.0.self_attn.q_proj"])
    for number, one in enumerate(found):
        assert not any(close_double(one, other, 1e-2) for other in found[:number])


# Where PEFT is wrong or refuses.


def scaled(state: State, scale: float) -> Products:
    return {path: scale * value for path, value in products(state).items()}


@pytest.mark.parametrize("method", ["cat", "svd", "linear", "ties"])
@pytest.mark.parametrize("kind", KINDS)
def test_rslora_is_not_applied_twice(kind: str, method: str, tmp_path: Path) -> None:
    """Of rsLoRA adapters PEFT makes one that is √r too large; here the scale is in the factors."""
    make, targets, _ = KINDS[kind]
    configs = [lora(*targets, lora_alpha=alpha, use_rslora=True) for alpha in (6, 2.5)]
    scene, weights = live(tmp_path, make, *configs), [0.7, -1.3]
    options = {"density": 0.5} if method == "ties" else {}
    peft, config = scene.peft("ab", weights, method, **options)
    sources = scene.paths("ab")
    found = products(combined(sources, tmp_path / "out", weights=weights, method=method, **options))
    # The factors are right, but the config it gives them multiplies them with r/√r.
    assert config.use_rslora
    assert config.r == config.lora_alpha
    assert_same(found, products(peft), SVD32)
    if method == "cat":
        right = scene.sums("ab", weights)
        assert_same(found, right, FLOAT32)
        pefts = scaled(peft, config.lora_alpha / config.r**0.5)
        assert_same(pefts, {path: config.r**0.5 * delta for path, delta in right.items()}, FLOAT32)


def test_peft_itself_applies_the_rslora_scale_twice(tmp_path: Path) -> None:
    """What PEFT's live model computes with its combined rsLoRA adapter is off by √r as well."""
    configs = [lora("l", lora_alpha=alpha, use_rslora=True) for alpha in (6, 2.5)]
    scene, weights = live(tmp_path, linears, *configs), [0.7, -1.3]
    right = scene.sums("ab", weights)["l"]
    scene.model.add_weighted_adapter(["a", "b"], weights, "new", "cat")
    delta = scene.model.get_submodule("base_model.model.l").get_delta_weight("new").double()
    assert close_double(delta, 8**0.5 * right, FLOAT32)
    combined(scene.paths("ab"), tmp_path / "out", weights=weights)
    loaded = PeftModel.from_pretrained(linears(), tmp_path / "out")
    delta = loaded.get_submodule("base_model.model.l").get_delta_weight("default").double()
    assert close_double(delta, right, FLOAT32)


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_one_rslora_adapter_among_others(order: str, tmp_path: Path) -> None:
    """An rsLoRA and a plain adapter add up in either order; PEFT's result depends on the order."""
    scene = live(tmp_path, linears, lora("l", "z"), lora("l", "z", use_rslora=True))
    weights = [0.7, -1.3] if order == "ab" else [-1.3, 0.7]
    found = combined(scene.paths(order), tmp_path / "out", weights=weights)
    assert_same(products(found), scene.sums("ab", [0.7, -1.3]), FLOAT32)
    assert scene.peft(order, weights, "cat")[1].use_rslora == (order == "ba")


SOURCES: dict[str, list[dict[str, Any]]] = {
    "unequal-ranks": [{"r": 3}, {"r": 5, "lora_alpha": 2.5}],
    "rslora": [{"use_rslora": True}, {"r": 5, "lora_alpha": 2.5, "use_rslora": True}],
    "rank-pattern": [{"rank_pattern": {".*l|c_fc|q_proj": 2}}, {"r": 3, "rank_pattern": {"z": 6}}],
    "alpha-pattern": [{"alpha_pattern": {"l|c_fc|q_proj": 1.5}}, {"r": 2}],
    "both-patterns": [
        {"rank_pattern": {"l": 2, "q_proj": 1, "c_fc": 1}, "alpha_pattern": {".*": 7.5}},
        {"r": 2, "alpha_pattern": {"z|l": 3}, "use_rslora": True},
    ],
    "narrower": [{"r": 3}, {"fewer": True, "r": 2}],
}


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SOURCES)
def test_sums_of_unlike_adapters_are_exact(name: str, kind: str, tmp_path: Path) -> None:
    """`sum`, `cat` and an uncut `svd` are Σ weight·scale·B·A, whatever ranks and scales go in."""
    make, targets, fewer = KINDS[kind]
    configs = []
    for source in SOURCES[name]:
        options = {k: v for k, v in source.items() if k != "fewer"}
        configs.append(lora(*(fewer if source.get("fewer") else targets), **options))
    scene, weights = live(tmp_path, make, *configs), [0.7, -1.3]
    right = scene.sums("ab", weights)
    runs = (("sum", None, True), ("cat", None, False), ("svd", 40, False))
    for method, rank, keep_patterns in runs:
        out = tmp_path / method
        found = combined(
            scene.paths("ab"), out, weights=weights, method=method, rank=rank,
            keep_patterns=keep_patterns,
        )  # fmt: skip
        assert_same(products(found), right, FLOAT32)
        with loading() as results:
            PeftModel.from_pretrained(make(), out)
        assert results == [([], [])]
        ranks = {value.shape[0] for key, value in found.items() if "_A" in key}
        assert keep_patterns or len(ranks) == 1


def truncated(delta: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@pytest.mark.parametrize("kind", KINDS)
def test_svd_of_unequal_ranks_is_the_best_of_its_rank(kind: str, tmp_path: Path) -> None:
    """`svd`, and `sum` with a rank, cut Σ weight·scale·B·A as a float64 SVD does."""
    make, targets, fewer = KINDS[kind]
    configs = [lora(*targets, r=3, use_rslora=True), lora(*fewer, r=5, lora_alpha=2.5)]
    scene, weights = live(tmp_path, make, *configs), [0.7, -1.3]
    sums = scene.sums("ab", weights)
    for method, rank, expected in (("svd", None, 5), ("svd", 2, 2), ("sum", 4, 4)):
        out = tmp_path / f"{method}-{rank}"
        found = combined(scene.paths("ab"), out, weights=weights, method=method, rank=rank)
        assert read_json(out / "adapter_config.json")["r"] == expected
        right = {path: truncated(delta, expected) for path, delta in sums.items()}
        assert_same(products(found), right, FLOAT32)


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("kind", KINDS)
def test_lower_ranks_count_as_filled_up_with_zeros(kind: str, method: str, tmp_path: Path) -> None:
    """Of unequal ranks, which PEFT refuses, factors are as PEFT's of the lower one with zeros."""
    make, targets, _ = KINDS[kind]
    unequal = live(tmp_path / "unequal", make, lora(*targets, r=3), lora(*targets, r=5))
    options = {"density": 1.0} if method == "ties" else {}
    weights = [0.7, -1.3]
    with pytest.raises(ValueError, match="same r value"):
        unequal.peft("ab", weights, method, **options)
    equal = live(
        tmp_path / "equal", make, lora(*targets, r=5, lora_alpha=10), lora(*targets, r=5)
    )  # α/r of the first is 6/3 in both
    others = dict(unequal.modules())
    for path, module in equal.modules():
        for name in "ab":
            b, a = factors_of(module, name)
            new_b, new_a = factors_of(others[path], name)
            b.zero_()[:, : new_b.shape[1]] = new_b
            a.zero_()[: new_a.shape[0]] = new_a
    peft, _ = equal.peft("ab", weights, method, **options)
    sources = unequal.paths("ab")
    found = combined(sources, tmp_path / "out", weights=weights, method=method, **options)
    assert_same_factors(found, peft)


@pytest.mark.parametrize("second", [{"target_modules": ".*z"}, {"target_modules": ["z"]}])
def test_targets_of_other_forms_are_joined(second: dict[str, Any], tmp_path: Path) -> None:
    """A list of names and a regular expression, which PEFT refuses to join, are joined."""
    first = LoraConfig(r=4, init_lora_weights=False, target_modules=["l"])
    other = LoraConfig(r=3, init_lora_weights=False, **second)
    scene = live(tmp_path, linears, first, other)
    if isinstance(second["target_modules"], str):
        with pytest.raises(ValueError, match="same target modules type"):
            scene.peft("ab", [1.0, 1.0], "cat")
    found = combined(scene.paths("ab"), tmp_path / "out")
    assert_same(products(found), scene.sums("ab", [1.0, 1.0]), FLOAT32)
    assert_loads(linears, tmp_path / "out")


def test_layers_of_the_second_adapter_are_not_lost(tmp_path: Path) -> None:
    """Adapters of different layers are joined; PEFT keeps only the layers of the first."""
    two = lambda: tiny_llama(num_hidden_layers=2)  # noqa: E731
    configs = [lora("q_proj", layers_to_transform=[i]) for i in (0, 1)]
    scene = live(tmp_path, two, *configs)
    found = combined(scene.paths("ab"), tmp_path / "out", weights=[0.5, 2.0])
    assert_same(products(found), scene.sums("ab", [0.5, 2.0]), FLOAT32)
    assert len(products(scene.peft("ab", [0.5, 2.0], "cat")[0])) == 1
    assert_loads(two, tmp_path / "out")


def test_nn_conv1d_is_cut_right(tmp_path: Path) -> None:
    """`svd` cuts the delta of an `nn.Conv1d`, of which PEFT does not know how to take an SVD."""
    scene = live(tmp_path, convolution, lora("l", "z"), lora("l", "z", lora_alpha=2.5))
    found = combined(scene.paths("ab"), tmp_path / "out", weights=[0.7, -1.3], method="svd")
    right = {p: truncated(d, 4) for p, d in scene.sums("ab", [0.7, -1.3]).items()}
    assert_same(products(found), right, FLOAT32)
    with pytest.raises(RuntimeError):
        scene.peft("ab", [0.7, -1.3], "svd")


def test_one_adapter_is_pruned_where_peft_falls_back_to_linear(tmp_path: Path) -> None:
    """With a single adapter `magnitude_prune` prunes; PEFT takes `linear` without a word."""
    scene = live(tmp_path, linears, lora("l"))
    found = combined(scene.paths("a"), tmp_path / "out", method="magnitude_prune", density=0.5)
    peft, _ = scene.peft("a", [1.0], "magnitude_prune", density=0.5)
    linear, _ = scene.peft("a", [1.0], "linear")
    for key, value in linear.items():
        assert torch.equal(peft[key], value)
        expected = torch.where(value.abs() > value.abs().median(), value, torch.zeros(()))
        assert close(found[key], expected, FLOAT32)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_untrained_modules_count_as_in_peft(method: str, tmp_path: Path) -> None:
    """A module whose B is zero, but not its A, takes part in the sums of factors as in PEFT."""
    scene = live(tmp_path, linears, lora("l", "z"), lora("l", "z"))
    scene.model.get_submodule("base_model.model.l").lora_B["b"].weight.data.zero_()
    scene.model.save_pretrained(tmp_path)
    options = {"density": 0.5} if method == "ties" else {}
    peft, _ = scene.peft("ab", [1.0, 1.0], method, **options)
    found = combined(scene.paths("ab"), tmp_path / "out", method=method, **options)
    assert_same_factors(found, peft)


# What PEFT computes with what was written.


@dataclass(frozen=True)
class Sources:
    """A base, its inputs, and LoRA options of the adapters; `replaced` matches the tensors (or
    "0:" and the tensors of the first adapter) that are replaced as a whole, without weights."""

    make: Make
    inputs: torch.Tensor
    adapters: tuple[dict[str, Any], ...]
    replaced: str = ""

    def write(self, folder: Path) -> list[Path]:
        """The adapters on disk, each trained from the same base."""
        paths = []
        for number, options in enumerate(self.adapters):
            model = self.make()
            torch.manual_seed(20 + number)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = LoraConfig(**{"r": 4, "lora_alpha": 3, "init_lora_weights": False,
                                       **options})  # fmt: skip
                write_adapter(folder / f"adapter-{number}", model, config)
            paths.append(folder / f"adapter-{number}")
        return paths

    def expected(self, adapters: Sequence[Path], weights: Sequence[float]) -> torch.Tensor:
        """What a plain model computes that has the base's weights and Σ w·(PEFT's own delta)."""
        model = self.make()
        base = {name: value.double() for name, value in model.state_dict().items()}
        total = dict(base)
        for number, (folder, weight) in enumerate(zip(adapters, weights, strict=True)):
            adapted = PeftModel.from_pretrained(self.make(), folder)
            merged = adapted.merge_and_unload().state_dict()
            for name, value in merged.items():
                delta = value.double() - base[name]
                replaced = any(
                    re.fullmatch(self.replaced, tried) for tried in (name, f"{number}:{name}")
                )
                total[name] = total[name] + (1.0 if replaced else weight) * delta
        model.load_state_dict({name: value.float() for name, value in total.items()})
        return output_of(model, self.inputs)

    def plain(self) -> torch.Tensor:
        return output_of(self.make(), self.inputs)


def output_of(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(inputs)
    return found if isinstance(found, torch.Tensor) else found.logits


@contextmanager
def loading() -> Iterator[list[tuple[list[str], list[str]]]]:
    """Collect the missing LoRA keys and the unexpected keys of everything that PEFT loads."""
    results: list[tuple[list[str], list[str]]] = []
    original = PeftModel.load_adapter

    def load_adapter(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        missing = [key for key in result.missing_keys if "lora_" in key]
        results.append((missing, list(result.unexpected_keys)))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeftModel, "load_adapter", load_adapter)
        yield results


def assert_loads(make: Make, folder: Path) -> PeftModel:
    """Load an adapter: no key of it is left over, none is missing, and all its values arrive."""
    with loading() as results:
        model = PeftModel.from_pretrained(make(), folder).eval()
    assert results == [([], [])]
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    for key, value in read(folder).items():
        if ".lora_" in key:
            assert torch.equal(state[key], value.to(state[key].dtype)), key
    assert {k for k in state if ".lora_" in k} <= read(folder).keys()
    return model


X12 = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))
IDS = torch.arange(30)
SIGNAL = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(4))
IMAGE = torch.randn(2, 5, 6, 6, generator=torch.Generator().manual_seed(5))
SEQUENCE = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(6))
WIDE = torch.randn(5, 24, generator=torch.Generator().manual_seed(8))
TOKENS = token_ids(length=8)

Options = dict[str, Any]


def on(*targets: str, **options: Any) -> Options:
    return {"target_modules": list(targets), **options}


#: Every kind of layer, with adapters that are alike in nothing.
LAYERS: dict[str, Sources] = {
    "linear": Sources(linears, X12, (on("l", "z"), on("l", r=3, use_rslora=True))),
    "linear-rank-above-width": Sources(linears, X12, (on("l", "z", r=16), on("l", r=14))),
    "conv1d-layers": Sources(
        gpt_layers, X12,
        (on("c_fc", "c_proj", fan_in_fan_out=True), on("c_fc", r=2, fan_in_fan_out=True)),
    ),
    "llama": Sources(
        llama, TOKENS,
        (on("q_proj", "down_proj"), {"target_modules": r".*\.(q_proj|k_proj)", "r": 2}),
    ),
    "gpt2": Sources(gpt2, TOKENS, (on("c_attn", "c_proj"), on("c_attn", "wte", r=2))),
    "nn-conv1d": Sources(convolution, SIGNAL, (on("l", "z"), on("l", r=3))),
    "nn-conv2d": Sources(convolutions, IMAGE, (on("l", "z", r=3), on("z", use_rslora=True))),
    "embedding": Sources(embeddings, IDS, (on("l", "z"), on("l", r=3))),
    "token-embedding": Sources(llama, TOKENS, (on("embed_tokens"), on("embed_tokens", "q_proj"))),
    "attention": Sources(
        attention, SEQUENCE, (on("l"), on("l", r=3, alpha_pattern={"l": 2.5})),
    ),
    "rank-pattern": Sources(
        linears, X12,
        (on("l", "z", rank_pattern={"z": 2}), on("l", "z", alpha_pattern={"l": 1.5})),
    ),
    "bdlora": Sources(
        blocks, WIDE,
        (on("l", use_bdlora=BdLoraConfig(target_modules_bd_a=["l"], nblocks=2)), on("l", r=3)),
    ),
}  # fmt: skip

#: What adapters hold beside their factors.
BESIDE: dict[str, Sources] = {
    "lora-bias": Sources(linears, X12, (on("l", lora_bias=True), on("l", "z", r=3))),
    "lora-bias-both": Sources(
        linears, X12,
        (on("l", lora_bias=True, use_rslora=True), on("l", "z", r=3, lora_bias=True)),
    ),
    "bias-all": Sources(linears, X12, (on("l", bias="all"), on("l", "z", r=3)), r".*\.bias"),
    "bias-lora-only": Sources(
        linears, X12, (on("l", r=3), on("z", bias="lora_only")), r".*\.bias",
    ),
    "both-biases": Sources(
        linears, X12, (on("l", bias="lora_only"), on("z", bias="lora_only")), r".*\.bias",
    ),
    "modules-to-save": Sources(
        linears, X12, (on("l", modules_to_save=["z"]), on("l", r=3)), r"z\..*",
    ),
    "saved-head": Sources(
        llama, TOKENS, (on("q_proj"), on("k_proj", modules_to_save=["lm_head"])), r"lm_head\..*",
    ),
    "saved-and-adapted": Sources(
        linears, X12, (on("l", modules_to_save=["z"]), on("l", "z", r=3)), r"0:z\..*",
    ),
    "saved-and-all-biases": Sources(
        linears, X12, (on("l", modules_to_save=["z"], bias="all"), on("l", r=3)),
        r"z\..*|.*\.bias",
    ),
    "token-rows": Sources(
        llama, TOKENS,
        (on("q_proj", trainable_token_indices={"embed_tokens": [3, 9, 20]}), on("q_proj", r=2)),
        r".*embed_tokens\.weight",
    ),
    "token-rows-as-a-list": Sources(
        llama, TOKENS,
        (on("q_proj", r=2), on("q_proj", trainable_token_indices=[4, 5])),
        r".*embed_tokens\.weight",
    ),
}  # fmt: skip

WEIGHTS = [0.7, -1.3]

#: float32 sums through a model of a few layers, as a share of the largest logit.
LOGITS = 1e-5


@pytest.mark.parametrize("keep_patterns", [False, True], ids=["uniform", "patterns"])
@pytest.mark.parametrize("name", [*LAYERS, *BESIDE])
def test_peft_computes_the_weighted_sum(name: str, keep_patterns: bool, tmp_path: Path) -> None:
    """PEFT loads what combine wrote, key for key, and computes base + Σ w·delta with it."""
    sources = {**LAYERS, **BESIDE}[name]
    adapters, out = sources.write(tmp_path), tmp_path / "out"
    loratool.combine(adapters, out, weights=WEIGHTS, keep_patterns=keep_patterns)
    found = output_of(assert_loads(sources.make, out), sources.inputs)
    expected = sources.expected(adapters, WEIGHTS)
    assert close(found, expected, LOGITS)
    assert not close(sources.plain(), expected, 1e-2)


@pytest.mark.parametrize("method", ["cat", "ties", "magnitude_prune_svd"])
@pytest.mark.parametrize("name", LAYERS)
def test_peft_loads_every_method(name: str, method: str, tmp_path: Path) -> None:
    """Results of other methods load as well, each module with a rank of its own."""
    sources, out = LAYERS[name], tmp_path / "out"
    options = {"density": 0.5} if "prune" in method or method == "ties" else {}
    adapters = sources.write(tmp_path)
    loratool.combine(adapters, out, weights=WEIGHTS, method=method, keep_patterns=True, **options)
    assert_loads(sources.make, out)


@pytest.mark.parametrize("keep_patterns", [False, True], ids=["uniform", "patterns"])
@pytest.mark.parametrize("name", LAYERS)
def test_peft_loads_ranks_chosen_by_energy(name: str, keep_patterns: bool, tmp_path: Path) -> None:
    """With `energy` each module may have its own rank, and PEFT gives it that."""
    sources, out = LAYERS[name], tmp_path / "out"
    adapters = sources.write(tmp_path)
    loratool.combine(adapters, out, weights=WEIGHTS, energy=0.8, keep_patterns=keep_patterns)
    assert_loads(sources.make, out)


#: Both adapters hold a copy of the embedding they adapt, as PEFT saves it. The copies are equal,
#: and `combine` keeps one; `merge` refuses two adapters that replace one tensor.
NOT_MERGED = ("token-embedding",)


@pytest.mark.parametrize("name", [n for n in (*LAYERS, *BESIDE) if n not in NOT_MERGED])
def test_combining_then_merging_is_merging_both(name: str, tmp_path: Path) -> None:
    """Merging the combination into a base equals merging the adapters with their weights."""
    sources = {**LAYERS, **BESIDE}[name]
    adapters = sources.write(tmp_path)
    base, out = tmp_path / "base", tmp_path / "out"
    write_model(base, sources.make())
    loratool.combine(adapters, out, weights=WEIGHTS)
    loratool.merge(base, out, tmp_path / "once", dtype="float32")
    loratool.merge(base, adapters, tmp_path / "both", weights=WEIGHTS, dtype="float32")
    once, both, before = read(tmp_path / "once"), read(tmp_path / "both"), read(base)
    assert once.keys() == both.keys() == before.keys()
    assert any(not torch.equal(both[key], before[key]) for key in both)
    for key in both:
        assert close(once[key], both[key], FLOAT32), key


def test_conv1d_is_still_announced(tmp_path: Path) -> None:
    """`fan_in_fan_out`, without which PEFT warns and corrects itself, is kept for Conv1D layers."""
    sources, out = LAYERS["conv1d-layers"], tmp_path / "out"
    loratool.combine(sources.write(tmp_path), out)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "fan_in_fan_out is set")
        assert_loads(gpt_layers, out)


def write_model(folder: Path, model: nn.Module) -> None:
    """A base directory, by transformers itself where the model is one of its own."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
        return
    folder.mkdir()
    save_file({k: v.clone() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    if any(isinstance(layer, Conv1D) for layer in model.children()):
        (folder / "config.json").write_text('{"model_type": "gpt2"}')


def test_tokens_and_embedding_factors_are_refused_together(tmp_path: Path) -> None:
    """Trained token rows and factors of one embedding, which PEFT cannot load, are refused."""
    sources = Sources(
        embeddings, IDS, (on("z", trainable_token_indices={"l": [3, 9]}), on("l", r=2))
    )
    adapters = sources.write(tmp_path)
    with pytest.raises(loratool.LoraToolError):
        loratool.combine(adapters, tmp_path / "out")


SAME_ENDINGS = holder(
    l=lambda: nn.Linear(12, 12), z=lambda: Holder(l=nn.Linear(12, 12)), e=lambda: nn.Linear(12, 5)
)


def test_ranks_of_modules_with_one_ending_are_told_apart(tmp_path: Path) -> None:
    """`l` beside `z.l`, like Flux's `proj_out`: the rank of one is not given to the other."""
    source = on("l", r=4, rank_pattern={"^l": 2})
    sources = Sources(SAME_ENDINGS, X12, (source, source))
    adapters, out = sources.write(tmp_path), tmp_path / "out"
    loratool.combine(adapters, out, weights=WEIGHTS, keep_patterns=True)
    found = output_of(assert_loads(SAME_ENDINGS, out), X12)
    assert close(found, sources.expected(adapters, WEIGHTS), LOGITS)


def test_targets_with_one_ending_are_told_apart(tmp_path: Path) -> None:
    """Of `l` and `z.l` only the one that was adapted is a target of the result."""
    source = {"target_modules": "l"}
    sources = Sources(SAME_ENDINGS, X12, (source, source))
    adapters, out = sources.write(tmp_path), tmp_path / "out"
    loratool.combine(adapters, out, weights=WEIGHTS)
    found = output_of(assert_loads(SAME_ENDINGS, out), X12)
    assert close(found, sources.expected(adapters, WEIGHTS), LOGITS)


def test_a_module_that_cancels_is_zero_and_loads(tmp_path: Path) -> None:
    """Where two adapters cancel in one module its factors are zeros of rank one, and load."""
    sources = Sources(linears, X12, (on("l", "z"), on("l", "z")))
    one, other = sources.write(tmp_path)
    state = read(other)
    shared = {k: v for k, v in read(one).items() if k.startswith(f"{PREFIX}l.")}
    save_file({**state, **shared}, other / "adapter_model.safetensors")
    for keep_patterns in (False, True):
        out = tmp_path / str(keep_patterns)
        loratool.combine([one, other], out, weights=[1.0, -1.0], keep_patterns=keep_patterns)
        model = assert_loads(linears, out)
        delta = model.get_submodule("base_model.model.l").get_delta_weight("default")
        assert float(delta.abs().max()) <= 1e-6
        assert close(output_of(model, X12), sources.expected([one, other], [1.0, -1.0]), LOGITS)


# Dtypes.

EPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}


def in_dtype(folder: Path, output: Path, dtype: str) -> Path:
    """A copy of an adapter with its tensors in another dtype."""
    output.mkdir()
    state = {k: v.to(getattr(torch, dtype)) for k, v in read(folder).items()}
    save_file(state, output / "adapter_model.safetensors")
    (output / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    return output


@pytest.mark.parametrize(
    ("stored", "written"),
    [
        ("float16", None), ("bfloat16", None), ("float16", "bfloat16"), ("bfloat16", "float16"),
        ("bfloat16", "float32"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["nn-conv2d", "embedding", "lora-bias"])
def test_half_precision_loads(name: str, stored: str, written: str | None, tmp_path: Path) -> None:
    """float16 and bfloat16 adapters keep their dtype unless another is asked for, and load."""
    sources = {**LAYERS, **BESIDE}[name]
    halves = [
        in_dtype(folder, tmp_path / f"half-{number}", stored)
        for number, folder in enumerate(sources.write(tmp_path))
    ]
    out = tmp_path / "out"
    report = loratool.combine(halves, out, weights=WEIGHTS, dtype=written)
    code = written or stored
    assert report.dtype == code
    state = read(out)
    assert {value.dtype for value in state.values()} == {getattr(torch, code)}
    found = output_of(assert_loads(sources.make, out), sources.inputs)
    # Each product of two rounded factors is off by 2·eps of its terms, the logits by less than
    # some such products in a row.
    tolerance = max(LOGITS, 8 * EPS[code])
    assert close(found, sources.expected(halves, WEIGHTS), tolerance)


def test_unlike_dtypes_become_float32(tmp_path: Path) -> None:
    """Adapters of different dtypes are combined in float32."""
    one, other = LAYERS["linear"].write(tmp_path)
    half = in_dtype(other, tmp_path / "half", "bfloat16")
    report = loratool.combine([one, half], tmp_path / "out", weights=WEIGHTS)
    assert report.dtype == "float32"
    found = output_of(assert_loads(linears, tmp_path / "out"), X12)
    assert close(found, LAYERS["linear"].expected([one, half], WEIGHTS), LOGITS)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("method", ["cat", "linear"])
def test_half_precision_factors_are_pefts(method: str, stored: str, tmp_path: Path) -> None:
    """Of half-precision adapters the factors are PEFT's, which computes them in float32."""
    scene = live(tmp_path, linears, lora("l", "z"), lora("l", "z", lora_alpha=2.5))
    halves = [
        in_dtype(folder, tmp_path / f"half-{folder.name}", stored) for folder in scene.paths("ab")
    ]
    loaded = PeftModel.from_pretrained(linears(), halves[0], adapter_name="a")
    loaded.load_adapter(halves[1], "b")
    peft, _ = Live(loaded, tmp_path).peft("ab", WEIGHTS, method)
    found = combined(halves, tmp_path / "out", weights=WEIGHTS, method=method, dtype="float32")
    assert_same_factors(found, peft)
    rounded = combined(halves, tmp_path / "rounded", weights=WEIGHTS, method=method)
    for key, value in found.items():
        # Rounded once, from float64: half a unit, and what float32 already lost of the reference.
        unit = step(value.abs(), getattr(torch, stored))
        assert bool(((rounded[key].double() - value).abs() <= (0.5 + 2**-10) * unit).all()), key


# resize.

DORA = {"use_dora": True}

RESIZED: dict[str, Sources] = {
    **{name: Sources(s.make, s.inputs, s.adapters[:1]) for name, s in LAYERS.items()},
    **{
        name: Sources(BESIDE[name].make, BESIDE[name].inputs, BESIDE[name].adapters[:1])
        for name in ("lora-bias", "bias-all", "modules-to-save", "token-rows")
    },
    "rslora": Sources(linears, X12, (on("l", "z", use_rslora=True),)),
    "dora-linear": Sources(linears, X12, (on("l", "z", **DORA),)),
    "dora-conv1d-layers": Sources(
        gpt_layers, X12, (on("c_fc", "c_proj", fan_in_fan_out=True, **DORA),)
    ),
    "dora-nn-conv2d": Sources(convolutions, IMAGE, (on("l", "z", **DORA),)),
    "dora-embedding": Sources(embeddings, IDS, (on("l", "z", use_rslora=True, **DORA),)),
    "dora-llama": Sources(
        llama, TOKENS, (on("q_proj", "down_proj", rank_pattern={"q_proj": 2}, **DORA),)
    ),
}


def loaded_output(sources: Sources, folder: Path) -> torch.Tensor:
    return output_of(PeftModel.from_pretrained(sources.make(), folder), sources.inputs)


@pytest.mark.parametrize("options", [{"rank": 20}, {"pad_to": 8}], ids=["rank", "pad"])
@pytest.mark.parametrize("name", RESIZED)
def test_a_larger_rank_computes_the_same(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Resized up, every module has the new rank, and PEFT computes what it did before."""
    sources, out = RESIZED[name], tmp_path / "out"
    (adapter,) = sources.write(tmp_path)
    report = loratool.resize(adapter, out, **options)
    rank = options.get("rank") or 8 * -(-max(largest_ranks(adapter)) // 8)
    if "rank-above-width" not in name:
        assert report.rank == rank
    assert set(largest_ranks(out)) == {report.rank}
    found = output_of(assert_loads(sources.make, out), sources.inputs)
    expected = loaded_output(sources, adapter)
    assert close(found, expected, LOGITS)
    assert not close(sources.plain(), expected, 1e-3)


def largest_ranks(folder: Path) -> list[int]:
    return [v.shape[0] for k, v in read(folder).items() if ".lora_A." in k or "embedding_A" in k]


def layer_deltas(make: Make, folder: Path) -> Products:
    """scale·B·A by module in float64, as PEFT scales it; of attention both projections."""
    model = PeftModel.from_pretrained(make(), folder)
    found = {}
    for path, module in Live(model, folder).modules():
        b, a = factors_of(module, "default")
        found[path] = module.scaling["default"] * (b.double() @ a.double())
    return found


#: Block-diagonal factors are no plain product.
CUT = [name for name in RESIZED if name != "bdlora"]


@pytest.mark.parametrize("name", CUT)
def test_a_smaller_rank_is_the_best_of_it(name: str, tmp_path: Path) -> None:
    """Resized down, the delta of each module is its truncated SVD, as float64 computes it."""
    sources, out, rank = RESIZED[name], tmp_path / "out", 2
    (adapter,) = sources.write(tmp_path)
    loratool.resize(adapter, out, rank=rank)
    assert_loads(sources.make, out)
    assert set(largest_ranks(out)) == {rank}
    before = layer_deltas(sources.make, adapter)
    right = {path: truncated(delta, rank) for path, delta in before.items()}
    assert_same(layer_deltas(sources.make, out), right, FLOAT32)


@pytest.mark.parametrize("name", [name for name in RESIZED if name.startswith("dora")])
def test_dora_magnitudes_stay_when_the_rank_falls(name: str, tmp_path: Path) -> None:
    """Of DoRA the factors are cut and the magnitudes keep every bit."""
    sources, out = RESIZED[name], tmp_path / "out"
    (adapter,) = sources.write(tmp_path)
    loratool.resize(adapter, out, rank=1)
    before, after = read(adapter), read(out)
    magnitudes = [key for key in before if "lora_magnitude" in key]
    assert magnitudes
    assert all(torch.equal(after[key], before[key]) for key in magnitudes)


@pytest.mark.parametrize("name", CUT)
def test_energy_gives_each_module_its_rank(name: str, tmp_path: Path) -> None:
    """With `energy` each module has the fewest ranks that keep so much, and PEFT loads them."""
    sources, out, energy = RESIZED[name], tmp_path / "out", 0.8
    (adapter,) = sources.write(tmp_path)
    loratool.resize(adapter, out, energy=energy)
    assert_loads(sources.make, out)
    after = layer_deltas(sources.make, out)
    for path, delta in layer_deltas(sources.make, adapter).items():
        squares = torch.linalg.svdvals(delta) ** 2
        shares = squares.cumsum(0) / squares.sum()
        rank = int((shares < energy).sum()) + 1
        found = torch.linalg.matrix_rank(after[path], rtol=1e-5)
        if "attention" not in name:  # both projections have one rank in PEFT, the larger one
            assert found == rank, path
            assert close_double(after[path], truncated(delta, rank), FLOAT32), path
        assert found >= rank


def test_energy_with_pad_to_is_one_rank(tmp_path: Path) -> None:
    """A criterion with `pad_to` gives all modules one rank, a multiple of it."""
    sources, out = LAYERS["linear"], tmp_path / "out"
    adapter = sources.write(tmp_path)[0]
    report = loratool.resize(adapter, out, energy=0.5, pad_to=3)
    assert report.rank % 3 == 0
    assert set(largest_ranks(out)) == {report.rank}
    assert_loads(linears, out)


@pytest.mark.parametrize("written", ["float16", "bfloat16"])
def test_resized_half_precision_loads(written: str, tmp_path: Path) -> None:
    """resize writes other dtypes, and PEFT computes the same within their rounding."""
    sources, out = RESIZED["dora-linear"], tmp_path / "out"
    (adapter,) = sources.write(tmp_path)
    loratool.resize(adapter, out, rank=8, dtype=written)
    factors = [v for k, v in read(out).items() if "magnitude" not in k]
    assert {value.dtype for value in factors} == {getattr(torch, written)}
    found = output_of(assert_loads(linears, out), X12)
    assert close(found, loaded_output(sources, adapter), 8 * EPS[written])
