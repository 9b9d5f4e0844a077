"""vLLM's own check and reader: it refuses what lint says it does, and computes what lint says."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers.adapters import PREFIX
from helpers.linting import ADAPTERS, on_two_layers, verdicts
from helpers.places import FIXTURES
from helpers.vllm_loading import LoadedByVllm, loaded_by_vllm
from safetensors.numpy import load_file, save_file

import loratool
from loratool.serving.verdict import Verdict
from loratool.serving.vllm import DEFAULT_RANK, VLLM

pytestmark = pytest.mark.vllm

BASE = FIXTURES / "base"
#: Tokens of the models that the adapters are for.
TOKENS, TOKENS_OF_BASE = 40, 256
LIMITS = {16: "refused", 32: "loads", 64: "loads"}
OUTPUTS = ("combine", "resize", "extract")


def _renamed(folder: Path) -> Path:
    """Factors as PEFT calls them in memory, with the adapter's name in them."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({n.replace(".weight", ".default.weight"): t for n, t in tensors.items()}, file)
    return folder


def _without(field: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        file = on_two_layers(folder) / "adapter_config.json"
        config = json.loads(file.read_text())
        del config[field]
        file.write_text(json.dumps(config))
        return folder

    return make


def _heads(folder: Path) -> Path:
    heads = {f"{PREFIX}{name}.weight": np.ones((2, 10), np.float32)
             for name in ("score", "classifier")}  # fmt: skip
    return on_two_layers(folder, heads, modules_to_save=["score", "classifier"])


#: Beside those of the table, what only configs, names and initialisations say.
EVERY: dict[str, Callable[[Path], Path]] = {
    **ADAPTERS,
    **{f"without {field}": _without(field) for field in ("r", "lora_alpha", "target_modules")},
    **{
        f"init {init}": partial(on_two_layers, init_lora_weights=init)
        for init in (True, False, "gaussian", "GAUSSIAN", "eva", "orthogonal", "mica", "olora",
                     "loftq", "corda", "pissa_niter_4", "lora_ga")
    },
    "two heads": _heads,
    "names in memory": lambda f: _renamed(on_two_layers(f)),
    "BD-LoRA": partial(on_two_layers, use_bdlora={"nblocks": 2, "target_modules_bd_a": ["no"]}),
    "QALoRA": partial(on_two_layers, use_qalora=True, qalora_group_size=2),
    "Arrow": partial(on_two_layers, arrow_config={"top_k": 2}),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    found = {name: make(folder / name.replace(" ", "-")) for name, make in EVERY.items()}
    outputs = {name: folder / name for name in OUTPUTS}
    adapter = FIXTURES / "adapter"
    loratool.combine([adapter, FIXTURES / "tasks" / "html"], outputs["combine"], base=BASE)
    loratool.resize(adapter, outputs["resize"], rank=4)
    loratool.extract(BASE, FIXTURES / "tuned", outputs["extract"], rank=8)
    return found | outputs


@pytest.fixture(scope="module")
def loaded(made: dict[str, Path]) -> dict[str, LoadedByVllm]:
    asked = {name: (made[name], DEFAULT_RANK, TOKENS) for name in EVERY}
    asked |= {name: (made[name], DEFAULT_RANK, TOKENS_OF_BASE) for name in OUTPUTS}
    asked |= {f"rank 32 below {limit}": (made["rank 32"], limit, TOKENS) for limit in LIMITS}
    asked["another vocabulary"] = made["embedding factors"], DEFAULT_RANK, TOKENS_OF_BASE
    version, found = loaded_by_vllm(asked)
    assert version == VLLM.version
    return found


def verdict_of(folder: Path, **options: object) -> Verdict:
    return verdicts(folder, programs=["vllm"], **options)["vllm"]


def deltas(adapter: Path) -> dict[str, float]:
    """What the adapter changes by its own format, as norms by module."""
    modules = loratool.inspect(adapter).modules
    return {module.path: module.delta_norm for module in modules if module.delta_norm is not None}


@pytest.mark.parametrize("name", EVERY)
def test_vllm_refuses_what_lint_says_it_refuses(
    name: str, made: dict[str, Path], loaded: dict[str, LoadedByVllm]
) -> None:
    """And nothing else: an error of vLLM's own is there exactly where the verdict is "refused"."""
    outcome = verdict_of(made[name]).outcome
    assert (outcome == "refused") == bool(loaded[name].refusal), loaded[name].refusal


def test_vllm_computes_what_lint_says_it_does(
    made: dict[str, Path], loaded: dict[str, LoadedByVllm]
) -> None:
    """Where the verdict is "loads", every module has the delta that the adapter's format means."""
    names = [name for name in EVERY if verdict_of(made[name]).outcome == "loads"]
    names.remove("experts")  # stacks are taken apart later, by the model
    assert len(names) > 15
    for name in names:
        assert loaded[name].norms == pytest.approx(deltas(made[name]), rel=1e-5), name


@pytest.mark.parametrize(("limit", "outcome"), LIMITS.items())
def test_the_limit_of_the_rank_is_vllm_s(
    limit: int, outcome: str, made: dict[str, Path], loaded: dict[str, LoadedByVllm]
) -> None:
    """--max-rank of lint and --max-lora-rank of the server mean the same."""
    assert verdict_of(made["rank 32"], max_rank=limit).outcome == outcome
    assert bool(loaded[f"rank 32 below {limit}"].refusal) == (outcome == "refused")


def test_the_vocabulary_is_vllm_s(made: dict[str, Path], loaded: dict[str, LoadedByVllm]) -> None:
    """Factors on an embedding of 40 tokens are refused for a model of 256."""
    adapter = made["embedding factors"]
    assert verdict_of(adapter, base=BASE).outcome == "refused"
    assert "vocabulary" in loaded["another vocabulary"].refusal


@pytest.mark.parametrize("name", OUTPUTS)
def test_vllm_takes_what_is_made_by_default(
    name: str, made: dict[str, Path], loaded: dict[str, LoadedByVllm]
) -> None:
    """The outputs of combine, resize and extract, with the same deltas."""
    assert verdict_of(made[name], base=BASE).outcome == "loads"
    assert loaded[name].refusal == ""
    assert loaded[name].norms == pytest.approx(deltas(made[name]), rel=1e-3)
