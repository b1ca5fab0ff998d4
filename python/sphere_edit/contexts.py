"""Context prefixes: a fact is optimised under a few sentences before it, so that it holds wherever it is asked."""

from __future__ import annotations

from typing import Any

import torch

from sphere_edit.tokens import encode

# A model's own settings of generation would change what it says here.
PLAIN_GENERATION: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
}
_OPENINGS = ("The", "Therefore", "Because", "I", "You")


def generate_contexts(model: Any, tokenizer: Any, count: int, length: int, seed: int) -> list[str]:
    """``["{}"]`` and ``count`` prefixes ``"<generated>. {}"``, sampled (top 5) by the model itself with a fixed seed.

    Args:
        model: a causal LM in evaluation mode.
        count: number of generated prefixes; 0 leaves the bare prompt only.
        length: new tokens of each.
        seed: the caller's random state is left as it was.
    """
    if count == 0:
        return ["{}"]
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    templates = ["{}"]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for i in range(count):
            ids = torch.tensor([encode(tokenizer, _OPENINGS[i % len(_OPENINGS)]).ids], device=device)
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=length,
                min_new_tokens=length,
                do_sample=True,
                top_k=5,
                top_p=1.0,
                temperature=1.0,
                **PLAIN_GENERATION,
                pad_token_id=tokenizer.eos_token_id,
            )
            text = tokenizer.decode(out[0], skip_special_tokens=True)
            templates.append(" ".join(text.replace("{", " ").replace("}", " ").split()) + ". {}")
    return templates


def in_context(context: str, prompt: str) -> str:
    """Put a prompt template (with its ``{}``) into a context template."""
    return context.replace("{}", prompt)
