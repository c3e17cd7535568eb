"""The linear probe: logistic regression on the frozen features of the image tower.

The protocol is that of CLIP (https://arxiv.org/abs/2103.00020, A.3) as far as clip_benchmark
follows it: the features are those of `encode_image`, scaled to length 1; the penalty is chosen on
a held-back part of the train split, coarse steps first and finer ones around the best; the
classifier that is tested is fitted to all of train. Deliberate differences:

- CLIP takes the features before the last projection, clip_benchmark after it; so do we.
- clip_benchmark trains by AdamW for 10 epochs at one learning rate, on CUDA alone, and tunes
  nothing unless it is given a validation split. We fit the regression itself, as CLIP does.
- Features are centered on the mean of train and divided by one number, their root mean square.
  Biases and the search for C undo both, so that the classifiers within reach stay the same, but
  a C means the same for every model, and the solver converges faster.
- The search goes no further than the first C >= 1 that gets every image of the fit right.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, pad

from clip_pgs.evaluation.datasets import DamagedDataError
from clip_pgs.evaluation.features import Features
from clip_pgs.evaluation.metrics import classification_metrics
from clip_pgs.evaluation.suites import NUM_NEIGHBORS
from clip_pgs.masking.sampling import without_tf32

logger = logging.getLogger(__name__)

HELD_BACK_RATIO = 0.2
# Of the search, in exponents of ten: where it begins, how far it goes on from there, how finely.
_FIRST_EXPONENTS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
_COARSE_STEP = 2.0
_LOWEST, _HIGHEST = -10.0, 10.0
_FINER_STEPS = (1.0, 0.5, 0.25)

_TEMPERATURE = 0.07

MAX_ITERATIONS = 3000
# Largest entry of the gradient of the mean loss at which the solver stops.
_TOLERANCE = 1e-5
# Logits, or similarities, computed at once: 256 MiB.
_CHUNK_LOGITS = 2**26


@without_tf32()
def linear_probe(
    train: Features,
    test: Features,
    *,
    name: str,
    classes: list[str] | None = None,
    device: torch.device,
    seed: int = 0,
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Fit a linear classifier to train features and score it on test features.

    Args:
        train: From `Encoder.images(..., split="train")`.
        test: From `Encoder.images(..., split="test")`; they decide nothing.
        name: Of the data set, for messages.
        classes: Names of the classes, for messages.
        device: Where to compute, if it is CUDA; else it is the CPU.
        seed: Of the draw that holds images back.

    Returns:
        The metrics `lp_acc1`, `lp_acc5` (None below 5 classes) and `lp_mean_per_class_recall`, in
        [0, 1], and what explains them: `regularization` (C, the inverse strength of the penalty
        as in scikit-learn), `held_back_acc1` with it, `tried` (pairs of a C and its held-back
        accuracy), `is_at_edge` (whether the best C is the last within reach), the counts
        `classes`, `train_images` and `held_back_images`, `solver`, `is_converged` and `seed`.

    Raises:
        DamagedDataError: If the data have no class per image, train has but one class or lacks one
            that test has, or no class of train has two images.
    """
    train_labels, test_labels = _labels(train, name), _labels(test, name)
    class_ids, train_classes = train_labels.unique(return_inverse=True)
    _check_classes(class_ids, test_labels, classes, name)
    test_classes = torch.searchsorted(class_ids, test_labels)

    train_ND, test_ND = normalize(train.images, dim=-1), normalize(test.images, dim=-1)
    mean_D = train_ND.mean(dim=0)
    train_ND, test_ND = train_ND - mean_D, test_ND - mean_D
    # Features that are all the same have no scale.
    scale = train_ND.square().mean().sqrt().clamp_min(1e-12)
    train_ND, test_ND = train_ND / scale, test_ND / scale

    held_back = hold_back(train_ND, train_classes, seed=seed)
    if not held_back.any():
        raise DamagedDataError(
            f"the linear probe of {name} cannot be tuned: no class of train has two images"
        )
    # The final fit must not start from one that the held-back images had no part in.
    device = device if device.type == "cuda" else torch.device("cpu")
    exponent, tried = _search(train_ND, train_classes, held_back, LogisticRegression(device))
    classifier = LogisticRegression(device).fit(train_ND, train_classes, c=10**exponent)
    if not classifier.is_converged:
        logger.warning("the linear probe of %s has not converged", name)
    is_at_edge = exponent in (_LOWEST, _HIGHEST)
    if is_at_edge:
        logger.warning("the best C of the linear probe of %s is the last one, 1e%g", name, exponent)

    metrics = classification_metrics(classifier.logits(test_ND), test_classes)
    details = {
        "regularization": 10**exponent,
        "held_back_acc1": tried[exponent],
        "classes": len(class_ids),
        "held_back_images": int(held_back.sum()),
        "train_images": len(train_classes),
        "tried": [[10**power, accuracy] for power, accuracy in sorted(tried.items())],
        "is_at_edge": is_at_edge,
        "solver": "torch",
        "is_converged": classifier.is_converged,
        "seed": seed,
    }
    return {f"lp_{key}": value for key, value in metrics.items()}, details


@without_tf32()
def nearest_neighbors(train: Features, test: Features, *, name: str, device: torch.device) -> float:
    """Let the nearest images of train vote on the class of each image of test.

    As in DINO (https://arxiv.org/abs/2104.14294): the 20 with the highest cosine similarity s
    vote, with a weight of exp(s / 0.07).

    Args:
        train: As for `linear_probe`.
        test: As for `linear_probe`.
        name: Of the data set, for messages.
        device: As for `linear_probe`.

    Returns:
        The share of test whose class has the most votes, in [0, 1].

    Raises:
        DamagedDataError: If the data have no class per image.
    """
    device = device if device.type == "cuda" else torch.device("cpu")
    test_labels = _labels(test, name)
    class_ids, classes = _labels(train, name).unique(return_inverse=True)
    train_ND = normalize(train.images, dim=-1).to(device)
    classes = classes.to(device)
    found: list[Tensor] = []
    for part_MD in normalize(test.images, dim=-1).split(max(1, _CHUNK_LOGITS // len(train_ND))):
        similarities_MN = part_MD.to(device) @ train_ND.T
        top = similarities_MN.topk(min(NUM_NEIGHBORS, len(train_ND)), dim=1)
        votes_MK = torch.zeros(len(part_MD), len(class_ids), device=device)
        votes_MK.scatter_add_(1, classes[top.indices], (top.values / _TEMPERATURE).exp())
        found.append(class_ids[votes_MK.argmax(dim=1).cpu()])
    return (torch.cat(found) == test_labels).double().mean().item()


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
    features_ND: Tensor, classes: Tensor, held_back: Tensor, solver: LogisticRegression
) -> tuple[float, dict[float, float]]:
    """Find the C with the best held-back accuracy, as a power of 10.

    Of equals it is the one nearest to 1, the moderate one: with C towards 0 or infinity the
    predictions stay the same for long while the fit becomes numerically hopeless. For that reason
    the search ends, too, at a C >= 1 that gets every image of the fit right: beyond it weights grow
    without end, and held-back accuracies are noise.
    """
    fit_ND, fit_classes = features_ND[~held_back], classes[~held_back]
    held_ND, held_classes = features_ND[held_back], classes[held_back]
    tried: dict[float, float] = {}
    highest = _HIGHEST

    def attempt(exponent: float) -> None:
        nonlocal highest
        if exponent not in tried and _LOWEST <= exponent <= highest:
            classifier = solver.fit(fit_ND, fit_classes, c=10**exponent)
            is_right = classifier.logits(held_ND).argmax(dim=1) == held_classes
            tried[exponent] = is_right.double().mean().item()
            if exponent >= 0 and (classifier.logits(fit_ND).argmax(dim=1) == fit_classes).all():
                highest = exponent

    def best() -> float:
        return max(tried, key=lambda exponent: (tried[exponent], -abs(exponent)))

    for exponent in _FIRST_EXPONENTS:
        attempt(exponent)
    while best() == max(tried) < highest:
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
        raise DamagedDataError(f"the linear probe needs one class per image, which {name} lacks")
    return features.labels


def _check_classes(
    class_ids: Tensor, test_labels: Tensor, classes: list[str] | None, name: str
) -> None:
    if len(class_ids) < 2:
        raise DamagedDataError(
            f"the linear probe of {name} needs two classes, but train has only "
            f"{_class_name(int(class_ids[0]), classes)}"
        )
    absent = test_labels[~torch.isin(test_labels, class_ids)].unique()
    if len(absent):
        raise DamagedDataError(
            f"the linear probe of {name} cannot learn {_class_name(int(absent[0]), classes)}: "
            f"train lacks {len(absent)} of the classes of test"
        )


def _class_name(number: int, classes: list[str] | None) -> str:
    if classes is not None and 0 <= number < len(classes):
        return f"class {number} ({classes[number]})"
    return f"class {number}"


@dataclass(frozen=True)
class LinearClassifier:
    """A fitted classifier.

    Attributes:
        weight: Shape (K, D), float32, on the CPU.
        bias: Shape (K,), float32, on the CPU.
        is_converged: Whether the solver met its tolerance.
    """

    weight: Tensor
    bias: Tensor
    is_converged: bool

    def logits(self, features_ND: Tensor) -> Tensor:
        """Return the logits of features (N, D), shape (N, K)."""
        return features_ND @ self.weight.T + self.bias


class LogisticRegression:
    """Multinomial logistic regression with an L2 penalty; each fit starts from the one before.

    It minimizes, over weights W (K, D) and biases b (K),

        mean over n of cross_entropy(W x_n + b, y_n)  +  |W|^2 / (2 * C * N)

    which is scikit-learn's objective divided by C * N; biases are free. Of two classes it fits the
    difference, one row w with |w|^2 as the penalty, as scikit-learn does.

    The solver is `torch.optim.LBFGS` with a strong Wolfe line search, in coordinates that suit the
    data. Features of image towers have a few strong directions and many weak ones, on which L-BFGS
    takes a thousand steps. Here it works along the principal axes of the features, each scaled by
    the curvature that the loss has there at the start, which leaves the optimum where it is.
    Products are in float32, in chunks of rows; parameters, sums and steps in float64, without
    which the line search stalls at the rounding error of the loss.

    Args:
        device: Where to compute.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._last: Tensor | None = None

    def fit(self, features_ND: Tensor, classes: Tensor, *, c: float) -> LinearClassifier:
        """Fit a classifier.

        Args:
            features_ND: Features, float32, on the CPU.
            classes: Class of each, in [0, K), each of which occurs; K >= 2.
            c: Inverse strength of the penalty, > 0.
        """
        num_samples, num_features = features_ND.shape
        num_classes = int(classes.max()) + 1
        num_rows = 1 if num_classes == 2 else num_classes
        features_ND, classes = features_ND.to(self.device), classes.to(self.device)
        decay = 1 / (c * num_samples)
        axes_DD = _suitable_axes(features_ND, num_classes=num_classes, decay=decay)
        x_ND = features_ND @ axes_DD.float()
        weight_RD = torch.zeros(num_rows, num_features, dtype=torch.float64, device=self.device)
        bias_R = torch.zeros(num_rows, dtype=torch.float64, device=self.device)
        if self._last is not None and len(self._last) == num_rows:
            bias_R = self._last[:, -1].clone()
            weight_RD = torch.linalg.solve(axes_DD, self._last[:, :-1].T).T.contiguous()
        chunk = max(1, _CHUNK_LOGITS // num_classes)
        optimizer = torch.optim.LBFGS(
            [weight_RD.requires_grad_(), bias_R.requires_grad_()],
            max_iter=MAX_ITERATIONS,
            max_eval=2 * MAX_ITERATIONS,
            tolerance_grad=_TOLERANCE,
            tolerance_change=1e-11,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            penalty = decay / 2 * (weight_RD @ axes_DD.T).square().sum()
            penalty.backward()
            total = penalty.detach()
            for part_ND, y in zip(x_ND.split(chunk), classes.split(chunk), strict=True):
                logits_NR = part_ND @ weight_RD.float().T + bias_R.float()
                logits_NK = pad(logits_NR, (1, 0)) if num_rows == 1 else logits_NR
                part = cross_entropy(logits_NK, y, reduction="sum").double() / num_samples
                part.backward()
                total = total + part.detach()
            return total

        with torch.enable_grad():
            optimizer.step(loss)
        num_iterations = optimizer.state[weight_RD]["n_iter"]
        weight_RD, bias_R = weight_RD.detach() @ axes_DD.T, bias_R.detach()
        self._last = torch.cat([weight_RD, bias_R[:, None]], dim=1)
        weight_RD, bias_R = weight_RD.float().cpu(), bias_R.float().cpu()
        if num_rows == 1:
            weight_RD, bias_R = pad(weight_RD, (0, 0, 1, 0)), pad(bias_R, (1, 0))
        return LinearClassifier(weight_RD, bias_R, num_iterations < MAX_ITERATIONS)


def _suitable_axes(features_ND: Tensor, *, num_classes: int, decay: float) -> Tensor:
    """Return axes (D, D), float64, as columns: principal ones, scaled to equal curvature.

    At zero weights a softmax over K classes bends like the mean square of the features over K.
    """
    square_DD = (features_ND.T @ features_ND).double() / len(features_ND)
    strength_D, axes_DD = torch.linalg.eigh(square_DD)
    return axes_DD / (strength_D.clamp_min(0) / num_classes + decay).sqrt()
