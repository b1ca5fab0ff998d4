"""A weight on the hypersphere whose energy and principal directions follow its low-rank updates."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sphere_kernels.directions import PrincipalDirections
from sphere_kernels.directions.leading import Leading, by_eigh
from sphere_kernels.directions.small_side import SmallSide
from sphere_kernels.energy import orthogonal_energy
from sphere_kernels.gram import gram_update_energy_
from sphere_kernels.products import products_for
from sphere_kernels.rows import compute_dtype, row_chunks
from sphere_kernels.streaming.validation import check_factors, check_loaded, check_right, check_state

CHECK_EVERY = 10  # updates between two looks at the drift
SAMPLE = 16  # rows of M that a look recomputes
DRIFT = {torch.float32: 1e-5, torch.float64: 1e-13}  # of a cosine; past it everything is recomputed
SPREAD = 100.0  # of the eigenvalues: up to there W^T coefficients are orthonormal to 1e-4 in fp32


class HypersphereState:
    """Weight, Gram matrix, hyperspherical energy and principal directions, kept current over low-rank updates.

    For ``W' = W + R X`` the unnormalised Gram matrix ``M = W W^T`` is updated, not recomputed, and everything else
    follows from it: norms from its diagonal, the energy in the pass that writes it, the directions from the
    eigenproblem of its normalised form. A batch costs O(n d b + n^2 b), and a refresh O(n^3), never O(d^2).

    Args:
        weight: ``[..., n, d]``, one neuron per row: a matrix or a batch of layers; float64, float32, bfloat16 or
            float16. It is updated in place, also as a Parameter or a strided view. Of a 16-bit weight the state keeps
            an fp32 master, and the weight is always the master rounded: nothing accumulates rounding.
        s: exponent of the energy, at least 0.
        energy_ratio, alpha: as for `principal_directions` and `sparse_projection`; with ``alpha = 0`` directions are
            never computed.
        refresh_every: updates between two computations of the directions; they are those of the weight before updates
            0, m, 2m, ….
        subspace: directions of the ``"current"`` weight (published code) or of the ``"pretrained"`` one (paper), which
            is the weight as given here.
        impl: implementation, see `sphere_kernels.dispatch.select`.

    Attributes:
        weight: as given.
        master: what the state is about: ``weight`` itself, or its fp32 master.
        gram: ``[..., n, n]``, M, fp64 for an fp64 weight, else fp32.
        neuron_energy: ``[..., n]`` fp64.
        updates: how many there have been.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, range or device; a weight that is empty, not finite or, at
            the first directions, has a zero matrix.

    Numerics:
        Energies as `gram_update_energy_` states. Every `CHECK_EVERY` updates `check` looks for drift. Memory: M; in a
        call about three matrices ``[n, n]`` more where directions are computed; the basis ``[d, r]`` where it outlives
        its weight (``refresh_every > 1`` or ``"pretrained"``). Results depend on the number of threads only through
        torch's ``eigh`` and ``qr``. An interrupt within `update_` leaves the state between two updates: load a copy of
        an earlier `state_dict`, or call `recompute`.

    Source:
        SPHERE, arXiv 2510.01172; ``M' = M + Z R^T + R Z^T + R (X X^T) R^T``, ``Z = W X^T``.
    """

    def __init__(
        self,
        weight: Tensor,
        s: float = 1.0,
        energy_ratio: float = 0.5,
        alpha: float = 0.5,
        refresh_every: int = 1,
        subspace: str = "current",
        *,
        impl: str = "auto",
    ) -> None:
        check_state(weight, s, energy_ratio, alpha, refresh_every, subspace, impl)
        self.weight = weight.detach()
        self.s, self.energy_ratio, self.alpha = float(s), float(energy_ratio), float(alpha)
        self.refresh_every, self.subspace, self._impl = int(refresh_every), subspace, impl
        self.master = self.weight.to(compute_dtype(weight))
        self._products = products_for(self.master, impl)
        self.updates = 0
        self._leading: Leading | None = None  # directions of the weight as it is, as combinations of its rows
        self._held: PrincipalDirections | None = None  # or as a basis, which may be an earlier weight's
        self._known_at: int | None = None  # how many updates there had been
        self.recompute()
        if alpha and subspace == "pretrained":
            self._refresh()

    @property
    def norms(self) -> Tensor:
        """Lengths of the rows, fp64 ``[..., n]``."""
        return self.gram.diagonal(dim1=-2, dim2=-1).double().clamp_min(0).sqrt()

    @property
    def energy(self) -> Tensor:
        """Hyperspherical energy of ``master``, fp64 ``[...]``."""
        return self.neuron_energy.sum(-1)

    @property
    def excess(self) -> Tensor:
        """Energy beyond that of orthogonal rows, fp64 ``[...]``."""
        return self.energy - orthogonal_energy(self.master.shape[-2], self.s)

    @property
    def rank(self) -> Tensor:
        """Number of the directions in use, int64 ``[...]``; 0 with ``alpha = 0``."""
        if not self.alpha:
            return torch.zeros(self.master.shape[:-2], dtype=torch.int64, device=self.master.device)
        return self.directions.rank if self._leading is None else self._leading.ranks

    @property
    def held_ratio(self) -> Tensor:
        """Share of the energy (the trace of C) that the directions in use hold, fp64 ``[...]``."""
        if not self.alpha:
            return torch.zeros(self.master.shape[:-2], dtype=torch.float64, device=self.master.device)
        return self.directions.energy_ratio if self._leading is None else self._leading.held_ratio()

    @property
    def directions(self) -> PrincipalDirections:
        """The directions that `project` keeps out of at present."""
        self._refresh()
        if self._held is not None:
            return self._held
        assert self._leading is not None
        return self._leading.directions()

    @torch.no_grad()
    def project(self, right: Tensor) -> Tensor:
        """``right - alpha (right U) U^T``, what `sparse_projection` makes of an update's right factor.

        Args:
            right: ``[..., b, d]`` with the weight's leading dimensions; computed in the dtype of ``master``.

        Returns:
            ``[..., b, d]`` in the dtype of ``master``; with ``alpha = 0``, ``right`` unchanged.

        Raises:
            TypeError, ValueError: a factor that does not fit; a weight with a zero matrix.
        """
        check_right(right, self.weight)
        right = right.to(self.master.dtype)
        if not self.alpha:
            return right
        self._refresh()
        products, out = self._products, right.clone(memory_format=torch.contiguous_format)
        if self._held is not None:
            basis = self._held.basis
            products.add_(out, products.matmul(right, basis).mul_(-self.alpha), basis.mT)
            return out
        # U = W^T C is not formed: b rows pass through W more cheaply than r directions would.
        assert self._leading is not None
        coefficients = self._leading.coefficients()
        inside = products.matmul(products.matmul(right, self.master.mT), coefficients)
        products.add_(out, products.matmul(inside, coefficients.mT).mul_(-self.alpha), self.master)
        return out

    @torch.no_grad()
    def update_(self, left: Tensor, right: Tensor) -> None:
        """``weight += left @ right``; Gram matrix and energies follow.

        Args:
            left: ``[..., n, b]``; computed in the dtype of ``master``, as is ``right``.
            right: ``[..., b, d]``, already projected.

        Raises:
            TypeError, ValueError: a factor that does not fit; FloatingPointError: one that is not finite. Nothing has
            been changed then.
        """
        check_factors(left, right, self.weight)
        if self.alpha and self.subspace == "current" and self.refresh_every > 1:
            self._refresh()  # they serve later updates too, whether or not this one was projected
        left, right = left.to(self.master.dtype), right.to(self.master.dtype)
        products = self._products
        cross, inner = products.matmul(self.master, right.mT), products.gram(right)
        products.add_(self.master, left, right)
        self._leading = None
        if self.subspace == "current" and self.refresh_every == 1:
            self._held = None
        self.neuron_energy = gram_update_energy_(
            self.gram, left, cross, inner, self.s, weight=self.master, impl=self._impl
        )
        if self.master is not self.weight:
            self.weight.copy_(self.master)
        self.updates += 1
        if self.updates % CHECK_EVERY == 0:
            self.check()

    @torch.no_grad()
    def check(self) -> float:
        """Recompute a sample of M; past the bound `DRIFT`, recompute everything.

        Returns:
            The largest error of ``m_ij / (|w_i| |w_j|)`` in `SAMPLE` rows, other ones at each update, against fp64.
        """
        n, d = self.master.shape[-2:]
        picked = (torch.arange(min(SAMPLE, n), device=self.master.device) * n // min(SAMPLE, n) + self.updates) % n
        sample = self.master[..., picked, :].double()
        exact, norm = [], []
        for chunk in row_chunks(n, d * max(1, self.master[..., 0, 0].numel())):
            rows = self.master[..., chunk, :].double()
            exact.append(sample @ rows.mT)
            norm.append(torch.linalg.vector_norm(rows, dim=-1))
        length = torch.cat(norm, -1)
        error = (self.gram[..., picked, :] - torch.cat(exact, -1)).abs_()
        error /= (length[..., picked].unsqueeze(-1) * length.unsqueeze(-2)).clamp_min_(torch.finfo(torch.float64).tiny)
        drift = float(error.amax())
        if not drift <= DRIFT[self.gram.dtype]:  # NaN is past any bound
            self.recompute()
        return drift

    @torch.no_grad()
    def recompute(self) -> None:
        """Gram matrix and energies anew from ``master``; the directions in use stay until they are due."""
        self.gram = self._products.gram(self.master)
        *leading, n, _ = self.master.shape
        nothing = self.master.new_zeros(*leading, n, 0)
        inner = self.master.new_zeros(*leading, 0, 0)
        self.neuron_energy = gram_update_energy_(
            self.gram, nothing, nothing, inner, self.s, weight=self.master, impl=self._impl
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that decides what comes next, bit for bit, by reference: clone what shall outlive an update."""
        state = {
            "master": self.master,
            "gram": self.gram,
            "neuron_energy": self.neuron_energy,
            "updates": torch.tensor(self.updates),
        }
        if self._held is not None:
            held = self._held
            state |= {"basis": held.basis, "eigenvalues": held.eigenvalues, "rank": held.rank}
            state |= {"energy_ratio": held.energy_ratio}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict` of a state with the same arguments; the weight is written too.

        Raises:
            ValueError: other names, dtypes or shapes; nothing has been changed then.
        """
        own = self.state_dict()
        expected: dict[str, tuple[torch.dtype, list[int] | None]] = {
            name: (own[name].dtype, list(own[name].shape)) for name in ("master", "gram", "neuron_energy", "updates")
        }
        if "basis" in state or (self.alpha and self.subspace == "pretrained"):
            wide = self.master.dtype
            expected |= {"basis": (wide, None), "eigenvalues": (wide, None)}
            expected |= {"rank": (torch.int64, None), "energy_ratio": (torch.float64, None)}
        check_loaded(state, expected)
        device = self.master.device
        self.master.copy_(state["master"])
        if self.master is not self.weight:
            self.weight.copy_(self.master)
        self.gram.copy_(state["gram"])
        self.neuron_energy = state["neuron_energy"].to(device, copy=True)
        self.updates = int(state["updates"])
        self._leading = self._held = self._known_at = None
        if "basis" in state:
            self._known_at = self.updates if self.updates % self.refresh_every else None
            names = ("basis", "eigenvalues", "rank", "energy_ratio")
            held = {name: state[name].to(device, copy=True) for name in names}
            self._held = PrincipalDirections(**held, method="eigh")

    def _refresh(self) -> None:
        """Renew the directions if they are due, and hold a basis of them where that is cheaper or must be."""
        if self.subspace == "pretrained":
            due = self._held is None
        else:
            due = self._known_at is None or (self.updates % self.refresh_every == 0 and self._known_at != self.updates)
        if not due:
            return
        side = None
        wide = self.master.shape[-2] <= self.master.shape[-1]
        if wide:
            side = SmallSide.from_gram(self.gram.clone(), self.master, self._products)
        leading = by_eigh(side or SmallSide.of(self.master, self._products), self.energy_ratio, None)
        outlives = self.refresh_every > 1 or self.subspace == "pretrained"
        if outlives or not wide or leading.spread() > SPREAD:
            self._held, self._leading = leading.directions(), None
        else:
            self._held, self._leading = None, leading
        self._known_at = self.updates
