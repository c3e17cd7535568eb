"""Options that were set and change nothing, or change less than they seem to."""

from __future__ import annotations

from collections.abc import Iterator

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
    EVALUATION,
    MODEL_SCHEMAS,
    RELEASED_MASKING,
    TrainOptions,
    flag_of,
    names_below,
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
        for names, reason in _idle_options(options)
        for name in names.split()
        if name in options.given
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


def _idle_options(options: TrainOptions) -> Iterator[tuple[str, str]]:
    """Yield names of options that do nothing in this run, and why in words."""
    config, model = read_model_config(options), options.model
    sources = [path for path in (options.train_data, options.val_data) if path is not None]
    kinds = {dataset_kind(options.dataset_type, path, flag="") for path in sources}
    is_masked = options.masking != "none"
    strategy = create_masking(options.masking, **options.masking_options)
    is_coca = "multimodal_cfg" in config or "coca" in model.lower()
    is_on_cpu = options.device == "cpu" or not torch.cuda.is_available()
    reports = set(options.report_to.split(","))
    cooldown = "epochs_cooldown lr_cooldown_end lr_cooldown_power"
    if not is_masked:
        yield "mask_ratio mask_ratio_min masking_option pack_tokens", "with --masking none"
    if is_masked and not keeps_different_counts(strategy):
        yield (
            "pack_tokens",
            f"with --masking {options.masking} that keeps as many patches of every image",
        )
    if options.merge_counts:
        yield "pack_tokens", "with --merge-counts"
    if is_on_cpu and options.torchcompile:
        yield "pack_tokens", "with --torchcompile on a CPU"
    if not is_on_cpu and options.precision == "fp32":
        yield "pack_tokens", "with --precision fp32 on a GPU, whose kernel needs 16 bits"
    if options.mask_schedule == "constant":
        yield "mask_schedule_steps", "with --mask-schedule constant"
    if options.unmasked_epochs == 0:
        yield (
            "unmasked_lr unmasked_warmup unmasked_batch_size unmasked_accum_freq",
            "without --unmasked-epochs",
        )
    if "csv" not in kinds:
        yield "csv_separator csv_img_key csv_caption_key", "without csv data"
    if "webdataset" not in kinds:
        yield "caption_key", "without shards"
    if "csv" in kinds:
        yield "train_num_samples", "with csv data"
    if options.val_data is None:
        yield "val_frequency val_num_samples", "without --val-data"
    if options.imagenet_val is None and options.imagenet_v2 is None:
        yield "zeroshot_frequency", "without --imagenet-val"
    if options.eval_suite is None:
        yield " ".join(names_below(EVALUATION)), "without --eval-suite"
    if not options.opt.lower().startswith("timm/"):
        yield "momentum", f"with --opt {options.opt}"
    if options.skip_scheduler:
        yield f"warmup lr_scheduler {cooldown}", "with --skip-scheduler"
    if options.lr_scheduler != "const-cooldown":
        yield cooldown, f"on --lr-scheduler {options.lr_scheduler}"
    if not options.lock_image:
        yield "lock_image_unlocked_groups lock_image_freeze_bn_stats", "without --lock-image"
    if not options.lock_text:
        yield "lock_text_unlocked_layers lock_text_freeze_layer_norm", "without --lock-text"
    if not is_coca:
        yield (
            "coca_caption_loss_weight coca_contrastive_loss_weight",
            f"on {model}, which is no CoCa model",
        )
    if is_coca:
        yield "siglip", f"on {model}, which has a loss of its own"
    if not options.siglip:
        yield "loss_dist_impl", "without --siglip"
    if options.siglip:
        yield "local_loss gather_with_grad", "with --siglip"
    if not {"wandb", "all"} & reports:
        yield "wandb_notes wandb_project_name", "without --report-to wandb"
    if "timm_model_name" not in config["vision_cfg"]:
        yield "pretrained_image", f"on {model}, whose image tower is not timm's"
    if model.startswith(MODEL_SCHEMAS):
        yield "pretrained", f"on {model}, which brings its own weights"
    if options.fsdp:
        yield "ddp_static_graph", "with --fsdp"
    if options.resume != "latest":
        yield "accept_changes", "without --resume latest"
    if not keeps_logs(options):
        saving = "save_every_steps save_every_minutes keep_checkpoints"
        theirs = "name save_frequency save_most_recent delete_previous_checkpoint report_to"
        yield f"{saving} {theirs}", "with --logs none"


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
