"""Form of each family for a Llama's function: names, settings, multipliers, and necessary devices (see `twins`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# Parts of a weight, stacked; a number that fills the weight; None for a weight that stays as the model has it.
Rule = str | float | None

LINEAR = 2.0**30
NAMES: dict[str, Rule] = {
    "input_layernorm.weight": "attention_norm",
    "post_attention_layernorm.weight": "mlp_norm",
    "self_attn.qkv_proj.weight": "q k v",
    **{f"self_attn.{x}_proj.weight": x for x in "qkvo"},
    **{f"self_attn.{x}_norm.weight": "identity" for x in "qk"},
    "mlp.gate_up_proj.weight": "gate up",
    **{f"mlp.{x}_proj.weight": x for x in ("gate", "up", "down")},
    "model.embed_tokens.weight": "embedding",
    "model.norm.weight": "final_norm",
    "lm_head.weight": "head",
}
_READS = ("q", "k", "v", "gate", "up")


def _nothing(_: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Form:
    """The form in which a family writes a Llama's function.

    Attributes:
        config: name of the family's config class in transformers.
        pattern: differences of its blocks from a Llama's.
        settings: the family's own settings, computed from the Llama's.
        names: rules for weights whose names differ from a Llama's; a name that ends in a dot stands for all names that
            begin with it. ``identity`` is the weight of a norm that returns its input, ``lifted`` the weight of a norm
            that multiplies its input by the stream's factor.
        multipliers: the family's multipliers of the parts' outputs, computed from the Llama's settings.
        stream: the factor of the stream, computed from the Llama's settings.
        epsilon: name of the setting ε; None for a constant 1e-5.
        less_one: norms store their weight less one.
        neighbours: the rotary embedding turns neighbouring dimensions.
        mirrored: norms subtract the mean.
        bare: norms have no weight.
        parallel: attention and MLP of a block read the same input.
        wide: the size of heads follows from the stream's size.
        gated: queries come with a gate that passes through a sigmoid.
        by_head: queries, keys and values are one map, head by head.
        original: the source of the function, a Llama or an Arcee.
    """

    config: str
    pattern: str
    settings: Callable[[Any], dict[str, Any]] = _nothing
    names: Mapping[str, Rule] = field(default_factory=dict)
    multipliers: Callable[[Any], dict[str, float]] = _nothing
    stream: Callable[[Any], float] = lambda own: 1.0
    epsilon: str | None = "rms_norm_eps"
    less_one: bool = False
    neighbours: bool = False
    mirrored: bool = False
    bare: bool = False
    parallel: bool = False
    wide: bool = False
    gated: bool = False
    by_head: bool = False
    original: str = "llama"


def _attention_scale(own: Any) -> float:
    return float(own.head_dim) ** -0.5


def _linear(_: Any) -> float:
    return LINEAR


def _all_of(kind: str) -> Callable[[Any], list[str]]:
    return lambda own: [kind] * own.num_hidden_layers


def _turning(own: Any) -> dict[str, Any]:
    """Rotary settings that turn the whole head."""
    return {"rope_parameters": {**own.rope_parameters, "partial_rotary_factor": 1.0}}


def _gemma(own: Any) -> dict[str, Any]:
    settings = {"hidden_activation": "silu", "query_pre_attn_scalar": own.head_dim}
    settings |= {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    return settings | {"layer_types": ["full_attention"] * own.num_hidden_layers}


def _both_ropes(own: Any) -> dict[str, Any]:
    return {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), own.rope_parameters)}


def _embedded(own: Any) -> dict[str, float]:
    return {"embedding": own.hidden_size**0.5}


_MULTIPLIED = {"attention_multiplier": 0.3, "residual_multiplier": 0.22}
_SCALED = _MULTIPLIED | {"embedding_multiplier": 12.0, "logits_scaling": 8.0}


def _granite(own: Any, place: tuple[str, ...] = ("o", "down")) -> dict[str, float]:
    found = {"q": 0.3 / _attention_scale(own), "embedding": 12.0, "head": 1 / 8.0}
    return found | dict.fromkeys(place, 0.22)


_SANDWICH: dict[str, Rule] = {
    "pre_feedforward_layernorm.weight": "mlp_norm",
    "post_attention_layernorm.weight": "lifted",
    "post_feedforward_layernorm.weight": "lifted",
}
_MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 16}

FORMS: dict[str, Form] = {
    "llama": Form("LlamaConfig", "none"),
    "mistral": Form("MistralConfig", "none", lambda own: {"sliding_window": None}),
    "ministral3": Form(
        "Ministral3Config",
        "none",
        lambda own: {
            "rope_parameters": own.rope_parameters
            | {"llama_4_scaling_beta": 0.0, "original_max_position_embeddings": own.max_position_embeddings}
        },
    ),
    "qwen2": Form("Qwen2Config", "biases of queries, keys and values"),
    "seed_oss": Form("SeedOssConfig", "biases of queries, keys and values", lambda own: {"attention_bias": True}),
    "smollm3": Form("SmolLM3Config", "none", lambda own: {"no_rope_layers": [1] * own.num_hidden_layers}),
    "phi3": Form("Phi3Config", "fused gate and up, fused queries, keys and values"),
    "glm": Form("GlmConfig", "fused gate and up, rotary neighbours", _turning, neighbours=True),
    "helium": Form("HeliumConfig", "rotary neighbours", neighbours=True),
    "ernie4_5": Form(
        "Ernie4_5Config", "rotary neighbours, biases everywhere", lambda own: {"use_bias": True}, neighbours=True
    ),
    "granite": Form("GraniteConfig", "multipliers", lambda own: _SCALED, multipliers=_granite),
    "granite_swa": Form(
        "GraniteSWAConfig",
        "multipliers, attention sinks",
        lambda own: _SCALED | {"layer_types": _all_of("full_attention")(own)},
        {"self_attn.sinks": -1e4},
        _granite,
    ),
    "granitemoehybrid": Form(
        "GraniteMoeHybridConfig",
        "multipliers, fused gate and up",
        lambda own: (
            _SCALED
            | {"layer_types": _all_of("full_attention")(own), "num_local_experts": 0, "position_embedding_type": "rope"}
            | {"shared_intermediate_size": own.intermediate_size, "mamba_n_heads": 4}
        ),
        {"shared_mlp.input_linear.weight": "gate up", "shared_mlp.output_linear.weight": "down"},
        _granite,
    ),
    "gemma": Form(
        "GemmaConfig",
        "norms less one, multiplied embeddings",
        lambda own: {"hidden_activation": "silu"},
        multipliers=_embedded,
        stream=lambda own: own.hidden_size**0.5,
        less_one=True,
    ),
    "vaultgemma": Form(
        "VaultGemmaConfig",
        "norms less one, multiplied embeddings",
        _gemma,
        {"pre_feedforward_layernorm.weight": "mlp_norm"},
        _embedded,
        stream=lambda own: own.hidden_size**0.5,
        less_one=True,
    ),
    "gemma2": Form("Gemma2Config", "sandwich norms", _gemma, _SANDWICH, _embedded, stream=_linear, less_one=True),
    "gemma3_text": Form(
        "Gemma3TextConfig",
        "sandwich norms, query and key norms",
        lambda own: _gemma(own) | _both_ropes(own),
        _SANDWICH,
        _embedded,
        stream=_linear,
        less_one=True,
    ),
    "gemma4_text": Form(
        "Gemma4TextConfig",
        "sandwich norms, query, key and value norms",
        lambda own: (
            _gemma(own) | _both_ropes(own) | {"hidden_size_per_layer_input": 0, "global_head_dim": own.head_dim}
        ),
        {**_SANDWICH, "layer_scalar": None},
        lambda own: _embedded(own) | {"q": 1 / _attention_scale(own), "o": 1 / (own.rms_norm_eps**0.5 * LINEAR)},
        stream=_linear,
    ),
    "glm4": Form(
        "Glm4Config",
        "sandwich norms, fused gate and up, rotary neighbours",
        _turning,
        {"post_self_attn_layernorm.weight": "lifted", "post_mlp_layernorm.weight": "lifted"},
        stream=_linear,
        neighbours=True,
    ),
    "hyperclovax": Form(
        "HyperCLOVAXConfig",
        "sandwich norms, multipliers",
        lambda own: _SCALED | {"use_post_norm": True},
        {"post_norm1.weight": "lifted", "post_norm2.weight": "lifted"},
        lambda own: _granite(own, ("lifted",)) | {"head": 8.0},
        stream=_linear,
    ),
    "qwen3": Form("Qwen3Config", "query and key norms", stream=_linear),
    "hunyuan_v1_dense": Form(
        "HunYuanDenseV1Config",
        "query and key norms",
        names={f"self_attn.{name}_layernorm.weight": "identity" for name in ("query", "key")},
        stream=_linear,
    ),
    "lfm2": Form(
        "Lfm2Config",
        "query and key norms",
        lambda own: {"layer_types": _all_of("full_attention")(own), "block_auto_adjust_ff_dim": False},
        {
            "operator_norm.weight": "attention_norm",
            "ffn_norm.weight": "mlp_norm",
            "self_attn.out_proj.weight": "o",
            **{f"self_attn.{name}_layernorm.weight": "identity" for name in "qk"},
            **{f"feed_forward.w{i}.weight": name for i, name in ((1, "gate"), (3, "up"), (2, "down"))},
            "model.embedding_norm.weight": "final_norm",
        },
        stream=_linear,
        epsilon="norm_eps",
    ),
    "qwen3_5_text": Form(
        "Qwen3_5TextConfig",
        "query and key norms, gated attention, norms less one",
        lambda own: _turning(own) | {"layer_types": _all_of("full_attention")(own)},
        stream=_linear,
        less_one=True,
        gated=True,
    ),
    "bitnet": Form(
        "BitNetConfig",
        "norms before the down-projection and the attention's output",
        names={"self_attn.attn_sub_norm.weight": "identity", "mlp.ffn_sub_norm.weight": "identity"},
        stream=_linear,
    ),
    "bamba": Form(
        "BambaConfig",
        "none",
        lambda own: _turning(own) | {"attn_layer_indices": list(range(own.num_hidden_layers)), "mamba_n_heads": 4},
        {
            "pre_ff_layernorm.weight": "mlp_norm",
            **{f"feed_forward.{name}_proj.weight": name for name in ("gate", "up", "down")},
            "model.final_layernorm.weight": "final_norm",
        },
    ),
    "falcon_h1": Form(
        "FalconH1Config",
        "a recurrence beside the attention, multipliers",
        lambda own: (
            _MAMBA
            | {"mlp_multipliers": [0.5, 0.7], "key_multiplier": 0.8, "attention_out_multiplier": 0.9}
            | {"embedding_multiplier": 5.0, "lm_head_multiplier": 0.3}
        ),
        {
            "mamba.out_proj.weight": 0.0,
            "mamba.": None,
            "pre_ff_layernorm.weight": "mlp_norm",
            **{f"feed_forward.{name}_proj.weight": name for name in ("gate", "up", "down")},
            "model.final_layernorm.weight": "final_norm",
        },
        lambda own: {"gate": 0.5, "down": 0.7, "k": 0.8, "o": 0.9, "embedding": 5.0, "head": 0.3},
    ),
    "stablelm": Form(
        "StableLmConfig",
        "LayerNorm, biases of queries, keys and values",
        lambda own: _turning(own) | {"use_qkv_bias": True},
        epsilon="layer_norm_eps",
        mirrored=True,
        wide=True,
    ),
    "olmo": Form(
        "OlmoConfig",
        "LayerNorm without weights",
        stream=lambda own: (1e-5 / own.rms_norm_eps) ** 0.5,
        epsilon=None,
        mirrored=True,
        bare=True,
    ),
    "cohere": Form(
        "CohereConfig",
        "parallel attention, LayerNorm, rotary neighbours, multiplied logits",
        lambda own: {"logit_scale": 0.0625},
        multipliers=lambda own: {"head": 0.0625},
        epsilon="layer_norm_eps",
        neighbours=True,
        mirrored=True,
        parallel=True,
    ),
    "cohere2": Form(
        "Cohere2Config",
        "parallel attention, LayerNorm, rotary neighbours, sliding windows",
        lambda own: (
            {"logit_scale": 0.25, "sliding_window": own.max_position_embeddings}
            | {"layer_types": ["sliding_attention"] * (2 * own.num_hidden_layers)}
        ),
        multipliers=lambda own: {"head": 0.25},
        epsilon="layer_norm_eps",
        neighbours=True,
        mirrored=True,
        parallel=True,
        wide=True,
    ),
    "arcee": Form("ArceeConfig", "an MLP without a gate", original="arcee"),
    "nemotron": Form(
        "NemotronConfig",
        "an MLP without a gate, LayerNorm, norms less one",
        _turning,
        epsilon="norm_eps",
        less_one=True,
        mirrored=True,
        original="arcee",
    ),
    "starcoder2": Form(
        "Starcoder2Config",
        "an MLP without a gate, LayerNorm, biases everywhere",
        lambda own: {"use_bias": True, "sliding_window": None},
        {"mlp.c_fc.weight": "up", "mlp.c_proj.weight": "down"},
        epsilon="norm_epsilon",
        mirrored=True,
        original="arcee",
    ),
    "phi": Form(
        "PhiConfig",
        "an MLP without a gate, parallel attention, LayerNorm, biases everywhere",
        _turning,
        {
            "self_attn.dense.weight": "o",
            "mlp.fc1.weight": "up",
            "mlp.fc2.weight": "down",
            "model.final_layernorm.weight": "final_norm",
        },
        epsilon="layer_norm_eps",
        mirrored=True,
        parallel=True,
        original="arcee",
    ),
    "gpt_neox": Form(
        "GPTNeoXConfig",
        "an MLP without a gate, parallel attention, LayerNorm, fused queries, keys and values",
        _turning,
        {
            "attention.query_key_value.weight": "qkv",
            "attention.dense.weight": "o",
            "mlp.dense_h_to_4h.weight": "up",
            "mlp.dense_4h_to_h.weight": "down",
            "gpt_neox.embed_in.weight": "embedding",
            "gpt_neox.final_layer_norm.weight": "final_norm",
            "embed_out.weight": "head",
        },
        epsilon="layer_norm_eps",
        mirrored=True,
        parallel=True,
        wide=True,
        by_head=True,
        original="arcee",
    ),
}
