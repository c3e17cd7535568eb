"""The model, its weights and its augmentation."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import nn

from clip_pgs.checkpoint_io import (
    check_sum,
    find_checkpoint,
    fit_weights,
    newest_checkpoint,
    read_checkpoint,
)
from clip_pgs.common import CHECKPOINTS_NAME, one_sentence
from clip_pgs.integrations.open_clip.model_config import (
    MISFITS,
    build_on_meta,
    check_model_config,
    check_model_runs,
    check_preprocessing,
    largest_memory,
    read_json_object,
)
from clip_pgs.training.build import build_optimizer, create_model, optimizer_misfit
from clip_pgs.training.checks.data import has_training_data
from clip_pgs.training.options import MODEL_SCHEMAS, TrainOptions
from clip_pgs.training.run_folder import run_folder

# OpenCLIP's byte-pair vocabulary, of which the last token ends every caption.
_NUM_TOKENS = 49408
_TRIED_SIZE = 32


def check_model(args: TrainOptions) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Refuse a model, weights or augmentation that open_clip could not make.

    Returns:
        The model as the run will make it, unmasked and, as a rule, on the device "meta", and its
        optimizer.
    """
    config = read_model_config(args.model)
    text_is_open_clips = "hf_model_name" not in config.get("text_cfg", {})
    if args.lock_text and not args.lock_text_freeze_layer_norm and text_is_open_clips:
        raise ValueError(
            f"--lock-text needs --lock-text-freeze-layer-norm: the text tower of {args.model} "
            "locks its LayerNorm with the rest"
        )
    _check_vocabulary(args, config)
    is_own = args.model_config is not None or args.model.startswith(MODEL_SCHEMAS)
    if is_own or args.force_image_size is not None or args.force_context_length is not None:
        model = build_on_meta(
            config,
            name=args.model,
            image_size=image_size(args),
            context_length=args.force_context_length,
        )
        has_own_text = not config["text_cfg"].get("hf_model_name")
        if has_own_text:
            check_model_runs(model, name=args.model, context_length=context_length(args))
    if args.pretrained and not args.model.startswith(MODEL_SCHEMAS):
        _check_weights(args)
    _check_batch(args, config)
    _check_augmentation(args)
    return _try_model(args, config)


def _try_model(
    args: TrainOptions, config: dict[str, Any]
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Make the model with everything that has to be read or fetched for it."""
    has_weights = bool(args.pretrained) or args.model.startswith(MODEL_SCHEMAS)
    fetches_text = bool(config["text_cfg"].get("hf_model_name")) and not has_weights
    # transformers makes no model with weights on the device "meta".
    device = torch.device("cpu" if fetches_text else "meta")
    with _silence():
        try:
            model, _, _ = create_model(args, device)
        except (*MISFITS, OSError) as error:
            weights = f" with --pretrained {args.pretrained}" if args.pretrained else ""
            raise ValueError(
                f"open_clip cannot make {args.model}{weights}: {one_sentence(error)}"
            ) from None
        make_tokenizer(args)
        try:
            optimizer = build_optimizer(args, model)
        except MISFITS as error:
            raise ValueError(f"--opt {args.opt} cannot be made: {one_sentence(error)}") from None
    return model, optimizer


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep to ourselves what libraries say of a model that is only tried; the run says it again."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def make_tokenizer(args: TrainOptions) -> Any:
    """Return the model's tokenizer.

    Raises:
        ValueError: If it has to be fetched and cannot be.
    """
    try:
        return open_clip.get_tokenizer(
            args.model, cache_dir=args.cache_dir, context_length=args.force_context_length
        )
    except (*MISFITS, OSError) as error:
        raise ValueError(
            f"the tokenizer of --model {args.model} cannot be read: {one_sentence(error)}"
        ) from None


def check_resumed(args: TrainOptions, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse a checkpoint of another model, or of one that was trained otherwise."""
    # One process speaks for all of them; the file may be large.
    if args.resume is None or os.environ.get("RANK", "0") != "0":
        return
    if args.resume == "latest":
        folder = run_folder(args)
        path = folder and newest_checkpoint(
            folder / CHECKPOINTS_NAME, on_damage=lambda path, error: None
        )
        if path is None:
            return
    else:
        path = find_checkpoint(args.resume)
    try:
        checkpoint = read_checkpoint(path, use_mmap=True)
        check_sum(path)
        fit_weights(checkpoint["state_dict"], model)
    except ValueError as error:
        fault = f"{path} does not fit {args.model}: {error}"
        raise ValueError(f"--resume: {error if str(path) in str(error) else fault}") from None
    has_begun = (checkpoint.get("epoch", 0), checkpoint.get("position", 0)) > (0, 0)
    if has_begun and has_training_data(args):
        misfit = optimizer_misfit(optimizer, checkpoint.get("optimizer"))
        if misfit is not None:
            raise ValueError(f"--resume: {path} cannot go on: {misfit}")


def _check_vocabulary(args: TrainOptions, config: dict[str, Any]) -> None:
    """Refuse a text tower with fewer tokens than OpenCLIP's own tokenizer makes."""
    text = config["text_cfg"]
    has_other_tokenizer = text.get("hf_tokenizer_name") or text.get("hf_model_name")
    if has_other_tokenizer or "siglip" in args.model.lower():
        return
    size = text.get("vocab_size", _NUM_TOKENS)
    if size < _NUM_TOKENS:
        raise ValueError(
            f"the config of --model {args.model} has a vocab_size of {size}, less than the "
            f"{_NUM_TOKENS} tokens of OpenCLIP's tokenizer"
        )


def _check_batch(args: TrainOptions, config: dict[str, Any]) -> None:
    """Refuse batches of which not even the pixels fit into this machine."""
    size = image_size(args) or config["vision_cfg"].get("image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    batch_size = max(args.batch_size, args.unmasked_batch_size or 0)
    num_bytes = 4 * 3 * height * width * batch_size
    if num_bytes > largest_memory():
        raise ValueError(
            f"the pixels of a batch of {batch_size} images of {height} x {width} take "
            f"{num_bytes / 2**30:.0f} GiB, more than this machine has"
        )


def _check_augmentation(args: TrainOptions) -> None:
    """Refuse `--aug-cfg` with options, or values, that OpenCLIP cannot augment with."""
    fields = [field.name for field in dataclasses.fields(open_clip.AugmentationCfg)]
    for key in args.aug_cfg:
        if key not in fields:
            raise ValueError(f"--aug-cfg has no {key!r}; it takes {', '.join(fields)}")
    if not args.aug_cfg:
        return
    try:
        transform = open_clip.image_transform(
            _TRIED_SIZE, is_train=True, aug_cfg=dict(args.aug_cfg)
        )
        transform(Image.new("RGB", (_TRIED_SIZE, _TRIED_SIZE)))
    except MISFITS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"OpenCLIP cannot augment with --aug-cfg {args.aug_cfg}: {reason}"
        ) from None


def _check_weights(args: TrainOptions) -> None:
    """Refuse `--pretrained` that is no tag and no file of weights."""
    if open_clip.get_pretrained_cfg(args.model, args.pretrained):
        return
    if not Path(args.pretrained).exists():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(args.model)) or "none"
        raise ValueError(
            f"--pretrained {args.pretrained!r} is neither a file nor a tag of {args.model} "
            f"(tags: {tags})"
        )


def read_model_config(name: str) -> dict[str, Any]:
    """Return open_clip's config of a model.

    Raises:
        ValueError: If there is none, or it cannot be read.
    """
    what = f"the config of --model {name}"
    if name.startswith("local-dir:"):
        path = Path(name.removeprefix("local-dir:"), "open_clip_config.json")
        content = read_json_object(path, what=f"{what}, {path},")
        config = content.get("model_cfg", content)
        check_preprocessing(content.get("preprocess_cfg", {}), what=what)
    else:
        config = _known_config(name, what=what)
    if not config or "vision_cfg" not in config:
        raise ValueError(f"{what} has no vision_cfg")
    check_model_config(config, what=what)
    return config


def _known_config(name: str, *, what: str) -> Any:
    try:
        return open_clip.get_model_config(name)
    # Hugging Face's errors are OSErrors, or a ValueError for a name that cannot be.
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{what} cannot be read: {reason}") from None


def image_size(args: TrainOptions) -> int | list[int] | None:
    """Return `--force-image-size` as OpenCLIP takes it."""
    size = args.force_image_size
    return size[0] if size is not None and len(size) == 1 else size


def context_length(args: TrainOptions) -> int:
    """Return how many tokens the text tower takes."""
    if args.force_context_length is not None:
        return args.force_context_length
    default = open_clip.CLIPTextCfg().context_length
    return read_model_config(args.model)["text_cfg"].get("context_length", default)
