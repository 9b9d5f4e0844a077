"""What a review and a first user found wrong once: wrong verdicts, exit codes, leftovers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FIXTURES, run_cli, write_adapter
from files import ADAPTED, NORM, beside, load, lora_on, small_lora, small_state, write_base
from safetensors.torch import save_file

import loratool
from loratool.adapters.factors import LowRank
from loratool.merging.matching import Delta
from loratool.merging.products import ExactProduct
from loratool.models.layouts.place import Place
from loratool.storage.tensors import TensorInfo


def codes(report: loratool.VerifyReport) -> dict[str, str]:
    return {f.tensor: f.code for f in report.findings}


def test_infinity_is_never_as_it_should_be(tmp_path: Path) -> None:
    """A value that overflowed to infinity is off, although rounding x gives infinity too."""
    state = {**small_state(), NORM: torch.ones(8)}
    state[ADAPTED][0, 0] = state[NORM][0] = 1e5
    base, lora = write_base(tmp_path / "base", state), small_lora(tmp_path / "lora")
    loratool.merge(base, lora, tmp_path / "sound", dtype="float32")
    right = load(tmp_path / "sound")
    merged = write_base(tmp_path / "m", {n: t.half() for n, t in right.items()})
    report = loratool.verify(merged, base, lora)
    assert (report.verdict, codes(report)) == ("no", {ADAPTED: "other", NORM: "changed"})
    right[NORM][0] = torch.inf
    report = loratool.verify(write_base(tmp_path / "n", right), base, lora)
    assert report.verdict == "no"
    assert codes(report)[NORM] == "changed"


@pytest.mark.parametrize(("weight", "verdict"), [(0, "no"), (1, "yes"), (-1, "no"), (5, "no")])
def test_a_delta_of_the_size_of_float32_noise_is_told(
    weight: float, verdict: str, tmp_path: Path
) -> None:
    """Where each value alone could be another order of the sum, the applied weight decides."""
    rng = np.random.default_rng(0)
    weights = 0.02 + 0.02 * torch.rand(256, 256, generator=torch.Generator().manual_seed(0))
    base = write_base(tmp_path / "base", {ADAPTED: weights})
    b, a = rng.standard_normal((256, 4)), 3e-9 * rng.standard_normal((4, 256))
    lora = lora_on(tmp_path / "lora", b, a)
    x = weights.double() + weight * torch.from_numpy(b.astype(np.float32) @ a.astype(np.float32))
    merged = write_base(tmp_path / "m", {ADAPTED: x.float()})
    assert loratool.verify(merged, base, lora).verdict == verdict


def test_a_head_of_another_size_is_not_held_against_the_base(tmp_path: Path) -> None:
    """A saved head with more rows and other values than merged is "other", without reading past
    the end of the base's smaller one."""
    state = {**small_state(), "score.weight": torch.ones(2, 8)}
    base = write_base(tmp_path / "base", state, config={"num_labels": 2})
    pair = {
        f"base_model.model.{ADAPTED.removesuffix('.weight')}.lora_{half}.weight": np.ones(shape)
        for half, shape in (("A", (1, 8)), ("B", (8, 1)))
    }
    saved = {**pair, "base_model.model.score.weight": np.full((5, 8), 3.0)}
    tensors = {name: value.astype(np.float32) for name, value in saved.items()}
    config = {"r": 1, "lora_alpha": 1, "modules_to_save": ["score"], "task_type": "SEQ_CLS"}
    lora = write_adapter(tmp_path / "lora", tensors, config)
    loratool.merge(base, lora, tmp_path / "out", dtype="base")
    wrong = {**load(tmp_path / "out"), "score.weight": torch.zeros(5, 8)}
    report = loratool.verify(write_base(tmp_path / "m", wrong), base, lora)
    assert codes(report)["score.weight"] == "other"


def test_infinities_and_several_adapters_make_strict_json(tmp_path: Path) -> None:
    """Rows of infinity leave nothing to tell two weights apart by, and no NaN in the JSON."""
    base = write_base(tmp_path / "base", small_state(64))
    one = lora_on(tmp_path / "one", np.ones((64, 1)), np.ones((1, 64)))
    two = lora_on(tmp_path / "two", np.eye(64, 2), np.ones((2, 64)))
    state = small_state(64)
    state[ADAPTED][:40] = torch.inf
    merged = write_base(tmp_path / "m", state)
    done = run_cli("verify", str(merged), "--base", str(base), str(one), str(two), "--json")
    assert done.exit_code == 3
    document = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(name))
    assert document["verdict"] == "no"


def test_adapters_merged_one_after_the_other_are_named(tmp_path: Path) -> None:
    """Two merges in a row round twice, and that is what verify calls it."""
    base, one = FIXTURES / "base", FIXTURES / "adapter"
    loratool.merge(base, one, tmp_path / "first", dtype="base")
    loratool.merge(tmp_path / "first", one, tmp_path / "both", dtype="base", weights=[0.5])
    report = loratool.verify(tmp_path / "both", base, [one, one], weights=[1, 0.5])
    assert report.verdict == "yes"
    assert any("one after the other" in sentence for sentence in report.summary)


@pytest.mark.parametrize("rows", [1, 2, 3, 50])
def test_the_sign_of_a_zero_product_does_not_depend_on_the_shape(rows: int, tmp_path: Path) -> None:
    """BLAS gives -0 or +0 for 0 times a negative number, by the matrix's shape; a restored base
    with a -0 in it would differ."""
    b, a = np.zeros((50, 1), np.float32), -np.ones((1, 60), np.float32)
    save_file({"b": torch.from_numpy(b), "a": torch.from_numpy(a)}, tmp_path / "f.safetensors")
    start = 8 + int.from_bytes((tmp_path / "f.safetensors").read_bytes()[:8], "little")
    path = tmp_path / "f.safetensors"
    info_a = TensorInfo("a", "F32", (1, 60), path, start)
    info_b = TensorInfo("b", "F32", (50, 1), path, start + a.nbytes)
    module = LowRank("m", "linear", info_a, info_b, 1.0, 1.0)
    from loratool.storage.tensors import FilePool

    with FilePool() as files:
        product = ExactProduct(Delta(Place("m.weight"), module), (50, 60), files)
    window = product.window(0, rows)
    assert window is not None
    for work in (torch.float32, torch.float64):
        assert not torch.signbit(product.product(window, work)).any()


def test_a_reader_that_goes_away_does_not_change_the_answer(tmp_path: Path) -> None:
    """`verify … | true` still exits with 3 for no, and a merge that is done with 0."""
    base, lora = FIXTURES / "base", FIXTURES / "adapter"
    command = f"{sys.executable} -m loratool"
    for arguments, code in (
        (f"verify {base} --base {base} {lora}", 3),
        (f"verify {base} --base {base} {lora} --json", 3),
        (f"merge {base} {lora} -o {tmp_path / 'out'}", 0),
    ):
        line = f"{command} {arguments} | true; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (code, "")


def test_a_second_interrupt_does_not_stop_the_cleaning_up(tmp_path: Path) -> None:
    """Ctrl-C pressed again and again leaves nothing behind, as the message says."""
    base, lora, out = FIXTURES / "base", FIXTURES / "adapter", tmp_path / "out"
    slow = (
        "import loratool.storage.staging as w, shutil, sys, time\n"
        "import loratool.merging.executor\n"
        "write, remove = w.ShardWriter.write, shutil.rmtree\n"
        "w.ShardWriter.write = lambda s, o, d: (write(s, o, d), time.sleep(0.05))\n"
        "def slowly(*a, **k):\n"
        "    print('cleaning', flush=True); time.sleep(0.5); remove(*a, **k)\n"
        "shutil.rmtree = slowly\n"
        "from loratool.cli.main import main; main(sys.argv[1:])"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", slow, "merge", str(base), str(lora), "-o", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.loratool-partial-*/model*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    assert child.stdout is not None
    assert child.stdout.readline() == "cleaning\n"
    child.send_signal(signal.SIGINT)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    assert child.returncode == 130
    assert beside(out) == []


def test_originals_must_give_the_merge_to_the_last_bit(tmp_path: Path) -> None:
    """A base that is almost the one is no original, where loratool's own record says that the
    merge comes out the same again."""
    state = small_state(64)
    base, lora = write_base(tmp_path / "base", state), small_lora(tmp_path / "lora", 64)
    loratool.merge(base, lora, tmp_path / "out")
    almost = {**state, ADAPTED: state[ADAPTED] * (1 + 2e-5)}
    assert loratool.verify(tmp_path / "out", write_base(tmp_path / "b", almost), lora).equal < 1
    other = write_base(tmp_path / "other", almost)
    with pytest.raises(loratool.LoraToolError, match="do not give those of"):
        loratool.unmerge(tmp_path / "out", lora, tmp_path / "back", base=other)
    report = loratool.unmerge(tmp_path / "out", lora, tmp_path / "back", base=base)
    assert report.exact
    back = load(tmp_path / "back")
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_a_head_that_the_config_drops_is_warned_about(tmp_path: Path) -> None:
    """Two matrices, but a config.json that still ties them: loaders would drop the merged head."""
    state = {"model.embed_tokens.weight": torch.randn(16, 8), **small_state()}
    base = write_base(tmp_path / "base", state, config={"tie_word_embeddings": True})
    lora = lora_on(tmp_path / "lora", np.ones((16, 1)), np.ones((1, 8)), "lm_head.weight")
    loratool.merge(base, lora, tmp_path / "out", dtype="base")
    report = loratool.verify(tmp_path / "out", base, lora)
    assert report.verdict == "yes"
    assert "still-tied" not in {notice.code for notice in report.warnings}
    (tmp_path / "out" / "config.json").write_bytes((base / "config.json").read_bytes())
    report = loratool.verify(tmp_path / "out", base, lora)
    assert "still-tied" in {notice.code for notice in report.warnings}
