"""One fault of an adapter is said once, with a count, the first names and what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.adapters import PREFIX, Tensors, codes, pair, write_adapter
from helpers.files import small_state, write_base
from safetensors.numpy import load_file

import loratool
from loratool.errors import LoraToolError

PATHS = [f"model.layers.{n}.self_attn.{p}_proj" for n in range(4) for p in "kq"]


def _tensors() -> Tensors:
    found: Tensors = {}
    for number, path in enumerate(PATHS):
        found |= pair(path, 8, 8, seed=number)
    return found


def _without(*ends: str) -> Tensors:
    return {name: value for name, value in _tensors().items() if not name.endswith(ends)}


def _cut(end: str, rows: int) -> Tensors:
    return {n: v[:rows] if n.endswith(end) else v for n, v in _tensors().items()}


#: By fault: tensors, fields of the config, the one code of it, and words of its message.
FAULTS: dict[str, tuple[Tensors, dict[str, object], str, str]] = {
    "no B": (_without("0.self_attn.q_proj.lora_B.weight"), {}, "half-a-pair",
             "1 module has only one of lora_A and lora_B"),
    "no A": (_without("0.self_attn.q_proj.lora_A.weight"), {}, "half-a-pair", "only lora_B.weight"),
    "no B at all": (_without("lora_B.weight"), {}, "half-a-pair", "8 modules have only one"),
    "rank of the config": (_tensors(), {"r": 16}, "rank-mismatch", "the config gives 16, lora_A"),
    "rank of one A": (_cut("0.self_attn.q_proj.lora_A.weight", 3), {}, "pair-mismatch",
                      "1 module has factors of different ranks"),
    "rank of all A": (_cut("lora_A.weight", 3), {}, "pair-mismatch", "8 modules have factors"),
    "a target": (_tensors(), {"target_modules": ["q_proj", "k_proj", "v_proj"]}, "target-absent",
                 "'v_proj'"),
    "magnitudes": (_tensors(), {"use_dora": True}, "magnitude-absent", "8 modules have no"),
    "nothing gathered": ({n: v[:0] for n, v in _tensors().items()}, {}, "zero3-placeholder",
                         "8 modules are empty"),
    "another tensor": (_tensors() | {f"{PREFIX}x.lora_C.weight": np.ones((2, 2), np.float32)}, {},
                       "unknown-tensors", "1 tensor has no known meaning"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_is_one_notice(fault: str, tmp_path: Path) -> None:
    """inspect, inspect --base and merge say the fault once, and nothing that follows from it."""
    tensors, config, code, words = FAULTS[fault]
    adapter = write_adapter(tmp_path / "a", tensors, config)
    state = {f"{path}.weight": small_state(seed=n)[f"{PATHS[0]}.weight"]
             for n, path in enumerate(PATHS)}  # fmt: skip
    base = write_base(tmp_path / "base", state)
    for given in (None, base):
        report = loratool.inspect(adapter, base=given)
        assert codes(report) == [code]
        notice = report.warnings[0]
        assert words in notice.message
        assert len(notice.message.splitlines()) <= 2
        assert "PEFT would" not in notice.message
    if not notice.refused:
        return
    with pytest.raises(LoraToolError) as caught:
        loratool.merge(base, adapter, tmp_path / "out", dry_run=True)
    assert caught.value.message.count("[") == 1 + notice.message.count("[")
    assert str(adapter) in caught.value.hint


def test_equal_causes_are_one_line_with_a_count_and_the_first_names(tmp_path: Path) -> None:
    """Eight modules that a base lacks are one line of an error, not eight."""
    adapter = write_adapter(tmp_path / "a", _tensors(), {})
    base = write_base(tmp_path / "base", {"lm_head.weight": small_state()[f"{PATHS[0]}.weight"]})
    with pytest.raises(LoraToolError) as caught:
        loratool.merge(base, adapter, tmp_path / "out")
    lines = caught.value.message.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("8 parts of the adapter do not fit")
    assert lines[1].startswith(f"  - {PATHS[0]}, {PATHS[1]}, {PATHS[2]} and 5 more: of the first, ")


def test_what_can_be_merged_without_the_fault_is_offered(tmp_path: Path) -> None:
    """Where --allow-unmatched would leave out the half of a pair, the error says so."""
    adapter = write_adapter(tmp_path / "a", FAULTS["no B"][0], {})
    base = write_base(tmp_path / "base", {
        f"{path}.weight": small_state()[f"{PATHS[0]}.weight"].clone() for path in PATHS
    })  # fmt: skip
    with pytest.raises(LoraToolError) as caught:
        loratool.merge(base, adapter, tmp_path / "out")
    assert "--allow-unmatched" in caught.value.hint
    loratool.merge(base, adapter, tmp_path / "out", allow_unmatched=True)


#: What training puts before or into names; the last part of a key is the model's own.
WRAPPED = {
    "a state dict": "state_dict.{}", "of FSDP2": "model_state.model.{}", "of DDP": "module.{}",
    "of a module": "model.{}", "compiled": "_orig_mod.{}", "of FSDP": "_fsdp_wrapped_module.{}",
    "checkpointed": "_checkpoint_wrapped_module.{}", "twice": f"{PREFIX}{{}}",
    "of DeepSpeed": "module.model.{}", "all at once": f"state_dict.module._orig_mod.{PREFIX}{{}}",
}  # fmt: skip


@pytest.mark.parametrize("way", WRAPPED)
def test_what_training_puts_around_names_is_taken_off_and_said_once(
    way: str, tmp_path: Path
) -> None:
    """The modules are those of the plain adapter, and so is the merge; one notice says it."""
    plain = write_adapter(tmp_path / "plain", _tensors(), {})
    wrapped = {WRAPPED[way].format(name): value for name, value in _tensors().items()}
    adapter = write_adapter(tmp_path / "wrapped", wrapped, {})
    report = loratool.inspect(adapter)
    assert codes(report) == ["names-unwrapped"]
    assert report.warnings[0].message.startswith("16 names hold ")
    assert [m.path for m in report.modules] == [m.path for m in loratool.inspect(plain).modules]
    state = {f"{path}.weight": small_state()[f"{PATHS[0]}.weight"].clone() for path in PATHS}
    base = write_base(tmp_path / "base", state)
    loratool.merge(base, adapter, tmp_path / "one")
    loratool.merge(base, plain, tmp_path / "two")
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("way", WRAPPED)
def test_conversion_to_peft_gives_the_names_that_peft_reads(way: str, tmp_path: Path) -> None:
    """Factors, saved modules and token rows lose what training put around their names."""
    tensors = _tensors() | {
        f"{PREFIX}lm_head.modules_to_save.weight": np.ones((200, 8), np.float32),
        f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta":
            np.ones((2, 8), np.float32),
    }  # fmt: skip
    config = {"modules_to_save": ["lm_head"], "trainable_token_indices": [3, 4]}
    wrapped = {WRAPPED[way].format(name): value for name, value in tensors.items()}
    adapter = write_adapter(tmp_path / "a", wrapped, config)
    loratool.convert(adapter, tmp_path / "out", to="peft")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(np.array_equal(written[name], value) for name, value in tensors.items())
    assert codes(loratool.inspect(tmp_path / "out")) == []


def test_names_as_peft_writes_them_are_not_remarked(tmp_path: Path) -> None:
    """A plain adapter has no notice about its names, with the adapter's name in them or without."""
    named = {n.replace(".weight", ".default.weight"): v for n, v in _tensors().items()}
    for number, tensors in enumerate((_tensors(), named)):
        assert codes(loratool.inspect(write_adapter(tmp_path / str(number), tensors, {}))) == []
