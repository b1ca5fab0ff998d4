"""How a way to find wanted changes presents itself: its settings, presets and checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sphere_edit.config import TARGETS, ConfigError, EditConfig, Setting


@dataclass(frozen=True)
class Targets:
    """One value of the setting ``targets``.

    Attributes:
        settings: that only these targets have a use for.
        presets: ``{preset: settings}``, any settings, for presets that are changed by choosing these targets.
        check: raises ConfigError where settings do not go together with these targets.
        first_layer: for a depth the first of the five blocks to edit, where that is not a method's own choice.
    """

    settings: Mapping[str, Setting]
    presets: Mapping[str, Mapping[str, Any]]
    check: Callable[[EditConfig], None]
    first_layer: Callable[[int], int] | None = None

    def register(self, name: str) -> None:
        TARGETS[name] = self


def all_at_once(config: EditConfig) -> None:
    """The check of targets that ask for changes of all layers at once."""
    if config.project == "batch":
        raise ConfigError(
            f"project: {config.targets} targets solve for all layers at once; expected 'layer' or 'solve', got "
            f"{config.project!r}"
        )
