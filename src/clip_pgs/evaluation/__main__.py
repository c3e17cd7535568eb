"""Command line: `clip-pgs test RUN_OR_CHECKPOINT...`, `sets` and `report`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from clip_pgs.common import AskedToLeaveError, early_end, leaving_when_told, run_program


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        The exit code: 0 if every data set was done or is there, 1 if some are missing or failed,
        2 on bad input, after one sentence on stderr, 85 where a signal such as SIGTERM asked it
        to leave, 130 for Ctrl-C.
    """
    try:
        with leaving_when_told():
            return _run(argv)
    except (KeyboardInterrupt, AskedToLeaveError) as error:
        sentence, code = early_end(error)
        sys.stderr.write(f"{sentence}; the same command continues\n")
        return code


def _run(argv: Sequence[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    match argv:
        case ["report", *rest]:
            from clip_pgs.evaluation.report.command import run as run_report

            return run_report(rest)
        case ["sets", *rest]:
            from clip_pgs.evaluation.command import run_sets

            return run_sets(rest)
    from clip_pgs.evaluation.command import run

    return run(argv)


if __name__ == "__main__":
    sys.exit(run_program(main))
