"""The masking of the image tower: its strategy, its schedule, and whether it fits the model."""

from __future__ import annotations

import argparse
from typing import Any

import open_clip
import torch
from torch import nn

from clip_pgs.integrations.open_clip import apply_masking
from clip_pgs.masking import MaskingStrategy, create_masking, masking_options
from clip_pgs.training.checks.model import read_model_config

_NEED_MASKING = ("mask_ratio", "mask_ratio_min", "masking_option", "mask_schedule")
# The image tower alone is of interest.
_TINY_TEXT = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}


def check_masking(args: argparse.Namespace) -> None:
    """Refuse a strategy, its schedule, or an image tower that it cannot mask."""
    if "masking" not in args.given:
        for name in _NEED_MASKING:
            if name in args.given:
                raise ValueError(f"--{name.replace('_', '-')} needs --masking NAME")
    strategy = _build_strategy(args)
    _check_schedule(args, strategy)
    if strategy.keeps_all:
        return

    vision_config = read_model_config(args.model)["vision_cfg"]
    patch_dropout = args.force_patch_dropout
    if patch_dropout is None:
        patch_dropout = vision_config.get("patch_dropout", 0.0)
    if patch_dropout > 0:
        raise ValueError(
            f"--masking {args.masking} cannot work beside OpenCLIP's patch dropout of "
            f"{patch_dropout}; set --force-patch-dropout 0"
        )
    model = _weightless_model(args)
    try:
        apply_masking(model, strategy)
    except ValueError as error:
        raise ValueError(f"--masking {args.masking} on {args.model}: {error}") from None


def _build_strategy(args: argparse.Namespace) -> MaskingStrategy:
    """Build the strategy once, after comparing its options' types with its defaults'.

    The command line has no types, and `0.0 <= "a"` is a TypeError that names nothing.
    """
    defaults = masking_options(args.masking)
    for name, value in args.masking_options.items():
        default = defaults.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        wrong = (
            (isinstance(default, bool) and not isinstance(value, bool) and "true or false")
            or (isinstance(default, str) and not isinstance(value, str) and "a name")
            or (type(default) is int and type(value) is not int and "a whole number")
            or (type(default) is float and not is_number and "a number")
            or (name in defaults and default is None and isinstance(value, str) and "a number")
        )
        if wrong:
            raise ValueError(f"masking {args.masking!r}: {name} takes {wrong}, got {value!r}")
    return create_masking(args.masking, **args.masking_options)


def _check_schedule(args: argparse.Namespace, strategy: MaskingStrategy) -> None:
    if args.mask_schedule == "constant":
        if args.mask_ratio_end is not None:
            raise ValueError("--mask-ratio-end needs --mask-schedule linear or cosine")
        return
    if args.mask_ratio_end is None:
        raise ValueError(f"--mask-schedule {args.mask_schedule} needs --mask-ratio-end F")
    try:
        create_masking(args.masking, **args.masking_options).set_mask_ratio(args.mask_ratio_end)
    except ValueError as error:
        raise ValueError(
            f"--mask-schedule {args.mask_schedule} on --masking {args.masking}: {error}"
        ) from None


def _weightless_model(args: argparse.Namespace) -> nn.Module:
    """Build the image tower that the options ask for, without memory for its weights."""
    config = read_model_config(args.model)
    vision_config: dict[str, Any] = dict(config["vision_cfg"])
    if vision_config.get("timm_model_name"):
        # Whatever weights there will be, their download tells nothing here.
        vision_config["timm_model_pretrained"] = False
    vision_config["patch_dropout"] = 0.0
    if args.force_image_size is not None:
        size = args.force_image_size
        vision_config["image_size"] = size[0] if len(size) == 1 else tuple(size)
    try:
        with torch.device("meta"):
            if "multimodal_cfg" in config:
                return open_clip.CoCa(config["embed_dim"], _TINY_TEXT, _TINY_TEXT, vision_config)
            return open_clip.CLIP(config["embed_dim"], vision_config, _TINY_TEXT)
    except (TypeError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"open_clip cannot build the image tower of {args.model}: {reason}"
        ) from None
