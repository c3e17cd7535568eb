"""`python -m clip_pgs.training`: check every option, then train."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

BAD_INPUT = 2
INTERRUPTED = 130

# Where training fits, this fits; a larger one would make no evaluation faster.
_EVAL_BATCH_SIZE = 256

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one training from the command line.

    Args:
        argv: Arguments without the program's name; `sys.argv` by default.

    Returns:
        Exit code: 0, 2 for bad input (one sentence on stderr, nothing created), 130 for Ctrl-C.
    """
    try:
        from clip_pgs.training.checks import check_options, option_warnings
        from clip_pgs.training.options import parse_options
    except ModuleNotFoundError as error:
        return _refuse(f"training needs {error.name}: pip install 'clip-pgs[training]'")

    try:
        args = parse_options(sys.argv[1:] if argv is None else argv)
        check_options(args)
        hooks = _hooks(args)
    except ValueError as error:
        return _refuse(str(error))
    if args.check_only:
        for sentence in option_warnings(args):
            logger.warning("%s", sentence)
        sys.stdout.write(_summary(args))
        return 0

    from clip_pgs.data.samples import NoUsableSampleError
    from clip_pgs.training.loop import train

    try:
        train(args, **hooks)
    except NoUsableSampleError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _hooks(args: argparse.Namespace) -> dict[str, Any]:
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


def _refuse(sentence: str) -> int:
    if _is_first_process():
        sys.stderr.write(f"error: {sentence}\n")
    return BAD_INPUT


def _is_first_process() -> bool:
    """Return whether this process speaks for all that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _summary(args: argparse.Namespace) -> str:
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
    sys.exit(main())
