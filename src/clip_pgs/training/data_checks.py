"""Training, validation and ImageNet data: there, of a known kind, and enough for one step."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from open_clip_train.distributed import world_info_from_env
from torchvision.datasets import ImageFolder

from clip_pgs.checkpoint_reading import file_digest
from clip_pgs.common import explained
from clip_pgs.data.bad_samples import Skip
from clip_pgs.data.build import DatasetKind, dataset_kind, read_table
from clip_pgs.data.decoding import pixel_normalizer
from clip_pgs.data.shards import (
    count_samples,
    expand_shards,
    is_remote,
    is_seekable,
    upsampling_weights,
)
from clip_pgs.data.tar import index_digests, index_shards, size_shards
from clip_pgs.tables import counted
from clip_pgs.training.build import input_size
from clip_pgs.training.options import TrainOptions
from clip_pgs.training.phases import phase_options

# Through it go the batches of data workers, and containers have little of it.
SHARED_MEMORY = Path("/dev/shm")

_IMAGENET_CLASSES = 1000
# What torch's loaders fetch ahead for each worker.
_PREFETCH = 2
_FLOAT_BYTES = 4
# Their order is drawn in memory, 8 bytes each.
_MAX_SYNTHETIC = 2**28


def check_data(options: TrainOptions) -> None:
    """Refuse data that is missing, of an unknown kind, or too little for one optimizer step."""
    if has_training_data(options):
        _check_training_data(options)
    elif not (options.val_data or options.imagenet_val or options.imagenet_v2):
        raise ValueError("there is no data; give --train-data (or --dataset-type synthetic)")
    if options.val_data is not None:
        _check_files(options, options.val_data, flag="--val-data")
    _check_imagenet(options)


def has_training_data(options: TrainOptions) -> bool:
    """Return whether a run trains; else it only evaluates, as OpenCLIP does."""
    return options.train_data is not None or options.dataset_type == "synthetic"


def training_kind(options: TrainOptions) -> DatasetKind:
    """Return the kind of the training data."""
    return dataset_kind(options.dataset_type, options.train_data, flag="--train-data")


def num_training_samples(options: TrainOptions) -> int | None:
    """Return the samples of one epoch, None where nothing states them."""
    if training_kind(options) == "csv":
        return len(read_table(options, options.train_data or ""))
    if options.train_num_samples is not None or training_kind(options) == "synthetic":
        return options.train_num_samples
    shards = expand_shards(options.train_data or "")
    if all(map(is_seekable, shards)):
        return sum(size_shards(shards)[0])
    return count_samples(shards)


def training_files(options: TrainOptions) -> list[str]:
    """Return what identifies the training data: each file's name, bytes and samples, in order.

    A run may find the same files in another folder.
    """
    kind = training_kind(options)
    if kind == "synthetic":
        return []
    if kind == "csv":
        table = read_table(options, options.train_data or "")
        if os.path.isdir(table.path):
            return [_describe_folder(table.path, table.images)]
        return [_describe_file(options.train_data or "", len(table))]
    shards = expand_shards(options.train_data or "")
    if options.dataset_resampled or not all(map(is_seekable, shards)):
        return [_describe_file(shard) for shard in shards]
    sizes, _ = size_shards(shards)
    return [_describe_file(shard, size) for shard, size in zip(shards, sizes, strict=True)]


def training_indexes(options: TrainOptions, *, make: bool = False) -> list[str | None]:
    """Return digests of the lists of members of the training data's shards.

    Args:
        options: The run's.
        make: Index the shards. Else a digest is known of those alone that this process has indexed
            before, as it has all of them once the stream is built.

    Returns:
        A digest, or None, for each shard; nothing where the data is no shards.
    """
    if not has_training_data(options) or training_kind(options) != "webdataset":
        return []
    shards = expand_shards(options.train_data or "")
    if make:
        index_shards(shards)
    return index_digests(shards)


def held_out_digests(options: TrainOptions) -> dict[str, str]:
    """Return a digest of each set that validation measures on, by the name of its option.

    It is made of what training data are compared by: names and sizes of files, what a table holds,
    and the lists of members of shards, which are known once the stream is built.
    """
    told: dict[str, list[str]] = {}
    path = options.val_data
    if path is not None:
        kind = dataset_kind(options.dataset_type, path, flag="--val-data")
        if kind == "csv":
            told["val_data"] = [_describe_file(path), file_digest(Path(path))]
        elif kind == "webdataset":
            shards = expand_shards(path)
            told["val_data"] = [*map(_describe_file, shards), *map(str, index_digests(shards))]
    for name in ("imagenet_val", "imagenet_v2"):
        folder = getattr(options, name)
        if folder is not None:
            places = os.walk(folder, followlinks=True)
            images = sorted(os.path.join(p, file) for p, _, files in places for file in files)
            told[name] = [_describe_folder(folder, images)]
    texts = {name: os.fsencode("\n".join(lines)) for name, lines in told.items()}
    return {name: hashlib.sha256(text).hexdigest()[:12] for name, text in texts.items()}


def _describe_folder(folder: str | Path, images: Sequence[str]) -> str:
    """Return what tells the images of a folder, by names and sizes, from what they become.

    The folder's own name does not count: it may be moved.
    """
    num_bytes, listed = 0, hashlib.sha256()
    for image in images:
        # A link to nothing is a sample that is skipped.
        size = os.path.getsize(image) if os.path.isfile(image) else 0
        num_bytes += size
        listed.update(os.fsencode(f"{os.path.relpath(image, folder)}\0{size}\0"))
    names = f"names and sizes {listed.hexdigest()[:8]}"
    return f"images: {num_bytes} bytes, {names}, {len(images)} samples"


def _describe_file(path: str, num_samples: int | None = None) -> str:
    if path.startswith("pipe:"):
        return path
    samples = "" if num_samples is None else f", {num_samples} samples"
    name = path.rpartition("/")[2]
    return name if is_remote(path) else f"{name}: {os.path.getsize(path)} bytes{samples}"


def samples_per_step(options: TrainOptions) -> int:
    """Return the samples of one optimizer step over all processes."""
    return options.batch_size * options.accum_freq * world_info_from_env()[2]


def _check_training_data(options: TrainOptions) -> None:
    kind, num_processes = training_kind(options), world_info_from_env()[2]
    _check_files(options, options.train_data, flag="--train-data")
    if options.dataset_resampled and kind != "webdataset":
        raise ValueError(f"--dataset-resampled draws shards; it does not apply to {kind} data")
    if options.train_data_upsampling_factors is not None:
        if not options.dataset_resampled:
            raise ValueError("--train-data-upsampling-factors needs --dataset-resampled")
        upsampling_weights(options.train_data or "", options.train_data_upsampling_factors)
    if kind == "webdataset" and not options.dataset_resampled:
        shards = expand_shards(options.train_data or "")
        if not all(map(is_seekable, shards)) and len(shards) < num_processes:
            raise ValueError(
                f"{counted(len(shards), 'shard')} cannot feed {num_processes} processes, "
                "as such can only be read from the beginning; each needs one of its own (or "
                "--dataset-resampled)"
            )

    num_samples = num_training_samples(options)
    if kind == "synthetic" and (num_samples or 0) > _MAX_SYNTHETIC:
        raise ValueError(
            f"--train-num-samples of synthetic data must be at most {_MAX_SYNTHETIC}, "
            f"got {num_samples}"
        )
    if num_samples is None:
        raise ValueError(
            f"nothing says how many samples there are in {options.train_data or 'synthetic data'}: "
            "give --train-num-samples, or shards a sizes.json"
        )
    damaged = _damaged_shards(options, kind) if num_samples == 0 else []
    damage = f"; {damaged[0]}" if damaged else ""
    for phase in phase_options(options):
        needed = samples_per_step(phase)
        prefix = "--" if phase is options else "--unmasked-"
        if needed == 1 and options.mae is None:
            raise ValueError(
                f"{prefix}batch-size 1 x {prefix}accum-freq 1 x 1 process is a step of one sample, "
                "whose contrastive loss is 0: there is nothing to tell it from"
            )
        if num_samples < needed:
            raise ValueError(
                f"{counted(num_samples, 'training sample')}: less than one optimizer step, which "
                f"takes {needed} ({prefix}batch-size {phase.batch_size} x {prefix}accum-freq "
                f"{phase.accum_freq} x {num_processes} process{'es' * (num_processes > 1)}){damage}"
            )


def shard_warnings(options: TrainOptions) -> list[str]:
    """Return a sentence where a check finds damaged training shards, which a run names itself."""
    if not (options.check_only and has_training_data(options)):
        return []
    damaged = _damaged_shards(options, training_kind(options))
    if not damaged:
        return []
    verb = "is" if len(damaged) == 1 else "are"
    return [
        f"{counted(len(damaged), 'training shard')} {verb} damaged, of which the rest is read: "
        f"{damaged[0]}"
    ]


def _damaged_shards(options: TrainOptions, kind: DatasetKind) -> list[Skip]:
    shards = expand_shards(options.train_data or "") if kind == "webdataset" else []
    return size_shards(shards)[1] if all(map(is_seekable, shards)) else []


def _check_files(options: TrainOptions, path: str | None, *, flag: str) -> None:
    kind = dataset_kind(options.dataset_type, path, flag=flag)
    if kind == "synthetic":
        return
    assert path is not None
    with explained(flag):
        if kind == "csv":
            read_table(options, path)
        else:
            expand_shards(path)


def _check_imagenet(options: TrainOptions) -> None:
    folders = {"--imagenet-val": options.imagenet_val, "--imagenet-v2": options.imagenet_v2}
    for flag, folder in folders.items():
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"{flag} {folder!r} is not a folder")
    if options.imagenet_val is not None:
        with explained(f"--imagenet-val {options.imagenet_val!r}", OSError):
            num_classes = len(ImageFolder(options.imagenet_val).classes)
        if num_classes != _IMAGENET_CLASSES:
            raise ValueError(
                f"--imagenet-val {options.imagenet_val!r} must have a folder for each of "
                f"ImageNet's {_IMAGENET_CLASSES} classes, whose numbers are the folders' places, "
                f"got {num_classes}; --eval-suite scores sets of other classes"
            )
    if options.imagenet_v2 is not None and importlib.util.find_spec("imagenetv2_pytorch") is None:
        raise ValueError("--imagenet-v2 needs the package imagenetv2_pytorch, not installed")


def check_shared_memory(options: TrainOptions) -> None:
    """Refuse batches of which the workers' cannot be kept in shared memory at the same time."""
    if options.workers == 0 or not SHARED_MEMORY.is_dir():
        return
    is_writable = os.access(SHARED_MEMORY, os.W_OK)
    needed, free = _num_shared_bytes(options), shutil.disk_usage(SHARED_MEMORY).free * is_writable
    if needed > free:
        raise ValueError(
            f"the batches on their way from --workers {options.workers} need {_size(needed)} of "
            f"shared memory, and {SHARED_MEMORY} has {_size(free)}: give the container more "
            f"(docker run --shm-size {needed // 2**30 + 1}g), or take fewer --workers or a smaller "
            "--batch-size"
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.0f} kB"


def _num_shared_bytes(options: TrainOptions) -> int:
    """Return the most bytes that batches of a loader of the run take, its processes together."""
    height, width = input_size(options)
    num_values = 3 * height * width
    ahead = _PREFETCH * options.workers + 1
    has_held_out = options.val_data or options.imagenet_val or options.imagenet_v2
    held_out = options.batch_size if has_held_out else 0
    sizes = [ahead * held_out * num_values * _FLOAT_BYTES]
    if has_training_data(options):
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        transform = open_clip.image_transform(
            (height, width), is_train=True, aug_cfg=dict(options.aug_cfg)
        )
        is_bytes = pixel_normalizer(transform, device=torch.device("cpu")) is not None
        num_samples = num_training_samples(options) or 0
        for phase in phase_options(options):
            step = processes * phase.batch_size
            num_images = min(ahead, num_samples // step) * step
            sizes.append(num_images * num_values * (1 if is_bytes else _FLOAT_BYTES))
    return max(sizes)
