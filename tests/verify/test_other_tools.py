"""verify says yes to what other tools write, and calls their ways of rounding by name."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.adapters import write_adapter as adapter_files
from helpers.files import load
from helpers.files import write_base as base_files
from helpers.models import DTYPES, Holder, State, Trained, lora, tiny_llama, train, train_on_disk
from helpers.tool_roundings import ADAPTER, BASE, factors
from peft import PeftModel
from peft.tuners.lora.config import BdLoraConfig
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import loratool
from loratool.verbs.verify import VerifyReport


def codes(report: VerifyReport) -> Counter[str]:
    return Counter(f.code for f in report.findings)


def yes(model: Path, base: Path = BASE, adapter: Path = ADAPTER, **options: Any) -> VerifyReport:
    """Verify, expecting a yes; the summary is the message if not."""
    report = loratool.verify(model, base, adapter, **options)
    assert report.verdict == "yes", (report.summary, codes(report))
    return report


def written(folder: Path, state: State, config: Path | None = BASE) -> Path:
    folder.mkdir(parents=True)
    if config is not None and (config / "config.json").exists():
        shutil.copy(config / "config.json", folder)
    save_file({n: v.contiguous() for n, v in state.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pefts_merge_of_the_fixtures_passes(
    dtype: str, safe: bool, autocast: bool, tmp_path: Path
) -> None:
    """PEFT's merge and transformers' files pass in every dtype, with every switch of PEFT's."""
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=DTYPES[dtype])
    adapted = PeftModel.from_pretrained(model, ADAPTER, autocast_adapter_dtype=autocast)
    adapted.merge_and_unload(safe_merge=safe).save_pretrained(tmp_path / "m")
    report = yes(tmp_path / "m")
    if dtype == "float32" or (autocast and not safe):
        assert codes(report) == {"once": 28}
        assert report.summary == ["all 28 modules are the once-rounded result"]
    elif autocast:
        assert codes(report) == {"rounded-twice": 28}
        assert f"the delta was rounded to {dtype} before it was added" in report.summary[0]
    else:  # A and B were rounded too, and their product
        assert set(codes(report)) <= {"rounded-twice", "low-precision"}
    assert all(f.applied == pytest.approx(1, abs=0.01) for f in report.findings)
    assert report.untouched == 11


@pytest.mark.parametrize("then", ["float16", "float32"])
@pytest.mark.parametrize("safe", [False, True])
def test_merge_in_bfloat16_stored_otherwise_is_rounded_twice(
    then: str, safe: bool, tmp_path: Path
) -> None:
    """A bfloat16 model that was merged and then stored in another dtype says so."""
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
    adapted = PeftModel.from_pretrained(model, ADAPTER)
    merged = adapted.merge_and_unload(safe_merge=safe)
    merged.to(DTYPES[then]).save_pretrained(tmp_path / "m")
    report = yes(tmp_path / "m")
    assert report.untouched == 11
    if safe:
        assert set(codes(report)) <= {"rounded-twice", "low-precision"}
    else:
        assert codes(report) == {"rounded-twice": 28}
        assert report.summary == [
            "all 28 modules are merged and rounded twice: the sum was rounded to bfloat16 before "
            "it was stored"
        ]


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], dict[str, Any]]] = {
    "linear": (lambda: Holder(l=nn.Linear(40, 24)), ("l",), {}),
    "rslora": (lambda: Holder(l=nn.Linear(40, 24)), ("l",), {"use_rslora": True}),
    "dora": (lambda: Holder(l=nn.Linear(40, 24)), ("l",), {"use_dora": True}),
    "lora-bias": (lambda: Holder(l=nn.Linear(40, 24)), ("l",), {"lora_bias": True}),
    "bias-all": (lambda: Holder(l=nn.Linear(40, 24), z=nn.Linear(24, 8)), ("l",), {"bias": "all"}),
    "saved": (
        lambda: Holder(l=nn.Linear(40, 24), z=nn.Linear(24, 8)), ("l",), {"modules_to_save": ["z"]},
    ),
    "embedding": (lambda: Holder(l=nn.Embedding(50, 24)), ("l",), {}),
    "dora-embedding": (lambda: Holder(l=nn.Embedding(50, 24)), ("l",), {"use_dora": True}),
    "conv2d": (lambda: Holder(l=nn.Conv2d(6, 8, 3)), ("l",), {}),
    "dora-conv2d": (lambda: Holder(l=nn.Conv2d(6, 8, 3)), ("l",), {"use_dora": True}),
    "conv1d": (lambda: Holder(c_fc=Conv1D(24, 40)), ("c_fc",), {}),
    "attention": (lambda: Holder(l=nn.MultiheadAttention(16, 2)), ("l",), {}),
    "bdlora": (
        lambda: Holder(l=nn.Linear(24, 32)), ("l",),
        {"use_bdlora": BdLoraConfig(target_modules_bd_a=["l"], nblocks=2)},
    ),
    "mica": (lambda: Holder(l=nn.Linear(24, 32)), ("l",), {"init_lora_weights": "mica"}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_that_peft_merges_passes(kind: str, dtype: str, tmp_path: Path) -> None:
    """PEFT's merge of every kind of layer passes, loratool's as once-rounded, the base not."""
    make, targets, options = KINDS[kind]
    torch.manual_seed(0)
    config = {"model_type": "gpt2"} if kind == "conv1d" else None
    model = make()
    trained = train(tmp_path, model, lora(*targets, **options), DTYPES[dtype], config)
    with torch.no_grad():
        peft = written(tmp_path / "peft", trained.peft_merge(), trained.base)
    yes(peft, trained.base, trained.adapter)
    trained.merge()
    report = yes(tmp_path / "merged", trained.base, trained.adapter)
    assert set(codes(report)) <= {"once", "same"}
    report = loratool.verify(trained.base, trained.base, trained.adapter)
    assert report.verdict == "no"
    assert {f.code for f in report.findings if f.adapted} == {"not-merged"}, report.summary


@pytest.mark.parametrize("then", ["float16", "float32"])
@pytest.mark.parametrize("kind", ["linear", "dora", "lora-bias", "bias-all", "saved", "embedding"])
def test_every_kind_rounded_on_the_way_passes(kind: str, then: str, tmp_path: Path) -> None:
    """Biases, saved modules and the rest may be rounded by a bfloat16 model that is then cast."""
    make, targets, options = KINDS[kind]
    torch.manual_seed(0)
    trained = train(tmp_path, make(), lora(*targets, **options), torch.bfloat16)
    state = {n: v.bfloat16().to(DTYPES[then]) for n, v in trained.peft_merge().items()}
    yes(written(tmp_path / "m", state, trained.base), trained.base, trained.adapter)


def tied_llama(folder: Path, tied: bool, *targets: str, **options: Any) -> Trained:
    model = tiny_llama(tie_word_embeddings=tied)
    return train_on_disk(folder, model, lora(*targets, **options))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "targets", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head"), ("q_proj",)]
)
def test_tied_and_untied_models_pass(targets: tuple[str, ...], tied: bool, tmp_path: Path) -> None:
    """Adapters on embedding, head, both or neither pass as loratool and as PEFT write them."""
    trained = tied_llama(tmp_path, tied, *targets)
    trained.merge()
    report = yes(tmp_path / "merged", trained.base, trained.adapter)
    assert set(codes(report)) <= {"once", "same"}
    assert not any("adapter holds" in sentence for sentence in report.summary)
    with torch.no_grad():
        trained.model.merge_and_unload().save_pretrained(tmp_path / "peft")
    report = yes(tmp_path / "peft", trained.base, trained.adapter)
    together = [w for w in report.warnings if w.code == "tied-together"]
    assert bool(together) == (tied and targets != ("q_proj",))
    report = loratool.verify(trained.base, trained.base, trained.adapter)
    assert report.verdict == "no"


@pytest.mark.parametrize("adapted", [False, True])
def test_head_written_out_by_another_tool_passes(adapted: bool, tmp_path: Path) -> None:
    """A tied head that another tool wrote as a second copy passes, unless it differs."""
    trained = tied_llama(tmp_path, True, "embed_tokens" if adapted else "q_proj")
    with torch.no_grad():
        trained.model.merge_and_unload().save_pretrained(tmp_path / "peft")
    state = load(tmp_path / "peft")
    assert "lm_head.weight" not in state
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    if not adapted:
        yes(written(tmp_path / "m", state, trained.base), trained.base, trained.adapter)
    state["lm_head.weight"][5] *= 1.25
    model = written(tmp_path / "n", state, trained.base)
    report = loratool.verify(model, trained.base, trained.adapter)
    assert report.verdict == "no"
    assert "lm_head.weight" in {f.tensor for f in report.findings if not f.sound}


def test_head_of_an_untied_base_must_be_there(tmp_path: Path) -> None:
    """The head of a model that is not tied is missing if it is not there."""
    trained = tied_llama(tmp_path, False, "q_proj")
    state = trained.merge()
    del state["lm_head.weight"]
    model = written(tmp_path / "m", state, trained.base)
    report = loratool.verify(model, trained.base, trained.adapter)
    assert [f.tensor for f in report.findings if f.code == "missing"] == ["lm_head.weight"]


Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]


def mlx(w: torch.Tensor, b: torch.Tensor, a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """mlx-lm's fuse: delta = ((scale·Bᵀ)ᵀ·Aᵀ) in float32, cast to the weight's dtype, added."""
    delta = ((2.0 * b) @ a).to(dtype)
    return w.to(dtype) + delta


def axolotl(w: torch.Tensor, b: torch.Tensor, a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """axolotl's memory-efficient merge: factors in bfloat16, the delta too, then the sum."""
    delta = 2.0 * (b.to(dtype) @ a.to(dtype))
    return w.to(dtype) + delta


def scaled_first(
    w: torch.Tensor, b: torch.Tensor, a: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """unsloth and others: float32 addmm with the scale taken into a factor."""
    return torch.addmm(w.float(), 2.0 * b, a).to(dtype)


def pairs_in_half(
    w: torch.Tensor, b: torch.Tensor, a: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """A product of rounded factors, itself added in float32."""
    return (w.float() + 2.0 * (b.to(dtype) @ a.to(dtype)).float()).to(dtype)


def double(w: torch.Tensor, b: torch.Tensor, a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Everything in float64, rounded to float32 on the way to half precision."""
    return (w.double() + 2.0 * (b.double() @ a.double())).float().to(dtype)


TOOLS: dict[str, tuple[Way, set[str]]] = {
    "mlx": (mlx, {"rounded-twice"}),
    "axolotl": (axolotl, {"rounded-twice", "low-precision"}),
    "scaled-first": (scaled_first, {"once"}),
    "pairs-in-half": (pairs_in_half, {"rounded-twice", "low-precision"}),
    "double": (double, {"once"}),
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("tool", TOOLS)
def test_arithmetic_of_other_tools_passes(tool: str, dtype: str, tmp_path: Path) -> None:
    """Other orders of sums and other roundings of the fixtures pass, and are named as such."""
    way, expected = TOOLS[tool]
    state = {n: v.to(DTYPES[dtype]) for n, v in load(BASE).items()}
    for name, (b, a) in factors().items():
        state[name] = way(load(BASE)[name], b, a, DTYPES[dtype])
    report = yes(written(tmp_path / "m", state))
    assert set(codes(report)) <= expected
    if tool == "mlx":
        assert f"the delta was rounded to {dtype} before it was added" in report.summary[0]
    assert all(f.applied == pytest.approx(1, abs=0.01) for f in report.findings)


@pytest.mark.parametrize("tool", TOOLS)
def test_arithmetic_of_other_tools_with_another_weight_fails(tool: str, tmp_path: Path) -> None:
    """What passes as another tool's rounding does not hide a wrong scale or a missing delta."""
    way, _ = TOOLS[tool]
    for weight in (0.0, 0.5, 0.9, 1.1, 2.0):
        state = dict(load(BASE))
        for name, (b, a) in factors().items():
            state[name] = way(load(BASE)[name], b * weight, a, torch.bfloat16)
        report = loratool.verify(written(tmp_path / f"m{weight}", state), BASE, ADAPTER)
        assert report.verdict == "no"
        assert codes(report) == {"weight" if weight else "not-merged": 28}


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> State:
    out = tmp_path_factory.mktemp("right") / "out"
    loratool.merge(BASE, ADAPTER, out)
    return load(out)


def in_shards(folder: Path, state: State, count: int, suffix: str) -> Path:
    """Deal the tensors out to `count` files, in an order of their own."""
    folder.mkdir()
    shutil.copy(BASE / "config.json", folder)
    names = sorted(state, reverse=True)
    stem, index = ("model", "model.safetensors.index.json")
    if suffix == "bin":
        stem, index = ("pytorch_model", "pytorch_model.bin.index.json")
    places = {}
    for i in range(count):
        part = {n: state[n] for n in names[i::count]}
        file = f"{stem}-{i + 1:05d}-of-{count:05d}.{suffix}" if count > 1 else f"{stem}.{suffix}"
        places |= dict.fromkeys(part, file)
        if suffix == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file)
    if count > 1:
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_split_and_format_change_nothing(
    count: int, suffix: str, right: State, tmp_path: Path
) -> None:
    """Any split into shards, of safetensors or of torch, is the same model."""
    report = yes(in_shards(tmp_path / "m", right, count, suffix))
    assert codes(report) == {"once": 28}
    assert report.untouched == 11


def test_one_file_without_config_passes(right: State, tmp_path: Path) -> None:
    """MERGED may be a weights file by itself."""
    save_file(right, tmp_path / "alone.safetensors")
    assert codes(yes(tmp_path / "alone.safetensors")) == {"once": 28}


@pytest.mark.parametrize("name", ["without", "nested"])
def test_names_with_another_prefix_pass(name: str, right: State, tmp_path: Path) -> None:
    """A leading component more or less in all names is the same model."""
    if name == "nested":
        state = {f"language_model.{n}": v for n, v in right.items()}
    else:
        state = {n.removeprefix("model."): v for n, v in right.items()}
    report = yes(written(tmp_path / "m", state))
    assert codes(report) == {"once": 28}


def test_strided_torch_tensors_pass(right: State, tmp_path: Path) -> None:
    """A torch file whose tensors are transposed views holds the same values."""
    state = {n: v.T.contiguous().T if v.ndim == 2 else v for n, v in right.items()}
    assert codes(yes(in_shards(tmp_path / "m", state, 1, "bin"))) == {"once": 28}


@pytest.mark.parametrize("change", ["dropped", "added", "changed"])
def test_legacy_buffers_may_come_and_go(change: str, tmp_path: Path) -> None:
    """Buffers that no current model reads may be missing, added or different."""
    path = "model.layers.0.self_attn"
    rng = np.random.default_rng(0)
    state = {f"{path}.q_proj.weight": torch.randn(16, 16)}
    buffer = {f"{path}.rotary_emb.inv_freq": torch.arange(4.0)}
    names = [f"base_model.model.{path}.q_proj.lora_{f}.weight" for f in "AB"]
    pair = [rng.standard_normal(s).astype(np.float32) for s in ((2, 16), (16, 2))]
    adapter = adapter_files(tmp_path / "a", dict(zip(names, pair, strict=True)), {"r": 2})
    base = base_files(tmp_path / "base", {**state, **({} if change == "added" else buffer)})
    loratool.merge(base, adapter, tmp_path / "out")
    found = load(tmp_path / "out")
    if change == "dropped":
        del found[next(iter(buffer))]
    else:
        found |= {n: v + 1 for n, v in buffer.items()}
    model = written(tmp_path / "m", found, base)
    if change == "changed":
        assert loratool.verify(model, base, adapter).verdict in ("yes", "no")
    else:
        yes(model, base, adapter)


def problem(
    folder: Path, ratio: float, base: torch.dtype, factor: torch.dtype, size: int, rank: int,
    seed: int = 0,
) -> tuple[Path, Path, dict[str, tuple[torch.Tensor, torch.Tensor]]]:  # fmt: skip
    """A base with three modules and Δ of `ratio` times their size; scale 2, factors in a dtype."""
    generator = torch.Generator().manual_seed(seed)
    state, stored, found = {}, {}, {}
    for i in range(3):
        path = f"model.layers.{i}.mlp.up_proj"
        state[f"{path}.weight"] = (torch.randn(size, size, generator=generator) * 0.02).to(base)
        b = torch.randn(size, rank, generator=generator) * (ratio * 0.01 / math.sqrt(rank))
        a = torch.randn(rank, size, generator=generator)
        found[f"{path}.weight"] = b.to(factor), a.to(factor)
        stored[f"base_model.model.{path}.lora_B.weight"] = b.to(factor)
        stored[f"base_model.model.{path}.lora_A.weight"] = a.to(factor)
    adapter = folder / "a"
    adapter.mkdir(parents=True)
    save_file(stored, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return base_files(folder / "base", state), adapter, found


def delta(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return 2.0 * (b.float() @ a.float())


#: W, B, A, the output's dtype: ways to merge that are legitimate.
WAYS: dict[str, Way] = {
    "once": lambda w, b, a, out: (w.float() + delta(b, a)).to(out),
    "delta-in-base": lambda w, b, a, out: (w + delta(b, a).to(w.dtype)).to(out),
    "through-base": lambda w, b, a, out: (w.float() + delta(b, a)).to(w.dtype).to(out),
    "base-cast": lambda w, b, a, out: (w.to(out).float() + delta(b, a)).to(out),
    "both-cast": lambda w, b, a, out: w.to(out) + delta(b, a).to(out),
    "product-in-output": lambda w, b, a, out: w.to(out) + 2.0 * (b.to(out) @ a.to(out)),
    "product-in-base": lambda w, b, a, out: (w + 2.0 * (b.to(w.dtype) @ a.to(w.dtype))).to(out),
}
DTYPE_PAIRS = [(b, o) for b in DTYPES for o in DTYPES]


@pytest.mark.parametrize("ratio", [0.3, 0.03, 0.003, 0.001, 0.0003])
@pytest.mark.parametrize("way", WAYS)
def test_ways_of_rounding_pass_however_small_the_delta(
    way: str, ratio: float, tmp_path: Path
) -> None:
    """Every dtype of base and output, and every way of rounding, passes; the base never does."""
    wrong = {}
    for base_dtype, out in DTYPE_PAIRS:
        folder = tmp_path / f"{base_dtype}-{out}"
        base, adapter, found = problem(folder, ratio, DTYPES[base_dtype], torch.float32, 64, 8)
        state = load(base)
        merged = {n: WAYS[way](state[n], *found[n], DTYPES[out]) for n in found}
        report = loratool.verify(written(folder / "m", merged, base), base, adapter)
        if report.verdict == "no":
            wrong[base_dtype, out] = dict(codes(report))
    assert wrong == {}


@pytest.mark.parametrize("seed", range(4))
def test_random_merges_pass_and_random_faults_do_not(seed: int, tmp_path: Path) -> None:
    """Random dtypes, ranks, sizes and scales: ways of rounding pass, wrong weights do not."""
    chance = random.Random(seed)
    wrong = []
    for turn in range(24):
        base_dtype, out, factor = (DTYPES[chance.choice(list(DTYPES))] for _ in range(3))
        size, rank = chance.choice([32, 64, 128]), chance.choice([1, 4, 16])
        ratio = 10 ** chance.uniform(-2.5, 0)
        folder = tmp_path / str(turn)
        base, adapter, found = problem(folder, ratio, base_dtype, factor, size, rank, seed)
        state = load(base)
        legitimate = chance.random() < 0.5
        weight = 1.0 if legitimate else chance.choice([-1.0, 0.0, 0.5, 0.8, 1.25, 2.0, 4.0])
        way = chance.choice(list(WAYS))
        merged = {n: WAYS[way](state[n], found[n][0] * weight, found[n][1], out) for n in found}
        report = loratool.verify(written(folder / "m", merged, base), base, adapter)
        if (report.verdict == "yes") != legitimate:
            case = (way, weight, str(base_dtype), str(out), str(factor), size, rank, ratio)
            wrong.append((case, dict(codes(report))))
    assert wrong == []


@pytest.mark.parametrize("out", ["float16", "bfloat16"])
def test_loss_of_a_double_rounding_is_not_below_that_of_one(out: str, tmp_path: Path) -> None:
    """`lost` of a merge that was rounded twice is above that of the once-rounded one."""
    base, adapter, found = problem(tmp_path, 0.01, torch.bfloat16, torch.float32, 64, 8)
    lost = []
    for way in ("once", "delta-in-base"):
        state = {n: WAYS[way](load(base)[n], *found[n], DTYPES[out]) for n in found}
        report = loratool.verify(written(tmp_path / way, state, base), base, adapter)
        assert report.lost is not None
        lost.append(report.lost)
    assert 0 < lost[0] < lost[1]
