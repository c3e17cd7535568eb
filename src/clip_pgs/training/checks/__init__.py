"""Everything about a run's options that can be found out before anything is created."""

from __future__ import annotations

from clip_pgs.integrations.open_clip.compat import check_versions
from clip_pgs.training.checks.data import check_data
from clip_pgs.training.checks.effects import options_without_effect
from clip_pgs.training.checks.folder import check_folder
from clip_pgs.training.checks.masking import check_masking
from clip_pgs.training.checks.memory import check_shared_memory
from clip_pgs.training.checks.model import check_model, check_resumed
from clip_pgs.training.checks.text import check_text_masking, text_warnings
from clip_pgs.training.checks.values import check_device, check_ranges, check_recipe, check_reports
from clip_pgs.training.options import RELEASED_MASKING, TrainOptions, released_flags

__all__ = ["check_options", "option_warnings"]


def check_options(args: TrainOptions) -> None:
    """Refuse options that could not make a run.

    Args:
        args: From `parse_options`.

    Raises:
        ValueError: With one sentence, for the first thing that is wrong.
    """
    try:
        _check_all(args)
    except OSError as error:
        # A path that cannot be looked up: too long, not permitted, a loop of links.
        raise ValueError(f"cannot look up {error.filename!r}: {error.strerror or error}") from None


def _check_all(args: TrainOptions) -> None:
    check_versions()
    check_ranges(args)
    check_recipe(args)
    model, optimizer = check_model(args)
    check_masking(args, model)
    check_text_masking(args)
    check_data(args)
    check_shared_memory(args)
    check_device(args)
    check_reports(args)
    check_folder(args)
    check_resumed(args, model, optimizer)


def option_warnings(args: TrainOptions) -> list[str]:
    """Return one sentence for each option that was set and does nothing, or not what it seems.

    Args:
        args: Options that passed `check_options`.
    """
    return [*_released_notes(args), *options_without_effect(args), *text_warnings(args)]


def _released_notes(args: TrainOptions) -> list[str]:
    """Return the sentence that says what a command line of the released code was taken for."""
    flags = released_flags(args)
    if not flags:
        return []
    options = ", ".join(f"{name}={value}" for name, value in args.masking_options.items())
    return [
        f"--force-patch-dropout beside {', '.join(flags)} is taken as the command line of "
        f"CLIP-PGS's released code, which is --masking {RELEASED_MASKING} here, with {options}"
    ]
