"""Write a Llama, or an Arcee (a Llama whose MLP has no gate), as the same function in another family's form.

Some forms seem to be other functions. Four devices make them exact, up to rounding:

- A norm of a small vector is linear. Multiply the stream by 2³⁰, and ε of the norms by the square of that. Then every
  norm of the stream gives the same output as before. A norm of an MLP's, an attention's or a head's output (sandwich
  norms, query and key norms) gets a vector far below √ε and multiplies it by weight / √ε.
- LayerNorm of a mirrored stream ``[h, −h]`` is RMSNorm: the mean is 0. Maps read both halves, at half weight.
- A block with parallel attention and MLP is written twice: once without its MLP, once without its attention.
- A rotary embedding of neighbours equals one of halves with the rows of queries and keys in another order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from benchmarks.models.forms import FORMS, NAMES, Form, Rule

Parts = dict[str, Tensor]


def blocks_of(family: str, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks of the twin that hold the MLPs of the Llama's blocks ``layers``."""
    return tuple(2 * i + 1 for i in layers) if FORMS[family].parallel else layers


@torch.no_grad()
def twin(llama: Any, family: str) -> Any:
    """The function of ``llama`` in the form of a family.

    Args:
        llama: a ``LlamaForCausalLM`` or ``ArceeForCausalLM``, as the form requires, without biases, in fp32.
        family: one of `FORMS`.

    Returns:
        A causal LM of the family in evaluation mode, with weights of its own.

    Raises:
        ValueError: the family has a weight without a rule in the form.
    """
    form, own = FORMS[family], llama.config
    outer, blocks = _read(llama)
    stream = form.stream(own)
    blocks = [_rewritten(parts, form, own) for parts in blocks]
    if form.parallel:
        blocks = [half for parts in blocks for half in _halves(parts)]
    if form.mirrored:
        outer = _mirrored(outer)
    if form.bare:
        outer["head"] = outer["head"] * outer.pop("final_norm")
    sandwich = "lifted" in form.names.values()
    scales = {"embedding": stream, **dict.fromkeys(() if sandwich else ("o", "down"), stream)}
    root = (own.rms_norm_eps if form.epsilon else 1e-5 / stream**2) ** 0.5 * stream
    constants = {"identity": root, "lifted": root * stream}
    for name, multiplier in form.multipliers(own).items():
        scales[name] = scales.get(name, 1.0) / multiplier
    for parts in (outer, *blocks):
        for name in parts.keys() & scales.keys():
            parts[name] = parts[name] * scales[name]
        parts |= {name: torch.tensor([value * scales.get(name, 1.0)]) for name, value in constants.items()}
    tied = own.tie_word_embeddings and torch.equal(outer["embedding"], outer["head"])
    model = _empty(form, own, len(blocks), tied, stream)
    names = NAMES | form.names
    state = {name: _filled(name, value, names, outer, blocks, form) for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    return model.eval()


def _read(llama: Any) -> tuple[Parts, list[Parts]]:
    """The Llama's weights by the names of the parts: outside the blocks, and for each block."""
    blocks: list[Parts] = [{} for _ in range(llama.config.num_hidden_layers)]
    outer: Parts = {}
    for name, value in llama.state_dict().items():
        layer, inside = _place(name)
        part = NAMES[inside]
        assert isinstance(part, str)
        (outer if layer is None else blocks[layer])[part] = value.clone()
    return outer, blocks


def _place(name: str) -> tuple[int | None, str]:
    """(block, name inside the block) of a weight; (None, name) for a weight outside the blocks."""
    found = re.fullmatch(r"[^0-9]*?\.(\d+)\.(.+)", name)
    return (int(found[1]), found[2]) if found else (None, name)


def _rewritten(parts: Parts, form: Form, own: Any) -> Parts:
    """A block's parts in the form's arrangement, without scales."""
    if form.neighbours:
        parts |= {name: _neighbours(parts[name], own.head_dim) for name in "qk"}
    if form.bare:
        for norm, reads in (("attention_norm", "qkv"), ("mlp_norm", ("gate", "up"))):
            weight = parts.pop(norm)
            parts |= {name: parts[name] * weight for name in reads}
    if form.gated:  # sigmoid(0) is one half
        heads = parts["q"].unflatten(0, (-1, own.head_dim))
        parts |= {"q": torch.cat([heads, torch.zeros_like(heads)], 1).flatten(0, 1), "o": 2 * parts["o"]}
    if form.wide:
        parts |= {name: torch.cat([parts[name], torch.zeros_like(parts[name])]) for name in "qkv"}
        parts["o"] = torch.cat([parts["o"], torch.zeros_like(parts["o"])], 1)
    if form.by_head:
        heads = [parts.pop(name).unflatten(0, (-1, own.head_dim)) for name in "qkv"]
        parts["qkv"] = torch.cat([x.repeat_interleave(len(heads[0]) // len(x), 0) for x in heads], 1).flatten(0, 1)
    return _mirrored(parts) if form.mirrored else parts


def _neighbours(weight: Tensor, head_dim: int) -> Tensor:
    """Move rows i and i + head_dim / 2 of each head to rows 2 i and 2 i + 1."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _mirrored(parts: Parts) -> Parts:
    """The parts for the mirrored stream ``[h, −h]``."""
    out = {}
    for name, value in parts.items():
        if name.endswith("norm"):
            out[name] = torch.cat([value, value])
        elif name in ("o", "down"):
            out[name] = torch.cat([value, -value])
        else:
            out[name] = torch.cat([value, -value], 1) / (1 if name == "embedding" else 2)
    return out


def _halves(parts: Parts) -> tuple[Parts, Parts]:
    """Two blocks for one: attention alone, then MLP alone."""

    def without(names: tuple[str, ...]) -> Parts:
        return {name: torch.zeros_like(value) if name in names else value for name, value in parts.items()}

    attention, mlp = without(("gate", "up", "down")), without(("q", "k", "v", "qkv", "o"))
    mlp["attention_norm"] = parts["mlp_norm"]
    return attention, mlp


def _empty(form: Form, own: Any, blocks: int, tied: bool, stream: float) -> Any:
    """The family's model with weights still to be set."""
    same = ("vocab_size", "intermediate_size", "num_key_value_heads", "max_position_embeddings", "hidden_act")
    same += ("num_attention_heads", "head_dim", "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id")
    settings = {name: getattr(own, name) for name in same}
    settings |= {"num_hidden_layers": blocks, "tie_word_embeddings": tied, "attention_bias": False}
    settings["hidden_size"] = own.hidden_size * (1 + form.mirrored)
    if form.wide:
        settings |= {name: 2 * settings[name] for name in ("num_attention_heads", "num_key_value_heads")}
    if form.epsilon:
        settings[form.epsilon] = own.rms_norm_eps * stream**2
    config = getattr(hf, form.config)(**settings | form.settings(own))
    with torch.random.fork_rng():
        return hf.AutoModelForCausalLM.from_config(config)


def _filled(
    name: str, empty: Tensor, names: Mapping[str, Rule], outer: Parts, blocks: list[Parts], form: Form
) -> Tensor:
    """The value of one weight."""
    layer, inside = _place(name)
    rule: Rule = 0.0 if inside.endswith("bias") else "?"
    rule = next((names[key] for key in names if key.endswith(".") and inside.startswith(key)), rule)
    rule = names.get(inside, rule)
    if rule is None:
        return empty
    if isinstance(rule, float):
        return torch.full_like(empty, rule)
    parts = outer if layer is None else blocks[layer]
    if rule == "?" or not set(rule.split()) <= parts.keys():
        raise ValueError(f"{form.config}: {name} holds {rule}; expected parts out of {', '.join(sorted(parts))}")
    value = torch.cat([parts[part] for part in rule.split()])
    return value.expand(empty.shape) - (1.0 if form.less_one and value.ndim == 1 else 0.0)
