"""What counts as a word of a caption, and how a caption is left when some of them are taken out.

A word is a run of letters, marks and digits in lower case, with what an apostrophe ties to it
("don't", "dog's"), or a run of other characters that are no space (",", "..."). So punctuation
counts, as it does in CLIPF's code, which splits as CLIP's tokenizer does before its merges.
Deliberate differences: an apostrophe does not end a word, a number is one word, and entities such
as `&amp;` are not resolved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import regex

# \u2019 is the typographic apostrophe.
_WORD = regex.compile(r"[\p{L}\p{M}\p{N}]+(?:['\u2019][\p{L}\p{M}\p{N}]+)*|[^\s\p{L}\p{M}\p{N}]+")


class Word(NamedTuple):
    """A word in its place.

    Args:
        text: The word in lower case, as it is counted.
        start: Where it begins in the caption.
        end: Where it ends there.
    """

    text: str
    start: int
    end: int


def find_words(caption: str) -> list[Word]:
    """Return the words of a caption in order."""
    return [Word(match[0].lower(), *match.span()) for match in _WORD.finditer(caption)]


def keep_words(caption: str, words: Sequence[Word], kept: Sequence[int]) -> str:
    """Return a caption with only some of its words.

    Words keep their case. Two of them stand without a space between them only where they did.

    Args:
        caption: The caption.
        words: All its words, from `find_words`.
        kept: Which of them stay, ascending.
    """
    pieces: list[str] = []
    end = -1
    for index in kept:
        word = words[index]
        if pieces and word.start != end:
            pieces.append(" ")
        pieces.append(caption[word.start : word.end])
        end = word.end
    return "".join(pieces)
