import pytest

from clip_pgs.common import SentenceParser, atomic_file, one_sentence, write_text
from support.disk import files_limited_to


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("plain", "plain"),
        ("two\n  lines\r\n", "two lines"),
        ("a\0b\x1b[31m", "a\\x00b\\x1b[31m"),
        ("\u202edetrever", "\\u202edetrever"),
        ("\udcff", "\\udcff"),
        (ValueError("x is wrong"), "x is wrong"),
        (KeyError(), "KeyError"),
    ],
)
def test_a_message_is_one_line_that_a_terminal_can_show(message, shown):
    assert one_sentence(message) == shown


def test_the_middle_of_a_long_message_is_left_out():
    message = one_sentence("begin" + "x" * 5000 + "end")
    assert len(message) < 2000
    assert message.startswith("begin")
    assert message.endswith("end")
    assert " ... " in message


def test_arguments_are_refused_in_one_sentence_below_a_subcommand_too(capsys):
    parser = SentenceParser(prog="tool")
    parser.add_subparsers(required=True).add_parser("do").add_argument("--number", type=int)
    with pytest.raises(SystemExit) as left:
        parser.parse_args(["do", "--number", "a\nb"])
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: argument --number: invalid int value: 'a\\nb'\n"


def test_a_file_takes_its_place_when_all_is_written(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_in_the_middle_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with files_limited_to(1000), pytest.raises(OSError, match="File too large"):
        write_text(path, "new" * 1000)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
