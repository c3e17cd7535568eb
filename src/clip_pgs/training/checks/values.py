"""Numbers in their ranges, choices that OpenCLIP leaves open, devices and loggers that exist."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import fields

import timm.optim
import torch

from clip_pgs.training.options import TrainOptions, flag_of

LR_SCHEDULERS = ("cosine", "const", "const-cooldown")
REPORT_TARGETS = ("tensorboard", "wandb", "all")
SIGLIP_LOSS_IMPLEMENTATIONS = ("bidir", "shift", "reduce", "gather")

# Beyond it floats pass over whole numbers.
_LARGEST = 2**53


def check_ranges(args: TrainOptions) -> None:
    """Refuse numbers out of their range."""
    for option in fields(TrainOptions):
        rule, value = option.metadata.get("rule"), getattr(args, option.name)
        if rule is None or value is None or (abs(value) <= _LARGEST and rule.holds(value)):
            continue
        if isinstance(value, int) and value > _LARGEST:
            raise ValueError(f"{flag_of(option.name)} must be at most 2**53, got {value}")
        raise ValueError(f"{flag_of(option.name)} must be {rule.text}, got {value}")
    for flag, values in (("--image-mean", args.image_mean), ("--image-std", args.image_std)):
        if values is not None and not (len(values) == 3 and all(map(math.isfinite, values))):
            raise ValueError(f"{flag} takes 3 finite numbers, got {values}")
    if args.image_std is not None and min(args.image_std) <= 0:
        raise ValueError(f"--image-std must be > 0, got {args.image_std}")
    size = args.force_image_size
    if size is not None and (len(size) > 2 or min(size) < 1):
        raise ValueError(f"--force-image-size takes 1 or 2 sizes >= 1, got {size}")


def check_recipe(args: TrainOptions) -> None:
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


def check_device(args: TrainOptions) -> None:
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


def check_reports(args: TrainOptions) -> None:
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
