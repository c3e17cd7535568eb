from clip_pgs.evaluation.report.published import read_paper
from clip_pgs.evaluation.report.scores import split_families
from support.reports import demo_results, make_result, paper_results

PAPER = read_paper()


def names(results):
    return [(result.suite, result.dataset) for result in results]


def test_demo_sets_are_other_sets_under_their_own_names():
    families = split_families(demo_results(), PAPER)
    assert families["paper"] == []
    assert names(families["other"]) == names(demo_results())


def test_sets_of_the_paper_get_its_names():
    families = split_families(paper_results(), PAPER)
    assert families["other"] == []
    assert ("zeroshot-classification", "cifar10") in names(families["paper"])


def test_missing_set_beside_namesakes_is_no_set_of_the_paper():
    missing = make_result("sugar_crepe/add_obj", "compositionality", status="missing", samples=0)
    alone = split_families([missing], PAPER)
    assert names(alone["paper"]) == [("compositionality", "add_obj")]
    beside = split_families([*demo_results(), missing], PAPER)
    assert beside["paper"] == []


def test_second_copy_of_a_set_is_another_set():
    copies = [make_result(name, samples=10_000) for name in ("vtab/cifar10", "cifar10")]
    families = split_families(copies, PAPER)
    assert [len(families["paper"]), len(families["other"])] == [1, 1]
