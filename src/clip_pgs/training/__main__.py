"""`python -m clip_pgs.training`: check every option, then train."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from clip_pgs.common import is_first_process, one_sentence, refusal_code, run_program
from clip_pgs.training.stop import (
    BAD_INPUT,
    FAILED,
    LAUNCH_FOLDER,
    BadInputError,
    ExitReport,
    StopRequest,
    StopSignals,
    as_bad_input,
    expected_code,
    leave,
    sentence_of,
)

# Where training fits, this fits; a larger one would make no evaluation faster.
_EVAL_BATCH_SIZE = 256

if TYPE_CHECKING:
    from clip_pgs.training.options import TrainOptions
    from clip_pgs.training.validation import Evaluate

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
    # Of what is said before the run; a library that logs would choose another form.
    logging.basicConfig(format="%(levelname)s: %(message)s")
    signals = StopSignals()
    with signals.caught():
        try:
            with signals.interruptible():
                checked = _check(sys.argv[1:] if argv is None else argv)
                if isinstance(checked, int):
                    return checked
                options, model, evaluate = checked
                if options.check_only or options.trial:
                    return _say_cost(options, model)
            from clip_pgs.training.trainer import train

            train(options, signals=signals, evaluate=evaluate)
        except StopRequest:
            return _end(signals.code, f"stopped by {signals.name} before the start")
        except BaseException as error:
            code = expected_code(error)
            if code is None:
                raise
            # A launch says it, after the last of the processes, but of the last attempt alone.
            if LAUNCH_FOLDER in os.environ and not (code == FAILED and _is_restarted()):
                return code
            if code in (FAILED, BAD_INPUT):
                speaker = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
                sys.stderr.write(f"error: {speaker}{sentence_of(error)}\n")
            elif is_first_process():
                sys.stderr.write(f"{sentence_of(error)}\n")
            return code
    return 0


def _is_restarted() -> bool:
    """Return whether torchrun starts the processes again when this one fails."""
    count, most = (
        int(os.environ.get(f"TORCHELASTIC_{name}") or "0")
        for name in ("RESTART_COUNT", "MAX_RESTARTS")
    )
    return count < most


def _check(argv: Sequence[str]) -> int | tuple[TrainOptions, Any, Evaluate | None]:
    """Return checked options, their model, and the evaluation of `--eval-suite`; or a code."""
    args = None
    try:
        # Most of what is wrong is found before torch and open_clip, which take seconds to import.
        from clip_pgs.training.options import check_values, read_options, register_model_config

        args = read_options(argv)
        check_values(args)

        from clip_pgs.data.preflight import preflight
        from clip_pgs.training.checks import check_options
        from clip_pgs.training.option_warnings import option_warnings
        from clip_pgs.training.run_folder import follow_restart

        register_model_config(args)
        follow_restart(args)
        model = check_options(args)
        odd = preflight(args) if is_first_process() else []
        evaluate = _evaluation(args)
    except ModuleNotFoundError as error:
        return _end(BAD_INPUT, f"training needs {error.name}: pip install 'clip-pgs[train]'")
    except (ValueError, OSError) as error:
        # Of a network or a library; one of the system names a file.
        if isinstance(error, OSError) and error.filename is None:
            raise
        if args is not None:
            _tell_machines(args, one_sentence(error))
        return _end(refusal_code(error), one_sentence(error))
    for sentence in odd:
        logger.warning("%s", sentence)
    if args.check_only or args.trial:
        for sentence in option_warnings(args):
            logger.warning("%s", sentence)
    return args, model, evaluate


def _tell_machines(args: TrainOptions, sentence: str) -> None:
    """Let processes of other machines, which would wait for this one, hear why it cannot start."""
    from clip_pgs.training.distributed import join_processes, meet_machines, spans_machines

    if spans_machines() and not (args.check_only or args.trial):
        if os.environ.get("LOCAL_RANK") == "0":
            sys.stderr.write(f"error: {sentence}; waiting for the other machines, to tell them\n")
        # Also where they cannot be met, this one says its own trouble.
        with suppress(BadInputError, RuntimeError), join_processes(args) as (_, group):
            meet_machines(group, sentence)


def _say_cost(args: TrainOptions, model: Any) -> int:
    """Say that the options are valid, and what the run will take; return the exit code.

    Where another run has the name, they are valid but for that, and it is that of bad input.
    """
    from clip_pgs.training.estimate import estimate, trial
    from clip_pgs.training.run_folder import taken_name

    with as_bad_input():
        table = trial(args) if args.trial else estimate(args, model)
    notes = "".join(f"{note}\n" for note in table.notes)
    sentence = taken_name(args)
    valid = "valid" if sentence is None else "valid but for the name"
    sys.stdout.write(f"the options are {valid}\n\n{table.text()}{notes}")
    sys.stdout.flush()
    return 0 if sentence is None else _end(BAD_INPUT, sentence)


def _evaluation(args: TrainOptions) -> Evaluate | None:
    """Return the evaluation of `--eval-suite`, where one is asked for.

    Raises:
        ValueError: If it could not be run.
    """
    if args.eval_suite is None:
        return None
    from clip_pgs.evaluation.in_training import EvaluationInTraining
    from clip_pgs.training.run_folder import default_name, run_folder

    # The loop would name the run only after this needs its folder.
    args.name = args.name or default_name(args)
    ratio = args.eval_inference_mask_ratio
    return EvaluationInTraining(
        suite=args.eval_suite,
        datasets=args.eval_datasets,
        data_root=args.eval_data_root,
        run=run_folder(args),
        batch_size=min(args.batch_size, _EVAL_BATCH_SIZE),
        workers=args.workers,
        inference_masking=args.eval_inference_masking,
        inference_options={} if ratio is None else {"mask_ratio": ratio},
        trained=args.values(),
    )


def _end(code: int, sentence: str) -> int:
    """Say why nothing was begun, here and to a launch, and return the exit code."""
    # Else the launch says it.
    if is_first_process() and LAUNCH_FOLDER not in os.environ:
        prefix = "error: " if code in (BAD_INPUT, FAILED) else ""
        sys.stderr.write(f"{prefix}{one_sentence(sentence)}\n")
    ExitReport(StopSignals()).write(code, sentence)
    return code


if __name__ == "__main__":
    start: Callable[..., int | None] = main
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record

        # Tells torchrun what went wrong, which shows it for the process that failed first.
        start = record(main)
    leave(run_program(start))
