"""`python -m clip_pgs.training`: check every option, then train."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch.distributed.elastic.multiprocessing.errors import record

from clip_pgs.common import one_sentence
from clip_pgs.training.survival.interrupts import AskedToLeave, Interrupts
from clip_pgs.training.survival.leaving import leave

if TYPE_CHECKING:
    from clip_pgs.training.options import TrainOptions

BAD_INPUT = 2

# Where training fits, this fits; a larger one would make no evaluation faster.
_EVAL_BATCH_SIZE = 256

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one training from the command line.

    Args:
        argv: Arguments without the program's name; `sys.argv` by default.

    Returns:
        Exit code: 0, 2 for bad input (one sentence on stderr, and nothing created if it is found
        before the start), 85 for a signal that asked to leave, 130 for Ctrl-C, 1 for what else
        ends a run in one sentence.
    """
    interrupts = Interrupts()
    with interrupts.caught():
        try:
            with interrupts.breakable():
                started = _start(sys.argv[1:] if argv is None else argv)
        except AskedToLeave:
            return _leave_early(interrupts)
        if isinstance(started, int):
            return started
        return _train(*started, interrupts)


def _start(argv: Sequence[str]) -> int | tuple[TrainOptions, dict[str, Any]]:
    """Return checked options and what the loop calls of other packages, or an exit code."""
    try:
        from clip_pgs.data.preflight import preflight
        from clip_pgs.training.checks import check_options, option_warnings
        from clip_pgs.training.options import parse_options
        from clip_pgs.training.survival.restarts import follow_restart
    except ModuleNotFoundError as error:
        return _refuse(f"training needs {error.name}: pip install 'clip-pgs[training]'")

    try:
        args = parse_options(argv)
        follow_restart(args)
        check_options(args)
        odd = preflight(args, world_size=_num_processes()) if _is_first_process() else []
        hooks = _hooks(args)
    except ValueError as error:
        return _refuse(str(error), is_before_start=True)
    for sentence in odd:
        logger.warning("%s", sentence)
    if args.check_only:
        for sentence in option_warnings(args):
            logger.warning("%s", sentence)
        sys.stdout.write(_summary(args))
        return 0
    return args, hooks


def _train(args: TrainOptions, hooks: dict[str, Any], interrupts: Interrupts) -> int:
    from clip_pgs.training.loop import train
    from clip_pgs.training.survival import exits

    try:
        train(args, interrupts=interrupts, **hooks)
    except exits.EXPECTED as error:
        code = exits.expected_code(error)
        assert code is not None
        if code in (exits.FAILED, exits.BAD_INPUT):
            sys.stderr.write(f"error: {_speaker()}{exits.sentence_of(error)}\n")
        elif _is_first_process():
            sys.stderr.write(f"{exits.sentence_of(error)}\n")
        return code
    return 0


def _leave_early(interrupts: Interrupts) -> int:
    from clip_pgs.training.survival.exits import ExitReport

    sentence = f"stopped by {interrupts.name} before the start"
    ExitReport(interrupts, rank=int(os.environ.get("RANK", "0"))).write(interrupts.code, sentence)
    if _is_first_process():
        sys.stderr.write(f"{sentence}\n")
    return interrupts.code


def _hooks(args: TrainOptions) -> dict[str, Any]:
    """Return what the loop calls of other packages: the evaluation of `--eval-suite`.

    Raises:
        ValueError: If it could not be run.
    """
    if args.eval_suite is None:
        return {}
    from clip_pgs.evaluation.in_training import EvaluationInTraining
    from clip_pgs.training.launch import default_name
    from clip_pgs.training.run_folder import run_folder

    # The loop would name the run only after this needs its folder.
    args.name = args.name or default_name(args)
    evaluation = EvaluationInTraining(
        suite=args.eval_suite,
        datasets=args.eval_datasets,
        data_root=args.eval_data_root,
        run=run_folder(args),
        batch_size=min(args.batch_size, _EVAL_BATCH_SIZE),
        workers=args.workers,
    )
    return {"evaluate": evaluation}


def _refuse(sentence: str, *, is_before_start: bool = False) -> int:
    if _is_first_process():
        sys.stderr.write(f"error: {one_sentence(sentence)}\n")
    if is_before_start:
        from clip_pgs.training.survival.exits import ExitReport

        rank = int(os.environ.get("RANK", "0"))
        ExitReport(Interrupts(), rank=rank).write(BAD_INPUT, sentence)
    return BAD_INPUT


def _num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _speaker() -> str:
    """Return who speaks, where several processes could."""
    return f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""


def _is_first_process() -> bool:
    """Return whether this process speaks for all that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _summary(args: TrainOptions) -> str:
    options = ", ".join(f"{name}={value}" for name, value in args.masking_options.items())
    parts = [
        args.model,
        f"masking {args.masking} ({options})" if options else f"masking {args.masking}",
    ]
    if args.text_masking != "none":
        parts.append(f"text masking {args.text_masking}")
    parts.append(f"{args.epochs} epochs")
    if args.unmasked_epochs > 0:
        parts.append(f"{args.unmasked_epochs} unmasked ones")
    return f"the options are valid: {', '.join(parts)}\n"


if __name__ == "__main__":
    # Tells torchrun what went wrong, which shows it for the process that failed first.
    leave(record(main)() or 0)
