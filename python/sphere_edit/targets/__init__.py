"""Targets: sources of a batch's wanted changes. `sphere_edit.methods` solves for the changes.

``closed_loop`` finds the changes in rounds, through the written weights; ``optimised`` before anything is written
(published); ``gradient`` from one backward pass (UltraEdit's). Each declares its own settings, presets and checks.
"""

import importlib

for _name in ("optimised", "closed_loop", "gradient"):  # the order in which they are named to users
    importlib.import_module(f"{__name__}.{_name}")
