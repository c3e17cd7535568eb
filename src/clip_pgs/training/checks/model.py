"""The model, its weights and its augmentation."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import open_clip

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


def context_length(args: argparse.Namespace) -> int:
    """Return how many tokens the text tower takes."""
    if args.force_context_length is not None:
        return args.force_context_length
    default = open_clip.CLIPTextCfg().context_length
    return read_model_config(args.model)["text_cfg"].get("context_length", default)
