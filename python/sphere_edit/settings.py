"""Read the settings that a user gives: YAML files and NAME=VALUE pairs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sphere_edit.config import COMMON, ConfigError, as_recorded, unused_settings


def given_settings(file: Path | None, pairs: list[str], named: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the given settings, without a preset's: the file's, then the ``--set`` pairs, then the named options.

    From a run's ``config.yaml``, settings are dropped that the method and the targets do not use.
    """
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
    """Parse YAML, and read 1e-3, a text in YAML 1.1, as a number.

    Raises:
        ConfigError: invalid YAML, a key given twice, or a number that YAML 1.1 reads in base 8 or 60 (010, 1:30).
    """
    try:
        return _numeric(yaml.load(text, _Loader))
    except _MisreadError as error:
        raise ConfigError(f"{where}, line {error.line}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML ({' '.join(str(error).split())})") from error


class _MisreadError(yaml.YAMLError):
    """Valid YAML that does not mean what it seems to say."""

    def __init__(self, node: yaml.Node, message: str) -> None:
        super().__init__(message)
        self.line = node.start_mark.line + 1


class _Loader(yaml.SafeLoader):
    """Check nodes while they are composed, before merge keys are resolved."""

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
