"""Whole experiments: a run from the first evaluation to the last, and studies of several runs."""
