"""Tiny configs from the default ones of transformers, by the names that sizes usually have."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

Inputs = dict[str, torch.Tensor]

#: In the place of a value: the field is left out.
DROP = object()


@dataclass(frozen=True)
class Case:
    """A model class, what its config needs beside small sizes, and what to feed it.

    `settings` are by field, with dots for those of sub-configs; a sub-config that is given as a
    whole is taken as it is.
    """

    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    #: None where only names and shapes are of use: a forward pass needs more than a few tensors.
    inputs: Callable[[], Inputs] | None = None
    #: What it is called where a class stands twice.
    name: str = ""
    #: The config's class, where it has a type without model classes of its own.
    config_class: str = ""

    def make(self, other_sizes: bool = False) -> PreTrainedModel:
        """The model, with no parameter constant: a lost or swapped one must show.

        `other_sizes` gives other proportions: of intermediate sizes and of heads to key-value
        heads.
        """
        torch.manual_seed(7)
        with warnings.catch_warnings():
            # A padding row of a tiny model may have nothing in it.
            warnings.filterwarnings("ignore", "Initializing zero-element tensors", UserWarning)
            made = getattr(transformers, self.model)(self.config(other_sizes))
        model: PreTrainedModel = made.eval()
        for parameter in model.parameters():
            values = parameter.detach()
            if values.is_floating_point() and not (values.abs() < 1e3).all():
                values.zero_()  # a parameter that its class does not initialise
            if values.is_floating_point() and (values.numel() < 2 or values.float().std() < 1e-7):
                values += torch.rand_like(values) * 0.05
        return model

    def config(self, other_sizes: bool = False) -> transformers.PretrainedConfig:
        cls = (
            getattr(transformers, self.config_class)
            if self.config_class
            else getattr(transformers, self.model).config_class
        )
        sizes = {**_SIZES, **_OTHER_SIZES} if other_sizes else _SIZES
        made: transformers.PretrainedConfig = cls(**_shrunk(cls().to_dict(), self.settings, sizes))
        return made


def by_name(*cases: Case) -> dict[str, Case]:
    """The cases by their names."""
    found = {case.name or case.model: case for case in cases}
    assert len(found) == len(cases), "a class stands twice"
    return found


def plain(names: str, inputs: Callable[[], Inputs] | None = None) -> list[Case]:
    """Cases whose configs need nothing but small sizes."""
    return [Case(name, inputs=inputs) for name in names.split()]


# --- sizes ----------------------------------------------------------------------------------------


def _named(text: str) -> dict[str, Any]:
    """Sizes from lines `value: names`."""
    found: dict[str, Any] = {}
    for line in inspect.cleandoc(text).splitlines():
        value, _, names = line.partition(":")
        found.update(dict.fromkeys(names.split(), float(value) if "." in value else int(value)))
    return found


_SIZES = _named("""
    32: hidden_size d_model n_embd embed_dim dim hidden_dim out_hidden_size projection_dim
    32: word_embed_proj_dim encoder_hidden_size output_dim vision_output_dim projector_input_dim
    32: projector_output_dim projector_hidden_size image_text_hidden_size
    32: cross_attention_hidden_size embedding_size d_latents linear_units output_hidden_size
    32: adapter_hidden_size embedding_dim
    32: shared_embedding_dim downsample_hidden_size lru_width attention_hidden_size rnn_hidden_size
    32: proj_out_dim
    48: intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff ffn_hidden_size
    48: intermediate_size_mlp n_inner mlp_dim feedforward_size encoder_intermediate_size ffn_size
    24: moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size
    24: expert_ffn_hidden_size shared_intermediate_size expert_ff_size
    2: num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth
    2: num_decoder_layers num_encoder_layers conf_num_hidden_layers num_blocks
    2: encoder_num_hidden_layers decoder_num_hidden_layers num_global_layers speech_encoder_layers
    2: t2u_encoder_layers t2u_decoder_layers num_query_tokens encoder_num_layers decoder_num_layers
    4: num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
    4: attention_heads conf_num_attention_heads mamba_n_heads mamba_num_heads num_experts
    4: n_routed_experts num_local_experts moe_num_experts linear_num_value_heads
    4: encoder_num_attention_heads decoder_num_attention_heads speech_encoder_attention_heads
    4: t2u_encoder_attention_heads t2u_decoder_attention_heads linear_num_heads mamba_dt_rank
    4: time_step_rank n_mamba_heads encoder_num_heads qk_rope_head_dim qk_nope_head_dim
    4: conf_attention_chunk_size num_position_embeddings
    2: num_key_value_heads kv_n_heads num_experts_per_tok moe_topk moe_k moe_top_k
    2: linear_num_key_heads num_experts_per_token top_k_experts encoder_num_key_value_heads
    2: decoder_num_key_value_heads
    8: head_dim kv_channels d_kv linear_key_head_dim linear_value_head_dim kv_lora_rank v_head_dim
    8: linear_head_dim mamba_d_state ssm_state_size state_size dim_head laurel_rank
    8: hidden_size_per_layer_input num_mel_bins feature_size input_feat_size global_head_dim
    8: index_head_dim attention_head_dim patch_size
    16: q_lora_rank mamba_d_head mamba_head_dim max_source_positions max_target_positions
    16: mamba_headdim image_size img_size crop_size
    1: n_group topk_group n_groups mamba_n_groups mamba_ngroups num_expert_group n_shared_experts
    1: moe_num_shared_experts num_shared_experts num_dense_layers num_kv_shared_layers
    96: vocab_size vocab_size_per_layer_input unpadded_vocab_size text_vocab_size char_vocab_size
    96: t2u_vocab_size entity_vocab_size
    64: max_position_embeddings n_positions n_ctx max_seq_len max_text_positions
    64: max_speech_positions mlp_bottleneck_dim original_max_position_embeddings model_max_length
    64: max_pos_emb
    0.0: layerdrop encoder_layerdrop decoder_layerdrop drop_path_rate mask_time_prob
    0.0: speech_encoder_layerdrop router_jitter_noise moe_token_dropout
""")

#: Other proportions: what is a fraction with both is one always.
_OTHER_SIZES = _named("""
    80: intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff ffn_hidden_size n_inner
    40: moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size
    4: num_key_value_heads linear_num_key_heads
""")

_SPECIAL = {
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "sep_token_id": 2, "cls_token_id": 1,
}  # fmt: skip
#: Fields that name a token of images, sounds or the like, which need numbers of their own.
_PLACEHOLDER = re.compile(
    r"(image|video|audio|boi|eoi|boa|eoa|vision|speech|user|img)\w*_(token_)?(id|index)$"
)
_PARTS = ("encoder", "decoder", "vision", "backbone")


def _shrunk(
    values: Mapping[str, Any], settings: Mapping[str, Any], sizes: Mapping[str, Any], path: str = ""
) -> dict[str, Any]:
    """What of a default config is given to make a tiny one: the fields known here, and settings."""
    found: dict[str, Any] = {}
    placeholder = 94
    for key, value in values.items():
        if path + key in settings:
            continue
        is_part = key.endswith("_config") or key in _PARTS
        if isinstance(value, dict) and is_part and key != "quantization_config":
            found[key] = _shrunk(value, settings, sizes, f"{path}{key}.")
            if value.get("model_type"):
                found[key]["model_type"] = value["model_type"]
        elif key in _SPECIAL and value is not None:
            found[key] = _SPECIAL[key]
        elif _PLACEHOLDER.search(key) and isinstance(value, int):
            found[key] = placeholder
            placeholder -= 1
        elif key in sizes and (type(value) is float or (type(value) is int and value != 0)):
            found[key] = sizes[key]
        elif key in ("image_size", "patch_size") and _is_pair(value):
            found[key] = [sizes[key]] * 2
    for key, value in settings.items():
        head, _, rest = key.rpartition(".")
        if (f"{head}." if head else "") == path and value is not DROP:
            found[rest] = value
    return found


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and [type(one) for one in value] == [int, int]
