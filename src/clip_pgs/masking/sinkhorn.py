"""Batched entropic optimal transport with uniform marginals (https://arxiv.org/abs/1306.0895)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clip_pgs.common import check_choice
from clip_pgs.masking.strategy import check_range, described

# The defaults, here and of `PGSOptions`.
TEMPERATURE, NUM_ITERS, SOLVER = 0.1, 12, "log"
SOLVERS = ("log", "pot")

# From here on, float32 needs no logarithms for scores in [-1, 1]: kernel times scaling stays
# within exp(-3 / temperature) and exp(3 / temperature).
_MIN_PLAIN_TEMPERATURE = 0.05


def sinkhorn_plan(
    scores: Tensor,
    *,
    temperature: float = TEMPERATURE,
    num_iters: int = NUM_ITERS,
    solver: str = SOLVER,
) -> Tensor:
    """Solve for the plan that moves uniform mass from candidates to patches.

    The cost is `1 - scores`. One sweep scales the rows, then the columns, so that the columns
    are exact and the rows keep a residual: on photographs about 10 % of a row's mass after 3
    sweeps, 0.8 % after 12 and 0.1 % after 20.

    Args:
        scores: Affinities, larger means closer. -inf forbids a pair, with the solver "log" alone.
            Shape (B, C, N), any float dtype. Over `temperature`, they are at most 1e37 in size.
        temperature: Entropy weight, in the units of `scores`; smaller is sharper; in
            [1e-6, 1e6].
        num_iters: Sweeps, in [1, 10000].
        solver: "log" runs a fixed number of sweeps in log space: no host synchronization, and it
            compiles. "pot" calls `ot.batch.solve_batch` (POT, https://pythonot.github.io), which
            gives the same plan, up to float32's rounding of costs over `temperature`, and
            synchronizes with the host.

    Returns:
        Plan of shape (B, C, N), float32. Columns sum to 1 / N; rows sum to 1 / C up to the
        residual. A column whose pairs are all forbidden stays empty, and rows then share what
        the others need as evenly as the allowed pairs let them.

    Raises:
        ValueError: If `scores` is not 3-D, or has no candidate or patch, `temperature` or
            `num_iters` is out of its range, `solver` is unknown, or "pot" and a score -inf.
    """
    if not isinstance(scores, Tensor) or scores.ndim != 3 or 0 in scores.shape[1:]:
        raise ValueError(
            f"scores must have shape (B, C, N), with C and N >= 1, got {described(scores)}"
        )
    check_sinkhorn_options(temperature=temperature, num_iters=num_iters, solver=solver)
    if solver == "pot" and len(scores):
        if (scores == -torch.inf).any():
            raise ValueError("scores of -inf need solver='log', got solver='pot'")
        return _pot_plan(scores.float(), temperature, num_iters)
    # The cost is 1 - scores; its constant 1 scales every entry alike, and the marginals undo that.
    log_kernel_BCN = scores.float() / temperature
    num_rows, num_columns = log_kernel_BCN.shape[1:]
    row_potential = column_potential = log_kernel_BCN.new_zeros(())
    for sweep in range(num_iters):
        if sweep:
            column_potential = -_finite_logsumexp(log_kernel_BCN + row_potential, dim=1)
            column_potential = column_potential - math.log(num_columns)
        row_potential = -_finite_logsumexp(log_kernel_BCN + column_potential, dim=2)
        row_potential = row_potential - math.log(num_rows)
    # The last sweep's columns. Potentials far from 0 are rounded to many digits: a column is exact
    # if it is divided by its sum.
    weights_BCN = log_kernel_BCN + row_potential
    highest_B1N = weights_BCN.amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    weights_BCN = (weights_BCN - highest_B1N).exp()
    # The sum is at least 1 where any pair is allowed.
    return weights_BCN / (num_columns * weights_BCN.sum(dim=1, keepdim=True).clamp_min(1.0))


def plan_average(scores: Tensor, *, temperature: float, num_iters: int, solver: str) -> Tensor:
    """Average the scores of each column by the weights that the plan gives them.

    It is `N * (sinkhorn_plan(scores) * scores).sum(dim=1)` up to rounding, in a fraction of the
    time: the plan is never made, and its kernel is scaled without logarithms where the
    temperature lets float32 hold it.

    Args:
        scores: Affinities in [-1, 1]. Shape (B, C, N), any float dtype.
        temperature: See `sinkhorn_plan`.
        num_iters: See `sinkhorn_plan`.
        solver: See `sinkhorn_plan`.

    Returns:
        Averages of shape (B, N), float32.

    Raises:
        ValueError: See `sinkhorn_plan`.
    """
    if solver != "log" or temperature < _MIN_PLAIN_TEMPERATURE or scores.ndim != 3:
        plan_BCN = sinkhorn_plan(
            scores, temperature=temperature, num_iters=num_iters, solver=solver
        )
        return scores.shape[2] * (plan_BCN * scores).sum(dim=1)
    check_sinkhorn_options(temperature=temperature, num_iters=num_iters, solver=solver)
    scores = scores.float()
    # Not a matrix product: those may run in TF32, which keeps three digits.
    kernel_BCN = (scores / temperature).exp()
    # Rows, then columns and rows in turn; the division below is the last sweep's columns. Means in
    # place of sums: constant factors, 1 / C and 1 / N included, cancel there.
    scaled_BCN = kernel_BCN / kernel_BCN.mean(dim=2, keepdim=True)
    for _ in range(num_iters - 1):
        column_scale = scaled_BCN.mean(dim=1, keepdim=True).reciprocal()
        scaled_BCN = kernel_BCN / (kernel_BCN * column_scale).mean(dim=2, keepdim=True)
    return (scaled_BCN * scores).sum(dim=1) / scaled_BCN.sum(dim=1)


def check_sinkhorn_options(*, temperature: float, num_iters: int, solver: str) -> None:
    """Refuse options that `sinkhorn_plan` cannot work with.

    Raises:
        ValueError: See `sinkhorn_plan`.
    """
    check_range(temperature, name="temperature", low=1e-6, high=1e6)
    check_range(num_iters, name="num_iters", low=1, high=10_000, whole=True)
    check_choice(solver, SOLVERS, name="solver")


def _finite_logsumexp(values: Tensor, *, dim: int) -> Tensor:
    # An empty row or column would bring -inf + inf, which is no number, into the next sweep.
    return values.logsumexp(dim=dim, keepdim=True).clamp_min(torch.finfo(values.dtype).min)


def _pot_plan(scores: Tensor, temperature: float, num_iters: int) -> Tensor:
    try:
        from ot.batch import solve_batch
    except ImportError as error:
        raise ValueError("solver='pot' needs the package POT: pip install pot") from error
    options = {"method": "log_sinkhorn", "max_iter": num_iters, "tol": 0.0, "grad": "detach"}
    return solve_batch(1.0 - scores, temperature, **options).plan
