"""What a checkpoint says about its run, in plain types: enough to export and describe it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

import clip_pgs
from clip_pgs.training.environment import device_name
from clip_pgs.training.export import open_clip_config, tokenizer_source
from clip_pgs.training.options import TrainOptions
from clip_pgs.training.telemetry.telemetry import Cost

_DATA = ("train_data", "dataset_type", "dataset_resampled", "pretrained")
_RECIPE = (
    "epochs",
    "batch_size",
    "accum_freq",
    "lr",
    "lr_scheduler",
    "warmup",
    "wd",
    "opt",
    "precision",
    "siglip",
    "seed",
)
_MASK_SCHEDULE = ("mask_schedule", "mask_ratio_end", "mask_schedule_steps")
_TEXT = ("text_masking", "text_tokens", "text_masking_options")
_UNMASKED = (
    "unmasked_epochs",
    "unmasked_lr",
    "unmasked_warmup",
    "unmasked_batch_size",
    "unmasked_accum_freq",
)


def describe_run(
    args: TrainOptions, model: nn.Module, device: torch.device, *, num_samples: int | None
) -> dict[str, Any]:
    """Return what stays the same throughout a run.

    Args:
        args: The run's options, with `world_size`.
        model: The plain model.
        device: This process's device.
        num_samples: Samples of an epoch.
    """
    data = {name: getattr(args, name) for name in _DATA}
    return {
        "version": clip_pgs.__version__,
        "model": args.model,
        "open_clip_config": open_clip_config(args, model),
        "tokenizer": tokenizer_source(args),
        "masking": args.masking,
        "masking_options": _plain(args.masking_options),
        "text_masking": args.text_masking,
        "data": _plain({**data, "samples per epoch": num_samples}),
        "recipe": _plain({name: getattr(args, name) for name in _recipe_names(args)}),
        "device": device_name(device),
        "world_size": args.world_size,
    }


def _recipe_names(args: TrainOptions) -> list[str]:
    """Return the options that say how a run is trained, less those of parts it does not have."""
    return [
        *(_MASK_SCHEDULE if args.mask_schedule != "constant" else ()),
        *(_TEXT if args.text_masking != "none" else ()),
        *_RECIPE,
        *(_UNMASKED if args.unmasked_epochs > 0 else ()),
    ]


def with_results(
    record: Mapping[str, Any], *, cost: Cost, metrics: Mapping[str, float]
) -> dict[str, Any]:
    """Return a run's record with what it has spent and measured so far."""
    return {**record, "cost": asdict(cost), "metrics": dict(metrics)}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values, default=str))
