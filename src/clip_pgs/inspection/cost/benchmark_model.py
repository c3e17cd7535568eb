"""The model that a benchmark runs, without weights of anyone's training, and data for it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip_train.precision import get_autocast
from timm.layers import to_2tuple
from torch import Tensor, nn

from clip_pgs.inspection.cost.random_data import draw_captions, draw_images


def build_benchmark_model(args: argparse.Namespace) -> CLIP | CustomTextCLIP:
    """Build the model in float32 with random weights; OpenCLIP's trainer makes it so too.

    Raises:
        ValueError: If there is no such model, or it has no plain pair of towers.
    """
    name = args.model
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise ValueError(f"there is no model config {name}")
        open_clip.add_model_config(name)
        name = Path(name).stem
    if name not in open_clip.list_models():
        raise ValueError(f"{args.model!r} is neither a model config nor a model open_clip knows")
    torch.manual_seed(args.seed)
    model: nn.Module = open_clip.create_model(
        name, device=args.device, force_image_size=args.image_size
    )
    if type(model) not in (CLIP, CustomTextCLIP):
        raise ValueError(f"the benchmark runs pairs of towers, and {name} is a {type(model)}")
    return model


def autocast_of(args: argparse.Namespace) -> Any:
    """Return the context of a forward pass, as OpenCLIP's trainer chooses it."""
    return get_autocast(args.precision, device_type=args.device.type)


def draw_batch(
    model: CLIP | CustomTextCLIP, captions: str, *, batch_size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Draw images (B, 3, H, W) and captions (B, T) that a model takes, on the CPU.

    Args:
        model: Its image size, context length and vocabulary count.
        captions: Whose lengths they have; see `draw_captions`.
        batch_size: Pairs, B.
        seed: Same seed, same batch.
    """
    images = draw_images(to_2tuple(model.visual.image_size), batch_size=batch_size, seed=seed)
    texts = draw_captions(
        captions,
        batch_size=batch_size,
        context_length=model.context_length,
        vocab_size=model.vocab_size,
        seed=seed,
    )
    return images, texts
