"""Samples that cannot be used: why, how many, and when there are too many of them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from clip_pgs.common import BAD_INPUT, FAILED, one_sentence

logger = logging.getLogger(__name__)

_MAX_LOGGED = 10
# Below this a share says little. Shorter epochs are judged as a whole, either once it is certain.
_MIN_TRIED = 1000


@dataclass(frozen=True)
class Skip:
    """A pair, or with an empty key a whole shard, that cannot be used.

    Args:
        shard: Where it comes from.
        key: Its name there, or "".
        reason: A category, to be counted by.
        detail: What went wrong with this one, or "".
    """

    shard: str
    key: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        place = f"{self.shard}: {self.key}" if self.key else self.shard
        detail = f" ({self.detail})" if self.detail else ""
        # A shard may come from anybody, and its names may hold what moves a terminal's cursor.
        return one_sentence(f"{place}: {self.reason}{detail}")


class BadSampleError(ValueError):
    """A pair that cannot be used, with its reason as a category and a detail."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class UnusableDataError(ValueError):
    """Data that cannot be trained on; says what was skipped and why."""

    exit_code = BAD_INPUT


class StalledDataError(RuntimeError):
    """Data that stopped coming; says what was being read."""

    exit_code = FAILED


OnSkip = Callable[[Skip], object]


def describe_reasons(counts: Counter[str]) -> str:
    """Return such as "no caption: 2, empty caption: 1", the most common first."""
    # Equal counts stand in the order of their names, whatever order they came in.
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason}: {number}" for reason, number in ordered)


@dataclass(eq=False)
class SkipAccount:
    """Counts and reports what is skipped, and stops where it is too much.

    Args:
        on_skip: Is told each of them.
        max_bad_share: Largest share, in [0, 1], of samples that may be bad; None allows all.
        epoch_size: Samples of an epoch; None if not known.

    Attributes:
        counts: Skips by reason in the epoch that is being read or was read last.
    """

    on_skip: OnSkip | None = None
    max_bad_share: float | None = None
    epoch_size: int | None = None
    counts: Counter[str] = field(default_factory=Counter, init=False)

    def __post_init__(self) -> None:
        size = _MIN_TRIED if self.epoch_size is None else self.epoch_size
        self._judge_every = min(size, _MIN_TRIED)
        self._judge_at = self._judge_every
        self._first: Skip | None = None
        # Over all epochs, so that one entered near its end is not judged by the rest alone.
        self._num_tried = 0
        self._num_bad = 0

    def start_epoch(self) -> None:
        """Forget what was counted in the epoch before."""
        self.counts.clear()
        self._first = None

    def add(self, skips: list[Skip], *, num_tried: int) -> None:
        """Count, log and pass on what a batch skipped, or shards found bad before any batch.

        Args:
            skips: What was skipped.
            num_tried: Samples whose turn it was; 0 for shards, each of which counts as one, as it
                does where shards are streamed.

        Raises:
            UnusableDataError: If more than the allowed share of all samples was bad.
        """
        for skip in skips:
            if self._first is None:
                self._first = skip
            if self.counts.total() < _MAX_LOGGED:
                logger.warning("skipped %s", skip)
            elif self.counts.total() == _MAX_LOGGED:
                logger.warning("skipped more; the epoch's total follows at its end")
            self.counts[skip.reason] += 1
            if self.on_skip is not None:
                self.on_skip(skip)
        self._num_tried += max(num_tried, len(skips))
        self._num_bad += len(skips)
        # Were all that come before the next judgment good, these would still be too many.
        num_judged = max(self._num_tried, self._judge_at)
        if self._num_tried >= self._judge_at:
            self._judge_at += self._judge_every
        allowed = self.max_bad_share
        if allowed is not None and self._num_bad > allowed * num_judged:
            raise UnusableDataError(
                f"{self._num_bad} of {self._num_tried} samples are bad, more than "
                f"--max-bad-share {allowed:g} allows: {self.describe()}"
            )

    def finish_epoch(self) -> None:
        """Log the total of an epoch, if there is one."""
        if self.counts:
            logger.warning("in this epoch %s", self._describe_counts())

    def no_usable_sample(self, shards: list[str]) -> UnusableDataError:
        """Return the error of data without a usable sample.

        Args:
            shards: Where none was found; may be empty.
        """
        places = f" in {', '.join(shards[:3])}" if shards else ""
        more = f" and {len(shards) - 3} more" if len(shards) > 3 else ""
        return UnusableDataError(f"no usable sample{places}{more}: {self.describe()}")

    def describe(self) -> str:
        """Return the counts of the epoch, and its first skip, in words."""
        if self._first is None:
            return "there is none at all"
        return f"{self._describe_counts()}; the first is {self._first}"

    def _describe_counts(self) -> str:
        return f"{self.counts.total()} skipped ({describe_reasons(self.counts)})"
