"""How often each word stands in the training captions, as a small JSON file.

`python -m clip_pgs.data words` writes it and `--text-masking frequency` reads it.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_VERSION = 1
_NUMBERS = ("num_captions", "num_words", "min_count")


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
    record = {
        "version": _VERSION,
        "num_captions": frequencies.num_captions,
        "num_words": frequencies.num_words,
        "min_count": frequencies.min_count,
        "counts": frequencies.counts,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        text = json.dumps(record, ensure_ascii=False, indent=0)
        unfinished.write_text(text + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_word_frequencies(path: Path) -> WordFrequencies:
    """Read a file that `write_word_frequencies` wrote.

    Raises:
        ValueError: If there is none, or it holds anything else.
    """
    if not path.is_file():
        raise ValueError(
            f"word frequencies {str(path)!r} do not exist; "
            f"`python -m clip_pgs.data words SHARDS -o {path}` counts them"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"word frequencies {str(path)!r} cannot be read: {error}") from error
    fault = _find_fault(record)
    if fault is not None:
        raise ValueError(f"word frequencies {str(path)!r} are of no use: {fault}")
    return WordFrequencies(
        record["counts"], *(record[name] for name in ("num_words", "num_captions", "min_count"))
    )


def _find_fault(record: Any) -> str | None:
    if not isinstance(record, dict) or "version" not in record:
        return "`python -m clip_pgs.data words` did not write them"
    if record["version"] != _VERSION:
        return f"they have version {record['version']!r}, this package reads {_VERSION}"
    for name in _NUMBERS:
        if not _is_count(record.get(name)):
            return f"{name} must be a whole number >= 1, got {record.get(name)!r}"
    counts = record.get("counts")
    if not isinstance(counts, dict):
        return f"counts must map words to counts, got {type(counts).__name__}"
    for word, count in counts.items():
        if not _is_count(count):
            return f"the count of {word!r} must be a whole number >= 1, got {count!r}"
    if sum(counts.values()) > record["num_words"]:
        return f"the counts add up to more than num_words, {record['num_words']}"
    return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
