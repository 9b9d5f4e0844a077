"""A base or a fine-tune that is quantised: what that rounded off is no change, and is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import codes, config_of
from helpers.cli import run_cli
from helpers.extracting import BF16, F16, F32, cast, distance, moved, products, square
from helpers.files import State, write_base
from helpers.golden import golden
from helpers.outcomes import assert_clean, assert_clear
from helpers.quantised import is_quantised, llama_state, write_fp8_base, write_nf4_base

import loratool
from loratool.errors import BaseError, ValueRangeError
from loratool.models.checkpoint import open_checkpoint
from loratool.models.quantised.base import dequantised
from loratool.models.quantised.ends import ends_of
from loratool.storage.values import read_float32

AT = "model.layers.0."
Q, UP = f"{AT}self_attn.q_proj", f"{AT}mlp.up_proj"
TRAINED = (f"{Q}.weight", f"{UP}.weight")

#: Writes a state in a format, and gives the plain model that it stands for.
Writer = Callable[[Path, State], State]
FORMATS: dict[str, Writer] = {
    "nf4": partial(write_nf4_base, nested=False),
    "nf4-nested": write_nf4_base,
    "fp8": partial(write_fp8_base, block=(32, 32)),
}


def original() -> State:
    return llama_state(128)


def trained(state: State, size: float = 0.05, *names: str) -> State:
    """Two weights with a change of rank 4, of this size beside their own, in float32."""
    found = {name: value.float() for name, value in state.items()}
    for name in names or TRAINED:
        delta = moved({name: found[name]}, decay=1.0, rank=4)[name] - found[name]
        found[name] = found[name] + delta * (size * found[name].norm() / delta.norm())
    return found


def extract(base: Path, tuned: Path, **options: Any) -> loratool.ExtractReport:
    arguments: dict[str, Any] = {"rank": 4, "dtype": "float32", "verify": True, **options}
    return loratool.extract(base, tuned, base.parent / "out", overwrite=True, **arguments)


def paths(report: loratool.ExtractReport) -> set[str]:
    return {module.path for module in report.modules}


def write(folder: Path, state: State, dtype: torch.dtype = BF16) -> Path:
    return write_base(folder, cast(state, dtype))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_what_was_merged_into_a_quantised_base_comes_back(
    tmp_path: Path, form: str, dtype: torch.dtype
) -> None:
    """The tuned model was made from the quantised values: the difference is the change itself, all
    else is equal or rounded, and nothing is said of what quantising rounded off."""
    plain = FORMATS[form](tmp_path / "base", original())
    tuned = write(tmp_path / "tuned", trained(plain, 0.02), dtype)
    report = extract(tmp_path / "base", tuned)
    assert paths(report) == {Q, UP}
    assert {t.why for t in report.left} <= {"rounding"}
    assert set(codes(report)) <= {"rounding-only"}
    assert report.quantising == 0
    goal = {n: t - plain[n] for n, t in trained(plain, 0.02).items()}
    for name, delta in products(tmp_path / "out").items():
        lost = float((goal[name] - delta).norm() / goal[name].norm())
        assert lost < (0.2 if dtype == BF16 else 0.03)  # what the dtype rounds off
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == str(tmp_path / "base")
    after = {n: t.float() for n, t in cast(trained(plain, 0.02), dtype).items()}
    assert report.verified == pytest.approx(distance(plain, after, tmp_path / "out"), rel=1e-2)


@pytest.mark.parametrize("tuned_as", [BF16, F16], ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_a_fine_tune_of_the_original_has_the_quantising_in_it(
    tmp_path: Path, form: str, tuned_as: torch.dtype
) -> None:
    """What nobody trained is left out, by proof; of the rest it is said how much is no training."""
    state = original()
    plain = FORMATS[form](tmp_path / "base", state)
    after = cast(trained(state), tuned_as)
    report = extract(tmp_path / "base", write(tmp_path / "tuned", after, tuned_as))
    assert paths(report) == {Q, UP}
    left = {name for name, value in state.items() if is_quantised(name, value)} - {*TRAINED}
    assert {t.name for t in report.left} >= left
    assert {t.why for t in report.left} == {"rounding"}
    rounded = square(plain[n] - state[n].float() for n in TRAINED)
    change = square(plain[n] - after[n].float() for n in TRAINED)
    share = math.sqrt(rounded / change)
    assert report.quantising == pytest.approx(share, rel=0.1)
    (said,) = [w.message for w in report.warnings if w.code == "quantised-side"]
    assert "BASE is quantised" in said
    assert "16-bit model that BASE was made from" in said
    assert "holds-little" not in codes(report)
    noise = "NF4" if "nf4" in form else "FP8 in blocks of 32×32"
    (said,) = [w.message for w in report.warnings if w.code == "rounding-only"]
    assert noise in said


@pytest.mark.parametrize("form", FORMATS)
def test_a_value_beyond_what_its_code_stands_for_is_a_change(tmp_path: Path, form: str) -> None:
    """One value of one weight that cannot have become the base's is enough to keep that weight;
    one that can, in a fine-tune of the original, is none."""
    state = original()
    plain = FORMATS[form](tmp_path / "base", state)
    name = f"{AT}mlp.down_proj.weight"
    for number, (size, kept) in enumerate([(3.0, {Q, name.removesuffix(".weight")}), (0.0, {Q})]):
        fine = trained(state, 0.05, f"{Q}.weight")
        step = (plain[name] - state[name].float()).abs().max()
        fine[name][3, 5] = plain[name][3, 5] + size * step
        tuned = write(tmp_path / f"tuned{number}", fine)
        assert paths(extract(tmp_path / "base", tuned)) == kept


@pytest.mark.parametrize("form", FORMATS)
def test_a_small_change_of_the_quantised_values_is_no_noise(tmp_path: Path, form: str) -> None:
    """A change that stays within what each code stands for, made on the quantised values: it is not
    spread as rounding is, so it is kept."""
    state = original()
    plain = FORMATS[form](tmp_path / "base", state)
    tuned = write(tmp_path / "tuned", trained(plain, 1e-4), F32)
    report = extract(tmp_path / "base", tuned)
    assert paths(report) == {Q, UP}
    assert report.quantising == 0
    assert report.held == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("form", FORMATS)
def test_a_quantised_fine_tune(tmp_path: Path, form: str) -> None:
    """Of a plain base: what differs from it by quantising alone is left out, and the share of that
    in the rest is said."""
    state = original()
    base = write(tmp_path / "base", state)
    after = cast(trained(state, 0.1), BF16)
    plain = FORMATS[form](tmp_path / "tuned", after)
    report = extract(base, tmp_path / "tuned")
    assert paths(report) == {Q, UP}
    rounded = square(plain[n] - after[n].float() for n in TRAINED)
    change = square(plain[n] - state[n].float() for n in TRAINED)
    assert report.quantising == pytest.approx(math.sqrt(rounded / change), rel=0.1)
    assert (report.base_quantised, bool(report.tuned_quantised)) == ("", True)
    (said,) = [w.message for w in report.warnings if w.code == "quantised-side"]
    assert "TUNED is quantised" in said
    assert "fine-tune as it was before" in said


BOTH = [
    ("nf4", "nf4", 0), ("nf4-nested", "nf4", 5), ("nf4", "nf4-nested", 5), ("nf4", "fp8", 5),
    ("fp8", "nf4", 5),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after", "left"), BOTH)
def test_both_are_quantised(tmp_path: Path, before: str, after: str, left: int) -> None:
    """In the same format and with the same scales what nobody trained is equal; with other scales,
    or in another format, it differs by rounding alone."""
    state = original()
    FORMATS[before](tmp_path / "base", state)
    FORMATS[after](tmp_path / "tuned", cast(trained(state, 0.1), BF16))
    report = extract(tmp_path / "base", tmp_path / "tuned")
    assert paths(report) == {Q, UP}
    assert len(report.left) == left
    (said,) = [w.message for w in report.warnings if w.code == "quantised-side"]
    assert "BASE (" in said
    assert "TUNED (" in said
    assert 0.3 < report.quantising <= 1


def test_a_requantised_copy_is_no_fine_tune(tmp_path: Path) -> None:
    """Nothing but rounding is refused, from either side, also of the quantised values themselves;
    --keep-noise takes it all the same."""
    state = original()
    base = write(tmp_path / "plain", state)
    opened = write_nf4_base(tmp_path / "nf4", state)
    write_fp8_base(tmp_path / "again", opened)
    for one, other in ((base, "nf4"), ("nf4", base), ("nf4", "again")):
        with pytest.raises(ValueRangeError) as caught:
            extract(tmp_path / one, tmp_path / other)
        assert_clear(caught.value, "the same beyond rounding", "how they are stored")
        assert_clean(tmp_path / "out")
    report = extract(base, tmp_path / "nf4", keep_noise=True)
    assert len(report.modules) == 7
    assert report.noise == pytest.approx(1)


def test_values_that_were_chosen_with_data_prove_nothing(tmp_path: Path) -> None:
    """GPTQ does not take the nearest value: what nobody trained is kept, and that is said."""
    case = golden("gptq-v1-4bit")
    opened = dequantised(open_checkpoint(case.lay(tmp_path / "base")))
    made = torch.Generator().manual_seed(1)
    fine = {}
    for name, info in opened.tensors.items():
        low, high = (torch.from_numpy(read_float32(end)) for end in ends_of(info) or ())
        fine[name] = low + (high - low) * torch.rand(low.shape, generator=made)
    report = extract(tmp_path / "base", write(tmp_path / "tuned", fine, F16))
    (said,) = [w.message for w in report.warnings if w.code == "quantised-side"]
    assert "chosen with data" in said
    assert len(report.modules) == len(fine)


def test_rescaled_weights(tmp_path: Path) -> None:
    """AWQ's weights are others than the original's: as a fine-tune of a plain base they are
    refused, as a base they are warned of."""
    case = golden("awq-gemm")
    quantised = case.lay(tmp_path / "awq")
    plain = write(tmp_path / "plain", trained(case.expected, 0.05, *case.expected), F16)
    with pytest.raises(BaseError) as caught:
        extract(plain, quantised)
    assert_clear(caught.value, "rescaled", "no change that training made")
    assert_clean(tmp_path / "out")
    (said, *_) = [w.message for w in extract(quantised, plain).warnings]
    assert "this very base" in said


def test_stacks_of_experts_put_together_from_quantised_files(tmp_path: Path) -> None:
    """Expert by expert in files, gate and up in one parameter in memory: what one expert was
    trained by is in the adapter, of the others nothing."""
    at = f"{AT}mlp.experts."
    state = llama_state(64) | {
        f"{at}{n}.{part}_proj.weight": (0.1 * torch.randn(
            shape, generator=torch.Generator().manual_seed(10 * n + len(part))
        )).to(BF16)
        for n in range(3)
        for part, shape in (("gate", (32, 64)), ("up", (32, 64)), ("down", (64, 32)))
    } | {f"{AT}mlp.gate.weight": torch.ones(3, 64, dtype=BF16)}  # fmt: skip
    state = {n: t for n, t in state.items() if ".mlp." not in n or "experts" in n or "gate." in n}
    config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
    plain = write_nf4_base(tmp_path / "base", state, config=config)
    name = f"{at}1.up_proj.weight"
    for source, share in ((plain, 0.0), (state, 0.97)):
        after = trained(source, 0.05, name)
        tuned = write_base(tmp_path / f"tuned{share}", cast(after, BF16), config=config)
        report = extract(tmp_path / "base", tuned)
        (module,) = report.modules
        assert (module.path, module.kind) == (at.rstrip(".") + ".gate_up_proj", "experts")
        assert report.quantising == pytest.approx(share, abs=0.02)
        (delta,) = products(tmp_path / "out").values()
        assert delta.shape == (3, 64, 64)
        assert float(delta[0].norm() + delta[2].norm()) == 0
        assert float(delta[1].norm()) > 0


def test_the_report_says_it(tmp_path: Path) -> None:
    """The terminal names both sides' formats and the share, in a dry run too; JSON has numbers."""
    state = original()
    write_nf4_base(tmp_path / "base", state)
    tuned = write(tmp_path / "tuned", trained(state))
    done = run_cli("extract", str(tmp_path / "base"), str(tuned), "--dry-run")
    assert done.exit_code == 0
    assert "quantised: NF4" in done.stdout
    assert "what quantising and storing rounded off" in done.stdout
    assert "[quantised-side]" in done.stderr
    document = extract(tmp_path / "base", tuned, verify=False).to_dict()
    assert (document["base_quantised"], document["tuned_quantised"]) == ("NF4", "")
    assert 0.5 < document["quantising"] <= document["noise"] <= 1


def test_every_block_is_looked_at(tmp_path: Path) -> None:
    """What is proved block by block is proved of the right rows: a change in the last row alone of
    a matrix of several blocks is found, and without it there is none."""
    wide = torch.randn(20, 32768, generator=torch.Generator().manual_seed(2)).mul(0.02).to(BF16)
    state = {f"{Q}.weight": original()[f"{Q}.weight"], f"{UP}.weight": wide}
    state |= {"model.norm.weight": torch.ones(4)}
    write_fp8_base(tmp_path / "base", state, block=(1, 64))
    fine = trained(state, 0.05, f"{Q}.weight")
    assert paths(extract(tmp_path / "base", write(tmp_path / "same", fine), verify=False)) == {Q}
    fine[f"{UP}.weight"][19, -1] *= 1.2
    report = extract(tmp_path / "base", write(tmp_path / "tuned", fine), verify=False)
    assert paths(report) == {Q, UP}
