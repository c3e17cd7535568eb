import pytest

from clip_pgs.sentences import SentenceParser, one_sentence


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
