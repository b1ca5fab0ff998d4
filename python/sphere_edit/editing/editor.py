"""The editor: write, judge, and keep or undo batch after batch, and carry the state from batch to batch."""

from __future__ import annotations

import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphere_edit.config import ConfigError, EditConfig
from sphere_edit.data.records import BatchRecord, EditResult, ReplayError
from sphere_edit.data.requests import EditRequest, as_requests, batches, check_batches
from sphere_edit.editing.batch import BatchWriter
from sphere_edit.editing.engine import Clock, Engine
from sphere_edit.editing.guard import BROKEN, Guard, GuardError
from sphere_edit.editing.guard import told as told_by_guard
from sphere_edit.events import Event
from sphere_edit.files import file_sha256, tensor_sha256
from sphere_edit.methods import method_class
from sphere_edit.methods.covariance import key_covariances
from sphere_edit.model.inference import frozen
from sphere_edit.model.loading import cache_dir
from sphere_edit.model.partial_forward import check_replay
from sphere_edit.model.structure import ModelStructure, check_weights_finite, find_structure, model_sha256
from sphere_edit.model.text import text_path
from sphere_edit.model.tokens import check_fits, check_tokenizer, encode
from sphere_edit.state import add_prefix, strip_prefix
from sphere_edit.targets.contexts import generate_contexts
from sphere_edit.targets.others import other_facts
from sphere_edit.targets.passes import fast_bfloat16
from sphere_edit.targets.presets import auto_layers, preset
from sphere_edit.targets.reached import missed
from sphere_kernels import hyperspherical_energy, orthogonal_energy


class SphereEditor:
    """Edits facts of a Hugging Face causal LM in sequence and holds the hyperspherical energy of the edited weights.

    The editor owns the history of its edits; use one editor for one model. It checks everything before it touches a
    weight. It writes a batch whole or not at all: after an error or interrupt the weights are as before the batch.

    Args:
        model: a causal LM (``AutoModelForCausalLM``); weights in fp16, bf16, fp32 or fp64, all in memory.
        tokenizer: its fast tokenizer.
        config: an `EditConfig` or the name of a preset.
        cache: folder for the key covariances; by default inside ``SPHERE_EDIT_CACHE``.
        on_event: called with every event as it happens.
        on_progress: called with (what, done, total) during the long steps.
        on_batch: called with the record of every batch, when the batch is in the weights but not yet final, to store
            it. If the call raises, the batch is undone and the error propagates. The batch's events come afterwards.
        on_note: called with a message for the user about a batch that stands out (see ``guard``), or whose wanted
            changes are not in the weights (see `sphere_edit.targets.reached`); by default a warning.

    Raises:
        StructureError, ConfigError, ValueError: the model, the layers or a setting does not fit.

    Determinism: on the CPU, the same model, requests, settings, seed, thread count and machine give bitwise equal
    weights.
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
        on_batch: Callable[[BatchRecord], None] | None = None,
        on_note: Callable[[str], None] = warnings.warn,
    ) -> None:
        config = preset(config) if isinstance(config, str) else config
        self.structure: ModelStructure = find_structure(model, config.modules)
        method = method_class(config)
        if config.project == "solve" and (method.trains or method.projects):
            raise ConfigError(f"project: {config.method} has no solve to project in; expected 'layer', got 'solve'")
        if not config.layers:
            config = config.replace(layers=auto_layers(len(self.structure.blocks), config.method, config.targets))
        if config.targets == "closed_loop" and config.loop_arithmetic == "auto" and not method.trains:
            config = config.replace(loop_arithmetic="bfloat16" if fast_bfloat16(self.structure) else "model")
        check_tokenizer(tokenizer)
        self.structure.check_layers(config.layers, last=method.trains)
        check_weights_finite(model)
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.covariance_cache = cache if cache is not None else cache_dir() / "covariance"
        self.on_event = on_event or (lambda event: None)
        self._on_progress = on_progress or (lambda what, done, total: None)
        self._original = {layer: weight.clone() for layer, weight in self.weights().items()}
        self._on_batch, self._on_note = on_batch, on_note
        self._engine: Engine | None = None
        self._guard = Guard({})
        self._writer: BatchWriter | None = None
        self._events: list[Event] = []
        self._fingerprints: dict[str, str] = {}
        self._edits, self._keeping = 0, 0.0
        self._aside: dict[int, Tensor] | None = None  # the loop's weights while the model holds others

    @property
    def batches(self) -> int:
        """Number of batches done, skipped batches included."""
        return self._engine.batches if self._engine else 0

    @property
    def edits(self) -> int:
        """Number of facts in the batches done, skipped batches included."""
        return self._edits

    def edit(self, requests: Iterable[EditRequest | Mapping[str, Any]]) -> EditResult:
        """Edit the facts in batches of ``batch_size``, after all earlier edits.

        Raises:
            RequestError, ValueError: a request cannot be edited; no weight has been touched.
            GuardError: a batch stands out, with ``guard: stop``; that batch is undone, the batches before it stay.
        """
        todo = self.check(requests)
        result = EditResult(todo, events=self._events)
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
        """Prepare the first edit: check the model's parts, generate context prefixes, measure key covariances, make the
        engine, and report the energies. `edit` calls this; call it yourself to see its errors early."""
        if self._engine is None:
            with frozen(self.model):
                self._prepare()

    def check_parts(self) -> None:
        """Raise StructureError unless the parts found reproduce the model's logits; `prepare` calls this."""
        with frozen(self.model):
            check_replay(self.model, self.structure, self._probe())

    def _probe(self) -> Sequence[int]:
        return encode(self.tokenizer, "The capital of France is").ids

    def check(self, requests: Iterable[EditRequest | Mapping[str, Any]]) -> list[EditRequest]:
        """Check the requests as far as possible before editing; raises as `edit` does, changes nothing."""
        if torch.is_inference_mode_enabled():
            raise ValueError("editing needs gradients; expected to be called outside torch.inference_mode()")
        self._check_ours()
        if self._engine is not None:
            self._engine.check_whole()
        todo = as_requests(requests)
        check_batches(todo, self.config.batch_size)
        text_path(self.config.covariance_text)
        before = 2 * self.config.context_length + 8 if self.config.contexts else 0
        for request in todo:
            row = encode(self.tokenizer, request.prompt, request.subject, request.target_new, self.config.ft_eos)
            check_fits(self.model, row, request.text, before)
        return todo

    @torch.no_grad()
    def revert(self) -> None:
        """Restore the weights exactly as the editor found them, and forget all edits."""
        self._check_unmoved()
        for layer, weight in self.weights().items():
            weight.copy_(self._original[layer])
        self._engine, self._edits, self._events, self._aside = None, 0, [], None

    @torch.no_grad()
    def hand_over(self) -> None:
        """Put the method's final weights into the model, for evaluation and saving.

        With ``prune_in: copies`` these are the restrained weights, else the weights as they are. Editing is refused
        until `load_state_dict`, `revert`, or the end of `finished`."""
        if self._aside is not None:
            return
        self._check_ours()
        self._aside = {}
        if self._engine is not None:
            for layer, weight in self.weights().items():
                done = self._engine.finished(layer)
                if done is not self._engine.states[layer].master:
                    self._aside[layer] = weight.clone()
                    weight.copy_(done)

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Hold the final weights of `hand_over` in the model within the block, then restore the loop's weights."""
        if self._aside is not None:
            yield
            return
        try:
            self.hand_over()
            yield
        finally:
            aside: dict[int, Tensor] = self._aside or {}
            for layer, before in aside.items():
                self.weights()[layer].copy_(before)
            self._aside = None

    def replay(self, record: BatchRecord) -> None:
        """Write a recorded batch into the model without optimising; the state becomes that of the earlier run.

        Raises:
            ReplayError: the batch is not the next one, edits other layers, or does not give the recorded weights, as
                on another machine; nothing is changed.
        """
        self.prepare()
        assert self._engine is not None
        if record.number != self.batches + 1 or set(record.layers) != set(self.config.layers):
            raise ReplayError(
                f"batch {record.number} of layers {sorted(record.layers)} cannot follow batch {self.batches} of layers "
                f"{sorted(self.config.layers)}"
            )
        self._check_ours()
        before = self._figures()
        with self._engine.batch():
            for layer in self.config.layers:
                self._engine.replay(layer, record.layers[layer])
        if not record.skipped:
            self._guard.accept(record.events, before)
        self._edits += len(record.requests)
        torch.set_rng_state(record.random_state)

    def rewind(self, records: Iterable[BatchRecord]) -> None:
        """Revert all edits, then replay the given batches: exactly as if no other batch had been edited."""
        self.revert()
        for record in records:
            self.replay(record)

    def state_dict(self) -> dict[str, Tensor]:
        """All state that the next batch depends on besides model, settings and requests, by reference."""
        self._check_not_handed_over()
        self.prepare()
        assert self._engine is not None
        counts = {"edits": torch.tensor(self._edits), "random_state": torch.get_rng_state()}
        return counts | add_prefix("engine", self._engine.state_dict()) | add_prefix("guard", self._guard.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state_dict` of an editor of the same model and settings, weights included."""
        self.prepare()
        assert self._engine is not None
        self._check_unmoved()
        self._engine.load_state_dict(strip_prefix("engine", state))
        self._guard.load_state_dict(strip_prefix("guard", state))
        self._aside = None
        self._edits = int(state["edits"])
        torch.set_rng_state(state["random_state"])

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of every input of the edits: model as found, tokenizer, context prefixes, each layer's key
        covariance, and, where used, preheating facts, anchors and the file of a user's own method."""
        self.prepare()
        return dict(self._fingerprints)

    def energy(self, layer: int) -> dict[str, float]:
        """Current hyperspherical energy of an edited weight, and the excess over orthogonal rows; for a 16-bit model,
        both of the fp32 master."""
        if self._engine is not None:
            return self._engine.energy(layer)
        weight, s = self.structure.edited[layer].weight, self.config.energy_s
        energy = float(hyperspherical_energy(weight, s))
        return {"energy": energy, "excess": energy - orthogonal_energy(weight.shape[0], s)}

    def original_weights(self) -> dict[int, Tensor]:
        """The edited weights ``[n, d]`` before the first edit."""
        return dict(self._original)

    def weights(self) -> dict[int, Tensor]:
        """The current edited weights ``[n, d]``, in the model's own storage."""
        return {layer: self.structure.edited[layer].weight for layer in self.config.layers}

    def _check_unmoved(self) -> None:
        for layer, weight in self.weights().items():
            original = self._original[layer]
            if weight.dtype != original.dtype or weight.device != original.device:
                raise ValueError(
                    f"layer {layer}: the weight is {weight.dtype} on {weight.device}, but was {original.dtype} on "
                    f"{original.device} when the editor was made; make a new editor after moving or casting a model"
                )

    def _check_not_handed_over(self) -> None:
        if self._aside is not None:
            raise ValueError("the weights have been handed over; expected a call after finished(), or after revert()")

    def _check_ours(self) -> None:
        """Raise ValueError unless the model's weights are the engine's tensors and hold the engine's bits."""
        self._check_not_handed_over()
        self._check_unmoved()
        states = self._engine.states if self._engine else {}
        for layer, state in states.items():
            weight = self.weights()[layer]
            whole = state.master is state.weight or torch.equal(weight, state.master.to(weight.dtype))
            if weight.data_ptr() != state.weight.data_ptr() or not whole:
                raise ValueError(
                    f"layer {layer}: the weight is not the one that the editor has edited (cast, replaced or written "
                    "to since); make a new editor"
                )

    def _emit(self, event: str, **values: Any) -> None:
        self._say({"event": event, **values})

    def _say(self, event: Event) -> None:
        self._events.append(event)
        self.on_event(event)

    def _prepare(self) -> None:
        config, start = self.config, time.perf_counter()
        self.check_parts()
        contexts = generate_contexts(self.model, self.tokenizer, config.contexts, config.context_length, config.seed)
        writer = BatchWriter(
            self.model, self.tokenizer, self.structure, config, contexts, lambda *place: self._on_progress(*place)
        )
        covariances: Mapping[int, Tensor] = {}
        if not method_class(config).trains:
            covariances = key_covariances(
                self.model,
                self.tokenizer,
                self.structure,
                config.layers,
                config,
                self.covariance_cache,
                lambda done, total: self._on_progress("covariance of keys", done, total),
            )
        engine = Engine(self.weights(), covariances, config, self._original)
        preheating = other_facts("gradient_preheat", config.gradient_preheat, config.seed)
        if preheating:
            for part in batches(preheating, config.batch_size):
                writer.see_gradients(engine, part)
                engine.lifelong.commit()
        writer.prepare(self._probe())
        self._engine, self._writer = engine, writer
        self._guard = Guard({i: orthogonal_energy(len(w), config.energy_s) for i, w in self._original.items()})
        ranks = getattr(self._engine.method, "null_space_rank", {})
        self._fingerprints = {
            "model": model_sha256(self.model),
            "tokenizer": _sha256(self.tokenizer.backend_tokenizer.to_str()),
            "contexts": _sha256(json.dumps(contexts)),
        }
        self._fingerprints |= {f"covariance.{layer}": tensor_sha256(value) for layer, value in covariances.items()}
        if preheating:
            self._fingerprints["preheating facts"] = _sha256(json.dumps([fact.to_dict() for fact in preheating]))
        if writer.anchors:
            self._fingerprints["anchors"] = _sha256(json.dumps(writer.anchors))
        source = getattr(sys.modules[method_class(config).__module__], "__file__", None)
        if ":" in config.method and source is not None:
            self._fingerprints["method"] = file_sha256(Path(source))
        self._emit(
            "prepared",
            contexts=contexts,
            null_space_rank={str(layer): rank for layer, rank in ranks.items()},
            **({"anchors": {str(layer): norm for layer, norm in writer.anchors.items()}} if writer.anchors else {}),
            seconds=time.perf_counter() - start,
        )
        for layer in config.layers:
            measured = self._engine.measures.of_weight(layer, self._original[layer], 0)
            self._emit("energy", batch=0, edits=0, layer=layer, **self.energy(layer), **measured)

    def _edit_batch(self, batch: Sequence[EditRequest], result: EditResult) -> None:
        assert self._engine is not None
        start, before, random_state = time.perf_counter(), self._figures(), torch.get_rng_state()
        try:
            with self._engine.batch():
                record = self._guarded(batch, before)
                self._keep(record)
        except GuardError as error:
            if self.config.guard != "skip":
                raise
            torch.set_rng_state(random_state)
            with self._engine.batch():
                record = self._left_out(batch, error, time.perf_counter() - start)
                self._keep(record)
        if not record.skipped:
            self._guard.accept(record.events, before)
        self._edits += len(batch)
        if self._on_batch is None:
            result.records.append(record)
        for event in record.events:
            self._say(event)
        for event in record.events:
            if event["event"] == "guard":
                self._on_note(told_by_guard(event))

    def _keep(self, record: BatchRecord) -> None:
        start = time.perf_counter()
        if self._on_batch is not None:
            self._on_batch(record)
        self._keeping = time.perf_counter() - start

    def _figures(self) -> dict[int, Event]:
        """Energy and weight norm of each layer, for the guard to compare a batch with."""
        engine = self._engine
        assert engine is not None
        return {i: {**engine.energy(i), "weight_norm": engine.weight_norm(i)} for i in self.config.layers}

    def _guarded(self, batch: Sequence[EditRequest], before: Mapping[int, Event]) -> BatchRecord:
        """Write and judge a batch; raise GuardError for a batch that stands out and may not stay."""
        assert self._engine is not None
        number, ids, guard = self._engine.batches + 1, [request.id for request in batch], self.config.guard
        try:
            record = self._write_batch(batch)
        except BROKEN as error:
            if guard in ("warn", "off"):  # the batch holds nothing that 'warn' could keep
                raise
            raise GuardError(number, ids, [], str(error)) from error
        found = self._guard.judge(record.events, before) if guard != "off" else []
        if found:
            standing = GuardError(number, ids, found)
            if guard != "warn" or any(one["value"] is None for one in found):
                raise standing
            record.events.append(self._stands_out("kept", standing))
        return record

    def _left_out(self, batch: Sequence[EditRequest], error: GuardError, seconds: float) -> BatchRecord:
        """The record of a batch that is left out; no weight changes."""
        engine, layers, facts = self._engine, self.config.layers, len(batch)
        assert engine is not None
        place = {"batch": error.batch, "edits": self._edits + facts}
        events = [{"event": "energy", **place, "layer": layer, **engine.energy(layer)} for layer in layers]
        events.append({"event": "batch", **place, "size": facts, "skipped": True, "seconds": {"skipped": seconds}})
        events.append(self._stands_out("skipped", error))
        records = {layer: engine.nothing(layer) for layer in layers}
        return BatchRecord(error.batch, error.facts, records, events, torch.get_rng_state())

    def _stands_out(self, action: str, error: GuardError) -> Event:
        place = {"batch": error.batch, "edits": self._edits + len(error.facts)}
        return {
            "event": "guard",
            **place,
            "action": action,
            "facts": error.facts,
            "found": error.found,
            "why": error.why,
        }

    def _write_batch(self, batch: Sequence[EditRequest]) -> BatchRecord:
        engine, clock = self._engine, Clock()
        assert engine is not None and self._writer is not None
        place = {"batch": engine.batches + 1, "edits": self._edits + len(batch)}
        done, told = self._writer.write(engine, batch, clock)
        layers = {layer: record for layer, (record, _) in done.items()}
        events = [{"event": "energy", **place, "layer": layer, **event} for layer, (_, event) in done.items()]
        seconds = {**clock, "keep": self._keeping}  # "keep" is the time of the batch before
        events.append({"event": "batch", **place, "size": len(batch), **told, "seconds": seconds})
        if said := missed(events[-1]):
            self._on_note(said)
        ids = [request.id for request in batch]
        return BatchRecord(engine.batches + 1, ids, layers, events, torch.get_rng_state())


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
