"""Steps whose loss or gradient is not finite: counted on the device, read now and then."""

from __future__ import annotations

import torch
from torch import Tensor

from clip_pgs.training.survival.exits import BadNumbersError


class BadSteps:
    """Counts skipped steps without making any of them wait.

    The counts are the same on every rank, as the decision to skip is.

    Args:
        device: Where the decisions are made.
        max_in_row: So many skipped steps without one good one between them end the run.
    """

    def __init__(self, device: torch.device, *, max_in_row: int) -> None:
        self._max_in_row = max_in_row
        self._total = torch.zeros((), device=device)
        self._in_row = torch.zeros((), device=device)
        self._most_in_row = torch.zeros((), device=device)

    def add(self, is_bad: Tensor) -> None:
        """Take in a step's decision, a scalar of 0 or 1."""
        self._total += is_bad
        self._in_row = (self._in_row + is_bad) * is_bad
        torch.maximum(self._most_in_row, self._in_row, out=self._most_in_row)

    def count(self) -> int:
        """Return the number of steps skipped so far; it waits for the device."""
        return int(self._total)

    def check(self) -> None:
        """Refuse too many skipped steps in a row; it waits for the device.

        Raises:
            BadNumbersError: If there were.
        """
        most = int(self._most_in_row)
        if most >= self._max_in_row:
            raise BadNumbersError(
                f"the loss or its gradient was not finite in {most} steps in a row "
                f"(--max-bad-steps {self._max_in_row}); no weight was changed by them"
            )
