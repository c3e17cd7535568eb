"""Score one model on one data set, by the task of its suite."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from clip_pgs.evaluation.datasets.datasets import DamagedDataError, EvalSet, read_templates
from clip_pgs.evaluation.features.class_features import class_features
from clip_pgs.evaluation.features.feature_cache import FeatureCache
from clip_pgs.evaluation.features.features import (
    Features,
    image_features,
    text_features,
)
from clip_pgs.evaluation.metrics.compositionality import compositionality
from clip_pgs.evaluation.metrics.metrics import (
    classification_metrics,
    retrieval_metrics,
    zeroshot_logits,
)
from clip_pgs.evaluation.metrics.probe import linear_probe
from clip_pgs.evaluation.models.models import LoadedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """What a model reaches on a data set.

    Attributes:
        metrics: In [0, 1]; None where one is not defined.
        samples: Number of images scored, or of caption pairs.
        details: What explains the numbers.
    """

    metrics: dict[str, float | None]
    samples: int
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scorer:
    """Scores one model; what it encodes is kept for the other suites.

    Attributes:
        loaded: The model, on `device`.
        device: Where the model is.
        batch_size: Images per step.
        workers: Processes that read images.
        amp: Whether to use half precision.
        cache: Of this model.
    """

    loaded: LoadedModel
    device: torch.device
    batch_size: int
    workers: int
    amp: bool
    cache: FeatureCache

    def score(self, eval_set: EvalSet) -> Scores:
        """Score the model on a data set.

        Args:
            eval_set: The data set and the task.

        Raises:
            FileNotFoundError: If the data set is not there.
            NonFiniteFeaturesError: If a feature is not finite.
            DamagedDataError: If the data set cannot be scored as it is.
        """
        return _BY_TASK[eval_set.task](self, eval_set)

    def images(self, eval_set: EvalSet, *, split: str = "test") -> Features:
        """Return the encoded images of a split."""
        return image_features(
            self.loaded,
            eval_set,
            split=split,
            device=self.device,
            batch_size=self.batch_size,
            workers=self.workers,
            amp=self.amp,
            cache=self.cache,
        )


def _score_classification(scorer: Scorer, eval_set: EvalSet) -> Scores:
    features = scorer.images(eval_set)
    if features.labels is None:
        raise DamagedDataError(f"{eval_set.name} has captions, no classes")
    classes_CD = class_features(
        scorer.loaded,
        features.classes or [],
        read_templates(eval_set.location),
        device=scorer.device,
        amp=scorer.amp,
        cache=scorer.cache,
    )
    twice = [name for name, count in Counter(features.classes or []).items() if count > 1]
    if twice:
        logger.warning("classes of %s share a name: %s", eval_set.name, ", ".join(twice[:5]))
    if features.labels.ndim == 1 and (largest := int(features.labels.max())) < len(classes_CD) - 1:
        logger.warning(
            "%s has the labels 0 to %d and names %d classes",
            eval_set.name,
            largest,
            len(classes_CD),
        )
    logits_NC = zeroshot_logits(features.images, classes_CD)
    metrics = classification_metrics(logits_NC, features.labels)
    return Scores(metrics, len(features.images), {"classes": len(classes_CD)})


def _score_retrieval(scorer: Scorer, eval_set: EvalSet) -> Scores:
    features = scorer.images(eval_set)
    if features.captions is None:
        raise DamagedDataError(f"{eval_set.name} has classes, no captions")
    image_of_text = [number for number, captions in enumerate(features.captions) for _ in captions]
    texts_TD = text_features(
        scorer.loaded,
        [text for captions in features.captions for text in captions],
        device=scorer.device,
        amp=scorer.amp,
    )
    metrics = retrieval_metrics(features.images, texts_TD, torch.tensor(image_of_text))
    return Scores(metrics, len(features.images), {"captions": len(image_of_text)})


def _score_linear_probe(scorer: Scorer, eval_set: EvalSet) -> Scores:
    test = scorer.images(eval_set)
    train = scorer.images(eval_set, split="train")
    metrics, details = linear_probe(train, test, name=eval_set.name, device=scorer.device)
    return Scores(metrics, len(test.images), details)


def _score_caption_pairs(scorer: Scorer, eval_set: EvalSet) -> Scores:
    metrics, details = compositionality(
        scorer.loaded,
        eval_set.location,
        eval_set.splits[0],
        device=scorer.device,
        batch_size=scorer.batch_size,
        workers=scorer.workers,
        amp=scorer.amp,
        cache=scorer.cache,
    )
    return Scores(metrics, details["items"], details)


_BY_TASK: dict[str, Callable[[Scorer, EvalSet], Scores]] = {
    "zeroshot_classification": _score_classification,
    "zeroshot_retrieval": _score_retrieval,
    "linear_probe": _score_linear_probe,
    "image_caption_selection": _score_caption_pairs,
}
