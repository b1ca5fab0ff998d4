"""Write one batch: find the wanted changes of the facts; the engine solves, projects and writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from sphere_edit.config import EditConfig
from sphere_edit.data.records import LayerRecord
from sphere_edit.data.requests import EditRequest, batches
from sphere_edit.editing.engine import Clock, Engine, check_finite
from sphere_edit.events import Event
from sphere_edit.methods import method_class
from sphere_edit.methods.fine_tuning import tune
from sphere_edit.model.partial_forward import not_additive
from sphere_edit.model.structure import ModelStructure
from sphere_edit.model.tokens import Row, encode
from sphere_edit.targets import plain
from sphere_edit.targets.anchor import anchored, mean_length, solved_outputs
from sphere_edit.targets.closed_loop import close_loop, told
from sphere_edit.targets.gradient import Seen, look_back
from sphere_edit.targets.keys import LayerPass
from sphere_edit.targets.optimised import Values, optimise_values
from sphere_edit.targets.others import other_facts
from sphere_edit.targets.passes import Passes
from sphere_edit.targets.reached import share_reached, share_written
from sphere_kernels import LowRankUpdate

Done = dict[int, tuple[LayerRecord, Event]]  # by layer: the record of its update, and its energy event


class BatchWriter:
    """Writes batches of facts into a model, by the method and the targets of the settings.

    Args:
        contexts: templates with ``{}``; the first is the bare prompt.
        progress: called with (what, done, total).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        structure: ModelStructure,
        config: EditConfig,
        contexts: Sequence[str],
        progress: Callable[[str, int, int], None],
    ) -> None:
        self.model, self.tokenizer, self.structure = model, tokenizer, structure
        self.config, self.contexts, self._progress = config, contexts, progress
        self._weights = {layer: structure.edited[layer].weight for layer in config.layers}
        self._passes: Passes | None = None
        self._not_additive: tuple[int, ...] = ()  # layers whose block output changes otherwise than the map's
        self.anchors: dict[int, float] = {}  # length of values by layer; empty unless values are anchored

    def prepare(self, probe: Sequence[int]) -> None:
        """For optimised values, find the blocks that are not additive and measure the anchors, once.

        Args:
            probe: token ids of any prompt.
        """
        if self.config.targets == "optimised" and not method_class(self.config).trains:
            self._not_additive = not_additive(self.model, self.structure, self.config.layers, probe)
            self.anchors = self._measure_anchors()

    def write(self, engine: Engine, facts: Sequence[EditRequest], clock: Clock) -> tuple[Done, Event]:
        """Find and write the updates of all layers; call within `Engine.batch`.

        Returns:
            Each layer's record and event, and the fields of the batch's event.

        Raises:
            FloatingPointError: a loss, gradient, key or update is not finite.
        """
        if engine.method.trains:
            return self._train(engine, facts, clock)
        ways = {"closed_loop": self._close_loop, "optimised": self._optimise, "gradient": self._gradient}
        return ways[self.config.targets](engine, facts, clock)

    def _train(self, engine: Engine, facts: Sequence[EditRequest], clock: Clock) -> tuple[Done, Event]:
        """Fine-tune all layers; result and errors as for `write`."""
        tuned = tune(
            self.model,
            self.tokenizer,
            self.structure,
            facts,
            self.config,
            self.config.layers,
            lambda done, total: self._progress("tuning", done, total),
        )
        check_finite("the fine-tuned update or its likelihood", tuned.nll, *tuned.updates.values())
        clock.lap("tuning")
        done = {
            layer: engine.add(layer, update.new_empty(0, update.shape[1]), update, clock)
            for layer, update in tuned.updates.items()
        }
        nll = float(tuned.nll.mean())
        return done, {"loss": nll, "nll": nll, "steps": float(tuned.steps)}

    def _close_loop(self, engine: Engine, facts: Sequence[EditRequest], clock: Clock) -> tuple[Done, Event]:
        """Update all layers at once, in rounds of the closed loop; result and errors as for `write`."""
        layers = self.config.layers
        if self._passes is None:
            self._passes = Passes(self.model, self.structure, layers, self.config.loop_arithmetic)
        passes, weights = self._passes, self._weights
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
            facts,
            self.contexts,
            self.config,
            engine.batches + 1,
            write,
            look,
            lambda done, total: self._progress("facts", done, total),
        )
        clock.lap("passes")
        done = engine.settle(loop.plain.keys, clock)
        written = {layer: record for layer, (record, _) in done.items()}
        reached = share_written(written, loop.plain.keys, loop.wanted)
        return done, told(loop, facts) | {"reached": reached}

    def _gradient(self, engine: Engine, facts: Sequence[EditRequest], clock: Clock) -> tuple[Done, Event]:
        """Update all layers from one backward pass; result and errors as for `write`."""
        seen = self.see_gradients(engine, facts)
        clock.lap("pass")
        asked = {layer: (keys, engine.lifelong.residuals(layer, keys)) for layer, keys in seen.keys.items()}
        clock.lap("statistics")
        done = {
            layer: engine.write(layer, *found, engine.solve(layer, *found, clock), clock)
            for layer, found in asked.items()
        }
        positions = len(seen.keys[self.config.layers[0]])
        return done, {"nll": float(seen.nll.mean()), "positions": positions}

    def see_gradients(self, engine: Engine, facts: Sequence[EditRequest]) -> Seen:
        """Run one forward and backward pass over prompts and targets, and update the running statistics."""
        seen = look_back(
            self.model,
            self.structure,
            self._rows(facts),
            self.config.layers,
            lambda done, total: self._progress("gradients", done, total),
        )
        check_finite("a gradient or likelihood", seen.nll, *seen.keys.values(), *seen.gradients.values())
        for layer, keys in seen.keys.items():
            engine.lifelong.see(layer, keys, seen.gradients[layer])
        return seen

    def _optimise(self, engine: Engine, facts: Sequence[EditRequest], clock: Clock) -> tuple[Done, Event]:
        """Optimise the values, then update layer by layer; result and errors as for `write`."""
        config, layers = self.config, self.config.layers
        values, given_up = self._values(facts, self.contexts, "values"), {}
        if self.anchors:
            values, beyond = anchored(values, self._own_outputs(facts), self.anchors)
            given_up = {"beyond_anchor": int(beyond.sum())}
        clock.lap("values")
        done: Done = {}
        solved: dict[int, tuple[Tensor, Tensor, LowRankUpdate]] = {}
        walk = LayerPass(self.model, self.tokenizer, self.structure, facts, self.contexts, layers)
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
            walk = LayerPass(self.model, self.tokenizer, self.structure, facts, ["{}"], layers)
            walk.advance(layers[-1])
        got = (walk.outputs() if values.outputs else walk.values()) - values.start
        reached = share_reached([(got, values.target - values.start)])
        seen = plain.look(self.model, self.structure, self._rows(facts), layers[-1:])
        clock.lap("check")
        parts = {"loss": values.loss, "nll": values.nll, "steps": values.steps.float()}
        means = {name: float(part.mean()) for name, part in parts.items()}
        return done, means | plain.learned(seen, facts) | {"reached": reached} | given_up

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
            lambda done, total: self._progress(stage, done, total),
            [self.structure.edited[layer] for layer in layers] if self._not_additive else (),
        )

    def _rows(self, facts: Sequence[EditRequest]) -> list[Row]:
        """Bare prompts with their targets behind them."""
        return [encode(self.tokenizer, fact.prompt, fact.subject, fact.target_new) for fact in facts]

    def _own_outputs(self, facts: Sequence[EditRequest]) -> dict[int, Tensor]:
        """Outputs of the edited maps at the subjects of the bare prompts, ``{layer: [facts, n]}``."""
        return plain.look(self.model, self.structure, self._rows(facts), self.config.layers).outputs

    def _measure_anchors(self) -> dict[int, float]:
        """Mean length by layer of the values of other facts, before all edits; empty unless values are anchored."""
        found: dict[int, list[Tensor]] = {}
        others = other_facts("value_anchor", self.config.value_anchor, self.config.seed)
        for part in batches(others, self.config.batch_size):
            values = self._values(part, ["{}"], "values of other facts")
            for layer, said in solved_outputs(values, self._own_outputs(part)).items():
                check_finite("a value of other facts", said)
                found.setdefault(layer, []).append(said)
        return {layer: mean_length(torch.cat(parts)) for layer, parts in found.items()}
