"""The metrics of zero-shot classification and retrieval, by clip_benchmark's own functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

_RETRIEVAL_CHUNK = 64


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
    from clip_benchmark.metrics.zeroshot_classification import accuracy, average_precision_per_class

    num_images, num_classes = logits_NC.shape
    if num_images == 0:
        raise ValueError("there is no image to score")
    if labels.ndim == 2:
        precisions = average_precision_per_class(logits_NC, labels)
        return {"mean_average_precision": precisions.mean().item()}
    if labels.min() < 0 or labels.max() >= num_classes:
        wrong = labels[(labels < 0) | (labels >= num_classes)][0]
        raise ValueError(f"labels must be in [0, {num_classes}), the classes, got {int(wrong)}")

    metrics: dict[str, float | None] = {"acc1": None, "acc5": None}
    top = (1, 5) if num_classes >= 5 else (1,)
    for k, value in zip(top, accuracy(logits_NC, labels, topk=top), strict=True):
        metrics[f"acc{k}"] = value
    is_right = logits_NC.argmax(dim=1) == labels
    total = torch.bincount(labels, minlength=num_classes)
    right = torch.bincount(labels[is_right], minlength=num_classes)
    recalls = right[total > 0].double() / total[total > 0]
    return {**metrics, "mean_per_class_recall": recalls.mean().item()}


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
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    scores_TN = normalize(texts_TD, dim=-1) @ normalize(images_ND, dim=-1).T
    positive_TN = torch.zeros_like(scores_TN, dtype=torch.bool)
    positive_TN[torch.arange(len(texts_TD)), image_of_text] = True
    metrics: dict[str, float | None] = {}
    for k in recall_at:
        for wanted, scores, positive in (
            ("image", scores_TN, positive_TN),
            ("text", scores_TN.T, positive_TN.T),
        ):
            value = None
            if scores.shape[1] >= k:
                recall = batchify(recall_at_k, scores, positive, _RETRIEVAL_CHUNK, "cpu", k=k)
                value = (recall > 0).float().mean().item()
            metrics[f"{wanted}_retrieval_recall@{k}"] = value
    return metrics
