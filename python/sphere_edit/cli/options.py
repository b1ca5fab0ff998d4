"""Build the options of ``sphere-edit run`` from declared settings; combine preset, file and options; check a resume."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from sphere_edit.config import COMMON, METHODS, OPEN, TARGETS, ConfigError, EditConfig, as_recorded, declarations
from sphere_edit.data.requests import EditRequest
from sphere_edit.methods import method_class
from sphere_edit.methods.importing import import_method
from sphere_edit.model.loading import load_by_name
from sphere_edit.runs.spec import declared, recorded_options
from sphere_edit.settings import given_settings
from sphere_edit.targets.presets import on_preset


def with_declared_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes ``**given`` an option for every setting with flags and every option of a run.

    A setting that the user does not give is None: the preset decides.
    """
    known = {"method": METHODS, "targets": TARGETS}
    settings = {
        name: _parameter(
            name,
            None,
            str if name == "layers" else type(setting.default),
            _option(setting.doc + (f" One of {', '.join(known[name])}." if name in known else ""), setting.flags),
        )
        for name, setting in declarations().items()
        if setting.flags
    }
    options = {
        one.name: _parameter(
            one.name,
            one.default or None if one.name == "harness" else one.default,
            _KINDS[str(one.type).split(" | ")[0]],
            option_of(one.name),
        )
        for one in declared()
    }
    signature = inspect.signature(command, eval_str=True)
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    made: Any = functools.wraps(command)(lambda **given: command(**given))
    made.__signature__ = signature.replace(parameters=[*own, *settings.values(), *options.values()])
    return cast(Callable[..., None], made)


def split_options(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split the options of `with_declared_options`: settings by name, None if not given; arguments of `RunOptions`."""
    of_run = {one.name: given[one.name] for one in declared()}
    tasks = of_run["harness"]
    of_run["harness"] = () if tasks is None else tuple(name.strip() for name in tasks.split(","))
    named = {name: value for name, value in given.items() if name not in of_run}
    if named["layers"] is not None:
        named["layers"] = numbers(named["layers"])
    return named, of_run


_KINDS = {"str": str, "int": int, "bool": bool, "tuple[str, ...]": str}


def option_of(name: str) -> Any:
    """The command-line option that a field of `RunOptions` declares."""
    said = next(one.metadata for one in declared() if one.name == name)
    return _option(said["doc"], said.get("flags", ()), min=said.get("least"), metavar=said.get("metavar"))


def _option(doc: str, flags: Sequence[str], **more: Any) -> Any:
    return typer.Option(*flags, help=doc.replace("`", ""), **more)


def _parameter(name: str, default: Any, kind: type, option: Any) -> inspect.Parameter:
    annotation = Annotated[kind if default is not None else kind | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def settings(
    preset_name: str, file: Path | None, pairs: list[str], named: dict[str, Any], trust_remote_code: bool = False
) -> EditConfig:
    """Combine preset (of the named method), file, ``--set`` and named options into one config; the last one wins."""
    given = given_settings(file, pairs, named)
    if "method" in given:
        COMMON["method"].check("method", given["method"])
        typed = given_settings(None, pairs, named).get("method") == given["method"]
        import_method(given["method"], trust_remote_code or typed)
    chosen = on_preset(preset_name, given)
    method_class(chosen)  # raises for an unknown name
    return chosen


def numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"layers: expected block numbers such as 4,5,6, got {text!r}") from None


def check_same(given: Mapping[str, Any], chosen: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    """Refuse to resume a run with options that differ from the record; ``guard`` may change.

    Args:
        given: the user's options, by parameter.
        chosen: the settings among them.
        recorded: the run's ``config.yaml``.

    Raises:
        ConfigError: an option differs; the message names the option, the recorded value and the given one.
    """
    own = recorded_options(recorded)
    named = {name.removesuffix("_name"): value for name, value in given.items()}
    compared = {name: value for name, value in named.items() if name in own}
    for name, value in {**compared, **chosen}.items():
        if name == "guard":  # the weights do not depend on the guard
            continue
        expected = {**own, **EditConfig().to_dict(), **as_recorded(recorded["settings"])}.get(name)
        if value != expected and value != OPEN.get(name, expected):
            raise ConfigError(
                f"{name}: the run was begun with {expected!r}, got {value!r}; begin a new run to change it"
            )


def check_same_requests(given: Sequence[EditRequest], recorded: Sequence[EditRequest], name: str) -> None:
    """Refuse to resume a run with other data.

    Raises:
        ConfigError: a request differs; the message names the first such request.
    """
    for number, (one, other) in enumerate(zip_longest(given, recorded), 1):
        if one != other:
            texts = [f"{r.text!r} → {r.target_new!r}" if r else "none" for r in (other, one)]
            raise ConfigError(
                f"the data has changed: request {number} of {name} is {texts[1]}, the run was begun with {texts[0]}"
                if texts[0] != texts[1]
                else f"the data has changed: request {number} of {name} ({texts[0]}) differs from the run's"
            )


def load_as(model: str, recorded: dict[str, Any], trust_remote_code: bool) -> tuple[Any, Any]:
    """Load a model with the dtype and on the device that a run recorded."""
    dtype = recorded["given"].get("dtype") or recorded["dtype"].removeprefix("torch.")
    return load_by_name(model, dtype, recorded["device"], None, trust_remote_code)
