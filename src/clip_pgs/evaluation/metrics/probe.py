"""The linear probe: logistic regression on the frozen features of the image tower.

The protocol is that of CLIP (https://arxiv.org/abs/2103.00020, A.3) as far as clip_benchmark
follows it: the features are those of `encode_image`, scaled to length 1; the penalty is chosen on
a held-back part of the train split, coarse steps first and finer ones around the best; the
classifier that is tested is fitted to all of train. Deliberate differences:

- CLIP takes the features before the last projection, clip_benchmark after it; so do we.
- clip_benchmark trains by AdamW for 10 epochs at one learning rate, on CUDA alone, and tunes
  nothing unless it is given a validation split. We fit the regression itself, as CLIP does.
- Features are centred on the mean of train and divided by one number, their root mean square.
  Biases and the search for C undo both, so that the classifiers within reach stay the same, but
  a C means the same for every model, and the solver converges faster.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip_pgs.evaluation.features.features import Features
from clip_pgs.evaluation.metrics.logistic import LinearClassifier, choose_solver
from clip_pgs.evaluation.metrics.metrics import classification_metrics

logger = logging.getLogger(__name__)

HELD_BACK_RATIO = 0.2
# Of the search, in exponents of ten: where it begins, how far it goes on from there, how finely.
_FIRST_EXPONENTS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
_COARSE_STEP = 2.0
_LOWEST, _HIGHEST = -10.0, 10.0
_FINER_STEPS = (1.0, 0.5, 0.25)


def linear_probe(
    train: Features, test: Features, *, name: str, device: torch.device, seed: int = 0
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Fit a linear classifier to train features and score it on test features.

    Args:
        train: From `image_features(..., split="train")`.
        test: From `image_features(..., split="test")`; they decide nothing.
        name: Of the data set, for messages.
        device: Where large problems are solved.
        seed: Of the draw that holds images back.

    Returns:
        The metrics `lp_acc1`, `lp_acc5` (None below 5 classes) and `lp_mean_per_class_recall`, in
        [0, 1], and what explains them: `regularisation` (C, the inverse strength of the penalty
        as in scikit-learn), `held_back_acc1` with it, `tried` (pairs of a C and its held-back
        accuracy), `is_at_edge` (whether the best C is the last within reach), the counts
        `classes`, `train_images` and `held_back_images`, `solver`, `is_converged` and `seed`.

    Raises:
        ValueError: If the data have no class per image, train has but one class or lacks one
            that test has, or no class of train has two images.
    """
    train_labels, test_labels = _labels(train, name), _labels(test, name)
    class_ids, train_classes = train_labels.unique(return_inverse=True)
    _check_classes(class_ids, test_labels, train.classes, name)
    test_classes = torch.searchsorted(class_ids, test_labels)

    train_ND, test_ND = normalize(train.images, dim=-1), normalize(test.images, dim=-1)
    mean_D = train_ND.mean(dim=0)
    train_ND, test_ND = train_ND - mean_D, test_ND - mean_D
    # Features that are all the same have no scale.
    scale = train_ND.square().mean().sqrt().clamp_min(1e-12)
    train_ND, test_ND = train_ND / scale, test_ND / scale

    held_back = hold_back(train_ND, train_classes, seed=seed)
    if not held_back.any():
        raise ValueError(
            f"the linear probe of {name} cannot be tuned: no class of train has two images"
        )
    # The final fit must not start from one that the held-back images had no part in.
    solvers = [choose_solver(train_ND.shape, len(class_ids), device=device) for _ in range(2)]
    exponent, tried = _search(train_ND, train_classes, held_back, solvers[0])
    solver = solvers[1]
    classifier = solver.fit(train_ND, train_classes, c=10**exponent)
    if not classifier.is_converged:
        logger.warning("the linear probe of %s has not converged", name)
    is_at_edge = exponent in (_LOWEST, _HIGHEST)
    if is_at_edge:
        logger.warning("the best C of the linear probe of %s is the last one, 1e%g", name, exponent)

    metrics = classification_metrics(classifier.logits(test_ND), test_classes)
    details = {
        "regularisation": 10**exponent,
        "held_back_acc1": tried[exponent],
        "classes": len(class_ids),
        "held_back_images": int(held_back.sum()),
        "train_images": len(train_classes),
        "tried": [[10**power, accuracy] for power, accuracy in sorted(tried.items())],
        "is_at_edge": is_at_edge,
        "solver": solver.name,
        "is_converged": classifier.is_converged,
        "seed": seed,
    }
    return {f"lp_{key}": value for key, value in metrics.items()}, details


def hold_back(features_ND: Tensor, classes: Tensor, *, seed: int) -> Tensor:
    """Choose the images that tune the penalty: a fifth of each class, at least one of two.

    The draw goes by the order of the features within a class, not by that of the images, which
    depends on how many processes read them.

    Args:
        features_ND: Features of the train split.
        classes: Their classes, shape (N,).
        seed: Of the draw.

    Returns:
        Whether each image is held back, shape (N,), bool.
    """
    generator = torch.Generator().manual_seed(seed)
    order_key = features_ND.double().sum(dim=1)
    held_back = torch.zeros(len(classes), dtype=torch.bool)
    for label in classes.unique():
        members = (classes == label).nonzero().squeeze(1)
        members = members[order_key[members].argsort()]
        num_held = max(int(len(members) * HELD_BACK_RATIO), 1) if len(members) > 1 else 0
        held_back[members[torch.randperm(len(members), generator=generator)[:num_held]]] = True
    return held_back


def _search(
    features_ND: Tensor, classes: Tensor, held_back: Tensor, solver: Any
) -> tuple[float, dict[float, float]]:
    """Find the C with the best held-back accuracy, as a power of 10.

    Of equals it is the one nearest to 1, the moderate one: with C towards 0 or infinity the
    predictions stay the same for long while the fit becomes numerically hopeless.
    """
    fit_ND, fit_classes = features_ND[~held_back], classes[~held_back]
    held_ND, held_classes = features_ND[held_back], classes[held_back]
    tried: dict[float, float] = {}

    def attempt(exponent: float) -> None:
        if exponent not in tried and _LOWEST <= exponent <= _HIGHEST:
            classifier: LinearClassifier = solver.fit(fit_ND, fit_classes, c=10**exponent)
            is_right = classifier.logits(held_ND).argmax(dim=1) == held_classes
            tried[exponent] = is_right.double().mean().item()

    def best() -> float:
        return max(tried, key=lambda exponent: (tried[exponent], -abs(exponent)))

    for exponent in _FIRST_EXPONENTS:
        attempt(exponent)
    while best() == max(tried) < _HIGHEST:
        attempt(best() + _COARSE_STEP)
    while best() == min(tried) > _LOWEST:
        attempt(best() - _COARSE_STEP)
    for step in _FINER_STEPS:
        middle = best()
        attempt(middle - step)
        attempt(middle + step)
    return best(), tried


def _labels(features: Features, name: str) -> Tensor:
    if features.labels is None or features.labels.ndim != 1:
        raise ValueError(f"the linear probe needs one class per image, which {name} does not have")
    return features.labels


def _check_classes(
    class_ids: Tensor, test_labels: Tensor, classes: list[str] | None, name: str
) -> None:
    if len(class_ids) < 2:
        raise ValueError(
            f"the linear probe of {name} needs two classes, but train has only "
            f"{_class_name(int(class_ids[0]), classes)}"
        )
    absent = test_labels[~torch.isin(test_labels, class_ids)].unique()
    if len(absent):
        raise ValueError(
            f"the linear probe of {name} cannot learn {_class_name(int(absent[0]), classes)}: "
            f"train lacks {len(absent)} of the classes of test"
        )


def _class_name(number: int, classes: list[str] | None) -> str:
    if classes is not None and 0 <= number < len(classes):
        return f"class {number} ({classes[number]})"
    return f"class {number}"
