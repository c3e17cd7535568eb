"""`python -m clip_pgs.evaluation sets`: which data sets are there, and how to get the others."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from clip_pgs.common import SentenceParser, one_sentence
from clip_pgs.evaluation.command_options import add_data_flags
from clip_pgs.evaluation.datasets.datasets import EvalSet
from clip_pgs.evaluation.datasets.presence import PRESENT, Presence, check_presence
from clip_pgs.evaluation.datasets.suites import load_suite

EXIT_ALL_PRESENT, EXIT_INCOMPLETE, EXIT_BAD_INPUT = 0, 1, 2
_PAIRS_URL = "https://raw.githubusercontent.com/RAIVNLab/sugar-crepe/main/data"
_IMAGES_URL = "http://images.cocodataset.org/zips/val2017.zip"


def run(argv: Sequence[str]) -> int:
    """Print a table of data sets, and the commands that bring those that are not there.

    Args:
        argv: Arguments.

    Returns:
        0 if all are present, 1 if some are incomplete or missing, 2 on bad input.
    """
    parser = SentenceParser(
        prog="clip-test.sh sets",
        description="Tell which data sets are present, incomplete or missing.",
        epilog="exit codes: 0 all present, 1 some incomplete or missing, 2 bad input",
        allow_abbrev=False,
    )
    add_data_flags(parser)
    args = parser.parse_args(argv)
    try:
        eval_sets = load_suite(args.suite, datasets=args.datasets, data_root=args.data_root)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {one_sentence(error)}\n")
        return EXIT_BAD_INPUT
    found = [(eval_set, check_presence(eval_set)) for eval_set in eval_sets]
    sys.stdout.write(_table(found))
    absent = [eval_set for eval_set, presence in found if presence.state != PRESENT]
    if not absent:
        return EXIT_ALL_PRESENT
    commands = dict.fromkeys(
        command for eval_set in absent for command in _commands(eval_set, args.datasets)
    )
    if commands:
        sys.stdout.write("\nTo get what is not there:\n")
        sys.stdout.writelines(f"  {command}\n" for command in commands)
    return EXIT_INCOMPLETE


def _table(found: Sequence[tuple[EvalSet, Presence]]) -> str:
    suites = dict.fromkeys(eval_set.suite for eval_set, _ in found)
    width = max(len(text) for eval_set, _ in found for text in (eval_set.name, eval_set.suite))
    blocks = []
    for suite in suites:
        members = [(eval_set, presence) for eval_set, presence in found if eval_set.suite == suite]
        num_present = sum(presence.state == PRESENT for _, presence in members)
        lines = [f"{suite.ljust(width)}  {num_present} of {len(members)} present\n"]
        lines += [
            f"{eval_set.name.ljust(width)}  {presence.state.ljust(10)}  "
            f"{presence.reason or eval_set.location}\n"
            for eval_set, presence in members
        ]
        blocks.append("".join(lines))
    return "\n".join(blocks)


def _commands(eval_set: EvalSet, datasets: str) -> list[str]:
    """Return the shell commands that bring a data set to where it was looked for."""
    if datasets == "demo":
        root = Path(eval_set.location).parents[1]
        return [f"python -m clip_pgs.data world {shlex.quote(str(root))}"]
    # Nothing is known of the sets of one's own list, nor of another server than the hub.
    if datasets != "paper" or "://" in eval_set.location:
        return []
    folder = shlex.quote(eval_set.location)
    if eval_set.task == "image_caption_selection":
        annotations = f"{eval_set.splits[0]}.json"
        return [
            f"mkdir -p {folder}",
            f"curl -L {_IMAGES_URL} -o {folder}/val2017.zip && "
            f"unzip -q {folder}/val2017.zip -d {folder}",
            f"curl -L {_PAIRS_URL}/{annotations} -o {folder}/{annotations}",
        ]
    repository = f"clip-benchmark/wds_{eval_set.name.replace('/', '-')}"
    return [f"hf download {repository} --repo-type dataset --local-dir {folder}"]
