"""Image and text features of one model, computed once and shared by every suite."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clip_pgs.evaluation.datasets.datasets import EvalSet, count_shards, read_class_names
from clip_pgs.evaluation.features.feature_cache import Entry, FeatureCache
from clip_pgs.evaluation.features.fingerprints import data_fingerprint
from clip_pgs.evaluation.models.models import LoadedModel
from clip_pgs.evaluation.samples import open_samples


class NonFiniteFeaturesError(ValueError):
    """A model gave a NaN or an infinity; metrics would turn it into a plausible number."""


@dataclass(frozen=True)
class Features:
    """The images of one split, encoded.

    Attributes:
        images: What the image tower returns, not normalised. Shape (N, D), float32, on the CPU.
        labels: Class of each image, shape (N,), int64, or which classes it shows, shape (N, C);
            None for images with captions.
        captions: The captions of each image, or None.
        classes: Names of the classes, or None.
    """

    images: Tensor
    labels: Tensor | None
    captions: list[list[str]] | None = None
    classes: list[str] | None = None


def image_features(
    loaded: LoadedModel,
    eval_set: EvalSet,
    *,
    split: str = "test",
    device: torch.device,
    batch_size: int,
    workers: int,
    amp: bool,
    cache: FeatureCache,
) -> Features:
    """Encode the images of a split, or find them in the cache.

    Args:
        loaded: The model, on `device`; it is encoded with in eval mode and left in its own.
        eval_set: The data set; its suite makes no difference.
        split: "test" or "train".
        device: Where the model is.
        batch_size: Images per step, >= 1.
        workers: Processes that read images.
        amp: Whether to use half precision.
        cache: Of this model.

    Raises:
        FileNotFoundError: If the data set or the split is not there.
        DamagedDataError: If a file of it is not as it should be.
        NonFiniteFeaturesError: If a feature is not finite.
    """
    num_shards = count_shards(eval_set.location, split)
    classes = read_class_names(eval_set.location)
    data = data_fingerprint(eval_set.location, split)
    key = cache.key("images", data or f"{eval_set.location} {split}", device=device, amp=amp)
    entry = cache.get(key)
    if entry is None:
        place = eval_set.name if split == "test" else f"{eval_set.name} ({split})"
        samples = open_samples(
            eval_set.location,
            split=split,
            num_shards=num_shards,
            num_classes=None if classes is None else len(classes),
            transform=loaded.transform,
            batch_size=batch_size,
            workers=workers,
            title=place,
        )
        entry = _encode_split(loaded, samples, device, amp)
        check_features(entry.tensors["images"], model=loaded.name, data=place)
        cache.put(key, entry, is_known=data is not None)
    return Features(
        entry.tensors["images"],
        entry.tensors.get("labels"),
        entry.texts.get("captions"),
        classes,
    )


def encode_images(
    loaded: LoadedModel, batches: Iterable[Tensor], *, device: torch.device, amp: bool
) -> Tensor:
    """Encode batches of images that have been through the model's transform.

    Args:
        loaded: The model, on `device`.
        batches: Tensors of shape (B, C, H, W).
        device: Where the model is.
        amp: Whether to use half precision.

    Returns:
        Features, not normalised, shape (N, D), float32, on the CPU.

    Raises:
        ValueError: If there is no batch.
    """
    with _inference(loaded.model, device, amp) as model:
        features = [model.encode_image(batch.to(device)).float().cpu() for batch in batches]
    if not features:
        raise ValueError("there is no image to encode")
    return torch.cat(features)


def text_features(
    loaded: LoadedModel,
    texts: Sequence[str],
    *,
    device: torch.device,
    batch_size: int = 256,
    amp: bool,
) -> Tensor:
    """Encode texts; those that the tokenizer cannot tell apart get the very same feature.

    Args:
        loaded: The model, on `device`.
        texts: At least one.
        device: Where the model is.
        batch_size: Texts per step, >= 1.
        amp: Whether to use half precision.

    Returns:
        Features, not normalised, shape (num_texts, D), float32, on the CPU.

    Raises:
        NonFiniteFeaturesError: If a feature is not finite.
    """
    # In another row of a batch the same text comes out a rounding error different.
    tokens_UL, inverse = torch.unique(loaded.tokenizer(list(texts)), dim=0, return_inverse=True)
    with _inference(loaded.model, device, amp) as model:
        features = [
            model.encode_text(batch.to(device)).float().cpu()
            for batch in tokens_UL.split(batch_size)
        ]
    features_UD = torch.cat(features)
    check_features(features_UD, model=loaded.name, data="texts")
    return features_UD[inverse]


def check_features(features_ND: Tensor, *, model: str, data: str) -> None:
    """Refuse features that hold a NaN or an infinity.

    Args:
        features_ND: Shape (N, D).
        model: What to call the model in the message.
        data: What was encoded.

    Raises:
        NonFiniteFeaturesError: If there is one.
    """
    num_bad = int((~torch.isfinite(features_ND)).any(dim=1).sum())
    if num_bad:
        raise NonFiniteFeaturesError(
            f"the features of {model} on {data} are not finite: {num_bad} of {len(features_ND)} "
            "hold a NaN or an infinity"
        )


def _encode_split(
    loaded: LoadedModel, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, amp: bool
) -> Entry:
    labels: list[Tensor] = []
    captions: list[list[str]] = []

    def images() -> Iterator[Tensor]:
        for pixels, target in batches:
            if isinstance(target, Tensor):
                labels.append(target)
            else:
                captions.extend(list(texts) for texts in target)
            yield pixels

    features_ND = encode_images(loaded, images(), device=device, amp=amp)
    if labels:
        return Entry({"images": features_ND, "labels": torch.cat(labels)})
    return Entry({"images": features_ND}, {"captions": captions})


@contextlib.contextmanager
def _inference(model: nn.Module, device: torch.device, amp: bool) -> Iterator[Any]:
    was_training = model.training
    model.eval()
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=amp):
            yield model
    finally:
        model.train(was_training)
