"""The engine: edited weights, energies, directions and the method's history, updated batch by batch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from sphere_edit.config import EditConfig
from sphere_edit.data.records import LayerRecord, ReplayError
from sphere_edit.evaluation.weights import Measures
from sphere_edit.events import Event
from sphere_edit.files import tensor_sha256
from sphere_edit.methods import make_method
from sphere_edit.methods.revive import Revive
from sphere_edit.state import add_prefix, strip_prefix
from sphere_edit.targets.gradient import Lifelong
from sphere_edit.updates import Update, factors, moved, norm
from sphere_kernels import LowRankUpdate
from sphere_kernels.streaming import HypersphereState


class Clock(dict[str, float]):
    """Seconds by stage."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Add the time since the last lap to ``stage``."""
        now = time.perf_counter()
        self[stage] = self.get(stage, 0.0) + now - self._at
        self._at = now


class Engine:
    """Solves, projects (SPHERE, then REVIVE if set) and writes; keeps a batch whole or undoes the batch.

    Args:
        weights: ``{layer: [n, d]}``, the model's own storage; written in place.
        covariances: ``{layer: [d, d]}`` fp64, of the keys.
        config: the method's settings and SPHERE's.
        originals: the weights before all edits.

    Raises:
        ValueError: as `make_method`, `Revive` and `HypersphereState` raise it.
    """

    def __init__(
        self,
        weights: Mapping[int, Tensor],
        covariances: Mapping[int, Tensor],
        config: EditConfig,
        originals: Mapping[int, Tensor],
    ) -> None:
        self.method = make_method(config, covariances)
        self._originals, self._projects_keys = originals, config.project == "solve"
        self._protected = {i: Revive(w, config.revive, i) for i, w in originals.items()} if config.revive else {}
        self.lifelong = Lifelong(weights if config.targets == "gradient" and not self.method.trains else {}, config)
        self.measures = Measures(config, originals, covariances)
        self.states = {
            layer: HypersphereState(
                weight,
                config.energy_s,
                config.energy_ratio,
                _alpha(config) if config.sphere and not self.method.projects else 0.0,
                config.refresh_every,
                config.subspace,
                directions=config.directions,
            )
            for layer, weight in weights.items()
        }
        self.batches = 0
        self._whole = True
        self._undo: dict[int, dict[str, Tensor]] = {}
        self._before: dict[int, Tensor] = {}  # weights before the batch, while an attempt is in the model
        self._tried: dict[int, tuple[Update, Event]] = {}

    def check_whole(self) -> None:
        """Raise RuntimeError if a batch has been added to the history in part only."""
        if not self._whole:
            raise RuntimeError(
                "an error or interrupt came while a batch was being added to the history: "
                "revert() or load_state_dict() first"
            )

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Make the writes within the block the next batch; on an error or interrupt undo all writes bit for bit."""
        self.check_whole()
        try:
            yield
            self._whole = False
            if self._undo:  # empty in a batch that is left out: nothing was solved
                self.method.commit()
                self.lifelong.commit()
            self.batches += 1
            self._whole = True
        except BaseException:
            self._untry()
            for layer, state in self._undo.items():
                self.states[layer].load_state_dict(state)
            self.method.rollback()
            self.lifelong.rollback()
            raise
        finally:
            self._undo, self._before, self._tried = {}, {}, {}

    def solve(self, layer: int, keys: Tensor, residuals: Tensor, clock: Clock) -> LowRankUpdate:
        """Solve one layer's update for keys ``[b, d]`` and residuals ``[b, n]``; call within `batch`.

        Raises:
            FloatingPointError: keys, residuals or update are not finite.
        """
        entering = self._entering(layer, keys)
        clock.lap("project")
        solved = self.method.solve(layer, entering, residuals)
        check_finite(f"layer {layer}: the update", solved.left, solved.right)
        clock.lap("solve")
        return solved

    @contextmanager
    def tried(self, layer: int, update: LowRankUpdate) -> Iterator[None]:
        """Add the whole update to the model's weight within the block, then restore the weight bit for bit."""
        state = self.states[layer]
        before = state.weight.clone()
        try:
            state.weight.copy_(state.master + update.left @ update.right)
            yield
        finally:
            state.weight.copy_(before)

    def write(
        self, layer: int, keys: Tensor, residuals: Tensor, solved: LowRankUpdate, clock: Clock
    ) -> tuple[LayerRecord, Event]:
        """Reshape, project and add the update that `solve` found for ``keys`` and ``residuals``; call within `batch`.

        Returns:
            The layer's record and the fields of its energy event.
        """
        update, event = self._shaped(layer, residuals, solved, clock)
        return self._put(layer, keys, update, event, clock)

    def add(self, layer: int, keys: Tensor, solved: Update, clock: Clock) -> tuple[LayerRecord, Event]:
        """Project and add an update of one layer; call within `batch`. ``keys`` as for `solve`."""
        return self._put(layer, keys, *self._projected(layer, solved, clock), clock)

    @torch.no_grad()
    def attempt(self, asked: Mapping[int, tuple[Tensor, Tensor]], clock: Clock) -> None:
        """Write trial updates into the model; states, directions and history do not change.

        `settle` makes the last attempt final. The next attempt undoes this one, and so does an error in `batch`.

        Args:
            asked: ``{layer: (keys [b, d], residuals [b, n])}``, all layers at once.
        """
        self._untry()
        found = {}
        for layer, (keys, residuals) in asked.items():
            solved = self.solve(layer, keys, residuals, clock)
            found[layer] = self._shaped(layer, residuals, solved, clock)
        for layer, (update, _) in found.items():
            weight = self.states[layer].weight
            self._before[layer] = weight.clone()
            weight.copy_(self.states[layer].updated(*factors(update)))
        self._tried = found
        clock.lap("update")

    @torch.no_grad()
    def settle(self, keys: Mapping[int, Tensor], clock: Clock) -> dict[int, tuple[LayerRecord, Event]]:
        """Make the last attempt final; the bits of the model's weights stay.

        Args:
            keys: ``{layer: [b, d]}``, the batch's keys for the history.
        """
        self._untry()
        done = {}
        for layer, (update, event) in self._tried.items():
            self.method.remember(layer, self._entering(layer, keys[layer]))
            done[layer] = self._put(layer, keys[layer], update, event, clock)
        return done

    def _untry(self) -> None:
        for layer, weight in self._before.items():
            self.states[layer].weight.copy_(weight)
        self._before = {}

    def _shaped(self, layer: int, residuals: Tensor, solved: LowRankUpdate, clock: Clock) -> tuple[Update, Event]:
        """Reshape and project a solved update; returns the update to add and fields of the layer's event."""
        shaped = self.method.reshape(layer, solved, self.states[layer].master)
        clock.lap("solve")
        update, event = self._projected(layer, shaped, clock)
        return update, event | {"residual": float(residuals.norm(dim=1).mean())}

    def _projected(self, layer: int, solved: Update, clock: Clock) -> tuple[Update, Event]:
        state = self.states[layer]
        update = (
            LowRankUpdate(solved.left.float(), state.project(solved.right).float())
            if isinstance(solved, LowRankUpdate)
            else state.project(solved).float()
        )
        before, projected = norm(solved), norm(update)
        suppressed = {"suppressed": 1 - (projected / before) ** 2 if before else 0.0}
        if self._protected:
            update = self._protected[layer](update)
            suppressed["protected"] = 1 - (norm(update) / projected) ** 2 if projected else 0.0
        update = self.method.restrain(layer, update, state.master, self._originals[layer])
        event: Event = {"update_norm": norm(update), **suppressed}
        if state.alpha:
            event |= {"rank": int(state.rank), "energy_ratio": float(state.held_ratio)}
        if state.renewal:
            event |= {"directions": state.renewal, "energy_bound": float(state.held_bound)}
        clock.lap("project")
        return update, event

    def _put(self, layer: int, keys: Tensor, update: Update, event: Event, clock: Clock) -> tuple[LayerRecord, Event]:
        state = self.states[layer]
        self._add(layer, update)
        event = self.energy(layer) | event
        event["weight_norm"] = self.weight_norm(layer)
        clock.lap("update")
        event |= self.measures.of_batch(layer, self.batches + 1, self._undo[layer], state, update)
        clock.lap("measure")
        gradients = self.lifelong.seen(layer)
        gradients = None if gradients is None else gradients.cpu()
        record = LayerRecord(keys.float().cpu(), moved(update, "cpu"), tensor_sha256(state.master), gradients)
        clock.lap("record")
        return record, event

    def replay(self, layer: int, record: LayerRecord) -> None:
        """Add an earlier run's recorded update and remember the keys, unless the record is empty; call within `batch`.

        Raises:
            ReplayError: the record lacks gradients, or the weight's bits then differ from the earlier run's.
        """
        state = self.states[layer]
        device = state.master.device
        if not record.empty:
            if self.lifelong.follows(layer):
                if record.gradients is None:
                    raise ReplayError(f"layer {layer}: the record has no gradients, which the running statistics take")
                self.lifelong.see(layer, record.keys.to(device), record.gradients.to(device))
            self.method.remember(layer, self._entering(layer, record.keys.to(device)))
            self._add(layer, moved(record.update, device))
        found = tensor_sha256(state.master)
        if found != record.sha256:
            raise ReplayError(
                f"layer {layer}: the weight after this batch has SHA-256 {found[:16]}…, not {record.sha256[:16]}…; "
                "only the same machine, thread count and versions give the same bits"
            )

    def nothing(self, layer: int) -> LayerRecord:
        """The record of a layer in a batch that is left out; states and history stay."""
        n, d = (master := self.states[layer].master).shape
        keys, left, right = (torch.empty(shape, dtype=torch.float32) for shape in ((0, d), (n, 0), (0, d)))
        return LayerRecord(keys, LowRankUpdate(left, right), tensor_sha256(master))

    def finished(self, layer: int) -> Tensor:
        """The method's final weight of a layer, ``[n, d]``."""
        return self.method.finish(layer, self.states[layer].master, self._originals[layer])

    def energy(self, layer: int) -> dict[str, float]:
        state = self.states[layer]
        return {"energy": float(state.energy), "excess": float(state.excess)}

    def weight_norm(self, layer: int) -> float:
        """Frobenius norm of the weight."""
        return float(self.states[layer].gram.diagonal().double().sum().sqrt())

    def state_dict(self) -> dict[str, Tensor]:
        """All state that later batches depend on, by reference."""
        found = add_prefix("method", self.method.state_dict())
        for layer, state in self.states.items():
            found |= add_prefix(f"weight.{layer}", state.state_dict())
        found |= add_prefix("lifelong", self.lifelong.state_dict())
        return found | {"batches": torch.tensor(self.batches)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state_dict`, possibly of another process.

        Raises:
            ValueError: the names do not fit; nothing is changed.
            TypeError, ValueError: a tensor does not fit; `check_whole` refuses until a state has been restored.
        """
        expected, found = sorted(_kinds(self.state_dict())), sorted(_kinds(state))
        if expected != found:
            raise ValueError(f"state must hold {expected} as this editor's does, got {found}")
        self._whole = False
        self.method.load_state_dict(strip_prefix("method", state))
        self.lifelong.load_state_dict(strip_prefix("lifelong", state))
        for layer, own in self.states.items():
            own.load_state_dict(strip_prefix(f"weight.{layer}", state))
        self.batches = int(state["batches"])
        self._whole = True

    def _entering(self, layer: int, keys: Tensor) -> Tensor:
        """The keys ``[b, d]`` that the method solves for, projected with ``project: solve``."""
        return self.states[layer].project(keys).to(keys.dtype) if self._projects_keys else keys

    def _add(self, layer: int, update: Update) -> None:
        state = self.states[layer]
        self._undo[layer] = {name: value.clone() for name, value in state.state_dict().items()}
        state.update_(*factors(update))


def _alpha(config: EditConfig) -> float:
    """α of one projection. ``project: solve`` projects twice, the keys and the update, each with a smaller α."""
    return 1 - (1 - config.alpha) ** 0.5 if config.project == "solve" else config.alpha


def _kinds(state: Mapping[str, Tensor]) -> set[str]:
    """Prefixes of a state's names; the last parts vary, with the form of a history and the presence of a basis."""
    return {name.rpartition(".")[0] for name in state}


def check_finite(what: str, *tensors: Tensor) -> None:
    """Raise FloatingPointError if a tensor holds NaN or infinity."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise FloatingPointError(f"{what} holds NaN or infinity; the weights are left as they were")
