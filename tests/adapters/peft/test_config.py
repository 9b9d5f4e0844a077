"""What a PEFT config means: patterns of ranks and alphas, and settings that rule out a merge."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.adapters import Q, pair, write_adapter
from helpers.bases import small_base
from helpers.layer_cases import linear, refuse
from helpers.models import Holder, differing, edit_config, lora, train
from torch import nn

import loratool
from loratool.errors import AdapterError, LoraToolError


def nested(*paths: str) -> nn.Module:
    """Linear layers under dotted paths, as deep as a transformer's."""
    root = Holder()
    for path in paths:
        *folders, leaf = path.split(".")
        place: nn.Module = root
        for name in folders:
            if name not in dict(place.named_children()):
                place.add_module(name, Holder())
            place = place.get_submodule(name)
        place.add_module(leaf, nn.Linear(12, 20))
    return root


ATTENTION = "model.layers.10.self_attn."
#: Whether a pattern means `model.layers.10.self_attn.q_proj`.
PATTERNS = {
    "q_proj": True,
    "10.self_attn.q_proj": True,
    "model.layers.10.self_attn.q_proj": True,
    "^model.layers.10.self_attn.q_proj": True,
    "q_proj|v_proj": True,
    "v_proj|q_proj": True,
    "layers.1.*": True,
    ".*": True,
    r"model\.layers\.\d+\.self_attn\.q_proj": True,
    "proj": False,
    "^q_proj": False,
    "layers.10": False,
    "1.self_attn.q_proj": False,
    "base_model.model.model.layers.10.self_attn.q_proj": False,
}


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
@pytest.mark.parametrize("key", PATTERNS)
def test_rank_and_alpha_patterns_mean_the_modules_that_peft_means(key: str, tmp_path: Path) -> None:
    """A key of rank_pattern or alpha_pattern is a regular expression for a dot-aligned suffix."""
    names = (f"{ATTENTION}q_proj", f"{ATTENTION}v_proj", "model.layers.1.self_attn.q_proj")
    for options in ({"rank_pattern": {key: 3}}, {"alpha_pattern": {key: 20}}):
        folder = tmp_path / next(iter(options))
        trained = train(folder, nested(*names), lora("q_proj", "v_proj", **options))
        module = trained.model.get_submodule(f"base_model.model.{names[0]}")
        met = module.r["default"] == 3 or module.lora_alpha["default"] == 20
        assert met == PATTERNS[key], "PEFT itself reads this pattern differently"
        assert differing(trained.merge(), trained.peft_merge()) == {}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_rank_and_alpha_are_looked_up_independently(use_rslora: bool, tmp_path: Path) -> None:
    """A module takes its rank from one pattern and its alpha from another, the first that fits."""
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qk"]
    config = lora(
        "q_proj", "k_proj",
        rank_pattern={"0.self_attn.q_proj": 2, "q_proj": 5},
        alpha_pattern={"layers.1.*": 11, "q_proj": 3, ".*q_proj": 99},
        use_rslora=use_rslora,
    )  # fmt: skip
    # PEFT saves tables in alphabetical order, and that order decides for who reads them.
    config.alpha_pattern = dict(sorted(config.alpha_pattern.items()))
    trained = train(tmp_path, nested(*names), config)
    assert differing(trained.merge(), trained.peft_merge()) == {}


REFUSED_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "layer_replication": ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "arrow": ({"arrow_config": {"top_k": 3}}, "arrow_config"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "kasa": ({"kasa_config": {"beta": 0.1}}, "kasa_config"),
    "enable_lora": ({"enable_lora": [True, False, True]}, "enable_lora"),
    **{
        init: ({"init_lora_weights": init}, f"init_lora_weights='{init}'")
        for init in ("pissa_niter_4", "corda", "loftq", "lora_ga", "CorDA")
    },
    "unknown-field": ({"use_novel_scaling": True}, "use_novel_scaling"),
    "unknown-number": ({"delta_gain": 2.0}, "delta_gain"),
    "wrong-rank": ({"r": 5}, "rank"),
    "pattern-rank": ({"rank_pattern": {"l": 3}}, "rank"),
    "dora-without-magnitude": ({"use_dora": True}, "magnitude"),
    "alpha-is-text": ({"lora_alpha": "16"}, "lora_alpha"),
    "rank-is-zero": ({"r": 0}, "rank"),
}


@pytest.mark.parametrize("name", REFUSED_FIELDS)
def test_config_that_rules_out_a_merge_is_refused(name: str, tmp_path: Path) -> None:
    """Settings under which W + scale·B·A is not the model are refused by name."""
    changes, reason = REFUSED_FIELDS[name]
    trained = linear(12, 20).train(tmp_path)
    edit_config(trained.adapter, **changes)
    refuse(trained, AdapterError, reason)


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_unknown_field_that_is_empty_is_no_obstacle(value: Any, tmp_path: Path) -> None:
    """A field of a later PEFT that is switched off does not stop a merge."""
    trained = linear(12, 20).train(tmp_path)
    edit_config(trained.adapter, use_novel_scaling=value)
    assert differing(trained.merge(), trained.peft_merge()) == {}


SCALAR = np.ones((), np.float32)
BROKEN: dict[str, tuple[dict[str, np.ndarray], dict[str, Any]]] = {
    "scalar A": ({f"base_model.model.{Q}.lora_A.weight": SCALAR}, {}),
    "scalar B": ({f"base_model.model.{Q}.lora_B.weight": SCALAR}, {}),
    "scalar token rows": ({"base_model.model.e.trainable_tokens_delta": SCALAR}, {}),
    "scalar embedding": ({"base_model.model.model.embed_tokens.weight": SCALAR}, {}),
    "scalar head": (
        {"base_model.model.score.weight": SCALAR}, {"modules_to_save": ["score"]}),
    "modules_to_save is a number": ({}, {"modules_to_save": 5}),
    "patterns of BD-LoRA are a number": ({}, {"use_bdlora": {"target_modules_bd_a": 5}}),
    "alpha of 400 digits": ({}, {"lora_alpha": 10**400}),
    "alpha too large for norms": ({}, {"lora_alpha": 1e308}),
    "rank is a word": ({}, {"r": "eight"}),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_no_traceback(name: str, tmp_path: Path) -> None:
    """Whatever stands in an adapter, inspect and merge answer in words and in valid JSON."""
    extra, config = BROKEN[name]
    adapter = write_adapter(tmp_path / "adapter", {**pair(Q, 6, 5), **extra}, config)
    base = small_base(tmp_path / "base")
    for call in (
        lambda: json.dumps(loratool.inspect(adapter).to_dict(), allow_nan=False),
        lambda: json.dumps(loratool.inspect(adapter, base=base).to_dict(), allow_nan=False),
        lambda: loratool.merge(base, adapter, tmp_path / "out", overwrite=True),
    ):
        with suppress(LoraToolError):
            call()
