"""SugarCrepe (https://arxiv.org/abs/2306.14610): the caption of an image or a hard negative.

An item is right if the image is nearer to its caption than to the negative. clip_benchmark takes
the larger of the two, and the caption, which comes first, where they are equal: a model that maps
everything to one point, or to NaN, scores 100 % there. Here a tie is wrong and counted, so that
such a model scores 0 %; without ties both agree.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip_pgs.evaluation.datasets.caption_pairs import IMAGE_FOLDER, image_paths, read_pairs
from clip_pgs.evaluation.datasets.datasets import CAPTION_PAIR_SPLITS
from clip_pgs.evaluation.features.feature_cache import Entry, FeatureCache
from clip_pgs.evaluation.features.features import check_features, encode_images, text_features
from clip_pgs.evaluation.features.fingerprints import files_fingerprint
from clip_pgs.evaluation.models.models import LoadedModel
from clip_pgs.evaluation.samples import open_pictures

# Two cosines of float32 features this close differ by rounding alone: a collapsed model must not
# win half of its items by noise.
_TIE = 1e-6


def compositionality(
    loaded: LoadedModel,
    folder: str | Path,
    split: str,
    *,
    device: torch.device,
    batch_size: int,
    workers: int,
    amp: bool,
    cache: FeatureCache,
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Score a model on one split.

    Args:
        loaded: The model, on `device`.
        folder: With the splits and their images.
        split: One of `CAPTION_PAIR_SPLITS`.
        device: Where the model is.
        batch_size: Images or texts per step, >= 1.
        workers: Processes that read images; none where processes cannot be forked.
        amp: Whether to use half precision.
        cache: Of this model; the images of all splits are encoded once.

    Returns:
        The metric `acc`, in [0, 1], and the counts `items`, `ties` and `images`.

    Raises:
        FileNotFoundError: If the split or one of its images is not there.
        ValueError: If there is no such split, or its file is malformed or empty.
        NonFiniteFeaturesError: If a feature is not finite.
    """
    folder = Path(folder)
    own_paths = image_paths(folder, split)
    pairs = read_pairs(folder, split)
    all_paths = _paths_of_all_splits(folder)
    digest = files_fingerprint(folder, all_paths)
    key = cache.key("caption pairs", digest, device=device, amp=amp)
    entry = cache.get(key)
    if entry is None:
        pictures = open_pictures(
            all_paths,
            transform=loaded.transform,
            batch_size=batch_size,
            workers=workers,
            title=folder.name,
        )
        features_ND = encode_images(loaded, pictures, device=device, amp=amp)
        check_features(features_ND, model=loaded.name, data=f"the images in {folder.name}")
        entry = Entry({"images": features_ND})
        cache.put(key, entry)

    row_of = {path.name: row for row, path in enumerate(all_paths)}
    rows = torch.tensor([row_of[pair.file_name] for pair in pairs])
    texts = [pair.caption for pair in pairs] + [pair.negative for pair in pairs]
    texts_TD = text_features(loaded, texts, device=device, batch_size=batch_size, amp=amp)
    true_ND, false_ND = texts_TD.chunk(2)
    num_right, num_ties = count_right(entry.tensors["images"][rows], true_ND, false_ND)
    details = {"items": len(pairs), "ties": num_ties, "images": len(own_paths)}
    return {"acc": num_right / len(pairs)}, details


def count_right(images_ND: Tensor, true_ND: Tensor, false_ND: Tensor) -> tuple[int, int]:
    """Count how often an image is nearer to its caption than to the negative.

    Args:
        images_ND: Image features, of any length.
        true_ND: Features of the captions.
        false_ND: Features of the negatives.

    Returns:
        How many items are right, and how many are ties (none of them right): the two cosines
        differ by at most 1e-6, which is rounding.
    """
    image_ND, true_ND, false_ND = (
        normalize(features.double(), dim=-1) for features in (images_ND, true_ND, false_ND)
    )
    margin = (image_ND * (true_ND - false_ND)).sum(dim=-1)
    return int((margin > _TIE).sum()), int((margin.abs() <= _TIE).sum())


def _paths_of_all_splits(folder: Path) -> list[Path]:
    """Return the images of all splits, as far as they are there: a split may lack some."""
    names: set[str] = set()
    for split in CAPTION_PAIR_SPLITS:
        # What is wrong with another split is said when that one is scored.
        with contextlib.suppress(FileNotFoundError, ValueError):
            names |= {pair.file_name for pair in read_pairs(folder, split)}
    paths = (folder / IMAGE_FOLDER / name for name in sorted(names))
    return [path for path in paths if path.is_file()]
