"""The masking of the training captions."""

from __future__ import annotations

from clip_pgs.data.text_masking import create_text_masking
from clip_pgs.training.checks.model import context_length, make_tokenizer
from clip_pgs.training.options import TrainOptions


def check_text_masking(args: TrainOptions) -> None:
    """Refuse a text masking that cannot be, by its own words."""
    if args.text_masking == "none":
        for name in ("text_tokens", "text_masking_option"):
            if name in args.given:
                raise ValueError(
                    f"--{name.replace('_', '-')} needs --text-masking NAME other than none"
                )
        return
    create_text_masking(
        args.text_masking,
        tokenizer=make_tokenizer(args),
        num_tokens=args.text_tokens,
        **args.text_masking_options,
    )


def text_warnings(args: TrainOptions) -> list[str]:
    """Return a sentence where part of the text tower is never trained."""
    if args.text_tokens is None or args.unmasked_epochs > 0:
        return []
    length = context_length(args)
    if args.text_tokens >= length:
        return []
    return [
        f"--text-tokens {args.text_tokens} leaves the text positions from {args.text_tokens} to "
        f"{length - 1} untrained; let --unmasked-epochs follow"
    ]
