"""Principal directions that follow a weight from renewal to renewal."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sphere_kernels.directions import PrincipalDirections
from sphere_kernels.directions.leading import Leading, by_eigh, by_tracking
from sphere_kernels.directions.small_side import SmallSide
from sphere_kernels.streaming.validation import Expected, check_loaded

EXACT_EVERY = 50  # renewals, of which one is a whole eigendecomposition: a check of the rank
_RENEWALS = ("start", "tracked", "short", "check")


class Tracker:
    """The state from which the directions of a weight are tracked.

    A state saved before or after a renewal makes it again, bit for bit: until the weight moves on, the block that a
    renewal began from is kept.

    Args:
        like: the weight ``[..., n, d]``.

    Attributes:
        renewal: what gave the directions last: ``"tracked"``, or an eigendecomposition, at the ``"start"``, where
            tracking fell ``"short"`` of the share or did not settle, or as a ``"check"``.
    """

    def __init__(self, like: Tensor) -> None:
        self.renewal = _RENEWALS[0]
        self._block = like.new_empty(*like.shape[:-2], min(like.shape[-2:]), 0)
        self._since = 0  # the last eigendecomposition
        self._next: tuple[Tensor, int] | None = None

    def renew(self, side: SmallSide, energy_ratio: float) -> Leading:
        """The directions of the weight as it is now."""
        found = None
        if not self._block.shape[-1]:
            self.renewal = "start"
        elif self._since + 1 >= EXACT_EVERY:
            self.renewal = "check"
        else:
            found = by_tracking(side, self._block, energy_ratio)
            self.renewal = "short" if found is None else "tracked"
        leading = found or by_eigh(side, energy_ratio, None, track=True)
        assert leading.block is not None
        self._next = leading.block, 0 if found is None else self._since + 1
        return leading

    def move(self) -> None:
        """The weight moves on: later renewals begin from the last one."""
        if self._next is not None:
            (self._block, self._since), self._next = self._next, None

    def forget(self) -> None:
        """The last renewal is to be made again."""
        self._next = None

    def state_dict(self, held: PrincipalDirections | None) -> dict[str, Tensor]:
        """By reference, with what belongs to directions ``held`` beyond the weight that has them."""
        state = {
            "block": self._block,
            "since": torch.tensor(self._since),
            "renewal": torch.tensor(_RENEWALS.index(self.renewal)),
        }
        if held is not None:
            state["energy_bound"] = held.energy_bound
            if held.residual is not None:
                state["residual"] = held.residual
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._block = state["block"].to(self._block.device, copy=True)
        self._since, self.renewal, self._next = int(state["since"]), _RENEWALS[int(state["renewal"])], None

    def expected(self, state: Mapping[str, Tensor], held: int | None) -> Expected:
        """Names, dtypes and shapes of a `state_dict`, with ``held`` directions or none.

        Raises:
            TypeError, ValueError: a renewal that there is not.
        """
        *leading, m, _ = self._block.shape
        found: Expected = {
            "block": (self._block.dtype, [*leading, m, None]),
            "since": (torch.int64, []),
            "renewal": (torch.int64, []),
        }
        check_loaded({k: v for k, v in state.items() if k == "renewal"}, {"renewal": found["renewal"]})
        if state["renewal"] >= len(_RENEWALS):
            raise ValueError(f"state['renewal'] must be below {len(_RENEWALS)}, got {state['renewal'].item()}")
        if held is not None:
            found["energy_bound"] = (torch.float64, [*leading])
            if _RENEWALS[int(state["renewal"])] == "tracked":
                found["residual"] = found["eigenvalues"] = (self._block.dtype, [*leading, held])
        return found
