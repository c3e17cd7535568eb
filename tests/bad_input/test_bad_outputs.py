"""Outputs that cannot be written: what is no regular file, and a disk that is full."""

from pathlib import Path

import pytest

from clip_pgs.data.__main__ import main as data
from clip_pgs.inspection.__main__ import main as inspection
from support.disk import files_limited_to
from support.fuzzing import snapshot

TINY = ["--image-size", "32", "--patch-size", "8", "--masking", "random"]
KEPT = ["kept", "photo.png", "--foreground", "masks", "--seeds", "2", *TINY]
FILES = {
    "words": (data, ["words", "good.csv", "--min-count", "1", "-o"], "{out}", "{out}"),
    "masks": (inspection, ["masks", "photo.png", *TINY, "-o"], "{out}.png", "{out}.png"),
    "kept": (inspection, [*KEPT, "-o"], "{out}", "{out}/kept.json"),
    "pack": (data, ["pack", "good.csv"], "{out}", None),
    "world": (data, ["world", "--num-train", "2", "--num-per-class", "1"], "{out}", None),
}


@pytest.mark.parametrize("command", FILES)
def test_a_full_disk_ends_a_command_with_1_and_the_name_of_the_file(tmp_path, capsys, command):
    main, words, named, file = FILES[command]
    before = snapshot()
    out = tmp_path / "out"
    # Too little for the smallest of them; the words are few.
    with files_limited_to(20):
        code = main([*words, named.format(out=out)])
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (1, 1), error
    assert error == f"error: {(file or named).format(out=out)}: File too large\n"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert snapshot() == before


@pytest.mark.parametrize("command", FILES)
def test_an_output_without_a_name_is_refused(capsys, command):
    main, words, _, _ = FILES[command]
    before = snapshot()
    with pytest.raises(SystemExit, match=r"^2$"):
        main([*words, ""])
    assert "must name a place, got ''" in capsys.readouterr().err
    assert snapshot() == before


@pytest.mark.parametrize("command", ["pack", "world"])
@pytest.mark.parametrize("out", [".", ".."])
def test_the_working_directory_is_not_replaced(tmp_path, monkeypatch, capsys, command, out):
    main, words, _, _ = FILES[command]
    words = [str(Path(word).absolute()) if word.endswith(".csv") else word for word in words]
    place = tmp_path if out == "." else tmp_path / "in"
    place.mkdir(exist_ok=True)
    monkeypatch.chdir(place)
    assert main([*words, out]) == 2
    if command == "world" or out == ".":
        assert "holds the working directory" in capsys.readouterr().err
    assert Path.cwd().samefile(place)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("command", ["words", "masks", "kept"])
@pytest.mark.parametrize("target", ["/dev/null", "/dev/full"])
def test_a_device_is_refused_before_any_work(tmp_path, capsys, command, target):
    main, words, named, file = FILES[command]
    path = Path(file.format(out=tmp_path / "out"))
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target)
    assert main([*words, named.format(out=tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: cannot write {path}: it is no regular file\n"
    assert path.is_symlink()
    assert Path(target).is_char_device()
