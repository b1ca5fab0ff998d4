"""What the options of ``sphere-edit`` mean together, and against those of a run that goes on."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import yaml

from sphere_edit.config import DEFAULTS, OPEN, ConfigError, EditConfig, as_recorded, foreign, preset
from sphere_edit.methods import method_class
from sphere_edit.requests import EditRequest


def settings(
    preset_name: str, file: Path | None, pairs: list[str], named: dict[str, Any], trust_remote_code: bool = False
) -> EditConfig:
    """Preset (of the method that is named), then file, then ``--set``, then the named options: the later wins."""
    given = given_settings(file, pairs, named)
    chosen = on_preset(preset_name, given)
    typed = given_settings(None, pairs, named).get("method") == chosen.method
    import_method(chosen.method, trust_remote_code or typed)
    method_class(chosen)  # the method's name is known
    return chosen


def on_preset(name: str, given: Mapping[str, Any]) -> EditConfig:
    """The settings given, the rest from the preset of their method."""
    return EditConfig.from_dict({**preset(name, given.get("method"), given.get("targets")).to_dict(), **given})


def import_method(name: str, trusted: bool) -> None:
    """Import the module of a method named ``package.module:Class``; its code is run.

    A settings file or a run folder may come from someone else, and what it names must not run for that reason alone.

    Args:
        trusted: the user has typed the name, or said ``--trust-remote-code``.

    Raises:
        ConfigError: not trusted, or it cannot be imported.
    """
    module, colon, _ = name.partition(":")
    if not colon:
        return
    if not trusted:
        raise ConfigError(
            f"method: {name} is code that a file names; if you trust it, give --method {name} or --trust-remote-code"
        )
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nothing is hidden by it
    try:
        importlib.import_module(module)
    except Exception as error:
        raise ConfigError(
            f"method: {name} cannot be imported ({type(error).__name__}: {error}); expected package.module:Class"
        ) from error


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
    unused = foreign(
        values.get("method", recorded.get("method", DEFAULTS["method"])),
        values.get("targets", recorded.get("targets", DEFAULTS["targets"])),
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


def numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"layers: expected block numbers such as 4,5,6, got {text!r}") from None


def check_same(given: Mapping[str, Any], chosen: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    """Refuse to go on with a run with options other than its own; ``guard`` may change.

    Args:
        given: the options that were given, by parameter.
        chosen: the settings that they name.
        recorded: the run's ``config.yaml``.

    Raises:
        ConfigError: naming the option, what the run has, and what was given.
    """
    own = recorded_options(recorded)
    named = {name.removesuffix("_name"): value for name, value in given.items()}
    compared = {name: value for name, value in named.items() if name in own}
    for name, value in {**compared, **chosen}.items():
        if name == "guard":  # what is in the weights does not depend on it
            continue
        expected = {**own, **EditConfig().to_dict(), **as_recorded(recorded["settings"])}.get(name)
        if value != expected and value != OPEN.get(name, expected):
            raise ConfigError(
                f"{name}: the run was begun with {expected!r}, got {value!r}; begin a new run to change it"
            )


def recorded_options(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The options other than settings that a run was begun with, from its ``config.yaml``."""
    own = {name: recorded[name] for name in ("perplexity_text", "device", "save_model", "checkpoint_every")}
    later = {"curve_every": 0, "curve_sample": None, "curve_answers": 0, "score_sample": None, "answers": False}
    later |= {"judge": None, "judge_model": None, "harness_data": None, "harness_limit": None, "harness_ends": False}
    own |= {name: recorded.get(name, value) for name, value in later.items()}  # which earlier runs do not have
    own["harness"] = ",".join(recorded.get("harness") or ()) or None
    own |= {"overwrite": recorded["replaces"] is not None, "threads": recorded["environment"]["threads"]}
    own |= {"on_conflict": recorded["given"].get("on_conflict", "refuse")}  # as earlier runs and those from Python
    return own | {name: recorded["given"].get(name) for name in ("limit", "order", "preset", "dtype")}


def check_same_requests(given: Sequence[EditRequest], recorded: Sequence[EditRequest], name: str) -> None:
    """Refuse to go on with a run with other data than its own.

    Raises:
        ConfigError: naming the first request that is not the same.
    """
    for number, (one, other) in enumerate(zip_longest(given, recorded), 1):
        if one != other:
            texts = [f"{r.text!r} → {r.target_new!r}" if r else "none" for r in (other, one)]
            raise ConfigError(
                f"the data has changed: request {number} of {name} is {texts[1]}, the run was begun with {texts[0]}"
                if texts[0] != texts[1]
                else f"the data has changed: request {number} of {name} ({texts[0]}) differs from the run's"
            )


def load(model: str, dtype: str, device: str, threads: int | None, trust_remote_code: bool) -> tuple[Any, Any]:
    import transformers

    from sphere_edit.models import load_model

    if threads is not None:
        torch.set_num_threads(threads)
    if dtype not in ("auto", "float32", "bfloat16", "float16", "float64"):
        raise ConfigError(f"dtype: expected auto, float32, bfloat16, float16 or float64, got {dtype!r}")
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return load_model(
        model,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        device=device,
        trust_remote_code=trust_remote_code,
    )


def load_as(model: str, recorded: dict[str, Any], trust_remote_code: bool) -> tuple[Any, Any]:
    """Load the model of a run as it was loaded for it."""
    dtype = recorded["given"].get("dtype") or recorded["dtype"].removeprefix("torch.")
    return load(model, dtype, recorded["device"], None, trust_remote_code)
