"""Whole experiments: a run from its first evaluation to its last, and studies of several."""
