"""The options that `masks` and `kept` share: how a model sees images."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from clip_pgs.inspection.model_input import ModelInput, load_model, read_model_input
from clip_pgs.inspection.view import View
from clip_pgs.masking import MaskingStrategy, list_maskings

MASKING_HELP = (
    f"of {', '.join(list_maskings())}; options follow a colon, as in "
    "pgs:edges=false,temperature=0.2"
)


def add_view_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a command."""
    add = parser.add_argument
    add(
        "--model",
        metavar="RUN_OR_CONFIG",
        help="take image size, patch size and normalisation from a run folder, a model config "
        "(JSON) or a model that open_clip knows",
    )
    add("--image-size", type=int, metavar="PIXELS", help="default: the model's, or 224")
    add("--patch-size", type=int, metavar="PIXELS", help="default: the model's, or 16")
    add(
        "--progress",
        type=float,
        default=0.0,
        metavar="T",
        help="see images as after this share of training, in [0, 1]; above 0, strategies that "
        "compare patches compare the embeddings of --model RUN as well (default: 0)",
    )


def read_view(args: argparse.Namespace, strategies: Iterable[MaskingStrategy]) -> View:
    """Return how these strategies see images; a model is loaded only if one of them needs it.

    Raises:
        ValueError: If an option is wrong, or the model has no weights where they are needed.
    """
    own_input = ModelInput() if args.model is None else read_model_input(args.model)
    sizes = {"image_size": args.image_size, "patch_size": args.patch_size}
    given: dict[str, Any] = {name: (side, side) for name, side in sizes.items() if side is not None}
    view = View(replace(own_input, **given), progress=args.progress)
    if args.model is not None and any(map(view.needs_model, strategies)):
        if view.model_input != own_input:
            raise ValueError("the embeddings of --model go with its own image and patch size")
        view.model = load_model(args.model)
    return view
