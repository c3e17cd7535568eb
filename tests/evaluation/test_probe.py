import logging
import math

import numpy as np
import pytest
import sklearn.linear_model
import sklearn.neighbors
import torch
from scipy.optimize import minimize

from clip_pgs.evaluation import probe as probe_module
from clip_pgs.evaluation.datasets import DamagedDataError
from clip_pgs.evaluation.features import Features
from clip_pgs.evaluation.probe import (
    HELD_BACK_RATIO,
    LogisticRegression,
    hold_back,
    linear_probe,
    nearest_neighbors,
)
from support.tf32 import products_in_float32

CPU = torch.device("cpu")


def make_features(num_per_class, *, num_classes=6, noise=0.6, seed=0):
    """Clouds around fixed centers, in the order of the classes."""
    centres_CD = torch.randn(num_classes, 12, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_classes).repeat_interleave(num_per_class)
    noise_ND = noise * torch.randn(len(labels), 12, generator=generator)
    return Features(centres_CD[labels] + noise_ND, labels)


def shuffled_labels(features, *, seed=0):
    order = torch.randperm(len(features.labels), generator=torch.Generator().manual_seed(seed))
    return Features(features.images, features.labels[order])


def probe(train, test, **options):
    return linear_probe(train, test, name="clouds", device=CPU, **options)


def test_clouds_that_lie_apart_are_told_apart():
    metrics, details = probe(make_features(30, noise=0.3), make_features(20, noise=0.3, seed=1))
    assert metrics == {"lp_acc1": 1.0, "lp_acc5": 1.0, "lp_mean_per_class_recall": 1.0}
    assert details["held_back_acc1"] == 1.0
    assert details["is_converged"]


def test_products_are_float32_whatever_training_allows_a_gpu():
    train, test = make_features(8), make_features(4, seed=1)
    with products_in_float32() as products:
        linear_probe(train, test, name="clouds", device=CPU)
        num_of_probe = products.num_products
        nearest_neighbors(train, test, name="clouds", device=CPU)
    assert 0 < num_of_probe < products.num_products


def test_metrics_are_those_of_the_predictions_on_test():
    # Both test images of class 0 lie in the cloud of class 1.
    train = make_features(30, num_classes=3, noise=0.05)
    test = make_features(2, num_classes=3, noise=0.05)
    test.images[:2] = test.images[2:4]
    metrics, _ = probe(train, test)
    assert metrics["lp_acc1"] == pytest.approx(4 / 6)
    assert metrics["lp_mean_per_class_recall"] == pytest.approx(2 / 3)
    assert metrics["lp_acc5"] is None


def test_test_labels_have_no_part_in_the_choice_of_c():
    train, test = make_features(25, noise=2.0), make_features(25, noise=2.0, seed=1)
    metrics, details = probe(train, test)
    other_metrics, other_details = probe(train, shuffled_labels(test))
    assert other_details == details
    assert other_metrics["lp_acc1"] < metrics["lp_acc1"]


def test_labels_that_mean_nothing_give_chance():
    train, test = make_features(60), make_features(60, seed=1)
    metrics, details = probe(shuffled_labels(train), test)
    assert metrics["lp_acc1"] == pytest.approx(1 / 6, abs=0.08)
    assert details["held_back_acc1"] < 0.4


def test_features_that_are_all_the_same_give_chance():
    train, test = make_features(20), make_features(20, seed=1)
    same = [Features(torch.ones_like(part.images), part.labels) for part in (train, test)]
    metrics, _ = probe(*same)
    assert metrics["lp_acc1"] == pytest.approx(1 / 6)
    assert metrics["lp_mean_per_class_recall"] == pytest.approx(1 / 6)


def test_c_is_the_most_moderate_of_those_with_the_best_held_back_accuracy():
    _, details = probe(make_features(25, noise=2.0), make_features(5, seed=1))
    best = max(accuracy for _, accuracy in details["tried"])
    equals = [c for c, accuracy in details["tried"] if accuracy == best]
    assert details["held_back_acc1"] == best
    assert details["regularization"] == min(equals, key=lambda c: abs(math.log(c)))


def test_clouds_that_lie_apart_need_no_extreme_c():
    _, details = probe(make_features(30, noise=0.1), make_features(5, noise=0.1, seed=1))
    assert details["regularization"] == 1


def weak_signal(seed):
    """Two classes that differ in a direction a thousand times weaker than the noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(2).repeat(60)
    images_ND = torch.randn(120, 4, generator=generator)
    images_ND[:, 0] = 2.0
    images_ND[:, 1] = 1e-3 * (2.0 * labels - 1) + 1e-4 * images_ND[:, 1]
    # Of equal length, so that scaling to length 1 adds no noise to the weak direction.
    images_ND[:, 3] = (25 - images_ND[:, :3].square().sum(dim=1)).clamp_min(0).sqrt()
    return Features(images_ND, labels)


def test_weak_directions_get_the_weak_penalty_they_need():
    metrics, details = probe(weak_signal(0), weak_signal(1))
    assert details["regularization"] > 1000
    assert metrics["lp_acc1"] > 0.95
    assert not details["is_at_edge"]


def test_search_goes_on_beyond_its_first_steps_while_the_last_is_the_best(monkeypatch):
    monkeypatch.setattr("clip_pgs.evaluation.probe._FIRST_EXPONENTS", (1.0, 3.0))
    _, details = probe(weak_signal(0), weak_signal(1))
    assert max(c for c, _ in details["tried"]) == 1e5


def test_search_ends_where_every_image_of_the_fit_is_right():
    _, details = probe(make_features(30, noise=0.3), make_features(5, noise=0.3, seed=1))
    assert max(c for c, _ in details["tried"]) == 1


def test_best_c_at_the_end_of_all_steps_is_told(monkeypatch, caplog):
    monkeypatch.setattr("clip_pgs.evaluation.probe._FIRST_EXPONENTS", (1.5, 3.5))
    monkeypatch.setattr("clip_pgs.evaluation.probe._HIGHEST", 3.5)
    with caplog.at_level(logging.WARNING):
        _, details = probe(weak_signal(0), weak_signal(1))
    assert details["is_at_edge"]
    assert details["regularization"] == 10**3.5
    assert "best C of the linear probe of clouds is the last one, 1e3.5" in caplog.text


def test_classes_are_held_back_in_equal_shares():
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 2 + [3])
    held_back = hold_back(torch.randn(63, 4), labels, seed=0)
    counts = [int(held_back[labels == label].sum()) for label in range(4)]
    assert counts == [50 * HELD_BACK_RATIO, 10 * HELD_BACK_RATIO, 1, 0]


def test_result_does_not_depend_on_the_order_of_the_images():
    train, test = make_features(25, noise=2.0), make_features(25, noise=2.0, seed=1)
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(3))
    turned = Features(train.images[order], train.labels[order])
    metrics, details = probe(train, test)
    other_metrics, other_details = probe(turned, test)
    assert other_metrics == metrics
    assert other_details["regularization"] == details["regularization"]


def test_seed_draws_other_images_to_hold_back():
    features_ND, labels = torch.randn(40, 4), torch.zeros(40, dtype=torch.int64)
    assert not torch.equal(
        hold_back(features_ND, labels, seed=0), hold_back(features_ND, labels, seed=1)
    )


def test_class_numbers_need_not_be_contiguous():
    train, test = make_features(20, noise=0.3), make_features(5, noise=0.3, seed=1)
    apart = [Features(part.images, part.labels * 7 + 3) for part in (train, test)]
    assert probe(*apart)[0] == probe(train, test)[0]


def test_train_of_one_class_is_refused():
    one = Features(torch.randn(9, 4), torch.full((9,), 2))
    with pytest.raises(ValueError, match=r"needs two classes, but train has only class 2 \(cat\)"):
        probe(one, one, classes=["ant", "bee", "cat"])


def test_class_that_train_lacks_is_named():
    names = [f"name{index}" for index in range(6)]
    full, test = make_features(5), make_features(5, seed=1)
    keep = full.labels != 4
    train = Features(full.images[keep], full.labels[keep])
    with pytest.raises(ValueError, match=r"cannot learn class 4 \(name4\): train lacks 1 of"):
        probe(train, test, classes=names)


def test_train_with_an_image_per_class_cannot_be_tuned():
    with pytest.raises(ValueError, match="no class of train has two images"):
        probe(make_features(1), make_features(5, seed=1))


@pytest.mark.parametrize("labels", [None, torch.ones(6, 3)])
def test_data_without_a_class_per_image_are_refused(labels):
    features = Features(torch.randn(6, 4), labels)
    with pytest.raises(ValueError, match="needs one class per image, which clouds lacks"):
        probe(features, features)


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
    """Minimize scikit-learn's documented objective with scipy; return logits."""
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


def centered(logits_NK):
    return (logits_NK - logits_NK.mean(dim=1, keepdim=True)).double()


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("c", [0.01, 10.0])
def test_solver_reaches_the_optimum_of_the_stated_objective(num_classes, c):
    features_ND, classes = make_problem(num_classes)
    classifier = LogisticRegression(CPU).fit(features_ND, classes, c=c)
    expected_NK = minimise_slowly(features_ND, classes, c=c)
    assert classifier.is_converged
    torch.testing.assert_close(
        centered(classifier.logits(features_ND)), expected_NK, atol=5e-3, rtol=5e-3
    )


@pytest.mark.parametrize("num_classes", [2, 5])
def test_solver_finds_the_classifier_of_scikit_learn(num_classes):
    features_ND, classes = make_problem(num_classes, num_samples=300, num_features=20)
    theirs = sklearn.linear_model.LogisticRegression(C=1.0, max_iter=3000, tol=1e-5)
    theirs.fit(features_ND.double().numpy(), classes.numpy())
    ours = LogisticRegression(CPU).fit(features_ND, classes, c=1.0)
    expected_NK = torch.from_numpy(theirs.predict_log_proba(features_ND.double().numpy()))
    found_NK = ours.logits(features_ND).double().log_softmax(dim=1)
    torch.testing.assert_close(found_NK, expected_NK, atol=5e-3, rtol=5e-3)
    assert torch.equal(found_NK.argmax(dim=1), expected_NK.argmax(dim=1))


def test_fit_does_not_depend_on_the_one_before():
    features_ND, classes = make_problem(4)
    alone = LogisticRegression(CPU).fit(features_ND, classes, c=1.0)
    solver = LogisticRegression(CPU)
    solver.fit(features_ND, classes, c=100.0)
    after = solver.fit(features_ND, classes, c=1.0)
    torch.testing.assert_close(after.weight, alone.weight, atol=5e-3, rtol=5e-3)


def test_torch_gives_the_same_in_chunks_of_rows(monkeypatch):
    features_ND, classes = make_problem(4)
    whole = LogisticRegression(CPU).fit(features_ND, classes, c=1.0)
    monkeypatch.setattr("clip_pgs.evaluation.probe._CHUNK_LOGITS", 4 * 7)
    parts = LogisticRegression(CPU).fit(features_ND, classes, c=1.0)
    torch.testing.assert_close(parts.weight, whole.weight, atol=5e-3, rtol=5e-3)


def test_torch_converges_where_a_few_directions_dominate():
    generator = torch.Generator().manual_seed(0)
    features_ND = torch.randn(400, 40, generator=generator) * torch.logspace(2, -3, 40)
    classes = torch.randint(4, (400,), generator=generator)
    assert LogisticRegression(CPU).fit(features_ND, classes, c=10.0).is_converged


@pytest.mark.parametrize("num_per_class", [3, 40])
def test_the_nearest_vote_as_in_scikit_learn(num_per_class, monkeypatch):
    monkeypatch.setattr(probe_module, "_CHUNK_LOGITS", 1000)
    train, test = make_features(num_per_class, noise=1.5), make_features(30, noise=1.5, seed=1)
    # Which numbers the classes have is of no account.
    train.labels.mul_(7)
    test.labels.mul_(7)
    oracle = sklearn.neighbors.KNeighborsClassifier(
        min(20, len(train.labels)),
        metric="cosine",
        weights=lambda distances: np.exp((1 - distances) / 0.07),
    ).fit(train.images.numpy(), train.labels.numpy())
    expected = oracle.score(test.images.numpy(), test.labels.numpy())
    assert nearest_neighbors(train, test, name="clouds", device=CPU) == pytest.approx(expected)
    assert 0.3 < expected < 0.95


def test_captions_have_no_neighbors_that_vote():
    train = make_features(3)
    captioned = Features(train.images, captions=[["a"]] * len(train.images))
    with pytest.raises(DamagedDataError, match="one class per image"):
        nearest_neighbors(train, captioned, name="pairs", device=CPU)
