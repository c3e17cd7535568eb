"""Options that were set and change nothing, or change less than they seem to."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from timm.optim import get_optimizer_info

from clip_pgs.checkpoint_reading import (
    config_of,
    find_checkpoint,
    find_weights,
    read_checkpoint,
)
from clip_pgs.common import MODEL_SCHEMAS
from clip_pgs.data.build import dataset_kind
from clip_pgs.data.shards import expand_shards, is_seekable
from clip_pgs.files import CHECKPOINTS_NAME, MODEL_CONFIG_NAME, read_json_object
from clip_pgs.integrations.open_clip.model_config import changed_model
from clip_pgs.masking import create_masking
from clip_pgs.tables import counted
from clip_pgs.training.build import (
    context_length,
    input_size,
    is_on_cpu,
    makes_coca,
    read_model_config,
    weights_place,
)
from clip_pgs.training.data_checks import (
    has_training_data,
    num_training_samples,
    samples_per_step,
    shard_warnings,
    training_files,
)
from clip_pgs.training.export import open_clip_config
from clip_pgs.training.options import (
    EVALUATION,
    RELEASED_MASKING,
    TrainOptions,
    flag_of,
    names_below,
    released_flags,
)
from clip_pgs.training.phases import phase_options
from clip_pgs.training.run_folder import (
    changed_options,
    changed_recipe,
    changed_record,
    keeps_logs,
    read_options_file,
    run_folder,
)


def option_warnings(options: TrainOptions) -> list[str]:
    """Return one sentence for each option that was set and does nothing, or not what it seems.

    Options that only several processes need are left out, so that one config serves one process
    and eight.

    Args:
        options: Options that passed `check_options`.
    """
    idle = [
        f"{flag_of(name)} has no effect {reason}"
        for is_idle, names, reason in _idle_options(options)
        for name in names.split()
        if is_idle and name in options.given
    ]
    return [
        *_released_notes(options),
        *_slurm_notes(options),
        *_synthetic_notes(options),
        *idle,
        *_masking_warnings(options),
        *warmup_warnings(options),
        *_resume_warnings(options),
        *_weight_warnings(options),
        *shard_warnings(options),
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


def _slurm_notes(options: TrainOptions) -> list[str]:
    """Return what a job of Slurm lacks to go on where it stopped."""
    if "SLURM_JOB_ID" not in os.environ or "name" in options.given or not keeps_logs(options):
        return []
    return ["without --name this run begins anew when Slurm starts its job again"]


def _synthetic_notes(options: TrainOptions) -> list[str]:
    """Return which data are named beside synthetic data, which take their place."""
    if options.dataset_type != "synthetic":
        return []
    return [
        f"{flag_of(name)} is not read with --dataset-type synthetic, whose images are black"
        for name in ("train_data", "val_data")
        if getattr(options, name) is not None
    ]


def _idle_options(options: TrainOptions) -> list[tuple[bool, str, str]]:
    """Return whether options do nothing in this run, their names, and why in words."""
    config, model, masking = read_model_config(options), options.model, options.masking
    sources = [path for path in (options.train_data, options.val_data) if path is not None]
    kinds = {path: dataset_kind(options.dataset_type, path, flag="") for path in sources}
    val_data, val_kind = options.val_data or "", kinds.get(options.val_data or "")
    is_counted = val_kind == "csv"
    if val_kind == "webdataset":
        is_counted = all(map(is_seekable, expand_shards(val_data)))
    strategy = create_masking(masking, **options.masking_options)
    keeps_as_many = masking != "none" and not strategy.keeps_different_counts()
    is_coca = makes_coca(options)
    is_siglip = options.siglip and not is_coca
    has_timm = "timm_model_name" in config["vision_cfg"]
    brings_weights = model.startswith(MODEL_SCHEMAS)
    on_cpu = is_on_cpu(options)
    is_full_on_gpu = not on_cpu and options.precision == "fp32"
    has_imagenet = options.imagenet_val is not None or options.imagenet_v2 is not None
    reports_to_wandb = not {"wandb", "all"}.isdisjoint(options.report_targets)
    opt, scheduler = options.opt, options.lr_scheduler
    own_size = input_size(dataclasses.replace(options, train_image_size=None))
    is_own_size = (options.train_image_size,) * 2 == own_size
    ratios = "mask_ratio mask_ratio_min masking_option"
    tuning = "unmasked_lr unmasked_warmup unmasked_batch_size unmasked_accum_freq"
    cooldown = "epochs_cooldown lr_cooldown_end lr_cooldown_power"
    csv, imagenet = "csv_separator csv_img_key csv_caption_key", "imagenet_val imagenet_v2"
    lock_image = "lock_image_unlocked_groups lock_image_freeze_bn_stats"
    lock_text = "lock_text_unlocked_layers lock_text_freeze_layer_norm"
    coca = "coca_caption_loss_weight coca_contrastive_loss_weight"
    saving = "save_every_steps save_every_minutes keep_checkpoints name save_frequency"
    saving += " save_most_recent delete_previous_checkpoint report_to"
    evaluation = " ".join(names_below(EVALUATION))
    as_many = f"with --masking {masking} that keeps as many patches of every image"
    full = "with --precision fp32 on a GPU, whose kernel needs 16 bits"
    return [
        (masking == "none", f"{ratios} pack_tokens", "with --masking none"),
        (keeps_as_many, "pack_tokens", as_many),
        (options.merge_counts, "pack_tokens", "with --merge-counts"),
        (on_cpu and options.torchcompile, "pack_tokens", "with --torchcompile on a CPU"),
        (is_full_on_gpu, "pack_tokens", full),
        (
            options.mask_schedule == "constant",
            "mask_schedule_steps",
            "with --mask-schedule constant",
        ),
        (is_own_size, "train_image_size", f"on {model}, whose images have this size"),
        (options.unmasked_epochs == 0, tuning, "without --unmasked-epochs"),
        ("csv" not in kinds.values(), csv, "without csv data"),
        ("webdataset" not in kinds.values(), "caption_key", "without shards"),
        (kinds.get(options.train_data or "") == "csv", "train_num_samples", "with csv data"),
        (options.val_data is None, "val_frequency val_num_samples", "without --val-data"),
        (is_counted, "val_num_samples", "with local --val-data, every sample of which is measured"),
        (options.val_frequency == 0, "val_data", "with --val-frequency 0"),
        (not has_imagenet, "zeroshot_frequency", "without --imagenet-val"),
        (options.zeroshot_frequency == 0, imagenet, "with --zeroshot-frequency 0"),
        (options.eval_suite is None, evaluation, "without --eval-suite"),
        (True, _idle_settings(opt), f"with --opt {opt}"),
        (options.skip_scheduler, f"warmup lr_scheduler {cooldown}", "with --skip-scheduler"),
        (scheduler != "const-cooldown", cooldown, f"on --lr-scheduler {scheduler}"),
        (not options.lock_image, lock_image, "without --lock-image"),
        (not options.lock_text, lock_text, "without --lock-text"),
        (not is_coca, coca, f"on {model}, which is no CoCa model"),
        (is_coca, "siglip", f"on {model}, which has a loss of its own"),
        (not is_siglip, "loss_dist_impl", "without the loss of --siglip"),
        (is_siglip, "local_loss gather_with_grad", "with --siglip"),
        (not reports_to_wandb, "wandb_notes wandb_project_name", "without --report-to wandb"),
        (not has_timm, "pretrained_image", f"on {model}, whose image tower is not timm's"),
        (brings_weights, "pretrained", f"on {model}, which brings its own weights"),
        (options.fsdp, "ddp_static_graph", "with --fsdp"),
        (options.resume != "latest", "accept_changes", "without --resume latest"),
        (not keeps_logs(options), saving, "with --logs none"),
    ]


def _masking_warnings(options: TrainOptions) -> list[str]:
    """Return a sentence for each option of the strategy that others leave without an effect."""
    strategy = create_masking(options.masking, **options.masking_options)
    sentences = []
    for name, reason in strategy.idle_options().items():
        # A schedule moves the ratio alone.
        names = (name, "mask_ratio_end") if name == "mask_ratio" else (name,)
        flags = [flag_of(each) for each in names if each in options.given]
        flags += [f"--masking-option {name}"] if name in options.masking_option else []
        sentences += [f"{flag} has no effect {reason}" for flag in flags]
    return sentences


def _idle_settings(opt: str) -> str:
    """Return what an optimizer has no place for: timm drops it, OpenCLIP's AdamW never asks."""
    if not opt.lower().startswith("timm/"):
        return "momentum"
    # Such as lookahead_adam.
    info = get_optimizer_info(opt.lower().removeprefix("timm/").rpartition("_")[2])
    names = {"momentum": info.has_momentum, "beta1 beta2": info.has_betas, "eps": info.has_eps}
    return " ".join(name for name, is_taken in names.items() if not is_taken)


def warmup_warnings(options: TrainOptions) -> list[str]:
    """Return a sentence for each phase of training that its warm-up fills."""
    num_samples = num_training_samples(options) if has_training_data(options) else None
    if num_samples is None:
        return []
    sentences = []
    for phase in phase_options(options):
        if phase.skip_scheduler:
            continue
        num_steps = num_samples // samples_per_step(phase) * phase.epochs
        if phase.warmup is not None and phase.warmup > num_steps:
            flag, span = "--warmup", "the run"
            if phase is not options:
                flag, span = "--unmasked-warmup", "unmasked tuning"
            sentences.append(
                f"{flag} {phase.warmup} is longer than {span} of "
                f"{counted(num_steps, 'step')}, so that the learning rate never reaches {phase.lr}"
            )
    return sentences


def _resume_warnings(options: TrainOptions) -> list[str]:
    folder = run_folder(options)
    if options.resume not in (None, "latest"):
        return _source_warnings(options, options.resume)
    if options.resume is None or folder is None:
        return []
    saved, damage = read_options_file(folder)
    sentences = [] if damage is None else [f"{damage}; no option is compared with the run's"]
    # Others than those of the recipe were refused, or accepted.
    is_other = options.accept_changes and bool(saved)
    changes = _all_changes(options, saved) if is_other else changed_recipe(options, saved)
    checkpoints = folder / CHECKPOINTS_NAME
    if checkpoints.is_symlink():
        # To another disk, as a rule; in a stranger's run, anywhere.
        target = checkpoints.resolve()
        sentences += [f"{checkpoints} is a link: checkpoints are written, and removed, in {target}"]
    return sentences + [f"run {folder} continues with {change}" for change in changes]


def _weight_warnings(options: TrainOptions) -> list[str]:
    """Return a sentence where weights with a record were trained to compute something else."""
    flag, source = "--pretrained", options.pretrained
    recorded: Any = None
    # That it cannot be read is told by who reads it.
    with suppress(ValueError):
        if options.model.startswith(MODEL_SCHEMAS):
            flag, source = "--model", options.model
            recorded = {"model_cfg": read_model_config(options), **_read_export(options.model)}
        elif options.mae is None and (place := weights_place(options)) is not None:
            path = find_weights(place, is_checked=False)
            recorded = config_of(path, read_checkpoint(path, use_mmap=True))
    changes = [] if recorded is None else changed_model(recorded, open_clip_config(options))
    if not changes:
        return []
    return [f"{flag} {source} was trained with other settings: {', '.join(changes)}"]


def _read_export(model: str) -> dict[str, Any]:
    """Return how the weights of a folder see images, as its config tells; of the Hub's nothing."""
    schema, _, folder = model.partition(":")
    if schema != "local-dir":
        return {}
    content = read_json_object(Path(folder, MODEL_CONFIG_NAME), what=model)
    return {"preprocess_cfg": content.get("preprocess_cfg")}


def _source_warnings(options: TrainOptions, source: str) -> list[str]:
    """Return what `--resume` finds in a checkpoint of no run, or of one of other options or data.

    What lies beside the file tells more than its record, and is there in a run's folder alone.
    """
    path, content = _read_source(source)
    trains = has_training_data(options)
    sentences = []
    if trains and content and not (content.get("epoch") or content.get("position")):
        sentence = (
            f"--resume {source} goes on from no place in a run: training begins at step 0, with a "
            "fresh optimizer and warmup"
        )
        if _reads_pretrained(options):
            sentence += f"; --pretrained {source} is the option that means it"
        sentences = [sentence]
    saved, record = read_options_file(path.parent.parent)[0], content.get("clip_pgs")
    if saved:
        changes = _all_changes(options, saved)
    else:
        changes = changed_record(options, record) if isinstance(record, dict) else []
    if changes:
        sentences.append(
            f"--resume {source} goes on from a run with other options or data: {', '.join(changes)}"
        )
    return sentences


def _all_changes(options: TrainOptions, saved: Mapping[str, Any]) -> list[str]:
    files = training_files(options) if has_training_data(options) else None
    return changed_options(options, saved, files=files) + changed_recipe(options, saved)


def _reads_pretrained(options: TrainOptions) -> bool:
    """Return whether `--pretrained` has an effect: a folder and the Hub bring weights of theirs."""
    return options.mae is None and not options.model.startswith(MODEL_SCHEMAS)


def _read_source(source: str) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint that a source stands for, and what is in it, where it can be read."""
    path = Path(source)
    # That it cannot be read is told by who reads it.
    with suppress(ValueError):
        path = find_checkpoint(source, is_checked=False)
        return path, read_checkpoint(path, use_mmap=True)
    return path, {}


def _text_warnings(options: TrainOptions) -> list[str]:
    """Return a sentence where part of the text tower is never trained."""
    budget, length = options.text_tokens, context_length(options)
    if budget is None or budget >= length or options.unmasked_epochs > 0:
        return []
    return [
        f"--text-tokens {budget} leaves the text positions from {budget} to {length - 1} "
        "untrained; let --unmasked-epochs follow"
    ]
