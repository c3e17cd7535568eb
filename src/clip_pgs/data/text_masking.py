"""Shorter texts for training, by name (`--text-masking`, `--text-tokens`).

Each is a tokenizer of its own: captions in, token numbers out. Those that draw use the generators
of the process, which `SampleDecoder` seeds for each sample. OpenCLIP's reduction masks shorten
only captions that are longer than the budget.

A text masking is a function of the model's tokenizer, the budget (or None) and options by name,
registered in `TEXT_MASKINGS` with what help, checks and tests read: `summary` (what it leaves of a
caption), `source`, `needs_budget`, and `needs` (what else must be there).
"""

from __future__ import annotations

import inspect
import logging
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from clip_pgs.data.samples import Tokenize
from clip_pgs.data.words import find_words, keep_words, read_word_frequencies
from clip_pgs.masking.strategy import check_share
from clip_pgs.registry import Registry

logger = logging.getLogger(__name__)

TEXT_MASKINGS: Registry[Callable[..., Tokenize]] = Registry("text masking")

_CLIPA = "CLIPA, arXiv 2305.07017"


def create_text_masking(
    name: str, *, tokenizer: Tokenize, num_tokens: int | None = None, **options: Any
) -> Tokenize:
    """Build a tokenizer that shortens captions.

    Args:
        name: One of `TEXT_MASKINGS`.
        tokenizer: The model's; with a budget it must take `context_length`, as OpenCLIP's do.
        num_tokens: Budget T, start and end token included; "none" with a budget truncates.
        **options: Options of the masking; `frequency` takes those of `FrequencyMasking`.

    Returns:
        A picklable callable from B captions to a long tensor (B, T), T being the context length
        where there is no budget.

    Raises:
        ValueError: If the name or an option is unknown, the budget is missing, out of range or
            cannot be met with this tokenizer, or what the masking needs is not installed.
    """
    build = TEXT_MASKINGS.get(name)
    parameters = inspect.signature(build).parameters.values()
    known = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            choices = ", ".join(known) or "none at all"
            raise ValueError(f"text masking {name!r} has no option {option!r}; it takes {choices}")
    if num_tokens is None and TEXT_MASKINGS.declaration(name)["needs_budget"]:
        raise ValueError(f"--text-masking {name} needs a budget; give it with --text-tokens")
    longest = getattr(tokenizer, "context_length", None)
    # A start token, a word and an end token.
    if num_tokens is not None and not 3 <= num_tokens <= (longest or num_tokens):
        raise ValueError(
            "--text-tokens must be >= 3 and at most the model's context length, "
            f"{longest}, got {num_tokens}"
        )
    return build(tokenizer, num_tokens, **options)


@TEXT_MASKINGS.register(
    "none",
    summary="the whole caption, up to the context length",
    source="CLIP, arXiv 2103.00020",
    needs_budget=False,
    needs="",
)
def _cut(tokenizer: Any, num_tokens: int | None) -> Tokenize:
    return tokenizer if num_tokens is None else partial(tokenizer, context_length=num_tokens)


@TEXT_MASKINGS.register(
    "truncate", summary="its first tokens", source=_CLIPA, needs_budget=False, needs=""
)
def _truncate(tokenizer: Tokenize, num_tokens: int | None) -> Tokenize:
    if num_tokens is None:
        logger.warning("--text-masking truncate has no effect without --text-tokens")
    return _cut(tokenizer, num_tokens)


def _register_reduction(
    name: str, open_clip_name: str, source: str, summary: str, needs: str = ""
) -> None:
    """Register one of OpenCLIP's reduction masks."""

    @TEXT_MASKINGS.register(name, summary=summary, source=source, needs_budget=True, needs=needs)
    def build(tokenizer: Any, num_tokens: int) -> Tokenize:
        if not all(hasattr(tokenizer, part) for part in ("encode", "sot_token_id", "eot_token_id")):
            raise ValueError(
                f"--text-masking {name} works with OpenCLIP's own tokenizer alone, and this model "
                f"has {type(tokenizer).__name__}; use truncate or frequency"
            )
        if name == "syntax":
            _check_tagger()
        # Streams that do without open_clip are made without it.
        from clip_pgs.integrations.open_clip.compat import text_reduction

        return partial(
            text_reduction(open_clip_name),
            context_length=num_tokens,
            sot_token_id=tokenizer.sot_token_id,
            eot_token_id=tokenizer.eot_token_id,
            encode_fn=tokenizer.encode,
        )


_register_reduction("block", "simple", _CLIPA, "a run of tokens from a random place")
_register_reduction("random", "random", _CLIPA, "random tokens in order")
_register_reduction("shuffle", "shuffle", "OpenCLIP", "random tokens in random order")
_register_reduction(
    "syntax", "syntax", _CLIPA, "nouns, then adjectives, then verbs", "nltk and its data"
)


def _check_tagger() -> None:
    try:
        import nltk

        nltk.pos_tag(nltk.tokenize.word_tokenize("a dog"))
    except (ImportError, LookupError) as error:
        raise ValueError(
            "--text-masking syntax needs nltk and two data sets of nltk, which are not installed; "
            "`pip install nltk`, then "
            "`python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng`"
        ) from error


@TEXT_MASKINGS.register(
    "frequency",
    summary="frequent words dropped at random",
    source="CLIPF, arXiv 2412.16148",
    needs_budget=False,
    needs="a file of `clip-pgs data words`",
)
class FrequencyMasking:
    """Take frequent words out of captions (CLIPF); the others stay as they are, in order.

    A word of frequency f is dropped with probability `1 - sqrt(t / f)`, if that is positive;
    word2vec introduced the rule (https://arxiv.org/abs/1310.4546). The default `t = 1e-6` is that
    of CLIPF's released code, https://github.com/MingliangLiang3/CLIPF. At it the rule alone leaves
    hardly a word of a short caption, and the released code does something else: it keeps as many
    words as the token budget holds, those first that the rule keeps, then those that came
    nearest. `fill=True` does so.

    Deliberate differences from the released code: a word that was counted too seldom is always
    kept, where that code drops it before all others; probabilities are not rounded; the frequency
    is relative to all words, not to those counted often enough.

    It draws from the generator of `random`, one number for each word. At least one word is kept.

    Args:
        tokenizer: The model's.
        num_tokens: The budget, start and end token included; None for no budget.
        frequencies: File of word counts, from `clip-pgs data words`.
        threshold: The t of the rule, in (0, 1]; words up to this frequency are never dropped.
        fill: Keep as many words as the token budget holds, whatever the rule dropped.

    Raises:
        ValueError: If the file is not usable, the threshold out of range, or `fill` has no budget.
    """

    def __init__(
        self,
        tokenizer: Tokenize,
        num_tokens: int | None = None,
        *,
        frequencies: str | Path | None = None,
        threshold: float = 1e-6,
        fill: bool = False,
    ) -> None:
        self.tokenizer = _cut(tokenizer, num_tokens)
        if not isinstance(frequencies, (str, Path)):
            raise ValueError(
                "text masking 'frequency' needs the option frequencies=FILE, a file from "
                f"`clip-pgs data words`, got {frequencies!r}"
            )
        check_share(threshold, name="threshold")
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

    def __call__(self, captions: list[str]) -> Tensor:
        """Return the tokens of shortened captions, shape (B, T)."""
        return self.tokenizer([self.shorten(caption) for caption in captions])

    def shorten(self, caption: str) -> str:
        """Return the caption without the words that are dropped this time."""
        words = find_words(caption)
        margins = [
            random.random() - self.drop_probabilities.get(word[0].lower(), 0.0) for word in words
        ]
        num_kept = self.num_filled
        if num_kept is None:
            num_kept = max(1, sum(margin >= 0.0 for margin in margins))
        if num_kept >= len(words):
            return caption
        nearest = sorted(range(len(words)), key=margins.__getitem__, reverse=True)
        return keep_words(caption, words, sorted(nearest[:num_kept]))
