"""SmolLM2-135M in the forms of other families: the same real edits on each twin, against edits of the original."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.models.forms import FORMS
from benchmarks.models.twins import blocks_of, twin
from sphere_edit.data import load_requests
from sphere_edit.editing.editor import SphereEditor
from sphere_edit.model.loading import load_model
from sphere_edit.targets.presets import preset

MODEL, DATA, EDITS = "smollm2-135m", "counterfact_all.jsonl.gz", 10
# A multiplier adds a rounding in bfloat16, so the loop keeps the model's arithmetic. Each twin collects its keys anew,
# so there are few tokens.
CHANGES = {"loop_arithmetic": "model", "covariance_tokens": 4000, "batch_size": EDITS}
_TOLD = ("learned", "nll", "rounds")
FAMILIES = tuple(name for name, form in FORMS.items() if form.original == "llama")


@cache
def _original() -> tuple[Any, Any, list[Any]]:
    model, tokenizer = load_model(MODEL)
    data = Path(os.environ["SPHERE_EDIT_DATA"]) / DATA
    return model, tokenizer, load_requests(data, limit=EDITS, order="mcf_index", on_note=lambda note: None)


def edit(family: str) -> dict[str, Any]:
    """The row of one family: differences of the twin from SmolLM2 before and after the edits, and the batch's figures.

    A difference is the largest of any logit; ``moved`` is the largest change of a logit of SmolLM2 under the edits.
    """
    original, *_ = _original()
    model = twin(original, family)
    at_first, before = _reference()["before"], _logits(model)
    told, after = _edit(model, family)
    return {
        "family": family,
        "pattern": FORMS[family].pattern,
        "difference_before": _difference(before, at_first),
        "difference_after": _difference(after, _reference()["after"]),
        "moved": _difference(_reference()["after"], at_first),
        "edits": EDITS,
        **{name: told[name] for name in _TOLD},
        **{f"{name}_of_original": _reference()["told"][name] for name in _TOLD},
    }


@cache
def _reference() -> dict[str, Any]:
    """Logits of the original SmolLM2 before and after the edits, and the batch; the edits are reverted."""
    original, *_ = _original()
    before = _logits(original)
    told, after = _edit(original, "llama")
    return {"before": before, "told": told, "after": after}


def _edit(model: Any, family: str) -> tuple[dict[str, Any], Tensor]:
    """(batch event, logits after the edits); the edits are reverted."""
    _, tokenizer, requests = _original()
    config = preset(MODEL).replace(**CHANGES)
    config = config.replace(layers=blocks_of(family, config.layers))
    with tempfile.TemporaryDirectory() as folder:
        editor = SphereEditor(model, tokenizer, config, cache=Path(folder), on_note=lambda note: None)
        events = editor.edit(requests).events
    after = _logits(model)
    editor.revert()
    return next(event for event in events if event["event"] == "batch"), after


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    """Logits at the end of each edited fact's prompt and of a paraphrase, ``[prompts, vocabulary]``."""
    _, tokenizer, requests = _original()
    prompts = [prompt for r in requests for prompt in (r.text, *r.paraphrases[:1])]
    return torch.stack([model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1] for prompt in prompts])


def _difference(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max())
