"""Options that were set and change nothing, or change less than they seem to."""

from __future__ import annotations

import torch

from clip_pgs.data.build import dataset_kind
from clip_pgs.masking import create_masking
from clip_pgs.masking.strategy import keeps_different_counts
from clip_pgs.training.build import context_length, read_model_config
from clip_pgs.training.data_checks import (
    has_training_data,
    num_training_samples,
    samples_per_step,
)
from clip_pgs.training.options import (
    MODEL_SCHEMAS,
    RELEASED_MASKING,
    TrainOptions,
    flag_of,
    released_flags,
)
from clip_pgs.training.phases import phase_options
from clip_pgs.training.run_folder import changed_recipe, keeps_logs, read_options_file, run_folder


def option_warnings(options: TrainOptions) -> list[str]:
    """Return one sentence for each option that was set and does nothing, or not what it seems.

    Options that only several processes need are left out, so that one config serves one process
    and eight.

    Args:
        options: Options that passed `check_options`.
    """
    idle = [
        f"{flag_of(name)} has no effect {reason}"
        for is_idle, names, reason in _idle_groups(options)
        for name in names.split()
        if is_idle and name in options.given
    ]
    return [
        *_released_notes(options),
        *idle,
        *_warmup_warnings(options),
        *_resume_warnings(options),
        *_text_warnings(options),
    ]


def _released_notes(options: TrainOptions) -> list[str]:
    """Return the sentence that says what a command line of the released code was taken for."""
    flags = released_flags(options)
    if not flags:
        return []
    meaning = ", ".join(f"{name}={value}" for name, value in options.masking_options.items())
    return [
        f"--force-patch-dropout beside {', '.join(flags)} is taken as the command line of "
        f"CLIP-PGS's released code, which is --masking {RELEASED_MASKING} here, with {meaning}"
    ]


def _idle_groups(options: TrainOptions) -> list[tuple[bool, str, str]]:
    """Return conditions, the options that do nothing under them, and why in words."""
    config, model = read_model_config(options), options.model
    sources = [path for path in (options.train_data, options.val_data) if path is not None]
    kinds = {dataset_kind(options.dataset_type, path, flag="") for path in sources}
    is_masked = options.masking != "none"
    strategy = create_masking(options.masking, **options.masking_options)
    keeps_alike = not keeps_different_counts(strategy)
    is_coca = "multimodal_cfg" in config or "coca" in model.lower()
    is_on_cpu = options.device == "cpu" or not torch.cuda.is_available()
    has_imagenet = options.imagenet_val is not None or options.imagenet_v2 is not None
    reports = set(options.report_to.split(","))
    cooldown = "epochs_cooldown lr_cooldown_end lr_cooldown_power"
    return [
        (
            not is_masked,
            "mask_ratio mask_ratio_min masking_option pack_tokens",
            "with --masking none",
        ),
        (
            is_masked and keeps_alike,
            "pack_tokens",
            f"with --masking {options.masking} that keeps as many patches of every image",
        ),
        (options.merge_counts, "pack_tokens", "with --merge-counts"),
        (is_on_cpu and options.torchcompile, "pack_tokens", "with --torchcompile on a CPU"),
        (
            not is_on_cpu and options.precision == "fp32",
            "pack_tokens",
            "with --precision fp32 on a GPU, whose kernel needs 16 bits",
        ),
        (
            options.mask_schedule == "constant",
            "mask_schedule_steps",
            "with --mask-schedule constant",
        ),
        (
            options.unmasked_epochs == 0,
            "unmasked_lr unmasked_warmup unmasked_batch_size unmasked_accum_freq",
            "without --unmasked-epochs",
        ),
        ("csv" not in kinds, "csv_separator csv_img_key csv_caption_key", "without csv data"),
        ("webdataset" not in kinds, "caption_key", "without shards"),
        ("csv" in kinds, "train_num_samples", "with csv data"),
        (options.val_data is None, "val_frequency val_num_samples", "without --val-data"),
        (not has_imagenet, "zeroshot_frequency", "without --imagenet-val"),
        (
            options.eval_suite is None,
            "eval_datasets eval_data_root eval_every "
            "eval_inference_masking eval_inference_mask_ratio",
            "without --eval-suite",
        ),
        (not options.opt.lower().startswith("timm/"), "momentum", f"with --opt {options.opt}"),
        (options.skip_scheduler, f"warmup lr_scheduler {cooldown}", "with --skip-scheduler"),
        (
            options.lr_scheduler != "const-cooldown",
            cooldown,
            f"on --lr-scheduler {options.lr_scheduler}",
        ),
        (
            not options.lock_image,
            "lock_image_unlocked_groups lock_image_freeze_bn_stats",
            "without --lock-image",
        ),
        (
            not options.lock_text,
            "lock_text_unlocked_layers lock_text_freeze_layer_norm",
            "without --lock-text",
        ),
        (
            not is_coca,
            "coca_caption_loss_weight coca_contrastive_loss_weight",
            f"on {model}, which is no CoCa model",
        ),
        (is_coca, "siglip", f"on {model}, which has a loss of its own"),
        (not options.siglip, "loss_dist_impl", "without --siglip"),
        (options.siglip, "local_loss gather_with_grad", "with --siglip"),
        (
            not {"wandb", "all"} & reports,
            "wandb_notes wandb_project_name",
            "without --report-to wandb",
        ),
        (
            "timm_model_name" not in config["vision_cfg"],
            "pretrained_image",
            f"on {model}, whose image tower is not timm's",
        ),
        (
            model.startswith(MODEL_SCHEMAS),
            "pretrained",
            f"on {model}, which brings its own weights",
        ),
        (options.fsdp, "ddp_static_graph", "with --fsdp"),
        (options.resume != "latest", "accept_changes", "without --resume latest"),
        (
            not keeps_logs(options),
            "name save_frequency save_most_recent delete_previous_checkpoint save_every_steps "
            "save_every_minutes keep_checkpoints report_to",
            "with --logs none",
        ),
    ]


def _warmup_warnings(options: TrainOptions) -> list[str]:
    num_samples = num_training_samples(options) if has_training_data(options) else None
    if num_samples is None or options.skip_scheduler:
        return []
    sentences = []
    for phase in phase_options(options):
        num_steps = num_samples // samples_per_step(phase) * phase.epochs
        if phase.warmup is not None and phase.warmup >= num_steps:
            flag, span = "--warmup", "the run"
            if phase is not options:
                flag, span = "--unmasked-warmup", "unmasked tuning"
            sentences.append(
                f"{flag} {phase.warmup} is as long as {span} of {num_steps} steps, so that the "
                f"learning rate never reaches {phase.lr}"
            )
    return sentences


def _resume_warnings(options: TrainOptions) -> list[str]:
    folder = run_folder(options)
    if options.resume != "latest" or folder is None:
        return []
    _, damage = read_options_file(folder)
    sentences = [] if damage is None else [f"{damage}; no option is compared with the run's"]
    changes = changed_recipe(options, folder)
    return sentences + [f"run {folder} continues with {change}" for change in changes]


def _text_warnings(options: TrainOptions) -> list[str]:
    """Return a sentence where part of the text tower is never trained."""
    budget, length = options.text_tokens, context_length(options)
    if budget is None or budget >= length or options.unmasked_epochs > 0:
        return []
    return [
        f"--text-tokens {budget} leaves the text positions from {budget} to {length - 1} "
        "untrained; let --unmasked-epochs follow"
    ]
