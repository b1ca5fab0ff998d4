"""Settings of an editing run: their declarations, the checks on their values, and their form in a run's records.

Each setting is declared once, as a `Setting`, beside the code that reads it: the loop's settings in `COMMON`, a
method's in `sphere_edit.methods.base.Method.settings`, the targets' in `sphere_edit.targets.base.Targets.settings`. The
command line, YAML files, studies and Python all read these declarations.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


class ConfigError(ValueError):
    """Invalid setting; the message names the setting, what was expected and what was given."""


@dataclass(frozen=True)
class Setting:
    """Declaration of one setting.

    Attributes:
        default: the value where none is given.
        doc: the effect of the setting, for users.
        expected: the allowed values, in words.
        fits: tells whether a value is allowed.
        flags: command-line options of the setting, if any; ``--set NAME=VALUE`` reaches every setting.
        solved: only methods that solve for updates use the setting, not methods that train.
    """

    default: Any
    doc: str
    expected: str
    fits: Callable[[Any], bool] = field(repr=False, compare=False)
    flags: tuple[str, ...] = ()
    solved: bool = False

    def check(self, name: str, value: Any) -> None:
        if not self.fits(value):
            raise ConfigError(f"{name}: expected {self.expected}, got {value!r}")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def flag(default: bool, doc: str, *flags: str) -> Setting:
    return Setting(default, doc, "true or false", lambda v: isinstance(v, bool), flags)


def choice(default: str, doc: str, values: tuple[str, ...], *flags: str, solved: bool = False) -> Setting:
    return Setting(default, doc, f"one of {', '.join(values)}", lambda v: v in values, flags, solved)


def text(default: str, doc: str, *flags: str) -> Setting:
    return Setting(default, doc, "a text", lambda v: isinstance(v, str) and bool(v), flags)


def positive_int(default: int, doc: str, *flags: str) -> Setting:
    return Setting(default, doc, "a whole number of at least 1", lambda v: _whole(v) and v >= 1, flags)


def count(default: int, doc: str, *flags: str) -> Setting:
    expected = "a whole number of at least 0 (and below 2^63)"
    return Setting(default, doc, expected, lambda v: _whole(v) and 0 <= v < 2**63, flags)


def positive(default: float, doc: str) -> Setting:
    return Setting(default, doc, "a number above 0", lambda v: _number(v) and v > 0)


def not_negative(default: float, doc: str) -> Setting:
    return Setting(default, doc, "a number of at least 0", lambda v: _number(v) and v >= 0)


def share(default: float, doc: str, *flags: str) -> Setting:
    return Setting(default, doc, "a number from 0 to 1", lambda v: _number(v) and 0 <= v <= 1, flags)


def below_one(default: float, doc: str) -> Setting:
    return Setting(default, doc, "a number of at least 0 and below 1", lambda v: _number(v) and 0 <= v < 1)


# sphere_edit.methods and sphere_edit.targets import this file and register here: a `Method` class, a `Targets` object.
METHODS: dict[str, Any] = {}
TARGETS: dict[str, Any] = {}

COMMON: dict[str, Setting] = {
    "layers": Setting(
        (),
        "Decoder blocks whose MLP is edited, ascending, e.g. 4,5,6,7,8. None: at the depth of the published presets: "
        "five blocks from an eighth of the depth on; one block for ROME and FT; the five before the last for gradient "
        "targets.",
        "a list of block numbers",
        lambda v: isinstance(v, tuple) and all(map(_whole, v)),
        ("--layers",),
    ),
    "modules": choice(
        "down",
        "The edited map of each block's MLP; fused is gate and up in one map (see `sphere_edit.model.structure`).",
        ("down", "up", "gate", "fused"),
    ),
    "method": text(
        "alphaedit",
        "The method that computes updates, or package.module:Class of your own (see `sphere_edit.methods`).",
        "--method",
    ),
    "targets": Setting(
        "closed_loop",
        "The source of the wanted changes (see `sphere_edit.targets`).",
        "a text",
        lambda v: isinstance(v, str),
        ("--targets",),
        solved=True,
    ),
    "batch_size": positive_int(100, "Facts solved for together.", "--batch-size"),
    "sphere": flag(
        True, "SPHERE: project each update out of the weight's principal directions.", "--sphere/--no-sphere"
    ),
    "energy_ratio": share(
        0.5, "η: the share of the spectrum's energy in the principal directions.", "--energy-ratio", "--eta"
    ),
    "alpha": share(
        0.5, "α: the suppressed share of an update within the principal directions; 0 none, 1 all.", "--alpha"
    ),
    "subspace": choice(
        "current",
        "Principal directions of the current weight (published code) or of the pretrained one (paper).",
        ("current", "pretrained"),
        "--subspace",
    ),
    "refresh_every": positive_int(1, "Batches between two computations of the current directions.", "--refresh-every"),
    "directions": choice(
        "exact",
        "How directions are computed. exact: by eigendecomposition. tracked: from batch to batch by matrix products; "
        "they hold energy_ratio too (see `sphere_kernels.streaming.HypersphereState`). Pretrained ones are exact.",
        ("exact", "tracked"),
        "--directions",
    ),
    "project": choice(
        "layer",
        "When updates are projected and written. layer: one layer after the other, so that each solve sees the "
        "written weights below. batch: after all layers are solved for, as in SPHERE's code for MEMIT and RECT "
        "and in EasyEdit's for AlphaEdit; each layer is solved for over the whole updates of the layers below (RECT's "
        "uncut), and nothing makes up for the part that the projection removes. solve: as layer, but half of the "
        "projection, P^½ of P = I − α U Uᵀ, is applied to the keys and half to the update, so that the written updates "
        "of AlphaEdit, MEMIT and ROME still make the wanted changes: for a ridge, with the least tr(Δ P⁻¹ Δᵀ). A "
        "history then holds the half-projected keys, which is exact while the directions stay the same, as the "
        "pretrained weight's do.",
        ("layer", "batch", "solve"),
        solved=True,
    ),
    "revive": below_one(
        0.0,
        "REVIVE's τ: updates of any method leave alone the leading singular directions of the pretrained weight, in "
        "rows and columns, whose singular values make up this share of their sum. 0: off.",
    ),
    "contexts": count(5, "Generated prefixes per fact, besides the bare prompt."),
    "context_length": positive_int(10, "Tokens per prefix."),
    "covariance_text": text(
        "builtin", "Text of the key covariance: builtin, or the path of a file (.txt, .gz).", "--covariance-text"
    ),
    "covariance_tokens": positive_int(100_000, "Tokens read from covariance_text at most."),
    "energy_s": not_negative(1.0, "s of the reported hyperspherical energy."),
    "guard": choice(
        "warn",
        "The action on a batch whose energies, updates or learned facts stand out from the run's earlier batches: warn "
        "keeps the batch and says so, skip undoes it and leaves its facts out, stop undoes it and ends the run, off "
        "checks nothing (see `sphere_edit.editing.guard`). May differ with --resume.",
        ("stop", "skip", "warn", "off"),
        "--guard",
    ),
    "measure_every": count(1, "Batches between two measurements of movement, spectrum and bound; 0: none."),
    "seed": count(0, "Seed of all random draws while editing; world-facts has its own: world-facts:seed=1.", "--seed"),
}


class EditConfig:
    """Settings of an editing run, each an attribute; immutable.

    Args:
        settings: settings of the loop (`COMMON`), the method and the targets, by name; the rest have their defaults,
            as in the preset ``auto``. ``sphere-edit settings`` lists every setting with its effect.

    Raises:
        ConfigError: a setting is unknown, a value does not fit, or settings do not go together.
    """

    layers: tuple[int, ...]
    modules: str
    method: str
    targets: str
    batch_size: int
    sphere: bool
    energy_ratio: float
    alpha: float
    subspace: str
    refresh_every: int
    directions: str
    project: str
    revive: float
    contexts: int
    context_length: int
    covariance_text: str
    covariance_tokens: int
    energy_s: float
    guard: str
    measure_every: int
    seed: int

    def __init__(self, **settings: Any) -> None:
        if isinstance(settings.get("layers"), list):
            settings["layers"] = tuple(settings["layers"])
        declared = declarations(settings.get("method", COMMON["method"].default))
        for name in settings:
            if name not in declared:
                method = str(settings.get("method"))
                if ":" in method and find_method(method) is None:
                    module = method.partition(":")[0]
                    raise ConfigError(
                        f"method: {method}: expected {module} to be imported before, found it is not, and so its "
                        f"setting {name!r} is not known"
                    )
                raise ConfigError(f"unknown setting {name!r}; known settings are {sorted(declared)}")
        values = {name: setting.default for name, setting in declared.items()} | settings
        for name, value in values.items():
            declared[name].check(name, value)
        if values["targets"] not in TARGETS:
            raise ConfigError(f"targets: expected one of {', '.join(TARGETS)}, got {values['targets']!r}")
        for name, why in _unused(values["method"], values["targets"]).items():
            if values[name] != declared[name].default:
                raise ConfigError(
                    f"{name}: {why}; expected {declared[name].default!r} (the default), got {values[name]!r}"
                )
        self.__dict__.update(values)
        for chosen in (find_method(self.method), TARGETS[self.targets]):
            if chosen is not None:
                chosen.check(self)

    def __getattr__(self, name: str) -> Any:  # gives a type to settings that methods and targets declare
        raise AttributeError(f"{name!r} is no setting of {self.__dict__.get('method')}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"settings are immutable; expected config.replace({name}={value!r})")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"settings are immutable; expected config.replace(…), not del {name}")

    def __eq__(self, other: object) -> bool:
        return self.__dict__ == other.__dict__ if isinstance(other, EditConfig) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.items()))

    def __repr__(self) -> str:
        declared = declarations(self.method)
        chosen = (f"{k}={v!r}" for k, v in self.__dict__.items() if v != declared[k].default)
        return f"EditConfig({', '.join(chosen)})"

    def replace(self, **changes: Any) -> EditConfig:
        """A copy with other values; settings that a new method or new targets do not use return to their defaults."""
        method, targets = changes.get("method", self.method), changes.get("targets", self.targets)
        known = declarations(method)
        dropped = unused_settings(method, targets) if (method, targets) != (self.method, self.targets) else ()
        kept = {name: value for name, value in self.__dict__.items() if name in known and name not in dropped}
        return EditConfig(**kept | changes)

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EditConfig:
        """Inverse of `to_dict`; missing settings have their defaults."""
        return cls(**{str(name): value for name, value in values.items()})

    @classmethod
    def from_run(cls, values: Mapping[str, Any]) -> EditConfig:
        """As `from_dict`, for the settings in a run's ``config.yaml``; unused settings are dropped."""
        values = as_recorded(values)
        unused = unused_settings(values.get("method", COMMON["method"].default), values["targets"])
        return cls.from_dict({name: value for name, value in values.items() if name not in unused})


def as_recorded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a run's ``config.yaml``; runs of version 0.1 name no targets and used optimised ones."""
    return {"targets": "optimised", **settings}


OPEN: dict[str, Any] = {"layers": [], "loop_arithmetic": "auto"}  # the editor chooses these by model and machine


def declarations(method: str | None = None) -> dict[str, Setting]:
    """All settings by name: the loop's, every method's, all targets', and a user-defined method's."""
    known = [*TARGETS.values(), *METHODS.values()]
    own = find_method(method)
    found = dict(COMMON)
    for one in known if own is None or own in known else [*known, own]:
        found |= one.settings
    return found


def defaults() -> dict[str, Any]:
    """The default of every setting."""
    return {name: setting.default for name, setting in declarations().items()}


def find_method(name: object) -> Any:
    """The class that a method's name stands for, if the class is registered or its module imported; else None."""
    module, colon, attribute = str(name).partition(":")
    if not colon:
        return METHODS.get(module)
    found = getattr(sys.modules.get(module), attribute, None)
    return found if all(hasattr(found, part) for part in ("settings", "presets", "check", "trains")) else None


def unused_settings(method: str, targets: str) -> list[str]:
    """Settings that the method and the targets do not use. A user-defined method may use every method's settings."""
    return list(_unused(method, targets))


def _unused(method: str, targets: str) -> dict[str, str]:
    """Unused settings by name, each with the reason."""
    own = find_method(method)
    solves = own is None or not own.trains
    found: dict[str, str] = {}
    if str(method) in METHODS:
        users: dict[str, list[str]] = {}
        for name, one in METHODS.items():
            solved = () if one.trains else (key for key, setting in COMMON.items() if setting.solved)
            for key in (*one.settings, *solved):
                users.setdefault(key, []).append(name)
        for key, names in users.items():
            if method not in names:
                found[key] = f"{method} has no use for it, only {', '.join(names)}"
    for kind, one in TARGETS.items():
        if not (solves and kind == targets):
            for key in one.settings:
                found[key] = f"only {kind} targets have a use for it, not {targets if solves else method}"
    return found
