"""Models: load them, find their parts, run all or some of their blocks."""
