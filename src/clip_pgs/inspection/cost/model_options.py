"""The options that say which model a benchmark runs where."""

from __future__ import annotations

import argparse
from typing import Any

import torch

PRECISIONS = ("fp32", "amp_bf16")

# By device: what runs in minutes there.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"model": "ViT-S-16", "batch_size": 16, "precision": "fp32", "steps": 5},
    "cuda": {"model": "ViT-B-16", "batch_size": 256, "precision": "amp_bf16", "steps": 20},
}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model runs where."""
    add = parser.add_argument
    add(
        "--model",
        metavar="NAME",
        help="a model that open_clip knows, or a model config (JSON) "
        "(default: ViT-S-16 on a CPU, ViT-B-16 on a GPU)",
    )
    add("--image-size", type=int, metavar="PIXELS", help="default: the model's")
    add(
        "--device",
        type=torch.device,
        default=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        help="default: cuda where there is one, else cpu",
    )
    add("--precision", choices=PRECISIONS, help="default: fp32 on a CPU, amp_bf16 on a GPU")


def fill_in_defaults(args: argparse.Namespace) -> None:
    """Give options that were left out the device's values.

    Raises:
        ValueError: If a number is below 1.
    """
    defaults = _DEFAULTS["cuda" if args.device.type == "cuda" else "cpu"]
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("batch_size", "steps"):
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be at least 1, got {getattr(args, name)}")


def describe_device(device: torch.device) -> str:
    """Return what a device is, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
