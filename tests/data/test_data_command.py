from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from clip_pgs.common import expand_home
from clip_pgs.data.__main__ import main
from clip_pgs.data.shards import expand_shards


def run(*arguments):
    command = [sys.executable, "-m", "clip_pgs.data", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def table(tmp_path, make_image):
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(make_image(number))
    rows = [f"{number}.jpg\tcaption {number}" for number in range(3)]
    (tmp_path / "pairs.tsv").write_text("\n".join(["filepath\ttitle", *rows]))
    return tmp_path / "pairs.tsv"


@pytest.mark.slow
def test_packed_shards_pass_the_check_in_processes_of_their_own(table, tmp_path):
    packed = run("pack", table, tmp_path / "out", "--shard-size", 2)
    assert (packed.returncode, packed.stderr) == (0, "")
    pattern = f"{tmp_path}/out/{{00000..00001}}.tar"
    assert f"packed 3 pairs, left out 0; train with --train-data '{pattern}'" in packed.stdout
    checked = run("check", pattern)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "--train-num-samples 3" in checked.stdout


def test_check_of_bad_data_exits_with_1(tmp_path, make_tar, capsys):
    make_tar(tmp_path / "0.tar", [("a.jpg", b"nonsense")])
    assert main(["check", f"{tmp_path}/0.tar"]) == 1
    assert "a: unreadable image" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "{folder}/*.tar"], "matches no file"),
        (["pack", "{folder}/none.csv", "{folder}/out"], "none.csv' does not exist"),
        (["pack", "{folder}/pairs.tsv", "{folder}/out", "--image-key", "x"], "no column 'x'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(table, tmp_path, capsys, arguments, message):
    arguments = [argument.replace("{folder}", str(tmp_path)) for argument in arguments]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_world_passes_its_options_on(tmp_path, capsys):
    assert main(["world", str(tmp_path / "world"), "--num-val", "0"]) == 2
    assert "num_val must be at least 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "world").exists()


@pytest.mark.parametrize(
    "name", ["a{b,c}", "a*?[0]", "pipe:x", "file:x", "./~", "a b'c", "a\\{0..1}"]
)
@pytest.mark.parametrize("size", [2, 3])
def test_the_pattern_that_pack_prints_names_its_shards(
    table, tmp_path, monkeypatch, capsys, name, size
):
    monkeypatch.chdir(tmp_path)
    assert main(["pack", str(table), name, "--shard-size", str(size)]) == 0
    flag, pattern = shlex.split(capsys.readouterr().out.partition("train with ")[2])
    found = expand_shards(expand_home(f"{flag}={pattern}").partition("=")[2])
    expected = sorted(Path(name).absolute().iterdir())[: 2 if size == 2 else 1]
    assert [Path(shard).absolute() for shard in found] == expected


def test_a_folder_whose_name_parts_sources_is_refused(table, tmp_path, capsys):
    assert main(["pack", str(table), str(tmp_path / "a::b")]) == 2
    assert "'::'" in capsys.readouterr().err
    assert not (tmp_path / "a::b").exists()


def test_check_of_a_table_names_what_makes_shards_of_it(table, capsys):
    assert main(["check", str(table)]) == 1
    assert "`clip-pgs data pack` makes shards of one" in capsys.readouterr().out
