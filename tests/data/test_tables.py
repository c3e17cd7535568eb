from __future__ import annotations

from pathlib import Path

import pytest

from clip_pgs.data.tables import default_separator, read_pairs

KEYS = {"image_key": "filepath", "caption_key": "title", "separator": ","}


def test_cells_are_text_whatever_they_look_like(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('title,x,filepath\nNA,1,a.jpg\n"one, two",2,7\n,3,c.jpg\n')
    table = read_pairs(path, **KEYS)
    assert table.images == ["a.jpg", "7", "c.jpg"]
    assert table.captions == ["NA", "one, two", ""]


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing.csv' does not exist"):
        read_pairs(tmp_path / "nothing.csv", **KEYS)


def test_missing_column_is_named_with_those_there_are(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("filepath\ttitle\na\tb\n")
    with pytest.raises(ValueError, match=r"no column 'filepath'; with separator ',' it has"):
        read_pairs(path, **KEYS)


@pytest.mark.parametrize(
    "content", [b"", b"filepath,title\n", b"\x80,title\n", b"filepath\n1,2,3\n4"]
)
def test_file_that_is_no_table_is_refused_by_name(tmp_path, content):
    path = tmp_path / "pairs.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"pairs\.csv"):
        read_pairs(path, **KEYS)


@pytest.mark.parametrize("ending", ["tar", "gz", "zip", "bz2", "xz"])
def test_an_archive_that_is_none_is_refused_by_name(tmp_path, ending):
    path = tmp_path / f"pairs.{ending}"
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=rf"pairs\.{ending}' cannot be read"):
        read_pairs(path, **KEYS)


@pytest.mark.parametrize(("name", "separator"), [("a.tsv", "\t"), ("a.csv", ","), ("a", ",")])
def test_separator_goes_by_the_name(name, separator):
    assert default_separator(Path(name)) == separator
