"""Drop frequent words of a caption (CLIPF, https://arxiv.org/abs/2412.16148).

A word of frequency f is dropped with probability `1 - sqrt(t / f)`, if that is positive; word2vec
introduced the rule (https://arxiv.org/abs/1310.4546). The default `t = 1e-6` is that of CLIPF's
released code, https://github.com/MingliangLiang3/CLIPF. At it the rule alone leaves hardly a word
of a short caption, and the released code does something else: it keeps as many words as the token
budget holds, those first that the rule keeps, then those that came nearest. `fill=True` does so.

Deliberate differences from the released code: a word that was counted too seldom is always kept,
where that code drops it before all others; probabilities are not rounded; the frequency is
relative to all words, not to those counted often enough.
"""

from __future__ import annotations

import logging
import random
from pathlib import Path

from clip_pgs.data.captions.word_frequencies import read_word_frequencies
from clip_pgs.data.captions.words import find_words, keep_words

logger = logging.getLogger(__name__)


class FrequencyMasking:
    """Take frequent words out of captions; the others stay as they are, in order.

    It draws from the generator of `random`, one number for each word. At least one word is kept.

    Args:
        frequencies: File of word counts, from `python -m clip_pgs.data words`.
        threshold: The t of the rule, in (0, 1]; words up to this frequency are never dropped.
        fill: Keep as many words as the token budget holds, whatever the rule dropped.
        num_tokens: The budget, start and end token included; None for no budget.

    Raises:
        ValueError: If the file is not usable, the threshold out of range, or `fill` has no budget.
    """

    def __init__(
        self,
        *,
        frequencies: str | Path | None = None,
        threshold: float = 1e-6,
        fill: bool = False,
        num_tokens: int | None = None,
    ) -> None:
        if not isinstance(frequencies, (str, Path)):
            raise ValueError(
                "text masking 'frequency' needs the option frequencies=FILE, a file from "
                f"`python -m clip_pgs.data words`, got {frequencies!r}"
            )
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise ValueError(f"threshold must be a number, got {threshold!r}")
        if not 0.0 < threshold <= 1.0:
            raise ValueError(f"threshold must be in (0, 1], got {threshold}")
        if not isinstance(fill, bool):
            raise ValueError(f"fill must be true or false, got {fill!r}")
        if fill and num_tokens is None:
            raise ValueError("fill=true fills a token budget; give one with --text-tokens")
        words = read_word_frequencies(Path(frequencies))
        self.drop_probabilities = words.drop_probabilities(threshold)
        # What fits between start and end token if each word is one token.
        self.num_filled = num_tokens - 2 if fill and num_tokens is not None else None
        mean_kept = words.mean_kept(threshold)
        if not fill and mean_kept < 1.0:
            logger.warning(
                "with threshold %g, frequency masking keeps %.2f words of a caption on average, "
                "so that most come down to one; raise threshold, or set fill=true",
                threshold,
                mean_kept,
            )

    def __call__(self, caption: str) -> str:
        """Return the caption without the words that are dropped this time."""
        words = find_words(caption)
        margins = [random.random() - self.drop_probabilities.get(word.text, 0.0) for word in words]
        num_kept = self.num_filled
        if num_kept is None:
            num_kept = max(1, sum(margin >= 0.0 for margin in margins))
        if num_kept >= len(words):
            return caption
        nearest = sorted(range(len(words)), key=margins.__getitem__, reverse=True)
        return keep_words(caption, words, sorted(nearest[:num_kept]))
