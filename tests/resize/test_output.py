"""The adapter that resize writes: ranks, patterns, magnitudes, extras and record."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.adapters import (
    HEAD,
    PREFIX,
    WEIGHTS,
    K,
    Q,
    Tensors,
    codes,
    config_of,
    lora,
    write_adapter,
)
from helpers.cli import run_cli
from helpers.outcomes import sha256s
from helpers.resizing import assert_near, of_spectrum
from safetensors.numpy import load_file

import loratool


def test_a_rank_above_what_is_there_is_filled_with_zeros(one: Path, out: Path) -> None:
    """Above the rank that is there A and B are zero, and the product is the same."""
    report = loratool.resize(one, out, rank=9)
    tensors = load_file(out / WEIGHTS)
    a, b = (tensors[f"{PREFIX}{Q}.lora_{half}.weight"] for half in "AB")
    assert (a.shape, b.shape) == ((9, 10), (12, 9))
    assert not a[4:].any()
    assert not b[:, 4:].any()
    assert a[:4].any(1).all()
    assert_near(one, out)
    assert (report.rank, report.error, report.kept) == (9, 0, 1)
    assert (config_of(out)["r"], config_of(out)["lora_alpha"]) == (9, 9)
    (notice,) = [n for n in report.warnings if n.code == "rank-not-needed"]
    assert "has rank 4" in notice.message
    assert "up to rank 9 there are zeros" in notice.message


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_rank_above_the_width_is_that_of_the_widest_matrix(
    tmp_path: Path, out: Path, dry_run: bool
) -> None:
    """No module gets more rows than the widest matrix has rank, and a warning says so, naming
    those that are narrower still; their product is the same."""
    source = lora(tmp_path / "one", Q, K, rank=2)
    tensors = load_file(source / WEIGHTS)
    key = f"{PREFIX}{K}.lora_B.weight"
    tensors[key] = tensors[key][:6]
    write_adapter(source, tensors, None)
    report = loratool.resize(source, out, rank=999, dry_run=dry_run)
    assert (report.rank, {m.rank for m in report.modules}) == (10, {10})
    assert report.bytes_written < 6 * (source / WEIGHTS).stat().st_size
    (notice,) = [n for n in report.warnings if n.code.startswith("rank-")]
    assert notice.code == "rank-too-large"
    assert "rank 999; all get 10" in notice.message
    assert f"{K}: 6" in notice.message
    assert Q not in notice.message
    if not dry_run:
        assert_near(source, out)
        assert config_of(out)["r"] == 10
    again = loratool.resize(source, tmp_path / "in-width", rank=6, dry_run=True)
    assert codes(again) == ["rank-not-needed"]


def test_padding_beyond_the_width_is_as_asked_for_and_named(one: Path, out: Path) -> None:
    """--pad-to asks for zeros, so it gets them, with a warning where no matrix is so wide."""
    report = loratool.resize(one, out, energy=0.9, pad_to=16)
    assert (report.rank, codes(report)) == (16, ["rank-too-large"])
    assert "no matrix has more than rank 10" in report.warnings[0].message
    assert codes(loratool.resize(one, out, energy=0.9, pad_to=8, overwrite=True)) == []


@pytest.mark.parametrize(
    ("options", "rank", "wanted"),
    [
        ({"energy": 0.99}, 3, {}),
        ({"energy": 0.99, "uniform": True}, 3, {}),
        (
            {"energy": 0.99, "patterns": True},
            3,
            {"model.layers.1.q_proj": 1, "model.layers.2.q_proj": 2},
        ),
        ({"energy": 0.99, "pad_to": 8}, 8, {}),
        ({"energy": 0.99, "pad_to": 1}, 3, {}),
        ({"pad_to": 4}, 4, {}),
        ({"max_rank": 2}, 2, {}),
        ({"max_rank": 2, "patterns": True}, 2, {"model.layers.1.q_proj": 1}),
        ({"rank": 2}, 2, {}),
        ({"rank": 8, "pad_to": 4}, 8, {}),
    ],
    ids=str,
)
def test_patterns_and_padding(
    tmp_path: Path, out: Path, options: dict[str, Any], rank: int, wanted: dict[str, int]
) -> None:
    """All have one rank, the largest that one needs, and with --patterns each its own in
    rank_pattern, with a warning; alpha is the rank everywhere."""
    source = of_spectrum(tmp_path / "one", [3, 2, 1], [5.0], [2, 2])
    report = loratool.resize(source, out, **options)
    config = config_of(out)
    assert (config["r"], config["lora_alpha"], report.rank) == (rank, rank, rank)
    assert config["rank_pattern"] == config["alpha_pattern"] == wanted
    shapes = {n: t.shape for n, t in load_file(out / WEIGHTS).items()}
    for module in report.modules:
        assert shapes[f"{PREFIX}{module.path}.lora_A.weight"] == (module.rank, 10)
        assert shapes[f"{PREFIX}{module.path}.lora_B.weight"] == (12, module.rank)
        assert module.rank == wanted.get(module.path, rank)
    assert [w for w in loratool.inspect(out).warnings if w.refused] == []
    assert ("ranks-differ" in codes(report)) is bool(wanted)
    if "rank" not in options and "max_rank" not in options:
        assert_near(source, out)


def test_the_warning_about_patterns_says_who_is_wrong_and_who_refuses(
    tmp_path: Path, out: Path
) -> None:
    """It names the programs, each with what becomes of the adapter there, and the way out."""
    source = of_spectrum(tmp_path / "one", [3, 2, 1], [5.0])
    report = loratool.resize(source, out, energy=0.99, patterns=True)
    (notice,) = [n for n in report.warnings if n.code == "ranks-differ"]
    wrong, refused, read = notice.message.split(";")
    assert all(name in wrong for name in ("llama.cpp", "Ollama", "wrong scale"))
    assert all(name in refused for name in ("SGLang", "LoRAX", "TGI", "hotswap", "refuse"))
    assert all(name in read for name in ("PEFT", "vLLM", "load"))
    assert "without patterns" in read


def test_padding_uses_the_room_it_makes(tmp_path: Path, out: Path) -> None:
    """What one module needs all others get: singular values that fit are kept, not zeroed."""
    source = of_spectrum(tmp_path / "one", [3, 3, 3], [5, 1, 0.5])
    for options in ({}, {"pad_to": 1}, {"max_rank": 3}):
        report = loratool.resize(source, out, energy=0.9, overwrite=True, **options)
        assert [m.rank for m in report.modules] == [3, 3]
        assert_near(source, out)
        assert report.kept == pytest.approx(1)


@pytest.mark.parametrize("ranks", [(1, 2, 3), (3, 2, 1), (2, 3, 1), (1, 3, 2)])
def test_patterns_of_paths_that_end_alike(
    tmp_path: Path, out: Path, ranks: tuple[int, int, int]
) -> None:
    """Where one path is the end of another, each still has its own rank, and can be read."""
    paths = ("q", "inner.q", "model.inner.q")
    tensors: Tensors = {}
    for path, rank in zip(paths, ranks, strict=True):
        rng = np.random.default_rng(rank)
        a, b = np.zeros((4, 10)), np.zeros((12, 4))
        a[:rank], b[:, :rank] = rng.standard_normal((rank, 10)), rng.standard_normal((12, rank))
        tensors |= {f"{PREFIX}{path}.lora_A.weight": a, f"{PREFIX}{path}.lora_B.weight": b}
    source = write_adapter(tmp_path / "one", tensors, {})
    loratool.resize(source, out, energy=1.0, dtype="float32", patterns=True)
    again = loratool.inspect(out)
    assert {m.path: m.rank for m in again.modules} == dict(zip(paths, ranks, strict=True))
    assert [w.message for w in again.warnings if w.refused] == []
    assert all(m.scale == 1 for m in again.modules)


def test_dora_keeps_its_magnitudes(tmp_path: Path, out: Path) -> None:
    """DoRA magnitudes are kept bit for bit, use_dora stays on, and a warning says what it means."""
    magnitude = np.linspace(1, 2, 12, dtype=np.float32)
    key = f"{PREFIX}{Q}.lora_magnitude_vector"
    source = lora(tmp_path / "dora", extra={key: magnitude}, use_dora=True)
    report = loratool.resize(source, out, rank=2, dtype="float16")
    assert codes(report) == ["dora-magnitudes-kept"]
    kept = load_file(out / WEIGHTS)[key]
    assert kept.tobytes() == magnitude.tobytes()
    assert config_of(out)["use_dora"] is True


def test_the_rest_of_the_adapter_comes_along(tmp_path: Path, out: Path) -> None:
    """Saved tensors and token rows keep every bit, biases their scaled value, the tokenizer comes
    along."""
    rows = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
    extra = {
        HEAD: np.random.default_rng(0).standard_normal((3, 10)),
        f"{PREFIX}score.steps": np.array([7]),
        f"{PREFIX}{Q}.lora_B.bias": np.arange(12, dtype=np.float32),
        rows: np.arange(20, dtype=np.float32).reshape(2, 10),
    }
    source = lora(
        tmp_path / "one", extra=extra, lora_bias=True, modules_to_save=["score"], lora_alpha=2,
        trainable_token_indices={"embed_tokens": [5, 1]}, task_type="SEQ_CLS",
        base_model_name_or_path="org/base",
    )  # fmt: skip
    (source / "tokenizer.json").write_text("{}")
    report = loratool.resize(source, out, rank=2, dtype="bfloat16")
    import torch
    from safetensors.torch import load_file as load_torch

    tensors = load_torch(out / WEIGHTS)
    for name in (HEAD, f"{PREFIX}score.steps", rows):
        assert tensors[name].numpy().tobytes() == extra[name].tobytes()
    bias = tensors[f"{PREFIX}{Q}.lora_B.bias"]
    assert bias.dtype == torch.bfloat16
    assert bias.tolist() == [0.5 * n for n in range(12)]
    assert (out / "tokenizer.json").read_text() == "{}"
    config = config_of(out)
    assert config["modules_to_save"] == ["score"]
    assert list(config["trainable_token_indices"].values()) == [[5, 1]]
    assert (config["task_type"], config["base_model_name_or_path"]) == ("SEQ_CLS", "org/base")
    assert report.warnings == []
    assert loratool.inspect(out).warnings == []


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ({"target_modules": ["q_proj", "k_proj"]}, ["k_proj", "q_proj"]),
        ({"target_modules": "all-linear"}, sorted([Q, K])),
        ({"target_modules": r".*\.(q|k)_proj"}, sorted([Q, K])),
        ({"target_modules": ["q_proj", "k_proj"], "layers_to_transform": 0}, sorted([Q, K])),
    ],
    ids=str,
)
def test_targets(tmp_path: Path, out: Path, how: dict[str, Any], wanted: list[str]) -> None:
    """Names where the source has names, full paths where it used a regex or chose layers."""
    loratool.resize(lora(tmp_path / "one", Q, K, **how), out, rank=2)
    assert config_of(out)["target_modules"] == wanted


def test_embeddings_and_convolutions_keep_their_shapes(tmp_path: Path, out: Path) -> None:
    """Factors of embeddings and convolutions are cut in their own layouts, and mean the same."""
    rng = np.random.default_rng(0)
    shapes = {
        "embed.lora_embedding_A": (4, 50), "embed.lora_embedding_B": (10, 4),
        "conv.lora_A.weight": (4, 6, 3, 3), "conv.lora_B.weight": (8, 4, 1, 1),
    }  # fmt: skip
    tensors = {PREFIX + n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    source = write_adapter(tmp_path / "one", tensors, {})
    loratool.resize(source, out, rank=2)
    after = load_file(out / WEIGHTS)
    assert {n.removeprefix(PREFIX): t.shape for n, t in after.items()} == {
        "embed.lora_embedding_A": (2, 50), "embed.lora_embedding_B": (10, 2),
        "conv.lora_A.weight": (2, 6, 3, 3), "conv.lora_B.weight": (8, 2, 1, 1),
    }  # fmt: skip
    for a_name, b_name in zip(list(shapes)[::2], list(shapes)[1::2], strict=True):
        old, new = (
            scale * t[PREFIX + b_name].reshape(shapes[b_name][0], -1).astype(np.float64)
            @ t[PREFIX + a_name].reshape(len(t[PREFIX + a_name]), -1)
            for scale, t in ((2.0, tensors), (1.0, after))
        )  # fmt: skip
        s = np.linalg.svd(old, compute_uv=False)
        assert np.linalg.norm(old - new) == pytest.approx(np.sqrt(np.sum(s[2:] ** 2)), rel=1e-4)


def test_provenance(one: Path, out: Path) -> None:
    """loratool.json has the options and the hashes of input and output, but no path and no date."""
    loratool.resize(one, out, energy=0.9, max_rank=3)
    text = (out / "loratool.json").read_text()
    document = json.loads(text)
    assert document["command"] == "resize"
    assert document["options"]["energy"] == 0.9
    assert document["options"]["max_rank"] == 3
    assert document["adapters"][0]["files"] == sha256s(one)
    hashes = sha256s(out)
    del hashes["loratool.json"]
    assert document["files"] == hashes
    assert str(one.parent) not in text
    assert time.strftime("%Y-") not in text


@pytest.mark.parametrize(
    "options",
    [{"rank": 2}, {"rank": 9}, {"energy": 0.6}, {"energy": 0.6, "pad_to": 8}, {"max_rank": 3},
     {"rank": 2, "dtype": "float16"}],
    ids=str,
)  # fmt: skip
def test_a_dry_run_predicts_and_writes_nothing(
    tmp_path: Path, one: Path, options: dict[str, Any]
) -> None:
    """A dry run reports the very bytes, ranks and losses of the run, and touches no disk."""
    out = tmp_path / "new" / "out"
    planned = loratool.resize(one, out, dry_run=True, **options)
    assert not (tmp_path / "new").exists()
    done = loratool.resize(one, out, **options)
    for before, after in zip(planned.modules, done.modules, strict=True):
        assert (before.path, before.rank, before.kept) == (after.path, after.rank, after.kept)
    assert (planned.kept, planned.error, planned.rank) == (done.kept, done.error, done.rank)
    assert done.bytes_before == planned.bytes_before == (one / WEIGHTS).stat().st_size
    assert done.bytes_written == (out / WEIGHTS).stat().st_size
    assert planned.bytes_written == done.bytes_written


def test_bytes_depend_neither_on_threads_nor_on_the_process(tmp_path: Path) -> None:
    """1 and 3 threads and another process write the same files."""
    source = lora(tmp_path / "one", *[f"model.layers.{n}.q_proj" for n in range(8)], rank=7)
    for threads in (1, 3):
        loratool.resize(source, tmp_path / f"t{threads}", energy=0.8, threads=threads)
    done = run_cli("resize", str(source), "--energy", "0.8", "-o", str(tmp_path / "p"))
    assert done.exit_code == 0
    assert sha256s(tmp_path / "t1") == sha256s(tmp_path / "t3") == sha256s(tmp_path / "p")


def test_a_pickled_adapter_is_resized_like_the_other(one: Path, tmp_path: Path) -> None:
    """adapter_model.bin gives the same weights as adapter_model.safetensors."""
    import torch
    from safetensors.torch import load_file as load_torch

    pickled = tmp_path / "bin"
    pickled.mkdir()
    torch.save(load_torch(one / WEIGHTS), pickled / "adapter_model.bin")
    shutil.copyfile(one / "adapter_config.json", pickled / "adapter_config.json")
    for source in (one, pickled):
        loratool.resize(source, tmp_path / f"{source.name}-out", rank=2)
    assert sha256s(tmp_path / "one-out")[WEIGHTS] == sha256s(tmp_path / "bin-out")[WEIGHTS]
