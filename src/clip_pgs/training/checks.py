"""Everything about a run's options that can be found out before anything is created."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip import get_input_dtype
from open_clip_train.distributed import world_info_from_env
from PIL import Image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from clip_pgs.checkpoint_reading import (
    RUN_FILE,
    find_checkpoint,
    find_non_finite,
    fit_weights,
    load_checkpoint,
    newest_checkpoint,
)
from clip_pgs.common import (
    MODEL_SCHEMAS,
    check_choice,
    explained,
    is_first_process,
    one_sentence,
    silenced,
)
from clip_pgs.data.text_masking import create_text_masking
from clip_pgs.files import (
    CHECKPOINTS_NAME,
    EVAL_NAME,
    EXIT_NAME,
    EXPORT_NAME,
    MASKS_NAME,
    OPTIONS_NAME,
    check_writable,
    linked_folders,
    list_folder,
    read_json_object,
)
from clip_pgs.integrations import MAE_TYPE
from clip_pgs.integrations.apply import patch_grid
from clip_pgs.integrations.open_clip import masked_inference
from clip_pgs.integrations.open_clip.model_config import (
    MISFITS,
    build_on_meta,
    check_model_runs,
    largest_memory,
    usable_device,
)
from clip_pgs.masking import create_masking
from clip_pgs.tables import counted
from clip_pgs.training.build import (
    build_masking,
    build_optimizer,
    context_length,
    create_model,
    first_weights,
    image_size,
    input_size,
    is_on_cpu,
    make_tokenizer,
    makes_coca,
    mask_tower,
    read_model_config,
)
from clip_pgs.training.checkpoint import (
    DAMAGED_ENDING,
    damaged_entry,
    optimizer_misfit,
    refuse_all_damaged,
    restore_masking,
    trained_steps,
)
from clip_pgs.training.data_checks import (
    check_data,
    check_shared_memory,
    has_training_data,
    num_training_samples,
    training_files,
)
from clip_pgs.training.options import (
    NOT_FOR_AUTOENCODERS,
    TrainOptions,
    check_values,
    flag_of,
)
from clip_pgs.training.phases import MASKED_ALONE, total_epochs
from clip_pgs.training.run_folder import (
    changed_options,
    holds_run,
    keeps_logs,
    read_options_file,
    run_folder,
    taken_name,
)

# OpenCLIP's byte-pair vocabulary, of which the last token ends every caption.
_NUM_TOKENS = 49408
_LEAST_CONTEXT = 3
_TRIED_SIZE = 32


def check_options(options: TrainOptions, *, has_files: bool = True) -> nn.Module:
    """Refuse options that could not make a run.

    Args:
        options: From `parse_options`.
        has_files: Whether the data, and what is counted on it, can be there already; else they are
            not looked at, nor is the run's folder.

    Returns:
        The model as the run will make it, masked and, as a rule, on the device "meta".

    Raises:
        ValueError: With one sentence, for the first thing that is wrong.
    """
    try:
        check_values(options)
        _check_recipe(options)
        model, optimizer = _check_model(options)
        _check_masking(options, model)
        _check_batch_norm(options, model)
        _check_inference_masking(options, model)
        _check_device(options, model)
        _check_reports(options)
        if not has_files:
            return model
        _check_text_masking(options)
        check_data(options)
        check_shared_memory(options)
        _check_folder(options)
        _check_resumed(options, model, optimizer)
    except OSError as error:
        # A path that cannot be looked up: too long, not permitted, a loop of links.
        raise ValueError(f"cannot look up {error.filename!r}: {error.strerror or error}") from None
    return model


def _check_recipe(options: TrainOptions) -> None:
    """Refuse optimizers, schedules and losses that do not exist or lack a setting."""
    opt = options.opt.lower()
    if opt.startswith("timm/"):
        if options.lr is None:
            raise ValueError(f"--opt {options.opt} has no default learning rate; set --lr")
        if (options.beta1 is None) != (options.beta2 is None):
            raise ValueError(f"--opt {options.opt} needs both --beta1 and --beta2, or neither")
    elif opt != "adamw":
        raise ValueError(f"--opt must be adamw or timm/NAME, got {options.opt!r}")
    if options.lr_scheduler == "const-cooldown" and not options.skip_scheduler:
        if options.epochs_cooldown is None:
            raise ValueError("--lr-scheduler const-cooldown needs --epochs-cooldown")
        if options.epochs_cooldown > options.epochs:
            raise ValueError(
                f"--epochs-cooldown must be at most --epochs = {options.epochs}, "
                f"got {options.epochs_cooldown}"
            )


def _check_model(options: TrainOptions) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Refuse a model, weights or augmentation that open_clip could not make.

    Returns:
        The model as the run will make it, unmasked and, as a rule, on the device "meta", and its
        optimizer.
    """
    if options.mae is not None:
        _check_autoencoder(options)
        return _try_model(options, torch.device("meta"))
    if "mae_sign" in options.given:
        raise ValueError(
            f"--mae-sign needs a --model-config of a masked autoencoder (model_type {MAE_TYPE})"
        )
    config, name = read_model_config(options), options.model
    text = config["text_cfg"]
    is_text_of_hub = bool(text.get("hf_model_name"))
    brings_weights = name.startswith(MODEL_SCHEMAS)
    if options.lock_text and not options.lock_text_freeze_layer_norm and not is_text_of_hub:
        raise ValueError(
            f"--lock-text needs --lock-text-freeze-layer-norm: the text tower of {name} locks its "
            "LayerNorm with the rest"
        )
    has_other_tokenizer = text.get("hf_tokenizer_name") or is_text_of_hub
    num_tokens = text.get("vocab_size", _NUM_TOKENS)
    if num_tokens < _NUM_TOKENS and not has_other_tokenizer:
        raise ValueError(
            f"the config of --model {name} has a vocab_size of {num_tokens}, less than the "
            f"{_NUM_TOKENS} tokens of OpenCLIP's tokenizer"
        )
    if (length := context_length(options)) < _LEAST_CONTEXT:
        is_forced = options.force_context_length is not None
        what = "--force-context-length" if is_forced else f"the context_length of --model {name}"
        raise ValueError(
            f"{what} must be >= {_LEAST_CONTEXT}, for a start token, a word and an end token, "
            f"got {length}"
        )
    if makes_coca(options):
        _check_coca(options, config)
    is_own = options.model_config is not None or brings_weights
    if is_own or options.force_image_size is not None or options.force_context_length is not None:
        model = build_on_meta(
            config,
            name=name,
            image_size=image_size(options),
            context_length=options.force_context_length,
        )
        if not is_text_of_hub:
            check_model_runs(model, name=name, context_length=context_length(options))
    pretrained = first_weights(options)
    is_known = brings_weights or not pretrained or Path(pretrained).exists()
    if not (is_known or open_clip.get_pretrained_cfg(name, pretrained)):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(
            f"--pretrained {pretrained!r} is neither a file nor a tag of {name} (tags: {tags})"
        )
    _check_batch(options)
    _check_augmentation(options)
    # On the device "meta" transformers makes no model with its weights, and open_clip freezes no
    # BatchNorm.
    needs_memory = (is_text_of_hub and not (pretrained or brings_weights)) or (
        options.lock_image and options.lock_image_freeze_bn_stats
    )
    model, optimizer = _try_model(options, torch.device("cpu" if needs_memory else "meta"))
    if options.precision in ("fp16", "bf16"):
        _check_mixed(options, model, is_text_of_hub=is_text_of_hub)
    return model, optimizer


def _check_mixed(options: TrainOptions, model: nn.Module, *, is_text_of_hub: bool) -> None:
    """Refuse a half precision in which OpenCLIP leaves weights in float32 that meet others."""
    # Of these "meta" cannot tell: they read values, or its products take any dtypes.
    gains = (m.gamma for m in model.modules() if type(m).__name__ == "LayerScale")
    trouble = "its text tower is of Hugging Face" if is_text_of_hub else None
    if any(gain.dtype == torch.float32 for gain in gains):
        trouble = "it has LayerScale"
    if trouble is None:
        device = next(model.parameters()).device
        images = torch.zeros((2, 3, *input_size(options)), device=device)
        texts = torch.zeros((2, context_length(options)), dtype=torch.long, device=device)
        try:
            with torch.no_grad():
                model(images.to(get_input_dtype(options.precision)), texts)
        except RuntimeError as error:
            trouble = one_sentence(error) if "dtype" in str(error) else None
    if trouble is not None:
        raise ValueError(
            f"--precision {options.precision} leaves weights of {options.model} in float32 that "
            f"meet others ({trouble}); take pure_{options.precision} or amp_bf16"
        )


def _check_coca(options: TrainOptions, config: Mapping[str, Any]) -> None:
    """Refuse what leaves CoCa's loss nothing to learn, or gives it what it does not take."""
    if options.coca_caption_loss_weight == options.coca_contrastive_loss_weight == 0:
        raise ValueError(
            "--coca-caption-loss-weight and --coca-contrastive-loss-weight must not both be 0: "
            "nothing would be trained"
        )
    if config.get("init_logit_bias") is not None:
        raise ValueError(
            f"the config of --model {options.model} has an init_logit_bias, which CoCa's loss has "
            "no place for"
        )


def _check_autoencoder(options: TrainOptions) -> None:
    """Refuse what a masked autoencoder has no part for, or is not trained with here."""
    for name in NOT_FOR_AUTOENCODERS.split():
        if name in options.given:
            raise ValueError(
                f"{flag_of(name)} cannot go with the masked autoencoder of --model-config "
                f"{options.model_config}"
            )
    if options.masking == "none":
        raise ValueError(
            "--masking none hides nothing from a masked autoencoder; name a strategy, such as "
            "--masking random"
        )
    _check_batch(options)
    _check_augmentation(options)


def _try_model(
    options: TrainOptions, device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Make the model with everything that has to be read or fetched for it."""
    # What libraries say of a model that is only tried, they say again in the run.
    with silenced(logging.CRITICAL):
        pretrained = first_weights(options)
        weights = f" with --pretrained {pretrained}" if pretrained else ""
        with explained(f"open_clip cannot make {options.model}{weights}", *MISFITS, OSError):
            model, _, _ = create_model(options, device)
        make_tokenizer(options)
        with explained(f"--opt {options.opt} cannot be made", *MISFITS):
            optimizer = build_optimizer(options, model)
    if getattr(optimizer, "is_second_order", False):
        raise ValueError(
            f"--opt {options.opt} needs second derivatives of the loss, and a step here has the "
            "first alone"
        )
    return model, optimizer


def _check_batch(options: TrainOptions) -> None:
    """Refuse batches of which not even the pixels fit into this machine."""
    height, width = input_size(options)
    batch_size = max(options.batch_size, options.unmasked_batch_size or 0)
    num_bytes = 4 * 3 * height * width * batch_size
    if num_bytes > largest_memory():
        raise ValueError(
            f"the pixels of a batch of {counted(batch_size, 'image')} of {height} x {width} take "
            f"{num_bytes / 2**30:.0f} GiB, more than this machine has"
        )


def _check_crop(aug_cfg: Mapping[str, Any]) -> None:
    """Refuse boxes that no image has: torchvision would cut out the middle in their place."""
    if "scale" in aug_cfg:
        low, high = aug_cfg["scale"][:2]
        if not (0 <= low <= high and high > 0 and low <= 1):
            raise ValueError(
                "scale must be two shares of an image's area, the least in [0, 1], and the most "
                "above 0 and not below it"
            )
    if aug_cfg.get("ratio") is not None:
        low, high = aug_cfg["ratio"][:2]
        if not 0 < low <= high < math.inf:
            raise ValueError("ratio must be two finite numbers > 0, the least first")


def _check_augmentation(options: TrainOptions) -> None:
    """Refuse `--aug-cfg` with options, or values, that OpenCLIP cannot augment with."""
    known = [field.name for field in dataclasses.fields(open_clip.AugmentationCfg)]
    for key in options.aug_cfg:
        if key not in known:
            raise ValueError(f"--aug-cfg has no {key!r}; it takes {', '.join(known)}")
    if not options.aug_cfg:
        return
    with explained(f"OpenCLIP cannot augment with --aug-cfg {options.aug_cfg}", *MISFITS):
        augment = open_clip.image_transform(_TRIED_SIZE, is_train=True, aug_cfg={**options.aug_cfg})
        augment(Image.new("RGB", (_TRIED_SIZE, _TRIED_SIZE)))
        _check_crop(options.aug_cfg)


def _check_masking(options: TrainOptions, model: nn.Module) -> None:
    """Refuse a strategy, its schedule, or an image tower that it cannot mask; the model is masked.

    Args:
        options: Options.
        model: The model of the run.
    """
    if "masking" not in options.given:
        ratios = ("mask_ratio", "mask_ratio_min", "mask_schedule")
        for name in (*ratios, "masking_option", "merge", "merge_counts"):
            if name in options.given:
                raise ValueError(f"{flag_of(name)} needs --masking NAME")
    strategy = build_masking(options)
    _check_schedule(options)
    merges = options.merge != "none" or options.merge_counts
    if strategy.keeps_all and not merges and options.train_image_size is None:
        return
    dropout = options.force_patch_dropout
    if dropout is None:
        dropout = read_model_config(options)["vision_cfg"].get("patch_dropout", 0.0)
    flags = "" if options.masking == "none" and not merges else f"--masking {options.masking} "
    if options.train_image_size is not None:
        flags += f"--train-image-size {options.train_image_size} "
    if dropout > 0:
        raise ValueError(
            f"{flags}cannot work beside OpenCLIP's patch dropout of {dropout}; set "
            "--force-patch-dropout 0"
        )
    with explained(f"{flags}on {options.model}"):
        mask_tower(model, options)
    grid, size = patch_grid(model), input_size(options)
    if tuple(side // patch for side, patch in zip(size, grid.patch_size, strict=True)) != grid.size:
        own = [count * patch for count, patch in zip(grid.size, grid.patch_size, strict=True)]
        raise ValueError(
            f"the image tower of {options.model} is made for images of {own[0]} x {own[1]}, and "
            f"its image_size is {size[0]} x {size[1]}"
        )


def _check_batch_norm(options: TrainOptions, model: nn.Module) -> None:
    """Refuse single images where BatchNorm would be left one number of each channel."""
    is_synced = options.use_bn_sync and world_info_from_env()[2] > 1
    if options.batch_size > 1 or is_synced or not has_training_data(options):
        return
    image = torch.zeros((1, 3, *input_size(options)), device=next(model.parameters()).device)
    visual: Any = model.visual
    visual.train()
    try:
        with torch.no_grad():
            visual(image.to(get_input_dtype(options.precision)))
    # What else cannot be done on "meta" is no trouble of the run's.
    except Exception as error:
        if "more than 1 value per channel" in str(error):
            raise ValueError(
                f"--batch-size must be >= 2: of one image of {input_size(options)[0]} x "
                f"{input_size(options)[1]} BatchNorm in {options.model} sees one number of each "
                f"channel, got {options.batch_size}"
            ) from None


def _check_inference_masking(options: TrainOptions, model: nn.Module) -> None:
    """Refuse a masking for evaluations in training that the image tower cannot take."""
    name = options.eval_inference_masking
    if name in (None, "run", "none"):
        return
    with explained(f"--eval-inference-masking {name}"), masked_inference(model, name):
        pass


def _check_schedule(options: TrainOptions) -> None:
    name, end = options.mask_schedule, options.mask_ratio_end
    if name == "constant":
        if end is not None:
            raise ValueError("--mask-ratio-end needs --mask-schedule linear or cosine")
        return
    if end is None:
        raise ValueError(f"--mask-schedule {name} needs --mask-ratio-end F")
    with explained(f"--mask-schedule {name} on --masking {options.masking}"):
        create_masking(options.masking, **options.masking_options).set_mask_ratio(end)


def _check_text_masking(options: TrainOptions) -> None:
    if options.text_masking == "none":
        for name in ("text_tokens", "text_masking_option"):
            if name in options.given:
                raise ValueError(f"{flag_of(name)} needs --text-masking NAME other than none")
        return
    create_text_masking(
        options.text_masking,
        tokenizer=make_tokenizer(options),
        num_tokens=options.text_tokens,
        **options.text_masking_options,
    )


def _check_device(options: TrainOptions, model: nn.Module) -> None:
    """Refuse a device, other processes, or a way to reach them, that are not there.

    OpenCLIP's default, "cuda", falls back to the CPU; one that was asked for does not.
    """
    if options.dist_backend is not None:
        backends = [name for name in torch.distributed.Backend.backend_list if name != "undefined"]
        check_choice(options.dist_backend, backends, name="--dist-backend")
    if options.dist_url is not None and "://" not in options.dist_url:
        raise ValueError(
            f"--dist-url must be like env:// or tcp://HOST:PORT, got {options.dist_url}"
        )
    if "device" in options.given:
        usable_device(options.device)
    world_size = world_info_from_env()[2]
    if options.fsdp and world_size < 2:
        raise ValueError(
            "--fsdp shards a model over several processes, and this run has 1; see --nproc"
        )
    syncs = options.use_bn_sync and world_size > 1 and is_on_cpu(options)
    if syncs and any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise ValueError(
            f"--use-bn-sync must be left out on a CPU: PyTorch's SyncBatchNorm, which "
            f"{options.model} would have, runs on GPUs alone"
        )


def _check_reports(options: TrainOptions) -> None:
    """Refuse loggers that are not installed, and what Weights & Biases does not take."""
    for target in options.report_targets:
        for package in ("tensorboard", "wandb") if target == "all" else (target,):
            spec = importlib.util.find_spec(package)
            # A folder of that name, as wandb makes one, is a package without a file.
            if spec is None or (spec.origin is None and spec.submodule_search_locations):
                raise ValueError(
                    f"--report-to {options.report_to} needs the package {package}, which is not "
                    "installed"
                )
            if package == "wandb" and is_first_process():
                _check_wandb(options)


def _check_wandb(options: TrainOptions) -> None:
    import wandb

    with explained("--wandb-project-name", wandb.Error):
        wandb.Settings(project=options.wandb_project_name)
    is_away = wandb.setup().settings.mode in ("offline", "dryrun", "disabled")
    # A run that goes on must not end because a server is away meanwhile.
    if is_away or options.resume is not None:
        return
    try:
        wandb.login()
    except (wandb.Error, ValueError) as error:
        raise ValueError(
            f"--report-to wandb must be able to log in: {one_sentence(error)}; call `wandb login`, "
            "or set WANDB_API_KEY, or WANDB_MODE=offline"
        ) from None


def _check_folder(options: TrainOptions) -> None:
    """Refuse a run that exists already, one that cannot be made, and a resume from nothing."""
    if not keeps_logs(options):
        if options.resume == "latest":
            raise ValueError("--resume latest needs the run's --logs folder, got none")
        return
    folder = run_folder(options)
    with explained("--logs"):
        check_writable((folder or Path(options.logs) / "run") / OPTIONS_NAME)
    if folder is None:
        return
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8" and not str(folder.absolute()).isascii():
        # torch writes files under their names in UTF-8 and finds none under others.
        raise ValueError(
            f"the run's folder {folder} must have a name in ASCII where the locale's encoding is "
            f"{encoding}; set PYTHONUTF8=1 for others"
        )
    sentence = taken_name(options)
    # Who only asks what a run would cost hears this after the answer.
    if sentence is not None and not (options.check_only or options.trial):
        raise ValueError(sentence)
    if sentence is not None or not holds_run(folder):
        return
    # A run may come from a stranger.
    for place in (folder / EVAL_NAME, folder / MASKS_NAME):
        links = [place] if place.is_symlink() else linked_folders(place)
        if links:
            raise ValueError(
                f"{links[0]} is a link to a folder, in which the run would replace files; remove it"
            )
    files = training_files(options) if has_training_data(options) else []
    changes = changed_options(options, read_options_file(folder)[0], files=files)
    if changes and not options.accept_changes:
        raise ValueError(
            f"run {folder} cannot continue with other options or data ({', '.join(changes)}); "
            "use another --name, or --accept-changes"
        )


def _check_resumed(
    options: TrainOptions, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Refuse a checkpoint of another model, or of one that was trained otherwise."""
    # One process speaks for all of them; the file may be large.
    if options.resume is None or not is_first_process():
        return
    path: Path | None
    if options.resume == "latest":
        folder = run_folder(options)
        assert folder is not None
        damaged: dict[Path, ValueError] = {}
        path = newest_checkpoint(folder / CHECKPOINTS_NAME, on_damage=damaged.__setitem__)
        if path is None:
            refuse_all_damaged(folder / CHECKPOINTS_NAME, damaged)
            _check_none_lost(folder, trains=has_training_data(options))
            return
    else:
        path = find_checkpoint(options.resume)
    with explained("--resume"):
        checkpoint = load_checkpoint(path, use_mmap=True)
    trouble = find_non_finite(checkpoint) or damaged_entry(checkpoint)
    if trouble is not None:
        raise ValueError(f"--resume: {path} cannot go on: {trouble}")
    with explained(f"--resume: {path} does not fit {options.model}"):
        fit_weights(checkpoint["state_dict"], model)
    has_begun = (checkpoint.get("epoch", 0), checkpoint.get("position", 0)) > (0, 0)
    if has_begun and has_training_data(options):
        misfit = _other_optimizer(options, checkpoint)
        misfit = misfit or optimizer_misfit(optimizer, checkpoint.get("optimizer"))
        misfit = misfit or _misplacement(options, checkpoint)
        if misfit is not None:
            raise ValueError(f"--resume: {path} cannot go on: {misfit}")
        # What it says, it says again in the run.
        with explained(f"--resume: {path} cannot go on"), silenced(logging.CRITICAL):
            restore_masking(checkpoint, model=model, options=options)


def _check_none_lost(folder: Path, *, trains: bool) -> None:
    """Refuse to begin a run anew that is done, or had saved: what it has would be lost."""
    checkpoints = folder / CHECKPOINTS_NAME
    names = [path.name.removesuffix(DAMAGED_ENDING) for path in list_folder(checkpoints)]
    if any(map(RUN_FILE.fullmatch, names)):
        return
    steps, has_saved = trained_steps(folder) if trains else (0, False)
    is_done = (folder / EXPORT_NAME).exists()
    if trains:
        with suppress(ValueError):
            is_done = is_done or read_json_object(folder / EXIT_NAME, what="it").get("code") == 0
    if is_done or has_saved:
        taken = f"had saved after {counted(steps, 'step')}" if steps else "had saved"
        state = "is done" if is_done else taken
        raise ValueError(
            f"run {folder} {state}, and {checkpoints} holds no checkpoint to go on from; put one "
            f"back, use another --name, or remove {folder} to begin anew"
        )


def _other_optimizer(options: TrainOptions, checkpoint: Mapping[str, Any]) -> str | None:
    """Say where the record tells that another optimizer trained it, whose state is none of ours."""
    was = ((checkpoint.get("clip_pgs") or {}).get("recipe") or {}).get("opt", options.opt)
    if str(was).lower() == options.opt.lower():
        return None
    return (
        f"it was trained with --opt {was}, and this run has --opt {options.opt} (--pretrained "
        "takes the weights alone)"
    )


def _misplacement(options: TrainOptions, checkpoint: Mapping[str, Any]) -> str | None:
    """Say why a place that a checkpoint names cannot be one of this run's."""
    epoch, position = checkpoint.get("epoch", 0), checkpoint.get("position", 0)
    record = checkpoint.get("clip_pgs") or {}
    recipe = record.get("recipe") or {}
    last, flags = total_epochs(options), "--epochs"
    if isinstance(masked := recipe.get("epochs"), int):
        if (epoch, position) > (masked, 0):
            flags = "--epochs and --unmasked-epochs"
            for name in MASKED_ALONE:
                if name in recipe and getattr(options, name) != recipe[name]:
                    return (
                        f"its run has {counted(masked, 'masked epoch')} behind it and is in its "
                        f"unmasked epochs; {flag_of(name)} must stay {recipe[name]}, and "
                        "--unmasked-epochs may grow"
                    )
        else:
            last = options.epochs
    if (epoch, position) > (last, 0):
        return f"its epoch {epoch} lies behind the {last} of this run ({flags})"
    num_samples = num_training_samples(options)
    if num_samples is not None and position > num_samples:
        return f"its position in an epoch of {counted(num_samples, 'sample')} is {position}"
    cost = record.get("cost") or {}
    step = checkpoint.get("step", cost.get("steps"))
    if step != cost.get("steps", step):
        return f"its step is {step}, and its record counts {cost['steps']}"
    return None
