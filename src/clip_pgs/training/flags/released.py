"""The command line of CLIP-PGS's released code, put in our terms.

There `--force-patch-dropout F` is the share of patches drawn as candidates, `--target-mask-ratio`
a threshold on their similarity to the others, `--min-mask-ratio` the share that is dropped, and
the switches turn its two steps on. The strategy that computes what it computes is `pgs-released`.
"""

from __future__ import annotations

import argparse
from typing import Any

RELEASED_MASKING = "pgs-released"

_FLAGS = ("target_mask_ratio", "min_mask_ratio", "use_ed", "use_otn")


def is_released(own: argparse.Namespace) -> bool:
    """Return whether a flag is set that the released code alone has."""
    return bool(_given(own))


def released_options(
    own: argparse.Namespace, *, patch_dropout: float | None, num_epochs: int
) -> dict[str, Any]:
    """Return the options of `pgs-released` that a command line of the released code means.

    Args:
        own: Our flags, at least one of `is_released` among them.
        patch_dropout: The value of `--force-patch-dropout`.
        num_epochs: The value of `--epochs`.

    Raises:
        ValueError: If the flags are mixed with those of another strategy, or one is missing
            without which the released code masks nothing.
    """
    flags = ", ".join(_given(own))
    if own.masking not in (None, RELEASED_MASKING):
        raise ValueError(
            f"{flags} are flags of CLIP-PGS's released code, which is --masking "
            f"{RELEASED_MASKING}; got --masking {own.masking}"
        )
    for name in ("mask_ratio", "mask_ratio_min"):
        if getattr(own, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} goes with --masking NAME; beside {flags} the released "
                "code takes --min-mask-ratio"
            )
    if patch_dropout is None or own.target_mask_ratio is None or own.min_mask_ratio is None:
        raise ValueError(
            f"beside {flags} the released code needs all of --force-patch-dropout, "
            "--target-mask-ratio and --min-mask-ratio (its scripts: 0.05, 0.5, and 0.3 or 0.5)"
        )
    return {
        "mask_ratio": own.target_mask_ratio,
        "mask_ratio_min": own.min_mask_ratio,
        "candidate_ratio": patch_dropout,
        "edges": own.use_ed,
        "transport": own.use_otn,
        "num_epochs": num_epochs,
    }


def released_notes(args: argparse.Namespace) -> list[str]:
    """Return the sentence that says what a released command line was taken for."""
    if not is_released(args):
        return []
    options = ", ".join(f"{name}={value}" for name, value in args.masking_options.items())
    return [
        f"--force-patch-dropout beside {', '.join(_given(args))} is taken as the command line of "
        f"CLIP-PGS's released code, which is --masking {RELEASED_MASKING} here, with {options}"
    ]


def _given(own: argparse.Namespace) -> list[str]:
    return [
        f"--{name.replace('_', '-')}" for name in _FLAGS if getattr(own, name) not in (None, False)
    ]
