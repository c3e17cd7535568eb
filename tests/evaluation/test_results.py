"""Result files and tables: what is read, and what a spreadsheet makes of them."""

import csv
import json
import re

import pytest

from clip_pgs.evaluation.results import read_csv, read_result, read_results, write_csv, write_result
from support.reports import make_result


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"null",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"weights_digest": "d"}',
        {"metrics": [0.5]},
        {"metrics": {"acc1": "0.5"}},
        {"metrics": None},
        {"samples": "600"},
        {"suite": 3},
        {"details": []},
        {"error": {}},
        {"date": 20},
        {"metrics": {"acc1": True}},
        {"samples": True},
        {"status": None},
    ],
)
def test_a_file_of_another_shape_is_left_out_and_named(tmp_path, caplog, content):
    write_result(make_result("good", metrics={"acc1": 0.5, "acc5": None}), tmp_path / "good.json")
    if isinstance(content, dict):
        content = json.dumps(json.loads((tmp_path / "good.json").read_text()) | content).encode()
    (tmp_path / "odd.json").write_bytes(content)
    assert [result.dataset for result in read_results(tmp_path)] == ["good"]
    assert read_result(tmp_path / "odd.json") is None
    assert "odd.json" in caplog.text or content in (b"[]", b"null")


def test_a_result_of_an_older_version_without_later_fields_is_read(tmp_path):
    write_result(make_result("shape", metrics={"acc1": 1}), tmp_path / "old.json")
    content = json.loads((tmp_path / "old.json").read_text())
    for name in ("identity", "details", "settings", "versions", "date", "language"):
        del content[name]
    (tmp_path / "old.json").write_text(json.dumps(content))
    assert read_result(tmp_path / "old.json").metrics == {"acc1": 1}


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t"])
def test_no_cell_of_the_table_is_a_formula(tmp_path, start):
    evil = f"{start}cmd|' /C calc'!A0"
    result = make_result(evil, metrics={evil: 0.5}, model=evil, pretrained=evil, error=evil)
    write_csv([result], tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [cell for cell in cells if cell.startswith(start)]
    (again,) = read_csv(tmp_path / "results.csv")
    assert (again.dataset, again.model, again.error) == (evil, evil, evil)
    assert again.metrics == {evil: 0.5}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        # The last column is the FLOPs of an image, which are unknown here.
        (lambda row: f"{row}\n{row}1", "two rows of demo on shape"),
        (lambda row: f"{row},0.9", "row 1 has"),
        (lambda row: row.rpartition(",")[0], "row 1 has"),
    ],
)
def test_a_table_that_was_changed_by_hand_is_refused_in_words(tmp_path, change, sentence):
    path = tmp_path / "results.csv"
    write_csv([make_result("shape", metrics={"acc1": 0.5})], path)
    header, row = path.read_text().splitlines()
    path.write_text(f"{header}\n{change(row)}\n")
    with pytest.raises(ValueError, match=sentence):
        read_csv(path)


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_table_that_a_spreadsheet_saved_with_another_separator_says_so(tmp_path, separator):
    path = tmp_path / "results.csv"
    write_csv([make_result("shape", metrics={"acc1": 0.5})], path)
    text = path.read_text().replace(",", separator).replace("0.5", "0,5")
    path.write_text(f"\ufeff{text}", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"columns are separated by {separator!r}")):
        read_csv(path)


def test_a_byte_order_mark_and_a_row_that_is_there_again_change_nothing(tmp_path):
    path = tmp_path / "results.csv"
    write_csv([make_result("shape", metrics={"acc1": 0.5})], path)
    header, row = path.read_text().splitlines()
    path.write_text(f"\ufeff{header}\n{row}\n{row}\n", encoding="utf-8")
    (result,) = read_csv(path)
    assert (result.suite, result.metrics) == ("zeroshot-classification", {"acc1": 0.5})


def test_a_row_of_a_table_that_cannot_be_is_named_and_the_others_count(tmp_path, caplog):
    path = tmp_path / "results.csv"
    write_csv([make_result(name, metrics={"acc1": 0.5}) for name in ("shape", "color")], path)
    path.write_text(path.read_text().replace("color,done,", "color,gone,"))
    (result,) = read_csv(path)
    assert result.dataset == "shape"
    said = "left out the row of color (zeroshot-classification) in "
    assert f"{said}{path}: it says status 'gone'" in caplog.text
