"""The demo's evaluation: what `clip-pgs test RUN --suite all` does, then the card of RUN/export.

A process takes longer to import torch and OpenCLIP than to write the card, so both have one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from clip_pgs import cli
from clip_pgs.common import AskedToLeaveError, early_end, leaving_when_told, refuse, run_program


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate a run, and write the scores into the card of its export.

    Args:
        argv: The run folder; None takes it from the process.

    Returns:
        The exit code: 0, that of an evaluation that failed, 2 or 1 for a card that could not be
        written, 85 where a signal asked it to leave, 130 for Ctrl-C.
    """
    (run,) = sys.argv[1:] if argv is None else argv
    code = cli.main(["test", run, "--suite", "all"])
    if code:
        return code
    from clip_pgs.training.export import export_run

    try:
        with leaving_when_told():
            export_run(Path(run), card_alone=True)
    except (ValueError, OSError) as error:
        return refuse(error)
    except (KeyboardInterrupt, AskedToLeaveError) as error:
        sentence, code = early_end(error)
        sys.stderr.write(f"{sentence}\n")
        return code
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
