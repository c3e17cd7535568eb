"""Numbers in their ranges, choices that OpenCLIP leaves open, devices and loggers that exist."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable

import timm.optim
import torch

LR_SCHEDULERS = ("cosine", "const", "const-cooldown")
REPORT_TARGETS = ("tensorboard", "wandb", "all")
SIGLIP_LOSS_IMPLEMENTATIONS = ("bidir", "shift", "reduce", "gather")

_AT_LEAST_ONE = (
    "batch_size",
    "epochs",
    "accum_freq",
    "log_every_n_steps",
    "train_num_samples",
    "val_num_samples",
    "epochs_cooldown",
    "force_context_length",
    "unmasked_batch_size",
    "unmasked_accum_freq",
    "eval_every",
    "save_every_steps",
    "keep_checkpoints",
    "max_bad_steps",
)
_AT_LEAST_ZERO = (
    "warmup",
    "wd",
    "save_frequency",
    "val_frequency",
    "zeroshot_frequency",
    "lock_image_unlocked_groups",
    "lock_text_unlocked_layers",
    "lr_cooldown_end",
    "coca_caption_loss_weight",
    "coca_contrastive_loss_weight",
    "unmasked_epochs",
    "unmasked_warmup",
    "data_timeout",
    "hang_timeout",
)
_ABOVE_ZERO = (
    "save_every_minutes",
    "lr",
    "eps",
    "grad_clip_norm",
    "lr_cooldown_power",
    "unmasked_lr",
)
_BELOW_ONE = ("beta1", "beta2", "momentum", "force_patch_dropout", "mask_ratio_end")

# Beyond it floats pass over whole numbers.
_LARGEST = 2**53

_RANGES: tuple[tuple[tuple[str, ...], str, Callable[[float], bool]], ...] = (
    (_AT_LEAST_ONE, ">= 1", lambda value: value >= 1),
    (_AT_LEAST_ZERO, ">= 0", lambda value: value >= 0),
    (_ABOVE_ZERO, "> 0", lambda value: value > 0),
    (_BELOW_ONE, "in [0, 1)", lambda value: 0 <= value < 1),
    (("max_bad_share",), "in [0, 1]", lambda value: 0 <= value <= 1),
    (("mask_schedule_steps",), ">= 2", lambda value: value >= 2),
    (("workers",), "in [0, 1024]", lambda value: 0 <= value <= 1024),
    # numpy takes no other seed.
    (("seed",), "in [0, 2**32)", lambda value: 0 <= value < 2**32),
)


def check_ranges(args: argparse.Namespace) -> None:
    """Refuse numbers out of their range."""
    for names, rule, holds in _RANGES:
        for name in names:
            value = getattr(args, name)
            if value is None or (abs(value) <= _LARGEST and holds(value)):
                continue
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, int) and value > _LARGEST:
                raise ValueError(f"{flag} must be at most 2**53, got {value}")
            raise ValueError(f"{flag} must be {rule}, got {value}")
    for flag, values in (("--image-mean", args.image_mean), ("--image-std", args.image_std)):
        if values is not None and not (len(values) == 3 and all(map(math.isfinite, values))):
            raise ValueError(f"{flag} takes 3 finite numbers, got {values}")
    if args.image_std is not None and min(args.image_std) <= 0:
        raise ValueError(f"--image-std must be > 0, got {args.image_std}")
    size = args.force_image_size
    if size is not None and (len(size) > 2 or min(size) < 1):
        raise ValueError(f"--force-image-size takes 1 or 2 sizes >= 1, got {size}")


def check_recipe(args: argparse.Namespace) -> None:
    """Refuse optimisers, schedules and losses that do not exist or lack a setting."""
    opt = args.opt.lower()
    if opt.startswith("timm/"):
        if opt.removeprefix("timm/").removeprefix("lookahead_") not in timm.optim.list_optimizers():
            raise ValueError(f"timm has no optimizer of --opt {args.opt!r}")
        if args.lr is None:
            raise ValueError(f"--opt {args.opt} has no default learning rate; set --lr")
        if (args.beta1 is None) != (args.beta2 is None):
            raise ValueError(f"--opt {args.opt} needs both --beta1 and --beta2, or neither")
    elif opt != "adamw":
        raise ValueError(f"--opt must be adamw or timm/NAME, got {args.opt!r}")

    if args.lr_scheduler not in LR_SCHEDULERS:
        choices = ", ".join(LR_SCHEDULERS)
        raise ValueError(f"--lr-scheduler must be one of {choices}, got {args.lr_scheduler!r}")
    if args.lr_scheduler == "const-cooldown" and not args.skip_scheduler:
        if args.epochs_cooldown is None:
            raise ValueError("--lr-scheduler const-cooldown needs --epochs-cooldown")
        if args.epochs_cooldown > args.epochs:
            raise ValueError(
                f"--epochs-cooldown must be at most --epochs = {args.epochs}, "
                f"got {args.epochs_cooldown}"
            )
    if args.siglip and args.loss_dist_impl not in (None, *SIGLIP_LOSS_IMPLEMENTATIONS):
        choices = ", ".join(SIGLIP_LOSS_IMPLEMENTATIONS)
        raise ValueError(f"--loss-dist-impl must be one of {choices}, got {args.loss_dist_impl!r}")


def check_device(args: argparse.Namespace) -> None:
    """Refuse a device, or a way to reach other processes, that is not there.

    OpenCLIP's default, "cuda", falls back to the CPU; one that was asked for does not.
    """
    backends = [name for name in torch.distributed.Backend.backend_list if name != "undefined"]
    if args.dist_backend is not None and args.dist_backend not in backends:
        raise ValueError(
            f"--dist-backend must be one of {', '.join(backends)}, got {args.dist_backend!r}"
        )
    if args.dist_url is not None and "://" not in args.dist_url:
        raise ValueError(f"--dist-url must be like env:// or tcp://HOST:PORT, got {args.dist_url}")
    try:
        device = torch.device(args.device)
    except RuntimeError:
        raise ValueError(f"--device {args.device!r} is no device torch knows") from None
    if "device" not in args.given:
        return
    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    count = counts.get(device.type)
    if count is None:
        # Not "meta", which computes nothing, nor one that this torch was built without.
        count = int(device.type != "meta" and _has_memory(device))
    if (device.index or 0) >= count:
        raise ValueError(f"--device {args.device} is not available on this machine")


def _has_memory(device: torch.device) -> bool:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError):
        return False
    return True


def check_reports(args: argparse.Namespace) -> None:
    """Refuse loggers that are unknown or not installed."""
    targets = [target.strip() for target in args.report_to.split(",") if target.strip()]
    for target in targets:
        if target not in REPORT_TARGETS:
            choices = ", ".join(REPORT_TARGETS)
            raise ValueError(f"--report-to takes {choices} (joined by commas), got {target!r}")
        for package in ("tensorboard", "wandb") if target == "all" else (target,):
            if importlib.util.find_spec(package) is None:
                raise ValueError(
                    f"--report-to {args.report_to} needs the package {package}, which is not "
                    "installed"
                )
