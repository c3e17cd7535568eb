"""Files are there whole or not at all, and nothing else is opened or destroyed."""

import errno
import os
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from clip_pgs import files
from clip_pgs.common import AskedToLeaveError, one_sentence, refusal_code
from clip_pgs.files import (
    append_line,
    atomic_file,
    atomic_folder,
    check_writable,
    read_json_lines,
    read_json_object,
    write_text,
)
from support.disk import files_limited_to


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
@pytest.mark.parametrize("name", ["a.txt", ".a.txt.unfinished"])
def test_no_file_is_written_through_a_link(tmp_path, name, is_there):
    folder, target = tmp_path / "theirs", tmp_path / "mine"
    folder.mkdir()
    if is_there:
        target.write_text("mine")
    (folder / name).symlink_to("../mine")
    write_text(folder / "a.txt", "new")
    assert [path.name for path in folder.iterdir()] == ["a.txt"]
    assert (folder / "a.txt").read_text() == "new"
    assert not (folder / "a.txt").is_symlink()
    assert target.exists() == is_there
    assert not is_there or target.read_text() == "mine"


@pytest.mark.parametrize("kind", ["file", "fifo", "socket"])
def test_what_lies_where_a_file_is_written_does_not_matter(tmp_path, kind):
    place = tmp_path / ".a.txt.unfinished"
    with ExitStack() as held:
        match kind:
            case "file":
                place.write_text("what a killed process left, which is longer")
                (tmp_path / "linked").hardlink_to(place)
            case "fifo":
                os.mkfifo(place)
                # With nobody who reads, opening it would wait.
                held.callback(os.close, os.open(place, os.O_RDONLY | os.O_NONBLOCK))
            case "socket":
                held.enter_context(socket.socket(socket.AF_UNIX)).bind(str(place))
        write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert not place.exists()
    if kind == "file":
        assert (tmp_path / "linked").read_text().startswith("what")


@pytest.mark.parametrize("is_first_slower", [True, False])
def test_two_that_write_one_file_never_mix(tmp_path, is_first_slower):
    path = tmp_path / "a.txt"
    path.write_text("old")
    first, second = atomic_file(path), atomic_file(path)
    first.__enter__().write(b"first, and longer")
    second.__enter__().write(b"second")
    for writer in (second, first) if is_first_slower else (first, second):
        if writer is first:
            with pytest.raises(OSError, match="another process") as caught:
                writer.__exit__(None, None, None)
            assert one_sentence(caught.value).startswith(f"{path}: ")
            assert path.read_text() == ("second" if is_first_slower else "old")
        else:
            writer.__exit__(None, None, None)
    assert path.read_text() == "second"
    assert list(tmp_path.iterdir()) == [path]


def test_no_line_is_appended_through_a_link(tmp_path):
    (tmp_path / "a.jsonl").symlink_to("mine")
    append_line(tmp_path / "a.jsonl", "{}")
    assert not (tmp_path / "mine").exists()
    assert (tmp_path / "a.jsonl").read_text() == "{}\n"


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


def test_a_folder_in_whose_place_none_can_be_put_is_refused_before_the_work():
    with pytest.raises(OSError, match="mount point") as caught, atomic_folder(Path("/proc")):
        pytest.fail("the folder is to be filled")
    assert one_sentence(caught.value).startswith("/proc: ")
    assert refusal_code(caught.value) == 2


def test_a_full_disk_is_told_by_the_system_itself(tmp_path):
    with files_limited_to(100), pytest.raises(OSError, match="too large") as caught:
        write_text(tmp_path / "a.txt", "new" * 100)
    assert one_sentence(caught.value) == f"{tmp_path / 'a.txt'}: File too large"


def test_an_error_names_the_file_and_not_what_is_written_in_its_place(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_text(tmp_path / "missing" / "a.txt", "new")
    assert one_sentence(caught.value).startswith(f"{tmp_path / 'missing' / 'a.txt'}: ")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as caught, atomic_folder(tmp_path / "file" / "new"):
        pytest.fail("the folder is to be filled")
    assert one_sentence(caught.value).startswith(f"{tmp_path / 'file' / 'new'}: ")


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


def test_lines_that_are_no_json_objects_are_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert list(read_json_lines(path)) == []
    path.write_bytes(b'{"step": 1}\n[1]\n{"st')
    assert list(read_json_lines(path)) == [{"step": 1}, None, None]


def test_a_folder_that_another_process_is_about_to_write_is_refused_and_left(tmp_path):
    place = tmp_path / "new"
    with atomic_folder(place) as unfinished:
        (unfinished / "one").write_text("1")
        said = "new is being written by another process"
        with pytest.raises(ValueError, match=said), atomic_folder(place):
            pass
    assert [path.name for path in place.iterdir()] == ["one"]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_folder_begun_once_the_one_before_has_its_place_is_left(tmp_path, monkeypatch):
    with ExitStack() as second:

        def begin(_):
            monkeypatch.undo()
            (second.enter_context(atomic_folder(tmp_path / "new")) / "two").write_text("2")

        monkeypatch.setattr(files, "sync", begin)
        with atomic_folder(tmp_path / "new") as unfinished:
            (unfinished / "one").write_text("1")
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["one"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["two"]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_what_a_killed_process_left_is_no_part_of_a_folder(tmp_path):
    for name in (".new.unfinished", ".new.replaced"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "half").write_text("1")
    with atomic_folder(tmp_path / "new") as unfinished:
        assert list(unfinished.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, AskedToLeaveError, PermissionError])
@pytest.mark.parametrize("is_before", [True, False])
def test_a_folder_is_there_whatever_comes_between_the_old_and_the_new(
    tmp_path, monkeypatch, fault, is_before
):
    place, replace = tmp_path / "new", os.replace
    write(place, "old")

    def fail(source, target):
        # The second of the two: a signal comes before or after the first is done.
        if Path(target).name == ".new.replaced" and not is_before:
            replace(source, target)
            raise fault
        if Path(target) == place and Path(source).name.endswith("unfinished") and is_before:
            raise fault
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(fault):
            write(place, "new")
    assert (place / "one").read_text() == "old"
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize("does_fail", [True, False])
def test_a_folder_that_a_power_cut_took_from_its_place_is_put_back(tmp_path, does_fail):
    place = tmp_path / "new"
    write(tmp_path / ".new.replaced", "old")
    write(tmp_path / ".new.unfinished", "half")
    if does_fail:
        with pytest.raises(ValueError, match="now"), atomic_folder(place):
            raise ValueError("not now")
    else:
        write(place, "new")
    assert (place / "one").read_text() == ("old" if does_fail else "new")
    assert list(tmp_path.iterdir()) == [place]


def test_a_folder_whose_removal_was_begun_is_not_put_back(tmp_path, monkeypatch):
    place = tmp_path / "new"
    write(place, "old")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        write(place, "new")
    (place / "one").unlink()
    place.rmdir()
    with pytest.raises(ValueError, match="now"), atomic_folder(place):
        raise ValueError("not now")
    assert list(tmp_path.iterdir()) == []


def write(place, text):
    with atomic_folder(place) as folder:
        (folder / "one").write_text(text)


@pytest.mark.parametrize("text", ['{"width": 1, "width": 2}', '{"a": [{"width": 1, "width": 1}]}'])
def test_a_json_file_that_says_a_thing_twice_is_refused_by_its_name(tmp_path, text):
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^the config: 'width' is given twice$"):
        read_json_object(path, what="the config")
    path.write_text('{"a": [{"width": 1}, {"width": 1}]}')
    assert read_json_object(path, what="the config") == {"a": [{"width": 1}, {"width": 1}]}
