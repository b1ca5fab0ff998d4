"""FT: fine-tuning of the edited weights on the facts themselves."""

from __future__ import annotations

from sphere_edit.methods.base import Method


class FineTuning(Method):
    """Adam on the edited weights, see `sphere_edit.tuning.tune`; it remembers nothing."""

    trains = True
