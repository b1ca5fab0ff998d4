"""Ridge: AlphaEdit's solve, each batch for itself."""

from __future__ import annotations

from sphere_edit.methods.alphaedit import AlphaEdit


class Ridge(AlphaEdit, name="ridge"):
    """Solve ``(P KKᵀ + λI) Δᵀ = P K Rᵀ`` for every layer, ``P`` the null-space projector: keys are not remembered.

    With ``null_space: false`` and targets from gradients it is UltraEdit's solve, ``Δᵀ = (KKᵀ + λI)⁻¹ K Rᵀ``.

    Args:
        config: as for `AlphaEdit`.
        covariances: as for `AlphaEdit`; without a null space only their size is used.

    Source: Gu et al., UltraEdit (arXiv 2505.14679), with λ = 1.
    """

    def commit(self) -> None:
        self._solved.clear()
