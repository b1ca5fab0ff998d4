"""Which implementation runs, and what is said when none can."""

from __future__ import annotations

import pytest
import torch

from sphere_kernels import dispatch, env, gram, hyperspherical_energy, principal_directions, sparse_projection

HERE = ("cpu", torch.float32, (8, 8))


def reference(x):
    return "reference"


def native(x):
    return "native"


def toy_of(**supports):
    places = {impl: dispatch.Implementation(f"{__name__}:{impl}", supports[impl]) for impl in supports}
    return dispatch.Operation(places, (torch.float32,), missing={"triton": "nobody wrote it"})


@pytest.fixture
def toy(monkeypatch):
    """An operation with a reference and a native implementation that takes fp32 only."""
    monkeypatch.setattr(dispatch, "_REGISTRY", {})
    only = {torch.float32: None}
    dispatch.register("toy", toy_of(reference=lambda *a: None, native=lambda _, dtype, s: only.get(dtype, "fp32 only")))
    return "toy"


def test_auto_takes_the_preferred_one_that_can_run(toy):
    assert dispatch.select(toy, "auto", *HERE) == "native"
    assert dispatch.select(toy, "auto", "cpu", torch.float64, (8, 8)) == "reference"
    assert dispatch.available(toy, *HERE) == ("native", "reference")


def test_an_explicit_choice_never_falls_back(toy):
    assert dispatch.select(toy, "reference", *HERE) == "reference"
    with pytest.raises(ValueError, match=r"impl='native' is not available for toy: fp32 only .*available here: ref"):
        dispatch.select(toy, "native", "cpu", torch.float64, (8, 8))
    with pytest.raises(ValueError, match="impl='cuda' is not available for toy: .* here: native, reference"):
        dispatch.select(toy, "cuda", *HERE)
    with pytest.raises(ValueError, match="impl='triton' is not available for toy: nobody wrote it"):
        dispatch.select(toy, "triton", *HERE)


def test_select_ignores_the_environment_and_implementation_does_not(toy, monkeypatch):
    monkeypatch.setenv(env.KERNELS_IMPL.name, "reference")
    assert dispatch.select(toy, "auto", *HERE) == "native"
    tensor = torch.zeros(8, 8)
    assert dispatch.implementation(toy, "auto", tensor)(tensor) == "reference"
    assert dispatch.implementation(toy, "native", tensor)(tensor) == "native"


def test_unknown_names(toy):
    with pytest.raises(ValueError, match="impl must be one of auto, reference, native, triton, cuda, got 'gpu'"):
        dispatch.select(toy, "gpu", *HERE)
    with pytest.raises(ValueError, match="op must be one of toy, got 'other'"):
        dispatch.select("other", "auto", *HERE)
    with pytest.raises(ValueError, match="impl must be one of triton, native, reference, cuda, got 'auto'"):
        dispatch.register(toy, toy_of(auto=lambda *a: None))


@pytest.mark.parametrize("impl", ("cuda", "triton"))
def test_operations_raise_rather_than_fall_back(impl):
    weight = torch.randn(6, 5)
    for call in (
        lambda: hyperspherical_energy(weight, impl=impl),
        lambda: gram(weight, impl=impl),
        lambda: principal_directions(weight, impl=impl),
        lambda: sparse_projection(weight, torch.eye(5)[:, :2], impl=impl),
    ):
        with pytest.raises(ValueError, match=f"impl='{impl}' is not available for .*available here: .*reference"):
            call()


def test_environment_variable_is_an_explicit_choice(monkeypatch):
    monkeypatch.setenv(env.KERNELS_IMPL.name, "triton")
    with pytest.raises(ValueError, match="impl='triton' is not available for pair_energy"):
        hyperspherical_energy(torch.randn(3, 3))
    hyperspherical_energy(torch.randn(3, 3), impl="reference")


def test_variables(monkeypatch, tmp_path):
    assert [row["name"] for row in env.table()] == [v.name for v in env.VARIABLES]
    assert all(v.name.startswith("SPHERE_") and v.meaning for v in env.VARIABLES)
    monkeypatch.delenv(env.EDIT_DATA.name, raising=False)
    assert env.edit_data() is None
    monkeypatch.setenv(env.EDIT_DATA.name, str(tmp_path))
    monkeypatch.setenv(env.EDIT_CACHE.name, "")
    assert env.edit_data() == tmp_path
    assert env.edit_cache().parts[-2:] == (".cache", "sphere-edit")
    assert {row["name"]: row["value"] for row in env.table()}[env.EDIT_DATA.name] == str(tmp_path)
