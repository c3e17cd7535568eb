"""Our own flags of the trainer, beside OpenCLIP's: one parser, its help, its defaults."""

from __future__ import annotations

import argparse
from typing import Any

from clip_pgs.training.flags.flag_types import OwnParser, count
from clip_pgs.training.flags.masking_flags import add_image_flags, add_text_flags
from clip_pgs.training.flags.papers import UNMASKED_TUNING_PAPERS
from clip_pgs.training.flags.run_flags import RUN_DEFAULTS, add_run_flags

# The parser itself leaves what was not given at None, so that it is told from what was.
_DEFAULTS: dict[str, Any] = {
    "masking": "none",
    "mask_schedule": "constant",
    "mask_schedule_steps": 5,
    "text_masking": "none",
    "unmasked_epochs": 0,
    "unmasked_lr": 1e-5,
    "eval_datasets": "demo",
    "eval_every": 1,
    **RUN_DEFAULTS,
}


def given_names(own: argparse.Namespace) -> set[str]:
    """Return the names of our options that were set; call it before `fill_defaults`."""
    # 0.0 == False, hence the identities: a ratio of 0 is given.
    return {
        name
        for name, value in vars(own).items()
        if value is not None and value is not False and value != {}
    }


def fill_defaults(own: argparse.Namespace) -> None:
    """Give what was not set its default."""
    for name, value in _DEFAULTS.items():
        if getattr(own, name) is None:
            setattr(own, name, value)


def own_actions(parser: OwnParser) -> dict[str, argparse.Action]:
    """Return what each of our flags does, by its long name ("--mask-ratio")."""
    return {action.option_strings[-1]: action for action in parser._actions}


def own_parser() -> OwnParser:
    """Return the parser of our own flags; it passes over OpenCLIP's."""
    parser = OwnParser(
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
    add_image_flags(parser)
    add_text_flags(parser)
    _add_unmasked_flags(parser)
    _add_evaluation_flags(parser)
    add_run_flags(parser)
    _add_released_flags(parser)
    return parser


def _add_unmasked_flags(parser: OwnParser) -> None:
    group = parser.add_argument_group(
        "Unmasked tuning",
        "A last phase without any masking, in the same run folder: after --epochs masked epochs "
        "the run goes on as a second run from its weights would, with a fresh optimizer, a linear "
        f"warm-up and a cosine to 0 ({UNMASKED_TUNING_PAPERS}).",
    )
    group.add_argument(
        "--unmasked-epochs",
        type=int,
        metavar="N",
        help="epochs without masking after the masked ones (GLIP and CLIPF: 1; default: 0)",
    )
    group.add_argument(
        "--unmasked-lr",
        type=float,
        metavar="F",
        help="their highest learning rate (GLIP and CLIPF: 1e-5, the default)",
    )
    group.add_argument(
        "--unmasked-warmup",
        type=count,
        metavar="N",
        help="their warm-up in steps (default: a tenth of an epoch, as CLIPF's)",
    )
    group.add_argument(
        "--unmasked-batch-size",
        type=count,
        metavar="N",
        help="their --batch-size, where whole images need more memory (CLIPF: 160 instead of 896; "
        "default: --batch-size)",
    )
    group.add_argument(
        "--unmasked-accum-freq",
        type=count,
        metavar="N",
        help="their --accum-freq (default: --accum-freq)",
    )


def _add_evaluation_flags(parser: OwnParser) -> None:
    group = parser.add_argument_group(
        "Evaluation in training",
        "Suites of clip-test.sh after an epoch, on rank 0 while the others wait; results go to "
        "eval/epoch_N in the run's folder, and their curves beside the others.",
    )
    group.add_argument(
        "--eval-suite",
        metavar="NAME",
        help="zeroshot-classification, zeroshot-retrieval, linear-probe, robustness, "
        "compositionality or all (default: none)",
    )
    group.add_argument(
        "--eval-datasets",
        metavar="demo|paper|FILE",
        help="its data sets, as clip-test.sh --datasets takes them (default: demo)",
    )
    group.add_argument(
        "--eval-data-root",
        metavar="DIR",
        help="where they are, as clip-test.sh --data-root takes it",
    )
    group.add_argument(
        "--eval-every",
        type=int,
        metavar="N",
        help="every N epochs, and after the last (default: 1)",
    )


def _add_released_flags(parser: OwnParser) -> None:
    group = parser.add_argument_group(
        "The authors' released code of CLIP-PGS",
        "Its command line, --force-patch-dropout F with these, means --masking pgs-released. "
        "Without these, --force-patch-dropout is OpenCLIP's.",
    )
    group.add_argument(
        "--target-mask-ratio", type=float, metavar="F", help="its similarity threshold"
    )
    group.add_argument(
        "--min-mask-ratio", type=float, metavar="F", help="its share of dropped patches"
    )
    group.add_argument("--use-ed", action="store_true", help="its edges")
    group.add_argument("--use-otn", action="store_true", help="its optimal-transport step")
