"""The HTML and the Markdown of a report, as documents."""

import base64
import re

import pytest

from clip_pgs.evaluation.report.command import write_report
from support.reports import EVIL_NAME

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(scored, tmp_path_factory):
    """The report with its pictures."""
    return write_report([scored], tmp_path_factory.mktemp("out") / "report")


def markdown_tables(text):
    """Return the tables of a Markdown text as rows of cells, by their caption."""
    tables, caption = {}, ""
    for line in text.splitlines():
        if line.startswith("*") and line.endswith("*"):
            caption = line.strip("*")
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            tables.setdefault(caption, []).append([cell.strip() for cell in cells])
    return tables


def test_page_loads_nothing(page):
    assert page.loads
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.loads)
    assert not {"script", "iframe", "link", "object"} & set(page.tags)


def test_pictures_and_styles_of_the_page_load_nothing(report, page):
    pictures = [base64.b64decode(load.partition(",")[2]).decode() for load in page.loads]
    assert all(picture.rstrip().endswith("</svg>") for picture in pictures)
    style = re.search(r"<style>(.*?)</style>", (report / "report.html").read_text(), re.S)[1]
    for text in (*pictures, style):
        assert not re.search(r"""(href|src)=["'](?!#)|url\((?!#)|@import""", text)


def test_names_are_shown_as_they_are_not_as_markup(report, page):
    assert EVIL_NAME in page.text
    assert '<b>"R&' not in (report / "report.html").read_text()
    assert "<b>" not in (report / "report.md").read_text()


def test_links_of_the_page_lead_somewhere(page):
    assert page.links
    assert {link.removeprefix("#") for link in page.links} <= page.ids


def test_markdown_tables_are_rectangular_and_hold_the_same_numbers(report, page):
    tables = markdown_tables((report / "report.md").read_text())
    for rows in tables.values():
        assert len({len(row) for row in rows}) == 1
        assert all(re.fullmatch("-{3}:?", cell) for cell in rows[1])
    caption = next(c for c in tables if c.startswith("Robustness, top-1 accuracy, percent; pub"))
    numbers = [[cell.strip("*") for cell in row[2:]] for row in tables[caption][2:]]
    assert numbers == [row[1:] for row in page.table(caption)[1:]]


def test_pictures_of_the_markdown_exist(report):
    names = re.findall(r"!\[.*\]\((.*)\)", (report / "report.md").read_text())
    assert {"figures/radar.png", "figures/cost.png"} <= set(names)
    for name in names:
        assert (report / name).read_bytes().startswith(b"\x89PNG")
        assert (report / name).with_suffix(".svg").is_file()
