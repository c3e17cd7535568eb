"""Count the words of training captions, shard by shard in several processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from clip_pgs.data.captions.word_frequencies import WordFrequencies
from clip_pgs.data.captions.words import find_words
from clip_pgs.data.samples import BadSampleError, Skip, decode_caption
from clip_pgs.data.tables import default_separator, read_captions
from clip_pgs.data.tar.tar_reader import read_shard


@dataclass
class CaptionCount:
    """What some captions hold.

    Args:
        words: How often each word occurs.
        num_captions: Captions that were counted.
        skipped: Samples without a caption to count, and unreadable shards, by reason.
    """

    words: Counter[str] = field(default_factory=Counter)
    num_captions: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def add_caption(self, data: bytes | None) -> None:
        """Count a caption as it is stored, or the reason why it cannot be used."""
        try:
            caption = decode_caption(data)
        except BadSampleError as error:
            self.skipped[error.reason] += 1
            return
        self.words.update(word.text for word in find_words(caption))
        self.num_captions += 1

    def add(self, other: CaptionCount) -> None:
        """Add other captions to these."""
        self.words.update(other.words)
        self.num_captions += other.num_captions
        self.skipped.update(other.skipped)

    def frequencies(self, *, min_count: int) -> WordFrequencies:
        """Return the frequencies, most common first and then by the alphabet.

        Args:
            min_count: Leave words out that occur less often; at least 1.

        Raises:
            ValueError: If no caption was counted.
        """
        if not self.num_captions:
            raise ValueError(f"there is no caption to count: {describe_skipped(self.skipped)}")
        common = {word: count for word, count in self.words.items() if count >= min_count}
        ordered = sorted(common.items(), key=lambda item: (-item[1], item[0]))
        return WordFrequencies(dict(ordered), self.words.total(), self.num_captions, min_count)


def count_shard(shard: str) -> CaptionCount:
    """Count the captions of one shard; its images are not read.

    Args:
        shard: An expanded shard.
    """
    count = CaptionCount()
    for item in read_shard(shard, with_images=False):
        if isinstance(item, Skip):
            count.skipped[item.reason] += 1
        else:
            count.add_caption(item.caption)
    return count


def count_shards(
    shards: list[str],
    *,
    num_workers: int = 1,
    progress: Callable[[int], object] = lambda num_done: None,
) -> CaptionCount:
    """Count the captions of shards.

    Args:
        shards: Expanded shards.
        num_workers: Processes; the result does not depend on them.
        progress: Is told the number of finished shards after each of them.

    Raises:
        ValueError: If `num_workers` < 1.
    """
    if num_workers < 1:
        raise ValueError(f"--workers must be >= 1, got {num_workers}")
    total = CaptionCount()
    with _mapping(min(num_workers, len(shards))) as count_each:
        for num_done, count in enumerate(count_each(count_shard, shards), start=1):
            total.add(count)
            progress(num_done)
    return total


def count_table(path: Path, *, caption_key: str, separator: str | None = None) -> CaptionCount:
    """Count the captions of a table.

    Args:
        path: Table with a header line.
        caption_key: Column of captions.
        separator: What stands between columns; None goes by the name (`.tsv`: tab).

    Raises:
        ValueError: If the table cannot be read.
    """
    count = CaptionCount()
    captions = read_captions(
        path, caption_key=caption_key, separator=separator or default_separator(path)
    )
    for caption in captions:
        count.add_caption(caption.encode())
    return count


def describe_skipped(skipped: Counter[str]) -> str:
    """Return "3 left out (no caption: 2, empty caption: 1)"."""
    if not skipped:
        return "none left out"
    # Equal counts stand in the order of their names, whatever order they came in.
    ordered = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    reasons = ", ".join(f"{reason}: {number}" for reason, number in ordered)
    return f"{skipped.total()} left out ({reasons})"


@contextmanager
def _mapping(num_workers: int) -> Iterator[Callable[..., Iterable[CaptionCount]]]:
    """Give a `map` that runs in several processes, or in this one."""
    if num_workers <= 1:
        yield map
        return
    with ProcessPoolExecutor(num_workers) as executor:
        yield executor.map
