"""Editing methods: each computes the updates of weights, from keys and residuals or by training.

A method is a subclass of `Method` and declares its own settings and presets. SPHERE's projection and REVIVE's filter
come after every method. To add a method, put a file with ``class Mine(Method, name="mine")`` into this folder; nothing
else is needed. Or leave the class in a module of your own and name it as ``package.module:Class``.
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

# The order in which users see the methods; methods in files added later follow.
for _name in ("alphaedit", "memit", "rect", "prune", "rome", "ridge", "fine_tuning"):
    importlib.import_module(f"{__name__}.{_name}")
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def make_method(config: EditConfig, covariances: Mapping[int, Tensor]) -> Method:
    """Make the configured method for the layers of ``covariances`` ``{layer: [d, d]}``."""
    return method_class(config)(config, covariances)


def method_class(config: EditConfig) -> type[Method]:
    """The class that ``config.method`` names.

    The module of a ``package.module:Class`` must be imported before: settings may come from someone else's file, and a
    name in a file runs no code here. The command imports the module of a ``--method`` that its user types; it imports
    a module that a settings file or a run folder names with ``--trust-remote-code`` only.

    Raises:
        ConfigError: the method is unknown, its module is not imported, or it is no class made from `Method`.
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
