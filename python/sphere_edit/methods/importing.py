"""Methods of one's own, by the name of their module and class."""

from __future__ import annotations

import importlib
import os
import sys

from sphere_edit.config import ConfigError


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
