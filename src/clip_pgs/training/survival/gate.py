"""Where all processes agree, before each step, that the run goes on, or leave it together."""

from __future__ import annotations

from typing import NoReturn

from clip_pgs.training.checkpoints.saving import RunSaver
from clip_pgs.training.distributed import Meeting
from clip_pgs.training.phase_trainer import PhaseTrainer
from clip_pgs.training.survival.exits import (
    FAILED,
    BadNumbersError,
    OtherProcessError,
    StoppedError,
)
from clip_pgs.training.survival.interrupts import INTERRUPTED, PREEMPTED, Interrupts


class Gate:
    """Lets all processes through, or none.

    It costs one message of a few numbers between the hosts. The devices are not waited for.

    Args:
        meeting: Where the processes meet.
        interrupts: Signals to this process.
        saver: Saves before all leave.

    Attributes:
        error: Why this process cannot go on, None while it can.
    """

    def __init__(self, meeting: Meeting, interrupts: Interrupts, saver: RunSaver) -> None:
        self.error: Exception | None = None
        self._meeting = meeting
        self._interrupts = interrupts
        self._saver = saver

    def go_through(
        self,
        trainer: PhaseTrainer,
        place: tuple[int, int],
        *,
        num_skipped: int = 0,
        is_done: bool = False,
    ) -> int:
        """Wait for all processes; each calls it as often as the others.

        Args:
            trainer: Holds what is to be saved.
            place: Where the run stands: completed epochs, and samples of the one under way.
            num_skipped: Samples that this process skipped on the way here.
            is_done: Whether nothing is left to do here that would take long, so that no signal
                keeps the run from it.

        Returns:
            The samples that all processes skipped.

        Raises:
            StoppedError: If a signal asked one of them to leave.
            OtherProcessError: If another one cannot go on; `error`, if it is this one.
        """
        self._interrupts.look_for_launcher()
        code = self._interrupts.code
        preempted, interrupted, failed, undone, skipped = self._meeting.add_up(
            [
                code == PREEMPTED,
                code == INTERRUPTED,
                self.error is not None,
                not is_done,
                num_skipped,
            ]
        )
        if failed or ((preempted or interrupted) and undone):
            code = PREEMPTED if preempted else INTERRUPTED
            self._leave(trainer, place, code=code, is_failed=failed > 0)
        return skipped

    def _leave(
        self, trainer: PhaseTrainer, place: tuple[int, int], *, code: int, is_failed: bool
    ) -> NoReturn:
        # Rank 0 finds bad numbers, and rank 0 saves.
        if not isinstance(self.error, BadNumbersError):
            self._saver.save(trainer, *place)
        is_saved = self._meeting.share(self._saver.wait())
        if self.error is not None:
            raise self.error
        if is_failed:
            raise OtherProcessError("another process of the run cannot go on")
        name = self._interrupts.name or "a signal to another process"
        where = f"sample {place[1]} of epoch {place[0]}"
        if not is_saved:
            raise StoppedError(f"stopped by {name}; {where} could not be saved", FAILED)
        raise StoppedError(f"stopped by {name} at {where}; --resume latest goes on there", code)
