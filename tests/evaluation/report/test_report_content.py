"""What the page of a report says, and the table beside it for programs."""

import base64
import csv
import io
import json
import statistics

import pytest
from PIL import Image

from clip_pgs.evaluation.report.command import write_report
from clip_pgs.evaluation.report.published import read_paper
from support.reports import (
    DEMO_SHAPE_ACC,
    EVIL_NAME,
    Page,
    make_result,
    save_results,
    save_run,
)

BLANK = "\N{EN DASH}"


def test_seeds_are_one_row_with_mean_and_standard_deviation(page):
    table = page.table("Zero-shot classification, top-1 accuracy, percent; no published")
    header, demo = table[0], next(row for row in table if row[0].startswith("demo "))
    # 0.50, 0.53 and 0.62 by hand: mean 0.55, deviations -5, -2 and 7 points, sqrt(78 / 2).
    assert demo[header.index("shape")] == "55.0 \N{PLUS-MINUS SIGN} 6.2"
    assert statistics.fmean(DEMO_SHAPE_ACC) == pytest.approx(0.55)
    # Within each run the average is (shape + 0.9) / 2: 0.70, 0.715, 0.76.
    assert demo[header.index("average")] == "72.5 \N{PLUS-MINUS SIGN} 3.1"


def test_data_samples_flops_time_masking_and_seeds_are_stated_once(page):
    table = page.table("Zero-shot classification, top-1 accuracy, percent; no published")
    name = next(row[0] for row in table if row[0].startswith("demo "))
    assert name == "demo demo/train, 60 k samples seen"
    assert page.text.count("44 TFLOP, 3 min 5 s, masking pgs 0.5, 3 seeds") == 1


def test_chance_stands_below_sets_without_published_rows(page):
    table = page.table("Zero-shot classification, top-1 accuracy, percent; no published")
    assert table[-1] == ["chance", "9.2", "10.0", "8.3"]
    retrieval = page.table("Zero-shot retrieval, recall, percent; no published")
    assert retrieval[-1] == ["chance", "0.3", "1.7", "3.3", "0.3", "1.7", "3.3"]
    pairs = page.table("Language compositionality, accuracy, percent; no published")
    assert all(cell.startswith("50.0") for cell in pairs[-1][1:-1])


def test_ties_are_counted_per_model(page):
    table = page.table("Language compositionality, accuracy, percent; no published")
    header, demo = table[0], next(row for row in table if row[0].startswith("demo "))
    assert demo[header.index("ties")] == "6 of 450"


def test_published_rows_stand_above_runs_on_the_papers_sets(page):
    table = page.table("Zero-shot classification, top-1 accuracy, percent; published rows")
    names = [row[0] for row in table[1:]]
    assert names == [
        *(f"{method.name} published, CC12M" for method in read_paper().methods),
        f"{EVIL_NAME} training unknown",
    ]
    mine = dict(zip(table[0], table[-1], strict=True))
    assert (mine["food101"], mine["cifar10"], mine["sun397"]) == ("45.0", "65.0", BLANK)
    assert mine["average"] == "55.0 (2 of 17 sets)"


@pytest.mark.parametrize(
    "suite",
    [
        "zeroshot_classification",
        "zeroshot_retrieval",
        "linear_probe",
        "robustness",
        "compositionality",
    ],
)
def test_published_cells_of_the_page_equal_those_of_the_file(page, suite):
    paper = read_paper()
    cells = [r for r in paper.rows if r["suite"] == suite and "average" not in r["dataset"]]
    titles = {
        "zeroshot_classification": "Zero-shot classification, top-1 accuracy, percent; published",
        "zeroshot_retrieval": "Zero-shot retrieval, recall, percent; published",
        "linear_probe": "Linear probe, top-1 accuracy, percent; published",
        "robustness": "Robustness, top-1 accuracy, percent; published",
        "compositionality": "Language compositionality, accuracy, percent; published",
    }
    table = page.table(titles[suite])
    for row in table:
        name = row[0].removesuffix(" published, CC12M")
        values = [r["value"] for r in cells if r["method"] == name]
        if values:
            assert sorted(values) == sorted(row[-len(values) :])
    assert len([row for row in table if "published" in row[0]]) == 6


def test_average_is_recomputed_beside_the_printed_one_and_the_difference_told(page):
    table = page.table("Robustness, top-1 accuracy, percent; published rows")
    clip = next(row for row in table if row[0].startswith("CLIP published"))
    assert table[0][1:5] == ["ID average", "as printed", "OOD average", "as printed"]
    assert clip[1:5] == ["31.0", "31.0", "29.9", "29.0"]
    assert "CLIP, OOD average: printed 29.0, from its cells 29.9" in page.text
    assert "A-CLIP, OOD average: printed 30.3, from its cells 29.3" in page.text
    assert "E-CLIP, OOD average: printed" not in page.text


def test_own_averages_of_robustness_follow_from_the_cells(page):
    table = page.table("Robustness, top-1 accuracy, percent; published rows")
    # (37 + 31 + 9 + 48 + 40 + 25) / 6 and, without the first, / 5.
    assert table[-1][1:5] == ["31.7", BLANK, "30.6", BLANK]


def test_headlines_compare_over_the_same_sets_only(page):
    # CLIP prints 42.3 on food101 and 57.7 on cifar10, CLIP-PGS-0.3 46.5 and 73.5.
    assert "over 2 of 17 sets; CLIP 50.0, CLIP-PGS-0.3 60.0" in page.text
    assert "over 2 sets; chance 9.2" in page.text


def test_missing_and_failed_sets_are_told_with_their_reason(page):
    table = page.table("Data sets without a result")
    assert [
        EVIL_NAME,
        "zeroshot-classification",
        "sun397",
        "missing",
        "no folder data/eval/sun397",
    ] in table
    assert ["demo_1", "robustness", "shape_grey", "failed", "OSError: <cut> | off"] in table


def test_average_that_leaves_a_set_out_says_so(page):
    table = page.table("Robustness, top-1 accuracy, percent; no published")
    header, demo = table[0], next(row for row in table if row[0].startswith("demo "))
    assert demo[header.index("OOD average")].endswith("(2 of 3 sets)")


def test_appendix_has_digest_date_and_versions(page):
    table = page.table("Where the numbers come from")
    (demo,) = [row for row in table if row[0] == "demo_2"]
    assert {"d2", "2", "2026-11-22T03:00:00+00:00", "torch 2.11.0"} <= set(demo)


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


@pytest.mark.usefixtures("without_pictures")
def test_report_of_demo_sets_alone_has_the_papers_tables_for_reference(tmp_path):
    report = write_report([save_run(tmp_path / "logs")], tmp_path / "report")
    page = Page((report / "report.html").read_text())
    assert "Published, for reference: CC12M, ViT-B/16, 32 epochs" in page.text
    table = page.table("Zero-shot classification, top-1 accuracy, percent; published in")
    assert len(table) == 7
    assert "none of the sets is the paper's" in page.text


def test_report_of_missing_sets_alone_has_no_figures_but_the_reasons(tmp_path):
    results = [make_result("shape", status="missing", error="no folder shape", samples=0)]
    save_results(tmp_path / "eval_results", results)
    report = write_report([tmp_path / "eval_results"], tmp_path / "report")
    page = Page((report / "report.html").read_text())
    assert page.table("Data sets without a result")[1][1:] == [
        "zeroshot-classification",
        "shape",
        "missing",
        "no folder shape",
    ]
    assert list((report / "figures").iterdir()) == []


def save_mask_picture(run, epoch, color, *, width=2000):
    (run / "masks").mkdir(exist_ok=True)
    Image.new("RGB", (width, 500), color).save(run / f"masks/epoch_{epoch}.png")


@pytest.mark.usefixtures("without_pictures")
def test_the_newest_mask_picture_of_each_run_is_on_the_page_and_small(tmp_path, caplog):
    runs = [
        save_run(tmp_path, number, masking=name) for number, name in enumerate(("pgs", "random"))
    ]
    for epoch, color in ((2, "red"), (10, "blue")):
        save_mask_picture(runs[0], epoch, color)
    (runs[1] / "masks").mkdir()
    (runs[1] / "masks/epoch_1.png").write_bytes(b"no picture")
    page = Page((write_report(runs, tmp_path / "report") / "report.html").read_text("utf-8"))
    (source,) = [one for one in page.loads if one.startswith("data:image/webp;base64,")]
    picture = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    assert picture.size == (1200, 300)
    red, _, blue = picture.convert("RGB").getpixel((600, 150))
    assert blue > 200 > 50 > red
    assert "masks" in page.ids
    assert str(runs[1] / "masks/epoch_1.png") in caplog.text


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize(
    ("masked", "counts"),
    [
        ((), "1 model (2 runs)"),
        ((0, 1), "1 model (2 runs; 2 rows, a mask a row)"),
        # A seed that was not scored through the mask is no further model.
        ((1,), "1 model (2 runs; 2 rows, a mask a row)"),
    ],
)
def test_runs_are_counted_once_through_however_many_masks_they_were_scored(
    tmp_path, masked, counts
):
    for number in range(2):
        results = [make_result("shape", metrics={"acc1": 0.5}, weights_digest=f"d{number}")]
        run = save_run(tmp_path / "logs", number, results=results)
        if number in masked:
            (path,) = (run / "eval").glob("*.json")
            result = json.loads(path.read_text()) | {"inference_masking": "pgs 0.5"}
            path.with_stem("masked").write_text(json.dumps(result))
    folder = write_report([tmp_path / "logs"], tmp_path / "report")
    assert f"{counts} on 1 data set of 1 suite;" in (folder / "report.md").read_text()


@pytest.mark.usefixtures("without_pictures")
def test_each_section_has_a_place_of_its_own_to_lead_to(tmp_path):
    suites = ("a_b", "a-b", "A_b", "a b")
    save_results(tmp_path, [make_result("shape", suite, {"acc1": 0.5}) for suite in suites])
    page = Page((write_report([tmp_path], tmp_path / "report") / "report.html").read_text())
    leading = [link for link in page.links if "_b" in link or "a-b" in link]
    assert len(set(leading)) == len(suites)
    assert {link.removeprefix("#") for link in page.links} <= page.ids
