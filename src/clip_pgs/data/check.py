"""Read shards through and say what is in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from clip_pgs.data.samples import BadSampleError, RawSample, Skip, decode_caption, decode_image
from clip_pgs.data.tar.shards import is_remote, read_sizes
from clip_pgs.data.tar.tar_reader import read_shard

_HEADER = ("shard", "samples", "usable", "images", "captions", "bad", "characters", "pixels")
_MAX_NAMED = 100


@dataclass
class ShardReport:
    """What a shard, or several together, hold.

    Args:
        num_samples: Groups of members with one key.
        num_usable: Those with a readable image and a caption.
        num_images: Images that can be decoded.
        num_captions: Captions with text in UTF-8.
        caption_lengths: Characters of each such caption.
        widths: Width in pixels of each such image.
        heights: Height in pixels of each such image.
        bad: What is wrong: samples and, with an empty key, the shard itself.
    """

    num_samples: int = 0
    num_usable: int = 0
    num_images: int = 0
    num_captions: int = 0
    caption_lengths: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    bad: list[Skip] = field(default_factory=list)

    def add(self, other: ShardReport) -> None:
        """Add another report to this one."""
        self.num_samples += other.num_samples
        self.num_usable += other.num_usable
        self.num_images += other.num_images
        self.num_captions += other.num_captions
        self.caption_lengths += other.caption_lengths
        self.widths += other.widths
        self.heights += other.heights
        self.bad += other.bad


def check_shard(shard: str) -> ShardReport:
    """Read a shard through, decoding every image and caption.

    Args:
        shard: An expanded shard.
    """
    report = ShardReport()
    for item in read_shard(shard):
        if isinstance(item, Skip):
            report.bad.append(item)
        else:
            _check_sample(item, report)
    sizes_path = Path(shard).parent / "sizes.json"
    if not is_remote(shard) and sizes_path.is_file():
        stated = read_sizes(sizes_path).get(Path(shard).name)
        if stated != report.num_samples:
            detail = f"it says {stated}, the shard has {report.num_samples}"
            report.bad.append(Skip(shard, "", "sizes.json is wrong", detail))
    return report


def check_shards(shards: Iterable[str], write: Callable[[str], object]) -> ShardReport:
    """Check shards one after the other and write a table of them, a row when it is known.

    Args:
        shards: Expanded shards.
        write: Takes the text.

    Returns:
        The total over all shards.
    """
    shards = list(shards)
    width = max(len(name) for name in [*shards, "shard"])
    write(_format_row(_HEADER, width))
    total = ShardReport()
    for shard in shards:
        report = check_shard(shard)
        write(_format_row(_cells(shard, report), width))
        total.add(report)
    write(_format_row(_cells("total", total), width))
    for skip in total.bad[:_MAX_NAMED]:
        write(f"bad: {skip}\n")
    if len(total.bad) > _MAX_NAMED:
        write(f"bad: {len(total.bad) - _MAX_NAMED} more\n")
    write(f"\n--train-num-samples {total.num_usable}\n")
    return total


def _check_sample(raw: RawSample, report: ShardReport) -> None:
    report.num_samples += 1
    problems: list[BadSampleError] = []
    try:
        image = decode_image(raw.image)
        report.num_images += 1
        report.widths.append(image.width)
        report.heights.append(image.height)
    except BadSampleError as error:
        problems.append(error)
    try:
        caption = decode_caption(raw.caption)
        report.num_captions += 1
        report.caption_lengths.append(len(caption))
    except BadSampleError as error:
        problems.append(error)
    report.num_usable += not problems
    report.bad += [Skip(raw.shard, raw.key, each.reason, each.detail) for each in problems]


def _cells(name: str, report: ShardReport) -> tuple[str, ...]:
    characters = pixels = "-"
    if report.caption_lengths:
        shortest, longest = min(report.caption_lengths), max(report.caption_lengths)
        characters = f"{shortest}..{longest} (median {median(report.caption_lengths):.0f})"
    if report.widths:
        widths, heights = report.widths, report.heights
        pixels = f"{min(widths)}..{max(widths)} x {min(heights)}..{max(heights)}"
    counts = (report.num_samples, report.num_usable, report.num_images, report.num_captions)
    return (name, *map(str, counts), str(len(report.bad)), characters, pixels)


def _format_row(cells: tuple[str, ...], width: int) -> str:
    name, *counts, characters, pixels = cells
    numbers = "".join(f"{count:>10}" for count in counts)
    return f"{name:<{width}}{numbers}  {characters:<24}  {pixels}".rstrip() + "\n"
