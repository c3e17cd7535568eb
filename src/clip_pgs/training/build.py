"""Model, optimizer, schedule and loss of a run, all made by OpenCLIP from its own options."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip_train.scheduler import const_lr, const_lr_cooldown, cosine_lr
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from clip_pgs.checkpoint_reading import (
    RUN_FILE,
    find_non_finite,
    find_weights,
    fit_weights,
    load_checkpoint,
)
from clip_pgs.common import MODEL_SCHEMAS, explained
from clip_pgs.files import CHECKPOINTS_NAME, MODEL_CONFIG_NAME, read_json_object
from clip_pgs.integrations.apply import masking_or_none, tower_masking
from clip_pgs.integrations.open_clip import (
    CaptionTrimmer,
    allow_short_text,
    apply_masking,
    caption_trimmer,
    is_text_trimming_lossless,
    remove_masking,
)
from clip_pgs.integrations.open_clip.compat import no_foreign_code, random_weights, weights_read_by
from clip_pgs.integrations.open_clip.model_config import (
    MISFITS,
    check_model_config,
    check_preprocessing,
)
from clip_pgs.masking import MaskingStrategy, create_masking
from clip_pgs.masking.baselines import NoMasking
from clip_pgs.training.chunked_loss import in_chunks
from clip_pgs.training.distributed import ShardedModel
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
        sharded: What `--fsdp` trains in place of the model; None trains the model itself.
    """

    model: open_clip.CLIP
    train_transform: Callable
    val_transform: Callable
    tokenize: Callable
    sharded: ShardedModel | None = None

    def training_transform(self, options: TrainOptions) -> Callable:
        """Return the transform of a phase's training images, of which it may say the size."""
        if options.train_image_size is None:
            return self.train_transform
        own: dict[str, Any] = self.model.visual.preprocess_cfg
        config = PreprocessCfg(**{**own, "size": options.train_image_size})
        return image_transform_v2(config, is_train=True, aug_cfg=options.aug_cfg)


def build_model(options: TrainOptions, device: torch.device) -> ModelParts:
    """Create the model, lock what is to be locked, mask its image tower, let captions be short.

    Args:
        options: Options; the weights depend on `options.seed`, on no rank.
        device: Where the model goes.
    """
    seed_everything(options.seed)
    model, train_transform, val_transform = create_model(options, device)
    if options.mae is not None:
        mask_tower(model, options)
        return ModelParts(model, train_transform, val_transform, make_tokenizer(options))
    has_weights = options.pretrained or options.model.startswith(MODEL_SCHEMAS)
    if is_coca(model) and not has_weights:
        # OpenCLIP leaves this parameter as the memory it finds, other in each process.
        projection = model.text_decoder.text_projection
        nn.init.normal_(projection, std=projection.shape[0] ** -0.5)
    if options.use_bn_sync and options.distributed:
        # PyTorch's own leaves out the activations that timm's layers hold.
        model = convert_sync_batchnorm(model)
    if options.changes_tower:
        mask_tower(model, options)
        masking = masking_or_none(model)
        strategy = NoMasking() if masking is None else masking.strategy
        if not (strategy.keeps_all or strategy.keeps_window or model.visual.saves_flops):
            _logger.warning(
                "The image tower of %s is convolutional: --masking %s hides cells of 32 pixels "
                "from it, which regularizes and saves no FLOPs",
                options.model,
                options.masking,
            )
    allow_short_text(model)
    if options.text_tokens is not None and not is_text_trimming_lossless(model):
        _logger.warning(
            "The text tower of %s looks at padding too: --text-tokens changes what it makes of "
            "a caption that is short anyway",
            options.model,
        )
    return ModelParts(model, train_transform, val_transform, make_tokenizer(options))


def mask_tower(model: nn.Module, options: TrainOptions) -> None:
    """Mask a run's model; one that would see its images as a plain one does stays plain.

    Raises:
        ValueError: If the strategy or its tower cannot.
    """
    apply_masking(
        model,
        build_masking(options),
        pack_tokens=options.pack_tokens,
        merge=options.merge,
        merge_counts=options.merge_counts,
        image_size=options.train_image_size,
    )
    if not tower_masking(model).is_active(training=True):
        remove_masking(model)


def build_masking(options: TrainOptions) -> MaskingStrategy:
    """Create the strategy of a run.

    Raises:
        ValueError: If there is no such strategy, or an option is wrong.
    """
    if options.mae is None:
        return create_masking(options.masking, **options.masking_options)
    from clip_pgs.integrations.open_clip.mae import create_mae_masking

    rest = {name: value for name, value in options.masking_options.items() if name != "mask_ratio"}
    config = autoencoder_record(options)["model_cfg"]
    return create_mae_masking(options.masking, config, sign=options.mae_sign, **rest)


def autoencoder_record(options: TrainOptions) -> dict[str, Any]:
    """Return what rebuilds the masked autoencoder of a run.

    Raises:
        ValueError: If the options make none, or one that cannot be exported.
    """
    from clip_pgs.integrations.open_clip.mae import (
        check_hidden_share,
        hub_configs,
        mae_config,
        mae_record,
    )

    assert options.mae is not None
    what = f"--model-config {options.model_config}"
    config = mae_config(
        options.mae, what=what, mask_ratio=options.masking_options.get("mask_ratio")
    )
    check_hidden_share(config, what=what)
    record = mae_record(
        config,
        mean=options.image_mean,
        std=options.image_std,
        interpolation=options.image_interpolation,
        resize_mode=options.image_resize_mode,
    )
    # Before the run, not at its end.
    hub_configs(record)
    return record


def create_model(options: TrainOptions, device: torch.device) -> tuple[Any, Callable, Callable]:
    """Create OpenCLIP's model with the weights it starts from, and lock what is to be locked.

    Args:
        options: Options.
        device: Where it goes; "meta" tries everything without memory for weights.

    Returns:
        The model, its transform of training images, and that of others.

    Raises:
        ValueError: If weights cannot be read or do not fit.
        RuntimeError, OSError: If something of it cannot be fetched.
    """
    if options.mae is not None:
        from clip_pgs.integrations.open_clip.mae import MaeModel

        with device:
            autoencoder = MaeModel(autoencoder_record(options))
        train_transform = autoencoder.transform(is_train=True, aug_cfg=dict(options.aug_cfg))
        return autoencoder, train_transform, autoencoder.transform(is_train=False)
    pretrained = first_weights(options)
    place = weights_place(options)
    if place is not None and place.is_dir():
        pretrained = str(find_weights(place))
    on_meta = device if device.type == "meta" else contextlib.nullcontext()
    is_random = contextlib.nullcontext() if pretrained else random_weights()
    with weights_read_by(_read_weights, _explain_misfit), on_meta, is_random, no_foreign_code():
        model, train_transform, val_transform = open_clip.create_model_and_transforms(
            options.model,
            pretrained,
            precision=options.precision,
            device=device,
            force_quick_gelu=options.force_quick_gelu,
            force_custom_text=options.force_custom_text,
            force_patch_dropout=options.force_patch_dropout,
            force_image_size=image_size(options),
            force_context_length=options.force_context_length,
            image_mean=options.image_mean,
            image_std=options.image_std,
            image_interpolation=options.image_interpolation,
            image_resize_mode=options.image_resize_mode,
            aug_cfg=options.aug_cfg,
            pretrained_image=options.pretrained_image,
            output_dict=True,
            cache_dir=options.cache_dir,
            **logit_options(options),
        )
    if options.lock_image:
        model.lock_image_tower(
            unlocked_groups=options.lock_image_unlocked_groups,
            freeze_bn_stats=options.lock_image_freeze_bn_stats,
        )
    if options.lock_text:
        model.lock_text_tower(
            unlocked_layers=options.lock_text_unlocked_layers,
            freeze_layer_norm=options.lock_text_freeze_layer_norm,
        )
    if options.grad_checkpointing:
        model.set_grad_checkpointing()
    return model, train_transform, val_transform


def weights_place(options: TrainOptions) -> Path | None:
    """Return the file or folder that `--pretrained` names; a tag goes first, as in OpenCLIP."""
    named = options.pretrained
    if not named or open_clip.get_pretrained_cfg(options.model, named):
        return None
    return Path(named) if Path(named).exists() else None


def first_weights(options: TrainOptions) -> str | None:
    """Return the tag, file or folder that `--pretrained` names.

    None also where nothing is there any more and the run goes on from a checkpoint of its own: a
    job that is queued again must not need what was cleared away meanwhile.
    """
    named = options.pretrained
    if named is None or weights_place(options) is not None or options.resume is None:
        return named
    if open_clip.get_pretrained_cfg(options.model, named):
        return named
    files = Path(options.logs, options.name or "", CHECKPOINTS_NAME).glob("*.pt")
    if options.resume == "latest" and not any(RUN_FILE.fullmatch(path.name) for path in files):
        return named
    return None


def _read_weights(path: str) -> dict[str, Tensor]:
    weights = load_checkpoint(path, use_mmap=True)["state_dict"]
    trouble = find_non_finite({"state_dict": weights})
    if trouble is not None:
        raise ValueError(f"{path} cannot be trained on: {trouble}")
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


def make_tokenizer(options: TrainOptions) -> Callable:
    """Return the model's tokenizer.

    Raises:
        ValueError: If it has to be fetched and cannot be.
    """
    if options.mae is not None:
        from clip_pgs.integrations.open_clip.mae import no_tokens

        return no_tokens
    what = f"the tokenizer of --model {options.model} cannot be read"
    with explained(what, *MISFITS, OSError, ImportError), no_foreign_code():
        return open_clip.get_tokenizer(
            options.model, cache_dir=options.cache_dir, context_length=options.force_context_length
        )


def read_model_config(options: TrainOptions) -> dict[str, Any]:
    """Return open_clip's config of a run's model, or as much of it as a masked autoencoder has.

    Raises:
        ValueError: If there is none, or it cannot be read.
    """
    if options.mae is not None:
        config = autoencoder_record(options)["model_cfg"]
        return {**config, "vision_cfg": config, "text_cfg": {}}
    name = options.model
    what = f"the config of --model {name}"
    if name.startswith("local-dir:"):
        path = Path(name.removeprefix("local-dir:"), MODEL_CONFIG_NAME)
        content = read_json_object(path, what=f"{what} ({path})")
        config = content.get("model_cfg", content)
        check_preprocessing(content.get("preprocess_cfg", {}), what=what)
    else:
        # Hugging Face's errors are OSErrors, or a ValueError for a name that cannot be.
        with explained(f"{what} cannot be read", OSError, ValueError):
            config = open_clip.get_model_config(name)
    if not config or "vision_cfg" not in config:
        raise ValueError(f"{what} has no vision_cfg")
    check_model_config(config, what=what)
    return config


def model_digest(options: TrainOptions) -> str:
    """Return a digest of the config of a run's model, 12 hexadecimal digits."""
    config = json.dumps(read_model_config(options), sort_keys=True, default=str)
    return hashlib.sha256(config.encode()).hexdigest()[:12]


def image_size(options: TrainOptions) -> int | list[int] | None:
    """Return `--force-image-size` as OpenCLIP takes it."""
    size = options.force_image_size
    return size[0] if size is not None and len(size) == 1 else size


def input_size(options: TrainOptions) -> tuple[int, int]:
    """Return height and width of the images that a phase trains on."""
    size = options.train_image_size or image_size(options)
    size = size or read_model_config(options)["vision_cfg"].get("image_size", 224)
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def context_length(options: TrainOptions) -> int:
    """Return how many tokens the text tower takes."""
    default = open_clip.CLIPTextCfg().context_length
    recorded = read_model_config(options)["text_cfg"].get("context_length", default)
    return options.force_context_length or recorded


def supported_precision(precision: str, device: torch.device) -> str:
    """Return the precision a device trains in when `precision` is asked for.

    Float16 autocast ("amp", OpenCLIP's default) is for GPUs: on a CPU it is slower than float32
    and loses range, so the CPU trains in float32 and the log says so.
    """
    if precision == "amp" and device.type == "cpu":
        _logger.info("--precision amp needs a GPU: training in fp32 on the CPU")
        return "fp32"
    return precision


def is_on_cpu(options: TrainOptions) -> bool:
    """Return whether a run trains on a CPU, as it was told to or for want of a GPU."""
    return options.device == "cpu" or not torch.cuda.is_available()


def create_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler | None:
    """Return the loss scaler that float16 autocast needs, or None for any other precision."""
    return torch.amp.GradScaler(device.type) if precision == "amp" else None


def is_coca(model: nn.Module) -> bool:
    """Return whether a model also writes captions (CoCa, https://arxiv.org/abs/2205.01917)."""
    return isinstance(model, open_clip.CoCa)


def makes_coca(options: TrainOptions) -> bool:
    """Return whether a run's model will be one of those."""
    return "multimodal_cfg" in read_model_config(options)


def logit_options(options: TrainOptions) -> dict[str, float]:
    """Return the model options that set how logits start: SigLIP's with `--siglip`.

    CoCa has a loss of its own, which takes no bias.
    """
    if not options.siglip or makes_coca(options):
        return {}
    return {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}


def build_trimmer(options: TrainOptions, model: nn.Module) -> CaptionTrimmer | None:
    """Return what cuts captions to what reaches their features, None where padding does, too."""
    if options.mae is not None:
        return None
    # Groups of several lengths are compiled anew for each combination, and FSDP would gather the
    # weights for each of them, of which processes may have different numbers.
    is_one_group = options.torchcompile or options.fsdp
    return caption_trimmer(model, shares=(1.0,)) if is_one_group else caption_trimmer(model)


def build_loss(options: TrainOptions, model: nn.Module) -> nn.Module:
    """Create OpenCLIP's loss for a model; options needs `rank` and `world_size`."""
    if options.mae is not None:
        from clip_pgs.integrations.open_clip.mae import MeanOfRows

        return MeanOfRows()
    # OpenCLIP goes by the name, which says nothing where the model comes from one's own file.
    name = "coca" if is_coca(model) else options.model.lower().replace("coca", "")
    loss = open_clip.create_loss(argparse.Namespace(**{**vars(options.openclip), "model": name}))
    return loss if options.loss_chunk is None else in_chunks(loss, options.loss_chunk)


def build_optimizer(options: TrainOptions, model: nn.Module) -> torch.optim.Optimizer:
    """Create the optimizer: AdamW with OpenCLIP's groups, or any of timm's as `timm/NAME`."""
    opt = options.opt.lower()
    if opt.startswith("timm/"):
        from timm.optim import create_optimizer_v2

        given = {"momentum": options.momentum, "eps": options.eps}
        settings: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        if options.beta1 is not None:
            settings["betas"] = (options.beta1, options.beta2)
        return create_optimizer_v2(
            model, opt.removeprefix("timm/"), lr=options.lr, weight_decay=options.wd, **settings
        )
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if not _decays(name, p)], "weight_decay": 0.0},
        {"params": [p for name, p in trained if _decays(name, p)], "weight_decay": options.wd},
    ]
    # OpenCLIP's parser gives them their defaults.
    assert options.beta1 is not None
    assert options.beta2 is not None
    assert options.eps is not None
    # Fused: fastest, and it can skip a step without the host (see `update_weights`).
    return torch.optim.AdamW(
        groups, lr=options.lr, betas=(options.beta1, options.beta2), eps=options.eps, fused=True
    )


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not any(
        part in name for part in ("bn", "ln", "bias", "logit_scale")
    )


def build_schedule(
    options: TrainOptions, optimizer: torch.optim.Optimizer, *, steps_per_epoch: int
) -> Callable[[int], float]:
    """Create the learning-rate schedule: called with a step, it sets and returns the rate."""
    if options.skip_scheduler:
        return lambda step: optimizer.param_groups[0]["lr"]
    common = (optimizer, options.lr, options.warmup, steps_per_epoch * options.epochs)
    if options.lr_scheduler == "const-cooldown":
        assert options.epochs_cooldown is not None
        return const_lr_cooldown(
            *common,
            steps_per_epoch * options.epochs_cooldown,
            options.lr_cooldown_power,
            options.lr_cooldown_end,
        )
    return cosine_lr(*common) if options.lr_scheduler == "cosine" else const_lr(*common)
