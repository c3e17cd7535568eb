"""Command line: `python -m clip_pgs.inspection masks` and `python -m clip_pgs.inspection kept`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from clip_pgs.inspection.kept_command import add_kept_command
from clip_pgs.inspection.masks_command import add_masks_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        The exit code: 0, or 2 on bad input, after one sentence on stderr.
    """
    parser = argparse.ArgumentParser(
        prog="python -m clip_pgs.inspection",
        description="Look at what masking strategies do.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_masks_command(commands)
    add_kept_command(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
