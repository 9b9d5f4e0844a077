"""What loratool writes by default loads in every server that reads PEFT's adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.adapters import config_of, pair
from helpers.extracting import EVERYTHING, Pair, model, moved, random_for
from helpers.files import State
from helpers.linting import TARGETS, of_ranks, on_two_layers, verdicts
from helpers.places import FIXTURES

import loratool

#: Those for which adapters are made.
SERVERS = ["vllm", "sglang", "llamacpp", "lorax", "peft-hotswap"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def assert_loads(folder: Path, base: Path | None = None) -> None:
    """All of the servers load it and compute what PEFT does, also held against its base."""
    for given in [None, base] if base else [None]:
        found = verdicts(folder, base=given, programs=SERVERS)
        assert [*found] == [*SERVERS, "merge"][: len(found)]
        assert {name: v.reasons for name, v in found.items() if v.outcome != "loads"} == {}


def with_positions() -> State:
    """A model that looks up positions too, and kinds of tokens."""
    names = ("model.embed_positions.weight", "model.token_type_embeddings.weight")
    return model() | {name: random_for(name, 12, 16).float() for name in names}


def tied() -> State:
    return {name: value for name, value in model().items() if name != HEAD}


#: Models with embeddings, norms, biases, linear layers and a head, and what config.json says.
MODELS: dict[str, tuple[Callable[[], State], dict[str, Any]]] = {
    "head of its own": (model, {"tie_word_embeddings": False}),
    "tied head": (tied, {"tie_word_embeddings": True}),
    "tied head in the file": (
        lambda: model() | {HEAD: model()[EMBEDDING].clone()}, {"tie_word_embeddings": True},
    ),
    "positions": (with_positions, {"tie_word_embeddings": False}),
}  # fmt: skip
LAYERS = {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 40}


def changed(folder: Path, name: str) -> Pair:
    """A model and its fine-tune, in which every tensor moved."""
    make, config = MODELS[name]
    state = make()
    tuned = moved(state)
    if config["tie_word_embeddings"] and HEAD in tuned:
        tuned[HEAD] = tuned[EMBEDDING].clone()
    return Pair(folder, state, tuned, **LAYERS, **config)


@pytest.mark.parametrize("options", [{"rank": 4}, {"energy": 0.6}, {"budget": "8kB"}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_an_extract_of_everything_loads(name: str, options: Any, tmp_path: Path) -> None:
    """A fine-tune that changed all it has: embeddings, norms, biases, linear layers, the head."""
    work = changed(tmp_path, name)
    report = work.extract(**options)
    assert len(report.groups) == 3
    assert_loads(work.out, work.base)


@pytest.mark.parametrize("name", MODELS)
def test_of_a_head_what_loads_is_in_an_extract(name: str, tmp_path: Path) -> None:
    """A head of its own has factors, which servers apply; one that is the embedding is left out
    with it, since an adapter of one of the two would be another model."""
    work = changed(tmp_path, name)
    report = work.extract(rank=4)
    own = not MODELS[name][1]["tie_word_embeddings"]
    assert ("lm_head" in {m.path for m in report.modules}) is own
    assert {t.name for t in report.left} >= {EMBEDDING}
    text = next(n.message for n in report.warnings if EMBEDDING in n.message)
    assert ("lm_head.weight is the same matrix, so its change is left out too" in text) is not own


@pytest.mark.parametrize("name", MODELS)
def test_what_is_on_request_is_so_because_it_does_not_load(name: str, tmp_path: Path) -> None:
    """With what was asked for there are servers that refuse the adapter, or drop parts of it, as
    the notices say: vLLM norms, biases and embeddings that are whole, LoRAX also factors of
    embeddings, llama.cpp those of a head that is the embedding."""
    work = changed(tmp_path, name)
    for group in ({"save": ["norms"]}, {"save": ["biases"]}, {"embeddings": True}, EVERYTHING):
        work.extract(rank=4, **group)
        found = verdicts(work.out, base=work.base, programs=SERVERS)
        assert found["lorax"].outcome == "differs", group
        whole = name == "positions" or "save" in group
        assert found["vllm"].outcome == ("refused" if whole else "loads"), group
        if "save" not in group:
            assert found["sglang"].outcome == ("refused" if whole else "loads")
            tied = MODELS[name][1]["tie_word_embeddings"]
            assert found["llamacpp"].outcome == ("refused" if whole or tied else "loads")


def test_an_extract_of_a_layer_and_the_head_loads(tmp_path: Path) -> None:
    """Where few of the modules changed that are called alike, they are named one by one, the head
    too: in a list, for SGLang reads no expression. LoRAX alone needs factors in all layers."""
    state = model(layers=6)
    ends = ("layers.1.self_attn.q_proj.weight", HEAD, "norm.weight", EMBEDDING)
    work = Pair(tmp_path, state, moved(state, *ends), **LAYERS | {"num_hidden_layers": 6})
    work.extract(rank=4)
    assert config_of(work.out)["target_modules"] == ["lm_head", "model.layers.1.self_attn.q_proj"]
    found = verdicts(work.out, base=work.base, programs=SERVERS)
    assert {name for name, v in found.items() if v.outcome != "loads"} == {"lorax"}


def test_an_extract_of_a_real_fine_tune_loads(tmp_path: Path) -> None:
    """The same for a full fine-tune that was trained; TGI and exllamav3 load it too."""
    out = tmp_path / "out"
    loratool.extract(FIXTURES / "base", FIXTURES / "tuned", out, rank=8)
    assert_loads(out, FIXTURES / "base")
    assert loratool.lint(out, programs=["tgi", "exllama"]).passes


def with_head(folder: Path, rank: int = 4, seed: int = 0, **config: Any) -> Path:
    """An adapter of the usual kind: linear layers, and the head."""
    extra = pair("lm_head", 40, 10, rank, 50 + seed)
    settings = {"target_modules": [*TARGETS, "lm_head"], **config}
    return on_two_layers(folder, extra, rank=rank, seed=seed, **settings)


#: Adapters that other programs write: plain, and with what servers read differently.
INPUTS: dict[str, Callable[[Path, int], Path]] = {
    "plain": lambda f, seed: with_head(f, seed=seed),
    "rsLoRA": lambda f, seed: with_head(f, seed=seed, use_rslora=True),
    "alpha_pattern": lambda f, seed: with_head(f, seed=seed, alpha_pattern={"q_proj": 16}),
    "alpha no integer": lambda f, seed: with_head(f, seed=seed, lora_alpha=8.5),
    "regular expression": lambda f, seed: with_head(
        f, seed=seed, target_modules=r".*\.(q_proj|v_proj)|lm_head"
    ),
    "without some layers": lambda f, seed: with_head(
        f, seed=seed, exclude_modules=["model.layers.2.self_attn.q_proj"]
    ),
    "rank_pattern": lambda f, seed: of_ranks(f, {"q_proj": 2, "v_proj": 4}),
    "no head": lambda f, seed: on_two_layers(f, seed=seed),
}  # fmt: skip


@pytest.mark.parametrize("options", [{"rank": 3}, {"energy": 0.7}, {"rank": 8}], ids=str)
@pytest.mark.parametrize("name", INPUTS)
def test_a_resized_adapter_loads(name: str, options: Any, tmp_path: Path) -> None:
    """Whatever its ranks, scales and targets were: one rank, alpha = rank, targets by name."""
    adapter = INPUTS[name](tmp_path / "a", 0)
    loratool.resize(adapter, tmp_path / "out", **options)
    assert_loads(tmp_path / "out")


@pytest.mark.parametrize("options", [{}, {"rank": 4}, {"method": "ties", "rank": 4,
                                                       "density": 0.5}], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", INPUTS)
def test_a_combined_adapter_loads(name: str, options: Any, tmp_path: Path) -> None:
    """The sum of a plain adapter with a head and of another one, also where one has no head."""
    adapters = [with_head(tmp_path / "a", rank=3, seed=1), INPUTS[name](tmp_path / "b", 0)]
    loratool.combine(adapters, tmp_path / "out", **options)
    assert_loads(tmp_path / "out")


@pytest.mark.parametrize("verb", ["combine", "resize"])
def test_what_comes_of_trained_adapters_loads(verb: str, tmp_path: Path) -> None:
    """The same for adapters that PEFT trained."""
    out, adapter = tmp_path / "out", FIXTURES / "adapter"
    if verb == "combine":
        loratool.combine([adapter, FIXTURES / "tasks" / "html"], out)
    else:
        loratool.resize(adapter, out, energy=0.95)
    assert_loads(out, FIXTURES / "base")
