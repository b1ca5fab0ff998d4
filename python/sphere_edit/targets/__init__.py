"""Where the wanted changes of a batch come from. How they are solved for is `sphere_edit.methods`' part."""

from sphere_edit.targets import closed_loop, gradient, optimised

__all__ = ["closed_loop", "gradient", "optimised"]
