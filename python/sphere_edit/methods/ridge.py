"""Ridge: AlphaEdit's solve without a history."""

from __future__ import annotations

from sphere_edit.methods.alphaedit import AlphaEdit


class Ridge(AlphaEdit, name="ridge"):
    """Solve ``(P KKᵀ + λI) Δᵀ = P K Rᵀ`` for every layer, ``P`` the null-space projector; no keys are kept.

    With ``null_space: false`` and gradient targets this is UltraEdit's solve, ``Δᵀ = (KKᵀ + λI)⁻¹ K Rᵀ``.

    Args:
        config: as for `AlphaEdit`.
        covariances: as for `AlphaEdit`; without a null space only their size is used.

    Source: Gu et al., UltraEdit (arXiv 2505.14679), with λ = 1.
    """

    def commit(self) -> None:
        self._solved.clear()
