"""Settings as they are given: presets, YAML files, and pairs of name and value."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sphere_edit.config import COMMON, ConfigError, as_recorded, unused_settings


def given_settings(file: Path | None, pairs: list[str], named: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the options name, without the preset's; of a run's ``config.yaml`` those that the method has a
    use for."""
    values: dict[str, Any] = {}
    recorded: dict[str, Any] = {}
    if file is not None:
        loaded = read_yaml(file.read_text(encoding="utf-8"), str(file))
        if not isinstance(loaded, dict):
            raise ConfigError(f"{file}: expected settings as 'name: value' lines, found {type(loaded).__name__}")
        found = loaded.get("settings", loaded)
        if not isinstance(found, dict):
            raise ConfigError(f"{file}: expected settings as 'name: value' lines, found {found!r}")
        recorded, values = ({}, dict(found)) if found is loaded else (found, {})
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair}: expected NAME=VALUE")
        values[name] = read_yaml(value, f"--set {pair}")
    values |= {name: value for name, value in named.items() if value is not None}
    if recorded:
        recorded = as_recorded(recorded)
    unused = unused_settings(
        values.get("method", recorded.get("method", COMMON["method"].default)),
        values.get("targets", recorded.get("targets", COMMON["targets"].default)),
    )
    return {name: value for name, value in recorded.items() if name not in unused} | values


def read_yaml(text: str, where: str) -> Any:
    """YAML as its users write it: 1e-3, which YAML 1.1 takes for a text, is a number.

    Raises:
        ConfigError: not YAML; or a key given twice, or a number that YAML 1.1 reads in base 8 or 60 (010, 1:30).
    """
    try:
        return _numeric(yaml.load(text, _Loader))
    except _MisreadError as error:
        raise ConfigError(f"{where}, line {error.line}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML ({' '.join(str(error).split())})") from error


class _MisreadError(yaml.YAMLError):
    """Sound YAML that is not read as it looks."""

    def __init__(self, node: yaml.Node, message: str) -> None:
        super().__init__(message)
        self.line = node.start_mark.line + 1


class _Loader(yaml.SafeLoader):
    """Checks nodes as they are composed, before merge keys are put in place."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                first = seen[key.tag, key.value]
                raise _MisreadError(key, f"{key.value!r} is given twice; first in line {first}")
            seen[key.tag, key.value] = key.start_mark.line + 1
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        is_number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        base = 60 if ":" in node.value else 8 if re.fullmatch(r"[-+]?0[0-7_]+", node.value) else 10
        if is_number and base != 10:
            value = self.construct_object(node)
            raise _MisreadError(
                node, f"{node.value} would be read as {value}, base {base}; expected a plain number, or quotes"
            )
        return node


def _numeric(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numeric(item) for key, item in value.items()}
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9.]+[eE][-+]?[0-9]+", value):
        return float(value)
    return value
