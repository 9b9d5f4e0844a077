"""What each program makes of an adapter: the table of what was run and read, one row for each."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.adapters import PREFIX, lora, pair, write_adapter
from helpers.dialects import CASES
from helpers.linting import ADAPTERS, Q, V, of_ranks, on_two_layers, verdicts
from helpers.places import FIXTURES
from safetensors.numpy import load_file, save_file

import loratool

L, D, R, U = "loads", "differs", "refused", "unknown"

#: vLLM, SGLang, llama.cpp, LoRAX, exllamav3, PEFT hotswap.
COLUMNS = ("vllm", "sglang", "llamacpp", "lorax", "exllama", "peft-hotswap")
TABLE = {
    "plain": (L, L, L, L, L, L),
    "rank 32": (R, L, L, L, L, L),
    # lora_alpha / r_m is what PEFT computes too, where alpha_pattern says nothing else.
    "rank_pattern": (L, R, L, D, D, D),
    "both patterns": (L, R, D, L, L, R),
    "alpha_pattern": (L, D, D, D, D, R),
    "rsLoRA": (L, D, D, L, L, L),
    "DoRA": (R, R, R, D, D, L),
    "lora_bias": (R, U, R, D, D, L),
    "bias": (R, U, R, D, D, U),
    "score": (L, D, R, D, D, U),
    "saved embedding": (R, U, R, D, D, U),
    "norms": (R, R, D, D, D, U),
    "embedding factors": (L, L, L, D, D, L),
    "head factors": (L, L, L, L, L, L),
    "token rows": (R, U, R, D, D, U),
    "regular expression": (L, R, L, L, L, L),
    "gap": (L, L, L, D, L, L),
    "aLoRA": (R, U, L, U, U, L),
    "layer_replication": (R, U, D, D, D, L),
    "PiSSA": (R, D, D, D, D, L),
    "LoRA-GA": (D, D, D, D, D, L),
    "fan_in_fan_out": (L, U, L, L, R, L),
    "alpha no integer": (L, L, L, U, L, L),
    "experts": (L, L, U, D, D, L),
}


def test_the_table_has_every_adapter() -> None:
    """No adapter that the helpers make is left out of the table."""
    assert TABLE.keys() == ADAPTERS.keys()


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_program_fares_as_in_the_table(name: str, tmp_path: Path) -> None:
    """The verdicts of six programs; TGI is as LoRAX, Ollama not better than llama.cpp."""
    found = verdicts(ADAPTERS[name](tmp_path / "a"))
    assert tuple(found[column].outcome for column in COLUMNS) == TABLE[name]
    assert found["tgi"].outcome == found["lorax"].outcome
    if found["llamacpp"].outcome != "loads":
        assert found["ollama"].outcome == found["llamacpp"].outcome
    assert found["mlx"].outcome == "refused"
    for verdict in found.values():
        assert (verdict.outcome == "loads") == (not verdict.reasons)


def test_ollama_takes_alpha_as_a_whole_number(tmp_path: Path) -> None:
    """An alpha that is none fails there, though llama.cpp reads it."""
    found = verdicts(ADAPTERS["alpha no integer"](tmp_path / "a"))["ollama"]
    assert found.outcome == "refused"
    assert "8.5" in found.reasons[0]


def test_the_limit_of_the_rank_is_the_servers(tmp_path: Path) -> None:
    """vLLM takes rank 16 if nobody says, else what the server was started with; so does SGLang."""
    folder = ADAPTERS["rank 32"](tmp_path / "a")
    assert "--max-lora-rank 32" in verdicts(folder)["vllm"].reasons[0]
    assert verdicts(folder, max_rank=32)["vllm"].outcome == "loads"
    assert verdicts(folder, max_rank=16)["sglang"].outcome == "refused"


def test_the_largest_rank_of_the_patterns_counts(tmp_path: Path) -> None:
    """A rank_pattern above r is held against the limit."""
    folder = of_ranks(tmp_path / "a", {"q_proj": 2, "v_proj": 20})
    assert verdicts(folder)["vllm"].outcome == "refused"


def test_lorax_stacks_what_pads_to_one_rank(tmp_path: Path) -> None:
    """Ranks that differ from layer to layer are refused, unless they pad to the same."""

    def with_ranks(name: str, *ranks: int) -> Path:
        tensors = {}
        for path, rank in zip(Q, ranks, strict=True):
            tensors |= pair(path, 12, 10, rank)
        patterns = dict(zip(Q, ranks, strict=True))
        config = {"r": 4, "rank_pattern": patterns, "alpha_pattern": dict(patterns)}
        return write_adapter(tmp_path / name, tensors, {**config, "lora_alpha": 4})

    assert verdicts(with_ranks("a", 4, 12))["lorax"].outcome == "refused"
    assert verdicts(with_ranks("b", 4, 2))["lorax"].outcome == "loads"


def test_arrow_s_router_is_not_known_to_vllm(tmp_path: Path) -> None:
    """The factors load, and are added always instead of when the router says so."""
    folder = on_two_layers(tmp_path / "a", arrow_config={"top_k": 2})
    assert verdicts(folder)["vllm"].outcome == "differs"


def test_sglang_loads_an_embedding_only_if_it_is_a_target(tmp_path: Path) -> None:
    """Factors on lm_head that target_modules does not name are left out without a word."""
    extra = pair("lm_head", 40, 10, seed=9)
    folder = on_two_layers(tmp_path / "a", extra)
    assert verdicts(folder)["sglang"].outcome == "differs"


def test_a_base_settles_what_depends_on_it(tmp_path: Path) -> None:
    """Layers, vocabulary and architecture of the base are asked where --base names one."""
    base = FIXTURES / "base"
    found = verdicts(FIXTURES / "adapter", base=base)
    assert found["ollama"].conditions == []
    partial = lora(tmp_path / "two", *Q, *V, target_modules=["q_proj", "v_proj"])
    assert verdicts(partial)["lorax"].outcome == "loads"
    assert verdicts(partial, base=base)["lorax"].outcome == "differs"  # it has four layers
    lookup = ADAPTERS["embedding factors"](tmp_path / "lookup")
    assert verdicts(lookup)["vllm"].conditions
    assert verdicts(lookup, base=base)["vllm"].outcome == "refused"  # of 40 tokens, not 256


def test_layers_that_are_chosen_are_held_against_the_base(tmp_path: Path) -> None:
    """Whether layers_to_transform leaves some out is told by the base only."""
    folder = on_two_layers(tmp_path / "a", layers_to_transform=[0, 1])
    assert verdicts(folder)["lorax"].outcome == "unknown"
    assert verdicts(folder, base=FIXTURES / "base")["lorax"].outcome == "differs"


def test_ollama_converts_folders_of_two_architectures(tmp_path: Path) -> None:
    """For a base of another one a GGUF is what it takes."""
    case = CASES["gguf-qwen2"]
    folder = on_two_layers(tmp_path / "a")
    found = verdicts(folder, base=case.base)["ollama"]
    assert found.outcome == "refused"
    assert "--to gguf" in found.mend
    assert verdicts(case.adapter, base=case.base)["ollama"].outcome == "loads"


@pytest.mark.parametrize(
    ("case", "reads"), [("gguf-f32", {"llamacpp", "ollama"}), ("mlx-steps", {"mlx"})]
)
def test_other_formats_load_in_their_own_programs(case: str, reads: set[str]) -> None:
    """A GGUF loads in llama.cpp and Ollama, MLX's in mlx-lm, and no program for PEFT's takes it."""
    found = verdicts(CASES[case].adapter)
    assert {name for name, verdict in found.items() if verdict.outcome == "loads"} == reads
    assert "format" in found["vllm"].reasons[0]


def test_no_lora_is_loaded_by_no_server() -> None:
    """Another of PEFT's types is refused, and named."""
    found = verdicts(CASES["peft-loha"].adapter)
    assert found["vllm"].outcome == "refused"
    assert "LoHa" in found["vllm"].reasons[0]


def test_what_is_not_whole_loads_nowhere(tmp_path: Path) -> None:
    """Half of a pair, or a tensor that nobody knows: no program is said to load it."""
    tensors = pair(Q[0], 12, 10)
    del tensors[f"{PREFIX}{Q[0]}.lora_B.weight"]
    half = write_adapter(tmp_path / "a", tensors | pair(V[0], 12, 10), {})
    assert not [v.program for v in verdicts(half).values() if v.outcome == "loads"]


def test_weights_under_another_name_are_not_found(tmp_path: Path) -> None:
    """Servers look for adapter_model.safetensors."""
    folder = on_two_layers(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "lora.safetensors")
    found = verdicts(folder)
    assert found["vllm"].outcome == found["llamacpp"].outcome == "refused"
    assert "lora.safetensors" in found["vllm"].reasons[0]


def test_names_of_raw_states_are_refused(tmp_path: Path) -> None:
    """vLLM wants names to end as PEFT saves them; a raw state has the adapter's name in them."""
    tensors = {
        name.replace(".weight", ".default.weight"): value
        for name, value in pair(Q[0], 12, 10).items()
    }
    folder = write_adapter(tmp_path / "a", tensors, {"target_modules": ["q_proj"]})
    assert "lora_A.default.weight" in verdicts(folder)["vllm"].reasons[0]


def test_ids_above_the_vocabulary_are_refused(tmp_path: Path) -> None:
    """SGLang refuses added tokens that the base has no rows for."""
    folder = on_two_layers(tmp_path / "a")
    (folder / "added_tokens.json").write_text('{"<A>": 256}')
    assert "added_tokens.json" in verdicts(folder)["sglang"].conditions[0]
    found = verdicts(folder, base=FIXTURES / "base")["sglang"]
    assert found.outcome == "refused"
    (folder / "added_tokens.json").write_text("[")  # which is none of the adapter's own
    assert verdicts(folder)["sglang"].outcome == "loads"


def test_placeholders_load_nowhere(tmp_path: Path) -> None:
    """Factors that ZeRO-3 left empty are no adapter of rank zero."""
    tensors = {name: value[:0] for name, value in pair(Q[0], 12, 10).items()}
    found = verdicts(write_adapter(tmp_path / "a", tensors, {"target_modules": ["q_proj"]}))
    assert not [v.program for v in found.values() if v.outcome == "loads"]


@pytest.mark.parametrize(
    ("before", "inside"),
    [("module.", ""), ("_orig_mod.", ""), ("", "_orig_mod."), ("", "module."), (PREFIX, "")],
)
def test_names_that_hold_more_than_peft_writes_do_not_load(
    before: str, inside: str, tmp_path: Path
) -> None:
    """PEFT knows none of them and loads nothing; convert writes them as it does."""
    folder = on_two_layers(tmp_path / "a")
    file = folder / "adapter_model.safetensors"
    tensors = {
        before + PREFIX + inside + name.removeprefix(PREFIX): values
        for name, values in load_file(file).items()
    }
    save_file(tensors, file)
    found = verdicts(folder)
    assert found["peft-hotswap"].outcome == "differs"
    assert {found[name].outcome for name in ("vllm", "sglang", "lorax")} == {"unknown"}
    assert "convert" in found["peft-hotswap"].mend
    loratool.convert(folder, tmp_path / "clean", to="peft")
    assert verdicts(tmp_path / "clean")["peft-hotswap"].outcome == "loads"
