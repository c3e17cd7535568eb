"""The options of a training run: OpenCLIP's flags, ours beside them, and a YAML file below both."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from open_clip_train.params import parse_args as parse_trainer_args

from clip_pgs.integrations.open_clip.compat import trainer_actions
from clip_pgs.training.flags.config import load_config, nearest_names, render_arguments
from clip_pgs.training.flags.flag_types import OwnParser
from clip_pgs.training.flags.own_flags import (
    fill_defaults,
    given_names,
    own_actions,
    own_parser,
)
from clip_pgs.training.flags.released import RELEASED_MASKING, is_released, released_options
from clip_pgs.training.flags.upstream_flags import IMPLEMENTED_FLAGS, REFUSED_FLAGS
from clip_pgs.training.model_choice import choose_model


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of a training run, and the config it names.

    Args:
        argv: Arguments without the program's name.

    Returns:
        OpenCLIP's namespace with these names added: `masking`, `mask_ratio`, `mask_ratio_min`,
        `masking_option` (a dict), `masking_options` (everything the strategy's constructor
        gets), `mask_schedule`, `mask_ratio_end`, `mask_schedule_steps`, `text_masking`,
        `text_tokens`, `text_masking_option` and its copy `text_masking_options`,
        `unmasked_epochs`, `unmasked_lr`, `unmasked_warmup`, `unmasked_batch_size`,
        `unmasked_accum_freq`, `eval_suite`, `eval_datasets`, `eval_data_root`, `eval_every`,
        `save_every_steps`, `save_every_minutes`, `keep_checkpoints`, `accept_changes`,
        `max_bad_steps`, `max_bad_share`, `data_timeout`, `hang_timeout`, `resume_instead` (what
        a restarted run falls back on; None here), the released code's flags, `config`,
        `model_config`, `check_only`, and `given`, the names of the options that the user or the
        config set. With `model_config`, that model is registered in open_clip and `model` is its
        name.

    Raises:
        ValueError: If an option is unknown, abbreviated, refused or malformed, or if the model
            is not named or not known.
        SystemExit: For `--help`.
    """
    parser = own_parser()
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(_help_text(parser))
        raise SystemExit(0)

    _refuse_bare_dashes(argv)
    own, trainer_argv = parser.parse_known_args(argv)
    if own.config is not None:
        actions = {**own_actions(parser), **trainer_actions()}
        defaults = load_config(own.config, actions)
        _drop_replaced_model(defaults, own)
        configured = render_arguments(defaults, actions)
        _refuse_bare_dashes(configured)
        own, trainer_argv = parser.parse_known_args([*configured, *argv])

    trainer_argv, trainer_flags = _settle_switches(trainer_argv)
    _refuse_unsupported(trainer_flags)
    model = choose_model(own.model, own.model_config)
    args = _parse_trainer_options([*trainer_argv, f"--model={model}"])

    del own.help
    given = given_names(own) | {trainer_actions()[flag].dest for flag in trainer_flags}
    released: dict[str, Any] = {}
    if is_released(own):
        released = released_options(
            own, patch_dropout=args.force_patch_dropout, num_epochs=args.epochs
        )
        own.masking, args.force_patch_dropout = RELEASED_MASKING, None
        given = (given | {"masking"}) - {"force_patch_dropout"}
    if own.text_masking is None and own.text_tokens is not None:
        own.text_masking = "truncate"
    fill_defaults(own)
    for name, value in vars(own).items():
        setattr(args, name, value)
    args.model = model
    args.resume_instead = None
    args.masking_options = {} if args.masking == "none" else _constructor_options(args, released)
    args.text_masking_options = dict(args.text_masking_option)
    args.given = sorted(given - {"check_only", "config"})
    return args


def _help_text(parser: OwnParser) -> str:
    upstream = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS)
    group = upstream.add_argument_group(
        "OpenCLIP's options, with OpenCLIP's meaning",
        "Each switch also has a --no- form, which takes back what a config set.",
    )
    for flag, action in trainer_actions().items():
        if flag in IMPLEMENTED_FLAGS and flag != "--model":
            group._add_action(action)
    return f"{parser.format_help()}\n{upstream.format_help()}"


def _refuse_bare_dashes(argv: Sequence[str]) -> None:
    """Refuse what argparse would take for the end of the options, and then lose."""
    for token in argv:
        flag, _, value = token.partition("=")
        if flag == "--" or value == "--":
            raise ValueError(f"'--' is no value, got {token!r}")


def _drop_replaced_model(defaults: dict[str, Any], own: argparse.Namespace) -> None:
    """Let the model named on the command line replace the config's, whichever flag named it."""
    if own.model_config is not None and own.model is None:
        defaults.pop("--model", None)
    configured = defaults.get("--model-config")
    if own.model is not None and configured is not None and Path(configured).stem != own.model:
        del defaults["--model-config"]


def _settle_switches(argv: Sequence[str]) -> tuple[list[str], set[str]]:
    """Check OpenCLIP's flags and resolve `--no-` forms; the last word on a switch holds.

    Returns:
        Arguments that OpenCLIP's parser understands, and the flags among them.

    Raises:
        ValueError: If a flag is unknown or abbreviated.
    """
    actions = trainer_actions()
    negations = {f"--no-{flag[2:]}": flag for flag, action in actions.items() if action.nargs == 0}
    settled: list[str] = []
    flags: set[str] = set()
    for token in argv:
        flag = token.partition("=")[0]
        if token in negations:
            settled = [other for other in settled if other != negations[token]]
            flags.discard(negations[token])
            continue
        if flag in actions:
            flags.add(flag)
        elif flag.startswith("--") and flag != "--" and " " not in flag:
            known = {*own_actions(own_parser()), *actions, *negations}
            raise ValueError(
                f"unknown option {flag} (no abbreviations); {nearest_names(flag, known)}"
            )
        settled.append(token)
    return settled, flags


def _refuse_unsupported(flags: set[str]) -> None:
    for flag in sorted(flags - IMPLEMENTED_FLAGS):
        reason = REFUSED_FLAGS.get(flag, "this version of OpenCLIP added it after clip-pgs")
        raise ValueError(f"{flag} is not supported: {reason}")


def _parse_trainer_options(argv: Sequence[str]) -> argparse.Namespace:
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return parse_trainer_args(argv)
    except SystemExit:
        message = stderr.getvalue().strip()
        raise ValueError(message.partition(": error: ")[2] or message) from None
    except (ValueError, SyntaxError):
        # The only flag whose values OpenCLIP takes apart without a message of its own.
        raise ValueError("--aug-cfg takes KEY=VALUE pairs, such as 'scale=(0.5, 1.0)'") from None


def _constructor_options(args: argparse.Namespace, released: dict[str, Any]) -> dict[str, Any]:
    """Merge the masking flags; what was not given is left to the constructor's default."""
    ratios = {
        name: getattr(args, name)
        for name in ("mask_ratio", "mask_ratio_min")
        if getattr(args, name) is not None
    }
    by_flag = {**ratios, **released}
    for name in by_flag.keys() & args.masking_option.keys():
        raise ValueError(f"{name} is given as a flag and as --masking-option; keep one")
    return {**by_flag, **args.masking_option}
