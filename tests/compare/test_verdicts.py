"""The word that compare has for how two adapters stand to each other."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.adapters import HEAD, WEIGHTS, K, Q, lora
from helpers.cli import run_cli
from helpers.comparing import changed, of, units
from helpers.places import FIXTURES
from safetensors.numpy import load_file

import loratool


def verdict(*adapters: Path, **options: Any) -> str:
    report = loratool.compare(adapters, **options)
    assert len(report.verdicts) == 1
    return report.verdicts[0]


def test_verdict_same_in_every_format(tmp_path: Path) -> None:
    """The same adapter as .bin, in float16 and in float64 is the same; bfloat16 needs more room."""
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file

    source = lora(tmp_path / "one", Q, K)
    tensors = load_torch(source / WEIGHTS)
    config = source / "adapter_config.json"
    for name, dtype in (("f16", torch.float16), ("f64", torch.float64), ("bf16", torch.bfloat16)):
        (tmp_path / name).mkdir()
        shutil.copyfile(config, tmp_path / name / config.name)
        converted = {n: t.to(dtype) for n, t in tensors.items()}
        save_file(converted, tmp_path / name / WEIGHTS)
        (tmp_path / f"{name}-bin").mkdir()
        shutil.copyfile(config, tmp_path / f"{name}-bin" / config.name)
        torch.save(converted, tmp_path / f"{name}-bin" / "adapter_model.bin")
        exact = loratool.compare([tmp_path / name, tmp_path / f"{name}-bin"], tolerance=1e-6)
        assert exact.equal
        assert exact.pairs[0].distance == pytest.approx(0, abs=1e-7)
    assert verdict(source, tmp_path / "f64", tolerance=1e-6) == "same"
    assert verdict(source, tmp_path / "f16") == "same"
    assert (
        verdict(source, tmp_path / "bf16") == "scaled"
        or not loratool.compare([source, tmp_path / "bf16"]).equal
    )
    assert verdict(source, tmp_path / "bf16", tolerance=0.01) == "same"


def test_verdicts_of_related_and_conflicting_adapters(tmp_path: Path) -> None:
    """A positive cosine is "related", a negative one "conflict", a small one "unrelated"."""
    first = of(tmp_path / "a", {Q: (units(0), units(0).T)})
    for cosine, word in ((0.3, "related"), (-0.3, "conflict"), (0.0, "unrelated"),
                         (0.04, "unrelated"), (-0.04, "unrelated"), (0.06, "related"),
                         (-0.06, "conflict")):  # fmt: skip
        rest = math.sqrt(1 - cosine**2)
        other = of(tmp_path / "b", {Q: (cosine * units(0) + rest * units(1), units(0).T)})
        report = loratool.compare([first, other])
        assert report.verdicts == [word], cosine
        assert report.pairs[0].cosine == pytest.approx(cosine, abs=1e-7)
        assert report.pairs[0].output_overlap == pytest.approx(cosine**2, abs=1e-7)
        assert report.pairs[0].input_overlap == pytest.approx(1)


def test_verdict_disjoint(tmp_path: Path) -> None:
    """Adapters without a common module are "disjoint", and that is a warning too."""
    adapters = [lora(tmp_path / "q", Q), lora(tmp_path / "k", K)]
    report = loratool.compare(adapters)
    assert report.verdicts == ["disjoint"]
    assert [w.code for w in report.warnings] == ["nothing-shared"]
    assert report.pairs[0].cosine in (None, 0)
    assert report.survival == pytest.approx([1, 1])
    assert not report.equal


def test_a_difference_in_one_small_module_is_seen(tmp_path: Path) -> None:
    """One module that differs is not drowned by large ones that agree."""
    shared = {f"model.layers.{n}.q": (1e3 * units(n), units(n).T) for n in range(5)}
    one = of(tmp_path / "a", shared | {K: (units(0), units(0).T)})
    two = of(tmp_path / "b", shared | {K: (units(1), units(1).T)})
    report = loratool.compare([one, two])
    assert not report.equal
    assert report.verdicts != ["same"]
    assert [d for d in report.differing if K in d] == report.differing


def test_equal_directions_in_modules_and_not_overall(tmp_path: Path) -> None:
    """One module doubled and another tripled is no multiple of the adapter."""
    one = of(tmp_path / "a", {Q: (units(0), units(0).T), K: (units(1), units(1).T)})
    two = of(tmp_path / "b", {Q: (2 * units(0), units(0).T), K: (3 * units(1), units(1).T)})
    assert verdict(one, two) == "related"


def test_zero_deltas(tmp_path: Path) -> None:
    """Adapters that do nothing are the same as each other, and unlike those that do something."""
    source = lora(tmp_path / "one")
    zeros = {n: t * ("lora_A" in n) for n, t in load_file(source / WEIGHTS).items()}
    zero = changed(source, tmp_path / "zero", zeros)
    other = changed(source, tmp_path / "other", {n: 0 * t for n, t in zeros.items()})
    assert loratool.compare([zero, other]).equal
    report = loratool.compare([source, zero])
    assert not report.equal
    assert report.pairs[0].cosine is None
    assert report.survival == [pytest.approx(1), None]
    json.dumps(report.to_dict(), allow_nan=False)
    absent = lora(tmp_path / "absent", K)
    both = changed(absent, tmp_path / "both", zeros)
    assert loratool.compare([absent, both]).equal  # a module that does nothing is none


def test_survival_says_what_cancels(tmp_path: Path) -> None:
    """In A − A nothing of A is left, in A + A it is doubled."""
    one, two = lora(tmp_path / "a"), lora(tmp_path / "b")
    assert loratool.compare([one, two]).survival == pytest.approx([2, 2])
    gone = loratool.compare([one, two], weights=[0.5, -0.5])
    assert gone.survival == pytest.approx([0, 0], abs=1e-9)
    assert gone.sum_share == pytest.approx(0, abs=1e-9)
    left_out = loratool.compare([one, two], weights=[1, 0])
    assert left_out.survival == [pytest.approx(1), None]


def test_scaled_means_every_module_by_the_same_factor(tmp_path: Path) -> None:
    """One small module with the opposite sign, or missing, or another head, is no multiple."""
    big, small = (100 * units(0), units(0).T), (units(1), units(1).T)
    one = of(tmp_path / "a", {Q: big, K: small})
    flipped = of(tmp_path / "b", {Q: (2 * big[0], big[1]), K: (-2 * small[0], small[1])})
    missing = of(tmp_path / "c", {Q: (2 * big[0], big[1])})
    whole = of(tmp_path / "d", {Q: (2 * big[0], big[1]), K: (2 * small[0], small[1])})
    head = changed(whole, tmp_path / "e", {HEAD: np.ones((3, 10))}, modules_to_save=["score"])
    assert verdict(one, whole) == "scaled"
    assert [verdict(one, other) for other in (flipped, missing, head)] == ["related"] * 3


def test_dora_is_said_not_to_be_in_the_figures(tmp_path: Path) -> None:
    """Cosines of DoRA adapters leave the magnitudes out, and a warning says so; their intruders
    are not counted."""
    plain = loratool.compare([FIXTURES / "adapter"] * 2, base=FIXTURES / "base", layers="0")
    assert plain.modules[0].intruders is not None
    assert None not in plain.modules[0].intruders
    tensors = load_file(FIXTURES / "adapter" / WEIGHTS)
    magnitudes = {
        name.replace("lora_B.weight", "lora_magnitude_vector"): np.ones(len(b), np.float32)
        for name, b in tensors.items()
        if "lora_B" in name
    }
    dora = changed(FIXTURES / "adapter", tmp_path / "dora", magnitudes, use_dora=True)
    report = loratool.compare([FIXTURES / "adapter", dora], base=FIXTURES / "base", layers="0")
    assert [w.code for w in report.warnings] == ["dora-compared"]
    assert report.modules[0].intruders is not None
    assert report.modules[0].intruders[0] is not None
    assert report.modules[0].intruders[1] is None


def test_a_bfloat16_copy_is_nearly_the_same(tmp_path: Path) -> None:
    """Rounding to bfloat16 is no other adapter: the words say how far apart the two are."""
    source = lora(tmp_path / "one", Q, K)
    loratool.resize(source, tmp_path / "half", pad_to=4, dtype="bfloat16")
    assert verdict(source, tmp_path / "half") == "near"
    done = run_cli("compare", str(source), str(tmp_path / "half"))
    assert "nearly the same" in done.stdout


def test_parts_that_cancel_leave_nothing(tmp_path: Path) -> None:
    """The sentence about the sum has no rounding noise in it."""
    lora(tmp_path / "one", Q)
    # From where it lies: pytest's own folders may have "-0" in their names.
    done = run_cli("compare", "one", "one", "--weight", "1", "--weight", "-1", cwd=tmp_path)
    assert "its parts cancel" in done.stdout
    assert "-0" not in done.stdout
