from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import shlex
import zipfile
from pathlib import Path

import pytest

from clip_pgs.data.batches import decode_item
from clip_pgs.data.build import read_table
from clip_pgs.data.caption_tables import TableSource, read_captions, read_pairs
from clip_pgs.data.order import SampleRef
from clip_pgs.data.samples import SampleDecoder
from clip_pgs.data.shards import expand_shards

KEYS = {"image_key": "filepath", "caption_key": "title", "separator": ","}


def _zip(data):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pairs.csv", data)
    return buffer.getvalue()


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
    ("wrong", "right"),
    [(",", "\t"), (",", ";"), (",", "|"), ("\t", ","), ("\t", ";"), ("::", ","), ("::", "\t")],
)
def test_a_missing_column_is_told_with_the_option_that_gives_it(tmp_path, make_args, wrong, right):
    path = tmp_path / "pairs.csv"
    path.write_text(f'"filepath"{right}title\na.jpg{right}one\nb.jpg{right}two\n')
    with pytest.raises(ValueError, match=r"no column 'filepath'.* --separator") as error:
        read_pairs(path, **{**KEYS, "separator": wrong})
    named = shlex.split(str(error.value).partition("--separator ")[2])[0]
    assert read_pairs(path, **{**KEYS, "separator": named}).captions == ["one", "two"]
    args = make_args(csv_separator=wrong)
    with pytest.raises(ValueError, match=r"no column 'filepath'.* --csv-separator") as error:
        read_table(args, str(path))
    named = shlex.split(str(error.value).partition("--csv-separator ")[2])[0]
    assert read_table(make_args(csv_separator=named), str(path)).captions == ["one", "two"]


@pytest.mark.parametrize("first", ["sep=;", "sep=,", "SEP=\t", '"sep=;"', "\ufeffsep=;"])
@pytest.mark.parametrize("separator", [None, ";", "\t"])
def test_a_first_line_for_excel_is_told_as_what_to_remove(tmp_path, first, separator):
    path = tmp_path / "pairs.csv"
    path.write_text(f"{first}\nfilepath;title\na.jpg;one, two, and three\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"(?i)no column 'filepath'.*'sep=.?', .* remove it"
    ) as error:
        read_pairs(path, **{**KEYS, "separator": separator})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("header", ["image\ttitle", "filepath\tcaption", "filepath title"])
def test_no_separator_is_named_that_does_not_give_both_columns(tmp_path, header):
    path = tmp_path / "pairs.csv"
    path.write_text(f"{header}\na.jpg\tone\n")
    with pytest.raises(ValueError, match="no column") as error:
        read_pairs(path, **KEYS)
    assert "--separator" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"filepath,title\n", b"\x80,title\n", b"filepath\n1,2,3\n4"]
)
def test_file_that_is_no_table_is_refused_by_name(tmp_path, content):
    path = tmp_path / "pairs.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"pairs\.csv"):
        read_pairs(path, **KEYS)


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.csv.gz"])
@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, _zip])
def test_a_compressed_table_is_not_unpacked(tmp_path, compress, name):
    path = tmp_path / name
    path.write_bytes(compress(b"filepath,title\na.jpg,one\n"))
    with pytest.raises(ValueError, match=r"pairs.*' is compressed, .* unpack it"):
        read_pairs(path, **KEYS)


def _workbook(kind):
    if kind == "xls":
        return b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(504) + b"\x09\x08" * 512
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        if kind == "ods":
            archive.writestr("mimetype", "application/vnd.oasis.opendocument.spreadsheet")
        archive.writestr("docProps/app.xml", "<a/>" * 1000)
        archive.writestr("content.xml" if kind == "ods" else "xl/workbook.xml", "<a/>" * 1000)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["xlsx", "xls", "ods"])
@pytest.mark.parametrize("name", ["pairs.xlsx", "pairs.csv"])
def test_a_workbook_is_told_with_what_to_save_it_as(tmp_path, kind, name):
    (tmp_path / name).write_bytes(_workbook(kind))
    with pytest.raises(ValueError, match=rf"{name}' is a workbook of Excel .*as CSV \(UTF-8\)"):
        read_pairs(tmp_path / name, **KEYS)


@pytest.mark.parametrize("ending", ["tar", "gz", "zip", "bz2", "xz"])
def test_a_table_is_read_as_one_whatever_its_name(tmp_path, ending):
    path = tmp_path / f"pairs.{ending}"
    path.write_text("filepath,title\na.jpg,one\n")
    assert read_pairs(path, **KEYS).captions == ["one"]


@pytest.mark.parametrize("name", ["0.tar", "pairs.csv"])
def test_a_shard_is_no_table_and_training_says_how_to_read_it(
    tmp_path, make_tar, make_image, make_args, name
):
    make_tar(tmp_path / name, [(f"{n:04d}.jpg", make_image(0)) for n in range(50)])
    with pytest.raises(ValueError, match="is a tar archive") as error:
        read_pairs(tmp_path / name, **KEYS)
    # Packing and counting words have no such option.
    assert "--dataset-type" not in str(error.value)
    with pytest.raises(ValueError, match=r"a tar archive.* --dataset-type webdataset") as error:
        read_table(make_args(), str(tmp_path / name))
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
@pytest.mark.parametrize("separator", [",", "::"])
@pytest.mark.parametrize("caption", ["one", "\u4e00\u4e00\u4e00"])
def test_a_table_of_wide_letters_is_told_by_its_encoding_with_the_cure(
    tmp_path, encoding, separator, caption
):
    path = tmp_path / "pairs.csv"
    text = f"filepath{separator}title\r\na.jpg{separator}{caption}\r\n"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(
        ValueError, match=rf"pairs.csv' is a text file in {encoding[:6].upper()}"
    ) as error:
        read_pairs(path, **{**KEYS, "separator": separator})
    named = re.search(r"iconv -f (\S+) -t UTF-8", str(error.value))
    assert path.read_bytes().decode(named[1]).startswith("filepath")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
@pytest.mark.parametrize("separator", [",", "::"])
@pytest.mark.parametrize("row", [0, 60_000])
def test_a_table_of_letters_of_one_byte_is_told_by_its_line_with_the_cure(
    tmp_path, encoding, separator, row
):
    path = tmp_path / "pairs.csv"
    rows = [f"{n}.jpg{separator}a long caption {chr(0xFC) * (n == row)}" for n in range(row + 1)]
    text = "\n".join([f"filepath{separator}title", *rows])
    path.write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=rf"line {row + 2} holds byte 0xfc.* iconv") as error:
        read_pairs(path, **{**KEYS, "separator": separator})
    assert "cannot be read with separator" not in str(error.value)
    named = re.search(r"iconv -f (\S+) -t UTF-8", str(error.value))
    assert path.read_bytes().decode(named[1]) == text


def test_a_table_that_is_cut_short_within_a_letter_is_told_by_its_line(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_bytes("filepath,title\na.jpg,caf\xe9".encode()[:-1])
    with pytest.raises(ValueError, match="line 2 holds byte 0xc3"):
        read_pairs(path, **KEYS)


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("row", [0, 3, 100_000])
def test_a_nul_in_a_text_is_told_by_its_line(tmp_path, ending, row):
    path = tmp_path / "pairs.csv"
    rows = [f"{n}.jpg,caption {n}{chr(0) * (n == row)}" for n in range(row + 2)]
    path.write_bytes(ending.join(["filepath,title", *rows, ""]).encode())
    with pytest.raises(ValueError, match=rf"NUL character in line {row + 2},"):
        read_pairs(path, **KEYS)


def test_a_sentence_names_so_many_columns_and_no_more(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text(",".join(f"{'column' * 50}{n}" for n in range(1000)) + "\n")
    with pytest.raises(ValueError, match="and 980 more") as error:
        read_pairs(path, **KEYS)
    assert len(str(error.value)) < 1700


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null"])
def test_a_device_is_told_from_what_is_not_there(path):
    for read in (lambda: read_pairs(Path(path), **KEYS), lambda: expand_shards(path)):
        with pytest.raises(ValueError, match="is no regular file"):
            read()


@pytest.mark.parametrize(("name", "separator"), [("a.tsv", "\t"), ("a.csv", ","), ("a", ",")])
def test_separator_goes_by_the_name(tmp_path, name, separator):
    (tmp_path / name).write_text(f"filepath{separator}title\na.jpg{separator}one\n")
    table = read_pairs(tmp_path / name, **{**KEYS, "separator": None})
    assert table.captions == ["one"]


@pytest.mark.parametrize("separator", ["\t", "\\t", r"\s*\t\s*", "\\x09"])
def test_separator_is_taken_as_openclip_takes_it(tmp_path, separator):
    path = tmp_path / "pairs.tsv"
    path.write_text("filepath\ttitle\na.jpg\tone two\nb.jpg\tthree, four\n")
    table = read_pairs(path, **{**KEYS, "separator": separator})
    assert table.images == ["a.jpg", "b.jpg"]
    assert table.captions == ["one two", "three, four"]


@pytest.mark.parametrize("separator", ["", "(", "\n", "\0", '"'])
def test_separator_that_is_none_is_refused_by_name(tmp_path, separator):
    path = tmp_path / "pairs.csv"
    path.write_text("filepath,title\na,b\n")
    with pytest.raises(ValueError, match=r"pairs\.csv' .* separator") as error:
        read_pairs(path, **{**KEYS, "separator": separator})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rows", "first"),
    [
        ("0,a.jpg,one\n1,b.jpg,two\n", 1),
        ("a.jpg,one,5\nb.jpg,two,6\n", 1),
        ("0,0,a.jpg,one\n", 1),
        ("a.jpg,one\nb.jpg,two, three\n", 2),
        # Rows that end with a separator, some of whose captions hold one.
        ("a.jpg,a dog, running,\nb.jpg,a cat,\n", 1),
        ("a.jpg,a cat,\nb.jpg,a dog, running,\n", 2),
        ("a.jpg,a dog, running,\nb.jpg,a car, parked,\n", 1),
        ("a.jpg,a cat,\nb.jpg,a dog, running\n", 2),
        # A further column, whose cells are empty.
        ("note: a.jpg,a dog, running,\nb.jpg,a cat,\n", 1),
        ("note: a.jpg,a cat,\nb.jpg,a dog, running,\n", 2),
        # Only some rows end with one, so that it may be a caption's.
        ("a.jpg,a cat,\nb.jpg,a dog\n", 1),
        ("a.jpg,a cat\nb.jpg,a dog,\n", 2),
    ],
)
@pytest.mark.parametrize("separator", [",", "::"])
def test_cells_without_a_name_are_refused(tmp_path, rows, first, separator):
    path = tmp_path / "pairs.csv"
    header = "filepath,title,note" if rows.startswith("note: ") else "filepath,title"
    path.write_text(f"{header}\n{rows.removeprefix('note: ')}".replace(",", separator))
    with pytest.raises(ValueError, match="more cells than its header has names") as error:
        read_pairs(path, **{**KEYS, "separator": separator})
    assert f"the first is row {first}," in str(error.value) or (
        f"the first is line {first + 1}," in str(error.value)
    )


@pytest.mark.parametrize("separator", [",", "::"])
def test_separator_at_the_end_of_each_row_is_no_cell_and_no_warning(tmp_path, recwarn, separator):
    path = tmp_path / "pairs.csv"
    path.write_text("filepath,title\n007,one,\n1,two,\n".replace(",", separator))
    table = read_pairs(path, **{**KEYS, "separator": separator})
    assert (table.images, table.captions) == (["007", "1"], ["one", "two"])
    assert not recwarn.list


def test_column_whose_name_is_empty_changes_nothing(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text(",filepath,title\n0,a.jpg,one\n")
    assert read_pairs(path, **KEYS).images == ["a.jpg"]


@pytest.mark.parametrize("separator", [",", "\t"])
@pytest.mark.parametrize("quoted", [{3}, {3, 20}, {0, 1}])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_captions_that_begin_with_an_unpaired_quote_swallow_no_row(
    tmp_path, separator, quoted, ending
):
    path = tmp_path / "pairs"
    captions = [f"{chr(34) * (row in quoted)}caption {row}" for row in range(40)]
    rows = [f"{row}.jpg{separator}{caption}" for row, caption in enumerate(captions)]
    path.write_bytes(ending.join([f"filepath{separator}title", *rows, ""]).encode())
    table = read_pairs(path, **{**KEYS, "separator": separator})
    assert (len(table), table.captions) == (40, captions)


def test_quotes_that_end_a_caption_swallow_no_row_either(tmp_path):
    path = tmp_path / "pairs.tsv"
    captions = ['"foo', "bar", '""baz""', 'last "x"']
    lines = [f"{row}.jpg\t{caption}\n" for row, caption in enumerate(captions)]
    path.write_text("filepath\ttitle\n" + "".join(lines))
    assert read_pairs(path, **{**KEYS, "separator": "\t"}).captions == captions


def test_a_quote_that_is_never_closed_is_told_with_what_to_write(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('filepath,title\na.jpg,"one, two\nb.jpg,three\n')
    with pytest.raises(ValueError, match=r"EOF inside string .* must be doubled and quoted$"):
        read_pairs(path, **KEYS)


@pytest.mark.parametrize("place", [0, 2])
def test_a_stray_quote_in_any_other_column_swallows_no_row(tmp_path, place):
    path = tmp_path / "pairs.csv"
    authors = ["me", '"Boss of all', "you", "them", '"Other', "us"]
    rows = [[f"{row}.jpg", f"caption {row}"] for row in range(6)]
    lines = [["filepath", "title"], *rows]
    for line, author in zip(lines, ["author", *authors], strict=True):
        line.insert(place, author)
    path.write_text("".join(",".join(line) + "\n" for line in lines))
    assert read_pairs(path, **KEYS).images == [f"{row}.jpg" for row in range(6)]


@pytest.mark.parametrize("separator", [",", "::"])
def test_a_short_row_has_an_empty_caption_whatever_the_separator(tmp_path, separator):
    path = tmp_path / "pairs.csv"
    path.write_text(f"filepath{separator}title\na.jpg{separator}one\nb.jpg\nc.jpg{separator}two\n")
    assert read_pairs(path, **{**KEYS, "separator": separator}).captions == ["one", "", "two"]


@pytest.mark.parametrize(
    ("separator", "empty"), [(",", ",\n"), (",", '"",""\n'), (",", " , \n"), ("::", ",\n")]
)
def test_rows_whose_cells_are_all_empty_are_left_out_and_the_others_keep_their_numbers(
    tmp_path, separator, empty
):
    path = tmp_path / "pairs.csv"
    rows = f"filepath,title\na.jpg,one\n{empty}b.jpg,\n,three\n{empty}{empty}"
    path.write_text(rows.replace(",", separator))
    options = {**KEYS, "separator": separator}
    table = read_pairs(path, **options)
    assert (table.images, table.captions) == (["a.jpg", "b.jpg", ""], ["one", "", "three"])
    assert [table.row_name(row) for row in range(3)] == ["row 1", "row 3", "row 4"]
    assert read_captions(path, caption_key="title", separator=separator) == table.captions


def test_a_table_whose_rows_are_all_empty_has_none(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("filepath,title,note\n,,\n,,\n")
    with pytest.raises(ValueError, match=r"pairs.csv' has no rows"):
        read_pairs(path, **KEYS)


def test_a_row_that_names_no_image_is_told_as_such(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("filepath,title\n,\n,one\n")
    skip = TableSource(read_pairs(path, **KEYS)).read(SampleRef(0, 0))
    assert str(skip) == f"{path}: row 2: no image (its row names none)"


def test_captions_that_are_quoted_are_read_as_pandas_reads_them(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('filepath,title\na.jpg,"one, ""two"""\nb.jpg,three "four" five\n')
    assert read_pairs(path, **KEYS).captions == ['one, "two"', 'three "four" five']


@pytest.mark.parametrize("inside", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_cell_of_several_lines_is_kept_and_told_by_its_row(tmp_path, caplog, ending, inside):
    path = tmp_path / "pairs.csv"
    lines = ["filepath,title", "a.jpg,one", f'b.jpg,"two{inside}lines, and a comma"', "c.jpg,three"]
    path.write_bytes(ending.join([*lines, ""]).encode())
    assert read_pairs(path, **KEYS).captions == ["one", f"two{inside}lines, and a comma", "three"]
    assert "of several lines in 1 row: row 2;" in caplog.text


def test_several_columns_of_a_name_are_refused_where_it_is_read(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("filepath,title,title,title.1\na.jpg,one,two,three\n")
    with pytest.raises(ValueError, match=r"pairs.csv' has 2 columns 'title'"):
        read_pairs(path, **KEYS)
    path.write_text("filepath,title,x,x,filepath.1\na.jpg,one,two,three,b.jpg\n")
    assert read_pairs(path, **KEYS).captions == ["one"]


def test_separator_that_takes_for_ever_at_a_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("clip_pgs.data.caption_tables._LEAST_SECONDS", 0.2)
    path = tmp_path / "pairs.csv"
    path.write_text(f"filepath,title\n{'x' * 60},one\n")
    with pytest.raises(ValueError, match=r"'\(x\+x\+\)\+y\|,': it takes more than 0 seconds"):
        read_pairs(path, **{**KEYS, "separator": "(x+x+)+y|,"})
    assert read_pairs(path, **{**KEYS, "separator": ",|;"}).captions == ["one"]


def test_image_that_is_no_file_or_has_no_end_is_skipped_and_never_waited_for(tmp_path):
    path = tmp_path / "pairs.csv"
    os.mkfifo(tmp_path / "fifo.png")
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(2**42)
    images = [str(tmp_path / "fifo.png"), "/dev/zero", str(tmp_path / "sparse.png")]
    path.write_text("filepath,title\n" + "".join(f"{image},one\n" for image in images))
    source = TableSource(read_pairs(path, **KEYS))
    skips = [source.read(SampleRef(0, row)) for row in range(3)]
    assert [skip.reason for skip in skips] == 3 * ["unreadable image file"]
    assert "no regular file" in skips[0].detail
    assert "fifo.png" in skips[0].detail
    assert f"{2**42} bytes, more than" in skips[2].detail


def test_a_picture_that_cannot_be_decoded_is_named_by_its_file(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    (tmp_path / "pairs.csv").write_text(f"filepath,title\n{tmp_path / 'bad.jpg'},one\n")
    source = TableSource(read_pairs(tmp_path / "pairs.csv", **KEYS))
    decode = SampleDecoder(lambda image: image, lambda captions: captions, seed=0)
    skip = decode_item(source.read(SampleRef(0, 0)), decode, 0)
    assert (skip.key, skip.reason) == ("row 1", "unreadable image")
    assert skip.detail.startswith(f"'{tmp_path / 'bad.jpg'}': no JPEG")


def test_url_in_place_of_a_path_is_told_as_it_is_written(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("filepath,title\nhttps://host//a.jpg,one\n//nothing/b.jpg,two\n")
    source = TableSource(read_pairs(path, **KEYS))
    url, missing = (source.read(SampleRef(0, row)) for row in (0, 1))
    assert (url.reason, url.key) == ("image is a URL", "row 1")
    assert "'https://host//a.jpg'" in url.detail
    assert "'//nothing/b.jpg'" in missing.detail
