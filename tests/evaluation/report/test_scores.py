from dataclasses import replace

import pytest
import torch

from clip_pgs.evaluation.metrics import retrieval_metrics
from clip_pgs.evaluation.report.command import write_report
from clip_pgs.evaluation.report.gather import gather_runs
from clip_pgs.evaluation.report.scores import Place, chance_results, score_runs
from support.reports import Page, make_result, save_results, save_run


def test_average_over_seeds_is_over_the_sets_that_all_have(tmp_path):
    # Run 0 has 10, 20 and 60 percent, run 1 has 30 and 40 on the first two: 15 and 35.
    for number, values in enumerate([(0.1, 0.2, 0.6), (0.3, 0.4)]):
        results = [
            make_result(f"s{place}", metrics={"acc1": value}, weights_digest=f"d{number}")
            for place, value in enumerate(values)
        ]
        save_run(tmp_path, number, results)
    runs = [run.results for run in gather_runs([tmp_path])]
    score = score_runs(runs)[Place("zeroshot-classification", "average", "acc1", True)]
    assert score.mean == pytest.approx(0.25)
    assert score.spread == pytest.approx(0.02**0.5)
    assert (score.sets, score.members) == (("s0", "s1"), {"s0", "s1", "s2"})


@pytest.mark.parametrize("lacks", [{"acc1": 0.3}, {"acc1": 0.3, "acc5": None}])
def test_an_average_over_seeds_is_over_the_sets_that_all_have_the_metric_of(lacks):
    # As of an earlier version, which did not measure all that there is now.
    values = [{"s0": (0.1, 0.6), "s1": (0.3, 0.8)}, {"s0": (0.5, 0.9), "s1": (0.7, None)}]
    runs = [
        [
            make_result(
                name,
                metrics=lacks if acc5 is None else {"acc1": acc1, "acc5": acc5},
                weights_digest=f"d{number}",
            )
            for name, (acc1, acc5) in of_run.items()
        ]
        for number, of_run in enumerate(values)
    ]
    found = score_runs(runs)
    acc1, acc5 = (
        found[Place("zeroshot-classification", "average", metric, True)]
        for metric in ("acc1", "acc5")
    )
    assert (acc5.mean, acc5.sets, acc5.num_runs) == (pytest.approx(0.75), ("s0",), 2)
    assert acc5.members == {"s0", "s1"}
    assert (acc1.mean, acc1.sets) == (pytest.approx(0.3), ("s0", "s1"))
    # A run that has the metric of no set takes none from the others.
    for result in runs[1]:
        result.metrics.pop("acc5", None)
    acc5 = score_runs(runs)[Place("zeroshot-classification", "average", "acc5", True)]
    assert (acc5.mean, acc5.sets, acc5.num_runs) == (pytest.approx(0.7), ("s0", "s1"), 1)


@pytest.mark.parametrize(
    ("sets", "shares"),
    [
        (("ab", "cd"), (" (2 of 4 sets)", " (2 of 4 sets)")),
        (("ab", "bc"), (" (2 of 3 sets)", " (2 of 3 sets)")),
        (("abc", "ab"), ("", " (2 of 3 sets)")),
        (("ab", "ba"), ("", "")),
    ],
)
def test_an_average_over_other_sets_is_not_whole_because_they_are_as_many(
    tmp_path, monkeypatch, sets, shares
):
    for number, names in enumerate(sets):
        named = {"model": f"m{number}", "weights_digest": f"d{number}"}
        scored = [make_result(name, metrics={"acc1": 0.5}, **named) for name in names]
        save_results(tmp_path / f"run_{number}", scored)
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.bar", lambda *parts, **_: drawn.append(parts))
    page = Page((write_report([tmp_path], tmp_path / "report") / "report.html").read_text())
    rows = page.table("Zero-shot classification, top-1 accuracy, percent; no published")
    averages = {row[0].split()[0]: row[1] for row in rows}
    assert [averages[f"m{number}"] for number in range(2)] == [f"50.0{share}" for share in shares]
    num_bars = len(sets[0]) + len(sets[1]) + shares.count("")
    assert len(drawn) == num_bars


@pytest.mark.parametrize("captions", [[1] * 8, [5] * 8, [2, 3] * 4], ids=["one", "five", "some"])
def test_chance_of_retrieval_is_what_random_features_score(captions):
    dice = torch.Generator().manual_seed(0)
    image_of_text = torch.arange(8).repeat_interleave(torch.tensor(captions))
    scores: dict[str, float] = {}
    for _ in range(2000):
        images, texts = (torch.randn(n, 8, generator=dice) for n in (8, sum(captions)))
        drawn = retrieval_metrics(images, texts, image_of_text, recall_at=(1, 3, 5))
        scores |= {name: scores.get(name, 0) + value / 2000 for name, value in drawn.items()}
    details = {"captions": sum(captions)}
    result = make_result("set", "zeroshot-retrieval", scores, samples=8, details=details)
    (chance,) = chance_results([result])
    # Of 16,000 draws the deviation is at most 0.004.
    assert chance.metrics == pytest.approx(scores, abs=0.02)
    # A table of results has no details.
    table = replace(result, details={}, weights_digest="another")
    for order in ([result, table], [table, result]):
        assert chance_results(order)[0].metrics == chance.metrics
