"""Fixtures of the editing loop's tests: tiny models, tokenizers, settings that run in a moment."""

from __future__ import annotations

import pytest
import tiny
import torch

from sphere_edit.editing.editor import SphereEditor


@pytest.fixture(scope="session")
def tokenizer():
    """Adds no special tokens, as SmolLM2's."""
    return tiny.make_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer():
    """Adds BOS, as Llama 3's."""
    return tiny.make_tokenizer(bos=True)


@pytest.fixture(params=sorted(tiny.FAMILIES))
def family(request):
    return request.param


@pytest.fixture
def config():
    """Settings that run in a moment, and edit layers 1 to 3."""
    return tiny.CONFIG


@pytest.fixture
def make(tokenizer, config, tmp_path):
    """An editor of a fresh model."""

    def build(family="llama", dtype=torch.float32, seed=0, on_batch=None, **changes):
        model, settings = tiny.make_model(family, seed, dtype), config.replace(**changes)
        return SphereEditor(model, tokenizer, settings, cache=tmp_path / "covariance", on_batch=on_batch)

    return build


@pytest.fixture(autouse=True)
def own_cache(request, tmp_path, monkeypatch):
    """Nothing is read from or left in the user's cache, unless a test is about the demo's model."""
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setenv("SPHERE_EDIT_CACHE", str(tmp_path / "cache"))
