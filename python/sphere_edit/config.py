"""Settings of an editing run, the published presets, and their YAML form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot be; the message names it, what was expected and what was given."""


@dataclass(frozen=True)
class EditConfig:
    """Every setting of the loop. Defaults are those of ``auto``; `PRESETS` holds the published ones.

    Args:
        layers: decoder blocks whose MLP down-projection is edited, ascending; empty chooses where the published presets
            have theirs: five of them from an eighth of the depth on, for ROME and FT one, for
            gradient targets the five before the last.
        modules: which map of each block's MLP: ``down``, ``up``, ``gate`` or ``fused`` (gate and up in one); see
            `sphere_edit.model.structure.find_structure`.
        method: the editor: ``alphaedit``, ``memit``, ``rect``, ``prune``, ``rome``, ``ridge`` or ``ft``, or a class of
            one's own, ``package.module:Class``; see `sphere_edit.methods`. Settings that some methods have no use for
            may not be given to these.
        null_space: AlphaEdit's projection onto the null space of the key covariance, in ``ridge`` too. Off leaves a
            ridge least-squares.
        sphere: SPHERE's projection of each update away from the weight's principal directions.
        energy_ratio: η, the share of the spectrum's energy that the principal directions hold.
        alpha: α, how much of the update inside the principal directions is suppressed; 0 none, 1 all.
        subspace: principal directions of the ``current`` weight (published code) or of the ``pretrained`` one (paper).
        refresh_every: batches between two computations of the current directions.
        directions: ``exact``, by eigendecomposition, or ``tracked`` from those before by matrix products, which hold
            ``energy_ratio`` too, see `sphere_kernels.streaming.HypersphereState`; the ``pretrained`` ones are exact.
        project: when updates are projected and written: ``layer`` by layer, so that the layers above are solved for
            the weights that are used; or, as SPHERE's code does for MEMIT and RECT and EasyEdit's for AlphaEdit, after
            all layers of the ``batch``: each is solved for over the whole updates of those below (RECT's uncut), and
            what the projection takes away is made up for nowhere. Histories of keys take those of the solve in both.
            ``solve``: as ``layer``, but half of the projection, ``P^½`` of ``P = I − α U Uᵀ``, is of the keys that
            enter the solve and half of its update, so that what AlphaEdit, MEMIT and ROME write still says what is
            asked: for a ridge, the least ``tr(Δ P⁻¹ Δᵀ)``. A history has keys as they entered, which is exact as long
            as the directions stay, as those of the ``pretrained`` weight do.
        revive: τ, the share of its sum that the leading singular values of the pretrained weight hold: updates of any
            method leave their directions alone, in rows and columns (REVIVE, see `sphere_edit.methods.revive`); 0 off.
        batch_size: facts solved for together.
        targets: where the wanted changes come from, which the method then solves for: ``closed_loop`` finds them
            through the written weights in rounds, ``optimised`` in a model that is not written yet (published),
            ``gradient`` from one backward pass (UltraEdit's); see `sphere_edit.targets`.
        loop_rounds: forward and backward passes of a batch at most; a fact takes part until it is known.
        loop_step: h, the longest step of a fact's wanted change at a layer, in units of the layer's mean output length
            over the root of the number of layers.
        loop_reach: a fact's step is this many times as long as a straight line to ``loop_stop`` would take it, and at
            most ``loop_step``.
        loop_momentum: share of the direction before that goes into a round's.
        loop_stop: a fact is known when the mean NLL of its target's tokens falls below this.
        loop_kl: weight of the KL divergence of "{subject} is a" from what the model said before the batch.
        loop_arithmetic: of the rounds: ``model`` as the model is, ``bfloat16`` in a copy of it that is kept for them;
            ``auto`` takes the copy on processors that multiply bfloat16. Updates are fp32, and what is reported comes
            from a forward pass of the model itself.
        value_steps, value_lr, value_weight_decay, value_kl, value_clamp: Adam on each fact's value; the clamp is in
            units of the hidden state's norm.
        value_beta1, value_beta2: Adam's decay rates.
        value_stop: a fact is done when its loss falls below this.
        value_stop_on: which loss: ``loss`` (NLL + KL + decay, published) or ``nll`` alone; or ``argmax``: a fact is
            done two steps after every token of its target became the likeliest in all contexts, whatever
            ``value_stop``.
        value_anchor: values are scaled to the length that those of so many other facts (world-facts) have in the model
            before all edits, and given up beyond twice that (NAS, whose code takes 1,000, see
            `sphere_edit.targets.anchor`). 0: they stay as they are. A resumed run measures it anew.
        null_space_threshold: eigenvalues of the key covariance below this span the null space.
        gradient_lr: length of the wanted changes, η·d of UltraEdit's η and the map's inputs d; see
            `sphere_edit.targets.gradient`.
        gradient_whiten: gradients are whitened by their running covariance, once there are more positions than
            dimensions, and not only divided by their deviations (StableEdit).
        gradient_preheat: the running statistics begin with so many other facts, which are not edited: world-facts.
        ridge: λ of AlphaEdit's solve, and of ``ridge``, which is the same without a history.
        covariance_weight: weight of the key covariance in the solve of MEMIT, RECT and PRUNE.
        history: those three solve against the keys of earlier batches too; published without.
        rect_share: share of the entries of its update that RECT keeps.
        prune_in: what PRUNE restrains: the ``weights`` that the next batch is solved for; or, as published, ``copies``
            of them: the loop goes on with whole updates that are neither restrained nor projected, and what is
            evaluated and saved (see `SphereEditor.hand_over`) is the weight before all edits plus their sum,
            restrained, then projected out of that weight's directions. Figures by batch are of the loop's weights.
        ft_steps, ft_lr, ft_stop: FT's Adam on the edited weights, and the mean NLL at which it stops.
        ft_minibatch: facts of one step of Adam; ``ft_steps`` then counts epochs through the batch, which should be the
            whole set (LocFT-BF's breadth-first order, see `sphere_edit.methods.fine_tuning`). 0: each step takes the
            batch.
        ft_eos: FT's targets end in the end-of-text token.
        contexts, context_length: generated prefixes per fact besides the bare prompt, and their length in tokens.
        covariance_text: ``builtin`` or the path of a text file (``.txt``, ``.gz``).
        covariance_tokens: how many tokens of it are read at most.
        energy_s: s of the hyperspherical energy that is reported.
        guard: what becomes of a batch that stands out from the run's earlier ones, by its layers' energies, the length
            of its updates or the share of facts learned (see `sphere_edit.editing.guard`). ``warn`` keeps it and says
            so; ``skip`` undoes it, leaves its facts out and goes on; ``stop`` undoes it and ends with a `GuardError`;
            ``off`` does not look.
        measure_every: batches between two of which movement, spectrum and bound are measured; 0 none. See
            `sphere_edit.evaluation.weights`.
        seed: of everything drawn.
    """

    layers: tuple[int, ...] = ()
    modules: str = "down"
    method: str = "alphaedit"
    null_space: bool = True
    sphere: bool = True
    energy_ratio: float = 0.5
    alpha: float = 0.5
    subspace: str = "current"
    refresh_every: int = 1
    directions: str = "exact"
    project: str = "layer"
    revive: float = 0.0
    batch_size: int = 100
    targets: str = "closed_loop"
    loop_rounds: int = 8
    loop_step: float = 1.0
    loop_reach: float = 2.0
    loop_momentum: float = 0.3
    loop_stop: float = 0.1
    loop_kl: float = 0.0
    loop_arithmetic: str = "auto"
    value_steps: int = 25
    value_lr: float = 0.5
    value_weight_decay: float = 1e-3
    value_kl: float = 0.0625
    value_clamp: float = 4.0
    value_beta1: float = 0.9
    value_beta2: float = 0.999
    value_stop: float = 0.05
    value_stop_on: str = "loss"
    value_anchor: int = 0
    gradient_lr: float = 4e-3
    gradient_whiten: bool = False
    gradient_preheat: int = 0
    null_space_threshold: float = 2e-2
    ridge: float = 10.0
    covariance_weight: float = 15000.0
    history: bool = False
    rect_share: float = 0.4
    prune_in: str = "weights"
    ft_steps: int = 25
    ft_lr: float = 5e-4
    ft_stop: float = 1e-2
    ft_minibatch: int = 0
    ft_eos: bool = False
    contexts: int = 5
    context_length: int = 10
    covariance_text: str = "builtin"
    covariance_tokens: int = 100_000
    energy_s: float = 1.0
    guard: str = "warn"
    measure_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.layers, (list, tuple)):
            object.__setattr__(self, "layers", tuple(self.layers))
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name))
        for name, who in _foreign(self.method, self.targets).items():
            _check_unused(name, who, getattr(self, name))
        if self.project == "batch" and self.targets != "optimised" and self.method != "ft":
            raise ConfigError(
                f"project: {self.targets} targets solve for all layers at once; expected 'layer' or 'solve', got "
                f"{self.project!r}"
            )
        if self.modules != "down" and self.targets == "optimised" and self.method != "ft":
            raise ConfigError(
                "modules: optimised values are outputs of the down-projection; expected 'down', or other targets, got "
                f"{self.modules!r}"
            )
        if self.prune_in == "copies" and self.revive:
            raise ConfigError(f"revive: expected 0 where prune_in is 'copies' and the loop whole, got {self.revive!r}")
        if self.prune_in == "copies" and self.project != "layer":
            raise ConfigError(
                f"project: expected 'layer' where prune_in is 'copies' and the loop whole, got {self.project!r}"
            )

    def replace(self, **changes: Any) -> EditConfig:
        """With other values; settings that a new method or new targets have no use for go back to their defaults."""
        chosen = changes.get("method", self.method), changes.get("targets", self.targets)
        if chosen != (self.method, self.targets):
            changes = {name: DEFAULTS[name] for name in foreign(*chosen)} | changes
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EditConfig:
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(map(str, set(values) - known))
        if unknown:
            raise ConfigError(f"unknown setting {unknown[0]!r}; known settings are {sorted(known)}")
        return cls(**values)

    @classmethod
    def from_run(cls, values: Mapping[str, Any]) -> EditConfig:
        """As `from_dict`, for settings in a run's ``config.yaml``: what its method and targets have no use for is
        passed over."""
        values = as_recorded(values)
        unused = foreign(values.get("method", DEFAULTS["method"]), values["targets"])
        return cls.from_dict({name: value for name, value in values.items() if name not in unused})


def as_recorded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a run's ``config.yaml``: runs of version 0.1, which do not name their targets, optimised them."""
    return {"targets": "optimised", **settings}


OPEN: dict[str, Any] = {"layers": [], "loop_arithmetic": "auto"}  # what the editor chooses by the model and machine
DEFAULTS = {field.name: field.default for field in dataclasses.fields(EditConfig)}
_LEAST_SQUARES = ("memit", "rect", "prune")
_RIDGE = ("alphaedit", "ridge")
_SOLVING = ("alphaedit", *_LEAST_SQUARES, "rome", "ridge")
_METHODS = (*_SOLVING, "ft")
# Settings that are of use to some methods, or with some targets, only.
_USED_BY = {
    "null_space": _RIDGE,
    "null_space_threshold": _RIDGE,
    "ridge": _RIDGE,
    "covariance_weight": _LEAST_SQUARES,
    "history": _LEAST_SQUARES,
    "rect_share": ("rect",),
    "prune_in": ("prune",),
    "project": _SOLVING,
    "targets": _SOLVING,
    **{name: ("ft",) for name in DEFAULTS if name.startswith("ft_")},
}
_PREFIXES = {"optimised": "value_", "closed_loop": "loop_", "gradient": "gradient_"}
TARGETS = tuple(_PREFIXES)


def foreign(method: str, targets: str) -> list[str]:
    """Settings that a method, or targets, have no use for; of a method of one's own only the latter is known."""
    return list(_foreign(method, targets))


def _foreign(method: str, targets: str) -> dict[str, str]:
    """`foreign`, each with what has no use for it and what has."""
    solves = method != "ft"
    found = {
        name: f"{method} has no use for it, only {', '.join(methods)}"
        for name, methods in _USED_BY.items()
        if method in _METHODS and method not in methods
    }
    for name in DEFAULTS:
        for kind, prefix in _PREFIXES.items():
            if name.startswith(prefix) and not (solves and kind == targets):
                found[name] = f"only {kind} targets have a use for it, not {targets if solves else method}"
    return found


def _check_unused(name: str, why: str, value: Any) -> None:
    if value != DEFAULTS[name]:
        raise ConfigError(f"{name}: {why}; expected {DEFAULTS[name]!r} (the default), got {value!r}")


_CHOICES = {
    "subspace": ("current", "pretrained"),
    "directions": ("exact", "tracked"),
    "value_stop_on": ("loss", "nll", "argmax"),
    "prune_in": ("weights", "copies"),
    "project": ("layer", "batch", "solve"),
    "targets": TARGETS,
    "modules": ("down", "up", "gate", "fused"),
    "loop_arithmetic": ("auto", "model", "bfloat16"),
    "guard": ("stop", "skip", "warn", "off"),
}
_POSITIVE_INT = {
    "refresh_every",
    "batch_size",
    "value_steps",
    "context_length",
    "covariance_tokens",
    "ft_steps",
    "loop_rounds",
}
_COUNT = {"contexts", "measure_every", "seed", "gradient_preheat", "value_anchor", "ft_minibatch"}
_POSITIVE = {
    "value_lr",
    "value_clamp",
    "null_space_threshold",
    "ridge",
    "covariance_weight",
    "ft_lr",
    "loop_step",
    "loop_reach",
    "loop_stop",
    "gradient_lr",
}
_NOT_NEGATIVE = {"value_weight_decay", "value_kl", "value_stop", "energy_s", "ft_stop", "loop_kl"}
_SHARE = {"energy_ratio", "alpha", "rect_share", "loop_momentum"}
_BELOW_ONE = {"value_beta1", "value_beta2", "revive"}
_FLAGS = {"null_space", "sphere", "history", "gradient_whiten", "ft_eos"}


def _check(name: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if name == "layers":
        ok = isinstance(value, tuple) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
        expected = "a list of block numbers"
    elif name in _CHOICES:
        ok, expected = value in _CHOICES[name], f"one of {', '.join(_CHOICES[name])}"
    elif name in _FLAGS:
        ok, expected = isinstance(value, bool), "true or false"
    elif name in _POSITIVE_INT:
        ok, expected = whole and value >= 1, "a whole number of at least 1"
    elif name in _COUNT:
        ok, expected = whole and 0 <= value < 2**63, "a whole number of at least 0 (and below 2^63)"
    elif name in _POSITIVE:
        ok, expected = number and value > 0, "a number above 0"
    elif name in _NOT_NEGATIVE:
        ok, expected = number and value >= 0, "a number of at least 0"
    elif name in _SHARE:
        ok, expected = number and 0 <= value <= 1, "a number from 0 to 1"
    elif name in _BELOW_ONE:
        ok, expected = number and 0 <= value < 1, "a number of at least 0 and below 1"
    else:
        ok, expected = isinstance(value, str) and bool(value), "a text"
    if not ok:
        raise ConfigError(f"{name}: expected {expected}, got {value!r}")


# Published settings of AlphaEdit; `preset` changes them for other methods. AlphaEdit's hparams for llama3-8b, gpt2-xl
# and gpt-j-6b, SPHERE's for qwen2.5-7b.
_PUBLISHED = EditConfig(targets="optimised")
_GRADIENT = EditConfig(method="ridge", targets="gradient", null_space=False, sphere=False, ridge=1.0, contexts=0)
PRESETS: dict[str, EditConfig] = {
    "auto": EditConfig(),
    "llama3-8b": _PUBLISHED.replace(layers=(4, 5, 6, 7, 8), value_lr=0.1, value_weight_decay=0.5, value_clamp=0.75),
    "qwen2.5-7b": _PUBLISHED.replace(layers=(4, 5, 6, 7, 8)),
    "gpt2-xl": _PUBLISHED.replace(
        layers=(13, 14, 15, 16, 17), value_steps=20, value_weight_decay=0.5, value_clamp=0.75
    ),
    "gpt-j-6b": _PUBLISHED.replace(layers=(3, 4, 5, 6, 7, 8), value_weight_decay=0.5, value_clamp=0.75),
    # ridge: chosen from 10 (published) to 160 on the first 1,000 CounterFact facts, see study 4 in benchmarks/study.
    "smollm2-135m": EditConfig(layers=(4, 5, 6, 7, 8), contexts=0, ridge=40.0),
    # The best of seven settings tried on the first CounterFact facts; on others in benchmarks/study (gemma.yaml).
    "gemma3-270m": EditConfig(layers=(2, 3, 4, 5, 6), contexts=0, loop_step=0.5, null_space_threshold=5e-3),
    # For any model, without SPHERE as published; with --sphere it is projected like any other method.
    "ultraedit": _GRADIENT,
    "stableedit": _GRADIENT.replace(ridge=10.0, gradient_whiten=True, gradient_preheat=1000),
    # For any model, at FT's block (published: 22 of Llama-3-8B's 32, 6 of Qwen2.5-7B's 28); all facts are one batch, up
    # to the 100,000 of the paper.
    "locft-bf": EditConfig(method="ft", sphere=False, contexts=0, batch_size=100_000, ft_minibatch=100, ft_eos=True),
}
# Chosen by measurement (benchmarks/preset.py, table in docs/benchmarks.md): the values of a small model need a large
# clamp and step to reach their targets, and stopping at their NLL rather than the whole loss spares the neighbours.
_OF_TARGETS: dict[tuple[str, str], dict[str, Any]] = {
    ("smollm2-135m", "optimised"): {"value_stop": 0.1, "value_stop_on": "nll", "contexts": 5, "ridge": 10.0},
    # So wide a step, so high up; there the key covariance has no eigenvalue below the threshold.
    ("smollm2-135m", "gradient"): {
        "layers": (24, 25, 26, 27, 28),
        "gradient_lr": 1.0,
        "ridge": 1.0,
        "null_space": False,
    },
}


# What is published (for smollm2-135m: chosen) of the other methods otherwise: for all models, and for one.
_OTHERWISE: dict[str, dict[str, Any]] = {name: {"alpha": 0.8} for name in ("memit", "rect", "prune")}
_OTHERWISE |= {name: {"layers": ()} for name in ("rome", "ft")}  # one block, see `auto_layers`
_OTHERWISE_OF: dict[tuple[str, str], dict[str, Any]] = {
    ("llama3-8b", "rome"): {"layers": (5,), "value_lr": 0.5, "value_weight_decay": 1e-3, "value_clamp": 4.0},
    ("qwen2.5-7b", "rome"): {"layers": (5,)},
    ("gpt2-xl", "rome"): {"layers": (17,)},
    ("gpt-j-6b", "rome"): {"layers": (5,)},
    ("llama3-8b", "ft"): {"layers": (21,)},
    ("qwen2.5-7b", "ft"): {"layers": (27,)},
}
_OTHERWISE_OF |= {("gpt2-xl", name): {"covariance_weight": 20000.0} for name in ("memit", "rect", "prune")}
# The published 15,000 are about Llama-3's features of a key, so that general text weighs like one edit; here are 1,536.
_OTHERWISE_OF |= {("smollm2-135m", name): {"covariance_weight": 1500.0} for name in ("memit", "rect", "prune")}
_PLACE = {"rome": 5 / 32, "ft": 21 / 32}  # of their block in the depth


def preset(name: str, method: str | None = None, targets: str | None = None) -> EditConfig:
    """One of `PRESETS` by name; for another method or other targets with its own settings of them."""
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} is not known; expected one of {', '.join(PRESETS)}")
    base = PRESETS[name]
    method, targets = method or base.method, targets or base.targets
    if method == "ft":
        targets = str(DEFAULTS["targets"])
    changes = _OF_TARGETS.get((name, targets), {}) if targets != base.targets else {}
    changes = changes | _OTHERWISE.get(method, {}) | _OTHERWISE_OF.get((name, method), {})
    unused = foreign(method, targets)
    known = {key: value for key, value in changes.items() if key not in unused}
    return base.replace(method=method, targets=targets, **known)


def auto_layers(depth: int, method: str = "alphaedit", targets: str = "optimised") -> tuple[int, ...]:
    """Five blocks from an eighth of the depth on (4–8 of 32); fewer where the model is shallow, never the last.

    For ROME and FT the one block at the depth of the published one; FT may have the last. For gradient targets the five
    before the last (26–30 of 32), where down-projections took them best in the demo's model, and UltraEdit's are in
    Mistral-7B (29, 30)."""
    first, count = (int(depth * _PLACE[method]), 1) if method in _PLACE else (depth // 8, 5)
    if targets == "gradient" and method != "ft":
        first, count = max(depth - 6, 0), 5
    return tuple(i for i in range(first, first + count) if i < depth - (method != "ft"))
