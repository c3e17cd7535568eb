"""The table that a report writes for programs."""

import csv
import statistics

import pytest

from support.reports import DEMO_SHAPE_ACC


@pytest.fixture(scope="module")
def rows(report):
    with (report / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_table_file_has_every_score_in_full(rows):
    (row,) = [
        row
        for row in rows
        if (row["model"], row["suite"], row["name"]) == ("demo", "zeroshot-classification", "shape")
        and row["metric"] == "acc1"
    ]
    assert (row["kind"], row["sets"], row["runs"], row["seeds"]) == ("run", "other", "3", "0 1 2")
    assert float(row["value"]) == pytest.approx(0.55)
    assert float(row["spread"]) == pytest.approx(statistics.stdev(DEMO_SHAPE_ACC))
    assert row["training_data"] == "data/demo/train/{00000..00011}.tar"
    assert (float(row["samples_seen"]), float(row["flops"])) == (60_000, 4.4e13)


def test_table_file_marks_published_rows_and_their_source(rows):
    published = [row for row in rows if row["kind"] == "published" and row["is_average"] == "0"]
    assert len(published) == 6 * (17 + 3 * 6 + 3 + 6 + 7)
    assert {row["source"] for row in published} == {"arXiv 2503.17080"}
    (average,) = [
        row
        for row in rows
        if (row["model"], row["name"], row["kind"]) == ("CLIP", "ood_average", "published")
    ]
    assert (float(average["value"]), average["printed"]) == (pytest.approx(0.2992), "0.29")


def test_table_file_has_the_sets_without_a_result(rows):
    (row,) = [row for row in rows if row["status"] == "failed"]
    assert (row["model"], row["name"], row["value"]) == ("demo_1", "shape_grey", "")
    assert row["reason"] == "OSError: <cut> | off"
