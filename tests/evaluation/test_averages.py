import pytest

from clip_pgs.evaluation.report.scores import averages, chance_results
from support import reports

ROBUSTNESS = ("imagenet1k", "imagenetv2", "imagenet-a", "imagenet-r", "imagenet-o")
ROBUSTNESS += ("imagenet_sketch",)
# Cells of the paper's tables, in percent, and what it prints as their averages.
PAPER_ROBUSTNESS = {
    "CLIP": ((36.1, 30.7, 8.0, 47.6, 38.4, 24.9), 31.0, 29.9),  # prints 29.0
    "A-CLIP": ((35.2, 30.1, 8.1, 45.1, 39.4, 23.7), 30.3, 29.3),  # prints 30.3
    "E-CLIP": ((36.3, 30.7, 8.1, 47.9, 39.6, 25.4), 31.3, 30.3),
    "CLIP-PGS-0.3": ((38.6, 33.1, 9.6, 48.1, 42.6, 25.6), 32.9, 31.8),
}
SPLITS = ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att", "add_obj", "add_att")
PAPER_COMPOSITIONALITY = {
    "CLIP": ((85.8, 79.2, 64.5, 61.8, 58.7, 74.2, 68.4), (73.9, 68.8, 64.5)),  # prints 73.7
    "A-CLIP": ((86.6, 75.5, 63.2, 52.4, 63.1, 71.6, 66.8), (70.2, 68.5, 63.2)),  # 71.6, 68.4
    "E-CLIP": ((86.9, 73.5, 60.2, 59.4, 63.4, 73.3, 66.8), (73.2, 67.9, 60.2)),  # prints 68.4
    "CLIP-PGS-0.3": ((88.1, 76.0, 67.9, 64.1, 66.5, 74.2, 69.9), (75.5, 70.8, 67.9)),
}


def make_result(suite, dataset, metrics, *, status="done", digest="d", **details):
    return reports.make_result(
        dataset, suite, metrics, status=status, weights_digest=digest, details=details
    )


def robustness(cells, names=ROBUSTNESS, **first):
    results = [
        make_result("robustness", name, {"acc1": cell / 100})
        for name, cell in zip(names, cells, strict=True)
    ]
    results[0].details.update(first)
    return results


def by_name(found):
    return {average.name: average for average in found}


@pytest.mark.parametrize("method", PAPER_ROBUSTNESS)
def test_robustness_averages_follow_from_the_cells_of_the_paper(method):
    cells, id_average, ood_average = PAPER_ROBUSTNESS[method]
    found = by_name(averages(robustness(cells)))
    assert round(100 * found["id_average"].value, 1) == id_average
    assert round(100 * found["ood_average"].value, 1) == ood_average
    assert found["ood_average"].sets == ROBUSTNESS[1:]


@pytest.mark.parametrize("method", PAPER_COMPOSITIONALITY)
def test_compositionality_averages_follow_from_the_cells_of_the_paper(method):
    cells, expected = PAPER_COMPOSITIONALITY[method]
    found = by_name(
        averages(
            make_result("compositionality", f"sugar_crepe/{split}", {"acc": cell / 100})
            for split, cell in zip(SPLITS, cells, strict=True)
        )
    )
    values = tuple(
        round(100 * found[part].value, 1) for part in ("object", "attribute", "relation")
    )
    assert values == expected
    assert not found["object"].missing
    assert set(found["attribute"].sets) == {
        "sugar_crepe/add_att",
        "sugar_crepe/replace_att",
        "sugar_crepe/swap_att",
    }


def test_average_of_a_suite_is_the_mean_of_its_sets_metric_by_metric():
    found = averages(
        [
            make_result("zeroshot-classification", "a", {"acc1": 0.2, "acc5": 0.5}),
            make_result("zeroshot-classification", "b", {"acc1": 0.4, "acc5": None}),
        ]
    )
    assert [(a.name, a.metric, a.value, a.sets, a.missing) for a in found] == [
        ("average", "acc1", pytest.approx(0.3), ("a", "b"), ()),
        ("average", "acc5", pytest.approx(0.5), ("a",), ("b",)),
    ]


@pytest.mark.parametrize("status", ["missing", "failed"])
def test_average_tells_which_sets_it_lacks(status):
    results = robustness((40.0, 30.0), ("imagenet1k", "imagenetv2"))
    results.append(make_result("robustness", "imagenet-a", {}, status=status))
    found = by_name(averages(results))
    assert found["id_average"].value == pytest.approx(0.35)
    assert found["ood_average"].value == pytest.approx(0.30)
    assert found["ood_average"].missing == ("imagenet-a",)
    assert found["ood_average"].missing


def test_splits_that_were_not_evaluated_are_missing_from_their_average():
    results = [make_result("compositionality", "sugar_crepe/add_obj", {"acc": 0.5})]
    found = by_name(averages(results))
    assert set(found) == {"average", "object"}
    assert found["object"].missing == ("sugar_crepe/replace_obj", "sugar_crepe/swap_obj")


@pytest.mark.parametrize("folder", ["sugar_crepe/", "theirs/", ""])
@pytest.mark.parametrize("own", ["mine", "own/mine", "own/negation"])
def test_a_set_of_ones_own_lacks_no_splits_of_sugar_crepe(folder, own):
    names = [own, *(f"{folder}{split}" for split in SPLITS)]
    found = by_name(averages(make_result("compositionality", n, {"acc": 0.5}) for n in names))
    assert set(found) == {"average", "object", "attribute", "relation"}
    assert not any(average.missing for average in found.values())
    alone = by_name(averages([make_result("compositionality", own, {"acc": 0.5})]))
    assert set(alone) == {"average"}


def test_set_that_calls_itself_the_original_is_left_out_of_the_ood_average():
    cells, names = (50.0, 40.0, 30.0), ("plain", "noisy", "blurred")
    found = by_name(averages(reversed(robustness(cells, names, is_reference=True))))
    assert found["id_average"].value == pytest.approx(0.4)
    assert found["ood_average"].value == pytest.approx(0.35)


def test_without_a_known_original_there_is_no_ood_average():
    found = averages(robustness((50.0, 40.0), ("noisy", "blurred")))
    assert [average.name for average in found] == ["average"]


def test_every_suite_of_a_list_gets_its_own_averages():
    found = averages(
        [
            make_result("linear-probe", "a", {"lp_acc1": 0.9}),
            make_result("zeroshot-classification", "a", {"acc1": 0.1}),
        ]
    )
    assert [(average.suite, average.value) for average in found] == [
        ("linear-probe", 0.9),
        ("zeroshot-classification", 0.1),
    ]


def test_no_results_give_no_averages():
    assert averages([]) == []
    assert averages([make_result("robustness", "a", {}, status="failed")]) == []


def test_results_of_two_models_are_refused():
    results = [make_result("robustness", "a", {"acc1": 0.1}, digest=d) for d in "xy"]
    with pytest.raises(ValueError, match="one model's results, got those of 2"):
        averages(results)


def test_data_set_that_comes_twice_is_refused():
    results = [make_result("robustness", "a", {"acc1": 0.1}) for _ in range(2)]
    with pytest.raises(ValueError, match="robustness need each data set once, got a, a"):
        averages(results)


def test_chance_is_averaged_as_the_models_are_where_the_set_that_others_vary_failed():
    plain = make_result("robustness", "plain", {}, status="failed", is_reference=True)
    others = [
        make_result("robustness", name, {"acc1": 0.5}, classes=classes)
        for name, classes in (("noise", 4), ("blur", 10))
    ]
    for results in ([plain, *others], [*others, plain]):
        of_models, of_chance = (by_name(averages(r)) for r in (results, chance_results(results)))
        assert of_chance.keys() == of_models.keys() >= {"id_average", "ood_average"}
        assert of_chance["id_average"].value == pytest.approx((1 / 4 + 1 / 10) / 2)
        assert of_chance["id_average"].missing == ("plain",)
