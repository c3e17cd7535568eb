"""`clip-pgs data`: make the demo world, pack pairs, check shards, count words.

What a command needs is imported when it runs: torch takes seconds.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clip_pgs.common import SentenceParser, output_path, refuse, run_program
from clip_pgs.files import check_writable, regular_file
from clip_pgs.tables import counted

_CAPTION_KEY = "field of the side-car .json that holds the captions (none: captions are .txt)"


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: Arguments; None takes the process's own.

    Returns:
        The exit code: 0, 1 if `check` found something bad or the disk is full, 2 for bad input.
    """
    options = vars(make_parser().parse_args(argv))
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        return int(options.pop("run")(**options))
    except (ValueError, OSError) as error:
        return refuse(error)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = SentenceParser(
        prog="clip-pgs data",
        description="Make, pack, check and count image-caption data.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    world = commands.add_parser(
        "world",
        help="generate the demo world",
        description="Generate the demo world: shards to train on and sets to evaluate on. "
        "A complete world with the same options is left as it is.",
    )
    world.add_argument("out", type=output_path, metavar="OUT", help="folder of the world")
    world.add_argument("--seed", type=int, default=0, help="seed of the scenes (0)")
    # What is not given is left to `write_world`.
    for name, help_text in (
        ("--num-train", "training scenes"),
        ("--num-val", "held-out scenes"),
        ("--num-per-class", "scenes per class of the evaluation sets"),
    ):
        world.add_argument(name, type=int, default=argparse.SUPPRESS, metavar="N", help=help_text)
    world.set_defaults(run=_run_world)

    pack = commands.add_parser(
        "pack",
        help="make shards from a table of images and captions",
        description="Make webdataset shards and sizes.json from a table of images and captions. "
        "Relative image paths start at the table's folder; the images' bytes are kept.",
    )
    pack.add_argument("table", type=Path, metavar="PAIRS.csv", help="table with a header line")
    pack.add_argument("out", type=output_path, metavar="OUT", help="new or empty folder")
    pack.add_argument(
        "--shard-size", type=int, default=1000, metavar="N", help="pairs per shard (1000)"
    )
    pack.add_argument("--image-key", default="filepath", help="column of paths (filepath)")
    pack.add_argument("--caption-key", default="title", help="column of captions (title)")
    pack.add_argument("--separator", help="between columns (a tab for .tsv, else a comma)")
    pack.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out rows without a caption or an image that can be opened, instead of "
        "stopping; check decodes the images that were packed",
    )
    pack.set_defaults(run=_run_pack)

    check = commands.add_parser(
        "check",
        help="read shards through and say what is in them",
        description="Read shards through, decode every image and caption, and print a table. "
        "Exit code 1 if anything is bad.",
    )
    check.add_argument("shards", metavar="SHARDS", help="for example 'data/{00000..00012}.tar'")
    check.add_argument("--caption-key", metavar="KEY", help=_CAPTION_KEY)
    check.set_defaults(run=_run_check)

    words = commands.add_parser(
        "words",
        help="count the words of training captions, for --text-masking frequency",
        description="Count the words of training captions and write them to a small file for "
        "--text-masking frequency. Captions that cannot be used are counted and left out.",
    )
    words.add_argument(
        "shards", metavar="SHARDS", help="for example 'data/{00000..00012}.tar', or a .csv or .tsv"
    )
    words.add_argument(
        "-o", "--out", type=output_path, required=True, metavar="FILE.json", help="file to write"
    )
    words.add_argument(
        "--min-count", type=int, default=5, metavar="N", help="leave rarer words out (5)"
    )
    words.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (as many as there are cores)",
    )
    words.add_argument(
        "--caption-key",
        metavar="KEY",
        help=f"column of captions in a table (title); in shards, {_CAPTION_KEY}",
    )
    words.add_argument("--separator", help="between columns (a tab for .tsv, else a comma)")
    words.set_defaults(run=_run_words)
    return parser


def _run_world(out: Path, **options: int) -> int:
    from clip_pgs.data.world.writing import describe_world, write_world

    with tqdm(unit="scene", disable=not sys.stderr.isatty()) as bar:

        def show(num_done: int, num_all: int) -> None:
            bar.total = num_all
            bar.update(num_done - bar.n)

        num_workers = min(4, os.cpu_count() or 1)
        write_world(out, num_workers=num_workers, progress=show, **options)
    sys.stdout.write(f"the demo world is in {out}\n{describe_world(out)}")
    return 0


def _run_pack(out: Path, **options: Any) -> int:
    from clip_pgs.data.pack import pack_pairs
    from clip_pgs.data.shards import shard_pattern

    sizes, num_skipped = pack_pairs(out=out, **options)
    sys.stdout.write(
        f"packed {sum(sizes.values())} pairs, left out {num_skipped}; "
        f"train with --train-data {shlex.quote(shard_pattern(out, list(sizes)))}\n"
    )
    return 0


def _run_check(shards: str, caption_key: str | None) -> int:
    from clip_pgs.data.pack import check_shards
    from clip_pgs.data.shards import expand_shards

    total = check_shards(expand_shards(shards), sys.stdout.write, caption_key=caption_key)
    return 1 if total.bad else 0


def _run_words(shards: str, out: Path, min_count: int, workers: int, **columns: Any) -> int:
    check_writable(out)
    if min_count < 1:
        raise ValueError(f"--min-count must be >= 1, got {min_count}")
    from clip_pgs.data.shards import expand_shards
    from clip_pgs.data.words import (
        count_shards,
        count_table,
        write_word_frequencies,
    )

    is_table = shards.lower().endswith((".csv", ".tsv"))
    names = [shards] if is_table else expand_shards(shards)
    if out.resolve() in (Path(name).resolve() for name in names):
        raise ValueError(f"the output {out} is what the words are to be counted in")
    if is_table:
        columns["caption_key"] = columns["caption_key"] or "title"
        count = count_table(Path(shards), **columns)
    else:
        with tqdm(total=len(names), unit="shard", disable=not sys.stderr.isatty()) as bar:
            key = columns["caption_key"]
            count = count_shards(names, caption_key=key, num_workers=workers, progress=bar.update)
    frequencies = count.frequencies(min_count=min_count)
    write_word_frequencies(frequencies, regular_file(out))
    sys.stdout.write(
        f"counted {counted(frequencies.num_words, 'word')} in "
        f"{counted(frequencies.num_captions, 'caption')}, {count.describe_skipped()}; "
        f"{counted(len(frequencies.counts), 'different word')} with a count of {min_count} or "
        "more; train with --text-masking frequency "
        f"--text-masking-option {shlex.quote(f'frequencies={out}')}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
