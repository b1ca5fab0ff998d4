"""Import user-defined methods by module and class name."""

from __future__ import annotations

import importlib
import os
import sys

from sphere_edit.config import ConfigError


def import_method(name: str, trusted: bool) -> None:
    """Import the module of a method named ``package.module:Class``; this runs the module's code.

    A settings file or a run folder may come from someone else: a name in one must not run code for that reason alone.

    Args:
        trusted: the user typed the name, or gave ``--trust-remote-code``.

    Raises:
        ConfigError: the name is not trusted, or its module cannot be imported.
    """
    module, colon, _ = name.partition(":")
    if not colon:
        return
    if not trusted:
        raise ConfigError(
            f"method: {name} is code that a file names; if you trust it, give --method {name} or --trust-remote-code"
        )
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that it hides no other module
    try:
        importlib.import_module(module)
    except Exception as error:
        raise ConfigError(
            f"method: {name} cannot be imported ({type(error).__name__}: {error}); expected package.module:Class"
        ) from error
