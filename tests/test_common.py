import getpass
import os
import pwd
import signal
import subprocess
import sys

import pytest

from clip_pgs.common import SentenceParser, expand_home, explained, one_sentence, run_program


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


@pytest.mark.parametrize(
    ("argument", "expanded"),
    [
        ("~", "/home/me"),
        ("~/a b", "/home/me/a b"),
        ("--logs=~/a", "--logs=/home/me/a"),
        ("frequencies=~/a", "frequencies=/home/me/a"),
        ("--text-masking-option=frequencies=~/a", "--text-masking-option=frequencies=/home/me/a"),
        ("~/{0..9}.tar::~/b.tar", "/home/me/{0..9}.tar::/home/me/b.tar"),
        *((text, text) for text in ("a~/b", "~b", "a/~/b", "http://a/?b=~/c", "pipe:cat ~/a", "")),
    ],
)
def test_the_home_folder_is_found_where_a_path_begins(monkeypatch, argument, expanded):
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_home(argument) == expanded
    parser = SentenceParser()
    parser.add_subparsers(dest="c").add_parser("do").add_argument("path")
    if not argument.startswith("-"):
        assert parser.parse_args(["do", argument]).path == expanded


def test_an_explained_error_says_what_it_is_about_and_others_pass():
    with pytest.raises(ValueError, match=r"^--opt x: no such thing$"), explained("--opt x"):
        raise ValueError("no such\nthing")
    told = explained("a file", LookupError, as_kind=OSError)
    with pytest.raises(OSError, match=r"^a file: 'key'$"), told:
        raise KeyError("key")
    with pytest.raises(KeyError), explained("--opt x"):
        raise KeyError("key")


def test_a_user_without_a_name_has_one_for_what_asks(monkeypatch):
    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    # torch asks where torchvision is imported.
    assert run_program(lambda: 0 if getpass.getuser() == str(os.getuid()) else 1) == 0


def test_exit_codes_of_children_are_theirs_where_a_parent_ignored_their_ends():
    program = (
        "import subprocess, sys; from clip_pgs.common import run_program; "
        "child = [sys.executable, '-c', 'raise SystemExit(3)']; "
        "sys.exit(run_program(lambda: subprocess.call(child)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
    )
    assert done.returncode == 3
