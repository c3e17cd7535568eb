import pytest

from clip_pgs.evaluation.report.gather import gather_runs
from clip_pgs.evaluation.report.scores import Place, score_runs
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
