"""FT: fine-tuning of the edited weights on the facts themselves."""

from __future__ import annotations

from sphere_edit.methods.base import Method


class FineTuning(Method):
    """Adam on the edited weights, see `sphere_edit.tuning.tune`; it remembers nothing.

    Batch after batch, each to its end, is depth-first: later batches overwrite earlier ones. Breadth-first
    (``ft_minibatch``) goes through all facts of a batch in epochs, so the batch should be the whole set; it is kept
    whole or undone, and an interrupted one begins anew.
    """

    trains = True
