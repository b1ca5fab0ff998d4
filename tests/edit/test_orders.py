"""Orders of solve and projection as options, against loops written densely in fp64; and PRUNE in copies."""

from __future__ import annotations

import sys
import types

import plain
import pytest
import tiny
import torch

from sphere_edit.config import ConfigError, EditConfig
from sphere_edit.editing.editor import SphereEditor
from sphere_edit.editing.engine import Engine
from sphere_edit.experiments import run as experiment
from sphere_edit.experiments.run import resume, rollback
from sphere_edit.experiments.snapshots import take
from sphere_edit.methods import Method
from sphere_edit.methods.covariance import key_covariances
from sphere_edit.model.structure import find_structure
from sphere_edit.runs import run_folder
from sphere_edit.runs.deltas import switch
from sphere_edit.runs.spec import RunOptions
from sphere_edit.targets.optimised import optimise_values

_PRUNING = {"method": "prune", "covariance_weight": 1e-3, "value_clamp": 400.0, "value_lr": 50.0}
_COPIES = {**_PRUNING, "prune_in": "copies"}
_ORDERS = {
    "alphaedit": {},
    "ridge": {"null_space": False},
    "memit": {"method": "memit", "covariance_weight": 10.0},
    "memit-history": {"method": "memit", "covariance_weight": 10.0, "history": True},
    "rect": {"method": "rect", "covariance_weight": 10.0},
    "prune": _PRUNING,
    "rome": {"method": "rome"},
}


@pytest.fixture
def seen(monkeypatch):
    """The covariances, and by batch the values that are optimised for."""
    found = {"targets": []}

    def keep(*args):
        made = optimise_values(*args)
        found["targets"].append(made.target)
        return made

    monkeypatch.setattr(
        "sphere_edit.editing.editor.key_covariances", lambda *a: found.setdefault("covariances", key_covariances(*a))
    )
    monkeypatch.setattr("sphere_edit.editing.batch.optimise_values", keep)
    return found


def _restrained(total, original):
    """Singular values above the largest of the weight before, held down."""
    limit = torch.linalg.matrix_norm(original, 2)
    left, values, right = torch.linalg.svd(total, full_matrices=False)
    return (
        left
        @ torch.diag(torch.where(values > limit, torch.minimum(values, limit + (values / limit).log()), values))
        @ right
    )


def _solved(config, covariance, history, k, r):
    """``Δ [n, d]`` for keys ``k [d, b]`` and residuals ``r [n, b]``, all fp64."""
    if config.method == "alphaedit":
        eye = torch.eye(len(k), dtype=k.dtype)
        values, vectors = torch.linalg.eigh(covariance)
        small = vectors[:, values < config.null_space_threshold]
        projector = small @ small.T if config.null_space else eye
        return torch.linalg.solve(projector @ (k @ k.T + history) + config.ridge * eye, projector @ k @ r.T).T
    if config.method == "rome":
        u = torch.linalg.solve(covariance, k)
        return r @ torch.linalg.pinv(k.T @ u) @ u.T
    kept = history if config.history else 0
    return torch.linalg.solve(config.covariance_weight * covariance + kept + k @ k.T, k @ r.T).T


def _as_published(editor, seen, facts):
    """Weights after the batches of ``facts``: every layer solved for over the whole updates of those below."""
    config, layers = editor.config, editor.config.layers
    model = tiny.make_model("llama")
    down = find_structure(model).down
    first = {layer: down[layer].weight.double() for layer in layers}
    weights = dict(first)
    history = {layer: torch.zeros_like(seen["covariances"][layer]) for layer in layers}
    for i, target in enumerate(seen["targets"]):
        batch, keys, solved = facts[i * config.batch_size : (i + 1) * config.batch_size], {}, {}
        for at, layer in enumerate(layers):
            k, values = plain.keys_and_values(
                model, editor.tokenizer, find_structure(model), batch, editor._writer.contexts, layer, layers[-1]
            )
            keys[layer] = k.double().T
            residuals = (target - values).double().T / (len(layers) - at)
            covariance = seen["covariances"][layer]
            solved[layer] = _solved(config, covariance, history[layer], keys[layer], residuals)
            down[layer].weight.copy_(weights[layer] + solved[layer])
        for layer in layers:
            history[layer] += keys[layer] @ keys[layer].T
            delta = solved[layer]
            if config.method == "rect":
                change = (delta / weights[layer]).abs()
                least = change.flatten().topk(round(config.rect_share * change.numel())).values[-1]
                delta = delta.where(change >= least, torch.zeros_like(delta))
            if config.sphere:
                delta = delta - config.alpha * delta @ plain.principal_projector(weights[layer], config.energy_ratio)
            weights[layer] = weights[layer] + delta
            if config.method == "prune":
                assert i == 0  # the sum of the whole updates is this one
                weights[layer] = first[layer] + _restrained(delta, first[layer])
            down[layer].weight.copy_(weights[layer])
    return weights


@pytest.mark.parametrize("sphere", (True, False), ids=("sphere", "alone"))
@pytest.mark.parametrize("changes", _ORDERS.values(), ids=_ORDERS)
def test_projected_after_all_layers(changes, sphere, make, seen):
    facts = tiny.facts(2 if changes.get("method") == "prune" else 6)
    editor = make(project="batch", sphere=sphere, alpha=0.8, **changes)
    editor.edit(facts)
    other = make(sphere=sphere, alpha=0.8, **changes)
    want, before = _as_published(editor, seen, facts), editor.original_weights()
    other.edit(facts)
    for layer, weight in editor.weights().items():
        moved = (want[layer] - before[layer].double()).norm()
        assert moved > 1e-3
        assert (weight.double() - want[layer]).norm() < 2e-3 * moved
    # The first layer's own solve is the same in both; the next sees what the first one's projection took away.
    apart = (editor.weights()[2] - other.weights()[2]).norm() / (other.weights()[2] - before[2]).norm()
    reshaped = sphere or changes.get("method") in ("rect", "prune")
    assert apart > 1e-2 if reshaped else apart < 1e-4


_SOLVING = {name: _ORDERS[name] for name in ("alphaedit", "ridge", "memit", "memit-history", "rome")}


def _within_the_solve(editor, seen, facts):
    """Weights after the batches of ``facts``, each solved for keys ``P^½ K`` and times ``P^½`` itself."""
    config, layers = editor.config, editor.config.layers
    model = tiny.make_model("llama")
    structure = find_structure(model)
    weights = {layer: structure.down[layer].weight.double() for layer in layers}
    history = {layer: torch.zeros_like(seen["covariances"][layer]) for layer in layers}
    for i, target in enumerate(seen["targets"]):
        batch = facts[i * config.batch_size : (i + 1) * config.batch_size]
        for at, layer in enumerate(layers):
            k, values = plain.keys_and_values(
                model, editor.tokenizer, structure, batch, editor._writer.contexts, layer, layers[-1]
            )
            spared = torch.eye(k.shape[1], dtype=torch.float64)
            spared -= (1 - (1 - config.alpha) ** 0.5) * plain.principal_projector(weights[layer], config.energy_ratio)
            entering, residuals = spared @ k.double().T, (target - values).double().T / (len(layers) - at)
            delta = _solved(config, seen["covariances"][layer], history[layer], entering, residuals) @ spared
            history[layer] += entering @ entering.T
            weights[layer] = weights[layer] + delta
            structure.down[layer].weight.copy_(weights[layer])
    return weights


@pytest.mark.parametrize("changes", _SOLVING.values(), ids=_SOLVING)
def test_projected_within_the_solve(changes, make, seen):
    facts = tiny.facts(6)
    editor = make(project="solve", alpha=0.8, **changes)
    editor.edit(facts)
    want, before = _within_the_solve(editor, seen, facts), editor.original_weights()
    for layer, weight in editor.weights().items():
        moved = (want[layer] - before[layer].double()).norm()
        assert moved > 1e-3
        assert (weight.double() - want[layer]).norm() < 2e-3 * moved


def test_what_is_projected_within_a_ridge_is_the_least_in_a_norm(make, seen):
    """``tr(Δ P⁻¹ Δᵀ)``: of what lies in the principal directions 1 / (1 - α) times as much."""
    editor = make(project="solve", alpha=0.8, null_space=False, layers=(2,), batch_size=4)
    (record,) = editor.edit(tiny.facts(4)).records
    done, before = record.layers[2], editor.original_weights()[2]
    p = torch.eye(done.keys.shape[1], dtype=torch.float64) - 0.8 * plain.principal_projector(before, 0.5)
    k = done.keys.double().T
    want = torch.linalg.solve(k @ k.T + editor.config.ridge * torch.linalg.inv(p), k)  # [d, b]
    assert (done.update.right.double() - want.T).norm() < 1e-4 * want.norm()


def test_a_method_that_does_not_solve_is_not_projected_in_its_solve(make, monkeypatch):
    class Training(Method):
        trains = True

    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(Training=Training))
    with pytest.raises(ConfigError, match="project: mine:Training has no solve to project in; expected 'layer'"):
        make(method="mine:Training", project="solve").edit(tiny.facts(2))


@pytest.mark.parametrize("changes", _SOLVING.values(), ids=_SOLVING)
def test_what_is_projected_within_the_solve_still_says_what_is_asked(changes, make, seen):
    """One layer, all of the principal directions suppressed: nothing is written into them, and more of R is reached."""
    changes = changes | {"covariance_weight": 1e-3} if changes.get("method") == "memit" else changes
    missed = {}
    for project in ("layer", "solve"):
        editor = make(project=project, alpha=1.0, layers=(2,), batch_size=4, **changes)
        (record,) = editor.edit(tiny.facts(4)).records
        spared, before = record.layers[2], editor.original_weights()[2]
        inside = spared.update.right.double() @ plain.principal_projector(before, editor.config.energy_ratio)
        assert inside.norm() < 1e-5 * spared.update.right.norm()
        missed[project] = (
            spared.keys @ spared.update.right.T @ spared.update.left.T - spared.update.left.T
        ).norm() / spared.update.left.norm()
    assert missed["solve"] < 0.9 * missed["layer"]


@pytest.mark.parametrize("error", (FloatingPointError, KeyboardInterrupt))
@pytest.mark.parametrize("place", ("solve", "write"))
@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.float32), ("gpt2", torch.bfloat16)])
def test_a_batch_cut_short_leaves_no_trial_behind(family, dtype, place, error, make, monkeypatch):
    editor, undisturbed = make(family, dtype, project="batch"), make(family, dtype, project="batch")
    facts = tiny.facts(4)
    editor.edit(facts[:2])
    before, real = tiny.state(editor.model), getattr(Engine, place)

    def cut(self, layer, *args):
        if layer == 3:
            raise error
        return real(self, layer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, place, cut)
        with pytest.raises(error):
            editor.edit(facts[2:])
    assert tiny.same(editor.model, before)
    torch.manual_seed(0)
    editor.edit(facts[2:])
    undisturbed.edit(facts[:2])
    torch.manual_seed(0)
    undisturbed.edit(facts[2:])
    assert tiny.same(editor.model, tiny.state(undisturbed.model))


@pytest.mark.parametrize("sphere", (True, False), ids=("sphere", "alone"))
@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.float32), ("gpt2", torch.float32), ("llama", torch.bfloat16)]
)
def test_prune_in_copies(family, dtype, sphere, make):
    """The loop is MEMIT's without SPHERE; what is handed over is the sum of it, restrained and then projected."""
    editor = make(family, dtype, sphere=sphere, alpha=0.8, **_COPIES)
    twin = make(family, dtype, **{**_PRUNING, "method": "memit"}, sphere=False)
    facts, first = tiny.facts(6), editor.original_weights()
    with editor.finished():
        assert all(torch.equal(weight, first[layer]) for layer, weight in editor.weights().items())
    for upto in (4, 6):
        for each in (editor, twin):
            each.edit(facts[each.edits : upto])
        assert tiny.same(editor.model, tiny.state(twin.model))
        loop = tiny.state(editor.model)
        masters = {layer: state.master.double() for layer, state in editor._engine.states.items()}
        with editor.finished():
            for layer, weight in editor.weights().items():
                original = first[layer].double()
                total = _restrained(masters[layer] - original, original)
                assert (total - (masters[layer] - original)).norm() > 0.1 * total.norm()  # it restrains
                if sphere:
                    total = total - 0.8 * total @ plain.principal_projector(original, 0.5)
                close = 1e-5 if dtype == torch.float32 else 1e-2
                assert (weight.double() - original - total).norm() < close * total.norm()
            copies = tiny.state(editor.model)
            for call in (lambda: editor.edit(facts[:2]), editor.state_dict, lambda: editor.check(facts)):
                with pytest.raises(
                    ValueError, match=r"handed over; expected a call after finished\(\), or after revert"
                ):
                    call()
            with editor.finished():  # within itself it changes nothing
                editor.hand_over()
                assert tiny.same(editor.model, copies)
            assert tiny.same(editor.model, copies)
        assert tiny.same(editor.model, loop)
    editor.hand_over()
    assert tiny.same(editor.model, copies)
    editor.revert()
    assert all(torch.equal(weight, first[layer]) for layer, weight in editor.weights().items())
    editor.edit(facts[:2])


def test_what_goes_wrong_with_copies_is_taken_back(make):
    editor = make(**_COPIES)
    editor.edit(tiny.facts(2))
    loop = tiny.state(editor.model)
    with pytest.raises(KeyboardInterrupt), editor.finished():
        assert not tiny.same(editor.model, loop)
        raise KeyboardInterrupt
    assert tiny.same(editor.model, loop)
    state = {name: value.clone() for name, value in editor.state_dict().items()}
    editor.hand_over()
    editor.load_state_dict(state)
    assert tiny.same(editor.model, loop)
    editor.edit(tiny.facts(4)[2:])


def test_other_methods_hand_their_weights_over_as_they_are(make):
    editor = make()
    editor.edit(tiny.facts(2))
    before = tiny.state(editor.model)
    editor.hand_over()
    assert tiny.same(editor.model, before)
    with pytest.raises(ValueError, match="handed over"):
        editor.edit(tiny.facts(4)[2:])


def test_a_look_is_at_the_copies(make, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Nobody saw the river in the night. " * 12)
    editor, facts = make(**_COPIES), tiny.facts(4)
    editor.edit(facts)
    seen = take(editor, facts, "after", str(text), 100, lambda *_: None)
    editor.hand_over()
    copies = SphereEditor(editor.model, editor.tokenizer, editor.config)
    assert seen == take(copies, facts, "after", str(text), 100, lambda *_: None)
    editor.revert()
    assert seen != take(editor, facts, "after", str(text), 100, lambda *_: None)


@pytest.fixture
def edited(tokenizer, config, tmp_path, monkeypatch):
    """A run of so many facts with PRUNE in copies, interrupted after batch ``stop``: the model, and the folder."""
    monkeypatch.setattr(experiment, "write_report", lambda folder: (folder / "report.html").write_text("<html>"))
    text = tmp_path / "text.txt"
    text.write_text("Nobody saw the river in the night. " * 12)

    def build(name, count=10, stop=None):
        def interrupt(event):
            if event["event"] == "batch" and event["batch"] == stop:
                raise KeyboardInterrupt

        model, out = tiny.make_model("llama"), tmp_path / name
        options = RunOptions(
            *("tiny", "facts", out, str(text)),
            perplexity_tokens=100,
            checkpoint_every=2,
            curve_every=2,
            save_model=True,
        )
        try:
            experiment.run(
                model, tokenizer, tiny.places(count), config.replace(contexts=1, **_COPIES), options, interrupt
            )
        except KeyboardInterrupt:
            assert stop is not None
        return model, out

    return build


def _events(run):
    return [{k: v for k, v in event.items() if k != "seconds"} for event in run_folder.read_events(run)]


def test_a_run_in_copies_writes_the_copies(edited, tokenizer, make):
    model, run = edited("run")
    found = tiny.make_model("llama")
    switch(run, find_structure(found), "after")
    assert tiny.same(found, tiny.state(model))
    saved = type(model).from_pretrained(run / run_folder.MODEL)
    assert tiny.same(saved, tiny.state(model))
    editor = SphereEditor(
        tiny.make_model("llama"), tokenizer, EditConfig.from_run(run_folder.read_config(run)["settings"])
    )
    editor.edit(tiny.places(10))
    assert not tiny.same(editor.model, tiny.state(model))
    editor.hand_over()
    assert tiny.same(editor.model, tiny.state(model))


@pytest.mark.parametrize("stop", (1, 2, 3, 5))
def test_a_run_in_copies_goes_on_to_the_same_bits(stop, edited, tokenizer):
    """And rolled back it is as a shorter run was, on the disk and in the model."""
    whole, expected = edited("whole")
    _, run = edited("run", stop=stop)
    for _ in range(2):  # the second time it is finished
        model = tiny.make_model("llama")
        resume(model, tokenizer, run)
        assert tiny.same(model, tiny.state(whole))
    assert (run / run_folder.DELTAS).read_bytes() == (expected / run_folder.DELTAS).read_bytes()
    assert _events(run) == _events(expected)
    shorter, _ = edited("shorter", 2 * stop)
    for _ in range(2):
        model = tiny.make_model("llama")
        rollback(model, tokenizer, run, stop)
        assert tiny.same(model, tiny.state(shorter))
    model = tiny.make_model("llama")
    resume(model, tokenizer, run)
    assert tiny.same(model, tiny.state(whole))
