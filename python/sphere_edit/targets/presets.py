"""Presets: published settings of models and methods, and settings chosen here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sphere_edit.config import COMMON, TARGETS, ConfigError, EditConfig, find_method, unused_settings

_OF_GRADIENTS = {"method": "ridge", "targets": "gradient", "null_space": False, "sphere": False, "contexts": 0}
# Each preset for its own method and targets; `preset` applies the changes that other methods and targets declare. The
# settings of llama3-8b, gpt2-xl and gpt-j-6b are AlphaEdit's hparams, those of qwen2.5-7b SPHERE's.
_BASES: dict[str, dict[str, Any]] = {
    "auto": {},
    "llama3-8b": {"targets": "optimised", "layers": (4, 5, 6, 7, 8)},
    "qwen2.5-7b": {"targets": "optimised", "layers": (4, 5, 6, 7, 8)},
    "gpt2-xl": {"targets": "optimised", "layers": (13, 14, 15, 16, 17)},
    "gpt-j-6b": {"targets": "optimised", "layers": (3, 4, 5, 6, 7, 8)},
    # ridge: chosen from 10 (published) to 160 on the first 1,000 CounterFact facts, see study 4 in benchmarks/study.
    "smollm2-135m": {"layers": (4, 5, 6, 7, 8), "contexts": 0, "ridge": 40.0},
    # The best of seven settings tried on the first CounterFact facts; gemma.yaml in benchmarks/study has mostly others.
    "gemma3-270m": {"layers": (2, 3, 4, 5, 6), "contexts": 0, "null_space_threshold": 5e-3},
    # For any model, without SPHERE, as published; --sphere projects these updates like any other method's.
    "ultraedit": _OF_GRADIENTS | {"ridge": 1.0},
    "stableedit": _OF_GRADIENTS | {"ridge": 10.0, "gradient_whiten": True, "gradient_preheat": 1000},
    # For any model, at FT's block (published: 22 of Llama-3-8B's 32, 6 of Qwen2.5-7B's 28). All facts are one batch, up
    # to the paper's 100,000.
    "locft-bf": {
        "method": "ft",
        "sphere": False,
        "contexts": 0,
        "batch_size": 100_000,
        "ft_minibatch": 100,
        "ft_eos": True,
    },
}


def preset(name: str, method: str | None = None, targets: str | None = None) -> EditConfig:
    """The preset of that name, with the changes that the method and the targets declare for it.

    Raises:
        ConfigError: the preset is unknown; or as `EditConfig`.
    """
    if name not in _BASES:
        raise ConfigError(f"preset {name!r} is not known; expected one of {', '.join(_BASES)}")
    for key, value in (("method", method), ("targets", targets)):
        if value is not None:
            COMMON[key].check(key, value)
    base = _BASES[name]
    default = {one: setting.default for one, setting in COMMON.items()}
    method = method or base.get("method", default["method"])
    targets = targets or base.get("targets", default["targets"])
    solver = find_method(method)
    if solver is not None and solver.trains:
        targets = default["targets"]
    values = dict(base)
    for own in (TARGETS.get(targets), solver):
        if own is not None:
            values |= own.presets.get("*", {}) | own.presets.get(name, {})
    unused = unused_settings(method, targets)
    used = {key: value for key, value in values.items() if key not in unused}
    return EditConfig(**used | {"method": method, "targets": targets})


def on_preset(name: str, given: Mapping[str, Any]) -> EditConfig:
    """The given settings; the preset, for their method and targets, gives the rest."""
    return EditConfig.from_dict({**preset(name, given.get("method"), given.get("targets")).to_dict(), **given})


def auto_layers(depth: int, method: str = "alphaedit", targets: str = "optimised") -> tuple[int, ...]:
    """Five blocks from an eighth of the depth on (4–8 of 32); fewer where the model is shallow, never the last.

    For ROME and FT, one block at the published depth; FT may have the last block. For gradient targets, the five before
    the last (26–30 of 32).
    """
    solver = find_method(method)
    place, trains = (None, False) if solver is None else (solver.place, solver.trains)
    first, number = (depth // 8, 5) if place is None else (int(depth * place), 1)
    elsewhere = TARGETS[targets].first_layer
    if elsewhere is not None and not trains:
        first, number = elsewhere(depth), 5
    return tuple(i for i in range(first, first + number) if i < depth - (not trains))


PRESETS: dict[str, EditConfig] = {name: preset(name) for name in _BASES}
