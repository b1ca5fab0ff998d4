"""The editing loop: values, then layer by layer keys, solve, projection, write."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphere_edit.config import EditConfig, auto_layers, preset
from sphere_edit.contexts import generate_contexts
from sphere_edit.covariance import key_covariances
from sphere_edit.keys import LayerPass
from sphere_edit.methods import Method, check_method, make_method
from sphere_edit.models import cache_dir
from sphere_edit.replay import check_replay, frozen
from sphere_edit.requests import EditRequest, as_requests, batches, check_batches
from sphere_edit.structure import ModelStructure, check_weights_finite, find_structure
from sphere_edit.text import text_path
from sphere_edit.tokens import check_fits, check_tokenizer, encode
from sphere_edit.values import optimise_values
from sphere_kernels import (
    LowRankUpdate,
    PrincipalDirections,
    apply_projected_update_,
    hyperspherical_energy,
    orthogonal_energy,
    principal_directions,
    sparse_projection,
)

Event = dict[str, Any]


@dataclass
class EditResult:
    """What a call of `SphereEditor.edit` did.

    Args:
        requests: the facts edited, in order.
        updates: per edited layer the projected updates in the order they were added, one a batch, fp32 on the CPU.
        events: what happened, as written to ``metrics.jsonl``.
    """

    requests: list[EditRequest]
    updates: dict[int, list[LowRankUpdate]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)


class SphereEditor:
    """Edit facts of a Hugging Face causal LM in sequence while its hyperspherical energy is held.

    The editor owns the history of its edits; use one editor for one model. Everything is checked before a weight is
    touched, and a batch is written whole or not at all: an error or interrupt restores the weights it found.

    Args:
        model: a causal LM (``AutoModelForCausalLM``); weights in fp16, bf16, fp32 or fp64, all in memory.
        tokenizer: its fast tokenizer.
        config: an `EditConfig` or the name of a preset.
        cache: folder for the key covariances; by default inside ``SPHERE_EDIT_CACHE``.
        on_event: called with every event as it happens.
        on_progress: called with (what, done, total) during the long steps.

    Raises:
        StructureError, ConfigError, ValueError: the model, the layers or a setting does not fit.

    Determinism: on the CPU the same model, requests, settings, seed, thread count and machine give the same weights
    bit for bit.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: EditConfig | str = "auto",
        *,
        cache: Path | None = None,
        on_event: Callable[[Event], None] | None = None,
        on_progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        config = preset(config) if isinstance(config, str) else config
        self.structure: ModelStructure = find_structure(model)
        if not config.layers:
            config = config.replace(layers=auto_layers(len(self.structure.blocks)))
        check_method(config)
        check_tokenizer(tokenizer)
        self.structure.check_layers(config.layers)
        check_weights_finite(model)
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self._cache = cache if cache is not None else cache_dir() / "covariance"
        self.on_event = on_event or (lambda event: None)
        self._on_progress = on_progress or (lambda what, done, total: None)
        self._original = {layer: weight.clone() for layer, weight in self.weights().items()}
        self._method: Method | None = None
        self._contexts: list[str] = []
        self._events: list[Event] = []
        self._directions: dict[int, PrincipalDirections] = {}
        self._batches = self._edits = 0

    def edit(self, requests: Iterable[EditRequest | Mapping[str, Any]]) -> EditResult:
        """Edit the facts in batches of ``batch_size``, after all earlier ones.

        Raises:
            RequestError, ValueError: a request that cannot be edited; nothing has been touched then.
        """
        todo = self.check(requests)
        result = EditResult(todo, {layer: [] for layer in self.config.layers}, self._events)
        if not todo:
            return result
        self.prepare()
        with frozen(self.model):
            parts = batches(todo, self.config.batch_size)
            for i, batch in enumerate(parts):
                self._on_progress("batches", i, len(parts))
                self._edit_batch(batch, result)
            self._on_progress("batches", len(parts), len(parts))
        self._events = []
        return result

    def prepare(self) -> None:
        """What is needed once before the first edit: a check of the model's parts, context prefixes, key covariances,
        the method's state, and the energies as they are. `edit` calls it; call it to meet its errors early."""
        if self._method is None:
            with frozen(self.model):
                self._prepare()

    def check(self, requests: Iterable[EditRequest | Mapping[str, Any]]) -> list[EditRequest]:
        """Everything about the requests that can be known before editing; raises as `edit` does, changes nothing."""
        if torch.is_inference_mode_enabled():
            raise ValueError("editing needs gradients; expected to be called outside torch.inference_mode()")
        self._check_unmoved()
        todo = as_requests(requests)
        check_batches(todo, self.config.batch_size)
        text_path(self.config.covariance_text)
        before = 2 * self.config.context_length + 8 if self.config.contexts else 0
        for request in todo:
            row = encode(self.tokenizer, request.prompt, request.subject, request.target_new)
            check_fits(self.model, row, request.text, before)
        return todo

    @torch.no_grad()
    def revert(self) -> None:
        """Put the weights back exactly as the editor found them, and forget all edits."""
        self._check_unmoved()
        for layer, weight in self.weights().items():
            weight.copy_(self._original[layer])
        self._method, self._batches, self._edits = None, 0, 0
        self._directions, self._events = {}, []

    def energy(self, layer: int) -> dict[str, float]:
        """Hyperspherical energy of an edited weight now, and its excess over orthogonal rows."""
        weight, s = self.structure.down[layer].weight, self.config.energy_s
        energy = float(hyperspherical_energy(weight, s))
        return {"energy": energy, "excess": energy - orthogonal_energy(weight.shape[0], s)}

    def original_weights(self) -> dict[int, Tensor]:
        """The edited weights ``[n, d]`` as they were before the first edit."""
        return dict(self._original)

    def weights(self) -> dict[int, Tensor]:
        """The edited weights ``[n, d]`` as they are; the model's own storage."""
        return {layer: self.structure.down[layer].weight for layer in self.config.layers}

    def _check_unmoved(self) -> None:
        for layer, weight in self.weights().items():
            original = self._original[layer]
            if weight.dtype != original.dtype or weight.device != original.device:
                raise ValueError(
                    f"layer {layer}: the weight is {weight.dtype} on {weight.device}, but was {original.dtype} on "
                    f"{original.device} when the editor was made; make a new editor after moving or casting a model"
                )

    def _emit(self, event: str, **values: Any) -> None:
        record = {"event": event, **values}
        self._events.append(record)
        self.on_event(record)

    def _prepare(self) -> None:
        config, start = self.config, time.perf_counter()
        check_replay(self.model, self.structure, encode(self.tokenizer, "The capital of France is").ids)
        self._contexts = generate_contexts(
            self.model, self.tokenizer, config.contexts, config.context_length, config.seed
        )
        covariances = key_covariances(
            self.model,
            self.tokenizer,
            self.structure,
            config.layers,
            config,
            self._cache,
            lambda done, total: self._on_progress("covariance of keys", done, total),
        )
        self._method = make_method(config, covariances)
        ranks = getattr(self._method, "null_space_rank", {})
        self._emit(
            "prepared",
            contexts=self._contexts,
            null_space_rank={str(layer): rank for layer, rank in ranks.items()},
            seconds=time.perf_counter() - start,
        )
        for layer in config.layers:
            self._emit("energy", batch=0, edits=0, layer=layer, **self.energy(layer))

    def _edit_batch(self, batch: Sequence[EditRequest], result: EditResult) -> None:
        assert self._method is not None
        found = {layer: weight.clone() for layer, weight in self.weights().items()}
        try:
            updates = self._write_batch(batch)
        except BaseException:
            for layer, weight in self.weights().items():
                weight.copy_(found[layer])
            self._method.rollback()
            raise
        self._method.commit()
        self._batches += 1
        self._edits += len(batch)
        for layer, update in updates.items():
            result.updates[layer].append(update)

    def _write_batch(self, batch: Sequence[EditRequest]) -> dict[int, LowRankUpdate]:
        config, layers = self.config, self.config.layers
        assert self._method is not None
        start = time.perf_counter()
        values = optimise_values(
            self.model,
            self.tokenizer,
            self.structure,
            batch,
            self._contexts,
            config,
            layers[-1],
            lambda done, total: self._on_progress("values", done, total),
        )
        clock = {"values": time.perf_counter() - start, "keys": 0.0, "solve": 0.0, "energy": 0.0}
        number, edits = self._batches + 1, self._edits + len(batch)
        updates, start = {}, time.perf_counter()
        walk = LayerPass(self.model, self.tokenizer, self.structure, batch, self._contexts, layers)
        for i, layer in enumerate(layers):
            walk.advance(layer)
            keys = walk.keys()
            residuals = (values.target - walk.values()) / (len(layers) - i)
            start = _lap(clock, "keys", start)
            solved = self._method.solve(layer, keys, residuals)
            directions = self._layer_directions(layer)
            update = solved if directions is None else sparse_projection(solved, directions, config.alpha)
            weight = self.structure.down[layer].weight
            _add(weight, update)
            updates[layer] = LowRankUpdate(update.left.cpu(), update.right.cpu())
            start = _lap(clock, "solve", start)
            self._emit(
                "energy",
                batch=number,
                edits=edits,
                layer=layer,
                **self.energy(layer),
                **_movement(solved, update, directions),
                residual=float(residuals.norm(dim=1).mean()),
                weight_norm=float(weight.float().norm()),
            )
            start = _lap(clock, "energy", start)
        self._emit(
            "batch",
            batch=number,
            edits=edits,
            size=len(batch),
            loss=float(values.loss.mean()),
            nll=float(values.nll.mean()),
            steps=float(values.steps.float().mean()),
            seconds=clock,
        )
        return updates

    def _layer_directions(self, layer: int) -> PrincipalDirections | None:
        """The principal directions to keep out of, renewed as the settings say; None without SPHERE."""
        config = self.config
        if not config.sphere:
            return None
        if config.subspace == "pretrained":
            if layer not in self._directions:
                self._directions[layer] = principal_directions(self._original[layer], config.energy_ratio)
        elif layer not in self._directions or self._batches % config.refresh_every == 0:
            self._directions[layer] = principal_directions(self.structure.down[layer].weight, config.energy_ratio)
        return self._directions[layer]


def _add(weight: Tensor, update: LowRankUpdate) -> None:
    """Add a finished update; nothing is left to project."""
    if not (torch.isfinite(update.left).all() and torch.isfinite(update.right).all()):
        raise FloatingPointError("the solved update holds NaN or Inf; the weights are left as they were")
    apply_projected_update_(weight, update, update.right.new_zeros(weight.shape[1], 0), 0.0)


def _movement(solved: LowRankUpdate, update: LowRankUpdate, directions: PrincipalDirections | None) -> Event:
    """Size of the update, how much of it the projection took away, and the directions' rank."""
    before, after = _norm(solved), _norm(update)
    event: Event = {"update_norm": after, "suppressed": 1 - (after / before) ** 2 if before else 0.0}
    if directions is not None:
        event |= {"rank": int(directions.rank), "energy_ratio": float(directions.energy_ratio)}
    return event


def _norm(update: LowRankUpdate) -> float:
    """Frobenius norm of ``left @ right`` from the small Gram matrices."""
    left, right = update.left.double(), update.right.double()
    return float(((left.T @ left) * (right @ right.T)).sum().clamp_min(0).sqrt())


def _lap(clock: dict[str, float], name: str, start: float) -> float:
    now = time.perf_counter()
    clock[name] += now - start
    return now
