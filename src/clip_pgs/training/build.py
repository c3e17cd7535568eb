"""Model, optimiser, schedule and loss of a run, all made by OpenCLIP from its own options."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip_train.scheduler import const_lr, const_lr_cooldown, cosine_lr
from torch import Tensor, nn

from clip_pgs.checkpoint_io import check_sum, find_checkpoint, fit_weights, read_checkpoint
from clip_pgs.integrations.open_clip import (
    CaptionTrimmer,
    allow_short_text,
    apply_masking,
    caption_trimmer,
    is_text_trimming_lossless,
)
from clip_pgs.integrations.open_clip.compat import weights_read_by
from clip_pgs.training.masks import seed_everything
from clip_pgs.training.options import TrainOptions

_logger = logging.getLogger(__name__)


@dataclass
class ModelParts:
    """A model and what goes in front of it.

    Args:
        model: The plain model on its device, its image tower masked in train mode.
        train_transform: Image to augmented pixels.
        val_transform: Image to pixels.
        tokenize: Captions to token numbers of shape (B, context length).
    """

    model: open_clip.CLIP
    train_transform: Callable
    val_transform: Callable
    tokenize: Callable


def build_model(args: TrainOptions, device: torch.device) -> ModelParts:
    """Create the model, lock what is to be locked, mask its image tower, let captions be short.

    Args:
        args: Options; the weights depend on `args.seed`, on no rank.
        device: Where the model goes.
    """
    seed_everything(args.seed)
    model, train_transform, val_transform = create_model(args, device)
    has_weights = args.pretrained or args.model.startswith(("hf-hub:", "local-dir:"))
    if is_coca(model) and not has_weights:
        # OpenCLIP leaves this parameter as the memory it finds, other in each process.
        projection = model.text_decoder.text_projection
        nn.init.normal_(projection, std=projection.shape[0] ** -0.5)
    if args.use_bn_sync and args.distributed:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if args.masking != "none":
        apply_masking(model, args.masking, pack_tokens=args.pack_tokens, **args.masking_options)
    allow_short_text(model)
    if args.text_tokens is not None and not is_text_trimming_lossless(model):
        _logger.warning(
            "The text tower of %s looks at padding too: --text-tokens changes what it makes of "
            "a caption that is short anyway",
            args.model,
        )
    tokenize = open_clip.get_tokenizer(
        args.model, cache_dir=args.cache_dir, context_length=args.force_context_length
    )
    return ModelParts(model, train_transform, val_transform, tokenize)


def create_model(args: TrainOptions, device: torch.device) -> tuple[Any, Callable, Callable]:
    """Create OpenCLIP's model with the weights it starts from, and lock what is to be locked.

    Args:
        args: Options.
        device: Where it goes; "meta" tries everything without memory for weights.

    Returns:
        The model, its transform of training images, and that of others.

    Raises:
        ValueError: If weights cannot be read or do not fit.
        RuntimeError, OSError: If something of it cannot be fetched.
    """
    size = args.force_image_size
    pretrained = args.pretrained
    if pretrained and Path(pretrained).is_dir():
        pretrained = str(find_checkpoint(pretrained))
    on_meta = device if device.type == "meta" else contextlib.nullcontext()
    with weights_read_by(_read_weights, _explain_misfit), on_meta:
        model, train_transform, val_transform = open_clip.create_model_and_transforms(
            args.model,
            pretrained,
            precision=args.precision,
            device=device,
            force_quick_gelu=args.force_quick_gelu,
            force_custom_text=args.force_custom_text,
            force_patch_dropout=args.force_patch_dropout,
            force_image_size=size[0] if size is not None and len(size) == 1 else size,
            force_context_length=args.force_context_length,
            image_mean=args.image_mean,
            image_std=args.image_std,
            image_interpolation=args.image_interpolation,
            image_resize_mode=args.image_resize_mode,
            aug_cfg=args.aug_cfg,
            pretrained_image=args.pretrained_image,
            output_dict=True,
            cache_dir=args.cache_dir,
            **logit_options(args),
        )
    if args.lock_image:
        model.lock_image_tower(
            unlocked_groups=args.lock_image_unlocked_groups,
            freeze_bn_stats=args.lock_image_freeze_bn_stats,
        )
    if args.lock_text:
        model.lock_text_tower(
            unlocked_layers=args.lock_text_unlocked_layers,
            freeze_layer_norm=args.lock_text_freeze_layer_norm,
        )
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    return model, train_transform, val_transform


def _read_weights(path: str) -> dict[str, Tensor]:
    weights = read_checkpoint(path, use_mmap=True)["state_dict"]
    check_sum(Path(path))
    return weights


def _explain_misfit(model: nn.Module, path: str, error: Exception) -> str:
    """Say which weight does not fit, in place of the list of all of them."""
    if isinstance(error, ValueError):
        return str(error)
    try:
        fit_weights(_read_weights(path), model)
    except ValueError as misfit:
        return f"{path} does not fit: {misfit}"
    return f"{path} does not fit: {error}"


def is_coca(model: nn.Module) -> bool:
    """Return whether a model also writes captions (CoCa, https://arxiv.org/abs/2205.01917)."""
    return isinstance(model, open_clip.CoCa)


def logit_options(args: TrainOptions) -> dict[str, float]:
    """Return the model options that set how logits start: SigLIP's with `--siglip`."""
    return {"init_logit_scale": math.log(10), "init_logit_bias": -10.0} if args.siglip else {}


def optimizer_misfit(optimizer: torch.optim.Optimizer, state: Any) -> str | None:
    """Return in words why a run cannot go on with an optimizer's state, None if it can.

    Args:
        optimizer: A fresh one of the run.
        state: What a checkpoint holds under "optimizer".
    """
    try:
        groups = [group for group in state["param_groups"] if group["params"]]
        numbers = [number for group in groups for number in group["params"]]
        moments = [state["state"].get(number, {}).get("exp_avg") for number in numbers]
    except (LookupError, TypeError, AttributeError):
        return "it holds no state of an optimizer"
    own = [group for group in optimizer.param_groups if group["params"]]
    trained = [parameter for group in own for parameter in group["params"]]
    if any(("betas" in a) != ("betas" in b) for a, b in zip(groups, own, strict=False)):
        return "its optimizer is of another kind (--opt)"
    sizes = [len(group["params"]) for group in groups]
    if sizes != [len(group["params"]) for group in own] or any(
        moment is not None and moment.shape != parameter.shape
        for moment, parameter in zip(moments, trained, strict=True)
    ):
        return (
            f"its optimizer trained {len(numbers)} parameters, and not the {len(trained)} of this "
            "run (--lock-image and --lock-text with their groups must be as they were; "
            "--pretrained takes the weights alone)"
        )
    return None


def build_trimmer(args: TrainOptions, model: nn.Module) -> CaptionTrimmer | None:
    """Return what cuts captions to what reaches their features, None where padding does, too."""
    # Groups of several lengths are compiled anew for each combination.
    return caption_trimmer(model, shares=(1.0,)) if args.torchcompile else caption_trimmer(model)


def build_loss(args: TrainOptions, model: nn.Module) -> nn.Module:
    """Create OpenCLIP's loss for a model; args needs `rank` and `world_size`."""
    # OpenCLIP goes by the name, which says nothing where the model comes from one's own file.
    name = "coca" if is_coca(model) else args.model.lower().replace("coca", "")
    return open_clip.create_loss(argparse.Namespace(**{**vars(args.openclip), "model": name}))


def build_optimizer(args: TrainOptions, model: nn.Module) -> torch.optim.Optimizer:
    """Create the optimiser: AdamW with OpenCLIP's groups, or any of timm's as `timm/NAME`.

    Raises:
        ValueError: If `args.opt` is neither.
    """
    opt = args.opt.lower()
    if opt.startswith("timm/"):
        from timm.optim import create_optimizer_v2

        options: dict[str, Any] = {}
        if args.beta1 is not None and args.beta2 is not None:
            options["betas"] = (args.beta1, args.beta2)
        if args.momentum is not None:
            options["momentum"] = args.momentum
        if args.eps is not None:
            options["eps"] = args.eps
        return create_optimizer_v2(
            model, opt.removeprefix("timm/"), lr=args.lr, weight_decay=args.wd, **options
        )
    if opt != "adamw":
        raise ValueError(f"--opt must be adamw or timm/NAME, got {args.opt!r}")
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if not _decays(name, p)], "weight_decay": 0.0},
        {"params": [p for name, p in trained if _decays(name, p)], "weight_decay": args.wd},
    ]
    # OpenCLIP's parser gives them their defaults.
    assert args.beta1 is not None
    assert args.beta2 is not None
    assert args.eps is not None
    # Fused: fastest, and it can skip a step without the host (see `update_weights`).
    return torch.optim.AdamW(
        groups, lr=args.lr, betas=(args.beta1, args.beta2), eps=args.eps, fused=True
    )


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not any(
        part in name for part in ("bn", "ln", "bias", "logit_scale")
    )


def count_steps(args: TrainOptions, *, num_batches: int | None) -> int:
    """Return the optimiser steps of an epoch, of which a rank reads `num_batches` micro-batches.

    Raises:
        ValueError: If they do not fill one step.
    """
    steps = (num_batches or 0) // args.accum_freq
    if steps == 0:
        raise ValueError(
            f"--train-data gives {num_batches} batches per process and epoch, fewer than one step "
            f"of --accum-freq {args.accum_freq} takes"
        )
    return steps


def build_schedule(
    args: TrainOptions, optimizer: torch.optim.Optimizer, *, steps_per_epoch: int
) -> Callable[[int], float]:
    """Create the learning-rate schedule: called with a step, it sets and returns the rate.

    Raises:
        ValueError: If `args.lr_scheduler` is unknown.
    """
    if args.skip_scheduler:
        return lambda step: optimizer.param_groups[0]["lr"]
    total_steps = steps_per_epoch * args.epochs
    if args.lr_scheduler == "cosine":
        return cosine_lr(optimizer, args.lr, args.warmup, total_steps)
    if args.lr_scheduler == "const":
        return const_lr(optimizer, args.lr, args.warmup, total_steps)
    if args.lr_scheduler == "const-cooldown":
        assert args.epochs_cooldown is not None
        return const_lr_cooldown(
            optimizer,
            args.lr,
            args.warmup,
            total_steps,
            steps_per_epoch * args.epochs_cooldown,
            args.lr_cooldown_power,
            args.lr_cooldown_end,
        )
    raise ValueError(
        f"--lr-scheduler must be cosine, const or const-cooldown, got {args.lr_scheduler!r}"
    )
