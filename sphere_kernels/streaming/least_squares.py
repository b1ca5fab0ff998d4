"""The right factors of editing updates: ridge least squares with a growing history of keys, or a fixed covariance.

Rows are facts: keys ``[b, d]``, and for residuals ``R [n, b]`` the update of the weight is ``R right``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sphere_kernels._common import checks
from sphere_kernels._products import products_for
from sphere_kernels.streaming.validation import FORMS, check_keys, check_loaded, check_null_space

LONGEST = 1e-3  # of |k|^2 eps / ridge: up to there the solution was within 1e-2 of fp64, at 1e-5 within 1e-4
SLAB = 1024  # rows of the dual that are folded at a time


class IllConditioned(ValueError):
    """Keys so long that rounding would leave little of the solution."""


@dataclass(frozen=True, eq=False)
class NullSpace:
    """An orthonormal basis of the features, split in two; one of the parts is enough, but then it is the one used.

    Attributes:
        kept: ``[d, m]``, the null space of the key covariance: updates move in it only.
        removed: ``[d, d - m]``, the rest.
    """

    kept: Tensor | None = None
    removed: Tensor | None = None

    @property
    def reduced(self) -> bool:
        """Whether coordinates in ``kept`` serve, rather than features from which ``removed`` is taken away.

        Numbers stored are m^2 + d m against d^2 + d (d - m), and the flops of a batch are in the same proportion: both
        say m < 0.73 d.
        """
        if self.kept is None or self.removed is None:
            return self.removed is None
        d, m = self.kept.shape
        return m * m + d * m < d * d + d * (d - m)

    @property
    def part(self) -> Tensor:
        """The part that is used."""
        part = self.kept if self.reduced else self.removed
        assert part is not None
        return part


class RecursiveLeastSquares:
    """Solve ``(P (K K^T + C) + ridge I) D^T = P K R^T`` batch after batch, ``C`` the sum of earlier ``K K^T``.

    With ``H = (ridge I + P C P)^-1`` a batch needs ``H P K`` and an inverse of b x b: recursive least squares. ``H``
    is ``I / ridge - B^T B``, and the rows of B, b more each batch, are the whitened dual: ``B = L^-1 Y / sqrt(ridge)``
    for the history ``Y [N, m]`` and the Cholesky factor L of the dual ``ridge I + Y Y^T [N, N]``, which is thus never
    formed. One rule decides what is stored: ``"dual"``, the rows, while ``4 N <= 3 c`` (c the number of coordinates),
    then ``"full"``, ``H [c, c]`` itself. There the flops of a batch are equal, 4 N c b and 3 c^2 b, and before it the
    memory is less, N c against c^2. The coordinates are features or, where fewer numbers, the null space's.

    Args:
        ridge: above 0.
        d: number of features.
        null_space: P; None for the identity.
        form: ``"auto"``, the rule; ``"dual"`` or ``"full"`` to stay with one.
        dtype: of what is stored, float32 or float64. The error of a solution grows with |k|^2 / ridge: in float32,
            after 20,000 edits of reused real keys (54 / 10), it was within 1e-5 of an fp64 solve. Keys past `LONGEST`
            are refused.
        device: of the keys.
        impl: implementation, see `sphere_kernels.dispatch.select`.

    Attributes:
        form: what is stored at present.
        edits: N, the keys in the history.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or range.

    Memory: the form, and in the batch of the change 1.75 c^2 numbers; with a null space its smaller part.
    The b x b systems are solved in fp64.

    Source:
        Fang et al., AlphaEdit (ICLR 2025), equation 14; push-through identity; Plackett 1950 for the recursion.
    """

    def __init__(
        self,
        ridge: float,
        d: int,
        null_space: NullSpace | None = None,
        *,
        form: str = "auto",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        impl: str = "auto",
    ) -> None:
        checks.number("ridge", ridge, low=0)
        checks.integer("d", d, low=1)
        if not ridge > 0:
            raise ValueError(f"ridge must be above 0, got {ridge!r}")
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be float32 or float64, got {dtype}")
        checks.choice("form", form, FORMS)
        self.ridge, self.d, self.edits = float(ridge), int(d), 0
        self._kept: Tensor | None = None
        self._removed: Tensor | None = None
        self._size = self.d
        if null_space is not None:
            check_null_space(null_space, self.d)
            part = null_space.part.to(device, dtype)
            if null_space.reduced:
                self._kept, self._size = part, part.shape[1]
            else:
                self._removed = part
        self._dual = torch.empty(0, self._size, dtype=dtype, device=device)  # room for more rows than there are
        self._inverse: Tensor | None = None
        self._pending: Tensor | None = None
        self._choice = form
        self._products = products_for(self._dual, impl)
        if form == "full":
            self._fold()

    @property
    def form(self) -> str:
        return "dual" if self._inverse is None else "full"

    @torch.no_grad()
    def solve(self, keys: Tensor) -> Tensor:
        """The right factor ``[b, d]`` for keys ``[b, d]``, in the dtype stored. The history stays as it is.

        Raises:
            TypeError, ValueError: keys that do not fit; IllConditioned: too long for so small a ridge;
            FloatingPointError: not finite.
        """
        self._pending = None
        unmix, hk = self._applied(keys)
        self._pending = self._products.matmul(unmix.to(hk.dtype), hk)
        right = self._products.matmul((unmix.mT @ unmix).to(hk.dtype), hk)
        return right if self._kept is None else self._products.matmul(right, self._kept.mT)

    @torch.no_grad()
    def commit(self, keys: Tensor | None = None) -> None:
        """Add keys to the history; None: those solved for last.

        The published order solves with the keys before a layer's update and adds the keys computed anew after all
        layers: give those. Where both are the same, as in a loop that goes up the layers, None saves half of the work.
        """
        if keys is not None:
            unmix, hk = self._applied(keys)
            rows: Tensor | None = self._products.matmul(unmix.to(hk.dtype), hk)
        else:
            rows = self._pending
        if rows is None:
            raise ValueError("commit without keys must follow a solve")
        self._pending = None
        if self._inverse is None and self._choice == "auto" and 4 * (self.edits + len(rows)) > 3 * self._size:
            self._fold()
        if self._inverse is not None:
            self._products.subtract_gram_(self._inverse, rows.mT)
        else:
            self._append(rows)
        self.edits += len(rows)

    def rollback(self) -> None:
        """Forget the solve that has not been committed."""
        self._pending = None

    def state_dict(self) -> dict[str, Tensor]:
        """The history, by reference: clone what shall outlive a `commit`."""
        count = torch.tensor(self.edits)
        if self._inverse is not None:
            return {"edits": count, "inverse": self._inverse}
        return {"edits": count, "dual": self._dual[: self.edits]}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict` of a solver with the same arguments.

        Raises:
            ValueError: other names, dtypes or shapes; nothing has been changed then.
        """
        full = self._choice == "full" or (self._choice == "auto" and "inverse" in state)
        name, size, dtype = "inverse" if full else "dual", self._size, self._dual.dtype
        check_loaded(state, {"edits": (torch.int64, []), name: (dtype, [size if full else None, size])})
        edits = int(state["edits"])
        if not full and len(state["dual"]) != edits:
            raise ValueError(f"state['dual'] must be [{edits}, {size}], got {list(state['dual'].shape)}")
        value = state[name].to(self._dual.device, copy=True)
        self._inverse, self._dual = (value, self._dual.new_empty(0, size)) if full else (None, value)
        self.edits, self._pending = edits, None

    def _applied(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """``L^-1`` ``[b, b]`` fp64 for ``L L^T = I + K_P^T H K_P``, and ``(H K_P)^T`` ``[b, c]``."""
        check_keys(keys, self.d, self._dual.device)
        products = self._products
        x = keys.to(self._dual.dtype)
        if self._kept is not None:
            x = products.matmul(x, self._kept)
        if self._inverse is not None:
            hk = products.matmul(x, self._inverse)  # which is 0 on what the null space leaves out
        else:
            if self._removed is not None:
                x = x.clone()
                products.add_(x, products.matmul(x, self._removed).neg_(), self._removed.mT)
            hk = x / self.ridge
            rows = self._dual[: self.edits]
            products.add_(hk, products.matmul(x, rows.mT).neg_(), rows)
        lower = _factor(hk, x)
        reach = float(x.square().sum(1).amax()) / self.ridge if len(x) else 0.0
        if lower is None or not reach * torch.finfo(x.dtype).eps < LONGEST:
            raise IllConditioned(
                f"the ridge {self.ridge:g} is too small for keys of length {_longest(keys):.3g} in {self._dual.dtype}; "
                "expected a larger one, or dtype=torch.float64"
            )
        return torch.linalg.solve_triangular(lower, torch.eye(len(x)).to(lower), upper=False), hk

    def _append(self, rows: Tensor) -> None:
        need = self.edits + len(rows)
        if need > len(self._dual):
            longer = self._dual.new_empty(max(need, 2 * len(self._dual)), self._size)
            longer[: self.edits] = self._dual[: self.edits]
            self._dual = longer
        self._dual[self.edits : need] = rows

    def _fold(self) -> None:
        """From the rows to ``P H P``, so that keys need no projection any more."""
        inverse = torch.eye(self._size, dtype=self._dual.dtype, device=self._dual.device).div_(self.ridge)
        if self._removed is not None:
            self._products.subtract_gram_(inverse, self._removed / self.ridge**0.5)
        for start in range(0, self.edits, SLAB):
            self._products.subtract_gram_(inverse, self._dual[start : min(start + SLAB, self.edits)].mT)
        self._inverse, self._dual = inverse, self._dual[:0].clone()


def _factor(applied: Tensor, keys: Tensor) -> Tensor | None:
    """Cholesky factor of ``I + applied keys^T`` ``[b, b]`` fp64; None where rounding or overflow left it indefinite."""
    system = applied.double() @ keys.double().mT
    system.diagonal().add_(1)
    lower, info = torch.linalg.cholesky_ex((system + system.mT) / 2)
    return None if int(info) or not bool(torch.isfinite(lower).all()) else lower


def _longest(keys: Tensor) -> float:
    return float(keys.double().norm(dim=1).amax())


class FactoredCovariance:
    """MEMIT's solve ``(weight Cov + K K^T)^-1 K`` by Woodbury, the covariance factored once.

    Args:
        covariance: ``[d, d]`` second moment of keys, symmetric, positive definite; computed in fp64.
        weight: of the covariance, above 0; 15000 in the published settings.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or range, or a covariance that is not positive definite, as
            one of fewer keys than features is not.

    Memory: one ``[d, d]`` fp64.

    Source:
        Meng et al., MEMIT (ICLR 2023), equation 14; ``A^-1 K (I + K^T A^-1 K)^-1``.
    """

    def __init__(self, covariance: Tensor, weight: float) -> None:
        checks.matrix("covariance", covariance)
        if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1] or covariance.numel() == 0:
            raise ValueError(f"covariance must be [d, d], got shape {list(covariance.shape)}")
        checks.number("weight", weight, low=0)
        covariance = covariance.detach()
        largest = float(covariance.abs().amax())
        if not bool((covariance - covariance.mT).abs().amax() <= 1e-3 * largest):  # NaN fails the comparison
            raise ValueError("covariance must be finite and symmetric, but is not")
        lower, info = torch.linalg.cholesky_ex(covariance.double() * weight)
        pivots = lower.diagonal().square()
        if int(info) or not float(pivots.min()) > len(pivots) * torch.finfo(lower.dtype).eps * float(pivots.max()):
            raise ValueError(
                f"covariance {list(covariance.shape)} times {weight:g} must be positive definite beyond rounding; "
                "expected the covariance of more keys than features"
            )
        self._lower = lower

    @torch.no_grad()
    def solve(self, keys: Tensor) -> Tensor:
        """The right factor ``[b, d]`` for keys ``[b, d]``, fp64; raises as `RecursiveLeastSquares.solve`."""
        check_keys(keys, len(self._lower), self._lower.device)
        x = keys.double()
        applied = torch.cholesky_solve(x.mT, self._lower).mT
        lower = _factor(applied, x)
        if lower is None:
            raise IllConditioned(f"keys of length {_longest(keys):.3g} are too long for this covariance")
        return torch.cholesky_solve(applied, lower)

    @torch.no_grad()
    def solve_exactly(self, keys: Tensor, rtol: float = 1e-2) -> Tensor:
        """The right factor ``(K A^-1 K^T)^+ K A^-1`` ``[b, d]`` fp64 for keys ``K [b, d]`` and ``A = weight Cov``: of
        all updates that give the keys their residuals the smallest in the norm of A; ROME's for one key.

        Where whitened keys are linearly dependent, up to ``rtol`` of their largest singular value, they are met in the
        least squares' sense: the default is the rounding of keys that a 16-bit model gives. Raises as `solve`.
        """
        checks.number("rtol", rtol, low=0, high=1)
        x = self.whiten(keys)
        return self.unwhiten(torch.linalg.pinv(x.mT, rtol=float(rtol)))

    @torch.no_grad()
    def whiten(self, keys: Tensor) -> Tensor:
        """``K L^-T`` ``[b, d]`` fp64 for keys ``K [b, d]`` and ``L L^T = weight Cov``, which is the identity then.

        Raises:
            TypeError, ValueError: keys that do not fit; FloatingPointError: keys that are not finite.
        """
        check_keys(keys, len(self._lower), self._lower.device)
        return torch.linalg.solve_triangular(self._lower, keys.double().mT, upper=False).mT

    @torch.no_grad()
    def unwhiten(self, right: Tensor) -> Tensor:
        """``X L^-1`` ``[b, d]`` fp64: the right factor for keys as they are, from one for whitened keys."""
        return torch.linalg.solve_triangular(self._lower.mT, right.double().mT, upper=True).mT
