"""The metrics of classification, retrieval and caption pairs, each equal to clip_benchmark's.

Of caption pairs (SugarCrepe, https://arxiv.org/abs/2306.14610) an item is right if the image is
nearer to its caption than to the negative. clip_benchmark takes the larger of the two, and the
caption, which comes first, where they are equal: a model that maps everything to one point, or to
NaN, scores 100 % there. Here a tie is wrong and counted, so that such a model scores 0 %; without
ties both agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

# Rows of scores that are sorted at once.
_RETRIEVAL_CHUNK = 64
# Two cosines of float32 features this close differ by rounding alone: a collapsed model must not
# win half of its items by noise.
_TIE = 1e-6


def zeroshot_logits(images_ND: Tensor, classes_CD: Tensor) -> Tensor:
    """Compare images with classes.

    Args:
        images_ND: Image features, of any length.
        classes_CD: Class features of length 1.

    Returns:
        100 times the cosines, shape (N, C).
    """
    return 100.0 * normalize(images_ND, dim=-1) @ classes_CD.T


def classification_metrics(logits_NC: Tensor, labels: Tensor) -> dict[str, float | None]:
    """Score predicted classes.

    Args:
        logits_NC: The larger, the more likely. Shape (N, C).
        labels: True classes, shape (N,), int64; or which classes an image shows, shape (N, C).

    Returns:
        `acc1`, `acc5` (None below 5 classes, where it says nothing) and `mean_per_class_recall`,
        the mean over the classes that occur; or `mean_average_precision` for labels (N, C).

    Raises:
        ValueError: If there is no image, or a label is no class.
    """
    num_images, num_classes = logits_NC.shape
    if num_images == 0:
        raise ValueError("there is no image to score")
    if labels.ndim == 2:
        return {"mean_average_precision": _mean_average_precision(logits_NC, labels)}
    if labels.min() < 0 or labels.max() >= num_classes:
        wrong = labels[(labels < 0) | (labels >= num_classes)][0]
        raise ValueError(f"labels must be in [0, {num_classes}), the classes, got {int(wrong)}")

    is_right_NK = logits_NC.topk(5 if num_classes >= 5 else 1).indices == labels[:, None]
    is_nearest = logits_NC.argmax(dim=1) == labels
    total = torch.bincount(labels, minlength=num_classes)
    right = torch.bincount(labels[is_nearest], minlength=num_classes)
    recalls = right[total > 0].double() / total[total > 0]
    return {
        "acc1": int(is_right_NK[:, 0].sum()) / num_images,
        "acc5": int(is_right_NK.sum()) / num_images if num_classes >= 5 else None,
        "mean_per_class_recall": recalls.mean().item(),
    }


def retrieval_metrics(
    images_ND: Tensor,
    texts_TD: Tensor,
    image_of_text: Tensor,
    *,
    recall_at: Sequence[int] = (1, 5, 10),
) -> dict[str, float | None]:
    """Score retrieval in both directions.

    A text counts if its image is among the K nearest, an image if any of its texts is.

    Args:
        images_ND: Image features, of any length.
        texts_TD: Text features, of any length.
        image_of_text: Number of the image that each text describes, shape (T,).
        recall_at: The values of K.

    Returns:
        `image_retrieval_recall@K` and `text_retrieval_recall@K`, None where there are fewer than
        K images or texts.
    """
    scores_TN = normalize(texts_TD, dim=-1) @ normalize(images_ND, dim=-1).T
    is_pair_TN = torch.zeros_like(scores_TN, dtype=torch.bool)
    is_pair_TN[torch.arange(len(texts_TD)), image_of_text] = True
    metrics: dict[str, float | None] = {}
    for k in recall_at:
        metrics[f"image_retrieval_recall@{k}"] = _recall(scores_TN, is_pair_TN, k)
        metrics[f"text_retrieval_recall@{k}"] = _recall(scores_TN.T, is_pair_TN.T, k)
    return metrics


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


def _recall(scores_QG: Tensor, is_pair_QG: Tensor, k: int) -> float | None:
    """Return the share of queries with a partner among the k nearest of the gallery."""
    if scores_QG.shape[1] < k:
        return None
    chunks = zip(scores_QG.split(_RETRIEVAL_CHUNK), is_pair_QG.split(_RETRIEVAL_CHUNK), strict=True)
    is_found = [
        is_pair.gather(1, scores.topk(k, dim=1).indices).any(dim=1) for scores, is_pair in chunks
    ]
    return torch.cat(is_found).float().mean().item()


def _mean_average_precision(logits_NC: Tensor, is_shown_NC: Tensor) -> float:
    """Return the mean over classes of the precision at each image that shows the class."""
    rank_N = torch.arange(1, len(logits_NC) + 1).float()
    precisions = []
    for logits_N, is_shown_N in zip(logits_NC.T, is_shown_NC.T, strict=True):
        truth_N = is_shown_N[logits_N.sort(descending=True).indices].float()
        precision_N = truth_N.cumsum(dim=0) / rank_N
        precisions.append(precision_N[truth_N.bool()].sum() / truth_N.sum().clamp_min(1))
    return torch.stack(precisions).mean().item()
