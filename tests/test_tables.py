"""One table in its four forms, and the hostile texts that none of them may let act."""

import csv
import io
import re
from html.parser import HTMLParser

import pytest

from clip_pgs.tables import (
    BLANK,
    Cell,
    Column,
    Row,
    Table,
    csv_text,
    duration,
    html_text,
    markdown_text,
    percent,
    read_csv,
    scaled,
)

TABLE = Table.of(
    ["model", "top-1", "note"],
    [["a", Cell(0.5, "50.0", "+- 1", is_best=True), "x"], ["bcd", Cell(0.05, "5.0"), None]],
    caption="Scores",
    notes=["Two rows."],
)


class Cells(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.rows = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1] and self.tags[-1] != "p":
            self.rows[-1][-1] += data.strip("\n")


def test_terminal_sets_numbers_to_the_right_and_texts_to_the_left():
    assert TABLE.text() == ("model      top-1  note\na      50.0 +- 1  x\nbcd          5.0\n")


def test_csv_has_the_values_in_full():
    rows = [["a", 0.5, "x"], ["bcd", 0.05, None]]
    assert csv_text(["model", "top-1", "note"], rows) == "model,top-1,note\na,0.5,x\nbcd,0.05,\n"


def test_markdown_has_caption_alignment_and_notes():
    assert TABLE.markdown() == (
        "*Scores*\n\n| model | top-1 | note |\n| --- | ---: | --- |\n| a | **50.0** +- 1 | x |\n"
        "| bcd | 5.0 |  |\n\nTwo rows.\n"
    )


def test_html_has_the_same_cells():
    rows = Cells(TABLE.html()).rows
    assert rows == [["model", "top-1", "note"], ["a", "50.0 +- 1", "x"], ["bcd", "5.0", ""]]


def test_a_last_cell_spans_what_is_left():
    rows = [Row([Cell("a"), Cell(1), Cell(2)]), Row([Cell("gone"), Cell("failed: no folder")])]
    table = Table([Column("set"), Column("x"), Column("y")], rows)
    assert table.text() == "set   x  y\na     1  2\ngone  failed: no folder\n"
    assert 'colspan="2">failed: no folder' in table.html()
    assert table.markdown().splitlines()[-1] == "| gone | failed: no folder |  |"


def test_headings_over_several_columns_stand_before_each_where_there_is_one_line():
    columns = [Column("model"), *(Column(k, group="recall") for k in ("R@1", "R@5"))]
    table = Table(columns, [Row([Cell("a"), Cell(1), Cell(2)])])
    assert table.text().split("\n")[0].split("  ") == ["model", "recall R@1", "recall R@5"]
    assert 'colspan="2" class="group">recall' in table.html()


@pytest.mark.parametrize(
    "text",
    [
        "=cmd|'/c calc'!A0",
        "+1+1",
        "-2+3",
        "@SUM(1)",
        "\t=1",
        "\r\n=1",
        "  =1",
        "'=1",
        "''=1",
        "\uff1d1+1",
        "x;=cmd|'/c calc'!A0;",
        "x; -1+1",
        "x\t=1",
        "\tcmd",
    ],
)
def test_no_cell_of_a_csv_is_a_formula(text):
    written = csv_text([text, "number"], [[text, -0.5]])
    for row in csv.reader(io.StringIO(written)):
        for part in re.split("[;\t]", row[0]):
            assert not re.match(r"\s*[=+\-@\uff1d\t\r]", part)
    (row,) = read_csv(io.StringIO(written))
    assert row["number"] == "-0.5"
    if "\r" not in text:
        assert row[text] == text


@pytest.mark.parametrize("text", ["plain", "a-b", "x = y", "it's", "-0.5", "+3", "1e-7", "a;b", ""])
def test_harmless_texts_are_left_as_they_are(text):
    written = csv_text(["h"], [[text]])
    assert next(csv.reader(io.StringIO(written.split("\n", 1)[1])), [""]) in ([text], [])


def test_csv_without_rows_or_with_empty_ones_is_read():
    assert read_csv([]) == []
    assert read_csv(["a,b\n", "\n", "1,2\n"]) == [{"a": "1", "b": "2"}]


@pytest.mark.parametrize("text", ["a,b\n1\n", "a,b\n1,2,3\n", "a,b\n1,2,\n", "a,b,a\n1,2,3\n"])
def test_csv_whose_cells_could_be_of_another_column_is_refused(text):
    with pytest.raises(ValueError, match=r"row 1 has|twice"):
        read_csv(text.splitlines(keepends=True))


@pytest.mark.parametrize("text", ["\x1b[31mred", "a\x00b", "a\u202eb", "a\ud800b", "a\x07"])
def test_no_form_has_a_control_character(text):
    table = Table([Column(text)], [Row([Cell(text, note=text)], facts=text)], text, [text])
    for form in (table.text(), csv_text([text], [[text]]), table.markdown(), table.html()):
        assert form.encode("utf-8")
        assert all(character.isprintable() or character == "\n" for character in form)


def test_a_cell_stays_one_line():
    table = Table.of(["a", "b"], [["x\ny", "1\r\n2"]])
    for form in (table.text(), csv_text(["a", "b"], [["x\ny", "1\r\n2"]])):
        assert form.count("\n") == 2
    assert table.markdown().splitlines()[-1] == "| x y | 1 2 |"


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", '" onload="x', "a&lt;b", "![x](http://h)", "| a |", "# t"]
)
def test_markup_is_shown_as_it_is(text):
    cells = Cells(f"<table><tr><td title='{html_text(text)}'>{html_text(text)}</td></tr></table>")
    assert cells.tags == ["table", "tr", "td"]
    assert cells.rows == [[text]]
    assert not re.search(r"(?<!\\)[<>\[\]|#!&`*_]", markdown_text(text))


def test_numbers_as_people_read_them():
    assert (percent(0.30955), percent(None)) == ("31.0", "")
    assert (scaled(1.08e13, "FLOP"), scaled(12), scaled(None)) == ("10.8 TFLOP", "12", "")
    assert (duration(681), duration(90_061), duration(0.2)) == ("11 min 21 s", "1 d 1 h", "0 s")
    assert BLANK in Table.of(["a", "b"], [["x", Cell(None, BLANK)]]).html()
