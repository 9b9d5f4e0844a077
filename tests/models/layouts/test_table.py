"""The table of layouts: how names are read by it, and whether transformers still says the same."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
import torch
from helpers.tiny.cases import CASES
from helpers.tiny.derive import PATH, faults, spelled, survey, text_of

from loratool.models.layouts.shares import Share
from loratool.models.layouts.table import (
    Names,
    Segment,
    known_layouts,
    read_table,
    rope_order,
)

TABLE = read_table(
    {
        "groups": [
            {"types": ["*"], "rules": [["LayerNorm.gamma", "LayerNorm.weight"]]},
            {
                "types": ["writer"],
                "rules": [
                    ["experts.{e}.w1.weight", "experts.gate_up_proj", {"rows": ["0", "1/2"]}],
                    ["attn.qkv", "attn.k", {"into": ["1/2", "1"]}],
                    ["attn.qkv", "attn.q", {"into": ["0", "1/2"]}],
                    ["block.#.sub.#", "blocks.#.#"],
                    ["^.old.layers", "layers"],
                    ["proj.0", "proj_in"],
                    ["wo.$", "o"],
                ],
            },
            {"types": ["eye"], "rules": [["^.vision_model", ""]]},
            {
                "types": ["both"],
                "rules": [["^.language_model.model", "model.text"], ["^.tower", "model.tower"]],
                "parts": [
                    ["text_config", "model.text", "writer"],
                    ["eye_config", "model.tower", "eye"],
                ],
            },
            {
                "types": ["halves"],
                "rules": [
                    ["experts.{e}.up", "text.up", {"experts": ["0", "1/2"]}],
                    ["experts.{e}.up", "image.up", {"experts": ["1/2", "1"]}],
                ],
            },
        ]
    }
)
BOTH = {"model_type": "both", "text_config": {"model_type": "writer"}, "eye_config": {}}
WRITER = {"model_type": "writer"}
HALF = Fraction(1, 2)


def memory(config: dict[str, object], name: str) -> list[str]:
    return [segment.memory for segment in Names(config, (), TABLE).segments(name)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.3.mlp.experts.11.w1.weight", "layers.3.mlp.experts.gate_up_proj"),
        ("layers.3.mlp.experts.gate_up_proj", "layers.3.mlp.experts.gate_up_proj"),
        ("a.block.7.sub.12.x", "a.blocks.7.12.x"),
        ("old.layers.1.x", "layers.1.x"),
        ("very.old.layers.1.x", "very.old.layers.1.x"),
        ("layers.1.proj.0.weight", "layers.1.proj_in.weight"),
        ("layers.1.proj.1.weight", "layers.1.proj.1.weight"),
        ("layers.1.wo", "layers.1.o"),
        ("layers.1.wo.weight", "layers.1.wo.weight"),
        ("layers.1.LayerNorm.gamma", "layers.1.LayerNorm.weight"),
        ("layers.10.w%s", "layers.10.w%s"),
        ("old.layers.1.%d", "layers.1.%d"),
        ("old.layers.#.x", "old.layers.#.x"),
        ("$.old.layers", "$.old.layers"),
        ("", ""),
    ],
)
def test_a_rule_replaces_its_run_of_a_name(name: str, expected: str) -> None:
    assert memory(WRITER, name) == [expected]


def test_an_expert_is_half_the_rows_of_one_matrix_of_a_stack() -> None:
    names = Names(WRITER, (), TABLE)
    for expert in (0, 11):
        assert names.segments(f"layers.2.experts.{expert}.w1.weight") == (
            Segment("layers.2.experts.gate_up_proj", expert, rows=Share(Fraction(0), HALF)),
        )


def test_a_split_tensor_has_a_segment_for_each_of_its_rows() -> None:
    key, query = Names(WRITER, (), TABLE).segments("layers.4.attn.qkv.weight")
    assert (key.memory, key.into) == ("layers.4.attn.k.weight", Share(HALF, Fraction(1)))
    assert (query.memory, query.into) == ("layers.4.attn.q.weight", Share(Fraction(0), HALF))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("language_model.model.layers.1.wo", "model.text.layers.1.o"),
        ("model.text.layers.1.wo", "model.text.layers.1.o"),
        ("tower.vision_model.wo", "model.tower.wo"),
        ("model.tower.vision_model.vision_model.x", "model.tower.vision_model.x"),
        ("model.tower.experts.1.w1.weight", "model.tower.experts.1.w1.weight"),
        ("wo", "wo"),
    ],
)
def test_the_rules_of_a_part_are_for_what_is_below_its_path(name: str, expected: str) -> None:
    assert memory(BOTH, name) == [expected]


def test_parts_of_a_model_that_is_not_known_are_told_by_words() -> None:
    config = {
        "model_type": "new", "text_config": {"model_type": "writer"},
        "vision_config": {"model_type": "eye"},
    }  # fmt: skip
    assert memory(config, "model.language_model.layers.1.wo") == ["model.language_model.layers.1.o"]
    assert memory(config, "model.layers.1.wo") == ["model.layers.1.o"]
    assert memory(config, "vision_tower.vision_model.wo") == ["vision_tower.vision_model.wo"]


def test_experts_that_share_their_numbers_are_told_apart_by_how_many_there_are() -> None:
    config = {"model_type": "halves"}
    files = [f"layers.{layer}.experts.{expert}.up" for layer in (0, 1) for expert in range(6)]
    names = Names(config, files, TABLE)
    assert names.segments("layers.1.experts.2.up") == (Segment("layers.1.text.up", 2),)
    assert names.segments("layers.1.experts.3.up") == (Segment("layers.1.image.up", 0),)
    unknown = Names(config, (), TABLE).segments("layers.1.experts.3.up")
    assert [(segment.expert, segment.experts) for segment in unknown] == [
        (3, (Fraction(0), HALF)), (3, (HALF, Fraction(1))),
    ]  # fmt: skip


def test_a_share_of_rows_is_none_where_it_cannot_be_had() -> None:
    assert Share(HALF, Fraction(1)).of(10) == range(5, 10)
    assert Share(HALF, Fraction(1)).of(9) is None
    assert Share.read(["0", "1", 2, 1]).of(6) == range(1, 6, 2)
    assert Share.read([1, 3]) == Share(index=1, count=3)
    assert Share.read([1, 3]).of(9) is None


def test_the_order_of_rotary_rows_is_that_of_transformers() -> None:
    """As in PermuteForRope: view(heads, half, 2), transposed."""
    rows, heads = 24, 3
    disk = torch.arange(rows)
    order = disk.view(heads, rows // heads // 2, 2).transpose(1, 2).reshape(-1)
    assert rope_order(rows, heads) == tuple(order.tolist())


# --- the table of the package ---------------------------------------------------------------------

#: Of every kind of layout one or two; all of them are tried under the marker `layouts`.
SAMPLE = (
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
    "GraniteMoeForCausalLM",
    "PhimoeForCausalLM",
    "NemotronHForCausalLM",
    "KimiLinearForCausalLM",
    "Ernie4_5_VLMoeForConditionalGeneration",
    "GptOssForCausalLM",
    "AriaForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "Gemma3ForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen2AudioForConditionalGeneration",
    "Qwen3_5ForCausalLM",
    "OlmoHybridForCausalLM",
    "NomicBertForMaskedLM",
    "GteForMaskedLM",
    "JinaEmbeddingsV3ForMaskedLM",
    "Dinov2ForImageClassification",
    "ViTForImageClassification",
    "CLIPModel",
    "SiglipModel",
    "Kimi_K25ForConditionalGeneration",
    "ColQwen2ForRetrieval",
    "SegformerForImageClassification",
)


def test_the_table_reads_all_names_of_a_sample() -> None:
    """Every name that transformers reads, and down to the rows of every tensor."""
    data = json.loads(PATH.read_text("utf-8"))
    assert list(faults(spelled(SAMPLE), data)) == []


@pytest.mark.layouts
def test_the_table_is_what_transformers_says() -> None:
    """If not: PYTHONPATH=tests:. python -m helpers.tiny.derive --write, and look at what moved."""
    found = survey(CASES)
    data = found.table()
    assert list(faults(found.spellings, data)) == []
    assert text_of(data) == PATH.read_text("utf-8")


def test_no_prefix_stands_twice() -> None:
    """Backwards transformers would put vision_model before the names of CLIP's vision_model."""
    for kind, entry in known_layouts().items():
        for rule in entry.rules:
            name = ".".join(rule.disk)
            assert "vision_model.vision_model" not in name, (kind, name)
            assert "text_model.text_model" not in name, (kind, name)
            assert name.count("thinker") < 2, (kind, name)


def test_all_classes_that_were_counted_are_there() -> None:
    assert len({case.model for case in CASES.values()}) >= 222


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("deepseek_v4", "embed.weight", "model.embed_tokens.weight"),
        ("deepseek_v4", "layers.3.attn.kv_norm.weight", "model.layers.3.self_attn.kv_norm.weight"),
        ("deepseek_v4", "layers.3.ffn.gate.weight", "model.layers.3.mlp.gate.weight"),
        ("deepseek_v4", "head.weight", "lm_head.weight"),
        ("hunyuan_vl", "model.vit.perceive.proj.0.weight",
         "model.vision_tower.patch_merger.proj_conv.weight"),
    ],
)  # fmt: skip
def test_published_names_that_do_not_come_back(kind: str, name: str, expected: str) -> None:
    (segment,) = Names({"model_type": kind}).segments(name)
    assert segment.memory == expected


@pytest.mark.parametrize("kind", ["qwen2_5_omni", "qwen3_omni_moe"])
@pytest.mark.parametrize("prefix", ["", "thinker."])
def test_names_of_a_thinker_alone_are_those_in_the_whole_model(kind: str, prefix: str) -> None:
    config = {"model_type": kind, "thinker_config": {"model_type": f"{kind}_thinker"}}
    names = Names(config)
    for name in ("model.layers.1.x", "model.language_model.layers.1.x"):
        (segment,) = names.segments(prefix + name)
        assert segment.memory == "thinker.model.language_model.layers.1.x"
    (segment,) = names.segments(f"{prefix}audio_tower.layers.1.x")
    assert segment.memory == "thinker.model.audio_tower.layers.1.x"


def test_no_pattern_is_one_word() -> None:
    for kind, entry in known_layouts().items():
        assert all(len(rule.disk) > 1 for rule in entry.rules), kind


def test_queries_keys_and_values_in_one_matrix_are_as_many_as_their_heads() -> None:
    config = {"model_type": "sarvam_moe", "num_attention_heads": 6, "num_key_value_heads": 1}
    name = "model.layers.1.attention.query_key_value.weight"
    found = {one.memory.split(".")[-2]: one.into for one in Names(config).segments(name)}
    assert {key: share.of(16) for key, share in found.items() if share} == {
        "q_proj": range(12), "k_proj": range(12, 14), "v_proj": range(14, 16),
    }  # fmt: skip
