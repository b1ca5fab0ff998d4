"""A weight on the hypersphere whose energy and principal directions follow its low-rank updates."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from sphere_kernels._common.rows import compute_dtype, row_chunks
from sphere_kernels._common.tiles import mirror_
from sphere_kernels._products import products_for
from sphere_kernels.directions import PrincipalDirections
from sphere_kernels.directions.leading import Leading, by_eigh
from sphere_kernels.directions.small_side import SmallSide
from sphere_kernels.energy import orthogonal_energy
from sphere_kernels.gram import gram_energy, gram_update_energy_
from sphere_kernels.streaming.tracker import Tracker
from sphere_kernels.streaming.validation import (
    Expected,
    check_factors,
    check_finite,
    check_loaded,
    check_reach,
    check_right,
    check_state,
)

CHECK_EVERY = 10  # updates between two looks at the drift
SAMPLE = 16  # rows of M that a look recomputes
DRIFT = {torch.float32: 1e-5, torch.float64: 1e-13}  # of a cosine; past it everything is recomputed
SHRUNK = 0.1  # a row shorter than this share of what it was when M was computed has too much of that one's rounding
SPREAD = 100.0  # of the eigenvalues: up to there W^T coefficients are orthonormal to 1e-4 in fp32
_BASIS = ("basis", "eigenvalues", "rank", "energy_ratio")
_TRACKED = ("energy_bound", "residual")


class HypersphereState:
    """Weight, Gram matrix, hyperspherical energy and principal directions, kept current over low-rank updates.

    For ``W' = W + R X`` the unnormalised Gram matrix ``M = W W^T`` is updated, not recomputed, and everything else
    follows from it: norms from its diagonal, the energy in the pass that writes it, the directions from the
    eigenproblem of its normalised form. A batch costs O(n d b + n^2 b), and a refresh O(n^3), or O(n^2 r) where r
    directions are tracked, never O(d^2).

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
        directions: ``"exact"``, by eigendecomposition; or ``"tracked"`` from those before, by matrix products, see
            ``method="tracked"`` of `principal_directions`: they hold ``energy_ratio``, measured each time, and their
            number may exceed the exact one by a few. An eigendecomposition starts them, steps in where tracking falls
            short, and checks their number every `tracker.EXACT_EVERY` renewals. The ``"pretrained"`` ones are exact.
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
        Energies as `gram_update_energy_` states. Every `CHECK_EVERY` updates `check` looks for drift; an update that
        nearly cancels a row has everything recomputed. Memory: M; the basis ``[d, r]`` where it outlives its weight
        (``refresh_every > 1`` or ``"pretrained"``); of tracked directions a block ``[min(n, d), k]``, k a few more than
        r; in a call about four matrices ``[n, n]`` where directions are
        computed, a few factors, and 20 MB of packed panels where native. Results depend on the number of threads only
        through torch's ``eigh`` and ``qr``. An interrupt within `update_` leaves the state between two updates: load a
        copy of an earlier `state_dict`, or call `recompute`.

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
        directions: str = "exact",
        impl: str = "auto",
    ) -> None:
        check_state(weight, s, energy_ratio, alpha, refresh_every, subspace, directions, impl)
        self.weight = weight.detach()
        self.s, self.energy_ratio, self.alpha = float(s), float(energy_ratio), float(alpha)
        self.refresh_every, self.subspace, self._impl = int(refresh_every), subspace, impl
        self.master = self.weight.to(compute_dtype(weight))
        self._products = products_for(self.master, impl)
        self.updates = 0
        # Directions as combinations of the rows of the weight as it is, or as a basis, which may be an earlier
        # weight's; and how many updates that had had.
        self._known: Leading | PrincipalDirections | None = None
        self._known_at = 0
        follows = alpha and directions == "tracked" and subspace == "current"
        self._tracker = Tracker(self.master) if follows else None
        self.recompute()
        check_reach(self.norms, self.weight, self.master.dtype)
        if alpha and subspace == "pretrained":
            self._directions()

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
        return self._directions().rank

    @property
    def held_ratio(self) -> Tensor:
        """Share of the trace of C that the directions in use hold, fp64 ``[...]``; 0 with ``alpha = 0``."""
        if not self.alpha:
            return torch.zeros(self.master.shape[:-2], dtype=torch.float64, device=self.master.device)
        return self._directions().energy_ratio

    @property
    def held_bound(self) -> Tensor:
        """Share of the trace of C that no other directions of the same rank exceed, fp64 ``[...]``; that held itself
        where an eigendecomposition gave them, and with ``alpha = 0``."""
        return self._directions().energy_bound if self.alpha else self.held_ratio

    @property
    def renewal(self) -> str | None:
        """How the tracked directions in use came about: ``"tracked"``, or by an eigendecomposition, at the ``"start"``,
        where tracking fell ``"short"``, or as a ``"check"``; None where they are exact."""
        if self._tracker is None:
            return None
        self._directions()
        return self._tracker.renewal

    @property
    def directions(self) -> PrincipalDirections:
        """The directions that `project` keeps out of at present; raises ValueError with ``alpha = 0``."""
        if not self.alpha:
            raise ValueError("with alpha = 0 no directions are in use; see principal_directions")
        known = self._directions()
        return known.directions() if isinstance(known, Leading) else known

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
        known, products = self._directions(), self._products
        if self._tracker and isinstance(known, Leading):
            along = products.matmul(known.within(products.matmul(right, known.side.rows.mT)), known.side.rows)
            return torch.sub(right, along, alpha=self.alpha)
        out = right.clone(memory_format=torch.contiguous_format)
        if isinstance(known, Leading):
            # U is not formed: b rows pass through W more cheaply than r directions would.
            rows = known.side.rows
            products.add_(out, known.within(products.matmul(right, rows.mT)).mul_(-self.alpha), rows)
        else:
            products.add_(out, products.matmul(right, known.basis).mul_(-self.alpha), known.basis.mT)
        return out

    @torch.no_grad()
    def updated(self, left: Tensor | None, right: Tensor) -> Tensor:
        """The weight as `update_` would leave it, bit for bit, in ``weight``'s dtype; nothing is changed.

        Args:
            left, right: as for `update_`.

        Raises:
            TypeError, ValueError: a factor that does not fit.
        """
        check_factors(left, right, self.weight)
        out, right = self.master.clone(), right.to(self.master.dtype)
        if left is None:
            out += right
        else:
            self._products.add_(out, left.to(self.master.dtype), right)
        return out.to(self.weight.dtype)

    @torch.no_grad()
    def update_(self, left: Tensor | None, right: Tensor) -> None:
        """``weight += left @ right``; Gram matrix and energies follow.

        Args:
            left: ``[..., n, b]``; computed in the dtype of ``master``, as is ``right``. None: ``right [..., n, d]`` is
                the update itself, after which M and energies are computed anew.
            right: ``[..., b, d]``, already projected.

        Raises:
            TypeError, ValueError: a factor that does not fit.
            FloatingPointError: one that is not finite, or that could make a row too long for the weight's dtype, or its
                square for M's. Nothing has been changed then.
        """
        check_factors(left, right, self.weight)
        right = right.to(self.master.dtype)
        left = None if left is None else left.to(self.master.dtype)
        check_finite(left, right)
        if left is None:
            step = torch.linalg.vector_norm(right, dim=-1, dtype=torch.float64)
        else:
            longest = torch.linalg.vector_norm(right, dim=(-2, -1), dtype=torch.float64)
            step = torch.linalg.vector_norm(left, dim=-1, dtype=torch.float64) * longest.unsqueeze(-1)
        check_reach(self.norms + step, self.weight, self.master.dtype)
        if self.alpha and (self._outlive or self._tracker):
            self._directions()  # they serve later updates too, whether or not this one was projected
        if not self._outlive:
            self._known = None
        if self._tracker:
            self._tracker.move()
        products = self._products
        if left is None:
            self.master += right
            if self.master is not self.weight:
                self.weight.copy_(self.master)
            self.updates += 1
            self.recompute()
            return
        cross, inner = products.matmul(self.master, right.mT), products.gram(right)
        products.add_(self.master, left, right)
        self.neuron_energy = gram_update_energy_(
            self.gram, left, cross, inner, self.s, weight=self.master, impl=self._impl
        )
        if self.master is not self.weight:
            self.weight.copy_(self.master)
        self.updates += 1
        if bool((self.norms < SHRUNK * self._lengths).any()):
            self.recompute()
        elif self.updates % CHECK_EVERY == 0:
            self.check()

    @torch.no_grad()
    def check(self) -> float:
        """Recompute a sample of M; past the bound `DRIFT`, recompute everything.

        Returns:
            The largest error of ``m_ij / (|w_i| |w_j|)`` in `SAMPLE` rows, the next ones every `CHECK_EVERY` updates,
            against fp64.
        """
        n, d = self.master.shape[-2:]
        first, count = self.updates // CHECK_EVERY, min(SAMPLE, n)
        picked = (torch.arange(count, device=self.master.device) * n // count + first) % n
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
        """Gram matrix and energies anew from ``master``; directions in use that an earlier weight had stay."""
        if not self._needs_basis(self.updates):
            self._known = None
            if self._tracker:
                self._tracker.forget()
        self.gram = self._products.gram(self.master)
        if not self._products.symmetric:
            mirror_(self.gram)
        self._lengths = self.norms
        self.neuron_energy = gram_energy(self.gram, self.s, weight=self.master, impl=self._impl)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that decides what comes next, bit for bit, by reference: clone what shall outlive an update."""
        state = {
            "master": self.master,
            "gram": self.gram,
            "neuron_energy": self.neuron_energy,
            "lengths": self._lengths,
            "updates": torch.tensor(self.updates),
        }
        held = None
        if self._needs_basis(self.updates):
            assert isinstance(self._known, PrincipalDirections)
            held = self._known
            state |= {name: getattr(held, name) for name in _BASIS}
        return state | (self._tracker.state_dict(held) if self._tracker else {})

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict` of a state with the same arguments; the weight is written too.

        Raises:
            TypeError, ValueError: other names, dtypes or shapes; nothing has been changed then.
        """
        *leading, n, d = self.master.shape
        wide = self.master.dtype
        expected: Expected = {
            "master": (wide, [*leading, n, d]),
            "gram": (wide, [*leading, n, n]),
            "neuron_energy": (torch.float64, [*leading, n]),
            "lengths": (torch.float64, [*leading, n]),
            "updates": (torch.int64, []),
        }
        check_loaded({k: v for k, v in state.items() if k == "updates"}, {"updates": expected["updates"]})
        updates, held = int(state["updates"]), None
        if self._needs_basis(updates):
            check_loaded({k: v for k, v in state.items() if k == "rank"}, {"rank": (torch.int64, [*leading])})
            held = int(state["rank"].amax())
            expected |= {"basis": (wide, [*leading, d, held]), "rank": (torch.int64, [*leading])}
            expected |= {"eigenvalues": (wide, [*leading, min(n, d)]), "energy_ratio": (torch.float64, [*leading])}
        if self._tracker:
            expected |= self._tracker.expected(state, held)
        check_loaded(state, expected)
        device = self.master.device
        self.master.copy_(state["master"])
        if self.master is not self.weight:
            self.weight.copy_(self.master)
        self.gram.copy_(state["gram"])
        self.neuron_energy = state["neuron_energy"].to(device, copy=True)
        self._lengths = state["lengths"].to(device, copy=True)
        self.updates = self._known_at = updates
        self._known = None
        if self._tracker:
            self._tracker.load_state_dict(state)
        if self._needs_basis(updates):
            found = {name: state[name].to(device, copy=True) for name in (*_BASIS, *_TRACKED) if name in state}
            method = "tracked" if "residual" in found else "eigh"
            self._known = PrincipalDirections(**{"energy_bound": found["energy_ratio"], **found}, method=method)

    @property
    def _outlive(self) -> bool:
        """Whether directions are used beyond the weight that has them."""
        return self.subspace == "pretrained" or self.refresh_every > 1

    def _needs_basis(self, updates: int) -> bool:
        """Whether the directions in use after so many updates are an earlier weight's."""
        return bool(self.alpha) and (self.subspace == "pretrained" or updates % self.refresh_every != 0)

    def _directions(self) -> Leading | PrincipalDirections:
        """The directions in use, renewed if they are due; as a basis where that is cheaper or must be."""
        due = not self._needs_basis(self.updates) and self._known_at != self.updates
        if self._known is None or due:
            side = None
            if self.master.shape[-2] <= self.master.shape[-1]:
                side = SmallSide.from_gram(self.gram, self.master, self._products)
            side = side or SmallSide.of(self.master, self._products)
            renew = self._tracker.renew if self._tracker else partial(by_eigh, rank=None)
            leading = renew(side, self.energy_ratio)
            combined = side.wide and not self._outlive and leading.spread() <= SPREAD
            self._known = leading if combined else leading.directions()
            self._known_at = self.updates
        return self._known
