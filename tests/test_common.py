import errno
import os
import socket
from pathlib import Path

import pytest

from clip_pgs.common import (
    Registry,
    SentenceParser,
    atomic_file,
    atomic_folder,
    check_writable,
    expand_home,
    explained,
    one_sentence,
    read_json_lines,
    refusal_code,
    usable_device,
    write_text,
)
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


@pytest.fixture(params=["fifo", "socket", "device", "folder", "link to a device"])
def no_file(request, tmp_path):
    """Something that is there and holds no text."""
    path = tmp_path / "no_file"
    match request.param:
        case "fifo":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(path))
        case "device":
            return Path("/dev/full")
        case "folder":
            path.mkdir()
        case "link to a device":
            path.symlink_to("/dev/null")
    return path


def test_what_is_no_regular_file_is_refused_and_left_there(no_file):
    before = no_file.lstat()
    with pytest.raises(ValueError, match=rf"cannot write {no_file}: it is (no regular file|a fo)"):
        check_writable(no_file)
    with pytest.raises(OSError, match=r"no regular file|a folder"):
        write_text(no_file, "text")
    assert (no_file.lstat().st_mode, no_file.lstat().st_ino) == (before.st_mode, before.st_ino)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_is_written_through(tmp_path, is_there):
    target, link = tmp_path / "there" / "a.txt", tmp_path / "link"
    target.parent.mkdir()
    if is_there:
        target.write_text("old")
    link.symlink_to("there/a.txt")
    check_writable(link)
    write_text(link, "new")
    assert (target.read_text(), link.is_symlink()) == ("new", True)


def test_text_is_utf_8_in_any_locale(tmp_path):
    write_text(
        tmp_path / "a.txt", "caf\u00e9 " + os.fsencode("\u00e9").decode("ascii", "surrogateescape")
    )
    assert (tmp_path / "a.txt").read_bytes() == "caf\u00e9 \u00e9".encode()


@pytest.mark.parametrize("write", [atomic_file, atomic_folder])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
def test_a_full_disk_is_told_with_the_file_and_ends_with_1(tmp_path, write, code):
    path = tmp_path / "a.txt"
    with pytest.raises(OSError, match=r".") as caught, write(path):
        raise OSError(code, os.strerror(code))
    assert one_sentence(caught.value) == f"{path}: {os.strerror(code)}"
    assert refusal_code(caught.value) == 1
    for asked in (errno.ENOENT, errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP, errno.ENOTDIR):
        assert refusal_code(OSError(asked, os.strerror(asked), "a")) == 2


def test_a_full_disk_is_told_by_the_system_itself(tmp_path):
    with files_limited_to(100), pytest.raises(OSError, match="too large") as caught:
        write_text(tmp_path / "a.txt", "new" * 100)
    assert one_sentence(caught.value) == f"{tmp_path / 'a.txt'}: File too large"


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


@pytest.fixture
def registry():
    registry = Registry("pet")
    registry.register("dog", sound="bark")(dict)
    return registry


def test_a_registry_gives_an_entry_and_what_it_declared(registry):
    assert registry.names() == ["dog"]
    assert registry.get("dog") is dict
    assert registry.declaration("dog") == {"sound": "bark"}
    with pytest.raises(ValueError, match="unknown pet 'cat'; choose from dog"):
        registry.get("cat")


def test_a_name_is_given_once_but_to_what_replaces_itself(registry):
    with pytest.raises(ValueError, match="pet 'dog' is registered already"):
        registry.register("dog")(list)

    def define():
        @registry.register("cat")
        def cat():
            pass

        return cat

    define()
    redefined = define()
    assert registry.get("cat") is redefined


@pytest.mark.parametrize("name", ["", "a:b"])
def test_a_name_that_could_be_an_import_is_refused(registry, name):
    with pytest.raises(ValueError, match="must hold no colon"):
        registry.register(name)


def test_an_entry_of_another_module_is_found_by_its_import_path(registry, tmp_path, monkeypatch):
    (tmp_path / "my_pets.py").write_text("class Bird:\n    pass\n\nclass Fish:\n    pass\n")
    (tmp_path / "my_broken_pets.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    import my_pets

    registry.register("bird", sound="sing")(my_pets.Bird)
    assert registry.get("my_pets:Bird") is my_pets.Bird
    assert registry.declaration("my_pets:Bird") == {"sound": "sing"}
    for name, reason in {
        "my_pets:Fish": "'my_pets:Fish' is not registered as a pet",
        "my_pets:Cow": "cannot import pet 'my_pets:Cow': AttributeError: .* 'Cow'",
        "my_broken_pets:Cow": "cannot import pet 'my_broken_pets:Cow': ZeroDivisionError",
        "no_such_pets:Cow": "cannot import pet 'no_such_pets:Cow': ModuleNotFoundError",
        ":Cow": "cannot import pet ':Cow': ValueError",
        "..a:Cow": "cannot import pet '..a:Cow': ",
        "my_pets:": "cannot import pet 'my_pets:': AttributeError",
    }.items():
        with pytest.raises(ValueError, match=reason):
            registry.get(name)


@pytest.mark.parametrize("place", ["folder", "file/new", "file/new/newer", "n" * 300, "a\0b"])
def test_a_file_that_cannot_be_written_is_told_beforehand(tmp_path, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write"):
        check_writable(tmp_path / "good", tmp_path / place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("place", ["new", "file", "folder/new", "no/such/folder/new"])
def test_asking_whether_a_file_can_be_written_makes_nothing(tmp_path, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    check_writable(tmp_path / place)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "old"


def test_an_explained_error_says_what_it_is_about_and_others_pass():
    with pytest.raises(ValueError, match=r"^--opt x: no such thing$"), explained("--opt x"):
        raise ValueError("no such\nthing")
    told = explained("a file", LookupError, as_kind=OSError)
    with pytest.raises(OSError, match=r"^a file: 'key'$"), told:
        raise KeyError("key")
    with pytest.raises(KeyError), explained("--opt x"):
        raise KeyError("key")


@pytest.mark.parametrize("name", ["meta", "warp", "cuda:99", "cpu:1"])
def test_a_device_that_is_not_there_or_computes_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"^--device {name} is not available"):
        usable_device(name)
    assert usable_device("cpu").type == "cpu"


def test_lines_that_are_no_json_objects_are_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_json_lines(path) == []
    path.write_bytes(b'{"step": 1}\n[1]\n{"st')
    assert read_json_lines(path) == [{"step": 1}, None, None]
