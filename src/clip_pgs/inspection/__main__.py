"""Command line: `python -m clip_pgs.inspection COMMAND`, such as `masks`, `kept` or `cost`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from clip_pgs.common import SentenceParser, one_sentence
from clip_pgs.inspection.cost.cost_command import add_cost_command
from clip_pgs.inspection.cost.data_command import add_data_command
from clip_pgs.inspection.cost.scaling_command import add_scaling_command
from clip_pgs.inspection.foreground.kept_command import add_kept_command
from clip_pgs.inspection.masks_command import add_masks_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        The exit code: 0, or 2 on bad input, after one sentence on stderr.
    """
    parser: argparse.ArgumentParser = SentenceParser(
        prog="python -m clip_pgs.inspection",
        description="Look at what masking strategies do, and measure what they cost.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_masks_command(commands)
    add_kept_command(commands)
    add_cost_command(commands)
    add_scaling_command(commands)
    add_data_command(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    # OSError: a path that cannot be looked up.
    except (ValueError, OSError) as error:
        reason: object = error
    # torch's allocators raise either; what else is wrong inside is no bad input.
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        reason = f"not enough memory for images or batches of this size: {error}"
    else:
        return 0
    sys.stderr.write(f"error: {one_sentence(str(reason))}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
