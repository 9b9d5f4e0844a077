"""Is this the base of the adapter, does it hold it already, and does the adapter do anything?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.adapters import Q, codes, pair, write_adapter
from helpers.bases import small_base
from helpers.cli import run_cli
from helpers.outcomes import refused

import loratool
from loratool.errors import MatchError
from loratool.merging.identity import is_quantised_name, plain_name


def named_base(folder: Path, name: str | None) -> Path:
    """A base whose config.json says what it was loaded from."""
    base = small_base(folder)
    if name is not None:
        config = {"model_type": "llama", "_name_or_path": name}
        (base / "config.json").write_text(json.dumps(config))
    return base


def lora(folder: Path, **config: object) -> Path:
    return write_adapter(folder, pair(Q, 6, 5), config)


DIFFERENT = [
    ("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B-Instruct"),
    ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.2"),
    ("/data/models/llama-2-7b-chat", "meta-llama/Llama-2-7b-hf"),
    ("Qwen/Qwen2.5-7B", "unsloth/Qwen2.5-7B-Instruct-bnb-4bit"),
    ("org/other", "org/base"),
]
ALIKE = [
    ("org/base", "mirror/base"),
    ("outputs/checkpoint-3", "org/base"),
    ("meta-llama/Meta-Llama-3-8B", "unsloth/llama-3-8b-bnb-4bit"),
    ("Qwen/Qwen2.5-7B", "unsloth/Qwen2.5-7B-unsloth-bnb-4bit"),
    ("/home/me/Llama-2-7b-hf/", "meta-llama/Llama-2-7b-hf"),
    ("NousResearch/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
    ("mistralai/Mistral-7B-v0.1", "TheBloke/Mistral-7B-v0.1-GPTQ"),
    ("google/gemma-2-2b", "/root/.cache/huggingface/hub/models--google--gemma-2-2b/snapshots/abc"),
    ("output/checkpoint-500", "google/gemma-2-2b"),  # says nothing
    (None, "google/gemma-2-2b"),
    ("google/gemma-2-2b", None),
    ("google/gemma-2-2b", "./base"),
    ("google/gemma-2-2b", "/home/me/somewhere-else"),  # a path is no name
    ("mistralai/Mistral-7B-v0.1", "unsloth/mistral-7b-bnb-4bit"),
]


@pytest.mark.parametrize(("known", "trained_on"), DIFFERENT)
def test_another_base_of_the_same_shapes(tmp_path: Path, known: str, trained_on: str) -> None:
    """merge, verify and inspect --base say both names; the summary shows the adapter's own."""
    base = named_base(tmp_path / "base", known)
    adapter = lora(tmp_path / "adapter", base_model_name_or_path=trained_on)
    report = loratool.merge(base, adapter, tmp_path / "out")
    proof = loratool.verify(tmp_path / "out", base, adapter)
    seen = loratool.inspect(adapter, base=base)
    for found in (report, proof, seen):
        (notice,) = [n for n in found.warnings if n.code == "base-differs"]
        assert known in notice.message
        assert trained_on in notice.message
    assert report.trained_on == [trained_on]
    done = run_cli("merge", base, adapter, "-o", tmp_path / "cli", COLUMNS="200")
    assert f"trained on {trained_on}" in done.stdout


@pytest.mark.parametrize(("known", "trained_on"), ALIKE)
def test_the_same_base_under_other_names(
    tmp_path: Path, known: str | None, trained_on: str | None
) -> None:
    """Mirrors, quantised copies, paths and names that say nothing are no other base."""
    base = named_base(tmp_path / "base", known)
    adapter = lora(tmp_path / "adapter", base_model_name_or_path=trained_on)
    assert "base-differs" not in codes(loratool.merge(base, adapter, tmp_path / "out"))


def test_a_folder_of_the_right_name_is_enough(tmp_path: Path) -> None:
    """config.json of a fine-tune often names what it was made from; its folder says what it is."""
    base = named_base(tmp_path / "zephyr-7b-beta", "mistralai/Mistral-7B-v0.1")
    adapter = lora(tmp_path / "adapter", base_model_name_or_path="HuggingFaceH4/zephyr-7b-beta")
    assert codes(loratool.merge(base, adapter, tmp_path / "out")) == []


def cached(tmp_path: Path, repo: str, commit: str) -> Path:
    """A base in a download cache."""
    place = tmp_path / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / commit
    return named_base(place, "somebody/something-else")


def test_the_hub_knows_best(tmp_path: Path) -> None:
    """A base in the download cache is what its place says, whatever its config.json says."""
    base = cached(tmp_path, "org/base-a", "a" * 40)
    same = lora(tmp_path / "same", base_model_name_or_path="org/base-a", revision="a" * 40)
    assert codes(loratool.merge(base, same, tmp_path / "out")) == []
    other = lora(tmp_path / "other", base_model_name_or_path="org/base-b")
    assert codes(loratool.merge(base, other, tmp_path / "out2")) == ["base-differs"]
    older = lora(tmp_path / "older", base_model_name_or_path="org/base-a", revision="b" * 40)
    report = loratool.merge(base, older, tmp_path / "out3")
    assert codes(report) == ["base-differs"]
    assert "b" * 12 in report.warnings[0].message
    mirror = lora(tmp_path / "mirror", base_model_name_or_path="copy/base-a", revision="b" * 40)
    assert codes(loratool.merge(base, mirror, tmp_path / "out5")) == []  # of another repository
    branch = lora(tmp_path / "branch", base_model_name_or_path="org/base-a", revision="main")
    assert codes(loratool.merge(base, branch, tmp_path / "out4")) == []


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("TheBloke/Llama-2-7B-GPTQ", "llama-2-7b"), ("x/Model-8B-AWQ-4bit", "model-8b"),
        ("x/Model-8B-FP8", "model-8b"), ("x/Model-8B-w4a16", "model-8b"),
        ("x/phi-3-mini-4k-instruct", "phi-3-mini-4k-instruct"), ("./merged", ""),
        ("x/Model-8B-bnb-8bit-smashed", "model-8b"), ("checkpoint-10", ""),
        ("x/gemma-2-9b-it-hf", "gemma-2-9b-it"), ("/", ""), ("C:\\models\\Llama-2", "llama-2"),
        ("Qwen/Qwen2___5-7B", "qwen2.5-7b"), ("x/m-8b-NVFP4", "m-8b"), ("x/m-8b-FP8-KV", "m-8b"),
        ("x/m-8b-sharded-bf16-5GB", "m-8b"), ("x/m-8b-4.0bpw-exl2", "m-8b"), ("x/m@main", "m"),
        ("x/m-8b-qat-q4_0-unquantized", "m-8b"), ("x/m-AQLM-2Bit-1x16", "m"),
        ("/kaggle/input/llama/8b-instruct/2", ""), ("org/base", "base"), ("base", ""),
        ("stabilityai/step-1", "step-1"), ("x/stepfun-1", "stepfun-1"),
    ],
)  # fmt: skip
def test_plain_names(name: str, plain: str) -> None:
    """What quantising adds is taken off, what makes another model is not."""
    assert plain_name(name) == plain


def test_names_of_quantised_copies() -> None:
    """Formats and widths count as words of their own, not as parts of other words."""
    names = ["x/a-bnb-4bit", "x/a-GPTQ", "x/A-AWQ-INT4", "x/a.fp8", "x/a-NVFP4", "x/a-qat-q4_0"]
    assert all(map(is_quantised_name, names))
    assert not any(map(is_quantised_name, ["x/fp8less", "bnb/a", "x/gptqueen-7b", "x/a-8b"]))


def test_an_adapter_that_the_base_holds(tmp_path: Path) -> None:
    """A second merge of the same adapter is refused, in one step and in two, unless --again."""
    base, adapter = small_base(tmp_path / "base"), lora(tmp_path / "adapter")
    once, twice = tmp_path / "once", tmp_path / "twice"
    loratool.merge(base, adapter, once)
    error = refused(MatchError, once, adapter, twice, "adapter (weight 1")
    assert "--again" in error.hint
    assert "unmerge" in error.hint
    refused(MatchError, once, adapter, twice, "already", dry_run=True)
    other = write_adapter(tmp_path / "other", pair(Q, 6, 5, seed=3), {})
    loratool.merge(once, other, tmp_path / "both")
    refused(MatchError, tmp_path / "both", adapter, twice, "already")
    refused(MatchError, once / "model.safetensors", adapter, twice, "already")
    loratool.merge(once, adapter, twice, again=True)
    done = run_cli("merge", once, adapter, "-o", tmp_path / "cli", "--again")
    assert done.exit_code == 0
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    refused(MatchError, once, copy, tmp_path / "none", "already")


def test_what_was_taken_out_may_be_merged_again(tmp_path: Path) -> None:
    """After unmerge, exact or by subtraction, the model does not hold the adapter any more."""
    base, adapter = small_base(tmp_path / "base"), lora(tmp_path / "adapter")
    loratool.merge(base, adapter, tmp_path / "out", reversible=True)
    loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    loratool.merge(tmp_path / "back", adapter, tmp_path / "again")
    loratool.unmerge(tmp_path / "out", adapter, tmp_path / "less", subtract=True)
    loratool.merge(tmp_path / "less", adapter, tmp_path / "again2")


def test_a_record_of_other_weights_says_nothing(tmp_path: Path) -> None:
    """A loratool.json that was copied beside weights of another name is not believed."""
    base, adapter = small_base(tmp_path / "base"), lora(tmp_path / "adapter")
    loratool.merge(base, adapter, tmp_path / "out")
    (base / "model.safetensors").rename(base / "other.safetensors")
    shutil.copy(tmp_path / "out" / "loratool.json", base)
    loratool.merge(base, adapter, tmp_path / "fine")


def test_slips_are_said(tmp_path: Path) -> None:
    """One adapter twice, a weight of 0, a weight of 70 for 0.70: done as told, and said."""
    base, adapter = small_base(tmp_path / "base"), lora(tmp_path / "adapter")
    twice = loratool.merge(base, [adapter, adapter], tmp_path / "a")
    assert codes(twice) == ["same-adapter"]
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "inference_mode": False}))
    assert codes(loratool.merge(base, [adapter, copy], tmp_path / "b")) == ["same-adapter"]
    other = write_adapter(tmp_path / "other", pair(Q, 6, 5, seed=3), {})
    zero = loratool.merge(base, [adapter, other], tmp_path / "c", weights=[1, 0])
    assert codes(zero) == ["zero-weight"]
    for weight in (101, -150):
        large = loratool.merge(base, adapter, tmp_path / f"d{weight}", weights=[weight])
        assert codes(large) == ["large-weight"]
    assert codes(loratool.merge(base, adapter, tmp_path / "e", weights=[100])) == []


@pytest.mark.parametrize("what", ["b", "a", "alpha", "one-of-two"])
def test_an_adapter_that_does_nothing(tmp_path: Path, what: str) -> None:
    """B or A zero, alpha 0: the merge says that it changed nothing, or in which modules."""
    base = small_base(tmp_path / "base", **{"model.layers.0.mlp.weight": np.ones((6, 5), "f2")})
    tensors = pair(Q, 6, 5)
    names = [n for n in tensors if f"lora_{'A' if what == 'a' else 'B'}" in n]
    if what != "alpha":
        tensors[names[0]] = np.zeros_like(tensors[names[0]])
    if what == "one-of-two":
        tensors |= pair("model.layers.0.mlp", 6, 5)
    config = {"lora_alpha": 0} if what == "alpha" else {}
    adapter = write_adapter(tmp_path / "adapter", tensors, config)
    (notice,) = loratool.merge(base, adapter, tmp_path / "out").warnings
    assert notice.code == "zero-delta"
    assert ("does nothing" in notice.message) == (what != "one-of-two")
    assert Q in notice.message or what != "one-of-two"


def test_the_same_factors_with_another_alpha_are_another_adapter(tmp_path: Path) -> None:
    """Equal tensors are the same adapter only with the same scale."""
    base, one = small_base(tmp_path / "base"), lora(tmp_path / "one")
    other = lora(tmp_path / "other", lora_alpha=4)
    assert codes(loratool.merge(base, [one, other], tmp_path / "out")) == []


def test_a_magnitude_or_a_bias_does_something_by_itself(tmp_path: Path) -> None:
    """DoRA whose B is zero still scales the weight; a module with a bias adds it."""
    base = small_base(tmp_path / "base", **{f"{Q}.bias": np.zeros(6, np.float16)})
    tensors = {n: v * ("lora_A" in n) for n, v in pair(Q, 6, 5).items()}
    for name, part, config in (
        ("dora", "lora_magnitude_vector", {"use_dora": True}),
        ("biased", "lora_B.bias", {"lora_bias": True}),
    ):
        more = {f"base_model.model.{Q}.{part}": np.ones(6, np.float32)}
        adapter = write_adapter(tmp_path / name, tensors | more, config)
        assert codes(loratool.merge(base, adapter, tmp_path / f"{name}-out")) == []


@pytest.mark.parametrize(
    ("known", "trained_on", "said"),
    [
        ("meta-llama/Meta-Llama-3-8B", "unsloth/llama-3-8b-bnb-4bit", True),
        ("mistralai/Mistral-7B-v0.1", "TheBloke/Mistral-7B-v0.1-GPTQ", True),
        ("meta-llama/Meta-Llama-3-8B", "NousResearch/Meta-Llama-3-8B", False),
        ("google/gemma-2-2b", None, False),
    ],
)
def test_a_base_that_is_not_quantised_as_the_adapters_was(
    tmp_path: Path, known: str, trained_on: str | None, said: bool
) -> None:
    """The sum with the 16-bit original is another model than the one that was trained; both names
    are said, by every verb that has a base."""
    base = named_base(tmp_path / "base", known)
    adapter = lora(tmp_path / "adapter", base_model_name_or_path=trained_on)
    for found in (
        loratool.merge(base, adapter, tmp_path / "out"),
        loratool.inspect(adapter, base=base),
    ):
        notices = [n for n in found.warnings if n.code == "other-quantisation"]
        assert len(notices) == said
        assert all(known in n.message and str(trained_on) in n.message for n in notices)
