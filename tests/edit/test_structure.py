"""The parts of a model are found in every family, and what cannot be edited is refused."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers as hf

from sphere_edit.model.partial_forward import check_replay
from sphere_edit.model.structure import StructureError, check_weights_finite, find_structure

_DOWN = "model.layers.{}.mlp.down_proj"


def test_down_projection_is_found(family):
    model = tiny.make_model(family)
    structure = find_structure(model)
    path = tiny.FAMILIES[family][2]
    assert [d.name for d in structure.down] == [path.format(i) for i in range(5)]
    assert [d.layer for d in structure.down] == list(range(5))
    assert all(d.module is model.get_submodule(d.name) for d in structure.down)
    assert structure.hidden_size == tiny.HIDDEN
    assert structure.blocks == tuple(model.get_submodule(path.partition(".{}")[0]))


def test_weight_has_neurons_in_rows(family):
    """``W k`` plus the bias is what the module computes."""
    model = tiny.make_model(family)
    down = find_structure(model).down[2]
    assert down.weight.shape[0] == tiny.HIDDEN != down.weight.shape[1]
    keys = torch.randn(3, down.weight.shape[1])
    bias = 0 if getattr(down.module, "bias", None) is None else down.module.bias
    torch.testing.assert_close(down.module(keys), keys @ down.weight.T + bias)


@torch.no_grad()
def test_writing_through_the_view_changes_the_model(family):
    model = tiny.make_model(family)
    down = find_structure(model).down[2]
    ids = torch.arange(5, 12)[None]
    before = model(ids).logits
    weight = down.weight
    weight[3] += 1.0
    stored = model.state_dict()[f"{down.name}.weight"]
    assert torch.equal(stored if stored.shape == weight.shape else stored.T, weight)
    assert not torch.allclose(model(ids).logits, before)
    weight[3] -= 1.0
    torch.testing.assert_close(model(ids).logits, before)


def _check_logits(model, structure, ids):
    """What the structure makes of the last block's output is what the model says."""
    seen = []
    handle = structure.blocks[-1].register_forward_hook(
        lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    want = model(ids).logits
    handle.remove()
    torch.testing.assert_close(structure.logits(seen[0]), want)


@torch.no_grad()
def test_logits_from_the_last_block(family):
    model = tiny.make_model(family)
    structure = find_structure(model)
    _check_logits(model, structure, torch.arange(3, 15).view(2, 6))


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(tiny.UNUSUAL))
def test_logits_of_unusual_families_are_right_or_refused(name):
    """Cohere and Granite scale their logits after the head."""
    model = tiny.make_model(name)
    try:
        structure = find_structure(model)
    except StructureError:
        return
    _check_logits(model, structure, torch.arange(3, 15).view(2, 6))


def test_soft_cap_matters():
    """The model of the test above does squash its logits, so that the test can tell."""
    model = tiny.make_model("gemma2")
    structure = find_structure(model)
    hidden = 10 * torch.randn(2, tiny.HIDDEN)
    assert structure.logits(hidden).abs().max() <= 3.0 < structure.head(structure.final_norm(hidden)).abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", [*tiny.HYBRID, *tiny.WITH_IMAGES, "olmo", "nanochat"])
def test_dense_mlps_of_other_architectures_are_found(name):
    model = tiny.make_model(name)
    structure = find_structure(model)
    path = (tiny.HYBRID | tiny.WITH_IMAGES | tiny.UNUSUAL)[name][2]
    assert [d.name for d in structure.down] == [path.format(i) for i in range(5)]
    check_replay(model, structure, [9, 10, 11, 12])
    _check_logits(model, structure, torch.arange(23, 35).view(2, 6))


@pytest.mark.parametrize("width", [24, 64, 128, 200])
@pytest.mark.parametrize("family", ["qwen3", "gemma", "phi3"])
def test_an_mlp_narrower_than_the_attention(family, width):
    wide = {} if family == "phi3" else {"head_dim": 32}
    model = tiny.make_model(family, intermediate_size=width, **wide)
    assert [d.name for d in find_structure(model).down] == [_DOWN.format(i) for i in range(5)]


def _t5():
    return hf.T5ForConditionalGeneration(hf.T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=4, vocab_size=99))


def _experts(config_class, **settings):
    return hf.AutoModelForCausalLM.from_config(config_class(**tiny.FAMILIES["llama"][1], **settings))


def _dense_then_experts():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "num_dense_layers": 1}
    return _experts(hf.Lfm2MoeConfig, **experts, layer_types=["conv", "full_attention"] * 2 + ["conv"])


def _delta_and_experts():
    _, settings, _ = tiny.HYBRID["qwen3.5"]
    experts = {"num_experts": 4, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 40}
    return hf.AutoModelForCausalLM.from_config(hf.Qwen3_5MoeTextConfig(**settings, **experts))


def _one_block_twice():
    model = tiny.make_model("llama")
    model.model.layers[3] = model.model.layers[1]
    return model


def _one_weight_twice():
    model = tiny.make_model("gpt2")
    model.transformer.h[2].mlp.c_proj.weight = model.transformer.h[1].mlp.c_proj.weight
    return model


def _inference():
    with torch.inference_mode():
        return tiny.make_model("llama")


def _int8():
    model = tiny.make_model("llama")
    model.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(
        torch.ones(tiny.HIDDEN, 80, dtype=torch.int8), requires_grad=False
    )
    return model


def _float8():
    model = tiny.make_model("llama")
    model.model.layers[1].mlp.down_proj.to(torch.float8_e4m3fn)
    return model


def _meta():
    model = tiny.make_model("llama")
    model.model.layers[3].mlp.up_proj.to("meta")
    return model


def _no_blocks():
    model = tiny.make_model("llama")
    model.model.layers = torch.nn.ModuleList()
    return model


def _no_head():
    model = tiny.make_model("llama")
    model.lm_head = None
    return model


def _no_norm():
    model = tiny.make_model("llama")
    model.model.norm = torch.nn.Identity()
    return model


def _no_up_projection():
    model = tiny.make_model("llama")
    for block in model.model.layers:
        block.mlp = torch.nn.Identity()
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_t5, "T5ForConditionalGeneration is an encoder-decoder"),
        (lambda: _experts(hf.MixtralConfig, num_local_experts=2), "experts"),
        (lambda: _experts(hf.Qwen2MoeConfig, num_experts=4, moe_intermediate_size=40), "experts"),
        (lambda: _experts(hf.OlmoeConfig, num_experts=4), "experts"),
        (_dense_then_experts, "experts"),
        (_delta_and_experts, "experts"),
        (_one_block_twice, "model.layers.1.mlp.down_proj: more than one block uses its weight"),
        (_one_weight_twice, "transformer.h.1.mlp.c_proj: more than one block uses its weight"),
        (lambda: torch.nn.DataParallel(tiny.make_model("llama")), r"DataParallel has no config.*\(its .module\)"),
        (_inference, r"model.embed_tokens.weight was made under torch.inference_mode\(\)"),
        (_int8, r"model.layers.1.mlp.down_proj.weight is quantised \(torch.int8\)"),
        (_float8, r"model.layers.1.mlp.down_proj.weight is quantised \(torch.float8_e4m3fn\)"),
        (_meta, "model.layers.3.mlp.up_proj.weight is on the meta device"),
        (_no_blocks, "no list of decoder blocks"),
        (_no_head, "no output embeddings"),
        (_no_norm, "no final norm of size 32"),
        (_no_up_projection, r"model.layers.0 \(LlamaDecoderLayer\).*linear maps seen: self_attn.q_proj 32→32"),
    ],
    ids=["t5", "mixtral", "qwen2-moe", "olmoe", "lfm2-moe", "qwen3.5-moe"]
    + [
        "block-twice",
        "weight-twice",
        "data-parallel",
        "inference",
        "int8",
        "float8",
        "meta",
        "no-blocks",
        "no-head",
        "no-norm",
        "no-mlp",
    ],
)
def test_refused(make, message):
    with pytest.raises(StructureError, match=message):
        find_structure(make())


def test_positions_by_columns_are_refused():
    """Rows of a batch are padded on the left; there a shorter row would be at other positions than alone."""
    sizes = {"d_model": 32, "decoder_layers": 5, "decoder_attention_heads": 4, "decoder_ffn_dim": 80}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = hf.BlenderbotConfig(vocab_size=tiny.VOCABULARY, max_position_embeddings=64, init_std=0.2, **sizes)
        model = hf.BlenderbotForCausalLM(settings).eval()
    structure = find_structure(model)
    with pytest.raises(StructureError, match="BlenderbotForCausalLM: padding on the left changes its logits"):
        check_replay(model, structure, [9, 10, 11, 12])


def test_blocks_that_text_alone_does_not_reach_are_refused():
    sizes = tiny.FAMILIES["llama"][1] | {"cross_attention_layers": [3]}
    sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    model = hf.MllamaForCausalLM(hf.MllamaConfig(text_config=sizes).text_config).eval()
    with pytest.raises(StructureError, match="MllamaForCausalLM runs 4 of its 5 blocks on text alone"):
        check_replay(model, find_structure(model), [9, 10, 11, 12])


def test_blocks_of_two_kinds_are_found():
    """Attention and recurrence in blocks of their own."""
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8}
    kinds = ["linear_attention", "linear_attention", "full_attention", "linear_attention", "linear_attention"]
    settings = tiny.FAMILIES["llama"][1] | heads | {"linear_value_head_dim": 8, "layer_types": kinds}
    model = hf.OlmoHybridForCausalLM(hf.OlmoHybridConfig(**settings)).eval()
    structure = find_structure(model)
    assert [d.name for d in structure.down] == [_DOWN.format(i) for i in range(5)]
    check_replay(model, structure, [9, 10, 11, 12])


@pytest.mark.parametrize(
    "name", sorted(tiny.FAMILIES | tiny.UNUSUAL | tiny.NOT_ADDITIVE | tiny.HYBRID | tiny.WITH_IMAGES)
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_make_the_logits_padded_or_not(name, dtype):
    model = tiny.make_model(name, dtype=dtype)
    check_replay(model, find_structure(model), [9, 10, 11, 12])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_must_be_finite(value):
    model = tiny.make_model("gpt2")
    check_weights_finite(model)
    model.transformer.h[2].mlp.c_fc.bias.data[5] = value
    with pytest.raises(StructureError, match=r"transformer.h.2.mlp.c_fc.bias \[128\] holds NaN or Inf"):
        check_weights_finite(model)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((), "layers is empty"),
        ((1, 5), "5 is out of range, the model has 5"),
        ((-1, 2), "-1 is out of range"),
        ((2, 1), "ascending"),
        ((1, 1), "without repeats"),
        ((3, 4), r"the last block \(4\)"),
    ],
)
def test_bad_layers(layers, message):
    with pytest.raises(StructureError, match=message):
        find_structure(tiny.make_model("llama")).check_layers(layers)


@pytest.mark.parametrize("layers", [(0,), (0, 3), (1, 2, 3)])
def test_good_layers(layers):
    find_structure(tiny.make_model("llama")).check_layers(layers)
