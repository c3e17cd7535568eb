import pytest

from clip_pgs.evaluation.report.command import write_report
from clip_pgs.evaluation.report.published import read_paper
from clip_pgs.evaluation.report.scores import split_families
from support.reports import Page, demo_results, make_result, paper_results, save_results

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


@pytest.mark.parametrize(
    ("datasets", "paper"),
    [
        (["sets/flickr8k"], "sets/flickr8k"),  # the set itself in a folder of one's own
        (["blur/flickr8k", "flickr8k"], "flickr8k"),
        (["clean/flickr8k", "blur/flickr8k"], None),
    ],
)
def test_one_of_several_namesakes_at_most_is_the_papers(datasets, paper):
    results = [make_result(name, "zeroshot-retrieval", samples=1000) for name in datasets]
    families = split_families(results, PAPER)
    assert len(families["paper"]) == (paper is not None)
    others = [name for name in datasets if name != paper]
    assert names(families["other"]) == [("zeroshot-retrieval", name) for name in others]


def report_on(tmp_path, *of_models):
    """Write a report on models that called a set of the paper's size by names of their own."""
    for number, sets in enumerate(of_models):
        model = {"model": f"m{number}", "weights_digest": f"d{number}"}
        scored = {"metrics": {"acc1": 0.25 + number / 2}, "samples": 10_000} | model
        missing = {"status": "missing", "samples": 0, "error": "gone"} | model
        results = [
            make_result(name, **(missing if digest is None else scored | {"data_digest": digest}))
            for name, digest in sets.items()
        ]
        save_results(tmp_path / f"run_{number}" / "eval", results)
    return (write_report([tmp_path], tmp_path / "report") / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    "called",
    [
        [{"cifar10": "a"}, {"vtab/cifar10": "a"}],
        [{"x/cifar10": "a"}, {"y/cifar10": "a"}],
        [{"x/cifar10": "a"}, {"y/cifar10": "a", "x/cifar10": None}],
        [{"vtab/cifar10": "a"}, {"vtab/cifar10": None, "cifar10": "a"}],
    ],
)
def test_one_set_that_models_call_otherwise_stands_beside_the_papers(tmp_path, caplog, called):
    page = Page(report_on(tmp_path, *called))
    rows = page.table("Zero-shot classification, top-1 accuracy, percent; published rows")
    columns = {row[0].split()[0]: row[1:] for row in rows}
    assert columns["m0"].index("25.0") == columns["m1"].index("75.0")
    assert columns["CLIP-PGS-0.3"][columns["m0"].index("25.0")] == "73.5"
    assert not caplog.messages


def test_one_set_of_ones_own_that_models_call_otherwise_is_one_column(tmp_path, caplog):
    page = Page(report_on(tmp_path, {"x/mine": "a", "copy/mine": "a"}, {"y/mine": "a"}))
    rows = page.table("Zero-shot classification, top-1 accuracy, percent; no published")
    columns = {row[0].split()[0]: row[1:] for row in rows}
    # A second copy stands apart.
    assert columns["m0"].count("25.0") >= 2
    assert columns["m0"][columns["m1"].index("75.0")] == "25.0"
    assert not caplog.messages


@pytest.mark.parametrize(
    ("called", "reason"),
    [
        ([{"cifar10": "a"}, {"vtab/cifar10": "b"}], "their data differ"),
        ([{"x/cifar10": "a"}, {"y/cifar10": ""}], "no data_digest"),
        ([{"x/mine": ""}, {"y/mine": ""}], "no data_digest"),
        ([{"x/mine": "a", "y/mine": "b"}, {"x/mine": "a"}], ""),  # of one list, and so on purpose
    ],
)
def test_namesakes_that_are_not_known_as_one_set_are_told(tmp_path, caplog, called, reason):
    report_on(tmp_path, *called)
    names = [next(iter(sets)) for sets in called]
    told = [text for text in caplog.messages if "two sets" in text]
    assert len(told) == bool(reason)
    for text in told:
        assert reason in text
        assert text.endswith(f"{' and '.join(names)} (zeroshot-classification)")


def test_namesakes_of_two_models_never_share_a_column(tmp_path):
    for number, dataset in enumerate(["clean/flickr8k", "blur/flickr8k"]):
        recalls = {"image_retrieval_recall@1": 0.25 + number / 2}
        scored = make_result(
            dataset,
            "zeroshot-retrieval",
            recalls,
            samples=1000,
            model=f"m{number}",
            weights_digest=f"d{number}",
        )
        save_results(tmp_path / f"run_{number}" / "eval", [scored])
    folder = write_report([tmp_path], tmp_path / "report")
    page = Page((folder / "report.html").read_text("utf-8"))
    rows = page.table("Zero-shot retrieval, recall, percent; no published")
    columns = {row[0].split()[0]: row[1:] for row in rows}
    assert abs(columns["m0"].index("25.0") - columns["m1"].index("75.0")) == 1


def test_sets_whose_names_end_alike_have_headings_of_their_own(tmp_path):
    sets = ["a/things", "b/things", "c/other"]
    found = [make_result(name, metrics={"acc1": 0.5}, details={"classes": 4}) for name in sets]
    recalls = {f"image_retrieval_recall@{k}": 0.5 for k in (1, 5)}
    found += [make_result(name, "zeroshot-retrieval", recalls) for name in sets]
    save_results(tmp_path / "eval", found)
    report = write_report([tmp_path], tmp_path / "report")
    table, _, retrieval = (report / "report.md").read_text("utf-8").partition("Zero-shot retrieval")
    for name in ("a/things", "b/things", "other"):
        assert f"| {name} |" in table
        assert f"| {name} image R@1 |" in retrieval
