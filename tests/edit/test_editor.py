"""The editing loop end to end on tiny models: what it computes, and that it computes it the same every time."""

from __future__ import annotations

import plain
import pytest
import tiny
import torch

from sphere_edit.config import EditConfig
from sphere_edit.editing import batch as batch_module
from sphere_edit.editing import editor as module
from sphere_edit.editing.editor import SphereEditor
from sphere_edit.editing.engine import Engine
from sphere_edit.model.inference import frozen
from sphere_edit.targets.optimised import optimise_values
from sphere_kernels.streaming import HypersphereState

_LAYERS = (1, 2, 3)
families = pytest.mark.parametrize("family", ["llama", "gpt2"])


def _full(update) -> torch.Tensor:
    return update.left.double() @ update.right.double()


def _snapshot(editor) -> dict[int, torch.Tensor]:
    return {layer: weight.clone() for layer, weight in editor.weights().items()}


def _equal(a: dict[int, torch.Tensor], b: dict[int, torch.Tensor]) -> bool:
    return all(torch.equal(a[i], b[i]) for i in _LAYERS)


@families
def test_same_seed_same_bits(family, make):
    first, second, other = make(family), make(family), make(family, seed=0)
    other.config = other.config.replace(seed=1)
    before = tiny.state(first.model)
    for editor in (first, second, other):
        editor.edit(tiny.facts(4))
    assert tiny.same(second.model, tiny.state(first.model))
    assert not _equal(first.weights(), other.weights())
    names = {f"{d.name}.weight" for d in first.structure.down if d.layer in _LAYERS}
    changed = {name for name, value in first.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == names


@families
def test_native_kernels_edit_as_the_reference_does(family, make, monkeypatch):
    weights, energies = {}, {}
    for impl in ("native", "reference"):
        monkeypatch.setenv("SPHERE_KERNELS_IMPL", impl)
        editor = make(family)
        editor.edit(tiny.facts(4))
        weights[impl] = _snapshot(editor)
        energies[impl] = {layer: editor.energy(layer)["energy"] for layer in _LAYERS}
    before = make(family).weights()
    for layer in _LAYERS:
        apart = (weights["native"][layer] - weights["reference"][layer]).norm()
        assert apart <= 2e-5 * (weights["reference"][layer] - before[layer]).norm()
    assert energies["native"] == pytest.approx(energies["reference"], rel=1e-8)


@families
def test_one_batch_follows_the_published_order(family, make, tokenizer, monkeypatch):
    """Layer by layer in fp64: keys and values under the weights so far, share of the residual, dense solve, project."""
    editor, twin = make(family, ridge=1.0), make(family, ridge=1.0)
    batches = [tiny.facts(4)[:2], tiny.facts(4)[2:]]
    history = {layer: 0 for layer in _LAYERS}
    covariances = {}
    monkeypatch.setattr(module, "Engine", lambda *args: covariances.update(args[1]) or Engine(*args))
    for batch in batches:
        result = editor.edit(batch)
        contexts = editor._writer.contexts
        with frozen(twin.model):
            z = optimise_values(twin.model, tokenizer, twin.structure, batch, contexts, editor.config, 3).target
        for i, layer in enumerate(_LAYERS):
            keys, now = plain.keys_and_values(twin.model, tokenizer, twin.structure, batch, contexts, layer, 3)
            values, vectors = torch.linalg.eigh(covariances[layer])
            basis = vectors[:, values < editor.config.null_space_threshold]
            residuals, null = (z - now) / (3 - i), basis @ basis.T
            delta = plain.alphaedit(null, history[layer], 1.0, keys, residuals)
            inside = plain.principal_projector(twin.weights()[layer], 0.5)
            delta = delta - 0.5 * delta @ inside
            torch.testing.assert_close(_full(result.updates[layer][0]), delta, atol=2e-4, rtol=2e-3)
            assert delta.norm() > 0.01
            twin.weights()[layer].add_(delta.float())
            history[layer] = history[layer] + keys.double().T @ keys.double()
        for layer in _LAYERS:
            torch.testing.assert_close(editor.weights()[layer], twin.weights()[layer], atol=2e-4, rtol=2e-3)


@families
def test_the_value_is_reached(family, make, tokenizer, monkeypatch):
    """With next to no ridge and nothing projected away, the last edited layer gives the optimised values."""
    wanted, original = [], batch_module.optimise_values

    def spy(*args):
        wanted.append(original(*args))
        return wanted[-1]

    monkeypatch.setattr(batch_module, "optimise_values", spy)
    changes = {"null_space": False, "sphere": False, "ridge": 1e-6, "contexts": 0, "batch_size": 6}
    editor = make(family, value_steps=10, **changes)
    before = plain.keys_and_values(editor.model, tokenizer, editor.structure, tiny.facts(6), ["{}"], 1, 3)[1]
    editor.edit(tiny.facts(6))
    after = plain.keys_and_values(editor.model, tokenizer, editor.structure, tiny.facts(6), ["{}"], 1, 3)[1]
    assert ((wanted[0].target - before).norm(dim=1) > 1).all()
    torch.testing.assert_close(after, wanted[0].target, atol=2e-3, rtol=2e-3)


@families
def test_interleaved_editors_do_not_meet(family, make):
    alone = [make(family), make(family, seed=3, alpha=0.9, energy_ratio=0.3)]
    mixed = [make(family), make(family, seed=3, alpha=0.9, energy_ratio=0.3)]
    for editor in alone:
        editor.edit(tiny.facts(4))
    for part in (slice(0, 2), slice(2, 4)):
        for editor in mixed:
            editor.edit(tiny.facts(4)[part])
    for a, b in zip(alone, mixed, strict=True):
        assert tiny.same(b.model, tiny.state(a.model))
    assert not _equal(mixed[0].weights(), mixed[1].weights())


def test_global_random_state_is_untouched(make):
    editors = [make(), make()]
    for seed, editor in zip((1, 2), editors, strict=True):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        editor.edit(tiny.facts(2))
        assert torch.equal(torch.random.get_rng_state(), before)
    assert _equal(editors[0].weights(), editors[1].weights())


def test_weights_are_the_original_and_the_updates(make):
    editor = make("gpt2")
    result = editor.edit(tiny.facts(5))
    for layer in _LAYERS:
        updates = result.updates[layer]
        assert [u.left.shape[1] for u in updates] == [2, 2, 1]
        want = editor.original_weights()[layer].double() + sum(map(_full, updates))
        torch.testing.assert_close(editor.weights()[layer].double(), want, atol=1e-6, rtol=1e-5)


@families
@pytest.mark.parametrize("alpha", [0.5, 0.8, 1.0])
def test_projection_of_the_first_layers_update(family, alpha, make):
    """Below the first edited layer nothing differs, so its update with SPHERE is the one without it, projected."""
    on, off = make(family, alpha=alpha, energy_ratio=0.4), make(family, sphere=False)
    with_sphere = _full(on.edit(tiny.facts(2)).updates[1][0])
    result = off.edit(tiny.facts(2))
    without = _full(result.updates[1][0])
    inside = plain.principal_projector(on.original_weights()[1], 0.4)
    rank = round(inside.trace().item())
    assert (without @ inside).norm() > 0.1 * without.norm()
    torch.testing.assert_close(with_sphere, without - alpha * without @ inside, atol=1e-6, rtol=1e-3)
    energies = [e for e in result.events if e["event"] == "energy" and e["batch"]]
    assert all("rank" not in e and e["suppressed"] == 0 for e in energies)
    seen = next(e for e in on.edit(tiny.facts(2)).events if e["event"] == "energy" and e["layer"] == 1)
    assert abs(seen["rank"] - rank) <= 1 and 0 < seen["suppressed"] < 1


def test_alpha_zero_is_no_projection(make):
    on, off = make(alpha=0.0), make(sphere=False)
    on.edit(tiny.facts(4))
    off.edit(tiny.facts(4))
    for layer in _LAYERS:
        torch.testing.assert_close(on.weights()[layer], off.weights()[layer], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("subspace", "refresh", "expected"),
    [
        ("current", 1, (0, 1, 2, 3)),
        ("current", 2, (0, 0, 2, 2)),
        ("current", 3, (0, 0, 0, 3)),
        ("pretrained", 1, (0, 0, 0, 0)),
    ],
)
def test_which_weight_the_directions_are_of(subspace, refresh, expected, make, monkeypatch):
    """``expected[b]``: the batch before which batch ``b``'s directions were taken."""
    editor = make(subspace=subspace, refresh_every=refresh, ridge=0.01, alpha=0.3, null_space=False)
    used: list[torch.Tensor] = []
    original = HypersphereState.project

    def spy(state, right):
        projected = original(state, right)
        unit = torch.eye(state.master.shape[1])  # what the projection takes from every feature
        used.append((unit - original(state, unit)).double() / 0.3)
        return projected

    monkeypatch.setattr(HypersphereState, "project", spy)
    weights = []
    for batch in range(4):
        weights.append(_snapshot(editor))
        editor.edit(tiny.facts(6)[batch : batch + 2])
    for i, layer in enumerate(_LAYERS):
        projectors = [plain.principal_projector(w[layer], 0.5) for w in weights]
        assert all((projectors[b] - projectors[b - 1]).norm() > 1e-3 for b in range(1, 4))
        for batch, source in enumerate(expected):
            torch.testing.assert_close(used[3 * batch + i], projectors[source], atol=1e-4, rtol=1e-3)


@families
@pytest.mark.parametrize("s", [0.0, 1.0, 2.0])
def test_reported_energies(family, s, make):
    editor = make(family, energy_s=s)
    events = editor.edit(tiny.facts(4)).events
    seen = {(e["batch"], e["layer"]): e for e in events if e["event"] == "energy"}
    assert sorted(seen) == [(b, layer) for b in range(3) for layer in _LAYERS]
    n = tiny.HIDDEN
    orthogonal = n * (n - 1) * 2 ** (-s / 2) if s else -n * (n - 1) * 0.5 * torch.log(torch.tensor(2.0)).item()
    for layer in _LAYERS:
        for batch, weight in ((0, editor.original_weights()[layer]), (2, editor.weights()[layer])):
            assert seen[batch, layer]["energy"] == pytest.approx(plain.energy(weight, s), rel=1e-6)
            assert seen[batch, layer]["excess"] == pytest.approx(plain.energy(weight, s) - orthogonal, abs=2e-3)
        assert seen[2, layer]["energy"] != seen[0, layer]["energy"]
        assert seen[2, layer]["weight_norm"] == pytest.approx(editor.weights()[layer].norm().item(), rel=1e-5)
    batches = [e for e in events if e["event"] == "batch"]
    assert [(e["batch"], e["edits"], e["size"]) for e in batches] == [(1, 2, 2), (2, 4, 2)]


def test_events_reach_the_listener_in_order(make):
    editor, heard = make(), []
    editor.on_event = heard.append
    assert heard == editor.edit(tiny.facts(3)).events
    assert [e["event"] for e in heard[:4]] == ["prepared", "energy", "energy", "energy"]
    assert len(heard[0]["contexts"]) == 3 and set(heard[0]["null_space_rank"]) == {"1", "2", "3"}


def test_presets_and_automatic_layers(tokenizer):
    model = tiny.make_model("llama", num_hidden_layers=9)
    assert SphereEditor(model, tokenizer).config.layers == (1, 2, 3, 4, 5)
    assert SphereEditor(model, tokenizer, EditConfig()).config.layers == (1, 2, 3, 4, 5)
