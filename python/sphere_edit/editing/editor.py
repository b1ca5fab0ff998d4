"""The editing loop: values, then layer by layer keys, solve, projection, write."""

from __future__ import annotations

import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphere_edit.config import ConfigError, EditConfig, auto_layers, preset
from sphere_edit.data.requests import EditRequest, as_requests, batches, check_batches
from sphere_edit.editing.engine import Clock, Engine, check_finite
from sphere_edit.editing.guard import BROKEN, Guard, GuardError
from sphere_edit.editing.guard import told as told_by_guard
from sphere_edit.editing.reached import missed, share_reached, share_written
from sphere_edit.editing.records import BatchRecord, EditResult, LayerRecord, ReplayError
from sphere_edit.events import Event
from sphere_edit.files import file_sha256, tensor_sha256
from sphere_edit.methods import method_class
from sphere_edit.methods.covariance import key_covariances
from sphere_edit.methods.fine_tuning import tune
from sphere_edit.model.inference import frozen
from sphere_edit.model.loading import cache_dir
from sphere_edit.model.partial_forward import check_replay, not_additive
from sphere_edit.model.structure import ModelStructure, check_weights_finite, find_structure, model_sha256
from sphere_edit.model.text import text_path
from sphere_edit.model.tokens import Row, check_fits, check_tokenizer, encode
from sphere_edit.state import add_prefix, strip_prefix
from sphere_edit.targets import plain
from sphere_edit.targets.anchor import anchored, mean_length, solved_outputs
from sphere_edit.targets.closed_loop import close_loop, told
from sphere_edit.targets.contexts import generate_contexts
from sphere_edit.targets.gradient import Seen, look_back
from sphere_edit.targets.keys import LayerPass
from sphere_edit.targets.optimised import Values, optimise_values
from sphere_edit.targets.others import other_facts
from sphere_edit.targets.passes import Passes, fast_bfloat16
from sphere_kernels import LowRankUpdate, hyperspherical_energy, orthogonal_energy

_Done = dict[int, tuple[LayerRecord, Event]]  # by layer


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
        on_batch: called with the record of every batch once it is in the weights and before it is final, to put it in a
            safe place: if it raises, the batch is undone, and the error goes on. Events of the batch come afterwards.
        on_note: called with what a user should hear of batches that stand out (see ``guard``), or whose wanted
            changes are not in the weights (see `sphere_edit.editing.reached`); by default a warning.

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
        self._contexts: list[str] = []
        self._passes: Passes | None = None
        self._anchors: dict[int, float] = {}  # lengths of values by layer, where they are anchored
        self._not_additive: tuple[int, ...] = ()  # layers whose blocks do not move by what their maps do
        self._events: list[Event] = []
        self._fingerprints: dict[str, str] = {}
        self._edits, self._keeping = 0, 0.0
        self._aside: dict[int, Tensor] | None = None  # the loop's weights where others are handed over

    @property
    def batches(self) -> int:
        """How many batches are in the weights."""
        return self._engine.batches if self._engine else 0

    @property
    def edits(self) -> int:
        """How many facts they held, with those of batches left out."""
        return self._edits

    def edit(self, requests: Iterable[EditRequest | Mapping[str, Any]]) -> EditResult:
        """Edit the facts in batches of ``batch_size``, after all earlier ones.

        Raises:
            RequestError, ValueError: a request that cannot be edited; nothing has been touched then.
            GuardError: with ``guard: stop`` a batch stands out; it has been undone, the batches before it stay.
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
        """What is needed once before the first edit: a check of the model's parts, context prefixes, key covariances,
        the engine, and the energies as they are. `edit` calls it; call it to meet its errors early."""
        if self._engine is None:
            with frozen(self.model):
                self._prepare()

    def check_parts(self) -> None:
        """Raise StructureError unless the parts found make the model's own logits; `prepare` calls it."""
        with frozen(self.model):
            check_replay(self.model, self.structure, self._probe())

    def _probe(self) -> Sequence[int]:
        return encode(self.tokenizer, "The capital of France is").ids

    def check(self, requests: Iterable[EditRequest | Mapping[str, Any]]) -> list[EditRequest]:
        """Everything about the requests that can be known before editing; raises as `edit` does, changes nothing."""
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
        """Put the weights back exactly as the editor found them, and forget all edits."""
        self._check_unmoved()
        for layer, weight in self.weights().items():
            weight.copy_(self._original[layer])
        self._engine, self._edits, self._events, self._aside = None, 0, [], None

    @torch.no_grad()
    def hand_over(self) -> None:
        """Put into the model what the method hands over, to be evaluated and saved: with ``prune_in: copies`` the
        restrained weights, else the weights as they are. The editor then edits no more, until it goes back to a
        state or the beginning, or until the end of `finished`."""
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
        """Within, the model is as `hand_over` leaves it; afterwards it is as before, and editing goes on."""
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
        """Put a batch of an earlier run into the model, without optimising: the state is then as it was there.

        Raises:
            ReplayError: it is not the next batch, edits other layers, or does not give the recorded weights, as on
                another machine; nothing has been changed then.
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
        """Back to the weights as found, and through the batches given: exactly as if no other had ever been edited."""
        self.revert()
        for record in records:
            self.replay(record)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next batch depends on besides model, settings and requests, by reference."""
        self._check_not_handed_over()
        self.prepare()
        assert self._engine is not None
        counts = {"edits": torch.tensor(self._edits), "random_state": torch.get_rng_state()}
        return counts | add_prefix("engine", self._engine.state_dict()) | add_prefix("guard", self._guard.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict` of an editor of the same model and settings; the weights are written too."""
        self.prepare()
        assert self._engine is not None
        self._check_unmoved()
        self._engine.load_state_dict(strip_prefix("engine", state))
        self._guard.load_state_dict(strip_prefix("guard", state))
        self._aside = None
        self._edits = int(state["edits"])
        torch.set_rng_state(state["random_state"])

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of what edits rest on: model as found, tokenizer, context prefixes, each layer's key covariance, and
        the file of a method of one's own."""
        self.prepare()
        return dict(self._fingerprints)

    def energy(self, layer: int) -> dict[str, float]:
        """Hyperspherical energy of an edited weight now (of its fp32 master where the model has 16 bits), and its
        excess over orthogonal rows."""
        if self._engine is not None:
            return self._engine.energy(layer)
        weight, s = self.structure.edited[layer].weight, self.config.energy_s
        energy = float(hyperspherical_energy(weight, s))
        return {"energy": energy, "excess": energy - orthogonal_energy(weight.shape[0], s)}

    def original_weights(self) -> dict[int, Tensor]:
        """The edited weights ``[n, d]`` as they were before the first edit."""
        return dict(self._original)

    def weights(self) -> dict[int, Tensor]:
        """The edited weights ``[n, d]`` as they are; the model's own storage."""
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
        """The weights are those that the engine writes to, with the bits that it left there."""
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
        if config.targets == "optimised" and not method_class(config).trains:
            self._not_additive = not_additive(self.model, self.structure, config.layers, self._probe())
        self._contexts = generate_contexts(
            self.model, self.tokenizer, config.contexts, config.context_length, config.seed
        )
        covariances = {}
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
                self._see_gradients(engine, part)
                engine.lifelong.commit()
        self._anchors = self._measure_anchors()
        self._engine = engine
        self._guard = Guard({i: orthogonal_energy(len(w), config.energy_s) for i, w in self._original.items()})
        ranks = getattr(self._engine.method, "null_space_rank", {})
        self._fingerprints = {
            "model": model_sha256(self.model),
            "tokenizer": _sha256(self.tokenizer.backend_tokenizer.to_str()),
            "contexts": _sha256(json.dumps(self._contexts)),
        }
        self._fingerprints |= {f"covariance.{layer}": tensor_sha256(value) for layer, value in covariances.items()}
        if preheating:
            self._fingerprints["preheating facts"] = _sha256(json.dumps([fact.to_dict() for fact in preheating]))
        if self._anchors:
            self._fingerprints["anchors"] = _sha256(json.dumps(self._anchors))
        source = getattr(sys.modules[method_class(config).__module__], "__file__", None)
        if ":" in config.method and source is not None:
            self._fingerprints["method"] = file_sha256(Path(source))
        self._emit(
            "prepared",
            contexts=self._contexts,
            null_space_rank={str(layer): rank for layer, rank in ranks.items()},
            **({"anchors": {str(layer): norm for layer, norm in self._anchors.items()}} if self._anchors else {}),
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
        """Per layer what the guard compares a batch with."""
        engine = self._engine
        assert engine is not None
        return {i: {**engine.energy(i), "weight_norm": engine.weight_norm(i)} for i in self.config.layers}

    def _guarded(self, batch: Sequence[EditRequest], before: Mapping[int, Event]) -> BatchRecord:
        """The batch, written; raises GuardError where it stands out and may not stay."""
        assert self._engine is not None
        number, ids, guard = self._engine.batches + 1, [request.id for request in batch], self.config.guard
        try:
            record = self._write_batch(batch)
        except BROKEN as error:
            if guard in ("warn", "off"):  # nothing that could be kept
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
        """A record of the batch that changes nothing."""
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
        assert engine is not None
        place = {"batch": engine.batches + 1, "edits": self._edits + len(batch)}
        ways = {"closed_loop": self._close_loop, "optimised": self._solve, "gradient": self._gradient}
        done, told = (self._train if engine.method.trains else ways[self.config.targets])(engine, batch, clock)
        layers = {layer: record for layer, (record, _) in done.items()}
        events = [{"event": "energy", **place, "layer": layer, **event} for layer, (_, event) in done.items()]
        seconds = {**clock, "keep": self._keeping}  # that of the batch before
        events.append({"event": "batch", **place, "size": len(batch), **told, "seconds": seconds})
        if said := missed(events[-1]):
            self._on_note(said)
        ids = [request.id for request in batch]
        return BatchRecord(engine.batches + 1, ids, layers, events, torch.get_rng_state())

    def _train(self, engine: Engine, batch: Sequence[EditRequest], clock: Clock) -> tuple[_Done, Event]:
        """Updates of all layers by fine-tuning; what each did, and what is said of the batch."""
        tuned = tune(
            self.model,
            self.tokenizer,
            self.structure,
            batch,
            self.config,
            self.config.layers,
            lambda done, total: self._on_progress("tuning", done, total),
        )
        check_finite("the fine-tuned update or its likelihood", tuned.nll, *tuned.updates.values())
        clock.lap("tuning")
        done = {
            layer: engine.add(layer, update.new_empty(0, update.shape[1]), update, clock)
            for layer, update in tuned.updates.items()
        }
        nll = float(tuned.nll.mean())
        return done, {"loss": nll, "nll": nll, "steps": float(tuned.steps)}

    def _close_loop(self, engine: Engine, batch: Sequence[EditRequest], clock: Clock) -> tuple[_Done, Event]:
        """Updates of all layers at once, in rounds; as `_train`."""
        layers = self.config.layers
        if self._passes is None:
            self._passes = Passes(self.model, self.structure, layers, self.config.loop_arithmetic)
        passes, weights = self._passes, self.weights()
        passes.follow(weights)

        def write(asked: Mapping[int, tuple[Tensor, Tensor]]) -> None:
            clock.lap("passes")
            engine.attempt(asked, clock)
            passes.follow(weights)
            clock.lap("passes")

        def look(rows: Sequence[Row]) -> plain.Plain:
            clock.lap("passes")
            seen = plain.look(self.model, self.structure, rows, layers)
            clock.lap("check")
            return seen

        loop = close_loop(
            passes,
            self.tokenizer,
            batch,
            self._contexts,
            self.config,
            engine.batches + 1,
            write,
            look,
            lambda done, total: self._on_progress("facts", done, total),
        )
        clock.lap("passes")
        done = engine.settle(loop.plain.keys, clock)
        written = {layer: record for layer, (record, _) in done.items()}
        reached = share_written(written, loop.plain.keys, loop.wanted)
        return done, told(loop, batch) | {"reached": reached}

    def _gradient(self, engine: Engine, batch: Sequence[EditRequest], clock: Clock) -> tuple[_Done, Event]:
        """Updates of all layers from one backward pass; as `_train`."""
        seen = self._see_gradients(engine, batch)
        clock.lap("pass")
        asked = {layer: (keys, engine.lifelong.residuals(layer, keys)) for layer, keys in seen.keys.items()}
        clock.lap("statistics")
        done = {
            layer: engine.write(layer, *found, engine.solve(layer, *found, clock), clock)
            for layer, found in asked.items()
        }
        positions = len(seen.keys[self.config.layers[0]])
        return done, {"nll": float(seen.nll.mean()), "positions": positions}

    def _see_gradients(self, engine: Engine, facts: Sequence[EditRequest]) -> Seen:
        """One pass over the facts' prompts and targets, taken into the statistics."""
        rows = [encode(self.tokenizer, fact.prompt, fact.subject, fact.target_new) for fact in facts]
        seen = look_back(
            self.model,
            self.structure,
            rows,
            self.config.layers,
            lambda done, total: self._on_progress("gradients", done, total),
        )
        check_finite("a gradient or likelihood", seen.nll, *seen.keys.values(), *seen.gradients.values())
        for layer, keys in seen.keys.items():
            engine.lifelong.see(layer, keys, seen.gradients[layer])
        return seen

    def _solve(self, engine: Engine, batch: Sequence[EditRequest], clock: Clock) -> tuple[_Done, Event]:
        """Values, then updates layer by layer; as `_train`."""
        config, layers = self.config, self.config.layers
        values, given_up = self._values(batch, self._contexts, "values"), {}
        if self._anchors:
            values, beyond = anchored(values, self._own_outputs(batch), self._anchors)
            given_up = {"beyond_anchor": int(beyond.sum())}
        clock.lap("values")
        done: _Done = {}
        solved: dict[int, tuple[Tensor, Tensor, LowRankUpdate]] = {}
        walk = LayerPass(self.model, self.tokenizer, self.structure, batch, self._contexts, layers)
        with ExitStack() as trials:
            for i, layer in enumerate(layers):
                walk.advance(layer)
                keys = walk.keys()
                residuals = (
                    values.outputs[layer] - walk.outputs()
                    if values.outputs
                    else (values.target - walk.values()) / (len(layers) - i)
                )
                clock.lap("keys")
                solved[layer] = keys, residuals, engine.solve(layer, keys, residuals, clock)
                if config.project != "batch":
                    done[layer] = engine.write(layer, *solved[layer], clock)
                else:
                    trials.enter_context(engine.tried(layer, solved[layer][2]))
        if config.project == "batch":
            done = {layer: engine.write(layer, *found, clock) for layer, found in solved.items()}
            walk = LayerPass(self.model, self.tokenizer, self.structure, batch, ["{}"], layers)
            walk.advance(layers[-1])
        got = (walk.outputs() if values.outputs else walk.values()) - values.start
        reached = share_reached([(got, values.target - values.start)])
        rows = [encode(self.tokenizer, fact.prompt, fact.subject, fact.target_new) for fact in batch]
        seen = plain.look(self.model, self.structure, rows, layers[-1:])
        clock.lap("check")
        parts = {"loss": values.loss, "nll": values.nll, "steps": values.steps.float()}
        means = {name: float(part.mean()) for name, part in parts.items()}
        return done, means | plain.learned(seen, batch) | {"reached": reached} | given_up

    def _values(self, facts: Sequence[EditRequest], contexts: Sequence[str], stage: str) -> Values:
        layers = self.config.layers
        return optimise_values(
            self.model,
            self.tokenizer,
            self.structure,
            facts,
            contexts,
            self.config,
            layers[-1],
            lambda done, total: self._on_progress(stage, done, total),
            [self.structure.edited[layer] for layer in layers] if self._not_additive else (),
        )

    def _own_outputs(self, facts: Sequence[EditRequest]) -> dict[int, Tensor]:
        """``{layer: [facts, n]}``, what the edited maps say at the subjects of the bare prompts."""
        rows = [encode(self.tokenizer, fact.prompt, fact.subject, fact.target_new) for fact in facts]
        return plain.look(self.model, self.structure, rows, self.config.layers).outputs

    def _measure_anchors(self) -> dict[int, float]:
        """By layer the length that values of other facts have in the model before all edits, if they are anchored."""
        found: dict[int, list[Tensor]] = {}
        others = other_facts("value_anchor", self.config.value_anchor, self.config.seed)
        for part in batches(others, self.config.batch_size):
            values = self._values(part, ["{}"], "values of other facts")
            for layer, said in solved_outputs(values, self._own_outputs(part)).items():
                check_finite("a value of other facts", said)
                found.setdefault(layer, []).append(said)
        return {layer: mean_length(torch.cat(parts)) for layer, parts in found.items()}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
