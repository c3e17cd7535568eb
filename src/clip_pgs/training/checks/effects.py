"""Options that were set and change nothing, or change less than they seem to."""

from __future__ import annotations

import torch

from clip_pgs.data.stream import dataset_kind
from clip_pgs.masking import create_masking
from clip_pgs.training.checks.data import (
    has_training_data,
    num_training_samples,
    samples_per_step,
)
from clip_pgs.training.checks.model import read_model_config
from clip_pgs.training.options import MODEL_SCHEMAS, TrainOptions
from clip_pgs.training.phases import phase_options
from clip_pgs.training.run_folder import (
    changed_recipe,
    damaged_options,
    keeps_logs,
    run_folder,
)

_CSV = ("csv_separator", "csv_img_key", "csv_caption_key")
_LOCK_IMAGE = ("lock_image_unlocked_groups", "lock_image_freeze_bn_stats")
_LOCK_TEXT = ("lock_text_unlocked_layers", "lock_text_freeze_layer_norm")
_SCHEDULE = ("warmup", "lr_scheduler", "epochs_cooldown", "lr_cooldown_end", "lr_cooldown_power")
_COOLDOWN = ("epochs_cooldown", "lr_cooldown_end", "lr_cooldown_power")
_COCA = ("coca_caption_loss_weight", "coca_contrastive_loss_weight")
_EVALUATION = ("eval_datasets", "eval_data_root", "eval_every")
_MASKING = ("mask_ratio", "mask_ratio_min", "masking_option", "pack_tokens")
_PACKING = ("pack_tokens",)
_UNMASKED = (
    "unmasked_lr",
    "unmasked_warmup",
    "unmasked_batch_size",
    "unmasked_accum_freq",
)
_KEPT = (
    "name",
    "save_frequency",
    "save_most_recent",
    "delete_previous_checkpoint",
    "save_every_steps",
    "save_every_minutes",
    "keep_checkpoints",
    "report_to",
)


def options_without_effect(args: TrainOptions) -> list[str]:
    """Return one sentence per option that the user set in vain.

    Options that only several processes need are left out, so that one config serves one process
    and eight.

    Args:
        args: Options that passed the checks.
    """
    sentences = [
        f"--{name.replace('_', '-')} has no effect {reason}"
        for is_idle, names, reason in _idle_groups(args)
        if is_idle
        for name in names
        if name in args.given
    ]
    return [*sentences, *_warmup_warnings(args), *_resume_warnings(args)]


def _idle_groups(args: TrainOptions) -> list[tuple[bool, tuple[str, ...], str]]:
    """Return conditions, the options that do nothing under them, and why in words."""
    config = read_model_config(args.model)
    kinds = {
        dataset_kind(args.dataset_type, path, flag="")
        for path in (args.train_data, args.val_data)
        if path is not None
    }
    is_timm_opt = args.opt.lower().startswith("timm/")
    is_coca = "multimodal_cfg" in config or "coca" in args.model.lower()
    is_on_cpu = args.device == "cpu" or not torch.cuda.is_available()
    has_imagenet = args.imagenet_val is not None or args.imagenet_v2 is not None
    return [
        (args.masking == "none", _MASKING, "with --masking none"),
        (
            not _keeps_different_counts(args),
            _PACKING if args.masking != "none" else (),
            f"with --masking {args.masking} that keeps as many patches of every image",
        ),
        (is_on_cpu and args.torchcompile, _PACKING, "with --torchcompile on a CPU"),
        (
            not is_on_cpu and args.precision == "fp32",
            _PACKING,
            "with --precision fp32 on a GPU, whose kernel needs 16 bits",
        ),
        (
            args.mask_schedule == "constant",
            ("mask_schedule_steps",),
            "with --mask-schedule constant",
        ),
        (args.unmasked_epochs == 0, _UNMASKED, "without --unmasked-epochs"),
        ("csv" not in kinds, _CSV, "without csv data"),
        ("webdataset" not in kinds, ("caption_key",), "without shards"),
        ("csv" in kinds, ("train_num_samples",), "with csv data"),
        (args.val_data is None, ("val_frequency", "val_num_samples"), "without --val-data"),
        (not has_imagenet, ("zeroshot_frequency",), "without --imagenet-val"),
        (args.eval_suite is None, _EVALUATION, "without --eval-suite"),
        (not is_timm_opt, ("momentum",), f"with --opt {args.opt}"),
        (args.skip_scheduler, _SCHEDULE, "with --skip-scheduler"),
        (
            args.lr_scheduler != "const-cooldown",
            _COOLDOWN,
            f"on --lr-scheduler {args.lr_scheduler}",
        ),
        (not args.lock_image, _LOCK_IMAGE, "without --lock-image"),
        (not args.lock_text, _LOCK_TEXT, "without --lock-text"),
        (not is_coca, _COCA, f"on {args.model}, which is no CoCa model"),
        (is_coca, ("siglip",), f"on {args.model}, which has a loss of its own"),
        (not args.siglip, ("loss_dist_impl",), "without --siglip"),
        (args.siglip, ("local_loss", "gather_with_grad"), "with --siglip"),
        (
            not {"wandb", "all"} & set(args.report_to.split(",")),
            ("wandb_notes", "wandb_project_name"),
            "without --report-to wandb",
        ),
        (
            "timm_model_name" not in config["vision_cfg"],
            ("pretrained_image",),
            f"on {args.model}, whose image tower is not timm's",
        ),
        (
            args.model.startswith(MODEL_SCHEMAS),
            ("pretrained",),
            f"on {args.model}, which brings its own weights",
        ),
        (args.resume != "latest", ("accept_changes",), "without --resume latest"),
        (not keeps_logs(args), _KEPT, "with --logs none"),
    ]


def _keeps_different_counts(args: TrainOptions) -> bool:
    strategy = create_masking(args.masking, **args.masking_options)
    lowest = getattr(strategy, "mask_ratio_min", None)
    return lowest is not None and lowest != strategy.mask_ratio


def _warmup_warnings(args: TrainOptions) -> list[str]:
    num_samples = num_training_samples(args) if has_training_data(args) else None
    if num_samples is None or args.skip_scheduler:
        return []
    sentences = []
    for phase_args in phase_options(args):
        num_steps = num_samples // samples_per_step(phase_args) * phase_args.epochs
        if phase_args.warmup is not None and phase_args.warmup >= num_steps:
            flag, span = "--warmup", "the run"
            if phase_args is not args:
                flag, span = "--unmasked-warmup", "unmasked tuning"
            sentences.append(
                f"{flag} {phase_args.warmup} is as long as {span} of {num_steps} steps, so that "
                f"the learning rate never reaches {phase_args.lr}"
            )
    return sentences


def _resume_warnings(args: TrainOptions) -> list[str]:
    folder = run_folder(args)
    if args.resume != "latest" or folder is None:
        return []
    damage = damaged_options(folder)
    sentences = [] if damage is None else [f"{damage}; no option is compared with the run's"]
    return sentences + [
        f"run {folder} continues with {change}" for change in changed_recipe(args, folder)
    ]
