"""Training, validation and ImageNet data: there, of a known kind, and enough for one step."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from open_clip_train.distributed import world_info_from_env

from clip_pgs.data.shards import (
    count_samples,
    expand_shards,
    is_remote,
    is_seekable,
    upsampling_weights,
)
from clip_pgs.data.stream import DatasetKind, dataset_kind
from clip_pgs.data.streaming import check_enough_shards
from clip_pgs.data.tables import PairTable, read_pairs
from clip_pgs.data.tar import size_shards
from clip_pgs.training.options import TrainOptions
from clip_pgs.training.phases import phase_options

# Their order is drawn in memory, 8 bytes each.
_MAX_SYNTHETIC = 2**28


def check_data(args: TrainOptions) -> None:
    """Refuse data that is missing, of an unknown kind, or too little for one optimiser step."""
    if has_training_data(args):
        _check_training_data(args)
    elif not (args.val_data or args.imagenet_val or args.imagenet_v2):
        raise ValueError("there is no data; give --train-data (or --dataset-type synthetic)")
    if args.val_data is not None:
        _check_files(args, args.val_data, flag="--val-data")
    _check_imagenet(args)


def has_training_data(args: TrainOptions) -> bool:
    """Return whether a run trains; else it only evaluates, as OpenCLIP does."""
    return args.train_data is not None or args.dataset_type == "synthetic"


def training_kind(args: TrainOptions) -> DatasetKind:
    """Return the kind of the training data."""
    return dataset_kind(args.dataset_type, args.train_data, flag="--train-data")


def num_training_samples(args: TrainOptions) -> int | None:
    """Return the samples of one epoch, None where nothing states them."""
    if training_kind(args) == "csv":
        return len(_read_table(args, args.train_data or ""))
    if args.train_num_samples is not None or training_kind(args) == "synthetic":
        return args.train_num_samples
    shards = expand_shards(args.train_data or "")
    if all(map(is_seekable, shards)):
        return sum(size_shards(shards)[0])
    return count_samples(shards)


def training_files(args: TrainOptions) -> list[str]:
    """Return what identifies the training data: each file's name, bytes and samples, in order.

    A run may find the same files in another folder.
    """
    kind = training_kind(args)
    if kind == "synthetic":
        return []
    if kind == "csv":
        return [
            _describe_file(args.train_data or "", len(_read_table(args, args.train_data or "")))
        ]
    shards = expand_shards(args.train_data or "")
    if args.dataset_resampled or not all(map(is_seekable, shards)):
        return [_describe_file(shard) for shard in shards]
    sizes, _ = size_shards(shards)
    return [_describe_file(shard, size) for shard, size in zip(shards, sizes, strict=True)]


def _describe_file(path: str, num_samples: int | None = None) -> str:
    if path.startswith("pipe:"):
        return path
    samples = "" if num_samples is None else f", {num_samples} samples"
    name = path.rpartition("/")[2]
    return name if is_remote(path) else f"{name}: {os.path.getsize(path)} bytes{samples}"


def samples_per_step(args: TrainOptions) -> int:
    """Return the samples of one optimiser step over all processes."""
    return args.batch_size * args.accum_freq * _num_processes()


def _num_processes() -> int:
    return world_info_from_env()[2]


def _check_training_data(args: TrainOptions) -> None:
    kind = training_kind(args)
    _check_files(args, args.train_data, flag="--train-data")
    if args.dataset_resampled and kind != "webdataset":
        raise ValueError(f"--dataset-resampled draws shards; it does not apply to {kind} data")
    if args.train_data_upsampling_factors is not None:
        if not args.dataset_resampled:
            raise ValueError("--train-data-upsampling-factors needs --dataset-resampled")
        upsampling_weights(args.train_data or "", args.train_data_upsampling_factors)
    if kind == "webdataset" and not args.dataset_resampled:
        shards = expand_shards(args.train_data or "")
        if not all(map(is_seekable, shards)):
            check_enough_shards(len(shards), _num_processes())

    num_samples = num_training_samples(args)
    if kind == "synthetic" and (num_samples or 0) > _MAX_SYNTHETIC:
        raise ValueError(
            f"--train-num-samples of synthetic data must be at most {_MAX_SYNTHETIC}, "
            f"got {num_samples}"
        )
    if num_samples is None:
        reason = (
            "synthetic data has no size of its own"
            if kind == "synthetic"
            else f"no sizes.json beside {args.train_data} says how many samples there are"
        )
        raise ValueError(f"{reason}; give --train-num-samples")
    damage = _first_damage(args, kind) if num_samples == 0 else ""
    for phase_args in phase_options(args):
        needed = samples_per_step(phase_args)
        prefix = "--" if phase_args is args else "--unmasked-"
        if needed == 1:
            raise ValueError(
                f"{prefix}batch-size 1 x {prefix}accum-freq 1 x 1 process is a step of one sample, "
                "whose contrastive loss is 0: there is nothing to tell it from"
            )
        if num_samples < needed:
            raise ValueError(
                f"{num_samples} training samples are less than one optimiser step, which takes "
                f"{needed} ({prefix}batch-size {phase_args.batch_size} x {prefix}accum-freq "
                f"{phase_args.accum_freq} x {_num_processes()} processes){damage}"
            )


def _first_damage(args: TrainOptions, kind: DatasetKind) -> str:
    """Say what is wrong with the first shard that holds no sample."""
    shards = expand_shards(args.train_data or "") if kind == "webdataset" else []
    if not shards or not all(map(is_seekable, shards)):
        return ""
    return next((f"; {skip}" for skip in size_shards(shards)[1]), "")


def _check_files(args: TrainOptions, path: str | None, *, flag: str) -> None:
    kind = dataset_kind(args.dataset_type, path, flag=flag)
    if kind == "synthetic":
        return
    assert path is not None
    try:
        if kind == "csv":
            _read_table(args, path)
        else:
            expand_shards(path)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


def _read_table(args: TrainOptions, path: str) -> PairTable:
    return read_pairs(
        Path(path),
        image_key=args.csv_img_key,
        caption_key=args.csv_caption_key,
        separator=args.csv_separator,
    )


def _check_imagenet(args: TrainOptions) -> None:
    folders = {"--imagenet-val": args.imagenet_val, "--imagenet-v2": args.imagenet_v2}
    for flag, folder in folders.items():
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"{flag} {folder!r} is not a folder")
    if args.imagenet_val is not None and not any(
        child.is_dir() for child in Path(args.imagenet_val).iterdir()
    ):
        raise ValueError(f"--imagenet-val {args.imagenet_val!r} holds no folder per class")
    if args.imagenet_v2 is not None and importlib.util.find_spec("imagenetv2_pytorch") is None:
        raise ValueError("--imagenet-v2 needs the package imagenetv2_pytorch, not installed")
