"""What a report makes of damaged files, hostile names and suites that it does not know."""

import csv
import json
import re
from dataclasses import asdict

import pytest

from clip_pgs.evaluation.report.command import run
from clip_pgs.evaluation.report.gather import gather_runs
from support.reports import Page, demo_results, make_result, save_results, save_run

OPTIONS = {"model": "ViT-B-16", "train_data": "a.tar", "masking": "pgs", "seed": 4}
MEASURE, ODD = '{{"samples": {}}}', ['"many"', "NaN", "1e999", "-5", "null"]
MEASURED = b'{"samples": 640, "flops": 2.5e9, "seconds": 60}\n'
NAMES = [
    "=cmd|' /c calc'!A0",
    "@SUM(1+1)",
    "\t-1+1",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "![x](http://host/x)",
    "# a\n- b | c",
    "\x1b[2J\x1b[31mred\x07",
    "a\u202eb\ud800c",
    "../../outside",
    "_underscore",
    "$x^2$ {{ 1 }} {% x %} &lt;",
    "\u4e2d\u6587",
    "n" * 3000,
]


def report_of(tmp_path, *sources):
    """Make a report with the command, and return its page and the rows of its table."""
    folder = tmp_path / "out" / "report"
    assert run([*map(str, sources), "-o", str(folder)]) == 0
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return Page((folder / "report.html").read_text("utf-8")), rows, folder


def save_bare_run(tmp_path, options=None, metrics=MEASURED):
    run_folder = tmp_path / "mine"
    save_results(run_folder / "eval", demo_results())
    text = json.dumps(OPTIONS) if options is None else options
    (run_folder / "options.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    (run_folder / "metrics.jsonl").write_bytes(metrics)
    return run_folder


def facts_of(folder):
    (found,) = gather_runs([folder])
    return found.training.samples, found.training.flops, found.training.seed


def sets_of(folder):
    (found,) = gather_runs([folder])
    return {result.dataset for result in found.results}


@pytest.mark.parametrize(
    "line",
    [
        b'{"samples": 700, "note": "\xff"}\n',
        b'{"samples": 700, "fl',
        b"[" * 100_000 + b"\n",
        b"\x00\x01\n",
    ],
)
def test_damaged_line_of_the_metrics_is_passed_over_and_the_file_named(tmp_path, caplog, line):
    run_folder = save_bare_run(tmp_path, metrics=MEASURED + line)
    assert facts_of(run_folder) == (640, 2.5e9, 4)
    assert str(run_folder / "metrics.jsonl") in caplog.text


@pytest.mark.parametrize("line", ["7", "[]", '"samples"', "null", *map(MEASURE.format, ODD)])
def test_line_that_tells_no_measure_is_passed_over(tmp_path, line):
    run_folder = save_bare_run(tmp_path, metrics=MEASURED + line.encode() + b"\n")
    assert facts_of(run_folder) == (640, 2.5e9, 4)


@pytest.mark.parametrize("text", ["[]", "7", "{", '"x"', "null", b"\xff\xfe", "[" * 100_000])
def test_options_that_are_none_leave_blanks_and_the_file_is_named(tmp_path, caplog, text):
    run_folder = save_bare_run(tmp_path, options=text)
    assert facts_of(run_folder) == (None, None, None)
    assert str(run_folder / "options.json") in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"masking_options": [1]},
        {"seed": "x"},
        {"train_data": {"a": 1}},
        {"model": ["m"]},
        {"masking": None},
    ],
)
def test_odd_option_stops_no_report(tmp_path, change):
    assert facts_of(save_bare_run(tmp_path, json.dumps({**OPTIONS, **change})))[0] == 640


@pytest.mark.parametrize(
    "record",
    [{"recipe": []}, {"data": [1]}, {"cost": "much"}, {"cost": {"samples": float("nan")}}],
)
def test_odd_record_of_a_checkpoint_stops_no_report(tmp_path, record):
    assert facts_of(save_run(tmp_path / "logs", **record))[0] is None


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": {"acc1": float("nan")}},
        {"metrics": {"acc1": 1e300}},
        {"metrics": {"acc1": -0.5}},
        {"metrics": {"acc1": "high"}},
        {"metrics": [0.5]},
        {"samples": "many"},
        {"samples": -1},
        {"details": {"classes": "many"}},
        {"details": {"items": None}},
        {"details": {"ties": float("inf")}},
        {"details": []},
        {"flops_per_image": 10**400},
        {"flops_per_image": float("nan")},
        {"flops_per_image": float("inf")},
        {"flops_per_image": -5},
        {"dataset": 7},
        {"date": None},
        {"model": ["m"]},
    ],
)
def test_result_that_cannot_be_is_left_out_and_its_file_named(tmp_path, caplog, change):
    save_results(tmp_path / "eval", demo_results())
    odd = json.loads((tmp_path / "eval/zeroshot-classification_shape.json").read_text())
    (tmp_path / "eval/odd.json").write_text(json.dumps({**odd, "dataset": "odd", **change}))
    assert "shape" in sets_of(tmp_path / "eval")
    assert not {"odd", 7} & sets_of(tmp_path / "eval")
    assert str(tmp_path / "eval/odd.json") in caplog.text


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "runs/\ud800/x.pt", "x/" * 3000 + "x.pt"])
def test_weights_of_any_name_stop_no_report(tmp_path, path):
    save_results(tmp_path / "eval", demo_results(pretrained=path))
    assert "shape" in sets_of(tmp_path / "eval")


@pytest.mark.parametrize("content", [b"suite\xff\n", b"a\0b\n", b'"' + b"x" * 200_000, b"a,b\n1\n"])
def test_table_that_is_none_is_refused_by_its_name(tmp_path, capsys, content):
    (tmp_path / "odd.csv").write_bytes(content)
    assert run([str(tmp_path / "odd.csv"), "-o", str(tmp_path / "report")]) == 2
    assert str(tmp_path / "odd.csv") in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


@pytest.mark.slow
def test_names_of_anything_are_shown_and_do_nothing(tmp_path):
    (tmp_path / "eval").mkdir()
    for number, name in enumerate(NAMES):
        results = [
            make_result(name, name, {name: 0.5, "acc1": 0.5}, model=name, weights_digest=name),
            make_result(f"f{number}", status="failed", error=name, model=name, weights_digest=name),
        ]
        for result in results:
            path = tmp_path / "eval" / f"{result.status}_{number}.json"
            path.write_text(json.dumps(asdict(result)))
    page, rows, folder = report_of(tmp_path, tmp_path / "eval")
    assert not {"script", "x"} & set(page.tags)
    assert all(load.startswith("data:image/svg+xml;base64,") for load in page.loads)
    assert page.text.count("<script>alert(1)</script>") > 3
    assert {link.removeprefix("#") for link in page.links} <= page.ids
    for row in rows:
        for cell in row.values():
            assert not re.match(r"\s*[=@\t]|\s*[+-](?!\d)", cell)
    markdown = (folder / "report.md").read_text("utf-8")
    assert not re.search(r"(?<!\\)<(script|img)|(?<!\\)!\[x|^# a|^- b", markdown, re.MULTILINE)
    for text in (markdown, page.text, (folder / "results.csv").read_text("utf-8")):
        assert "\x1b" not in text
        assert "\u202e" not in text
    # Files are written into the folder of the report alone, a figure for each suite.
    names = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report"}
    drawn = [name for name in names if re.search(r"_other(-[0-9a-f]{8})?\.png$", name)]
    assert len(drawn) == len(NAMES)


def test_suite_that_the_report_does_not_know_is_shown_like_the_others(tmp_path):
    results = [
        make_result(name, "counting", {"exact": value, "within_1": 0.9}, model="m")
        for name, value in (("apples", 0.25), ("pears", 0.75))
    ]
    save_results(tmp_path / "run/eval", results)
    page, rows, folder = report_of(tmp_path, tmp_path / "run/eval")
    (table,) = [
        rows for label, rows in page.tables.items() if label.startswith("counting, percent;")
    ]
    assert "25.0" in "".join(table[-1])
    values = {(r["name"], r["metric"]): r["value"] for r in rows if r["suite"] == "counting"}
    assert values["average", "exact"] == "0.5"
    assert (folder / "figures/counting_other.png").is_file()
    assert "## counting\n" in (folder / "report.md").read_text()


@pytest.mark.slow
def test_curve_of_a_suite_that_the_report_does_not_know_is_drawn(tmp_path):
    run_folder = save_run(tmp_path)
    for epoch in (1, 2):
        result = make_result(
            "apples", "counting", {"exact": 0.1 * epoch}, weights_digest=f"{epoch}"
        )
        save_results(run_folder / f"eval/epoch_{epoch}", [result])
    _, _, folder = report_of(tmp_path, run_folder)
    assert (folder / "figures/epochs.svg").is_file()


@pytest.mark.usefixtures("without_pictures")
def test_set_that_lacks_the_main_metric_of_its_suite_is_shown_with_those_it_has(tmp_path):
    metrics = {"voc2007_multilabel": {"mean_average_precision": 0.625}, "shape": {"acc1": 0.5}}
    results = [make_result(name, metrics=values) for name, values in metrics.items()]
    save_results(tmp_path / "run/eval", results)
    page, _, _ = report_of(tmp_path, tmp_path / "run/eval")
    table = page.table("Zero-shot classification, top-1 accuracy, percent; no published")
    assert "62.5" in table[-1]
    assert "50.0" in table[-1]


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("status", ["failed", "missing"])
def test_result_without_a_reason_says_so(tmp_path, status):
    results = [make_result("shape", metrics={"acc1": 0.5})]
    results.append(make_result("gone", status=status, samples=0, error=None))
    save_results(tmp_path / "run/eval", results)
    page, rows, _ = report_of(tmp_path, tmp_path / "run/eval")
    (row,) = [row for row in rows if row["name"] == "gone"]
    assert (row["status"], bool(row["reason"])) == (status, True)
    assert row["reason"] in page.table("Data sets without a result")[1]
    assert f"{status}: {row['reason']}" in page.text


@pytest.mark.usefixtures("without_pictures")
def test_average_says_how_many_of_its_sets_it_covers(tmp_path):
    results = [make_result(name, metrics={"acc1": 0.5}) for name in ("a", "b", "c")]
    results += [
        make_result("d", status="failed", error="broken", samples=0),
        make_result("e", status="missing", error="no folder e", samples=0),
    ]
    save_results(tmp_path / "run/eval", results)
    page, rows, folder = report_of(tmp_path, tmp_path / "run/eval")
    (average,) = [row for row in rows if row["is_average"] == "1" and row["kind"] == "run"]
    assert (average["num_sets"], average["of_sets"]) == ("3", "5")
    table = page.table("Zero-shot classification, top-1 accuracy, percent; no published")
    assert table[1][1] == "50.0 (3 of 5 sets)"
    assert "over 3 of 5 sets" in page.text
    assert "over 3 of 5 sets" in (folder / "report.md").read_text()
