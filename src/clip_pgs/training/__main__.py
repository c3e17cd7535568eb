"""`python -m clip_pgs.training`: check every option, then train."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

BAD_INPUT = 2
INTERRUPTED = 130

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
        train(args)
    except NoUsableSampleError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _refuse(sentence: str) -> int:
    if _is_first_process():
        sys.stderr.write(f"error: {sentence}\n")
    return BAD_INPUT


def _is_first_process() -> bool:
    """Return whether this process speaks for all that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _summary(args: argparse.Namespace) -> str:
    options = ", ".join(f"{name}={value}" for name, value in args.masking_options.items())
    masking = f"{args.masking} ({options})" if options else args.masking
    return f"the options are valid: {args.model}, masking {masking}, {args.epochs} epochs\n"


if __name__ == "__main__":
    sys.exit(main())
