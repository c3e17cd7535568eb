import numpy as np
import ot
import pytest
import torch

from clip_pgs import sinkhorn_plan
from clip_pgs.masking.sinkhorn import plan_average
from masking.oracle import transport_plan

OPTIONS = {"temperature": 0.1, "num_iters": 12, "solver": "log"}


def random_scores(batch_size=3, num_rows=4, num_columns=25, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch_size, num_rows, num_columns, generator=generator) - 0.5


def row_violation(plan):
    return ((plan.sum(dim=2) * plan.shape[1]) - 1).abs().mean().item()


def test_columns_are_exact_and_rows_nearly():
    plan = sinkhorn_plan(random_scores())
    assert plan.dtype == torch.float32
    torch.testing.assert_close(25 * plan.sum(dim=1), torch.ones(3, 25), atol=1e-5, rtol=0)
    assert row_violation(plan) < 0.01


def test_more_sweeps_leave_a_smaller_residual():
    residuals = [row_violation(sinkhorn_plan(random_scores(), num_iters=n)) for n in (1, 3, 12)]
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[-1] < 0.1 * residuals[0]


@pytest.mark.parametrize("num_iters", [1, 3, 12, 20])
def test_equal_sweeps_equal_pots_batched_solver(num_iters):
    scores = random_scores(num_rows=10, num_columns=196)
    expected = ot.batch.solve_batch(
        (1 - scores).double(), 0.1, max_iter=num_iters, tol=0.0, method="log_sinkhorn"
    ).plan
    plan = sinkhorn_plan(scores, num_iters=num_iters)
    assert (plan - expected).abs().max() <= 1e-7


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_convergence_equals_pots_sinkhorn(temperature):
    scores = random_scores(1, 10, 196)
    expected = ot.sinkhorn(
        np.full(10, 1 / 10),
        np.full(196, 1 / 196),
        (1 - scores[0]).double().numpy(),
        temperature,
        numItermax=20_000,
        stopThr=1e-13,
    )
    plan = sinkhorn_plan(scores, temperature=temperature, num_iters=2000)[0]
    assert np.abs(plan.numpy() - expected).max() <= 1e-7


def test_log_domain_equals_plain_domain():
    scores = random_scores(1, 4, 25)
    expected = transport_plan(scores[0].double().numpy(), 0.1, 12)
    assert np.abs(sinkhorn_plan(scores)[0].numpy() - expected).max() <= 1e-7


def test_both_solvers_give_one_plan():
    scores = random_scores()
    difference = sinkhorn_plan(scores, solver="pot") - sinkhorn_plan(scores, solver="log")
    assert difference.abs().max() <= 1e-7


@pytest.mark.parametrize("solver", ["log", "pot"])
def test_no_images_have_no_plan(solver):
    assert sinkhorn_plan(random_scores(0), solver=solver).shape == (0, 4, 25)


@pytest.mark.parametrize(
    ("size", "temperature"), [(1, 1e-6), (1, 1e-3), (1e30, 0.1), (1e30, 1e-6), (1e37, 1.0)]
)
@pytest.mark.parametrize("num_iters", [1, 12])
def test_columns_are_exact_however_sharp_the_plan_is(size, temperature, num_iters):
    scores = size * random_scores()
    scores[0, 1, 2], scores[0, :, 3] = -torch.inf, -torch.inf
    plan = sinkhorn_plan(scores, temperature=temperature, num_iters=num_iters)
    expected = torch.ones(3, 25)
    expected[0, 3] = 0
    torch.testing.assert_close(25 * plan.sum(dim=1), expected, atol=1e-6, rtol=0)
    assert plan[0, 1, 2] == 0


def test_sharp_temperatures_do_not_overflow():
    plan = sinkhorn_plan(random_scores().half(), temperature=0.001)
    assert torch.isfinite(plan).all()


def similarities(num_candidates=10, num_patches=196):
    """Return cosines that fill [-1, 1], the worst case for a kernel without logarithms."""
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.rand(3, num_candidates, num_patches, generator=generator) - 1
    scores[:, :, 0], scores[:, 0], scores[0] = -1.0, 1.0, scores[0].sign()
    return scores


@pytest.mark.parametrize(
    ("temperature", "num_iters"),
    [(0.01, 12), (0.05, 1), (0.05, 12), (0.05, 500), (0.1, 1), (0.1, 12), (0.1, 500), (1.0, 12)],
)
def test_averages_equal_those_of_a_float64_plan(temperature, num_iters):
    scores = similarities()
    averages = plan_average(scores, temperature=temperature, num_iters=num_iters, solver="log")
    plan = ot.batch.solve_batch(
        (1 - scores).double(), temperature, max_iter=num_iters, tol=0.0, method="log_sinkhorn"
    ).plan
    expected = (plan * scores).sum(dim=1) / plan.sum(dim=1)
    assert averages.dtype == torch.float32
    assert (averages - expected).abs().max() <= 1e-5


def test_averages_keep_float32_where_matrix_products_may_not():
    scores = similarities()
    expected = plan_average(scores, **OPTIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plan_average(scores, **OPTIONS), expected)


def test_equal_scores_have_themselves_as_average():
    averages = plan_average(torch.full((1, 4, 9), 0.25), **OPTIONS)
    torch.testing.assert_close(averages, torch.full((1, 9), 0.25))


def test_averages_of_the_pot_solver_are_the_same():
    scores = similarities()
    difference = plan_average(scores, **{**OPTIONS, "solver": "pot"}) - plan_average(
        scores, **OPTIONS
    )
    assert difference.abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scores": torch.zeros(3, 4)}, r"scores must have shape \(B, C, N\), .* got \(3, 4\)"),
        ({"scores": [[[1.0]]]}, r"scores must have shape \(B, C, N\), .* got list"),
        ({"scores": torch.zeros(3, 0, 4)}, r"with C and N >= 1, got \(3, 0, 4\)"),
        ({"temperature": None}, "temperature must be in .*, got None"),
        ({"temperature": True}, "temperature must be in .*, got True"),
        ({"num_iters": 2.5}, "num_iters must be a whole number in .*, got 2.5"),
        ({"num_iters": None}, "num_iters must be a whole number in .*, got None"),
        ({"num_iters": True}, "num_iters must be a whole number in .*, got True"),
        (
            {"scores": torch.full((1, 2, 3), -torch.inf), "solver": "pot"},
            "scores of -inf need solver='log'",
        ),
        ({"temperature": 0.0}, r"temperature must be in \[1e-06, 1e\+06\], got 0.0"),
        ({"num_iters": 0}, r"num_iters must be in \[1, 10000\], got 0"),
        ({"solver": "exact"}, "solver must be one of log, pot, got 'exact'"),
    ],
)
def test_wrong_options_are_refused(changes, sentence):
    arguments = {"scores": random_scores(), **changes}
    with pytest.raises(ValueError, match=sentence):
        sinkhorn_plan(arguments.pop("scores"), **arguments)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"num_iters": 0}, "num_iters must be in"), ({"solver": "x"}, "solver must be one of")],
)
def test_averages_refuse_the_same_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        plan_average(random_scores(), **{**OPTIONS, **options})
