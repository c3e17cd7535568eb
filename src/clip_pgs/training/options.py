"""The options of a training run: OpenCLIP's flags, ours beside them, and a YAML file below both."""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from open_clip_train.params import parse_args as parse_trainer_args

from clip_pgs.integrations.open_clip.compat import trainer_actions
from clip_pgs.masking import list_maskings
from clip_pgs.training.config import load_config, nearest_names, render_arguments
from clip_pgs.training.flags import IMPLEMENTED_FLAGS, REFUSED_FLAGS
from clip_pgs.training.model_choice import choose_model


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of a training run, and the config it names.

    Args:
        argv: Arguments without the program's name.

    Returns:
        OpenCLIP's namespace with these names added: `masking`, `mask_ratio`, `mask_ratio_min`,
        `masking_option` (a dict), `masking_options` (everything the strategy's constructor
        gets), `config`, `model_config`, `check_only`, and `given`, the names of the options
        that the user or the config set. With `model_config`, that model is registered in
        open_clip and `model` is its name.

    Raises:
        ValueError: If an option is unknown, abbreviated, refused or malformed, or if the model
            is not named or not known.
        SystemExit: For `--help`.
    """
    parser = _own_parser()
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(_help_text(parser))
        raise SystemExit(0)

    own, trainer_argv = parser.parse_known_args(argv)
    if own.config is not None:
        defaults = load_config(own.config, {**_own_actions(parser), **trainer_actions()})
        _drop_replaced_model(defaults, own)
        own, trainer_argv = parser.parse_known_args([*render_arguments(defaults), *argv])

    trainer_argv, trainer_flags = _settle_switches(trainer_argv)
    _refuse_unsupported(trainer_flags)
    model = choose_model(own.model, own.model_config)
    args = _parse_trainer_options([*trainer_argv, f"--model={model}"])

    del own.help
    # 0.0 == False, hence the identities: a ratio of 0 is given.
    own_given = {
        name
        for name, value in vars(own).items()
        if value is not None and value is not False and value != {}
    }
    given = own_given | {trainer_actions()[flag].dest for flag in trainer_flags}
    for name, value in vars(own).items():
        setattr(args, name, value)
    args.model = model
    args.masking = own.masking or "none"
    args.masking_options = {} if args.masking == "none" else _constructor_options(args)
    args.given = sorted(given - {"check_only", "config"})
    return args


class _Parser(argparse.ArgumentParser):
    """Raises one sentence instead of printing a usage text and leaving."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class _StorePairs(argparse.Action):
    """Collect KEY=VALUE pairs from every occurrence of a flag; a later one wins."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        pairs = dict(getattr(namespace, self.dest))
        for pair in values:
            key, separator, text = pair.partition("=")
            if not separator or not key:
                parser.error(f"{option_string} takes KEY=VALUE, got {pair!r}")
            pairs[key.replace("-", "_")] = _literal(text)
        setattr(namespace, self.dest, pairs)


def _literal(text: str) -> Any:
    """Read a Python literal, or true, false, none and null in any case; else keep the text."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _ratio(text: str) -> float | None:
    """Read a number; "none" takes back what a config set."""
    return None if text.lower() == "none" else float(text)


def _own_parser() -> _Parser:
    parser = _Parser(
        prog="python -m clip_pgs.training",
        usage="%(prog)s [--config FILE.yaml] [options]",
        description="Train a CLIP model whose image tower sees only some patches of each image.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="print this text and leave")
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="options to start from, named like the flags; flags on the command line win",
    )
    parser.add_argument(
        "--check-only",
        action="store_true",
        help="check every option, print one line and leave; nothing is created",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="a model open_clip knows, or local-dir:FOLDER, or hf-hub:OWNER/NAME",
    )
    parser.add_argument(
        "--model-config",
        metavar="FILE.json",
        help="a model of your own, as an open_clip model config; its name is the file's",
    )
    parser.add_argument(
        "--masking",
        metavar="NAME",
        choices=list_maskings(),
        help=f"how patches are chosen: {', '.join(list_maskings())} (default: none). "
        "random: FLIP, arXiv 2212.00794; pgs: CLIP-PGS, arXiv 2503.17080, CVPR 2025",
    )
    parser.add_argument(
        "--mask-ratio",
        type=_ratio,
        metavar="F",
        help="share of patches dropped, in [0, 1); the upper bound where the count adapts "
        "(the papers use 0.5 and 0.75 for random, 0.5 for pgs)",
    )
    parser.add_argument(
        "--mask-ratio-min",
        type=_ratio,
        metavar="F",
        help="lower bound of an adaptive count (CLIP-PGS-0.3: 0.3, with --mask-ratio 0.5)",
    )
    parser.add_argument(
        "--masking-option",
        nargs="+",
        action=_StorePairs,
        default={},
        metavar="KEY=VALUE",
        help="any other option of the strategy's constructor; can be repeated",
    )
    return parser


def _own_actions(parser: _Parser) -> dict[str, argparse.Action]:
    return {action.option_strings[-1]: action for action in parser._actions}


def _help_text(parser: _Parser) -> str:
    upstream = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS)
    group = upstream.add_argument_group(
        "OpenCLIP's options, with OpenCLIP's meaning",
        "Each switch also has a --no- form, which takes back what a config set.",
    )
    for flag, action in trainer_actions().items():
        if flag in IMPLEMENTED_FLAGS and flag != "--model":
            group._add_action(action)
    return f"{parser.format_help()}\n{upstream.format_help()}"


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
            known = {*_own_actions(_own_parser()), *actions, *negations}
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
        message = stderr.getvalue().strip().splitlines()[-1]
        raise ValueError(message.partition("error: ")[2] or message) from None
    except (ValueError, SyntaxError):
        # The only flag whose values OpenCLIP takes apart without a message of its own.
        raise ValueError("--aug-cfg takes KEY=VALUE pairs, such as 'scale=(0.5, 1.0)'") from None


def _constructor_options(args: argparse.Namespace) -> dict[str, Any]:
    """Merge the masking flags; what was not given is left to the constructor's default."""
    ratios = {
        name: getattr(args, name)
        for name in ("mask_ratio", "mask_ratio_min")
        if getattr(args, name) is not None
    }
    for name in ratios.keys() & args.masking_option.keys():
        raise ValueError(f"{name} is given as a flag and as --masking-option; keep one")
    return {**ratios, **args.masking_option}
