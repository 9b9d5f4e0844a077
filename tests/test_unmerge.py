"""Taking adapters out again: with the undo file the base comes back bit for bit, every file of it;
without it near the base, and what is said about the distance is true. Anything else is refused."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_cli, write_adapter
from files import (
    ADAPTED,
    NORM,
    OTHER,
    State,
    assert_clean,
    assert_clear,
    load,
    lora_on,
    random_of,
    raw_bytes,
    same,
    sha256s,
    small_lora,
    small_state,
    write_base,
    write_index,
)
from models import edit_config, lora, read_json, step, tiny_llama, train_on_disk, write_json
from safetensors.torch import load_file, save_file
from test_merge_peft import (
    INPUTS,
    RESIZED,
    ROUNDED_ONCE,
    ROUNDED_TWICE,
    SEVERAL,
    TIED,
    TOKEN_ROWS,
    train_head,
    train_resized,
    two_linear,
    write_adapters,
    write_shards,
)
from test_values import legacy_buffers, mixed
from transformers import AutoModelForSequenceClassification

import loratool
from loratool.errors import FileError, LoraToolError, OutputError, RestoreError, UsageError
from loratool.storage.header import build_header, read_header
from loratool.verbs.unmerge import UnmergeReport

#: In a merged model.
UNDO = Path("loratool") / "undo.safetensors"
TORCH = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip

Adapters = Path | list[Path]


def comes_back(base: Path, adapters: Adapters, folder: Path, **options: Any) -> UnmergeReport:
    """Merge reversibly into folder/out and unmerge into folder/back: every file of the base is
    there as it was, and nothing else; the merge did change the weights."""
    out, back = folder / "out", folder / "back"
    loratool.merge(base, adapters, out, reversible=True, **options)
    report = loratool.unmerge(out, adapters, back)
    assert report.exact
    assert sha256s(back) == sha256s(base)
    assert not same(load(out), load(base))
    return report


def no_unmerge(
    kind: type[LoraToolError], merged: Path, adapters: Adapters, back: Path, *parts: str,
    **options: Any,
) -> LoraToolError:  # fmt: skip
    """Unmerge, expecting this error with `parts` in its message, and nothing on the disk."""
    with pytest.raises(LoraToolError) as caught:
        loratool.unmerge(merged, adapters, back, **options)
    assert isinstance(caught.value, kind), caught.value
    assert_clear(caught.value, *parts)
    assert_clean(back)
    return caught.value


def right_or_refused(merged: Path, adapters: Adapters, back: Path, base: Path) -> bool:
    """Unmerge: True if the base comes back; else there is a clear error and no output."""
    try:
        loratool.unmerge(merged, adapters, back)
    except LoraToolError as error:
        assert_clear(error)
        assert_clean(back)
        return False
    assert sha256s(back) == sha256s(base)
    shutil.rmtree(back)
    return True


def codes(report: Any) -> set[str]:
    return {notice.code for notice in report.warnings}


# --- every layer kind ----------------------------------------------------------------------------

LAYERS = {**ROUNDED_ONCE, **{name: case for name, (case, _, _) in ROUNDED_TWICE.items()}}
#: Base dtype and output dtype: the default for most bases, and the one that keeps least.
PAIRS = {"half": ("BF16", "float16"), "narrow": ("F32", "bfloat16")}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_kind_comes_back(name: str, pair: str, tmp_path: Path) -> None:
    """Linear, Conv1D, embeddings, convolutions, attention, biases, DoRA, BD-LoRA, MiCA, replaced
    modules: what an adapter of PEFT changed is as it was."""
    stored, dtype = PAIRS[pair]
    trained = LAYERS[name].train(tmp_path, TORCH[stored])
    comes_back(trained.base, trained.adapter, tmp_path, dtype=dtype)


@pytest.mark.parametrize("weights", [[0.6, -1.4, 0.3], [0.0, -1.0, 0.0]])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", SEVERAL)
def test_chained_adapters_come_back(
    name: str, kind: str, weights: list[float], tmp_path: Path
) -> None:
    """DoRA beside other adapters, in every order and with weights of either sign or zero."""
    adapters = write_adapters(tmp_path, INPUTS[kind][0], *SEVERAL[name])
    comes_back(tmp_path / "base", adapters, tmp_path, weights=weights[: len(adapters)])


#: One case of each way in which a delta is taken back; none replaces values.
PREDICTED = [
    "linear-wide", "conv1d-tall", "nn-conv2d", "embedding-tall", "attention", "bdlora-b", "mica",
    "linear-lora-bias", "nn-conv2d-lora-bias", "dora-linear-wide", "dora-conv1d-tall",
    "dora-embedding", "dora-nn-conv3d",
]  # fmt: skip


@pytest.mark.parametrize("name", PREDICTED)
def test_what_was_not_rounded_away_is_not_stored(name: str, tmp_path: Path) -> None:
    """A bfloat16 base merged in float32 is predicted nearly everywhere: the undo file is small
    because deltas, biases and DoRA's factors are taken back, not because it stores the base."""
    trained = LAYERS[name].train(tmp_path, torch.bfloat16)
    comes_back(trained.base, trained.adapter, tmp_path, dtype="float32")
    assert corrections(tmp_path / "out") <= 3


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", SEVERAL)
def test_chains_are_taken_back_in_their_order(name: str, kind: str, tmp_path: Path) -> None:
    """So are several adapters: the last one first, each with its own factors and weight."""
    case = INPUTS[kind][0]
    adapters = write_adapters(tmp_path, case, *SEVERAL[name])
    state = {n: t.bfloat16() for n, t in load(tmp_path / "base").items()}
    save_file(state, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    weights = [0.6, -0.4, 0.3][: len(adapters)]
    comes_back(tmp_path / "base", adapters, tmp_path, weights=weights, dtype="float32")
    assert corrections(tmp_path / "out") <= 3


def corrections(merged: Path) -> int:
    """How many elements were not predicted; these tensors are of one chunk, which begins so."""
    entries, _ = read_header(merged / UNDO)
    content = (merged / UNDO).read_bytes()
    starts = [info.start for name, info in entries.items() if name.startswith("residual:")]
    return sum(int.from_bytes(content[start : start + 4], "little") for start in starts)


@pytest.mark.parametrize("on_disk", [False, True], ids=["one-matrix", "two-copies"])
@pytest.mark.parametrize("name", TIED)
def test_tied_embeddings_come_back(name: str, on_disk: bool, tmp_path: Path) -> None:
    """Where the merge untied embedding and head, the added head goes and the config ties again."""
    trained = train_on_disk(
        tmp_path, tiny_llama(tie_word_embeddings=True), copy.deepcopy(TIED[name][0])
    )
    if on_disk:
        state = trained.base_state()
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        save_file(state, trained.base / "model.safetensors", {"format": "pt"})
    comes_back(trained.base, trained.adapter, tmp_path)
    assert read_json(tmp_path / "back" / "config.json")["tie_word_embeddings"] is True


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("size", [47, 64])
@pytest.mark.parametrize("name", RESIZED)
def test_a_resized_vocabulary_comes_back(name: str, size: int, tied: bool, tmp_path: Path) -> None:
    """Rows that were added go, rows that were cut off return, in weights and config."""
    trained = train_resized(tmp_path, size, tied, copy.deepcopy(RESIZED[name]))
    comes_back(trained.base, trained.adapter, tmp_path)
    assert read_json(tmp_path / "out" / "config.json")["vocab_size"] == size


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", TOKEN_ROWS)
def test_trained_token_rows_come_back(name: str, tied: bool, tmp_path: Path) -> None:
    """Rows that were replaced are the base's again."""
    config = lora("q_proj", trainable_token_indices=TOKEN_ROWS[name])
    trained = train_on_disk(tmp_path, tiny_llama(tie_word_embeddings=tied), config)
    comes_back(trained.base, trained.adapter, tmp_path)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_added_head_goes(tied: bool, tmp_path: Path) -> None:
    """A classifier's head that the base lacks goes, with its labels and its class."""
    trained = train_head(tmp_path, AutoModelForSequenceClassification, "SEQ_CLS", tied)
    comes_back(trained.base, trained.adapter, tmp_path)
    assert "score.weight" in load(tmp_path / "out")
    assert read_json(tmp_path / "back" / "config.json")["architectures"] == ["LlamaForCausalLM"]


def test_parts_that_were_left_out_stay_out(tmp_path: Path) -> None:
    """A merge with --allow-unmatched is taken back without asking for the rest."""
    base = write_base(tmp_path / "base", small_state())
    lora_dir = small_lora(tmp_path / "lora")
    path = lora_dir / "adapter_model.safetensors"
    more = {k.replace("q_proj", "x_proj"): v for k, v in load_file(path).items()}
    save_file({**load_file(path), **more}, path)
    comes_back(base, lora_dir, tmp_path, allow_unmatched=True)


# --- every dtype ---------------------------------------------------------------------------------


def all_kinds(dtype: torch.dtype) -> State:
    """A base of one dtype with weights for every way a block is computed, and what is carried
    over beside them."""
    return {
        ADAPTED: random_of(dtype, 24, 40, seed=1),
        OTHER: random_of(dtype, 40, 24, seed=2),
        "model.embed_tokens.weight": random_of(dtype, 30, 24, seed=3),
        "model.conv.weight": random_of(dtype, 6, 4, 3, 2, seed=4),
        NORM: random_of(dtype, 1001, seed=5),
        "model.scalar": random_of(dtype, seed=6),
        "model.empty": torch.zeros(0, 5, dtype=dtype),
        "model.ids": torch.arange(9),
        **legacy_buffers(),
    }


def all_kinds_lora(folder: Path, dora: bool) -> Path:
    rng = np.random.default_rng(8 + dora)
    shapes = {
        "layers.0.self_attn.q_proj.lora_A.weight": (3, 40),
        "layers.0.self_attn.q_proj.lora_B.weight": (24, 3),
        "layers.0.self_attn.k_proj.lora_A.weight": (3, 24),
        "layers.0.self_attn.k_proj.lora_B.weight": (40, 3),
        "embed_tokens.lora_embedding_A": (3, 30),
        "embed_tokens.lora_embedding_B": (24, 3),
        "conv.lora_A.weight": (3, 4, 3, 2),
        "conv.lora_B.weight": (6, 3, 1, 1),
    }
    tensors = {
        f"base_model.model.model.{key}": (rng.standard_normal(shape) * 0.2).astype(np.float32)
        for key, shape in shapes.items()
    }
    if dora:
        counts = {"layers.0.self_attn.q_proj": 24, "layers.0.self_attn.k_proj": 40,
                  "embed_tokens": 24, "conv": 6}  # fmt: skip
        for path, count in counts.items():
            shape = (1, count, 1, 1) if path == "conv" else (count,)
            key = f"base_model.model.model.{path}.lora_magnitude_vector"
            tensors[key] = rng.uniform(0.5, 9, shape).astype(np.float32)
    return write_adapter(folder, tensors, {"r": 3, "lora_alpha": 4, "use_dora": dora})


@pytest.mark.parametrize("kinds", ["plain", "dora", "chained"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "base"])
@pytest.mark.parametrize("stored", TORCH)
def test_every_pair_of_dtypes_comes_back(
    stored: str, dtype: str, kinds: str, tmp_path: Path
) -> None:
    """From every dtype to every other and back, with one adapter and with two."""
    base = write_base(tmp_path / "base", all_kinds(TORCH[stored]))
    wanted = {"plain": [False], "dora": [True], "chained": [True, False, True]}[kinds]
    adapters = [all_kinds_lora(tmp_path / f"lora-{i}", d) for i, d in enumerate(wanted)]
    report = comes_back(base, adapters, tmp_path, dtype=dtype)
    assert report.tensors == len(load(base))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "base"])
def test_a_base_of_many_dtypes_comes_back(dtype: str, tmp_path: Path) -> None:
    """Tensors of unlike dtypes in one file, which the merge puts into another order, come back
    in theirs."""
    base = write_base(tmp_path / "base", mixed())
    comes_back(base, small_lora(tmp_path / "lora"), tmp_path, dtype=dtype)


def test_packed_dtypes_come_back(tmp_path: Path) -> None:
    """Elements of less than a byte are copied there and back."""
    table = [
        ("table.f4", "F4", (6, 4)), ("table.f6", "F6_E3M2", (8,)), ("table.f8", "F8_E4M3", (5,)),
        ("table.e8", "F8_E8M0", (3,)), (ADAPTED, "F32", (8, 8)),
    ]  # fmt: skip
    base = write_base(tmp_path / "base", small_state())
    data = bytes(range(1, 27)) + raw_bytes(small_state()[ADAPTED])
    (base / "model.safetensors").write_bytes(build_header(table, {"format": "pt"}) + data)
    loratool.merge(base, small_lora(tmp_path / "lora"), tmp_path / "out", reversible=True)
    loratool.unmerge(tmp_path / "out", tmp_path / "lora", tmp_path / "back")
    assert sha256s(tmp_path / "back") == sha256s(base)


# --- values that rounding treats badly -----------------------------------------------------------


def bits16(dtype: torch.dtype, low: int, high: int) -> torch.Tensor:
    """The values of these bit patterns, with both signs, as an 8-column matrix."""
    bits = torch.arange(low, high, dtype=torch.int32)
    both = torch.cat([bits, bits + 0x8000]).to(torch.int32)
    both = torch.where(both >= 0x8000, both - 0x10000, both).to(torch.int16)
    return both.view(dtype).reshape(-1, 8)


def wide(values: list[float], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).to(dtype).repeat(8, 1)


ZEROS = [0.0, -0.0, 0.0, -0.0, 1.0, -1.0, -0.0, 0.0]
EDGE = [65504.0, -65504.0, 65472.0, -65472.0, 65503.0, 1.0, 0.0, -0.0]
VALUES: dict[str, Callable[[], torch.Tensor]] = {
    "halves-subnormal": lambda: bits16(torch.float16, 0, 0x0400),
    "halves-all": lambda: bits16(torch.float16, 0, 0x7800),
    "brains-subnormal": lambda: bits16(torch.bfloat16, 0, 0x0080),
    "brains-around-float16": lambda: bits16(torch.bfloat16, 0x3000, 0x4700),
    "zeros-f16": lambda: wide(ZEROS, torch.float16),
    "zeros-bf16": lambda: wide(ZEROS, torch.bfloat16),
    "zeros-f32": lambda: wide(ZEROS, torch.float32),
    "zeros-f64": lambda: wide(ZEROS, torch.float64),
    "largest-halves": lambda: wide(EDGE, torch.float16),
    "edge-f32": lambda: wide([*EDGE[:-1], 65519.99], torch.float32),
    "edge-f64": lambda: wide([*EDGE[:-1], 65519.999999999], torch.float64),
    "tiny-f32": lambda: wide([1e-45, -1e-45, 1e-40, 1e-38, -1e-30, 1e-8, 6e-8, 0], torch.float32),
    "tiny-f64": lambda: wide([5e-324, -5e-324, 1e-310, 1e-99, 1e-40, 1e-8, -0.0, 0], torch.float64),
    "near-one-f64": lambda: wide([1 + k * 2.0**-52 for k in range(8)], torch.float64),
    "all-alike": lambda: torch.full((8, 8), 1 / 3, dtype=torch.float32),
}  # fmt: skip


def sized_lora(folder: Path, rows: int, size: float, path: str = ADAPTED) -> Path:
    """An adapter for a matrix of 8 columns whose delta is about `size`."""
    rng = np.random.default_rng(3)
    b = rng.standard_normal((rows, 2)).clip(-2, 2) * size / 4
    b[::3] = 0  # rows that stay as they are
    return lora_on(folder, b, rng.standard_normal((2, 8)).clip(-2, 2), path)


@pytest.mark.parametrize("name", VALUES)
def test_difficult_values_come_back(name: str, tmp_path: Path) -> None:
    """Subnormals, both zeros and values at the edges, under deltas from nothing to far larger,
    and where only the dtype changes."""
    values = VALUES[name]()
    base = write_base(
        tmp_path / "base", {ADAPTED: values, OTHER: values.clone(), NORM: torch.ones(3)}
    )
    edge = bool((values.abs() > 60000).any())
    for size in (0.0, 1e-10) if edge else (0.0, 1e-7, 0.01, 300.0):
        lora_dir = sized_lora(tmp_path / f"lora-{size}", len(values), size)
        for dtype in ("float16", "bfloat16", "float32"):
            folder = tmp_path / f"{size}-{dtype}"
            loratool.merge(base, lora_dir, folder / "out", dtype=dtype, reversible=True)
            loratool.unmerge(folder / "out", lora_dir, folder / "back")
            assert sha256s(folder / "back") == sha256s(base), (size, dtype)


@pytest.mark.parametrize("stored", TORCH)
def test_a_delta_that_swallows_the_weights_is_taken_back(stored: str, tmp_path: Path) -> None:
    """Where nothing of the weights is left in the output, the undo file holds all of it; the
    merge says that it is large."""
    state = {**small_state(64, TORCH[stored])}
    state[ADAPTED] = (state[ADAPTED].double() * 1e-4).to(TORCH[stored])
    base = write_base(tmp_path / "base", state)
    lora_dir = lora_on(tmp_path / "lora", np.full((64, 1), 192.0), np.full((1, 64), 177.0))
    report = loratool.merge(base, lora_dir, tmp_path / "out", reversible=True)
    assert len(load(tmp_path / "out")[ADAPTED].unique()) == 1
    if stored in ("F32", "F64"):  # in the others the file's own few thousand bytes outweigh it
        assert "undo-large" in codes(report)
    loratool.unmerge(tmp_path / "out", lora_dir, tmp_path / "back")
    assert sha256s(tmp_path / "back") == sha256s(base)


@pytest.mark.parametrize("dtype", ["float16", "base"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_a_magnitude_of_zero_is_taken_back(transposed: bool, dtype: str, tmp_path: Path) -> None:
    """DoRA rows or columns of magnitude zero, negative and tiny ones: nothing is divided by
    zero, and nothing is lost."""
    name = "model.embed_tokens.weight" if transposed else ADAPTED
    path = f"base_model.model.{name.removesuffix('.weight')}"
    rng = np.random.default_rng(2)
    magnitude = np.array([0.0, -0.0, 1e-45, -1.0, 1e-38, 1e-7, 3.0, 1e3], np.float32)
    one, other = ("lora_embedding_A", "lora_embedding_B") if transposed else (
        "lora_A.weight", "lora_B.weight")  # fmt: skip
    tensors = {
        f"{path}.{one}": rng.standard_normal((2, 8)).astype(np.float32),
        f"{path}.{other}": rng.standard_normal((8, 2)).astype(np.float32),
        f"{path}.lora_magnitude_vector": magnitude,
    }
    lora_dir = write_adapter(tmp_path / "lora", tensors, {"r": 2, "use_dora": True})
    for stored, kind in TORCH.items():
        base = write_base(tmp_path / stored / "base", {name: random_of(kind, 8, 8)})
        comes_back(base, lora_dir, tmp_path / stored, dtype=dtype)


def test_what_is_not_checked_comes_back_whatever_it_holds(tmp_path: Path) -> None:
    """NaN payloads and infinities in legacy buffers and integers keep every bit."""
    payloads = torch.tensor([0x7F800001, 0x7FC12345, -1, 0x7F800000, -0x800000], dtype=torch.int32)
    state = {
        **small_state(),
        "model.rotary_emb.inv_freq": payloads.view(torch.float32),
        "h.0.attn.masked_bias": torch.tensor(0x7E01, dtype=torch.int16).view(torch.float16),
        "ids": torch.tensor([-(2**63), 2**63 - 1]),
    }
    comes_back(write_base(tmp_path / "base", state), small_lora(tmp_path / "lora"), tmp_path)


# --- every form of a base ------------------------------------------------------------------------


@pytest.fixture
def lora_dir(tmp_path: Path) -> Path:
    return small_lora(tmp_path / "lora")


def test_the_fixtures_come_back(base: Path, adapter: Path, tmp_path: Path) -> None:
    """A base in three shards with its index, tokenizer and generation config, as the Hub has it."""
    report = comes_back(base, adapter, tmp_path)
    assert report.shards == sorted(p.name for p in base.glob("*.safetensors"))
    assert report.remaining == []


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_form_of_the_base_is_kept(
    count: int, suffix: str, tmp_path: Path, lora_dir: Path
) -> None:
    """Shards, index and single files of safetensors come back byte for byte; torch files as
    safetensors with the same tensors, in a directory that opens."""
    base = write_base(tmp_path / "base", small_state())
    (base / "model.safetensors").unlink()
    state = {**small_state(), "a.weight": random_of(torch.float16, 3, 5)}
    write_shards(state, base, count, suffix)
    out, back = tmp_path / "out", tmp_path / "back"
    loratool.merge(base, lora_dir, out, reversible=True)
    loratool.unmerge(out, lora_dir, back)
    assert same(load(back), state)
    assert (back / "config.json").read_bytes() == (base / "config.json").read_bytes()
    if suffix == "safetensors":
        assert sha256s(back) == sha256s(base)
    else:
        assert len(list(back.glob("*.safetensors"))) == count
        assert not list(back.glob("*.bin*"))
        loratool.merge(back, lora_dir, tmp_path / "again", reversible=True)
        assert same(load(tmp_path / "again"), load(out))


def test_views_in_a_torch_file_come_back(tmp_path: Path, lora_dir: Path) -> None:
    """Transposed tensors and tensors that share their storage have the same values again."""
    base = write_base(tmp_path / "base", small_state())
    (base / "model.safetensors").unlink()
    whole = random_of(torch.float32, 16, 8, seed=4)
    state = {ADAPTED: whole[:8].t(), OTHER: whole, "part": whole[3:9, 1:4], NORM: whole[:, 2]}
    torch.save(state, base / "pytorch_model.bin")
    for dtype in ("float16", "base"):
        out = tmp_path / f"out-{dtype}"
        loratool.merge(base, lora_dir, out, dtype=dtype, reversible=True)
        loratool.unmerge(out, lora_dir, tmp_path / f"back-{dtype}")
        wanted = {name: value.contiguous() for name, value in state.items()}
        assert same(load(tmp_path / f"back-{dtype}"), wanted)


def test_a_base_given_as_one_file_comes_back(tmp_path: Path, lora_dir: Path) -> None:
    """The file, under its own name, and the config beside it; its other neighbours are not its."""
    base = write_base(tmp_path / "base", small_state())
    (base / "model.safetensors").rename(base / "weights.safetensors")
    (base / "notes.txt").write_text("not the model's")
    (base / "model-of-another.safetensors").write_bytes(b"")
    out, back = tmp_path / "out", tmp_path / "back"
    loratool.merge(base / "weights.safetensors", lora_dir, out, reversible=True)
    loratool.unmerge(out, lora_dir, back)
    found = sha256s(back)
    assert found.keys() == {"weights.safetensors", "config.json"}
    assert found.items() <= sha256s(base).items()


def test_a_file_of_any_name_and_metadata_comes_back(tmp_path: Path, lora_dir: Path) -> None:
    """A header with other metadata, an odd order and padding of its own is kept as it is."""
    base = write_base(tmp_path / "base", small_state())
    path = base / "model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header = {"__metadata__": {"ünï": "cödé", "format": "pt"}, **dict(reversed(header.items()))}
    text = (json.dumps(header, indent=1) + " " * 13).encode()
    (base / "weights.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + content[end:]
    )
    path.unlink()
    comes_back(base, lora_dir, tmp_path)


def test_tensors_that_the_index_places_elsewhere_do_not_return(
    tmp_path: Path, lora_dir: Path
) -> None:
    """A stale copy in another shard is not the base's: each tensor comes back once, from where
    the index says."""
    state = small_state()
    stale = {ADAPTED: state[ADAPTED] + 1, NORM: state[NORM]}
    fresh = {ADAPTED: state[ADAPTED], OTHER: state[OTHER]}
    base = write_base(tmp_path / "base", stale, fresh)
    names = sorted(p.name for p in base.glob("*.safetensors"))
    write_index(base, {NORM: names[0], ADAPTED: names[1], OTHER: names[1]})
    out, back = tmp_path / "out", tmp_path / "back"
    loratool.merge(base, lora_dir, out, reversible=True)
    loratool.unmerge(out, lora_dir, back)
    assert load_file(back / names[0]).keys() == {NORM}
    assert same(load(back), state)
    found, wanted = sha256s(back), sha256s(base)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == [names[0]]


def test_tensors_that_the_index_does_not_know_return(tmp_path: Path, lora_dir: Path) -> None:
    """What lies in a shard but not in the index is part of the shard, and comes back in it."""
    state = small_state()
    base = write_base(tmp_path / "base", {ADAPTED: state[ADAPTED]}, {OTHER: state[OTHER]})
    write_index(base, {ADAPTED: "model-00001-of-00002.safetensors"} | {
        OTHER: "model-00002-of-00002.safetensors"})  # fmt: skip
    path = base / "model-00002-of-00002.safetensors"
    save_file({OTHER: state[OTHER], NORM: state[NORM]}, path, {"format": "pt"})
    comes_back(base, lora_dir, tmp_path)


def test_a_base_without_config_comes_back(tmp_path: Path, lora_dir: Path) -> None:
    """Weights alone, without any other file, are a base too."""
    base = write_base(tmp_path / "base", small_state())
    (base / "config.json").unlink()
    comes_back(base, lora_dir, tmp_path)


def test_the_adapter_may_be_a_file_or_a_torch_file(tmp_path: Path, lora_dir: Path) -> None:
    """An adapter is known by its content, whether directory or file is named."""
    base = write_base(tmp_path / "base", small_state())
    loratool.merge(base, lora_dir, tmp_path / "out", reversible=True)
    weights = lora_dir / "adapter_model.safetensors"
    loratool.unmerge(tmp_path / "out", weights, tmp_path / "back")
    assert sha256s(tmp_path / "back") == sha256s(base)
    torch.save(load_file(weights), lora_dir / "adapter_model.bin")
    weights.unlink()
    comes_back(base, lora_dir, tmp_path / "torch")


# --- again and again -----------------------------------------------------------------------------


def test_fifty_cycles_change_nothing(tmp_path: Path) -> None:
    """After fifty merges and unmerges, with changing dtypes and weights, every file has the
    sha256 it had."""
    base = write_base(tmp_path / "base", all_kinds(torch.bfloat16))
    adapters = [all_kinds_lora(tmp_path / "one", False), all_kinds_lora(tmp_path / "two", True)]
    wanted, now = sha256s(base), base
    dtypes = ["float16", "bfloat16", "float32", "base"]
    for turn in range(50):
        out, back = tmp_path / "out", tmp_path / f"back-{turn}"
        loratool.merge(
            now, adapters, out, weights=[1.0 - turn / 20, 0.5], dtype=dtypes[turn % 4],
            reversible=True, overwrite=turn > 0,
        )  # fmt: skip
        loratool.unmerge(out, adapters, back)
        assert sha256s(back) == wanted
        now = back


def test_a_merge_on_top_of_a_merge_is_taken_back_step_by_step(tmp_path: Path) -> None:
    """The model between comes back with its own record and undo file, so that its base does."""
    base = write_base(tmp_path / "base", all_kinds(torch.bfloat16))
    one, two = all_kinds_lora(tmp_path / "one", False), all_kinds_lora(tmp_path / "two", True)
    three = all_kinds_lora(tmp_path / "three", False)
    steps = [base]
    for i, lora_dir in enumerate((one, two, three)):
        loratool.merge(
            steps[-1], lora_dir, tmp_path / f"m{i}", weights=[0.5 + i],
            dtype=["float16", "bfloat16", "float16"][i], reversible=True,
        )  # fmt: skip
        steps.append(tmp_path / f"m{i}")
    no_unmerge(RestoreError, steps[2], one, tmp_path / "no", "merged earlier")
    no_unmerge(RestoreError, steps[2], [one, two], tmp_path / "no", "merged earlier")
    now = steps[-1]
    for i, lora_dir in ((2, three), (1, two), (0, one)):
        loratool.unmerge(now, lora_dir, tmp_path / f"back-{i}")
        assert sha256s(tmp_path / f"back-{i}") == sha256s(steps[i])
        now = tmp_path / f"back-{i}"


def test_a_reversible_merge_on_a_plain_one_keeps_its_record(tmp_path: Path, lora_dir: Path) -> None:
    """A base that was merged for good comes back with its loratool.json."""
    base = write_base(tmp_path / "base", small_state())
    loratool.merge(base, lora_dir, tmp_path / "merged")
    other = lora_on(tmp_path / "other", np.ones((8, 1)), np.ones((1, 8)))
    comes_back(tmp_path / "merged", other, tmp_path / "x")
    assert (tmp_path / "x" / "back" / "loratool.json").is_file()


def test_a_plain_merge_on_a_reversible_one_cannot_be_taken_for_it(
    tmp_path: Path, lora_dir: Path
) -> None:
    """The undo file of an earlier merge does not go along where it no longer fits."""
    base = write_base(tmp_path / "base", small_state())
    loratool.merge(base, lora_dir, tmp_path / "one", reversible=True)
    other = lora_on(tmp_path / "other", np.ones((8, 1)), np.ones((1, 8)))
    loratool.merge(tmp_path / "one", other, tmp_path / "two")
    assert not (tmp_path / "two" / UNDO).exists()
    assert not loratool.unmerge(tmp_path / "two", other, tmp_path / "back").exact


# --- the wrong adapters --------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, list[Path], Path]:
    """A base, two adapters, and what a reversible merge with weights made of them."""
    base = write_base(tmp_path / "base", small_state())
    rng = np.random.default_rng(6)
    adapters = [
        lora_on(tmp_path / name, rng.standard_normal((8, 2)), rng.standard_normal((2, 8)))
        for name in ("style", "task")
    ]
    loratool.merge(base, adapters, tmp_path / "out", weights=[0.7, -0.4], reversible=True)
    return base, adapters, tmp_path / "out"


def test_adapters_in_another_order_are_put_in_order(
    two: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    """Each adapter gets the weight that it was merged with, whatever the order they are given in,
    and weights that are given are taken for the adapters beside them."""
    base, (style, task), out = two
    for i, options in enumerate([{}, {"weights": [-0.4, 0.7]}]):
        report = loratool.unmerge(out, [task, style], tmp_path / f"back-{i}", **options)
        assert sha256s(tmp_path / f"back-{i}") == sha256s(base)
        assert report.adapters == [str(style), str(task)]
        assert report.weights == [0.7, -0.4]


def test_one_adapter_twice_is_taken_back(tmp_path: Path, lora_dir: Path) -> None:
    """The same adapter merged twice with unlike weights is recognised twice."""
    base = write_base(tmp_path / "base", small_state())
    comes_back(base, [lora_dir, lora_dir], tmp_path, weights=[0.25, -1.5])
    out = tmp_path / "out"
    report = loratool.unmerge(
        out, [lora_dir, lora_dir], tmp_path / "b", weights=[-1.5, 0.25], dry_run=True
    )
    assert report.weights == [0.25, -1.5]
    no_unmerge(RestoreError, out, lora_dir, tmp_path / "no", "more than once")
    no_unmerge(RestoreError, out, [lora_dir] * 3, tmp_path / "no", "not among")


def test_the_wrong_adapters_are_refused(
    two: tuple[Path, list[Path], Path], tmp_path: Path, lora_dir: Path
) -> None:
    """Another adapter, one too many, one too few: refused with those that the model holds."""
    _, (style, task), out = two
    back = tmp_path / "back"
    known = ("style (weight 0.7", "task (weight -0.4")
    no_unmerge(RestoreError, out, lora_dir, back, str(lora_dir), "not among", *known)
    no_unmerge(RestoreError, out, [style, lora_dir], back, str(lora_dir), *known)
    no_unmerge(RestoreError, out, [style, task, lora_dir], back, str(lora_dir))
    no_unmerge(RestoreError, out, [style, style], back, str(style))
    no_unmerge(RestoreError, out, style, back, "Not given", "task (weight -0.4")


def test_wrong_weights_are_refused(two: tuple[Path, list[Path], Path], tmp_path: Path) -> None:
    """A weight that contradicts the record is an error, and so are too few weights."""
    _, adapters, out = two
    back = tmp_path / "back"
    no_unmerge(RestoreError, out, adapters, back, "weight 0.7", "not 0.8", weights=[0.8, -0.4])
    no_unmerge(RestoreError, out, adapters, back, "weight", weights=[-0.4, 0.7])
    with pytest.raises(UsageError):
        loratool.unmerge(out, adapters, back, weights=[0.7])
    assert_clean(back)


def test_a_changed_adapter_is_refused(two: tuple[Path, list[Path], Path], tmp_path: Path) -> None:
    """One other byte in its weights, or in its config, and it is not the adapter that was
    merged."""
    base, (style, task), out = two
    back = tmp_path / "back"
    path = style / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    no_unmerge(RestoreError, out, [style, task], back, str(style), "not among")
    path.write_bytes(content)
    config = style / "adapter_config.json"
    text = config.read_text()
    config.write_text(text + " ")
    no_unmerge(RestoreError, out, [style, task], back, str(style), "adapter_config.json")
    config.unlink()
    no_unmerge(LoraToolError, out, [style, task], back)
    config.write_text(text)
    assert right_or_refused(out, [style, task], back, base)


# --- a merged model that has changed -------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "base"])
@pytest.mark.parametrize("tensor", [ADAPTED, OTHER, NORM])
def test_one_flipped_bit_in_the_merged_model_is_noticed(
    tensor: str, dtype: str, tmp_path: Path, lora_dir: Path
) -> None:
    """In an adapted tensor, a cast one or a copied one: the sha256 of the base does not come
    out, the tensor is named, and nothing is written."""
    base = write_base(tmp_path / "base", small_state(dtype=torch.bfloat16))
    out = tmp_path / "out"
    loratool.merge(base, lora_dir, out, dtype=dtype, reversible=True)
    path = out / "model.safetensors"
    content = path.read_bytes()
    info = read_header(path)[0][tensor]
    for place in (info.start + 1, info.start + info.nbytes - 1):
        for bit in (6, 7):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            no_unmerge(RestoreError, out, lora_dir, tmp_path / "back", tensor, "sha256")
    path.write_bytes(content)
    assert right_or_refused(out, lora_dir, tmp_path / "back", base)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_any_flipped_bit_gives_the_base_or_an_error(
    dtype: str, tmp_path: Path, lora_dir: Path
) -> None:
    """Wherever the merged weights are damaged, there is no wrong base."""
    base = write_base(tmp_path / "base", small_state())
    out = tmp_path / "out"
    loratool.merge(base, lora_dir, out, dtype=dtype, reversible=True)
    path = out / "model.safetensors"
    content = path.read_bytes()
    for place in range(3, len(content), 17):
        path.write_bytes(
            content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :]
        )
        right_or_refused(out, lora_dir, tmp_path / "back", base)
    path.write_bytes(content[:-5])
    assert not right_or_refused(out, lora_dir, tmp_path / "back", base)


def test_a_merged_model_saved_in_another_dtype_is_refused(tmp_path: Path, lora_dir: Path) -> None:
    """The undo file fits what the merge wrote; a copy in another dtype, or with other shapes or
    missing tensors, is refused before anything is computed."""
    base = write_base(tmp_path / "base", small_state())
    out, back = tmp_path / "out", tmp_path / "back"
    loratool.merge(base, lora_dir, out, reversible=True)
    path = out / "model.safetensors"
    state = load(out)
    save_file({name: value.bfloat16() for name, value in state.items()}, path)
    no_unmerge(RestoreError, out, lora_dir, back, ADAPTED, "BF16", "F16")
    save_file({**state, OTHER: state[OTHER].reshape(4, 16)}, path)
    no_unmerge(RestoreError, out, lora_dir, back, OTHER, "[4, 16]")
    save_file({ADAPTED: state[ADAPTED], OTHER: state[OTHER]}, path)
    no_unmerge(RestoreError, out, lora_dir, back, f"{NORM} is missing")


def test_a_merged_model_saved_in_other_shards_is_fine(tmp_path: Path, lora_dir: Path) -> None:
    """The same tensors in other files give the base back as it was, and tensors that were added
    since do not matter."""
    base = write_base(tmp_path / "base", small_state())
    out = tmp_path / "out"
    loratool.merge(base, lora_dir, out, reversible=True)
    state = {**load(out), "more.weight": torch.ones(3)}
    (out / "model.safetensors").unlink()
    write_shards(state, out, 2, "safetensors")
    assert right_or_refused(out, lora_dir, tmp_path / "back", base)


Record = dict[str, Any]

#: What may have happened to loratool.json.
RECORDS: dict[str, Callable[[Record], Any]] = {
    "a-list": lambda r: [r],
    "empty": lambda r: {},
    "no-options": lambda r: r.pop("options") and None,
    "options-are-empty": lambda r: r.update(options={}),
    "options-are-a-list": lambda r: r.update(options=[]),
    "no-dtype": lambda r: r["options"].pop("dtype") and None,
    "unknown-dtype": lambda r: r["options"].update(dtype="float12"),
    "dtype-is-null": lambda r: r["options"].update(dtype=None),
    "dtype-is-a-list": lambda r: r["options"].update(dtype=["float16"]),
    "other-dtype": lambda r: r["options"].update(dtype="bfloat16"),
    "no-allow-unmatched": lambda r: r["options"].pop("allow_unmatched") or r,
    "no-base": lambda r: r.pop("base") and None,
    "base-is-a-list": lambda r: r.update(base=[]),
    "base-is-null": lambda r: r.update(base=None),
    "base-dtypes-are-a-number": lambda r: r["base"].update(dtypes=3),
    "base-dtypes-of-lists": lambda r: r["base"].update(dtypes=[["F32"]]),
    "base-adapters-are-text": lambda r: r["base"].update(adapters="none"),
    "no-result": lambda r: r.pop("result") and None,
    "result-is-a-list": lambda r: r.update(result=[]),
    "result-tensors-are-a-list": lambda r: r["result"].update(tensors=[]),
    "result-adds-text": lambda r: r["result"]["tensors"].update(add="none"),
    "no-adapters": lambda r: r.update(adapters=[]),
    "adapters-are-a-table": lambda r: r.update(adapters={}),
    "adapter-is-text": lambda r: r.update(adapters=["lora"]),
    "adapter-without-files": lambda r: r["adapters"][0].pop("files") and None,
    "adapter-of-no-file": lambda r: r["adapters"][0].update(files={}),
    "adapter-files-are-text": lambda r: r["adapters"][0].update(files="abc"),
    "adapter-without-weight": lambda r: r["adapters"][0].pop("weight") and None,
    "weight-is-text": lambda r: r["adapters"][0].update(weight="one"),
    "weight-is-nan": lambda r: r["adapters"][0].update(weight=float("nan")),
    "weight-is-infinite": lambda r: r["adapters"][0].update(weight=float("inf")),
    "weight-is-another": lambda r: r["adapters"][0].update(weight=1.5),
    "weight-is-enormous": lambda r: r["adapters"][0].update(weight=1e308),
}


@pytest.mark.parametrize("subtract", [False, True], ids=["undo", "subtract"])
@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_record_is_refused_or_harmless(
    name: str, subtract: bool, tmp_path: Path, lora_dir: Path
) -> None:
    """Whatever stands in loratool.json, there is no traceback, and no wrong base."""
    base = write_base(tmp_path / "base", small_state())
    out, back = tmp_path / "out", tmp_path / "back"
    loratool.merge(base, lora_dir, out, reversible=True)
    record = read_json(out / "loratool.json")
    changed = RECORDS[name](record)
    write_json(out / "loratool.json", record if changed is None else changed)
    if not subtract:
        right_or_refused(out, lora_dir, back, base)
        return
    try:
        loratool.unmerge(out, lora_dir, back, subtract=True)
    except LoraToolError as error:
        assert_clear(error)
        assert_clean(back)
    else:
        assert all(bool(torch.isfinite(t).all()) for t in load(back).values())


@pytest.mark.parametrize("text", ["", "{", "null", "\x00", '{"adapters": ' + "[" * 9000])
def test_a_record_that_is_no_json_is_refused(text: str, tmp_path: Path, lora_dir: Path) -> None:
    """A truncated or overwritten loratool.json is named."""
    base = write_base(tmp_path / "base", small_state())
    out = tmp_path / "out"
    loratool.merge(base, lora_dir, out, reversible=True)
    (out / "loratool.json").write_text(text)
    no_unmerge(FileError, out, lora_dir, tmp_path / "back", "loratool.json")


def test_what_holds_no_adapter_is_refused(tmp_path: Path, lora_dir: Path) -> None:
    """What was unmerged by subtraction is not unmerged once more."""
    base = write_base(tmp_path / "base", small_state())
    loratool.merge(base, lora_dir, tmp_path / "out")
    loratool.unmerge(tmp_path / "out", lora_dir, tmp_path / "back")
    no_unmerge(RestoreError, tmp_path / "back", lora_dir, tmp_path / "no", "no adapter is merged")


# --- outputs -------------------------------------------------------------------------------------


def test_outputs_that_would_harm_are_refused(
    two: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    """An output that exists, or is, holds or lies in an input, is left alone."""
    base, adapters, out = two
    before = sha256s(tmp_path)
    taken = tmp_path / "taken"
    taken.mkdir()
    for place in (out, out / "below", adapters[0], adapters[1] / "below", tmp_path, taken):
        for options in ({}, {"subtract": True}, {"dry_run": True}):
            with pytest.raises(OutputError) as caught:
                loratool.unmerge(out, adapters, place, **options)
            assert_clear(caught.value)
    with pytest.raises(OutputError):
        loratool.unmerge(out, adapters, base, base=base, overwrite=True)
    taken.rmdir()
    assert sha256s(tmp_path) == before


def test_an_output_is_replaced_only_by_a_complete_one(
    two: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    """With overwrite the old output stays until the new one is there, also if that fails."""
    base, adapters, out = two
    back = tmp_path / "back"
    shutil.copytree(out, back)
    path = out / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 64]))
    before = sha256s(back)
    with pytest.raises(RestoreError):
        loratool.unmerge(out, adapters, back, overwrite=True)
    assert sha256s(back) == before
    path.write_bytes(content)
    loratool.unmerge(out, adapters, back, overwrite=True)
    assert sha256s(back) == sha256s(base)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_dry_run_of_unmerge_writes_nothing(
    two: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    """It says what the run itself says, but for the time it took."""
    base, adapters, out = two
    before = sha256s(tmp_path)
    plans = {}
    for subtract in (False, True):
        plans[subtract] = loratool.unmerge(
            out, adapters, tmp_path / "back", subtract=subtract, dry_run=True
        )
    assert sha256s(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out", "style", "task"]
    for subtract, plan in plans.items():
        report = loratool.unmerge(out, adapters, tmp_path / f"back-{subtract}", subtract=subtract)
        volatile = {"output", "seconds", "bytes_free", "dry_run"}
        one, other = ({k: v for k, v in r.to_dict().items() if k not in volatile}
                      for r in (plan, report))  # fmt: skip
        assert one == other
    assert plans[False].exact
    assert plans[False].bytes_written == sum(t.nbytes for t in load(base).values())
    assert plans[False].undo_bytes == (out / UNDO).stat().st_size
    assert not plans[True].exact


def test_a_merge_says_how_large_the_undo_file_is(base: Path, adapter: Path, tmp_path: Path) -> None:
    """The size is reported; a dry run foretells how much of it the weights will take."""
    for dtype in ("float16", "bfloat16", "base"):
        out = tmp_path / dtype
        plan = loratool.merge(base, adapter, out, dtype=dtype, reversible=True, dry_run=True)
        assert not out.exists()
        report = loratool.merge(base, adapter, out, dtype=dtype, reversible=True)
        assert report.undo_bytes == (out / UNDO).stat().st_size
        entries, _ = read_header(out / UNDO)
        weights = sum(i.nbytes for n, i in entries.items() if n.startswith("residual:"))
        assert weights / 1.3 < plan.undo_bytes < report.undo_bytes * 1.3


def test_the_undo_file_is_written_only_where_it_is_asked_for(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """A plain merge and a reversible one write the same model; the undo file, and its mention in
    the record, is all there is more."""
    loratool.merge(base, adapter, tmp_path / "plain")
    loratool.merge(base, adapter, tmp_path / "both", reversible=True)
    plain, both = sha256s(tmp_path / "plain"), sha256s(tmp_path / "both")
    assert both.keys() - plain.keys() == {str(UNDO)}
    assert {n for n in plain if plain[n] != both[n]} == {"loratool.json"}


# --- files beside the weights --------------------------------------------------------------------


def with_side_files(folder: Path) -> tuple[Path, Path]:
    """A base with files of all kinds beside its weights, and an adapter with a tokenizer."""
    base = write_base(folder / "base", small_state())
    (base / "config.json").write_text('{"model_type":"llama",   "note": "ö", "torch_dtype": null}')
    (base / "tokenizer.json").write_text('{"of": "base"}')
    (base / "merges.txt").write_bytes(b"a b\r\n")
    (base / "generation_config.json").write_text("{}")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("[]")
    lora_dir = small_lora(folder / "lora")
    (lora_dir / "tokenizer.json").write_text('{"of": "adapter"}')
    (lora_dir / "added_tokens.json").write_text("{}")
    return base, lora_dir


def test_files_beside_the_weights_come_back(tmp_path: Path) -> None:
    """The config as it was to the byte, the base's own tokenizer, no file of the adapter's."""
    base, lora_dir = with_side_files(tmp_path)
    report = comes_back(base, lora_dir, tmp_path)
    assert (tmp_path / "out" / "added_tokens.json").is_file()
    assert "side-file-changed" not in codes(report)
    assert set(report.side_files) == {
        "config.json", "tokenizer.json", "merges.txt", "generation_config.json",
        str(Path("1_Pooling") / "config.json"),
    }  # fmt: skip


def test_a_side_file_changed_after_the_merge_is_kept_and_said(tmp_path: Path) -> None:
    """Files that the undo file does not hold come from the merged model, as they are now; those
    it holds are the base's whatever happened."""
    base, lora_dir = with_side_files(tmp_path)
    out, back = tmp_path / "out", tmp_path / "back"
    loratool.merge(base, lora_dir, out, reversible=True)
    for name in ("generation_config.json", "tokenizer.json", "config.json"):
        (out / name).write_text('{"changed": true}')
    (out / "merges.txt").unlink()
    (out / "new.txt").write_text("new")
    report = loratool.unmerge(out, lora_dir, back)
    (notice,) = [n for n in report.warnings if n.code == "side-file-changed"]
    assert "generation_config.json (changed)" in notice.message
    assert "merges.txt (missing)" in notice.message
    assert "tokenizer" not in notice.message
    found, wanted = sha256s(back), sha256s(base)
    assert wanted.keys() - found.keys() == {"merges.txt"}
    assert [n for n in found if found[n] != wanted[n]] == ["generation_config.json"]
    assert (back / "generation_config.json").read_text() == '{"changed": true}'


# --- by subtraction ------------------------------------------------------------------------------


def true_share(found: State, base: State, adapted: list[str]) -> float:
    changed = sum(int((found[n].double() != base[n].double()).sum()) for n in adapted)
    return changed / sum(base[n].numel() for n in adapted)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_subtraction_comes_as_near_as_it_says(
    dtype: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    """Each weight is off by the merge's rounding at most, untouched ones not at all where the
    dtype holds them; and the share that differs is near the share foretold."""
    out, back = tmp_path / "out", tmp_path / "back"
    merge = loratool.merge(base, adapter, out, dtype=dtype)
    report = loratool.unmerge(out, adapter, back)
    assert not report.exact
    assert report.dtype == "bfloat16"
    found, merged, wanted = load(back), load(out), load(base)
    adapted = merge.changes["merge"]
    for name in adapted:
        assert found[name].dtype == wanted[name].dtype
        off = (found[name].double() - wanted[name].double()).abs()
        bound = step(merged[name].abs(), merged[name].dtype) / 2
        bound += step(found[name].abs().maximum(wanted[name].abs()), torch.bfloat16) / 2
        # And what two sums in float32 round.
        slack = 1e-6 * merged[name].double().abs().max()
        assert bool((off <= bound + slack).all()), name
    rest = {n: t for n, t in found.items() if n not in adapted}
    if dtype == "bfloat16":
        assert same(rest, {n: wanted[n] for n in rest})
    share = true_share(found, wanted, adapted)
    assert report.expected_changed is not None
    assert share / 2 - 1e-4 <= report.expected_changed <= share * 2 + 1e-4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("size", [0.02, 0.3])
@pytest.mark.parametrize("stored", ["F16", "BF16", "F32"])
def test_the_share_that_will_differ_is_foretold(
    stored: str, size: float, dtype: str, tmp_path: Path
) -> None:
    """The estimate is within a factor of two of the truth, from nearly nothing to nearly all."""
    base = write_base(tmp_path / "base", small_state(192, TORCH[stored]))
    rng = np.random.default_rng(4)
    b = rng.standard_normal((192, 4)) * size / 2
    lora_dir = lora_on(tmp_path / "lora", b, rng.standard_normal((4, 192)))
    loratool.merge(base, lora_dir, tmp_path / "out", dtype=dtype)
    report = loratool.unmerge(tmp_path / "out", lora_dir, tmp_path / "back")
    share = true_share(load(tmp_path / "back"), load(base), [ADAPTED])
    assert report.expected_changed is not None
    assert share / 2 - 0.003 <= report.expected_changed <= share * 2 + 0.003


def test_the_dtype_of_a_subtraction(tmp_path: Path, lora_dir: Path) -> None:
    """By default the base's, as recorded; what is asked for otherwise; with an undo file none
    may be asked for."""
    base = write_base(tmp_path / "base", small_state(dtype=torch.bfloat16))
    out = tmp_path / "out"
    loratool.merge(base, lora_dir, out, reversible=True)
    with pytest.raises(UsageError):
        loratool.unmerge(out, lora_dir, tmp_path / "no", dtype="bfloat16")
    assert_clean(tmp_path / "no")
    for dtype, kind in ((None, "bfloat16"), ("float32", "float32"), ("base", "float16")):
        back = tmp_path / f"in-{dtype}"
        loratool.unmerge(out, lora_dir, back, dtype=dtype, subtract=True)
        assert {t.dtype for t in load(back).values()} == {getattr(torch, kind)}


def test_a_model_without_record_is_subtracted_from_with_a_notice(
    tmp_path: Path, lora_dir: Path
) -> None:
    """What merged it nobody knows: the weights given are taken for the merge's, and it is said."""
    base = write_base(tmp_path / "base", small_state())
    out = tmp_path / "out"
    loratool.merge(base, lora_dir, out, weights=[0.5], dtype="float32")
    (out / "loratool.json").unlink()
    report = loratool.unmerge(out, lora_dir, tmp_path / "back", weights=[0.5])
    assert "no-provenance" in codes(report)
    assert not report.exact
    found = load(tmp_path / "back")
    assert torch.allclose(found[ADAPTED], small_state()[ADAPTED], atol=1e-6)
    assert same({**found, ADAPTED: small_state()[ADAPTED]}, small_state())
    file = loratool.unmerge(out / "model.safetensors", lora_dir, tmp_path / "x", weights=[0.5])
    assert "no-provenance" in codes(file)
    assert torch.equal(load(tmp_path / "x")[ADAPTED], found[ADAPTED])


def test_an_undo_file_without_its_record_does_not_pass_in_silence(
    tmp_path: Path, lora_dir: Path
) -> None:
    """Where loratool.json is gone but the undo file is there, nobody is left to believe that the
    base came back: it is exact, refused, or said to be subtracted."""
    base = write_base(tmp_path / "base", small_state())
    out, back = tmp_path / "out", tmp_path / "back"
    loratool.merge(base, lora_dir, out, reversible=True)
    (out / "loratool.json").unlink()
    try:
        report = loratool.unmerge(out, lora_dir, back)
    except LoraToolError as error:
        assert_clear(error, "loratool.json")
        assert_clean(back)
    else:
        assert report.exact == (sha256s(back) == sha256s(base))
        assert report.exact or "no-provenance" in codes(report)


def test_one_of_several_adapters_is_subtracted(
    two: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    """The others stay, in the weights and in the record, and can be taken out next."""
    base, (style, task), out = two
    one = tmp_path / "without-style"
    report = loratool.unmerge(out, style, one, subtract=True)
    assert report.weights == [0.7]
    assert [r.split(" ")[0] for r in report.remaining] == ["task"]
    record = read_json(one / "loratool.json")
    assert [(a["name"], a["weight"]) for a in record["adapters"]] == [("task", -0.4)]
    assert [a["name"] for a in record["removed"]] == ["style"]
    assert not (one / UNDO).exists()
    loratool.merge(base, task, tmp_path / "wanted", weights=[-0.4], dtype="float32")
    wanted = load(tmp_path / "wanted")[ADAPTED]
    assert torch.allclose(load(one)[ADAPTED].float(), wanted, atol=0.01)
    no_unmerge(RestoreError, one, style, tmp_path / "no", "not among", "task")
    none = tmp_path / "none"
    report = loratool.unmerge(one, task, none)
    assert (report.weights, report.remaining) == ([-0.4], [])
    assert read_json(none / "loratool.json")["adapters"] == []
    assert torch.allclose(load(none)[ADAPTED].float(), small_state()[ADAPTED], atol=0.01)


def test_an_adapter_of_the_base_is_subtracted(tmp_path: Path, lora_dir: Path) -> None:
    """What the base was merged from itself is known too, with its weight."""
    base = write_base(tmp_path / "base", small_state())
    other = lora_on(tmp_path / "other", np.ones((8, 1)), np.ones((1, 8)))
    loratool.merge(base, lora_dir, tmp_path / "one", weights=[0.5], dtype="float32")
    loratool.merge(tmp_path / "one", other, tmp_path / "two", dtype="float32")
    report = loratool.unmerge(tmp_path / "two", lora_dir, tmp_path / "back")
    assert report.weights == [0.5]
    assert [r.split(" ")[0] for r in report.remaining] == ["other"]
    wanted = small_state()[ADAPTED] + 1
    assert torch.allclose(load(tmp_path / "back")[ADAPTED], wanted, atol=1e-5)
    both = loratool.unmerge(tmp_path / "two", [other, lora_dir], tmp_path / "both")
    assert both.remaining == []
    assert torch.allclose(load(tmp_path / "both")[ADAPTED], small_state()[ADAPTED], atol=1e-5)


IRREVERSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "DoRA"),
    "biases": ({"bias": "all"}, "replaced"),
    "modules": ({"modules_to_save": ["z"]}, "replaced"),
}


@pytest.mark.parametrize("name", IRREVERSIBLE)
def test_what_cannot_be_subtracted_is_refused(name: str, tmp_path: Path) -> None:
    """DoRA and replaced tensors lose the base for good, unless there is an undo file."""
    options, word = IRREVERSIBLE[name]
    trained = two_linear(**options).train(tmp_path)
    loratool.merge(trained.base, trained.adapter, tmp_path / "out", reversible=True)
    no_unmerge(
        RestoreError, tmp_path / "out", trained.adapter, tmp_path / "no", word, subtract=True
    )
    shutil.rmtree(tmp_path / "out" / "loratool")
    # That the undo file was there is on record; subtracting must be asked for.
    no_unmerge(RestoreError, tmp_path / "out", trained.adapter, tmp_path / "no", "is missing")
    loratool.merge(trained.base, trained.adapter, tmp_path / "plain")
    error = no_unmerge(RestoreError, tmp_path / "plain", trained.adapter, tmp_path / "no", word)
    assert "--reversible" in error.hint


def test_trained_rows_and_added_tensors_are_not_subtracted(tmp_path: Path) -> None:
    """Nor are replaced token rows, a head that untying added, or one that the base lacks."""
    config = lora("q_proj", trainable_token_indices=[3, 5])
    rows = train_on_disk(tmp_path / "rows", tiny_llama(), config)
    tied = train_on_disk(
        tmp_path / "tied", tiny_llama(tie_word_embeddings=True), lora("q_proj", "embed_tokens")
    )
    head = train_head(tmp_path / "head", AutoModelForSequenceClassification, "SEQ_CLS", False)
    for trained, word in ((rows, "rows replaced"), (tied, "added 1 tensors"), (head, "")):
        out = trained.base.parent / "out"
        loratool.merge(trained.base, trained.adapter, out)
        no_unmerge(RestoreError, out, trained.adapter, tmp_path / "no", word)


@pytest.mark.parametrize("name", ["lora-on-both", "modules-to-save", "token-rows"])
def test_an_embedding_that_was_replaced_is_not_subtracted_from(name: str, tmp_path: Path) -> None:
    """A resized embedding is the adapter's, also where the adapter adds a delta to it: the
    base's rows are gone."""
    trained = train_resized(tmp_path, 53, False, copy.deepcopy(RESIZED[name]))
    loratool.merge(trained.base, trained.adapter, tmp_path / "out")
    no_unmerge(RestoreError, tmp_path / "out", trained.adapter, tmp_path / "no", "replaced")


# --- with originals ------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_originals_are_copied(dtype: str, dora: bool, tmp_path: Path) -> None:
    """With the whole base at hand every tensor is the base's, and nothing is lost."""
    base = write_base(tmp_path / "base", all_kinds(torch.bfloat16))
    lora_dir = all_kinds_lora(tmp_path / "lora", dora)
    loratool.merge(base, lora_dir, tmp_path / "out", dtype=dtype)
    report = loratool.unmerge(tmp_path / "out", lora_dir, tmp_path / "back", base=base)
    assert report.copied_from_base == len(load(base))
    assert not report.expected_changed
    assert same(load(tmp_path / "back"), load(base))


def test_a_part_of_the_originals_is_copied(tmp_path: Path, lora_dir: Path) -> None:
    """One shard of the base gives its tensors; the others are subtracted."""
    state = small_state(dtype=torch.bfloat16)
    base = write_base(
        tmp_path / "base", {ADAPTED: state[ADAPTED]}, {OTHER: state[OTHER], NORM: state[NORM]}
    )
    both = [lora_dir, lora_on(tmp_path / "k", np.ones((8, 1)), np.ones((1, 8)), OTHER)]
    out = tmp_path / "out"
    loratool.merge(base, both, out, dtype="float32")
    for i, copied in enumerate(({ADAPTED}, {OTHER, NORM})):
        shard = base / f"model-0000{i + 1}-of-00002.safetensors"
        report = loratool.unmerge(out, both, tmp_path / f"back-{i}", base=shard)
        assert report.copied_from_base == len(copied)
        found = load(tmp_path / f"back-{i}")
        assert same({n: found[n] for n in copied}, {n: state[n] for n in copied})
        assert all(torch.allclose(found[n], state[n], atol=0.05) for n in state)


def test_other_originals_are_refused(tmp_path: Path, lora_dir: Path) -> None:
    """A base that does not give the merged tensors with these adapters is not copied from."""
    base = write_base(tmp_path / "base", small_state())
    loratool.merge(base, lora_dir, tmp_path / "out")
    state = small_state()
    for name in (ADAPTED, NORM):
        changed = {**state, name: state[name] + 1}
        other = write_base(tmp_path / f"other-{name}", changed)
        no_unmerge(
            RestoreError, tmp_path / "out", lora_dir, tmp_path / "no", str(other), name, base=other
        )
    strange = write_base(tmp_path / "strange", {"x": torch.ones(3)})
    no_unmerge(LoraToolError, tmp_path / "out", lora_dir, tmp_path / "no", base=strange)


def test_originals_are_not_needed_with_an_undo_file(
    two: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    """They are not read, and that is said."""
    base, adapters, out = two
    report = loratool.unmerge(out, adapters, tmp_path / "back", base=base)
    assert report.exact
    assert "base-not-needed" in codes(report)
    assert sha256s(tmp_path / "back") == sha256s(base)


# --- the command line ----------------------------------------------------------------------------


def test_unmerge_on_the_command_line(two: tuple[Path, list[Path], Path], tmp_path: Path) -> None:
    """Base back, exit code 0, and a document for programs."""
    base, (style, task), out = two
    back = tmp_path / "back"
    plan = run_cli("unmerge", out, task, style, "-o", back, "--dry-run")
    assert plan.exit_code == 0
    assert "bit for bit" in " ".join(plan.stdout.split())
    assert not back.exists()
    done = run_cli("unmerge", out, task, style, "-o", back, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["schema_version"] == 1
    assert document["exact"] is True
    assert document["weights"] == [0.7, -0.4]
    assert document["remaining"] == []
    assert document["expected_changed"] is None
    assert sha256s(back) == sha256s(base)


def test_unmerge_errors_on_the_command_line(
    two: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    """Exit code 1 for what is refused, 2 for a wrong call, the reason on stderr, no traceback."""
    _, (style, task), out = two
    back = tmp_path / "back"
    short = run_cli("unmerge", out, style, "-o", back, "--json")
    assert (short.exit_code, short.stdout) == (1, "")
    error = json.loads(short.stderr)
    assert error["error"] == "not-restored"
    assert "task" in error["message"]
    assert "--subtract" in error["hint"]
    wrong = run_cli("unmerge", out, style, task, "-o", back, "--dtype", "float16")
    assert wrong.exit_code == 2
    assert "--subtract" in wrong.stderr
    missing = run_cli("unmerge", out, "-o", back)
    assert missing.exit_code == 2
    for done in (short, wrong, missing):
        assert "Traceback" not in done.stderr
    assert_clean(back)
    assert os.path.lexists(out / UNDO)


def test_subtraction_on_the_command_line(
    two: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    """That it is not exact, and how much will differ, is said; notices go to stderr."""
    _, (style, task), out = two
    (out / "loratool.json").unlink()
    shutil.rmtree(out / "loratool")
    done = run_cli("unmerge", out, style, task, "-o", tmp_path / "back", "--weight", "0.7",
                   "--weight", "-0.4")  # fmt: skip
    assert done.exit_code == 0
    assert "differ from those" in done.stdout
    assert "no-provenance" in done.stderr
    edit_config(style, lora_alpha=3)
    assert (tmp_path / "back" / "loratool.json").is_file()
