"""How often each word stands in the training captions: counted, and kept as a small JSON file.

`clip-pgs data words` writes it and `--text-masking frequency` reads it.

A word is a run of letters, marks and digits in lower case, with what an apostrophe ties to it
("don't", "dog's"), or a run of other characters that are no space (",", "..."). So punctuation
counts, as it does in CLIPF's code, which splits as CLIP's tokenizer does before its merges.
Deliberate differences: an apostrophe does not end a word, a number is one word, entities such
as `&amp;` are not resolved, and words are counted as they are written (there: re-encoded as bytes).
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import regex

from clip_pgs.common import explained
from clip_pgs.data.bad_samples import BadSampleError, Skip, describe_reasons
from clip_pgs.data.caption_tables import read_captions
from clip_pgs.data.commands import map_in, worker_processes
from clip_pgs.data.samples import (
    RawSample,
    caption_fields,
    cut_caption,
    decode_captions,
    missing_fields,
)
from clip_pgs.data.tar import read_shard
from clip_pgs.files import absence, read_json_object, write_text

logger = logging.getLogger(__name__)

_VERSION = 1
# Twelve million captions have a million words, or 20 MB.
_MAX_BYTES = 2**28
_NUMBERS = ("num_captions", "num_words", "min_count")
# \u2019 is the typographic apostrophe.
_WORD = regex.compile(r"[\p{L}\p{M}\p{N}]+(?:['\u2019][\p{L}\p{M}\p{N}]+)*|[^\s\p{L}\p{M}\p{N}]+")


def find_words(caption: str) -> list[regex.Match[str]]:
    """Return where the words of a caption are, in order; they are counted in lower case."""
    return list(_WORD.finditer(caption))


def keep_words(caption: str, words: Sequence[regex.Match[str]], kept: Sequence[int]) -> str:
    """Return a caption with only some of its words.

    Words keep their case. Two of them stand without a space between them only where they did.

    Args:
        caption: The caption.
        words: All its words, from `find_words`.
        kept: Which of them stay, ascending.
    """
    shorter, end = "", 0
    for word in (words[index] for index in kept):
        shorter += (" " if shorter and word.start() != end else "") + word[0]
        end = word.end()
    return shorter


@dataclass(frozen=True)
class WordFrequencies:
    """The words of many captions.

    Args:
        counts: How often each word occurs, most common first; rare ones are left out.
        num_words: Words in all captions, rare ones and repetitions included.
        num_captions: Captions they come from.
        min_count: A word that occurs less often is left out of `counts`.
    """

    counts: dict[str, int]
    num_words: int
    num_captions: int
    min_count: int

    def drop_probabilities(self, threshold: float) -> dict[str, float]:
        """Return the probability `1 - sqrt(threshold / frequency)` of each word that has one.

        Args:
            threshold: The frequency up to which words are never dropped, in (0, 1].
        """
        rate = threshold * self.num_words
        return {
            word: 1.0 - math.sqrt(rate / count)
            for word, count in self.counts.items()
            if count > rate
        }

    def mean_kept(self, threshold: float) -> float:
        """Return how many words of a caption stay on average if each is dropped by itself."""
        dropped = self.drop_probabilities(threshold)
        num_dropped = sum(self.counts[word] * dropped[word] for word in dropped)
        return (self.num_words - num_dropped) / self.num_captions


def write_word_frequencies(frequencies: WordFrequencies, path: Path) -> None:
    """Write the file, whole or not at all; the same frequencies give the same bytes.

    Args:
        frequencies: What to write.
        path: A new file, or one to replace; missing folders are made.
    """
    record = {"version": _VERSION, **{name: getattr(frequencies, name) for name in _NUMBERS}}
    record["counts"] = frequencies.counts
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, ensure_ascii=False, indent=0) + "\n")


def read_word_frequencies(path: Path) -> WordFrequencies:
    """Read a file that `write_word_frequencies` wrote.

    Raises:
        ValueError: If there is none, or it holds anything else.
    """
    if not path.is_file():
        raise ValueError(
            f"the file of word frequencies {str(path)!r} {absence(path)}; "
            f"`clip-pgs data words SHARDS -o {path}` counts them"
        )
    what = f"word frequencies {str(path)!r} are not as `clip-pgs data words` writes them"
    with explained(what, Exception):
        record = read_json_object(path, what="it", max_bytes=_MAX_BYTES)
        if record["version"] != _VERSION:
            raise ValueError(f"version {record['version']!r}, and this package reads {_VERSION}")
        counts, numbers = record["counts"], {name: record[name] for name in _NUMBERS}
        for name, number in {**counts, **numbers}.items():
            if type(number) is not int or number < 1:
                raise ValueError(f"{name!r} must be a whole number >= 1, got {number!r}")
        if sum(counts.values()) > record["num_words"]:
            raise ValueError(f"the counts add up to more than num_words, {record['num_words']}")
    return WordFrequencies(counts, **numbers)


@dataclass
class CaptionCount:
    """What some captions hold.

    Args:
        words: How often each word occurs.
        num_captions: Captions that were counted.
        skipped: Samples without a caption to count, and unreadable shards, by reason.
        first: The first of them.
        fields: Samples by field of `--caption-key` that they have.
    """

    words: Counter[str] = field(default_factory=Counter)
    num_captions: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    first: Skip | None = None
    fields: Counter[str] = field(default_factory=Counter)

    def add(self, other: CaptionCount) -> None:
        """Add other captions to these."""
        self.words.update(other.words)
        self.num_captions += other.num_captions
        self.skipped.update(other.skipped)
        self.first = self.first or other.first
        self.fields.update(other.fields)

    def describe_skipped(self) -> str:
        """Return "3 left out (no caption: 2, empty caption: 1; the first is 0.tar: ...)"."""
        if not self.skipped:
            return "none left out"
        reasons = describe_reasons(self.skipped)
        return f"{self.skipped.total()} left out ({reasons}; the first is {self.first})"

    def frequencies(self, *, min_count: int) -> WordFrequencies:
        """Return the frequencies, most common first and then by the alphabet.

        Args:
            min_count: Leave words out that occur less often; at least 1.

        Raises:
            ValueError: If no caption was counted, or no word so often.
        """
        if not self.num_captions:
            raise ValueError(f"there is no caption to count: {self.describe_skipped()}")
        common = {word: count for word, count in self.words.items() if count >= min_count}
        if not common:
            most = max(self.words.values(), default=0)
            raise ValueError(
                f"no word occurs {min_count} times; lower --min-count to at most {most}, the count "
                "of the most common word"
            )
        ordered = sorted(common.items(), key=lambda item: (-item[1], item[0]))
        return WordFrequencies(dict(ordered), self.words.total(), self.num_captions, min_count)


def count_captions(
    items: Iterable[RawSample | Skip], *, caption_key: str | None = None
) -> CaptionCount:
    """Count all captions of pictures, or the reasons why they cannot be used.

    Args:
        items: What `read_shard` gives; images are not looked at.
        caption_key: See `SampleDecoder`.
    """
    count = CaptionCount()
    for item in items:
        found = _captions_of(item, caption_key, count.fields)
        if isinstance(found, Skip):
            count.skipped[found.reason] += 1
            count.first = count.first or found
            continue
        count.num_captions += len(found)
        for caption in found:
            # The counter would keep a word of megabytes, of which training reads no more than this.
            words = find_words(cut_caption(caption))
            count.words.update(word[0].lower() for word in words)
    return count


def _captions_of(
    item: RawSample | Skip, caption_key: str | None, fields: Counter[str]
) -> list[str] | Skip:
    if isinstance(item, Skip):
        return item
    try:
        return decode_captions(item, caption_key=caption_key, found=fields)
    except BadSampleError as error:
        return item.skip(error)


def count_shard(shard: str, *, caption_key: str | None = None) -> CaptionCount:
    """Count the captions of an expanded shard; its images are not read."""
    items = read_shard(shard, use_json=caption_key is not None, with_images=False)
    return count_captions(items, caption_key=caption_key)


def count_shards(
    shards: list[str],
    *,
    caption_key: str | None = None,
    num_workers: int = 1,
    progress: Callable[[], object] = lambda: None,
) -> CaptionCount:
    """Count the captions of shards.

    Args:
        shards: Expanded shards.
        caption_key: See `SampleDecoder`.
        num_workers: Processes; the result does not depend on them.
        progress: Is called after each shard.

    Raises:
        ValueError: If `num_workers` < 1, or `caption_key` has an empty name.
        LostProcessError: If one of the processes is killed.
    """
    if num_workers < 1:
        raise ValueError(f"--workers must be >= 1, got {num_workers}")
    if caption_key is not None:
        caption_fields(caption_key)
    total = CaptionCount()
    num_workers = min(num_workers, len(shards))
    with worker_processes(num_workers if num_workers > 1 else 0, "count words") as executor:
        count_each: Any = map if executor is None else partial(map_in, executor)
        for count in count_each(partial(count_shard, caption_key=caption_key), shards):
            total.add(count)
            progress()
    if odd := missing_fields(caption_key, total.fields):
        logger.warning("%s", odd)
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
    captions = read_captions(path, caption_key=caption_key, separator=separator)
    return count_captions(RawSample(str(path), "", None, (text.encode(),)) for text in captions)
