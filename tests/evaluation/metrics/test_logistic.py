import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from clip_pgs.evaluation.metrics.logistic import (
    SCIKIT_LEARN_LIMIT,
    ScikitLearnSolver,
    TorchSolver,
    choose_solver,
)

SOLVERS = [ScikitLearnSolver, lambda: TorchSolver(torch.device("cpu"))]


def make_problem(num_classes, *, num_samples=120, num_features=5, seed=0):
    """Noisy linear classes, with features of very different strength."""
    generator = torch.Generator().manual_seed(seed)
    features_ND = torch.randn(num_samples, num_features, generator=generator)
    true_DK = torch.randn(num_features, num_classes, generator=generator)
    noise_NK = 2 * torch.randn(num_samples, num_classes, generator=generator)
    classes = (features_ND @ true_DK + noise_NK).argmax(dim=1)
    assert len(classes.unique()) == num_classes
    return features_ND * torch.logspace(0, -2, num_features), classes


def minimise_slowly(features_ND, classes, *, c):
    """Minimise scikit-learn's documented objective with scipy; return logits."""
    x, y = features_ND.double().numpy(), classes.numpy()
    num_rows = 1 if y.max() == 1 else y.max() + 1

    def split(flat):
        rows = flat.reshape(num_rows, -1)
        return rows[:, :-1], rows[:, -1]

    def logits_of(flat):
        weight, bias = split(flat)
        scores = x @ weight.T + bias
        return np.hstack([np.zeros((len(x), 1)), scores]) if num_rows == 1 else scores

    def objective(flat):
        scores = logits_of(flat)
        losses = np.logaddexp.reduce(scores, axis=1) - scores[np.arange(len(y)), y]
        return c * losses.sum() + 0.5 * (split(flat)[0] ** 2).sum()

    start = np.zeros(num_rows * (x.shape[1] + 1))
    best = minimize(objective, start, method="BFGS", options={"gtol": 1e-6, "maxiter": 5000})
    scores = logits_of(best.x)
    return torch.from_numpy(scores - scores.mean(axis=1, keepdims=True))


def centred(logits_NK):
    return (logits_NK - logits_NK.mean(dim=1, keepdim=True)).double()


@pytest.mark.parametrize("make_solver", SOLVERS)
@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("c", [0.01, 10.0])
def test_solver_reaches_the_optimum_of_the_stated_objective(make_solver, num_classes, c):
    features_ND, classes = make_problem(num_classes)
    classifier = make_solver().fit(features_ND, classes, c=c)
    expected_NK = minimise_slowly(features_ND, classes, c=c)
    assert classifier.is_converged
    torch.testing.assert_close(
        centred(classifier.logits(features_ND)), expected_NK, atol=5e-3, rtol=5e-3
    )


@pytest.mark.parametrize("num_classes", [2, 5])
def test_both_solvers_find_the_same_classifier(num_classes):
    features_ND, classes = make_problem(num_classes, num_samples=300, num_features=20)
    fits = [make_solver().fit(features_ND, classes, c=1.0) for make_solver in SOLVERS]
    assert fits[0].weight.shape == fits[1].weight.shape == (num_classes, 20)
    torch.testing.assert_close(fits[0].weight, fits[1].weight, atol=5e-3, rtol=5e-3)
    predicted = [fit.logits(features_ND).argmax(dim=1) for fit in fits]
    assert torch.equal(*predicted)


@pytest.mark.parametrize("make_solver", SOLVERS)
def test_fit_does_not_depend_on_the_one_before(make_solver):
    features_ND, classes = make_problem(4)
    alone = make_solver().fit(features_ND, classes, c=1.0)
    solver = make_solver()
    solver.fit(features_ND, classes, c=100.0)
    after = solver.fit(features_ND, classes, c=1.0)
    torch.testing.assert_close(after.weight, alone.weight, atol=5e-3, rtol=5e-3)


def test_torch_gives_the_same_in_chunks_of_rows(monkeypatch):
    features_ND, classes = make_problem(4)
    whole = TorchSolver(torch.device("cpu")).fit(features_ND, classes, c=1.0)
    monkeypatch.setattr("clip_pgs.evaluation.metrics.logistic._CHUNK_LOGITS", 4 * 7)
    parts = TorchSolver(torch.device("cpu")).fit(features_ND, classes, c=1.0)
    torch.testing.assert_close(parts.weight, whole.weight, atol=5e-3, rtol=5e-3)


def test_torch_converges_where_a_few_directions_dominate():
    generator = torch.Generator().manual_seed(0)
    features_ND = torch.randn(400, 40, generator=generator) * torch.logspace(2, -3, 40)
    classes = torch.randint(4, (400,), generator=generator)
    assert TorchSolver(torch.device("cpu")).fit(features_ND, classes, c=10.0).is_converged


def test_solver_is_chosen_by_the_size_of_the_problem():
    side = int(SCIKIT_LEARN_LIMIT) // 10
    cpu = torch.device("cpu")
    assert choose_solver((side, 2), 5, device=cpu).name == "scikit-learn"
    assert choose_solver((side, 2), 6, device=cpu).name == "torch"


def test_torch_solves_on_cuda_alone_or_on_the_cpu():
    device = torch.device("mps")
    assert choose_solver((10**6, 512), 1000, device=device).device == torch.device("cpu")
