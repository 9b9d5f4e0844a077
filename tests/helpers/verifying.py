"""The fixtures merged by the formula, broken on purpose, and the findings about it."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import loratool
from helpers.files import State, load
from helpers.places import FIXTURES
from loratool.cli.main import cli
from loratool.merging.proof.findings import Finding
from loratool.rendering import terminal as common
from loratool.verbs.verify import VerifyReport

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}

K = "model.layers.1.self_attn.k_proj.weight"
Q = "model.layers.1.self_attn.q_proj.weight"

UNTOUCHED = "model.embed_tokens.weight"


@cache
def original() -> State:
    return load(FIXTURES / "base")


@cache
def deltas() -> State:
    """scale·B·A of the fixture's adapter, by the tensor it is added to."""
    factors = load_file(FIXTURES / "adapter" / "adapter_model.safetensors")
    found = {}
    for name, a in factors.items():
        if name.endswith(".lora_A.weight"):
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[f"{path}.weight"] = 2.0 * (factors[name.replace("_A.", "_B.")] @ a)
    assert len(found) == 28
    return found


def merged(
    dtype: torch.dtype = torch.float16, weight: float = 1.0, added: State | None = None
) -> State:
    """The fixtures merged by the formula: weight·Δ added in float32, rounded once."""
    found = {n: value.to(dtype) for n, value in original().items()}
    for name, delta in (deltas() if added is None else added).items():
        found[name] = (original()[name].float() + weight * delta).to(dtype)
    return found


def written(folder: Path, state: State, config: Path | None = FIXTURES / "base") -> Path:
    """A model directory of one file."""
    folder.mkdir(parents=True)
    if config is not None:
        shutil.copy(config / "config.json", folder)
    save_file({n: v.contiguous() for n, v in state.items()}, folder / "model.safetensors")
    return folder


def check(folder: Path, state: State, **options: Any) -> VerifyReport:
    """Write `state` to a folder and verify it as the fixtures' merge."""
    model = written(folder, state)
    return loratool.verify(model, FIXTURES / "base", [FIXTURES / "adapter"], **options)


def codes(report: VerifyReport) -> Counter[str]:
    return Counter(f.code for f in report.findings)


def bad(report: VerifyReport) -> dict[str, str]:
    """The code of every finding that says no, by tensor."""
    return {f.tensor: f.code for f in report.findings if not f.sound}


def finding(report: VerifyReport, tensor: str) -> Finding:
    (one,) = [f for f in report.findings if f.tensor == tensor]
    return one


def flipped(value: torch.Tensor, bit: int, index: int) -> torch.Tensor:
    """A copy with one bit of one element turned over."""
    copy = value.clone()
    bits = copy.view(-1).view(INTEGERS[value.dtype])
    width = 8 * value.dtype.itemsize
    mask = 1 << bit if bit < width - 1 else -(1 << bit)
    bits[index] = bits[index] ^ mask
    return copy


def only(names: Callable[[str], bool], weight: float) -> State:
    """All deltas, those that `names` picks times `weight`."""
    return {n: d * weight if names(n) else d for n, d in deltas().items()}


def all_of(code: str) -> dict[str, str]:
    return dict.fromkeys(deltas(), code)


def said_by(
    model: Path, *options: str, columns: int = 80, base: Path = FIXTURES / "base"
) -> Result:
    """What the command prints, run in this process, which is faster; errors are raised."""
    arguments = ["verify", str(model), "--base", str(base), str(FIXTURES / "adapter"), *options]
    with mock.patch.object(common.out, "_width", columns):
        return CliRunner().invoke(cli, arguments)


def code_by_tensor(report: loratool.VerifyReport) -> dict[str, str]:
    return {f.tensor: f.code for f in report.findings}
