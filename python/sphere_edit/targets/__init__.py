"""Where the wanted changes of a batch come from. How they are solved for is `sphere_edit.methods`' part.

``closed_loop`` finds them through the written weights in rounds, ``optimised`` in a model that is not written yet
(published), ``gradient`` from one backward pass (UltraEdit's).
"""

from sphere_edit.targets import closed_loop, gradient, optimised

__all__ = ["closed_loop", "gradient", "optimised"]
