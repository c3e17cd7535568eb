"""The model, its weights, and whether its image tower can be masked as asked."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import open_clip

from clip_pgs.masking import MaskingStrategy, create_masking, masking_options
from clip_pgs.training.model_choice import MODEL_SCHEMAS


def check_model(args: argparse.Namespace) -> None:
    """Refuse a model, weights or augmentation that open_clip could not make."""
    config = read_model_config(args.model)
    text_is_open_clips = "hf_model_name" not in config.get("text_cfg", {})
    if args.lock_text and not args.lock_text_freeze_layer_norm and text_is_open_clips:
        raise ValueError(
            f"--lock-text needs --lock-text-freeze-layer-norm: the text tower of {args.model} "
            "locks its LayerNorm with the rest"
        )
    if args.pretrained and not args.model.startswith(MODEL_SCHEMAS):
        is_tag = bool(open_clip.get_pretrained_cfg(args.model, args.pretrained))
        if not is_tag and not Path(args.pretrained).is_file():
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(args.model)) or "none"
            raise ValueError(
                f"--pretrained {args.pretrained!r} is neither a file nor a tag of {args.model} "
                f"(tags: {tags})"
            )
    fields = [field.name for field in dataclasses.fields(open_clip.AugmentationCfg)]
    for key in args.aug_cfg:
        if key not in fields:
            raise ValueError(f"--aug-cfg has no {key!r}; it takes {', '.join(fields)}")


def check_masking(args: argparse.Namespace) -> None:
    """Refuse a strategy, or a tower that it cannot mask."""
    if "masking" not in args.given:
        for name in ("mask_ratio", "mask_ratio_min", "masking_option"):
            if name in args.given:
                raise ValueError(f"--{name.replace('_', '-')} needs --masking NAME")
    if _build_strategy(args).keeps_all:
        return

    vision_config = read_model_config(args.model)["vision_cfg"]
    tower = _unsupported_tower(vision_config)
    if tower:
        raise ValueError(
            f"--masking {args.masking} supports OpenCLIP's own VisionTransformer; "
            f"the image tower of {args.model} is {tower}"
        )
    patch_dropout = args.force_patch_dropout
    if patch_dropout is None:
        patch_dropout = vision_config.get("patch_dropout", 0.0)
    if patch_dropout > 0:
        raise ValueError(
            f"--masking {args.masking} cannot work beside OpenCLIP's patch dropout of "
            f"{patch_dropout}; set --force-patch-dropout 0"
        )
    height, width = _pair(image_size(args, vision_config))
    patch_height, patch_width = _pair(vision_config.get("patch_size", _default("patch_size")))
    if height % patch_height or width % patch_width:
        raise ValueError(
            f"--masking {args.masking} needs an image size that the patch size divides, got "
            f"{height} x {width} pixels in patches of {patch_height} x {patch_width}"
        )


def read_model_config(name: str) -> dict[str, Any]:
    """Return open_clip's config of a model.

    Raises:
        ValueError: If there is none, or it cannot be read.
    """
    try:
        config = open_clip.get_model_config(name)
    except json.JSONDecodeError as error:
        raise ValueError(f"the config of --model {name} is not JSON: {error}") from None
    except OSError as error:
        # Hugging Face's errors are OSErrors, of several lines.
        reason = str(error).splitlines()[0]
        raise ValueError(f"the config of --model {name} cannot be read: {reason}") from None
    if not config or "vision_cfg" not in config:
        raise ValueError(f"the config of --model {name} has no vision_cfg")
    return config


def image_size(args: argparse.Namespace, vision_config: dict[str, Any]) -> int | list[int]:
    """Return the size of the model's input in pixels: one number, or height and width."""
    if args.force_image_size is not None:
        return args.force_image_size
    return vision_config.get("image_size", _default("image_size"))


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


def _unsupported_tower(vision_config: dict[str, Any]) -> str:
    """Name an image tower that is not OpenCLIP's VisionTransformer; "" for one that is."""
    if vision_config.get("timm_model_name"):
        return f"timm's {vision_config['timm_model_name']}"
    if isinstance(vision_config.get("layers"), list | tuple):
        return "a ResNet (ModifiedResNet)"
    return ""


def _default(name: str) -> Any:
    return getattr(open_clip.CLIPVisionCfg(), name)


def _pair(size: int | list[int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    return (size[0], size[0]) if len(size) == 1 else (size[0], size[1])
