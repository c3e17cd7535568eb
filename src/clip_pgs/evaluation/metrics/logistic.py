"""Multinomial logistic regression with an L2 penalty, by scikit-learn or by torch.

Both minimise, over weights W (K, D) and biases b (K),

    mean over n of cross_entropy(W x_n + b, y_n)  +  |W|^2 / (2 * C * N)

which is scikit-learn's objective divided by C * N; biases are free. Of two classes scikit-learn
fits the difference, one row w with |w|^2 as the penalty, and torch does so too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

MAX_ITERATIONS = 3000
# Largest entry of the gradient of the mean loss at which both solvers stop.
_TOLERANCE = 1e-5
# scikit-learn takes up to 3000 steps, of about 1 ms each at this many multiply-adds, on one core.
# CIFAR-10 with a ViT-B/16 has 2.6e8 and ImageNet 6.6e11.
SCIKIT_LEARN_LIMIT = 2e6
# Logits computed at once by torch: 256 MiB.
_CHUNK_LOGITS = 2**26


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


class Solver(Protocol):
    """Fits classifiers to one set of features; each fit starts from the one before.

    Attributes:
        name: What to call it.
    """

    name: str

    def fit(self, features_ND: Tensor, classes: Tensor, *, c: float) -> LinearClassifier:
        """Fit a classifier.

        Args:
            features_ND: Features, float32, on the CPU.
            classes: Class of each, in [0, K), each of which occurs; K >= 2.
            c: Inverse strength of the penalty, > 0.
        """
        ...


def choose_solver(shape: Sequence[int], num_classes: int, *, device: torch.device) -> Solver:
    """Return scikit-learn's solver for small problems and torch's for large ones.

    Args:
        shape: Of the features, (N, D).
        num_classes: K; the rule is N * D * K <= `SCIKIT_LEARN_LIMIT`.
        device: Where torch computes, if it is CUDA; else it is the CPU.
    """
    if math.prod(shape) * num_classes <= SCIKIT_LEARN_LIMIT:
        return ScikitLearnSolver()
    return TorchSolver(device if device.type == "cuda" else torch.device("cpu"))


class ScikitLearnSolver:
    """`sklearn.linear_model.LogisticRegression`, L-BFGS in float64."""

    name = "scikit-learn"

    def __init__(self) -> None:
        from sklearn.linear_model import LogisticRegression

        self._model = LogisticRegression(
            solver="lbfgs", max_iter=MAX_ITERATIONS, tol=_TOLERANCE, warm_start=True
        )

    def fit(self, features_ND: Tensor, classes: Tensor, *, c: float) -> LinearClassifier:
        """Fit a classifier; see `Solver`."""
        from sklearn.exceptions import ConvergenceWarning
        from threadpoolctl import threadpool_limits

        self._model.set_params(C=c)
        # The products are small: threads that wait for each other cost many times what they save.
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("ignore", ConvergenceWarning)
            self._model.fit(features_ND.double().numpy(), classes.numpy())
        return _as_classifier(
            torch.from_numpy(self._model.coef_),
            torch.from_numpy(self._model.intercept_),
            is_converged=int(self._model.n_iter_.max()) < MAX_ITERATIONS,
        )


class TorchSolver:
    """`torch.optim.LBFGS` with a strong Wolfe line search, in coordinates that suit the data.

    Features of image towers have a few strong directions and many weak ones, on which L-BFGS
    takes a thousand steps. Here it works along the principal axes of the features, each scaled by
    the curvature that the loss has there at the start, which leaves the optimum where it is.
    Products are in float32, in chunks of rows; parameters, sums and steps in float64, without
    which the line search stalls at the rounding error of the loss.

    Args:
        device: Where to compute.
    """

    name = "torch"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._last: Tensor | None = None

    def fit(self, features_ND: Tensor, classes: Tensor, *, c: float) -> LinearClassifier:
        """Fit a classifier; see `Solver`."""
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
        return _as_classifier(weight_RD, bias_R, is_converged=num_iterations < MAX_ITERATIONS)


def _suitable_axes(features_ND: Tensor, *, num_classes: int, decay: float) -> Tensor:
    """Return axes (D, D), float64, as columns: principal ones, scaled to equal curvature.

    At zero weights a softmax over K classes bends like the mean square of the features over K.
    """
    square_DD = (features_ND.T @ features_ND).double() / len(features_ND)
    strength_D, axes_DD = torch.linalg.eigh(square_DD)
    return axes_DD / (strength_D.clamp_min(0) / num_classes + decay).sqrt()


def _as_classifier(weight_RD: Tensor, bias_R: Tensor, *, is_converged: bool) -> LinearClassifier:
    weight_RD, bias_R = weight_RD.float().cpu(), bias_R.float().cpu()
    if len(bias_R) == 1:
        weight_RD, bias_R = pad(weight_RD, (0, 0, 1, 0)), pad(bias_R, (1, 0))
    return LinearClassifier(weight_RD, bias_R, is_converged)
