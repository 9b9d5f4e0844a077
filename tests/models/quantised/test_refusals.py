"""What of quantised bases is refused, in which words, and what only looks quantised."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.files import (
    ADAPTED,
    State,
    load,
    random_of,
    same,
    small_lora,
    small_state,
    write_base,
)
from helpers.laying import lay, opened, refusal, text
from helpers.outcomes import assert_clear, refused
from helpers.quantised import nf4

import loratool
from loratool.errors import BaseError
from loratool.models.checkpoint import open_checkpoint
from loratool.models.quantised.base import dequantised
from loratool.models.quantised.declared import quantisation_of

PATH = ADAPTED.removesuffix(".weight")
U8, I8, I16, I32 = torch.uint8, torch.int8, torch.int16, torch.int32


def packed_state(tensors: State) -> State:
    """A small base whose adapted weight is packed: what is given, by the last part of names."""
    plain = {name: value for name, value in small_state().items() if name != ADAPTED}
    return plain | {f"{PATH}.{role}": value for role, value in tensors.items()}


def nf4_state(size: int = 8) -> State:
    parts, _ = nf4(random_of(torch.float32, size, size), False, torch.bfloat16, U8)
    return packed_state({f"weight{role}": tensor for role, tensor in parts.items()})


METHODS = {
    "aqlm": "AQLM", "vptq": "VPTQ", "quip": "QuIP#", "spqr": "SpQR", "higgs": "HIGGS",
    "fp_quant": "FP-Quant", "bitnet": "BitNet", "quark": "Quark", "auto-round": "AutoRound",
    "intel/auto-round": "AutoRound", "exl2": "EXL2", "EXL3": "EXL3", "eetq": "EETQ",
    "quanto": "Quanto", "sinq": "SINQ", "gguf": "GGUF", "paroquant": "ParoQuant",
    "metal": "metal", "something-new": "something-new",
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_methods_by_name(method: str, tmp_path: Path) -> None:
    """A model of packed weights whose method is not read, or not known."""
    tensors = packed_state({"weight": random_of(I8, 8, 8), "weight_scale": torch.ones(8, 1)})
    base = lay(tmp_path / "base", tensors, {"quant_method": method})
    error = refusal(base, f"is quantised with {METHODS[method]}, which loratool cannot read.")
    assert "unquantised model it was made from, then quantise the result" in error.hint


def test_gptqs_tensors_of_autoround_are_not_taken_for_gptqs(tmp_path: Path) -> None:
    """Its layouts are its own, whatever their tensors are called."""
    tensors = packed_state(
        {
            "qweight": random_of(I32, 1, 8),
            "qzeros": random_of(I32, 1, 1),
            "scales": torch.ones(1, 8).half(),
        }
    )
    table = {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"}
    refusal(lay(tmp_path / "base", tensors, table), "AutoRound, which loratool cannot read.")


BY_TENSORS: dict[str, tuple[State, str]] = {
    "aqlm": ({"codes": random_of(I8, 8, 1, 1), "codebooks": torch.ones(1, 256, 1, 8)}, "AQLM"),
    "vptq": ({"centroids": torch.ones(1, 99), "indices": random_of(I16, 1, 8)}, "VPTQ"),
    "quip": ({"Qidxs": random_of(I16, 8, 1), "SU": torch.ones(8)}, "QuIP#"),
    "spqr": ({"dense_weights": random_of(I32, 8), "row_offsets": random_of(I32, 8)}, "SpQR"),
    "higgs": ({"weight": random_of(I16, 8, 8), "tables2": torch.ones(16, 16, 2)}, "HIGGS"),
    "fp-quant": ({"qweight": random_of(U8, 8, 4), "forward_hadamard_matrix": torch.ones(9)},
                 "FP-Quant"),
    "eetq": ({"weight": random_of(I8, 8, 8), "weight_scales": torch.ones(8).half()}, "EETQ"),
    "quanto": ({"weight._data": random_of(I8, 8, 8), "weight._scale": torch.ones(8, 1)}, "Quanto"),
    "exl2": ({"q_weight": random_of(I32, 1, 8), "q_scale": random_of(I32, 1, 1)}, "EXL2"),
    "exl3": ({"trellis": random_of(I16, 1, 1, 32), "suh": torch.ones(8)}, "EXL3"),
    "paroquant": (
        {"qweight": random_of(I32, 8, 1), "qzeros": random_of(I32, 1, 1),
         "scales": torch.ones(1, 8).half(), "theta": torch.ones(1, 4),
         "pairs": random_of(I16, 1, 8), "channel_scales": torch.ones(1, 8)}, "ParoQuant",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BY_TENSORS)
def test_methods_by_tensors(case: str, tmp_path: Path) -> None:
    """Without a config the tensors that only one method has name it."""
    tensors, name = BY_TENSORS[case]
    refusal(lay(tmp_path / "base", packed_state(tensors)), f"is quantised with {name}, which")


def test_what_is_in_the_way_is_said(tmp_path: Path) -> None:
    """Codebooks, and bytes in a kernel's order, are not a matter of effort."""
    said = {"aqlm": "entries of codebooks", "eetq": "permuted for the kernel"}
    for method, words in said.items():
        tensors = packed_state({"weight": random_of(I8, 8, 8)})
        refusal(lay(tmp_path / method, tensors, {"quant_method": method}), words)


PACKED: dict[str, State] = {
    "int8-alone": {"weight": random_of(I8, 8, 8)},
    "bytes-alone": {"weight": random_of(U8, 8, 4)},
    "expert-bytes": {"gate_up_proj": random_of(U8, 2, 8, 4)},
    "scales-alone": {"scales": torch.ones(1, 8).half()},
    "codes-of-torchao-missing": {"_weight_scale": torch.ones(8, 1)},
    "hadamard": {"had_K": torch.ones(4, 4)},
}


@pytest.mark.parametrize("case", PACKED)
def test_packed_tensors_that_nobody_reads(case: str, tmp_path: Path) -> None:
    """What looks packed and is no part of a weight is no plain tensor; config or none is said."""
    tensors = packed_state(PACKED[case])
    words = ("is quantised, in a form that loratool cannot read", next(iter(PACKED[case])))
    refusal(lay(tmp_path / "a", tensors), *words, "its config.json names no method")
    said = {"quant_method": "gptq"}
    refusal(lay(tmp_path / "b", tensors, said), "is quantised with gptq, in a form", words[1])


INCOMPLETE: dict[str, tuple[State, str]] = {
    "gptq": ({"qweight": random_of(I32, 1, 8)}, "are packed as GPTQ packs them"),
    "bnb-4-bit": ({"weight.absmax": torch.ones(4)}, "its quant_state is missing"),
    "bnb-state": (
        {"weight": random_of(U8, 32, 1), "weight.quant_state.bitsandbytes__nf4": text("{}")},
        "no shape of a matrix or a stack",
    ),
    "bnb-8-bit": ({"SCB": torch.ones(8)}, "its weight is missing"),
    "hqq": ({"W_q": random_of(U8, 4, 8)}, "its packing is missing"),
    "fp8": ({"weight": torch.ones(8, 8).to(torch.float8_e4m3fn)}, "its scale is missing"),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_incomplete_weights(case: str, tmp_path: Path) -> None:
    """A part that is missing is named, with the module it is missing of."""
    tensors, words = INCOMPLETE[case]
    error = refusal(lay(tmp_path / "base", packed_state(tensors)), PATH, words)
    assert "incomplete" in error.hint or "quantization_config" in error.hint


# --- plain weights --------------------------------------------------------------------------------

LEFTOVERS: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"quantization_config": {"load_in_4bit": True}},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "aqlm": {"quantization_config": {"quant_method": "aqlm"}},
    "unknown": {"quantization_config": {"quant_method": "something-new"}},
    "no-method": {"quantization_config": {"bits": 4}},
    "in-text-config": {"text_config": {"quantization_config": {"quant_method": "awq"}}},
    "twice": {
        "quantization_config": {"quant_method": "gptq"},
        "text_config": {"quantization_config": {"quant_method": "awq"}},
    },
    "none": {"quantization_config": None},
    "empty": {"quantization_config": {}},
}


@pytest.mark.parametrize("case", LEFTOVERS)
def test_a_config_alone_makes_no_model_quantised(case: str, tmp_path: Path) -> None:
    """The tensors decide: plain ones are read as they are, and the entry does not go along."""
    base = write_base(tmp_path / "base", small_state(), config=LEFTOVERS[case])
    checkpoint = open_checkpoint(base)
    assert dequantised(checkpoint) is checkpoint
    loratool.merge(base, small_lora(tmp_path / "lora"), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in {k: v for k, v in written.items() if v}
    assert "quantization_config" not in written.get("text_config", {})


def test_weights_that_are_quantised_when_they_are_used(tmp_path: Path) -> None:
    """BitNet's float weights are made −1, 0 and 1 at each use, also after a merge."""
    base = write_base(
        tmp_path / "base", small_state(), config={"quantization_config": {"quant_method": "bitnet"}}
    )
    lora = small_lora(tmp_path / "lora")
    refused(BaseError, base, lora, tmp_path / "out", "BitNet", "−1, 0 and 1")


def test_integer_buffers_are_no_quantisation(tmp_path: Path) -> None:
    """position_ids, counters and masks beside float weights do not stop a merge."""
    extra = {
        "embeddings.position_ids": torch.arange(9)[None],
        "bn.num_batches_tracked": torch.tensor(5),
        "attn.mask": torch.ones(3, dtype=torch.bool),
        "layer.scale": torch.ones(3),
        "layer.shape": torch.ones(3),
    }
    base = write_base(tmp_path / "base", {**small_state(), **extra})
    loratool.merge(base, small_lora(tmp_path / "lora"), tmp_path / "out", dtype="base")
    merged = load(tmp_path / "out")
    assert same({n: merged[n] for n in extra}, extra)


# --- what a config says ---------------------------------------------------------------------------


def test_a_config_that_says_it_twice(tmp_path: Path) -> None:
    """Two tables that differ are not guessed between; two that agree are one."""
    one, other = {"quant_method": "bitsandbytes"}, {"quant_method": "gptq"}
    nested = {"text_config": {"quantization_config": one}}
    tensors = nf4_state()
    differing = lay(tmp_path / "a", tensors, other, **nested)
    refusal(differing, "says gptq in quantization_config", "text_config.quantization_config bits")
    base = opened(lay(tmp_path / "b", tensors, one, **nested))
    assert base.settings.places == (
        ("quantization_config",), ("text_config", "quantization_config"),
    )  # fmt: skip


def test_a_config_deep_inside(tmp_path: Path) -> None:
    """Models of several parts say it in one of them; a plain result has it nowhere."""
    table = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config = {"thinker_config": {"text_config": {"quantization_config": table, "x": 1}}}
    base = lay(tmp_path / "base", nf4_state(), **config, model_type="llama")
    assert opened(base).settings.method == "bitsandbytes"
    loratool.merge(base, small_lora(tmp_path / "lora"), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["thinker_config"]["text_config"] == {"x": 1}


@pytest.mark.parametrize("value", ["gptq", 4, ["gptq"], True])
def test_a_config_that_is_no_table(value: Any, tmp_path: Path) -> None:
    """Where the entry can mean anything, it is not taken for nothing."""
    error = refusal(lay(tmp_path / "base", nf4_state(), value), "quantization_config", "no table")
    assert "Repair it" in error.hint


@pytest.mark.parametrize(
    ("name", "method"),
    [("quantize_config.json", "gptq"), ("quant_config.json", "awq"),
     ("hf_quant_config.json", "modelopt")],
)  # fmt: skip
def test_files_beside_the_config(name: str, method: str, tmp_path: Path) -> None:
    """Older versions wrote a file of their own; an entry in config.json goes first."""
    base = lay(tmp_path / "a", nf4_state())
    (base / name).write_text('{"bits": 4}')
    said = quantisation_of(open_checkpoint(base))
    assert (said.method, said.table, said.places) == (method, {"bits": 4}, ())
    other = lay(tmp_path / "b", nf4_state(), {"quant_method": "FP8"})
    (other / name).write_text('{"bits": 4}')
    assert quantisation_of(open_checkpoint(other)).method == "fp8"


def test_a_deep_config_is_gone_through_once(tmp_path: Path) -> None:
    """Tables in tables to the depth that a parser takes: at once."""
    inner: dict[str, Any] = {"quantization_config": {"quant_method": "gptq"}}
    for _ in range(400):
        inner = {"a": inner, "b": {}}
    base = lay(tmp_path / "base", small_state(), **inner)
    start = time.process_time()
    said = quantisation_of(open_checkpoint(base))
    assert (said.method, len(said.places[0])) == ("gptq", 401)
    assert time.process_time() - start < 2


# --- files of other programs ----------------------------------------------------------------------


def test_gguf(tmp_path: Path) -> None:
    """A GGUF base is refused by name: the file, a folder of such files, and its tensors."""
    folder = tmp_path / "gguf"
    folder.mkdir()
    file = folder / "model-Q4_K_M.gguf"
    file.write_bytes(b"GGUF\3\0\0\0")
    for source in (file, folder):
        with pytest.raises(BaseError) as caught:
            open_checkpoint(source)
        assert_clear(caught.value, "model-Q4_K_M.gguf", "a GGUF base")
        assert "gguf_file" in caught.value.hint
    tensors = {"blk.0.attn_q.weight": random_of(U8, 8, 18), "output_norm.weight": torch.ones(8)}
    error = refusal(lay(tmp_path / "base", tensors), "a GGUF base", "llama.cpp")
    assert "convert it first" in error.hint


def test_a_gguf_file_beside_weights_is_left_alone(tmp_path: Path) -> None:
    """Repositories have it as another form of the same model."""
    base = write_base(tmp_path / "base", small_state())
    (base / "model.gguf").write_bytes(b"GGUF")
    assert ADAPTED in open_checkpoint(base).tensors


def test_hqqs_own_file(tmp_path: Path) -> None:
    """qmodel.pt holds nested tables, for HQQ's own loader."""
    folder = tmp_path / "hqq"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    torch.save({"layer": {"W_q": torch.ones(3), "meta": {}}}, folder / "qmodel.pt")
    for source in (folder / "qmodel.pt", folder):
        with pytest.raises(BaseError) as caught:
            open_checkpoint(source)
        assert_clear(caught.value, "qmodel.pt", "HQQ")


# --- weights that were rescaled -------------------------------------------------------------------

RECIPE = """default_stage:
  default_modifiers:
    {modifier}:
      ignore: [lm_head]
"""
RESCALED: dict[str, tuple[dict[str, Any], str | None, str]] = {
    # fields of the config, recipe.yaml, what it was rescaled by
    "awq-recipe": ({}, RECIPE.format(modifier="AWQModifier"), "AWQModifier in recipe.yaml"),
    "smooth-recipe": (
        {}, RECIPE.format(modifier="SmoothQuantModifier"), "SmoothQuantModifier in recipe.yaml",
    ),
    "spin-recipe": ({}, "- !SpinQuantModifier\n  x: 1\n", "SpinQuantModifier in recipe.yaml"),
    "quoted-recipe": ({}, 'x:\n  "AWQModifier": {}\n', "AWQModifier in recipe.yaml"),
    "crlf-recipe": ({}, "x:\r\n    AWQModifier:\r\n", "AWQModifier in recipe.yaml"),
    "transforms": (
        {"transform_config": {"config_groups": {"R1": {"apply": [{"location": "weight_input"}]}}}},
        None, "transform_config",
    ),
    "modelopt": ({"quant_algo": "W4A16_AWQ"}, None, "W4A16_AWQ"),
    "modelopt-old": ({"quantization": {"quant_algo": "NVFP4_AWQ"}}, None, "NVFP4_AWQ"),
}  # fmt: skip


@pytest.mark.parametrize("case", RESCALED)
def test_rescaled_weights_need_a_word(case: str, tmp_path: Path) -> None:
    """An adapter of the original model does not fit them; one that was trained on them does."""
    fields, recipe, by = RESCALED[case]
    base = lay(tmp_path / "base", nf4_state(), {"quant_method": "bitsandbytes", **fields})
    if recipe is not None:
        (base / "recipe.yaml").write_bytes(recipe.encode())
    assert opened(base).rescaled_by == by
    lora, output = small_lora(tmp_path / "lora"), tmp_path / "out"
    error = refused(
        BaseError, base, lora, output, by, "its weights were rescaled for quantisation",
        "so an adapter of the original model does not fit them",
    )  # fmt: skip
    assert error.hint == "If the adapter was trained on this very base: --trained-here."
    loratool.merge(base, lora, output, trained_here=True)


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPE.format(modifier="GPTQModifier"),
        "# AWQModifier: no\nx:\n  note: like AWQModifier\n",
        "x:\n  MyAWQModifier: {}\n  AWQModifierOfMine: {}\n",
        "\xff\x00" * 99,
        " " * (1 << 20) + "AWQModifier:",
    ],
)
def test_recipes_that_rescale_nothing(recipe: str, tmp_path: Path) -> None:
    """Other modifiers, comments and values are none; a recipe is read as text, up to its bound."""
    base = lay(tmp_path / "base", nf4_state())
    (base / "recipe.yaml").write_text(recipe, encoding="latin-1")
    start = time.process_time()
    assert opened(base).rescaled_by == ""
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "fields",
    [
        {"transform_config": {"config_groups": {"u": {"apply": [{"location": "weight_output"},
                                                                {"location": "output"}]}}}},
        {"rotation": "hadamard"},
    ],
)  # fmt: skip
def test_inputs_that_are_turned_as_the_model_runs(fields: dict[str, Any], tmp_path: Path) -> None:
    """Such weights are none of a plain model, whoever trained on them."""
    base = lay(tmp_path / "base", nf4_state(), {"quant_method": "bitsandbytes", **fields})
    lora = small_lora(tmp_path / "lora")
    refused(
        BaseError, base, lora, tmp_path / "out", "rescaled for quantisation", "turn their inputs",
        trained_here=True,
    )  # fmt: skip
