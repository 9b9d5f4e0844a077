"""Several adapters for one server: what it must be started with, and what keeps them apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.adapters import lora
from helpers.linting import ADAPTERS, Q, V, on_two_layers
from helpers.places import FIXTURES

import loratool
from loratool.serving.together import Company, Together


def asked(*folders: Path, **options: object) -> tuple[Together, dict[str, Company], bool]:
    report = loratool.lint(folders, together=True, **options)  # type: ignore[arg-type]
    assert report.together is not None
    companies = {company.program: company for company in report.together.companies}
    return report.together, companies, report.passes


def test_the_server_is_started_for_all_of_them(tmp_path: Path) -> None:
    """The largest rank, the targets of all and the options that cover them."""
    one = on_two_layers(tmp_path / "a")
    two = lora(tmp_path / "b", *Q, rank=20, target_modules=["q_proj"])
    found, companies, passes = asked(one, two)
    assert (found.largest_rank, found.targets) == (20, ["q_proj", "v_proj"])
    assert companies["vllm"].start.endswith("--max-lora-rank 32")
    assert companies["sglang"].start.endswith(
        "--max-lora-rank 20 --lora-target-modules q_proj v_proj"
    )
    assert not companies["vllm"].apart
    assert passes


def test_a_limit_that_is_named_holds(tmp_path: Path) -> None:
    """With --max-rank a larger adapter does not go into the server."""
    one, two = on_two_layers(tmp_path / "a"), on_two_layers(tmp_path / "b", rank=20)
    _, companies, passes = asked(one, two, max_rank=16, programs="vllm")
    assert "does not load" in companies["vllm"].apart[0]
    assert not passes


def test_other_bases_keep_them_apart(tmp_path: Path) -> None:
    """Names of bases that differ, and shapes that differ, are said."""
    one = on_two_layers(tmp_path / "a", base_model_name_or_path="org/one")
    two = on_two_layers(tmp_path / "b", base_model_name_or_path="org/two")
    _, companies, passes = asked(one, two, programs="vllm")
    assert "org/one" in companies["vllm"].apart[0]
    assert not passes
    three = tmp_path / "c"
    shutil.copytree(FIXTURES / "adapter", three)
    _, companies, _ = asked(on_two_layers(tmp_path / "d"), three, programs="vllm")
    assert "other dimensions" in companies["vllm"].apart[0]


def test_the_forms_of_experts_do_not_mix_in_sglang(tmp_path: Path) -> None:
    """Experts in a stack and experts apart are two forms, of which its server takes one."""
    stacked = ADAPTERS["experts"](tmp_path / "a")
    apart = lora(tmp_path / "b", "model.layers.0.mlp.experts.0.down_proj",
                 target_modules=["down_proj"])  # fmt: skip
    _, companies, _ = asked(stacked, apart)
    assert any("one form" in why for why in companies["sglang"].apart)
    assert not any("one form" in why for why in companies["vllm"].apart)


@pytest.mark.parametrize(
    ("name", "field"), [("rsLoRA", "use_rslora"), ("alpha_pattern", "alpha_pattern"),
                        ("DoRA", "use_dora")],
)  # fmt: skip
def test_a_hotswap_compares_the_configs(name: str, field: str, tmp_path: Path) -> None:
    """What PEFT refuses to swap is told pair by pair."""
    one, two = ADAPTERS["plain"](tmp_path / "a"), ADAPTERS[name](tmp_path / "b")
    _, companies, passes = asked(one, two, programs="peft-hotswap")
    assert any(field in why for why in companies["peft-hotswap"].apart)
    assert not passes


def test_a_hotswap_begins_with_the_modules_of_all(tmp_path: Path) -> None:
    """The adapter that has every module goes first; where there is none they do not swap."""
    whole = on_two_layers(tmp_path / "a")
    part = lora(tmp_path / "b", *Q, rank=8, target_modules=["q_proj"])
    _, companies, passes = asked(part, whole, programs="peft-hotswap")
    assert f"load {whole} first" in companies["peft-hotswap"].start
    assert "target_rank=8" in companies["peft-hotswap"].start
    assert passes
    other = lora(tmp_path / "c", *V, target_modules=["v_proj"])
    _, companies, passes = asked(part, other, programs="peft-hotswap")
    assert "no adapter has the modules of all" in companies["peft-hotswap"].apart[0]
    assert not passes
