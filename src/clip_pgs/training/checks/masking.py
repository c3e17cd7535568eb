"""The masking of the image tower: its strategy, its schedule, and whether it fits the model."""

from __future__ import annotations

from torch import nn

from clip_pgs.integrations.open_clip import apply_masking
from clip_pgs.masking import MaskingStrategy, create_masking
from clip_pgs.training.checks.model import read_model_config
from clip_pgs.training.options import TrainOptions

_NEED_MASKING = ("mask_ratio", "mask_ratio_min", "masking_option", "mask_schedule")


def check_masking(args: TrainOptions, model: nn.Module) -> None:
    """Refuse a strategy, its schedule, or an image tower that it cannot mask.

    Args:
        args: Options.
        model: The model; it is masked.
    """
    if "masking" not in args.given:
        for name in _NEED_MASKING:
            if name in args.given:
                raise ValueError(f"--{name.replace('_', '-')} needs --masking NAME")
    strategy = create_masking(args.masking, **args.masking_options)
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
    try:
        apply_masking(model, strategy)
    except ValueError as error:
        raise ValueError(f"--masking {args.masking} on {args.model}: {error}") from None


def _check_schedule(args: TrainOptions, strategy: MaskingStrategy) -> None:
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
