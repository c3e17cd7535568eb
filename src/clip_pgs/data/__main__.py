"""`python -m clip_pgs.data`: make the demo world, pack pairs, check shards, count words."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from tqdm import tqdm

from clip_pgs.common import SentenceParser, one_sentence
from clip_pgs.data.pack import check_shards, pack_pairs
from clip_pgs.data.shards import expand_shards
from clip_pgs.data.words import (
    count_shards,
    count_table,
    describe_skipped,
    write_word_frequencies,
)

_CAPTION_KEY = "field of the side-car .json that holds the captions (none: captions are .txt)"


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: Arguments; None takes the process's own.

    Returns:
        The exit code: 0, 1 if `check` found something bad, 2 for bad input.
    """
    args = _make_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        return int(args.run(args))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {one_sentence(error)}\n")
        return 2


def _make_parser() -> argparse.ArgumentParser:
    parser = SentenceParser(
        prog="python -m clip_pgs.data",
        description="Make, pack, check and count image-caption data.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    world = commands.add_parser(
        "world",
        help="generate the demo world",
        description="Generate the demo world: shards to train on and sets to evaluate on. "
        "A complete world with the same options is left as it is.",
    )
    world.add_argument("out", type=Path, metavar="OUT", help="folder of the world")
    world.add_argument("--seed", type=int, default=0, help="seed of the scenes (0)")
    world.add_argument("--num-train", type=int, metavar="N", help="training scenes")
    world.add_argument("--num-val", type=int, metavar="N", help="held-out scenes")
    world.add_argument(
        "--num-per-class", type=int, metavar="N", help="scenes per class of the evaluation sets"
    )
    world.set_defaults(run=_run_world)

    pack = commands.add_parser(
        "pack",
        help="make shards from a table of images and captions",
        description="Make webdataset shards and sizes.json from a table of images and captions. "
        "Relative image paths start at the table's folder; the images' bytes are kept.",
    )
    pack.add_argument("table", type=Path, metavar="PAIRS.csv", help="table with a header line")
    pack.add_argument("out", type=Path, metavar="OUT", help="new or empty folder")
    pack.add_argument(
        "--shard-size", type=int, default=1000, metavar="N", help="pairs per shard (1000)"
    )
    pack.add_argument("--image-key", default="filepath", help="column of paths (filepath)")
    pack.add_argument("--caption-key", default="title", help="column of captions (title)")
    pack.add_argument("--separator", help="between columns (a tab for .tsv, else a comma)")
    pack.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out rows without a readable image or a caption, instead of stopping",
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
        "-o", "--out", type=Path, required=True, metavar="FILE.json", help="file to write"
    )
    words.add_argument(
        "--min-count", type=int, default=5, metavar="N", help="leave rarer words out (5)"
    )
    words.add_argument(
        "--workers", type=int, metavar="N", help="processes (as many as there are cores)"
    )
    words.add_argument(
        "--caption-key",
        metavar="KEY",
        help=f"column of captions in a table (title); in shards, {_CAPTION_KEY}",
    )
    words.add_argument("--separator", help="between columns (a tab for .tsv, else a comma)")
    words.set_defaults(run=_run_words)
    return parser


def _run_world(args: argparse.Namespace) -> int:
    # Drawing needs more than the other commands do.
    from clip_pgs.data.world import describe_world, write_world

    counts = {
        "num_train": args.num_train,
        "num_val": args.num_val,
        "num_per_class": args.num_per_class,
    }
    chosen = {name: count for name, count in counts.items() if count is not None}
    with tqdm(unit="scene", disable=not sys.stderr.isatty()) as bar:

        def show(num_done: int, num_all: int) -> None:
            bar.total = num_all
            bar.update(num_done - bar.n)

        write_world(args.out, seed=args.seed, progress=show, **chosen)
    sys.stdout.write(f"the demo world is in {args.out}\n{describe_world(args.out)}")
    return 0


def _run_pack(args: argparse.Namespace) -> int:
    result = pack_pairs(
        args.table,
        args.out,
        shard_size=args.shard_size,
        image_key=args.image_key,
        caption_key=args.caption_key,
        separator=args.separator,
        skip_bad=args.skip_bad,
    )
    first, last = min(result.sizes), max(result.sizes)
    names = f"{{{first[:-4]}..{last[:-4]}}}.tar" if first != last else first
    sys.stdout.write(
        f"packed {sum(result.sizes.values())} pairs, left out {result.num_skipped}; "
        f"train with --train-data '{args.out / names}'\n"
    )
    return 0


def _run_check(args: argparse.Namespace) -> int:
    total = check_shards(expand_shards(args.shards), sys.stdout.write, caption_key=args.caption_key)
    return 1 if total.bad else 0


def _run_words(args: argparse.Namespace) -> int:
    if args.out.is_dir():
        raise ValueError(f"{str(args.out)!r} is a folder; name a file")
    if args.min_count < 1:
        raise ValueError(f"--min-count must be >= 1, got {args.min_count}")
    if args.shards.lower().endswith((".csv", ".tsv")):
        count = count_table(
            Path(args.shards), caption_key=args.caption_key or "title", separator=args.separator
        )
    else:
        shards = expand_shards(args.shards)
        num_workers = args.workers if args.workers is not None else os.cpu_count() or 1
        with tqdm(total=len(shards), unit="shard", disable=not sys.stderr.isatty()) as bar:
            count = count_shards(
                shards,
                caption_key=args.caption_key,
                num_workers=num_workers,
                progress=bar.update,
            )
    frequencies = count.frequencies(min_count=args.min_count)
    write_word_frequencies(frequencies, args.out)
    sys.stdout.write(
        f"counted {frequencies.num_words} words in {frequencies.num_captions} captions, "
        f"{describe_skipped(count.skipped)}; {len(frequencies.counts)} different words occur "
        f"{args.min_count} times or more; train with --text-masking frequency "
        f"--text-masking-option frequencies={args.out}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
