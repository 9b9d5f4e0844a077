"""Trained weights beside the factors are merged where their meaning is known, carried, or named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.adapters import PREFIX, WEIGHTS, Q, codes, pair, write_adapter
from helpers.files import State, load, random_of, same, write_base
from helpers.outcomes import assert_clear, refused
from safetensors.torch import save_file

import loratool
from loratool.errors import FileError, MatchError, PushError
from loratool.publishing.manifest import pack

PROJECTOR = "model.mm_projector.0.weight"


def base_state() -> State:
    return {
        f"{Q}.weight": random_of(torch.float32, 12, 10),
        PROJECTOR: random_of(torch.float32, 6, 5, seed=1),
        "model.norm.weight": torch.ones(12),
    }


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", base_state())


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", pair(Q, 12, 10), {"target_modules": ["q_proj"]})


NEW = random_of(torch.float32, 6, 5, seed=9)
NORM = random_of(torch.float32, 12, seed=8)


@pytest.mark.parametrize(
    "name",
    ["non_lora_trainables.bin", "mm_projector.bin", "trainable_params.bin",
     "modules_to_save.safetensors", "non_lora_trainables.safetensors", "modules_to_save.pt"],
)  # fmt: skip
@pytest.mark.parametrize("prefix", [PREFIX, ""])
def test_whole_tensors_in_a_file_of_their_own_are_merged(
    tmp_path: Path, base: Path, adapter: Path, name: str, prefix: str
) -> None:
    """LLaVA's projector, LongLoRA's norms: merged, proven and taken back with the factors."""
    save = save_file if name.endswith(".safetensors") else torch.save
    save({prefix + PROJECTOR: NEW, prefix + "model.norm.weight": NORM}, adapter / name)
    out = tmp_path / "out"
    report = loratool.merge(base, adapter, out, dtype="base", reversible=True)
    merged = load(out)
    assert torch.equal(merged[PROJECTOR], NEW)
    assert torch.equal(merged["model.norm.weight"], NORM)
    assert codes(report).count("weights-read") == 1
    assert loratool.verify(out, base, adapter).verdict == "yes"
    assert PROJECTOR in loratool.inspect(adapter).saved
    (adapter / name).rename(tmp_path / "aside")
    assert loratool.verify(out, base, adapter).verdict == "no"
    with pytest.raises(loratool.LoraToolError):
        loratool.unmerge(out, adapter, tmp_path / "back")
    (tmp_path / "aside").rename(adapter / name)
    loratool.unmerge(out, adapter, tmp_path / "back")
    assert same(load(tmp_path / "back"), base_state())


def test_a_projector_that_the_base_lacks_is_refused(tmp_path: Path, adapter: Path) -> None:
    """What finds no place is named, not dropped."""
    state = base_state()
    del state[PROJECTOR]
    base = write_base(tmp_path / "plain", state)
    torch.save({PREFIX + PROJECTOR: NEW}, adapter / "non_lora_trainables.bin")
    refused(MatchError, base, adapter, tmp_path / "out", PROJECTOR)


def test_a_second_value_of_one_tensor_is_refused(tmp_path: Path, base: Path, adapter: Path) -> None:
    """Two files that disagree about a factor are nobody's adapter; equal copies are fine."""
    factors = {name: torch.from_numpy(value) for name, value in pair(Q, 12, 10).items()}
    torch.save(factors, adapter / "non_lora_trainables.bin")
    loratool.merge(base, adapter, tmp_path / "out")
    torch.save({n: t + 1 for n, t in factors.items()}, adapter / "non_lora_trainables.bin")
    with pytest.raises(FileError) as caught:
        loratool.merge(base, adapter, tmp_path / "none")
    assert_clear(caught.value, "non_lora_trainables.bin", "lora_A")


@pytest.mark.parametrize("name", ["value_head.safetensors", "value_head.bin", "v_head.bin"])
def test_a_value_head_is_carried(tmp_path: Path, base: Path, adapter: Path, name: str) -> None:
    """The value head of reinforcement learning lies beside the merged model, and is named."""
    save = save_file if name.endswith(".safetensors") else torch.save
    save({"v_head.summary.weight": torch.ones(1, 12)}, adapter / name)
    report = loratool.merge(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == (adapter / name).read_bytes()
    assert "value-head" in codes(report)
    again = loratool.merge(tmp_path / "out", adapter, tmp_path / "again", again=True)
    assert name not in again.left_out


def test_a_value_head_among_the_factors(tmp_path: Path, base: Path) -> None:
    """TRL may save it in the adapter's own file: it goes where TRL reads it, and is named."""
    head = {"v_head.summary.weight": np.ones((1, 12), np.float32)}
    adapter = write_adapter(tmp_path / "adapter", {**pair(Q, 12, 10), **head}, {})
    report = loratool.merge(base, adapter, tmp_path / "out", reversible=True)
    assert load(tmp_path / "out")["v_head.summary.weight"].shape == (1, 12)
    assert codes(report) == ["value-head"]
    loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    assert same(load(tmp_path / "back"), base_state())


@pytest.mark.parametrize(
    "name", ["new_embeddings.safetensors", "classifier.pt", "embeddings.npz", "pytorch_model.bin"]
)
def test_other_weights_are_named(tmp_path: Path, base: Path, adapter: Path, name: str) -> None:
    """What nobody knows the meaning of is no part of the merge, and the user hears of it."""
    (adapter / name).write_bytes(b"whatever")
    for report in (loratool.merge(base, adapter, tmp_path / "out"), loratool.inspect(adapter)):
        (notice,) = [n for n in report.warnings if n.code == "weights-beside"]
        assert name in notice.message


def test_files_of_a_run_are_no_weights(tmp_path: Path, base: Path, adapter: Path) -> None:
    """Optimizer states and the like of a checkpoint of the Trainer are not worth a word."""
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "scaler.pt",
                 "training_args.bin"):  # fmt: skip
        (adapter / name).write_bytes(b"x")
    assert codes(loratool.merge(base, adapter, tmp_path / "out")) == []


@pytest.mark.parametrize("change", [False, True])
def test_the_adapter_in_a_second_format(
    tmp_path: Path, base: Path, adapter: Path, change: bool
) -> None:
    """adapter_model.bin beside adapter_model.safetensors: said only where it differs."""
    factors = {n: torch.from_numpy(v + change) for n, v in pair(Q, 12, 10).items()}
    torch.save(factors, adapter / "adapter_model.bin")
    report = loratool.merge(base, adapter, tmp_path / "out")
    assert ("weights-differ" in codes(report)) == change


def sentence(folder: Path, part: str, fill: float) -> None:
    """What sentence-transformers writes around an encoder."""
    normalise = {"path": "9_Normalize", "type": "sentence_transformers.models.Normalize"}
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": f"{part}/"}, normalise]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"q": part}}))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"mode": part}))
    (folder / part).mkdir()
    (folder / part / "config.json").write_text("{}")
    save_file({"linear.weight": torch.full((4, 12), fill)}, folder / part / "model.safetensors")


def test_the_modules_around_a_sentence_encoder_are_the_adapters(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    """Dense layer, pooling and prompts come from the adapter as a set; none of the base's stay."""
    sentence(base, "2_Normalize", 0)
    sentence(adapter, "2_Dense", 1)
    assert codes(loratool.merge(base, adapter, tmp_path / "out")) == []
    out = tmp_path / "out"
    for name in ("modules.json", "config_sentence_transformers.json", "1_Pooling/config.json",
                 "2_Dense/config.json", "2_Dense/model.safetensors"):  # fmt: skip
        assert (out / name).read_bytes() == (adapter / name).read_bytes(), name
    assert not (out / "2_Normalize").exists()


def test_a_sentence_base_keeps_its_modules(tmp_path: Path, base: Path, adapter: Path) -> None:
    """An adapter without modules of its own changes nothing around the encoder."""
    sentence(base, "2_Dense", 0)
    loratool.merge(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").is_file()


def test_push_takes_what_belongs_to_the_adapter(adapter: Path) -> None:
    """Trained weights in a pickle go up without being asked for, and cannot be left out."""
    torch.save({PREFIX + PROJECTOR: NEW}, adapter / "non_lora_trainables.bin")
    torch.save({"v_head.summary.weight": torch.ones(1, 12)}, adapter / "value_head.bin")
    assert {"non_lora_trainables.bin", "value_head.bin"} <= set(pack(adapter).files)
    with pytest.raises(loratool.LoraToolError, match="cannot be loaded"):
        pack(adapter, exclude=["non_lora_trainables.bin"])


def test_push_does_not_advise_to_leave_unknown_weights_out(adapter: Path) -> None:
    """Of a pickle that may be trained weights the user says whether it belongs; both ways work."""
    torch.save({"x": torch.ones(1)}, adapter / "classifier.pt")
    with pytest.raises(PushError) as caught:
        pack(adapter)
    assert "Push what belongs to the adapter: --include classifier.pt" in caught.value.hint
    assert "Leave them out" not in caught.value.hint
    assert "classifier.pt" in pack(adapter, include=["classifier.pt"]).files
    assert "classifier.pt" in pack(adapter, exclude=["classifier.pt"]).left_out


PLACEHOLDERS = {
    "head": f"{PREFIX}score.weight",
    "embedding": f"{PREFIX}model.embed_tokens.weight",
    "bias": f"{PREFIX}{Q}.bias",
    "lora-bias": f"{PREFIX}{Q}.lora_B.bias",
    "magnitude": f"{PREFIX}{Q}.lora_magnitude_vector",
    "rows": f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta",
}


@pytest.mark.parametrize("place", PLACEHOLDERS)
def test_placeholders_are_refused_wherever_they_stand(
    tmp_path: Path, base: Path, place: str
) -> None:
    """ZeRO-3 leaves shape [0]; no such tensor is written as a weight, and the error names it."""
    tensors = {**pair(Q, 12, 10), PLACEHOLDERS[place]: np.zeros(0, np.float32)}
    adapter = write_adapter(
        tmp_path / "adapter", tensors, {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    )
    refused(loratool.errors.AdapterError, base, adapter, tmp_path / "out", "zero3-placeholder")
    assert "zero3-placeholder" in codes(loratool.inspect(adapter))
    with pytest.raises(PushError, match="placeholder"):
        pack(adapter)


def test_resize_and_combine_take_the_companions_along(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    """As the files that they are, for programs that look for them by name; merged as before."""
    torch.save({PREFIX + PROJECTOR: NEW}, adapter / "non_lora_trainables.bin")
    torch.save({"v_head.summary.weight": torch.ones(1, 12)}, adapter / "value_head.bin")
    sentence(adapter, "2_Dense", 1)
    other = write_adapter(tmp_path / "other", pair(Q, 12, 10, seed=2), {})
    loratool.resize(adapter, tmp_path / "small", rank=2)
    loratool.combine([adapter, other], tmp_path / "both")
    for folder in (tmp_path / "small", tmp_path / "both"):
        for name in ("non_lora_trainables.bin", "value_head.bin", "modules.json",
                     "2_Dense/model.safetensors", "1_Pooling/config.json"):  # fmt: skip
            assert (folder / name).read_bytes() == (adapter / name).read_bytes(), name
        assert not any("mm_projector" in name for name in load(folder)), "it is there once"
        merged = tmp_path / f"{folder.name}-merged"
        loratool.merge(base, folder, merged, dtype="base")
        assert torch.equal(load(merged)[PROJECTOR], NEW)


@pytest.mark.parametrize("saved", ["refuse", "mean", "first", "last"])
def test_companions_that_differ(tmp_path: Path, adapter: Path, saved: str) -> None:
    """Two projectors have no mean that a pickle could hold; somebody says whose to take."""
    other = write_adapter(tmp_path / "other", pair(Q, 12, 10, seed=2), {})
    for number, folder in enumerate((adapter, other)):
        torch.save({PREFIX + PROJECTOR: NEW + number}, folder / "non_lora_trainables.bin")
    if saved in ("refuse", "mean"):
        with pytest.raises(MatchError, match=r"non_lora_trainables\.bin") as caught:
            loratool.combine([adapter, other], tmp_path / "out", saved=saved)
        assert "--saved first" in caught.value.hint
        return
    loratool.combine([adapter, other], tmp_path / "out", saved=saved)
    wanted = adapter if saved == "first" else other
    name = "non_lora_trainables.bin"
    assert (tmp_path / "out" / name).read_bytes() == (wanted / name).read_bytes()


def test_two_adapters_with_sentence_modules(tmp_path: Path, base: Path, adapter: Path) -> None:
    """Of sets that differ the last one's is taken whole, never a file of each, and it is said."""
    other = write_adapter(tmp_path / "other", pair(Q, 12, 10, seed=2), {})
    sentence(adapter, "2_Dense", 1)
    sentence(other, "2_Dense", 2)
    torch.save({"linear.weight": torch.ones(4, 12)}, other / "2_Dense" / "pytorch_model.bin")
    (other / "2_Dense" / "model.safetensors").unlink()
    report = loratool.merge(base, [adapter, other], tmp_path / "out")
    assert "companions-differ" in codes(report)
    assert {p.name for p in (tmp_path / "out" / "2_Dense").iterdir()} == {
        "config.json", "pytorch_model.bin",
    }  # fmt: skip


def test_a_value_head_takes_the_place_of_the_bases(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    """Another format is no other head: one of them goes along, and push does not refuse it."""
    save_file({"v_head.summary.weight": torch.zeros(1, 12)}, base / "value_head.safetensors")
    torch.save({"v_head.summary.weight": torch.ones(1, 12)}, adapter / "value_head.bin")
    report = loratool.merge(base, adapter, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").glob("value_head*")] == ["value_head.bin"]
    assert any("value_head.safetensors" in name for name in report.left_out)
    assert "value_head.bin" in pack(tmp_path / "out").files


def test_what_sentence_modules_displace_is_listed(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    """Folders of the base that the adapter's modules.json does not name are under left out."""
    sentence(base, "2_Normalize", 0)
    sentence(adapter, "2_Dense", 1)
    report = loratool.merge(base, adapter, tmp_path / "out")
    assert any(name.startswith("2_Normalize/") for name in report.left_out)


def test_sentence_modules_that_are_not_there(tmp_path: Path, base: Path, adapter: Path) -> None:
    """A folder that modules.json names and nobody brings is said; one it forgot too."""
    sentence(adapter, "2_Dense", 1)
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "3_Dense"}]
    (adapter / "modules.json").write_text(json.dumps(modules))
    report = loratool.merge(base, adapter, tmp_path / "out")
    found = {n.code: n.message for n in report.warnings}
    assert "3_Dense" in found["sentence-modules"]
    assert "2_Dense/model.safetensors" in found["weights-beside"]


def test_an_encoder_in_a_folder_of_its_own(tmp_path: Path, base: Path, adapter: Path) -> None:
    """modules.json that says the encoder lies elsewhere does not fit an output that is one."""
    sentence(adapter, "2_Dense", 1)
    modules = [{"path": "0_Transformer"}, {"path": "1_Pooling"}]
    (adapter / "modules.json").write_text(json.dumps(modules))
    loratool.merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out" / "modules.json").exists()


def test_the_folder_of_the_only_adapter_inside_counts(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    """Named by its parent, an adapter's companions and tokenizer are those beside its weights."""
    torch.save({PREFIX + PROJECTOR: NEW}, adapter / "non_lora_trainables.bin")
    torch.save({"v_head.summary.weight": torch.ones(1, 12)}, adapter / "value_head.bin")
    (adapter / "tokenizer.json").write_text("{}")
    (tmp_path / "run").mkdir()
    adapter.rename(tmp_path / "run" / "checkpoint-100")
    (tmp_path / "run" / "tokenizer.json").write_text('{"of": "somebody"}')
    loratool.merge(base, tmp_path / "run", tmp_path / "out", dtype="base")
    assert torch.equal(load(tmp_path / "out")[PROJECTOR], NEW)
    assert (tmp_path / "out" / "value_head.bin").is_file()
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("shape", [(0,), (0, 32), (4, 0)])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.mlp.experts.gate_up_proj"])
def test_empty_weights_of_the_base_are_refused(
    tmp_path: Path, adapter: Path, name: str, shape: tuple[int, ...]
) -> None:
    """Whatever they are called, and whichever side is empty."""
    base = write_base(tmp_path / "empty", {**base_state(), name: torch.zeros(shape)})
    refused(loratool.errors.BaseError, base, adapter, tmp_path / "out", name)


def test_an_empty_value_head_is_refused(tmp_path: Path, base: Path, adapter: Path) -> None:
    """It would be carried, and be nothing."""
    save_file({"v_head.summary.weight": torch.zeros(0)}, adapter / "value_head.safetensors")
    refused(loratool.errors.AdapterError, base, adapter, tmp_path / "out", "zero3-placeholder")


def test_a_folder_of_many_adapters(tmp_path: Path, base: Path, adapter: Path) -> None:
    """Of a file of its own name, named alone, the neighbours are other people's."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for name in ("style", "task"):
        (shelf / f"{name}.safetensors").write_bytes((adapter / WEIGHTS).read_bytes())
    torch.save({PREFIX + PROJECTOR: NEW}, shelf / "non_lora_trainables.bin")
    (shelf / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    report = loratool.merge(base, shelf / "style.safetensors", tmp_path / "out", dtype="base")
    assert codes(report) == []
    assert torch.equal(load(tmp_path / "out")[PROJECTOR], base_state()[PROJECTOR])


def test_combine_takes_sentence_modules_whole(tmp_path: Path, adapter: Path) -> None:
    """Of two sets, in formats that differ, no file of each: one adapter's or a refusal."""
    other = write_adapter(tmp_path / "other", pair(Q, 12, 10, seed=2), {})
    sentence(adapter, "2_Dense", 1)
    sentence(other, "2_Dense", 2)
    (other / "2_Dense" / "model.safetensors").rename(other / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(MatchError, match=r"modules\.json"):
        loratool.combine([adapter, other], tmp_path / "none")
    loratool.combine([adapter, other], tmp_path / "out", saved="last")
    assert {p.name for p in (tmp_path / "out" / "2_Dense").iterdir()} == {
        "config.json", "pytorch_model.bin",
    }  # fmt: skip
