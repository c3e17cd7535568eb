from dataclasses import replace

import pytest
import torch

from clip_pgs.evaluation.metrics import retrieval_metrics
from clip_pgs.evaluation.report.gather import gather_runs
from clip_pgs.evaluation.report.scores import Place, chance_results, score_runs
from support.reports import make_result, save_run


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
    assert (score.sets, score.num_members) == (("s0", "s1"), 3)


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
