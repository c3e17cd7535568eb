"""The flags that mask: patches of the image, words of the caption."""

from __future__ import annotations

from clip_pgs.data.captions.text_masking import TEXT_MASKINGS
from clip_pgs.masking import describe_masking, list_maskings, masking_options
from clip_pgs.masking.schedule import SCHEDULES
from clip_pgs.training.flags.flag_types import OwnParser, StorePairs, count, ratio
from clip_pgs.training.flags.papers import describe


def add_image_flags(parser: OwnParser) -> None:
    """Add the flags that choose patches."""
    group = parser.add_argument_group("Masking of the image")
    papers = {name: describe_masking(name).paper for name in list_maskings()}
    group.add_argument(
        "--masking",
        metavar="NAME",
        choices=list_maskings(),
        help=f"how patches are chosen. {describe(list_maskings(), papers)} (default: none)",
    )
    group.add_argument(
        "--mask-ratio",
        type=ratio,
        metavar="F",
        help="share of patches dropped, in [0, 1); the upper bound where the count adapts "
        "(the papers use 0.5 and 0.75 for random, 0.5 for pgs)",
    )
    group.add_argument(
        "--mask-ratio-min",
        type=ratio,
        metavar="F",
        help="lower bound of a count that adapts to the image, for pgs, pgs-released and cluster "
        "(CLIP-PGS-0.3: 0.3, with --mask-ratio 0.5)",
    )
    group.add_argument(
        "--masking-option",
        nargs="+",
        action=StorePairs,
        default={},
        metavar="KEY=VALUE",
        help=f"any other option of the strategy; can be repeated. {_strategy_options()}",
    )
    group.add_argument(
        "--mask-schedule",
        metavar="NAME",
        choices=SCHEDULES,
        help="how the mask ratio goes from --mask-ratio to --mask-ratio-end over the masked "
        f"epochs: {', '.join(SCHEDULES)} (default: constant)",
    )
    group.add_argument(
        "--mask-ratio-end",
        type=ratio,
        metavar="F",
        help="the mask ratio that a schedule ends at, in [0, 1)",
    )
    group.add_argument(
        "--mask-schedule-steps",
        type=int,
        metavar="N",
        help="different ratios a schedule takes; each is one compiled graph with --torchcompile "
        "(default: 5)",
    )
    # Two flags, since argparse's own pair goes by the name of its negation here (`own_actions`).
    group.add_argument(
        "--pack-tokens",
        action="store_true",
        default=None,
        help="where images keep different numbers of patches, run all their patches as one "
        "sequence instead of padding images to the longest: on CUDA in half precision, at the "
        "price of one synchronisation per step; on a CPU without --torchcompile (default: on a "
        "CPU, unless the model is tiny)",
    )
    group.add_argument(
        "--no-pack-tokens",
        dest="pack_tokens",
        action="store_false",
        default=None,
        help="pad them to the longest",
    )


def _strategy_options() -> str:
    """Return each strategy's own options with their defaults, for a help text."""
    texts = []
    for name in list_maskings():
        options = masking_options(name).items()
        own = [f"{key}={value}" for key, value in options if not key.startswith("mask_ratio")]
        if own:
            texts.append(f"{name}: {', '.join(own)}")
    return "; ".join(texts)


def add_text_flags(parser: OwnParser) -> None:
    """Add the flags that choose words."""
    group = parser.add_argument_group("Masking of the text")
    group.add_argument(
        "--text-masking",
        metavar="NAME",
        choices=list(TEXT_MASKINGS),
        help=f"what stays of a training caption. {describe(TEXT_MASKINGS, TEXT_MASKINGS)} "
        "(default: none; truncate with --text-tokens)",
    )
    group.add_argument(
        "--text-tokens",
        type=count,
        metavar="N",
        help="tokens of a training caption, start and end included; the model keeps its context "
        "length (CLIPF: 8)",
    )
    group.add_argument(
        "--text-masking-option",
        nargs="+",
        action=StorePairs,
        default={},
        metavar="KEY=VALUE",
        help="options of the text masking (frequency: frequencies=FILE threshold=T fill=BOOL); "
        "can be repeated",
    )
