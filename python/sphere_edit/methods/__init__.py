"""Editors: how the update of one weight follows from keys and residuals.

A method is a class with `Method`'s functions; SPHERE's projection, and REVIVE's filter, come after any of them. To add
one, put a file with it into this folder, ``class Mine(Method, name="mine")``, and nothing else; or leave it where it is
and name it as ``package.module:Class``.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Mapping

from torch import Tensor

from sphere_edit.config import METHODS, ConfigError, EditConfig
from sphere_edit.methods.base import Method
from sphere_edit.updates import Update

__all__ = ["METHODS", "Method", "Update", "make_method", "method_class"]

# The order in which they are named to users; those of files added later follow.
for _name in ("alphaedit", "memit", "rect", "prune", "rome", "ridge", "fine_tuning"):
    importlib.import_module(f"{__name__}.{_name}")
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def make_method(config: EditConfig, covariances: Mapping[int, Tensor]) -> Method:
    """The method that the configuration names, for the layers of ``covariances`` ``{layer: [d, d]}``."""
    return method_class(config)(config, covariances)


def method_class(config: EditConfig) -> type[Method]:
    """The class that ``config.method`` names.

    A ``package.module:Class`` must have been imported: settings may be read from a file of someone else's, and a name
    in a file runs no code here. The command imports what its user types as ``--method``, and what a settings file or
    a run folder names by ``--trust-remote-code`` only.

    Raises:
        ConfigError: there is no such method.
    """
    name = config.method
    if ":" in name:
        module, _, attribute = name.partition(":")
        if module not in sys.modules:
            raise ConfigError(f"method: {name}: expected {module} to be imported before, found it is not")
        found = getattr(sys.modules[module], attribute, None)
        if not (isinstance(found, type) and issubclass(found, Method)):
            raise ConfigError(f"method: {name}: expected a class made from sphere_edit.methods.Method, got {found!r}")
        return found
    if name not in METHODS:
        known = ", ".join(METHODS)
        raise ConfigError(f"method: expected one of {known}, got {name!r}; your own is named package.module:Class")
    return METHODS[name]
