"""Which weights are one matrix to the programs that load a model."""

from __future__ import annotations

import pytest

from loratool.models.quantised.fused import experts_of, with_fused

L = "model.layers.0."
DENSE = {
    f"{L}{path}.weight"
    for path in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
}  # fmt: skip
OTHER_LAYER = {name.replace("layers.0", "layers.1") for name in DENSE}


@pytest.mark.parametrize(
    ("chosen", "beside"),
    [
        ("self_attn.q_proj", {"self_attn.k_proj", "self_attn.v_proj"}),
        ("self_attn.v_proj", {"self_attn.q_proj", "self_attn.k_proj"}),
        ("mlp.up_proj", {"mlp.gate_proj"}),
        ("mlp.down_proj", set()),
        ("self_attn.o_proj", set()),
    ],
)
def test_what_is_stacked_goes_together(chosen: str, beside: set[str]) -> None:
    """q, k and v; gate and up; of the same layer alone."""
    found = with_fused({f"{L}{chosen}.weight"}, DENSE | OTHER_LAYER)
    assert found == {f"{L}{path}.weight" for path in {chosen, *beside}}


def test_all_experts_of_a_layer_go_together() -> None:
    """One expert of 3 opens all of that layer; shared experts and other layers stay."""
    experts = {
        f"{layer}mlp.experts.{n}.{side}_proj.weight"
        for layer in (L, "model.layers.1.")
        for n in range(3)
        for side in ("gate", "up", "down")
    }
    shared = {f"{L}mlp.shared_experts.gate_proj.weight", f"{L}mlp.shared_experts.up_proj.weight"}
    found = with_fused({f"{L}mlp.experts.1.down_proj.weight"}, experts | shared | DENSE)
    assert found == {name for name in experts if name.startswith(L)}
    assert with_fused(set(sorted(shared)[:1]), experts | shared) == shared


def test_stacks_of_experts_go_together() -> None:
    """gate_up_proj and down_proj of one layer, without `.weight`, are its experts too."""
    stacks = {f"{L}mlp.experts.gate_up_proj", f"{L}mlp.experts.down_proj"}
    assert with_fused({f"{L}mlp.experts.down_proj"}, stacks | DENSE) == stacks
    assert experts_of(f"{L}mlp.experts.down_proj") == f"{L}mlp.experts"
    assert experts_of(f"{L}mlp.shared_experts.down_proj.weight") is None


def test_only_what_is_quantised_is_opened() -> None:
    """A sibling that is plain already has nothing to open; a chosen plain weight neither."""
    held = DENSE - {f"{L}self_attn.k_proj.weight"}
    found = with_fused({f"{L}self_attn.q_proj.weight", "lm_head.weight"}, held)
    assert found == {f"{L}self_attn.q_proj.weight", f"{L}self_attn.v_proj.weight"}
