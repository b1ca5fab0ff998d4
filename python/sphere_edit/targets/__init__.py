"""Targets: sources of a batch's wanted changes. `sphere_edit.methods` solves for the changes.

``closed_loop`` finds the changes in rounds, through the written weights; ``optimised`` before anything is written
(published); ``gradient`` from one backward pass (UltraEdit's). Each declares its own settings, presets and checks.
"""

from sphere_edit.targets import closed_loop, gradient, optimised

__all__ = ["closed_loop", "gradient", "optimised"]
