import csv
import dataclasses
from importlib.resources import files

import pytest

from clip_pgs.evaluation.report.published import read_paper
from clip_pgs.evaluation.report.scores import averages
from support.reports import make_result

PAPER = read_paper()
CELLS = [
    row
    for row in csv.DictReader(
        files("clip_pgs.evaluation.report").joinpath("clip_pgs_cvpr2025.csv").open()
    )
    if row["suite"] not in ("cost", "ablation") and "average" not in row["dataset"]
]


def test_methods_are_those_of_the_paper_in_its_order():
    names = [method.name for method in PAPER.methods]
    assert names == ["CLIP", "FLIP", "A-CLIP", "E-CLIP", "CLIP-PGS-0.5", "CLIP-PGS-0.3"]


def test_every_cell_of_the_file_is_a_result():
    found = {
        (result.suite, method.name, result.dataset, metric.removeprefix("lp_")): value
        for method in PAPER.methods
        for result in method.results
        for metric, value in result.metrics.items()
    }
    assert found == {
        (row["suite"].replace("_", "-"), row["method"], row["dataset"], row["metric"]): (
            pytest.approx(float(row["value"]) / 100)
        )
        for row in CELLS
    }


@pytest.mark.parametrize(
    ("method", "printed", "recomputed"),
    [("CLIP", 0.290, 0.2992), ("A-CLIP", 0.303, 0.2928), ("CLIP-PGS-0.3", 0.318, 0.318)],
)
def test_ood_average_is_told_as_printed_and_follows_from_the_cells(method, printed, recomputed):
    (row,) = [m for m in PAPER.methods if m.name == method]
    assert row.averages["robustness", "ood_average"] == printed
    (mean,) = [a.value for a in averages(row.results) if a.name == "ood_average"]
    assert mean == pytest.approx(recomputed)


def test_training_times_are_multiples_of_clips():
    times = [method.relative_time for method in PAPER.methods]
    assert times == [1.0, 0.5, 1.1, 0.6, 0.5, 0.6]


def test_ablation_is_apart_from_the_methods():
    full = PAPER.ablation["PGS-0.3 + ED + OTN"]
    assert full["imagenet1k", "acc1"] == 0.386
    assert len(PAPER.ablation) == 6


@pytest.mark.parametrize(
    ("dataset", "suite", "samples", "name"),
    [
        ("vtab/cifar10", "zeroshot-classification", 10_000, "cifar10"),
        ("cifar10", "zeroshot-classification", 1_000, None),  # a slice
        ("sugar_crepe/add_att", "compositionality", 692, "add_att"),
        ("sugar_crepe/add_att", "compositionality", 150, None),  # the demo world's
        ("shape", "robustness", 600, None),
        ("cifar10", "robustness", 10_000, None),  # the paper has it in another suite
    ],
)
def test_set_of_the_paper_is_known_by_name_and_size(dataset, suite, samples, name):
    assert PAPER.set_name(make_result(dataset, suite, samples=samples)) == name


def test_items_count_where_images_carry_several():
    result = make_result("add_att", "compositionality", samples=497, details={"items": 692})
    assert PAPER.set_name(result) == "add_att"


def test_missing_set_is_known_by_its_name():
    result = dataclasses.replace(make_result("food101", samples=0), status="missing")
    assert PAPER.set_name(result) == "food101"
