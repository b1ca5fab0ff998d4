"""The declaration of one kind of targets: its settings, presets and checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sphere_edit.config import TARGETS, ConfigError, EditConfig, Setting


@dataclass(frozen=True)
class Targets:
    """Declaration of one value of the setting ``targets``.

    Attributes:
        settings: the settings that only these targets use, by name.
        presets: ``{preset: settings}``, the settings, of any kind, that these targets change in a preset.
        check: raises ConfigError where settings do not go together with these targets.
        first_layer: maps a depth to the first of the five blocks to edit; None leaves the choice to the method.
    """

    settings: Mapping[str, Setting]
    presets: Mapping[str, Mapping[str, Any]]
    check: Callable[[EditConfig], None]
    first_layer: Callable[[int], int] | None = None

    def register(self, name: str) -> None:
        TARGETS[name] = self


def all_at_once(config: EditConfig) -> None:
    """Check for targets that give the changes of all layers at once."""
    if config.project == "batch":
        raise ConfigError(
            f"project: {config.targets} targets solve for all layers at once; expected 'layer' or 'solve', got "
            f"{config.project!r}"
        )
