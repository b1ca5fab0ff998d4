"""PRUNE: MEMIT, with the sum of updates restrained by the largest singular value of the weight before."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sphere_edit.config import ConfigError, EditConfig, choice
from sphere_edit.methods.memit import Memit
from sphere_edit.updates import Update
from sphere_kernels import LowRankUpdate, principal_directions, sparse_projection


class Prune(Memit, name="prune"):
    """MEMIT with a restrained sum of updates: singular values ``s > m`` of the sum become ``min(s, m + log(s / m))``.

    ``m`` is the largest singular value of the weight before all edits. The sum is not stored: it follows from the
    weight, since that function has an inverse. Later batches are solved for the weight that is used. For ``m < 1`` the
    published ``m + log(s / m)`` alone would enlarge singular values just above m.

    With ``prune_in: copies``, as published, the loop writes whole updates and `finish` restrains their sum; SPHERE then
    projects the restrained sum out of the directions of the weight before.

    Source: Ma et al., Perturbation-Restrained Sequential Model Editing (ICLR 2025).
    """

    settings = Memit.settings | {
        "prune_in": choice(
            "weights",
            "The weights that PRUNE restrains. weights: the weights that the next batch is solved for. copies, as "
            "published: the loop goes on with whole updates, neither restrained nor projected; the evaluated and saved "
            "weight (see `SphereEditor.hand_over`) is the weight before all edits plus the sum of updates, restrained, "
            "then projected out of that weight's directions. Figures by batch are of the loop's weights.",
            ("weights", "copies"),
        )
    }

    @classmethod
    def check(cls, config: EditConfig) -> None:
        if config.prune_in != "copies":
            return
        if config.revive:
            raise ConfigError(
                f"revive: expected 0 where prune_in is 'copies' and the loop whole, got {config.revive!r}"
            )
        if config.project != "layer":
            raise ConfigError(
                f"project: expected 'layer' where prune_in is 'copies' and the loop whole, got {config.project!r}"
            )

    def __init__(self, config: EditConfig, covariances: Mapping[int, Tensor]) -> None:
        super().__init__(config, covariances)
        self._limits: dict[int, Tensor] = {}
        self.projects = config.prune_in == "copies"
        self._energy_ratio, self._alpha = config.energy_ratio, config.alpha if config.sphere else 0.0

    def restrain(self, layer: int, update: Update, weight: Tensor, original: Tensor) -> Update:
        if self.projects:
            return update
        assert isinstance(update, LowRankUpdate)
        limit, total = self._limit(layer, original), weight.double() - original.double()
        whole = _changed(total, limit, lambda s: torch.maximum(s, limit * (s - limit).exp()))
        for part in (whole, update):
            total.addmm_(part.left.double(), part.right.double())
        parts = (update, whole, _held(total, limit))
        return LowRankUpdate(torch.cat([p.left for p in parts], 1), torch.cat([p.right for p in parts]))

    def finish(self, layer: int, weight: Tensor, original: Tensor) -> Tensor:
        total = weight.double() - original.double()
        if not self.projects or not total.any():
            return weight
        held = _held(total, self._limit(layer, original))
        total.addmm_(held.left.double(), held.right.double())
        if self._alpha:
            total = sparse_projection(total, principal_directions(original, self._energy_ratio), self._alpha)
        return total.add_(original)

    def _limit(self, layer: int, original: Tensor) -> Tensor:
        if layer not in self._limits:
            self._limits[layer] = torch.linalg.matrix_norm(original.double(), 2)
        return self._limits[layer]


def _held(total: Tensor, limit: Tensor) -> LowRankUpdate:
    """The change that restrains the sum of updates."""
    return _changed(total, limit, lambda s: torch.minimum(s, limit + (s / limit).log()))


def _changed(matrix: Tensor, limit: Tensor, change: Callable[[Tensor], Tensor]) -> LowRankUpdate:
    """The fp32 change of a matrix ``[n, d]`` that maps its singular values above a limit by ``change``."""
    if matrix.norm() <= limit:  # no singular value is above the limit
        return LowRankUpdate(matrix[:, :0].float(), matrix[:0].float())
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
    large = squares > limit.square()
    values, vectors = squares[large].sqrt(), vectors[:, large]
    return LowRankUpdate((vectors * (change(values) / values - 1)).float(), (vectors.T @ matrix).float())
