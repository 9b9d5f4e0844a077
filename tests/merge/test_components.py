"""The delta lands in the part of a composite model that the adapter was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.adapters import codes, pair, write_adapter
from helpers.cli import run_cli
from helpers.files import State, load, random_of, write_base
from helpers.outcomes import refused

import loratool
from loratool.errors import MatchError, UsageError

Q = "encoder.layers.0.self_attn.q_proj"


def tower(root: str, width: int = 8, seed: int = 0) -> State:
    names = [
        f"{root}.encoder.layers.{n}.self_attn.{m}.weight"
        for n in (0, 1)
        for m in ("q_proj", "k_proj")
    ]
    return {n: random_of(torch.float32, width, width, seed=seed + i) for i, n in enumerate(names)}


def towers(
    folder: Path, text: int = 8, vision: int = 8, roots: str = "text_model vision_model"
) -> tuple[Path, State]:
    first, second = roots.split()
    state = {**tower(first, text), **tower(second, vision, 10)}
    return write_base(folder, state, config={"model_type": "siglip", "architectures": []}), state


def lora(folder: Path, width: int = 8, path: str = Q, **config: object) -> Path:
    return write_adapter(folder, pair(path, width, width), {"task_type": None, **config})


def changed(base: State, merged: State) -> set[str]:
    return {name for name in base if not torch.equal(base[name], merged[name])}


@pytest.mark.parametrize(
    ("config", "root"),
    [
        ({"auto_mapping": {"base_model_class": "SiglipTextModel"}}, "text_model"),
        ({"auto_mapping": {"base_model_class": "SiglipVisionModel"}}, "vision_model"),
        ({"auto_mapping": {"base_model_class": "CLIPTextModelWithProjection"}}, "text_model"),
        ({"task_type": "CAUSAL_LM"}, "text_model"),
        ({"task_type": "SEQ_CLS"}, "text_model"),
        ({"base_model_name_or_path": "/models/siglip/vision_model"}, "vision_model"),
        ({"base_model_name_or_path": "org/pipeline/text_encoder"}, "text_model"),
        # A class says more than a task, and a task more than a name.
        ({"auto_mapping": {"base_model_class": "SiglipVisionModel"}, "task_type": "SEQ_CLS"},
         "vision_model"),
        ({"task_type": "SEQ_CLS", "base_model_name_or_path": "a/vision_model"}, "text_model"),
    ],
)  # fmt: skip
def test_the_config_says_which_of_two_towers(
    tmp_path: Path, config: dict[str, object], root: str
) -> None:
    """Where both take every tensor, class, task or name of the base decide, and it is said."""
    base, state = towers(tmp_path / "base")
    adapter = lora(tmp_path / "adapter", **config)
    report = loratool.merge(base, adapter, tmp_path / "out", dtype="base")
    name = f"{root}.{Q}.weight"
    merged = load(tmp_path / "out")
    assert changed(state, merged) == {name}
    factors = pair(Q, 8, 8)
    a, b = (factors[f"base_model.model.{Q}.lora_{x}.weight"].astype(np.float64) for x in "AB")
    assert np.allclose(merged[name].double().numpy(), state[name].double().numpy() + 2 * b @ a)
    assert codes(report).count("component") == 1


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"task_type": "FEATURE_EXTRACTION"},
        {"auto_mapping": {"base_model_class": "SiglipModel"}},
        {"base_model_name_or_path": "vision-team/text-to-image"},
        # A repository is a whole model, whatever words its name has.
        {"base_model_name_or_path": "openai/clip-vit-base-patch32"},
        {"base_model_name_or_path": "meta-llama/Llama-3.2-11B-Vision"},
    ],
)
def test_two_towers_are_refused_where_nothing_decides(
    tmp_path: Path, config: dict[str, object]
) -> None:
    """A config that names no tower, or both, leaves it open; both are named, with the option."""
    base, _ = towers(tmp_path / "base")
    adapter = lora(tmp_path / "adapter", **config)
    error = refused(MatchError, base, adapter, tmp_path / "out", "text_model", "vision_model")
    assert "--components" in error.hint


def test_the_option_chooses(tmp_path: Path) -> None:
    """--components takes one, in merge, verify, inspect and unmerge alike."""
    base, state = towers(tmp_path / "base")
    adapter = lora(tmp_path / "adapter")
    out = tmp_path / "out"
    options = {"components": ["vision_model"]}
    loratool.merge(base, adapter, out, dtype="base", reversible=True, **options)
    assert changed(state, load(out)) == {f"vision_model.{Q}.weight"}
    assert loratool.verify(out, base, adapter, components="vision_model").verdict == "yes"
    assert loratool.verify(out, base, adapter, components=["text_model"]).verdict == "no"
    assert loratool.inspect(adapter, base=base, **options).base.unmatched == []
    loratool.unmerge(out, adapter, tmp_path / "back")
    assert changed(state, load(tmp_path / "back")) == set()
    assert loratool.compare([adapter, adapter], base=base, **options).base == str(base)
    with pytest.raises(MatchError, match="text_model"):
        loratool.compare([adapter, adapter], base=base)
    record = json.loads((out / "loratool.json").read_text())
    assert record["options"]["components"] == ["vision_model"]
    chosen = ["--components", "text_model", "--dtype", "base"]
    done = run_cli("merge", base, adapter, "-o", tmp_path / "cli", *chosen)
    assert done.exit_code == 0, done.stderr
    assert changed(state, load(tmp_path / "cli")) == {f"text_model.{Q}.weight"}


def test_a_component_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """A misspelt part is refused with the parts there are."""
    base, _ = towers(tmp_path / "base")
    error = refused(
        UsageError, base, lora(tmp_path / "a"), tmp_path / "out", "text", components=["text"]
    )
    assert "text_model" in error.hint


@pytest.mark.parametrize(("text", "vision", "root"), [(8, 6, "text_model"), (6, 8, "vision_model")])
def test_only_one_tower_fits_by_shape(tmp_path: Path, text: int, vision: int, root: str) -> None:
    """With other widths there is nothing to choose, whatever tower comes first."""
    base, state = towers(tmp_path / "base", text, vision)
    report = loratool.merge(base, lora(tmp_path / "adapter"), tmp_path / "out", dtype="base")
    assert changed(state, load(tmp_path / "out")) == {f"{root}.{Q}.weight"}
    assert "component" not in codes(report)


def test_a_config_that_speaks_of_a_tower_that_does_not_fit(tmp_path: Path) -> None:
    """The only part that takes the adapter takes it, and the contradiction is said."""
    base, state = towers(tmp_path / "base", 6, 8)
    adapter = lora(tmp_path / "adapter", auto_mapping={"base_model_class": "SiglipTextModel"})
    report = loratool.merge(base, adapter, tmp_path / "out", dtype="base")
    assert changed(state, load(tmp_path / "out")) == {f"vision_model.{Q}.weight"}
    assert codes(report) == ["component"]


def test_encoder_and_decoder_of_one_architecture(tmp_path: Path) -> None:
    """Two BERTs in one model have no names that a class could choose between."""
    base, _ = towers(tmp_path / "base", roots="encoder decoder.bert")
    adapter = lora(tmp_path / "adapter", auto_mapping={"base_model_class": "BertModel"})
    refused(MatchError, base, adapter, tmp_path / "out", "decoder.bert")


def test_parts_that_lie_deeper(tmp_path: Path) -> None:
    """A vision tower inside a vision tower, a language model beside it: prefixes of any depth."""
    base, state = towers(
        tmp_path / "base", roots="model.language_model model.vision_tower.vision_model"
    )
    adapter = lora(tmp_path / "adapter", auto_mapping={"base_model_class": "SiglipVisionModel"})
    loratool.merge(base, adapter, tmp_path / "out", dtype="base")
    name = f"model.vision_tower.vision_model.{Q}.weight"
    assert changed(state, load(tmp_path / "out")) == {name}


def test_copies_of_a_model_in_one_file_are_ambiguous(tmp_path: Path) -> None:
    """Weights and their moving average are two parts like any others."""
    base, _ = towers(tmp_path / "base", roots="model model_ema")
    adapter = lora(tmp_path / "adapter", task_type="CAUSAL_LM")
    refused(MatchError, base, adapter, tmp_path / "out", "model_ema")


def test_names_with_their_tower_are_taken_as_they_are(tmp_path: Path) -> None:
    """An adapter of the whole model names the tower itself; nothing is in doubt."""
    base, state = towers(tmp_path / "base")
    adapter = lora(tmp_path / "adapter", path=f"vision_model.{Q}", task_type="CAUSAL_LM")
    report = loratool.merge(base, adapter, tmp_path / "out", dtype="base")
    assert changed(state, load(tmp_path / "out")) == {f"vision_model.{Q}.weight"}
    assert "component" not in codes(report)


def test_a_part_that_does_not_fit_is_no_way_round(tmp_path: Path) -> None:
    """With one tensor that fits neither tower, --allow-unmatched still does not guess a tower."""
    base, _ = towers(tmp_path / "base")
    adapter = write_adapter(
        tmp_path / "adapter", {**pair(Q, 8, 8), **pair("projection", 8, 8)}, {"task_type": None}
    )
    refused(MatchError, base, adapter, tmp_path / "out", "vision_model", allow_unmatched=True)


def test_nothing_goes_outside_of_what_was_chosen(tmp_path: Path) -> None:
    """An adapter of both towers, one of them chosen: the other half is refused, or left out."""
    base, state = towers(tmp_path / "base")
    tensors = {**pair(f"text_model.{Q}", 8, 8), **pair(f"vision_model.{Q}", 8, 8)}
    whole = f"vision_model.{Q.replace('q_proj', 'k_proj')}"
    tensors[f"base_model.model.{whole}.weight"] = np.ones((8, 8), np.float32)
    adapter = write_adapter(tmp_path / "adapter", tensors, {"modules_to_save": ["k_proj"]})
    chosen = {"components": ["text_model"]}
    refused(MatchError, base, adapter, tmp_path / "out", "outside of what --components", **chosen)
    out = tmp_path / "out"
    loratool.merge(base, adapter, out, dtype="base", allow_unmatched=True, **chosen)
    assert changed(state, load(out)) == {f"text_model.{Q}.weight"}
    assert loratool.inspect(adapter, base=base, **chosen).base.unmatched == [
        f"base_model.model.{whole}.weight", f"vision_model.{Q}",
    ]  # fmt: skip
    # verify finds in the record what the merge was told.
    assert loratool.verify(out, base, adapter, allow_unmatched=True).verdict == "yes"
    assert loratool.verify(out, base, adapter, components=["vision_model"],
                           allow_unmatched=True).verdict == "no"  # fmt: skip


def test_a_text_tower_beside_a_vision_tower_with_a_root(tmp_path: Path) -> None:
    """The class of the config also counts where the names fit a part without a root."""
    state = {
        name.removeprefix("text."): value
        for name, value in {**tower("text"), **tower("vision_model", seed=10)}.items()
    }
    base = write_base(tmp_path / "base", state, config={"model_type": "odd"})
    adapter = lora(tmp_path / "adapter", auto_mapping={"base_model_class": "SiglipVisionModel"})
    report = loratool.merge(base, adapter, tmp_path / "out", dtype="base")
    assert changed(state, load(tmp_path / "out")) == {f"vision_model.{Q}.weight"}
    assert codes(report) == ["component"]
    plain = lora(tmp_path / "plain", task_type="CAUSAL_LM")
    loratool.merge(base, plain, tmp_path / "as-is", dtype="base")
    assert changed(state, load(tmp_path / "as-is")) == {f"{Q}.weight"}


def test_a_text_towers_adapter_is_none_for_a_vision_model(tmp_path: Path) -> None:
    """Its root is not taken off to make it fit a model of another kind."""
    state = {name.removeprefix("x."): value for name, value in tower("x").items()}
    base = write_base(tmp_path / "base", state, config={"model_type": "siglip_vision_model"})
    adapter = lora(tmp_path / "adapter", path=f"text_model.{Q}")
    refused(MatchError, base, adapter, tmp_path / "out", "text_model")
    fitting = lora(tmp_path / "fitting", path=f"vision_model.{Q}")
    loratool.merge(base, fitting, tmp_path / "out")


def test_decoders_are_told_by_their_class(tmp_path: Path) -> None:
    """Parts that read the same are told apart by where they stand."""
    base, state = towers(tmp_path / "base", roots="model.encoder model.decoder")
    adapter = lora(tmp_path / "adapter", auto_mapping={"base_model_class": "BartDecoder"})
    loratool.merge(base, adapter, tmp_path / "out", dtype="base")
    assert changed(state, load(tmp_path / "out")) == {f"model.decoder.{Q}.weight"}
    error = refused(UsageError, base, adapter, tmp_path / "none", "decoder", components=["decoder"])
    assert "model.decoder" in error.hint


def test_an_agreeing_hint_ends_the_question(tmp_path: Path) -> None:
    """A causal language model's adapter in a vision-language model is where it belongs, though the
    repository is called Vision."""
    base, _ = towers(tmp_path / "base", 8, 6, "language_model vision_model")
    adapter = lora(
        tmp_path / "adapter", task_type="CAUSAL_LM",
        base_model_name_or_path="meta-llama/Llama-3.2-11B-Vision-Instruct",
    )  # fmt: skip
    assert codes(loratool.merge(base, adapter, tmp_path / "out")) == []


def test_a_choice_that_contradicts_the_config_is_a_choice(tmp_path: Path) -> None:
    """Where somebody chose, nothing is in doubt."""
    base, state = towers(tmp_path / "base")
    adapter = lora(tmp_path / "adapter", auto_mapping={"base_model_class": "SiglipTextModel"})
    report = loratool.merge(
        base, adapter, tmp_path / "out", dtype="base", components="vision_model"
    )
    assert changed(state, load(tmp_path / "out")) == {f"vision_model.{Q}.weight"}
    assert "component" not in codes(report)


def test_an_adapter_of_another_model_is_no_question_of_parts(tmp_path: Path) -> None:
    """Where a little of it fits several parts, the error says what does not fit."""
    base, _ = towers(tmp_path / "base")
    tensors = {**pair(Q, 8, 8)}
    for number in range(4):
        tensors |= pair(f"encoder.layers.{number}.mlp.fc1", 16, 8, seed=number)
    adapter = write_adapter(tmp_path / "adapter", tensors, {"task_type": None})
    error = refused(MatchError, base, adapter, tmp_path / "out", "do not fit the base")
    assert "--components" not in error.hint


def test_token_rows_outside_of_the_chosen_part(tmp_path: Path) -> None:
    """Trained rows of another part's embedding are left out like its factors."""
    state = {**tower("text_model"), "vision_model.embed.weight": random_of(torch.float32, 4, 8)}
    base = write_base(tmp_path / "base", state)
    rows = "base_model.model.vision_model.embed.token_adapter.trainable_tokens_delta"
    tensors = {**pair(f"text_model.{Q}", 8, 8), rows: np.ones((1, 8), np.float32)}
    config = {"trainable_token_indices": {"embed": [0]}}
    adapter = write_adapter(tmp_path / "adapter", tensors, config)
    refused(MatchError, base, adapter, tmp_path / "out", "vision_model", components="text_model")
    loratool.merge(base, adapter, tmp_path / "all", dtype="base")
    assert changed(state, load(tmp_path / "all")) == {
        f"text_model.{Q}.weight", "vision_model.embed.weight",
    }  # fmt: skip
