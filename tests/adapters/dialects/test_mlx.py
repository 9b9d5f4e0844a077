"""MLX: transposed factors, experts, embeddings and magnitudes, and which scale a config tells."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.dialects import CASES, DialectCase, apart, cases
from safetensors.numpy import load_file, save_file

import loratool
from loratool import Told
from loratool.adapters.adapter import Adapter
from loratool.adapters.reading import read_adapter
from loratool.errors import AdapterError, LoraToolError

Tensors = dict[str, np.ndarray]
LAYER = "model.layers.0"
DOWN = f"{LAYER}.mlp.down_proj"
PARAMETERS = {"rank": 2, "scale": 4.0, "dropout": 0.0}
CONFIG = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": PARAMETERS}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def factors(path: str, width: int, out: int, rank: int = 2, seed: int = 0) -> Tensors:
    return {
        f"{path}.lora_a": normal(width, rank, seed=seed),
        f"{path}.lora_b": normal(rank, out, seed=seed + 1),
    }


def write(folder: Path, tensors: Tensors, config: dict[str, Any] | None = CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapters.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def reasons(adapter: Adapter) -> dict[str, str]:
    return {n.code: n.message for n in adapter.notices if n.refused}


def added(case: DialectCase, out: Path, adapter: Path | None = None, **told: Any) -> Tensors:
    """What a merge adds to the tensors of the base."""
    said = Told(**(case.options | told))
    loratool.merge(case.base, adapter or case.adapter, out, dtype="float32", told=said)
    merged, before = load_file(out / "model.safetensors"), case.base_tensors()
    return {k: merged[k].astype(np.float64) - before[k].astype(np.float64) for k in before}


@pytest.mark.parametrize("case", cases("mlx", merges=True), ids=lambda case: case.name)
def test_what_is_merged_is_what_mlx_fuses(case: DialectCase, tmp_path: Path) -> None:
    assert apart(added(case, tmp_path / "out"), case.expected()) < 1e-6


@pytest.mark.parametrize("case", cases("mlx", merges=False), ids=lambda case: case.name)
def test_a_scale_that_nothing_tells_is_asked_for(case: DialectCase, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="--scale S"):
        added(case, tmp_path / "out")
    assert read_adapter(case.adapter).modules


def test_every_verb_takes_it(tmp_path: Path) -> None:
    """Also verify, unmerge, combine, resize and compare see the same change as a merge."""
    case = CASES["mlx-lora"]
    loratool.merge(case.base, case.adapter, tmp_path / "m", dtype="float32", reversible=True)
    assert loratool.verify(tmp_path / "m", case.base, case.adapter).verdict == "yes"
    loratool.unmerge(tmp_path / "m", case.adapter, tmp_path / "u")
    before, after = (load_file(f / "model.safetensors") for f in (case.base, tmp_path / "u"))
    assert all(np.array_equal(before[k], after[k]) for k in before)
    loratool.combine([case.adapter], tmp_path / "c", method="linear")
    expected = case.expected()
    assert apart(added(case, tmp_path / "cm", tmp_path / "c"), expected) < 1e-6
    loratool.resize(case.adapter, tmp_path / "r", rank=2)
    assert loratool.compare([case.adapter, tmp_path / "c"]).pairs[0].cosine == pytest.approx(1)
    (module, *_) = loratool.inspect(case.adapter).modules
    assert (module.scale, module.scale_from) == (5.0, "config")


# --- scales ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        (CONFIG, 4.0),
        ({"num_layers": 1, "lora_parameters": PARAMETERS | {"alpha": 16.0}}, 4.0),
        ({"lora_layers": 1, "lora_parameters": PARAMETERS | {"alpha": 16.0}}, None),
        ({"lora_layers": 1, "fine_tune_type": "lora", "lora_parameters": PARAMETERS}, 4.0),
        ({"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "alpha": 16.0}}, None),
        ({"lora_parameters": PARAMETERS}, None),
        (None, None),
    ],
)
def test_the_scale_is_that_of_the_config(
    config: dict[str, Any] | None, scale: float | None, tmp_path: Path
) -> None:
    """`scale` is all of it, alpha is unused; of the first months of 2024 nobody knows."""
    source = write(tmp_path, factors(DOWN, 6, 5), config)
    found = read_adapter(source)
    assert found.modules[DOWN].scale == scale
    assert ("no-alpha" in reasons(found)) == (scale is None)
    said = read_adapter(source, Told(scale=3.0, override=True))
    assert said.modules[DOWN].scale == 3.0
    assert not reasons(said)


def test_an_old_config_names_both_scales(tmp_path: Path) -> None:
    config = {"lora_layers": 1, "lora_parameters": PARAMETERS | {"alpha": 16.0}}
    said = reasons(read_adapter(write(tmp_path, factors(DOWN, 6, 5), config)))["no-alpha"]
    assert "scale·alpha/r, 32" in said
    assert "scale alone, 4" in said


def test_an_alpha_that_would_mislead_is_spoken_of(tmp_path: Path) -> None:
    for alpha, told in ((16.0, True), (8.0, False)):
        parameters = {"lora_parameters": PARAMETERS | {"alpha": alpha}}
        found = read_adapter(write(tmp_path, factors(DOWN, 6, 5), CONFIG | parameters))
        assert ("unused-alpha" in [n.code for n in found.notices]) == told


def test_a_scale_that_the_config_contradicts_is_an_error(tmp_path: Path) -> None:
    source = write(tmp_path, factors(DOWN, 6, 5))
    with pytest.raises(AdapterError, match="config of the adapter says 4"):
        read_adapter(source, Told(alpha=16.0))
    assert read_adapter(source, Told(alpha=8.0)).modules[DOWN].scale == 4.0
    for option, told in (
        ("--product", Told(product="BA")),
        ("--kind", Told(kind="multiplicative")),
        ("--adapter-rank 3", Told(rank=3)),
    ):
        with pytest.raises(AdapterError, match=option):
            read_adapter(source, told)
    assert read_adapter(source, Told(product="ABt", rank=2)).modules


def test_mlx_vlm_says_alpha_and_not_what_it_is(tmp_path: Path) -> None:
    """Its factor was alpha, and is alpha/r; x·A·B is how it multiplies."""
    tensors = {f"{DOWN}.A": normal(32, 2), f"{DOWN}.B": normal(2, 16, seed=1)}
    source = write(tmp_path / "in", tensors, {"rank": 2, "alpha": 16, "dropout": 0.0})
    found = read_adapter(source)
    assert (found.format, found.producer, found.modules[DOWN].scale) == ("mlx", "mlx-vlm", None)
    assert "(16) until March 2026 and with alpha/r (8)" in reasons(found)["no-alpha"]
    delta = added(CASES["mlx-lora"], tmp_path / "out", source, scale=8.0)[f"{DOWN}.weight"]
    right = 8 * (tensors[f"{DOWN}.A"] @ tensors[f"{DOWN}.B"]).T
    assert np.allclose(delta, right, atol=1e-5)


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("mlp.switch_mlp.up_proj", "mlp.experts.1.up_proj"),
        ("block_sparse_moe.switch_mlp.up_proj", "block_sparse_moe.experts.1.w3"),
        ("mlp.experts.gate_proj", "mlp.experts.1.gate_proj"),
        ("experts.switch_glu.down_proj", "experts.1.down_proj"),
        ("mixer.switch_mlp.fc1", "mixer.experts.1.up_proj"),
        ("moe.switch_mlp.fc1", "moe.mlp.1.fc1"),
    ],
)
def test_experts_have_the_names_of_files(path: str, found: str, tmp_path: Path) -> None:
    a, b = normal(3, 2, 6), normal(3, 5, 2, seed=1)
    tensors = {f"{LAYER}.{path}.lora_a": a, f"{LAYER}.{path}.lora_b": b}
    adapter = read_adapter(write(tmp_path / "new", tensors))
    assert len(adapter.modules) == 3
    pair = adapter.modules[f"{LAYER}.{found}"].left_right()
    assert pair is not None
    assert np.array_equal(pair[0], b[1])
    assert np.array_equal(pair[1], a[1])
    # As mlx-lm had it in its first year: A of all experts one above the other.
    older = tensors | {f"{LAYER}.{path}.lora_a": a.reshape(6, 6)}
    again = read_adapter(write(tmp_path / "old", older)).modules[f"{LAYER}.{found}"].left_right()
    assert again is not None
    assert np.array_equal(again[1], a[1])


def test_a_stack_of_something_else_is_refused(tmp_path: Path) -> None:
    path = f"{LAYER}.self_attn.embed_q"
    tensors = {f"{path}.lora_a": normal(3, 2, 6), f"{path}.lora_b": normal(3, 5, 2)}
    assert "target-parameters" in reasons(read_adapter(write(tmp_path, tensors)))


def test_layers_of_pythia_have_their_names(tmp_path: Path) -> None:
    tensors = factors("model.h.0.attention.dense", 6, 5)
    found = read_adapter(write(tmp_path, tensors))
    assert [*found.modules] == ["gpt_neox.layers.0.attention.dense"]


def test_an_embedding_that_is_also_the_head_changes_as_one(tmp_path: Path) -> None:
    """MLX computes with the changed matrix on both sides, so the model stays tied."""
    case = CASES["mlx-lora"]
    base = tmp_path / "base"
    base.mkdir()
    tensors = case.base_tensors()
    vocabulary, dim = tensors["model.embed_tokens.weight"].shape
    del tensors["lm_head.weight"]
    save_file(tensors, base / "model.safetensors")
    config = json.loads((case.base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    path = "model.embed_tokens"
    for kind, more in (("lora", {}), ("dora", {f"{path}.m": 1 + normal(vocabulary) ** 2})):
        plain = factors(path, vocabulary, dim)
        source = write(tmp_path / kind, plain | more, CONFIG | {"fine_tune_type": kind})
        loratool.merge(base, source, tmp_path / f"out-{kind}", dtype="float32")
        merged = load_file(tmp_path / f"out-{kind}/model.safetensors")
        assert "lm_head.weight" not in merged
        changed = tensors[f"{path}.weight"] + 4 * plain[f"{path}.lora_a"] @ plain[f"{path}.lora_b"]
        for m in more.values():
            changed *= (m / np.linalg.norm(changed, axis=1))[:, None]
        assert np.allclose(merged[f"{path}.weight"], changed, atol=1e-5)
    assert "tied-embedding" in [n.code for n in read_adapter(source).notices]


def test_weights_that_mlx_changes_on_loading_are_refused(tmp_path: Path) -> None:
    """A change of a multiplied weight is none of the one in the file."""
    case = CASES["mlx-lora"]
    base = shutil.copytree(case.base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "falcon_h1"}))
    with pytest.raises(AdapterError, match="mlx-lm multiplies"):
        loratool.merge(base, case.adapter, tmp_path / "out")


def test_tensors_of_conv1d_trained_whole_are_turned(tmp_path: Path) -> None:
    """GPT-2's linear layers lie transposed in its files, and mlx-lm turns them on loading."""
    base = CASES["loralib-gpt2-linear"].base
    before = load_file(base / "model.safetensors")
    name = next(k for k in before if k.endswith("h.0.attn.c_proj.weight"))
    new = normal(*before[name].shape[::-1])
    key = "model." + name.removeprefix("transformer.")
    source = write(tmp_path / "in", {key: new}, {"fine_tune_type": "full"})
    loratool.merge(base, source, tmp_path / "out", dtype="float32")
    assert np.array_equal(load_file(tmp_path / "out/model.safetensors")[name], new.T)


# --- what is wrong --------------------------------------------------------------------------------


def mutated(change: dict[str, Any], *gone: str) -> Tensors:
    tensors = factors(DOWN, 6, 5) | change
    return {name: value for name, value in tensors.items() if name not in gone}


@pytest.mark.parametrize(
    ("tensors", "config", "code"),
    [
        (mutated({}, f"{DOWN}.lora_b"), CONFIG, "half-a-pair"),
        (mutated({f"{DOWN}.lora_b": normal(3, 5)}), CONFIG, "pair-mismatch"),
        (mutated({f"{DOWN}.lora_b": normal(5)}), CONFIG, "pair-mismatch"),
        (mutated({f"{DOWN}.lora_b": normal(3, 5, 4)}), CONFIG, "pair-mismatch"),
        (mutated({f"{DOWN}.lora_b": normal(2, 0)}), CONFIG, "zero3-placeholder"),
        (mutated({f"{DOWN}.lora_b": np.ones((2, 5), np.int8)}), CONFIG, "quantised-factors"),
        (mutated({f"{DOWN}.m": normal(5)}), CONFIG, "unknown-tensors"),
        (mutated({f"{DOWN}.lora_c": normal(5)}), CONFIG, "unknown-tensors"),
        (mutated({}), CONFIG | {"fine_tune_type": "dora"}, "magnitude-absent"),
        (mutated({}), CONFIG | {"lora_parameters": {"rank": 8, "scale": 1.0}}, "rank-mismatch"),
        (
            factors(f"{LAYER}.mlp.experts.0.up_proj", 6, 5)
            | {
                f"{LAYER}.mlp.switch_mlp.up_proj.lora_a": normal(2, 2, 6),
                f"{LAYER}.mlp.switch_mlp.up_proj.lora_b": normal(2, 5, 2),
            },
            CONFIG,
            "unknown-tensors",
        ),
    ],
)
def test_damage_is_refused_by_its_name(
    tensors: Tensors, config: dict[str, Any], code: str, tmp_path: Path
) -> None:
    assert code in reasons(read_adapter(write(tmp_path, tensors, config)))


@pytest.mark.parametrize(
    "config",
    [
        {"fine_tune_type": "lora", "lora_parameters": {"scale": "20"}},
        {"fine_tune_type": "lora", "lora_parameters": {"scale": float("nan")}},
        {"fine_tune_type": "lora", "lora_parameters": [1]},
        {"fine_tune_type": "lora", "lora_parameters": {"scale": 1.0, "rank": -1}},
        {"fine_tune_type": 3, "lora_parameters": PARAMETERS},
        {"fine_tune_type": "qlora", "lora_parameters": PARAMETERS},
        {"rank": 0.5, "alpha": 16},
    ],
)
def test_wrong_types_in_a_config_are_errors(config: dict[str, Any], tmp_path: Path) -> None:
    tensors = {f"{DOWN}.A": normal(6, 2), f"{DOWN}.B": normal(2, 5)}
    with pytest.raises(LoraToolError, match="it must be"):
        read_adapter(write(tmp_path, tensors, config))


def test_more_experts_than_any_model_has_are_an_error(tmp_path: Path) -> None:
    """Each would be an object of its own: a small file must not fill the memory."""
    path = f"{LAYER}.mlp.switch_mlp.up_proj"
    a, b = np.ones((200_001, 1, 1), np.float16), np.ones((200_001, 1, 1), np.float16)
    source = write(tmp_path, {f"{path}.lora_a": a, f"{path}.lora_b": b})
    with pytest.raises(AdapterError, match="200,000 experts"):
        read_adapter(source)
