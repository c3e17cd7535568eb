"""Shorter texts for training, by name (`--text-masking`, `--text-tokens`).

Each is a tokenizer of its own: captions in, token numbers out. Those that draw use the generators
of the process, which `SampleDecoder` seeds for each sample. OpenCLIP's reduction masks shorten
only captions that are longer than the budget.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from clip_pgs.data.captions.frequency_masking import FrequencyMasking
from clip_pgs.data.samples import Tokenize

logger = logging.getLogger(__name__)

TEXT_MASKINGS = {
    "none": "the whole caption, up to the context length (CLIP, arXiv 2103.00020)",
    "truncate": "its first tokens (CLIPA, arXiv 2305.07017)",
    "block": "a run of tokens from a random place (CLIPA, arXiv 2305.07017)",
    "random": "random tokens in order (CLIPA, arXiv 2305.07017)",
    "shuffle": "random tokens in random order (OpenCLIP)",
    "syntax": "nouns, then adjectives, then verbs, as nltk tags them (CLIPA, arXiv 2305.07017)",
    "frequency": "frequent words dropped at random (CLIPF, arXiv 2412.16148)",
}

# Our names and OpenCLIP's.
_REDUCTIONS = {"block": "simple", "random": "random", "shuffle": "shuffle", "syntax": "syntax"}


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
    _check_name_and_options(name, options)
    _check_budget(name, num_tokens, context_length=getattr(tokenizer, "context_length", None))
    if name in _REDUCTIONS and num_tokens is not None:
        return _build_reduction(name, tokenizer, num_tokens)
    cut = tokenizer if num_tokens is None else _Truncation(tokenizer, num_tokens)
    if name == "frequency":
        return _FrequencyTokenizer(FrequencyMasking(num_tokens=num_tokens, **options), cut)
    return cut


@dataclass(frozen=True)
class _Truncation:
    tokenizer: Any
    num_tokens: int

    def __call__(self, captions: list[str]) -> Tensor:
        return self.tokenizer(captions, context_length=self.num_tokens)


@dataclass(frozen=True)
class _Reduction:
    reduce: Callable[..., Tensor]
    tokenizer: Any
    num_tokens: int

    def __call__(self, captions: list[str]) -> Tensor:
        return self.reduce(
            captions,
            context_length=self.num_tokens,
            sot_token_id=self.tokenizer.sot_token_id,
            eot_token_id=self.tokenizer.eot_token_id,
            encode_fn=self.tokenizer.encode,
        )


@dataclass(frozen=True)
class _FrequencyTokenizer:
    shorten: FrequencyMasking
    tokenizer: Tokenize

    def __call__(self, captions: list[str]) -> Tensor:
        return self.tokenizer([self.shorten(caption) for caption in captions])


def _check_name_and_options(name: str, options: dict[str, Any]) -> None:
    if name not in TEXT_MASKINGS:
        raise ValueError(f"unknown text masking {name!r}; choose from {', '.join(TEXT_MASKINGS)}")
    known = []
    if name == "frequency":
        known = list(inspect.signature(FrequencyMasking).parameters)
        known.remove("num_tokens")
    for option in options:
        if option not in known:
            choices = ", ".join(known) or "none at all"
            raise ValueError(f"text masking {name!r} has no option {option!r}; it takes {choices}")


def _check_budget(name: str, num_tokens: int | None, *, context_length: int | None) -> None:
    if num_tokens is None:
        if name in _REDUCTIONS:
            raise ValueError(f"--text-masking {name} needs a budget; give it with --text-tokens")
        if name == "truncate":
            logger.warning("--text-masking truncate has no effect without --text-tokens")
        return
    if num_tokens < 3:
        raise ValueError(
            "--text-tokens must be >= 3, for a start token, a word and an end token, "
            f"got {num_tokens}"
        )
    if context_length is not None and num_tokens > context_length:
        raise ValueError(
            f"--text-tokens must be at most the model's context length, {context_length}, "
            f"got {num_tokens}"
        )


def _build_reduction(name: str, tokenizer: Any, num_tokens: int) -> Tokenize:
    if not all(hasattr(tokenizer, part) for part in ("encode", "sot_token_id", "eot_token_id")):
        raise ValueError(
            f"--text-masking {name} works with OpenCLIP's own tokenizer alone, and this model has "
            f"{type(tokenizer).__name__}; use truncate or frequency"
        )
    if name == "syntax":
        _check_tagger()
    # Streams that do without open_clip are made without it.
    from clip_pgs.integrations.open_clip.compat import text_reduction

    return _Reduction(text_reduction(_REDUCTIONS[name]), tokenizer, num_tokens)


def _check_tagger() -> None:
    try:
        import nltk

        nltk.pos_tag(nltk.tokenize.word_tokenize("a dog"))
    except ImportError as error:
        raise ValueError(
            "--text-masking syntax needs nltk, which is not installed; `pip install nltk`, then "
            "`python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng`"
        ) from error
    except LookupError as error:
        raise ValueError(
            "--text-masking syntax needs two data sets of nltk, which are not installed; "
            "`python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng`"
        ) from error
