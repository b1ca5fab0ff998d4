"""Studies: runs of one model and data with different settings; `study_results` compares the runs.

A study is a YAML file:

    title: the question
    model: a name or path, as for ``sphere-edit run``
    make_model: [python module, argument, …]   # optional: ``python -m`` with these makes a missing model
    data: as for ``sphere-edit run``, and limit, order, dtype, threads, preset, perplexity_text
    curve_every, curve_sample, curve_answers, score_sample, checkpoint_every, answers: as there
    settings: {…}           # for every run whose method has a use for them
    runs:                   # name: the run's own settings
      AlphaEdit: {method: alphaedit, sphere: false}
      AlphaEdit + SPHERE: {method: alphaedit}

Relative paths in the file start at the working directory of the command; ``$NAME`` in them is an environment variable.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sphere_edit.config import OPEN, ConfigError, EditConfig, as_recorded, defaults, unused_settings
from sphere_edit.data import load_requests
from sphere_edit.experiments.run import resume, run
from sphere_edit.methods import method_class
from sphere_edit.methods.importing import import_method
from sphere_edit.model.loading import load_by_name
from sphere_edit.runs import run_folder
from sphere_edit.runs.journal import InUse, RunError, locked
from sphere_edit.runs.spec import RunOptions, declared, recorded_options
from sphere_edit.settings import read_yaml
from sphere_edit.targets.presets import on_preset, preset

Say = Callable[[str], None]
OnProgress = Callable[[str, int, int], None]

# Options that a study may set for all of its runs.
_OPTIONS = {
    one.name: one
    for one in declared()
    if one.name in ("perplexity_text", "checkpoint_every", "score_sample", "answers") or one.name.startswith("curve_")
}
_COUNTS = {"limit": 1, "threads": 1} | {
    name: one.metadata["least"] for name, one in _OPTIONS.items() if "least" in one.metadata
}
_KIND_NAMES = {dict: "names with values", list: "a list", bool: "true or false"}
_KINDS = {"settings": dict, "runs": dict, "make_model": list, "answers": bool}


@dataclass(frozen=True)
class Study:
    """A study; the module's docstring explains the fields. ``name`` is the file's stem, ``options`` serve all runs."""

    name: str
    title: str
    model: str
    data: str
    runs: dict[str, dict[str, Any]]
    make_model: list[str] = field(default_factory=list)
    limit: int | None = None
    order: str | None = None
    dtype: str = "auto"
    threads: int = 1
    preset: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, trusted: bool = False) -> Study:
        """Read and check a study's file.

        Args:
            trusted: import the user's own methods that the file names.

        Raises:
            ConfigError: a field of the study or a setting of a run is unknown, missing or invalid.
        """
        found = read_yaml(path.read_text(encoding="utf-8"), str(path))
        if not isinstance(found, dict):
            raise ConfigError(f"{path}: expected the fields of a study, found {type(found).__name__}")
        known = [f.name for f in fields(cls) if f.name not in ("name", "options")] + list(_OPTIONS)
        for name in found:
            if name not in known:
                raise ConfigError(f"{path}: unknown field {name!r}; known fields are {', '.join(known)}")
        for name in ("title", "model", "data", "runs"):
            if name not in found:
                raise ConfigError(f"{path}: field {name!r} is missing")
        for name, value in found.items():
            _check(path, name, value)
        options = {name: found.pop(name) for name in _OPTIONS if name in found}
        study = cls(path.stem, options=options, **found)
        for name, own in study.runs.items():
            if not isinstance(name, str) or not slug(name):
                raise ConfigError(f"{path}: a run's name must have letters or digits from a to z, got {name!r}")
            if not isinstance(own, dict):
                raise ConfigError(f"{path}: run {name!r} must be settings, got {own!r}")
            try:
                import_method(study.method(name), trusted)
                study.config(name)
            except ConfigError as error:
                raise ConfigError(f"{path}: run {name!r}: {error}") from error
        if len({slug(name) for name in study.runs}) < len(study.runs):
            raise ConfigError(f"{path}: two runs have the same folder name; expected names that differ in letters")
        return study

    def method(self, run: str) -> str:
        return str(self.runs[run].get("method", self.settings.get("method", "alphaedit")))

    def config(self, run: str) -> EditConfig:
        """The settings of a run: the method's preset, then the study's of use to the method, then the run's."""
        method = self.method(run)
        targets = str((self.settings | self.runs[run]).get("targets", preset(self.preset, method).targets))
        shared = {name: value for name, value in self.settings.items() if name not in unused_settings(method, targets)}
        own = {name: expanded(value) for name, value in (shared | self.runs[run]).items()}
        config = on_preset(self.preset, own)
        method_class(config)  # raises for an unknown name
        return config

    def described(self) -> dict[str, Any]:
        """The fields, as results show them: all but runs and settings, each with its default."""
        shown = {one.name: getattr(self, one.name) for one in fields(self)}
        for name in ("runs", "settings", "options"):
            del shown[name]
        return shown | {name: self.options.get(name, one.default) for name, one in _OPTIONS.items()}

    def run_options(self, path: Path) -> RunOptions:
        """`RunOptions` of a run in folder ``path``."""
        return RunOptions(
            expanded(self.model),
            expanded(self.data),
            path,
            **{name: expanded(value) for name, value in self.options.items()},
            given={name: getattr(self, name) for name in ("limit", "order", "preset", "dtype")},
        )

    def check_own(self, run: str, path: Path) -> None:
        """Refuse a run folder that was not made for this run of the present study.

        Raises:
            RunError: the folder's config differs; the message names the difference.
        """
        record, options, config = run_folder.read_config(path), self.run_options(path), self.config(run)
        settings = config.to_dict()
        settings |= {name: record["settings"].get(name) for name, value in OPEN.items() if settings[name] == value}
        expected = {"model": options.model_name, "data": options.data_name, **options.given, "threads": self.threads}
        expected |= {name: getattr(options, name) for name in _OPTIONS} | settings
        found = {**record, **recorded_options(record), **defaults(), **as_recorded(record["settings"])}
        for name, value in expected.items():
            if found.get(name) != value:
                raise RunError(
                    f"{path} is not run {run!r} of this study: {name} is {found.get(name)!r} there, {value!r} here; "
                    "expected another folder, or that one removed"
                )


def _check(path: Path, name: str, value: Any) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if name in _COUNTS:
        least = _COUNTS[name]
        ok, expected = whole and value >= least, f"a whole number of at least {least}"
        ok = ok or (value is None and name in ("limit", "score_sample"))
    elif name in _KINDS:
        ok, expected = isinstance(value, _KINDS[name]), _KIND_NAMES[_KINDS[name]]
        ok = ok and (bool(value) or name != "runs")
        if name == "make_model":
            ok, expected = ok and all(isinstance(part, str) for part in value), "a list of texts"
    else:
        ok, expected = isinstance(value, str) and bool(value) or (value is None and name == "order"), "a text"
    if not ok:
        raise ConfigError(f"{path}: {name}: expected {expected}, got {value!r}")


def expanded(value: Any) -> Any:
    """A text with environment variables replaced; any other value unchanged."""
    return os.path.expandvars(value) if isinstance(value, str) else value


def slug(name: str) -> str:
    """The folder name of a run."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("+", "plus")).strip("-")


def go(
    study: Study,
    folder: Path,
    only: Sequence[str] = (),
    trusted: bool = False,
    say: Say = print,
    on_progress: OnProgress | None = None,
) -> None:
    """Make the runs of a study in ``folder``, one after another.

    A finished run stays. A stopped run is resumed. A run in use by another process is passed over, so the command may
    run twice at once. A run that hits an arithmetic error stops and stays as it is.

    Args:
        only: runs to make; by default all.
        trusted: run ``make_model``, and code that comes with the model.

    Raises:
        ConfigError, ValueError, RunError: as `experiments.run` raises them, or a run in ``folder`` is not the study's.
    """
    if unknown := [name for name in only if name not in study.runs]:
        raise ConfigError(f"run {unknown[0]!r} is not in the study; expected of {', '.join(study.runs)}")
    for name in only or study.runs:
        path = folder / slug(name)
        begun = (path / run_folder.JOURNAL).exists()
        if begun:
            study.check_own(name, path)
        if finished(path):
            say(f"{name}: finished")
            continue
        try:
            _make(study, name, path, trusted, say, on_progress)
        except InUse as error:
            say(f"{name}: passed over, {error}")
        except ArithmeticError as error:
            say(f"{name}: stopped, {error}")
        except RunError:
            if begun or not (path / run_folder.JOURNAL).exists():
                raise
            say(f"{name}: passed over, another process has begun it")


def finished(path: Path) -> bool:
    """Whether a run is complete, according to the journal's last line."""
    try:
        return json.loads((path / run_folder.JOURNAL).read_bytes().splitlines()[-1])["kind"] == "finished"
    except (OSError, ValueError, IndexError):
        return False


def _make(study: Study, name: str, path: Path, trusted: bool, say: Say, on_progress: OnProgress | None) -> None:
    options = study.run_options(path)

    def loaded() -> tuple[Any, Any]:
        return load_by_name(options.model_name, study.dtype, "cpu", study.threads, trusted)

    if (path / run_folder.JOURNAL).exists():
        with run_folder.existing_run(path) as journal:
            say(f"{name}: going on")
            resume(*loaded(), path, on_progress=on_progress, journal=journal)
        return
    requests = load_requests(options.data_name, limit=study.limit, order=study.order)
    path.parent.mkdir(parents=True, exist_ok=True)
    make_model(study, path.parent, trusted, say)
    with run_folder.new_run(path) as journal:
        say(f"{name}: begins")
        run(*loaded(), requests, study.config(name), options, on_progress=on_progress, journal=journal)


def make_model(study: Study, folder: Path, trusted: bool, say: Say) -> None:
    """Run ``make_model`` if the model is missing; the lock of ``folder`` admits one process at a time.

    Raises:
        ConfigError: the study is not ``trusted``, or ``make_model`` failed.
    """
    model = Path(expanded(study.model))
    if not study.make_model or (model / "config.json").exists():
        return
    module, *arguments = map(expanded, study.make_model)
    command = f"python -m {' '.join((module, *arguments))}"
    if not trusted:
        raise ConfigError(
            f"model {model} is missing; it is made by code that the study's file names: run '{command}', or if you "
            "trust it give --trust-remote-code"
        )
    with locked(folder):
        if (model / "config.json").exists():
            return
        say(f"making {model}: {command}")
        done = subprocess.run([sys.executable, "-m", module, *arguments])
    if done.returncode or not (model / "config.json").exists():
        raise ConfigError(f"'{command}' ended with status {done.returncode} and made no model {model}")
