"""What is measured of edited weights, against the formulas written out in fp64; the bound against differences."""

from __future__ import annotations

import json
import math

import plain
import pytest
import scipy.stats
import tiny
import torch

from sphere_edit.editing.editor import SphereEditor
from sphere_edit.evaluation import weights
from sphere_edit.evaluation.metrics import SCORES
from sphere_edit.evaluation.weights import Measures, cosines, lipschitz, movement, output_square, spectrum
from sphere_edit.experiments.snapshots import _cosines
from sphere_edit.report.correlations import correlations
from sphere_kernels import LowRankUpdate
from sphere_kernels.streaming import HypersphereState

SHAPES = [(12, 30), (30, 12), (9, 9), (1, 4)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
_EVERY = {"moved_mean", "moved_max", "neurons", "weight_rank", "spectral_norm", "condition"}
_BATCH = {"step_squared", "energy_step", "lipschitz", "bound"}
_METHODS = {
    "alphaedit": {},
    "memit": {"method": "memit", "covariance_weight": 10.0},
    "rect": {"method": "rect", "covariance_weight": 10.0},
    "bf16": {"dtype": torch.bfloat16},
    "ft": {"method": "ft", "ft_steps": 3, "ft_lr": 1e-2},
}


@pytest.fixture(params=[20, 1 << 20], ids=["chunks", "whole"])
def chunked(request, monkeypatch):
    monkeypatch.setattr("sphere_kernels._common.rows.CHUNK_ELEMENTS", request.param)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _unit(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.double()
    return weight / (weight.norm(dim=1, keepdim=True) + 1e-8)


def _k(weight: torch.Tensor) -> float:
    """The constant of the lemma, its sums written out."""
    rows, whole = _unit(weight), 0.0
    for k in range(len(rows)):
        whole += sum(float((rows[k] - rows[j]).norm()) ** -3 for j in range(len(rows)) if j != k) ** 2
    return 4 * math.sqrt(whole)


def _masters(editor: SphereEditor) -> dict[int, torch.Tensor]:
    return {layer: editor.state_dict()[f"engine.weight.{layer}.master"].clone() for layer in editor.config.layers}


@pytest.mark.parametrize("changes", _METHODS.values(), ids=_METHODS)
def test_events_hold_what_the_weights_say(changes, make):
    """After each batch, from the weights before all edits, before it and after it, and from keys of general text."""
    editor, facts = make(**changes), tiny.facts(4)
    editor.prepare()
    covariances = editor._engine.measures._covariances
    assert (set(covariances) == set(editor.config.layers)) is (changes.get("method") != "ft")
    weights, events = [_masters(editor)], []
    for batch in (facts[:2], facts[2:]):
        events += editor.edit(batch).events
        weights.append(_masters(editor))
    seen = {(event["batch"], event["layer"]): event for event in events if event["event"] == "energy"}
    assert len(seen) == 3 * len(editor.config.layers)
    for (batch, layer), event in seen.items():
        assert set(event) >= _EVERY and (set(event) >= _BATCH) is bool(batch)
        assert ("output_change" in event) is bool(batch and covariances)
        now, first = weights[batch][layer].double(), weights[0][layer].double()
        moved = (_unit(now) - _unit(first)).norm(dim=1)
        assert event["moved_mean"] == pytest.approx(float(moved.mean()), rel=1e-9)
        assert event["moved_max"] == pytest.approx(float(moved.max()), rel=1e-9)
        values = torch.linalg.svdvals(now)
        assert (event["neurons"], event["weight_rank"]) == (tiny.HIDDEN, int(torch.linalg.matrix_rank(now)))
        assert event["spectral_norm"] == pytest.approx(float(values[0]), rel=1e-9)
        assert event["condition"] == pytest.approx(float(values[0] / values[-1]), rel=1e-9)
        if not batch:
            continue
        before = weights[batch - 1][layer].double()
        step = plain.energy(now) - plain.energy(before)
        assert event["step_squared"] == pytest.approx(float((_unit(now) - _unit(before)).square().sum()), rel=1e-9)
        assert event["energy_step"] == pytest.approx(step, rel=1e-3, abs=1e-4) and abs(step) > 1e-3
        assert event["lipschitz"] == pytest.approx(_k(before), rel=1e-6)
        assert event["bound"] == (event["energy_step"] / event["lipschitz"]) ** 2 < event["step_squared"]
        if covariances:
            change, of = now - before, covariances[layer]
            share = torch.trace(change @ of @ change.T) / torch.trace(first @ of @ first.T)
            assert event["output_change"] == pytest.approx(float(share), rel=1e-4)


def test_every_few_batches_or_never(make):
    def measured(every):
        events = make(measure_every=every).edit(tiny.facts(6)).events
        return {e["batch"] for e in events if e["event"] == "energy" and _EVERY & set(e)}

    assert [measured(every) for every in (0, 1, 2)] == [set(), {0, 1, 2, 3}, {0, 2}]
    editor = make(measure_every=0)
    editor.prepare()
    assert not editor._engine.measures._covariances


def test_a_run_that_goes_on_says_the_same(make):
    whole, begun, resumed, replayed = (make(refresh_every=2) for _ in range(4))
    facts = tiny.facts(6)
    wanted = [e for e in whole.edit(facts).events if e["event"] == "energy" and e["batch"] == 3]
    done = begun.edit(facts[:4])
    resumed.load_state_dict({name: value.clone() for name, value in begun.state_dict().items()})
    for record in done.records:
        replayed.replay(record)
    for editor in (resumed, replayed):
        assert [e for e in editor.edit(facts[4:]).events if e["event"] == "energy" and e["batch"]] == wanted


@pytest.mark.parametrize("s", [0.0, 2.0])
def test_the_bound_is_about_s_1(s, make):
    events = [e for e in make(energy_s=s).edit(tiny.facts(2)).events if e["event"] == "energy" and e["batch"]]
    assert all("output_change" in e and "step_squared" in e for e in events)
    assert not any({"bound", "lipschitz", "energy_step"} & set(e) for e in events)


@shapes
@pytest.mark.parametrize("columns", [4, 2048])
def test_spectrum(shape, columns, monkeypatch):
    monkeypatch.setattr(weights, "_COLUMNS", columns)
    weight = _random(*shape).float()
    values = torch.linalg.svdvals(weight.double())
    found = spectrum(weight)
    assert found["weight_rank"] == min(shape) == int(torch.linalg.matrix_rank(weight))
    assert found["spectral_norm"] == pytest.approx(float(values[0]), rel=1e-12)
    assert found["condition"] == pytest.approx(float(values[0] / values[-1]), rel=1e-9)


@pytest.mark.parametrize(
    ("smallest", "rank", "told"), [(1e-2, 9, True), (1e-4, 9, True), (2e-6, 8, True), (5e-7, 8, False), (0.0, 8, False)]
)
def test_spectrum_of_what_is_nearly_singular(smallest, rank, told):
    """Far below what the Gram matrix of an fp32 product would show; and no figure where there is none to be had."""
    left, right = torch.linalg.qr(_random(9, 9)).Q, torch.linalg.qr(_random(25, 9, seed=1)).Q
    values = torch.cat([torch.linspace(3.0, 1.0, 8, dtype=torch.float64), torch.tensor([3 * smallest])])
    weight = (left * values) @ right.T
    found = spectrum(weight)
    assert found["weight_rank"] == rank
    assert (found["condition"] is not None) is told
    if told:
        assert found["condition"] == pytest.approx(1 / smallest, rel=1e-2)
    assert spectrum(torch.zeros(3, 5)) == {"weight_rank": 0, "spectral_norm": 0.0, "condition": None}


@shapes
def test_movement(shape, chunked):
    weight, other = _random(*shape), _random(*shape, seed=1)
    torch.testing.assert_close(movement(weight, other), (_unit(weight) - _unit(other)).norm(dim=1))
    assert float(movement(weight, 3 * weight).max()) < 1e-7  # lengths do not count
    assert movement(weight.bfloat16(), weight.bfloat16().float()).tolist() == [0.0] * shape[0]


@shapes
def test_output_square_is_the_mean_over_keys(shape, chunked):
    n, d = shape
    keys, update = _random(50, d), LowRankUpdate(_random(n, 3, seed=1).float(), _random(3, d, seed=2).float())
    covariance, dense = keys.T @ keys / 50, update.left @ update.right
    wanted = float((keys @ dense.double().T).square().sum(1).mean())
    assert output_square(dense, covariance) == pytest.approx(wanted, rel=1e-9)
    assert output_square(update, covariance) == pytest.approx(wanted, rel=1e-5)


def _energy(points: torch.Tensor) -> torch.Tensor:
    distances = (points[:, None] - points[None]).norm(dim=2) + torch.eye(len(points), dtype=torch.float64)
    return distances.reciprocal().sum() - len(points)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (40, 3)], ids=str)
def test_lipschitz_bounds_small_steps_in_any_direction(shape):
    weight = _unit(_random(*shape))
    constant = lipschitz(weight)
    assert constant == pytest.approx(_k(weight), rel=1e-9)
    points = weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_energy(points), points)
    assert float(gradient.norm()) < constant
    tangent = gradient - (gradient * weight).sum(1, keepdim=True) * weight
    for direction in (tangent, -tangent, *(_random(*shape, seed=seed) for seed in range(5))):
        moved = weight + 1e-4 / float(direction.norm()) * direction
        change, step = plain.energy(moved) - plain.energy(weight), float((_unit(moved) - weight).norm())
        assert abs(change) <= constant / 2 * step  # on the sphere half of it does
    steepest = weight + 1e-5 / float(tangent.norm()) * tangent
    change, step = plain.energy(steepest) - plain.energy(weight), float((_unit(steepest) - weight).norm())
    assert change == pytest.approx(step * float(tangent.norm()), rel=1e-2)


def test_lipschitz_has_its_factor_from_opposite_neurons():
    """Off the sphere the constant is reached, so no smaller factor would do."""
    pair = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    points = pair.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_energy(points), points)
    assert float(gradient.norm()) == pytest.approx(lipschitz(pair), rel=1e-6)


def test_the_bound_is_of_first_order_only():
    """Neurons that nearly meet change the energy by more than the constant from before allows."""
    before, after = torch.eye(2, dtype=torch.float64), torch.tensor([[1.0, 0.0], [1.0, 1e-2]], dtype=torch.float64)
    change = plain.energy(after) - plain.energy(before)
    assert change > 10 * lipschitz(before) * float(movement(after, before).norm())


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)], ids=str)
def test_equal_zero_and_lone_neurons_leave_json(shape, config):
    weight = _random(*shape).float()
    weight[1], weight[2] = weight[0], 0.0
    for start in (weight, weight[:1].clone()):
        state, original = HypersphereState(start.clone(), alpha=0.0), start.clone()
        measured = Measures(config, {3: original}, {3: torch.eye(shape[1], dtype=torch.float64)})
        assert set(measured.of_weight(3, original, 0)) == _EVERY
        before = {name: value.clone() for name, value in state.state_dict().items()}
        update = LowRankUpdate(_random(len(start), 2).float(), _random(2, shape[1], seed=1).float())
        state.update_(update.left, update.right)
        event = measured.of_batch(3, 1, before, state, update)
        assert json.loads(json.dumps(event, allow_nan=False)) == event and set(event) >= _BATCH
        if len(start) == 1:
            assert event["bound"] is None and event["condition"] == pytest.approx(1.0)
        else:
            assert event["condition"] is not None and event["lipschitz"] > 1e18 and event["bound"] < 1e-10


def test_a_weight_that_stays_singular_has_no_condition(config):
    """A neuron that no update reaches stays zero."""
    weight = _random(6, 10).float()
    weight[2] = 0.0
    state, original = HypersphereState(weight.clone(), alpha=0.0), weight.clone()
    before = {name: value.clone() for name, value in state.state_dict().items()}
    update = LowRankUpdate(_random(6, 2).float(), _random(2, 10, seed=1).float())
    update.left[2] = 0.0
    state.update_(update.left, update.right)
    event = Measures(config, {3: original}, {}).of_batch(3, 1, before, state, update)
    assert (event["condition"], event["weight_rank"]) == (None, 5) and event["step_squared"] > 0
    json.dumps(event, allow_nan=False)


@shapes
def test_cosines(shape, chunked):
    weight = _random(*shape)
    n = shape[0]
    neurons = torch.arange(0, n, 2)
    found, mean = cosines(weight.float(), neurons)
    dense = _unit(weight) @ _unit(weight).T
    torch.testing.assert_close(found, dense[neurons][:, neurons], atol=1e-6, rtol=0)
    off = dense[~torch.eye(n, dtype=torch.bool)]
    assert math.isnan(mean) if n == 1 else mean == pytest.approx(float(off.abs().mean()), rel=1e-5)


def test_looks_show_the_same_neurons(make):
    editor = make()
    before, again = list(_cosines(editor, "before")), list(_cosines(make(), "before"))
    assert before == again and [e["layer"] for e in before] == [1, 2, 3]
    editor.edit(tiny.facts(2))
    after = list(_cosines(editor, "after"))
    for was, now in zip(before, after, strict=True):
        n = len(now["neurons"])
        assert was["neurons"] == now["neurons"] == sorted(set(now["neurons"])) and n == 32
        unit = _unit(editor.weights()[now["layer"]])[now["neurons"]]
        assert [len(row) for row in now["cosines"]] == list(range(n - 1, -1, -1))
        for i, row in enumerate(now["cosines"]):
            assert row == pytest.approx((unit[i + 1 :] @ unit[i]).tolist(), abs=6e-5)
        assert was["cosines"] != now["cosines"] and was["mean_abs"] != now["mean_abs"]
    json.dumps(before + after, allow_nan=False)


def _curve(energies: list[list[float]], scores: dict[str, list[float | None]]) -> list[dict]:
    """Events: energies of two layers at batches 0, 1, …, scores from batch 1 on."""
    events: list[dict] = [
        {"event": "energy", "batch": batch, "edits": 2 * batch, "layer": layer, "energy": energy}
        for batch, layers in enumerate(energies)
        for layer, energy in enumerate(layers)
    ]
    for batch in range(1, len(energies)):
        found = {n: {"mean": v[batch - 1], "stderr": None, "n": 1} for n, v in scores.items()}
        events.append({"event": "curve", "batch": batch, "edits": 2 * batch, "scores": found})
    return events


def test_correlations():
    """The sum falls, rises and falls back while what it has changed only grows: two layers may cancel."""
    energies = [[10.0, 20.0], [11.0, 19.5], [14.0, 18.0], [15.0, 12.0], [17.0, 8.0], [17.5, 7.0]]
    scores: dict[str, list[float | None]] = {
        "efficacy_success": [0.9, 0.8, 0.7, 0.5, 0.4],
        "generalization_success": [0.5, 0.9, 0.4, 0.8, 0.1],
        "specificity_success": [0.5, None, 0.4, 0.8, None],
        "specificity_accuracy": [0.5] * 5,
    }
    rows = {(row["energy"], row["score"]): row for row in correlations(_curve(energies, scores))}
    assert len(rows) == 2 * len(SCORES)
    sums, changes = [30.5, 32.0, 27.0, 25.0, 24.5], [1.5, 6.0, 13.0, 19.0, 20.5]
    for name in ("efficacy_success", "generalization_success"):
        for kind, values in (("sum", sums), ("change", changes)):
            ranks = [[sorted(of).index(v) for v in of] for of in (values, scores[name])]
            squares = sum((a - b) ** 2 for a, b in zip(*ranks, strict=True))
            row = rows[kind, name]
            assert row["rho"] == pytest.approx(1 - 6 * squares / (5 * 24))
            assert row["p"] == pytest.approx(scipy.stats.spearmanr(values, scores[name]).pvalue)
            assert row["n"] == 5 and row["why"] is None
    assert rows["change", "efficacy_success"]["rho"] == pytest.approx(-1) != rows["sum", "efficacy_success"]["rho"]
    for name, n, why in (
        ("specificity_success", 3, "fewer than 4 points"),
        ("specificity_accuracy", 5, "the score does not vary"),
        ("efficacy_accuracy", 0, "fewer than 4 points"),
    ):
        assert {"n": n, "rho": None, "p": None, "why": why}.items() <= rows["sum", name].items()


def test_correlations_of_other_runs():
    energies = [[10.0], [11.0], [11.0], [11.0], [11.0]]
    rows = correlations(_curve(energies, {"efficacy_success": [0.1, 0.2, 0.3, 0.4]}))
    assert {row["why"] for row in rows if row["score"] == "efficacy_success"} == {"the energy does not vary"}
    events = _curve([*energies, [12.0]], {"efficacy_success": [0.1, 0.2, 0.3, 0.4, 0.5]})
    assert correlations([e for e in events if e["event"] == "energy"]) == correlations([]) == []
    cut = [e for e in events if not (e["event"] == "energy" and e["batch"] in (0, 2))]
    by_energy = {row["energy"]: row for row in correlations(cut) if row["score"] == "efficacy_success"}
    assert by_energy["change"]["n"] == by_energy["sum"]["n"] == 0  # the beginning says which layers there are
