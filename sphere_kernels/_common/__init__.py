"""Shared by several operations, in plain torch: argument checks, unit rows, tiles and pairs of the Gram matrix."""
