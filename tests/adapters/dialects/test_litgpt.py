"""Adapters of litgpt: q, k and v in one pair, names by family, and the files beside."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.dialects import CASES, DialectCase, added_to, apart, cases

import loratool
from loratool.adapters.dialects.litgpt.fused import group_order
from loratool.adapters.reading import read_adapter
from loratool.adapters.told import NOTHING_TOLD, Told
from loratool.errors import LoraToolError
from loratool.models.checkpoint import open_checkpoint
from loratool.models.heads import Heads

QV, ALONE, NEOX = (CASES[f"litgpt-{name}"] for name in ("qv", "alone", "neox"))
RUN, MODEL, WEIGHTS = "hyperparameters.yaml", "model_config.yaml", "lit_model.pth.lora"
State = dict[str, torch.Tensor]


def changed(folder: Path, change: Any = None, case: DialectCase = QV, **files: str | None) -> Path:
    """The adapter of a case with another state, and with lines added to its other files, which are
    called `run` and `model`; without a file that is None."""
    shutil.copytree(case.adapter, folder)
    state: State = torch.load(folder / WEIGHTS)
    state = state.get("model", state)  # type: ignore[assignment]
    if change is not None:
        change(state)
        torch.save(state, folder / WEIGHTS)
    for name, lines in files.items():
        path = folder / {"run": RUN, "model": MODEL}[name]
        if lines is None:
            path.unlink()
            continue
        keys = {line.partition(":")[0] for line in lines.splitlines()}
        kept = [
            line for line in path.read_text().splitlines() if line.partition(":")[0] not in keys
        ]
        path.write_text("\n".join([*kept, lines]))
    return folder


def codes_of(adapter: Path, base: Path | None = None, told: Told = NOTHING_TOLD) -> set[str]:
    found = read_adapter(adapter, told, base and open_checkpoint(base))
    return {notice.code for notice in found.notices}


@pytest.mark.parametrize("case", cases("litgpt", merges=True), ids=lambda case: case.name)
def test_a_merge_adds_what_litgpt_does(case: DialectCase, tmp_path: Path) -> None:
    """Of whole folders, and of the file alone with what its neighbours would say."""
    told = Told.from_dict(case.options)
    loratool.merge(case.base, case.adapter, tmp_path / "out", dtype="float32", told=told)
    assert apart(added_to(case, tmp_path / "out"), case.expected()) < 1e-6


def test_what_the_file_alone_cannot_tell_is_asked_for(tmp_path: Path) -> None:
    """k and v have as many rows, so that which of them has factors is not known."""
    with pytest.raises(LoraToolError, match=r"1,1,0 or 1,0,1") as error:
        loratool.merge(ALONE.base, ALONE.adapter, tmp_path / "out", told=Told(alpha=6.0))
    assert "--enable-lora" in error.value.message
    assert codes_of(ALONE.adapter) == {"fused-parts", "other-family"}


def test_both_forms_of_the_file_are_read(tmp_path: Path) -> None:
    """The tensors may lie in a table of their own, or not."""
    folders = [QV.adapter, changed(tmp_path / "bare", lambda state: None)]
    modules = [read_adapter(folder).modules for folder in folders]
    assert modules[0].keys() == modules[1].keys()
    assert not codes_of(folders[1])


@pytest.mark.parametrize("heads", [Heads(4, 2, 3), Heads(4, 1, 2), Heads(3, 3, 2)])
def test_the_order_of_groups(heads: Heads) -> None:
    """As litgpt's qkv_reassemble: of each group its queries, then its key, then its value."""
    q, k, _ = heads.rows
    per_group = heads.query // heads.kv * heads.size
    wanted = []
    for group in range(heads.kv):
        wanted += range(group * per_group, (group + 1) * per_group)
        wanted += range(q + group * heads.size, q + (group + 1) * heads.size)
        wanted += range(q + k + group * heads.size, q + k + (group + 1) * heads.size)
    assert group_order(heads).tolist() == wanted


def test_phi_3_has_q_k_v_and_gate_up_in_one(tmp_path: Path) -> None:
    """What is one weight on the Hub is one module: factors of its parts lie on a diagonal."""
    rng = np.random.default_rng(0)

    def change(state: State) -> None:
        for layer in (0, 1):
            for half in ("fc_1", "fc_2"):
                path = f"transformer.h.{layer}.mlp.{half}"
                state[f"{path}.lora_A"] = torch.from_numpy(rng.standard_normal((3, 16)))
                state[f"{path}.lora_B"] = torch.from_numpy(rng.standard_normal((20, 3)))

    folder = changed(tmp_path / "a", change, model="name: Phi-3-mini-4k-instruct")
    found = read_adapter(folder)
    assert not found.notices
    assert sorted(found.modules) == sorted(
        f"model.layers.{layer}.{name}"
        for layer in (0, 1)
        for name in ("self_attn.qkv_proj", "mlp.gate_up_proj")
    )
    state: State = torch.load(folder / WEIGHTS)
    a, b = (state[f"transformer.h.0.attn.qkv.lora_{half}"].numpy() for half in "AB")
    pair = found.modules["model.layers.0.self_attn.qkv_proj"].left_right()
    assert pair is not None
    q, kv = 4 * b.shape[0] // 6, b.shape[0] // 3
    nothing = np.zeros((kv, a.shape[1]), np.float32)
    wanted = np.concatenate([b[:q] @ a[:3], nothing, b[q:] @ a[3:]])
    assert np.allclose(pair[0] @ pair[1], wanted, atol=1e-6)
    pair = found.modules["model.layers.0.mlp.gate_up_proj"].left_right()
    assert pair is not None
    wanted = np.concatenate([
        state[f"transformer.h.0.mlp.{half}.lora_B"].numpy()
        @ state[f"transformer.h.0.mlp.{half}.lora_A"].numpy()
        for half in ("fc_1", "fc_2")
    ])  # fmt: skip
    assert np.allclose(pair[0] @ pair[1], wanted, atol=1e-5)
    assert {module.scale for module in found.modules.values()} == {2.0}


QKV = "transformer.h.0.attn.qkv.lora_"


def renamed(to: str) -> Any:
    def change(state: State) -> None:
        for half in "AB":
            state[f"transformer.h.0.{to}.lora_{half}"] = state.pop(f"{QKV}{half}")

    return change


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda s: s.pop(f"{QKV}A"), "half-a-pair"),
        (renamed("attn.attn"), "fused-parts"),
        (renamed("attn.c_attn"), "fused-parts"),
        (renamed("attn.other"), "unknown-tensors"),
        (lambda s: s.update({f"{QKV}A": torch.ones(5, 16)}), "fused-parts"),
        (lambda s: s.update({f"{QKV}B": torch.ones(9, 3)}), "fused-parts"),
        (lambda s: s.update({f"{QKV}A": torch.ones(0, 16)}), "fused-parts"),
        (lambda s: s.update({f"{QKV}A": torch.ones(4, 16), f"{QKV}B": s[f"{QKV}B"][:, :2]}),
         "rank-mismatch"),
        (lambda s: s.update({f"model.{QKV}A": torch.ones(6, 16)}), "unknown-tensors"),
        (lambda s: s.update({f"{QKV}B": s[f"{QKV}B"].int()}), "quantised-factors"),
        (lambda s: s.update({"lm_head.lora_A": torch.ones(3, 16),
                             "lm_head.lora_B": torch.ones(40, 2)}), "pair-mismatch"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(change: Any, code: str, tmp_path: Path) -> None:
    """A missing half, older names, wrong shapes, two tensors for one place."""
    adapter = changed(tmp_path / "a", change)
    assert code in codes_of(adapter, QV.base)
    with pytest.raises(LoraToolError):
        loratool.merge(QV.base, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({"run": "lora_r: 4"}, "rank-mismatch"),
        ({"run": "lora_key: true"}, "fused-parts"),
        ({"run": "lora_query: false"}, "fused-parts"),
        ({"model": "n_head: 2\nhead_size: 8"}, "other-family"),
        ({"model": "n_query_groups: 4"}, "fused-parts"),
    ],
)
def test_configs_that_do_not_fit_are_refused(
    files: dict[str, str], code: str, tmp_path: Path
) -> None:
    """Another rank, other parts, other heads than the factors or the base have."""
    assert code in codes_of(changed(tmp_path / "a", **files), QV.base)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"run": "lora_alpha: .nan"}, "lora_alpha"),
        ({"run": "lora_query: 'yes'"}, "lora_query"),
        ({"run": "a: [1"}, "not valid YAML"),
        ({"model": "n_head: -4"}, "n_head"),
        ({"model": "n_head: !!python/object/apply:os.system ['true']"}, "not valid YAML"),
    ],
)
def test_damaged_configs_are_errors(files: dict[str, str], words: str, tmp_path: Path) -> None:
    """One message, which names the file and the field."""
    adapter = changed(tmp_path / "a", **files)
    with pytest.raises(LoraToolError, match=words) as error:
        read_adapter(adapter)
    assert ".yaml" in error.value.message


def test_what_contradicts_the_configs_is_an_error(tmp_path: Path) -> None:
    """alpha, rank and the parts that have factors; --override makes the user right."""
    for told in (
        Told(alpha=9.0),
        Told(rank=4),
        Told(enable_lora={"qkv": (True, True, False)}),
        Told(product="AB"),
    ):
        with pytest.raises(LoraToolError):
            read_adapter(QV.adapter, told)
    told = Told(alpha=9.0, enable_lora={"attn.qkv": (True, True, False)}, override=True)
    found = read_adapter(QV.adapter, told)
    assert "model.layers.0.self_attn.k_proj" in found.modules
    assert {module.scale for module in found.modules.values()} == {3.0}


def test_the_base_tells_what_the_configs_would(tmp_path: Path) -> None:
    """Heads and family are those of the base where model_config.yaml is not there."""
    adapter = changed(tmp_path / "a", model=None)
    loratool.merge(QV.base, adapter, tmp_path / "out", dtype="float32")
    assert apart(added_to(QV, tmp_path / "out"), QV.expected()) < 1e-6
    assert codes_of(adapter) == {"fused-parts", "other-family"}


def test_the_merged_model_beside_is_no_part_of_it(tmp_path: Path) -> None:
    """litgpt writes lit_model.pth after training; it is not named as unread."""
    adapter = changed(tmp_path / "a")
    torch.save({"lm_head.weight": torch.ones(2, 2)}, adapter / "lit_model.pth")
    assert not codes_of(adapter)


def test_factors_of_a_fused_weight_combine(tmp_path: Path) -> None:
    """GPT-NeoX's query_key_value has one pair of the ranks of its parts together."""
    loratool.combine([NEOX.adapter], tmp_path / "peft")
    loratool.merge(NEOX.base, tmp_path / "peft", tmp_path / "out", dtype="float32")
    assert apart(added_to(NEOX, tmp_path / "out"), NEOX.expected()) < 1e-6
