"""A disk that fills up while a run trains: what is lost, what is said, and how it ends."""

import json
import os
import re
import subprocess
import sys

import pytest

from clip_pgs.files import append_line
from clip_pgs.training.__main__ import main
from clip_pgs.training.export_command import main as export
from support.disk import files_limited_to
from support.runs import flags

# The files that a run begins with are smaller, its logs, pictures and checkpoints larger.
NUM_KILOBYTES = 8


def train(folder, world, *, num_kilobytes, **options):
    """Train in a process in which no file may grow beyond a size; return code and what it said."""
    argv = flags(folder, train_data=world.train_data, report_to="tensorboard", **options)
    command = f'ulimit -f {num_kilobytes}; exec "$0" -m clip_pgs.training "$@"'
    ended = subprocess.run(
        ["bash", "-c", command, sys.executable, *argv],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    return ended.returncode, ended.stderr


@pytest.mark.slow
def test_logs_curves_and_pictures_that_cannot_be_written_are_named_once(tmp_path, world):
    code, said = train(
        tmp_path,
        world,
        num_kilobytes=NUM_KILOBYTES,
        masking="random",
        epochs=8,
        save_every_steps=3,
        val_data=world.val_data,
    )
    assert "Traceback" not in said
    lost = re.findall(r"WARNING \| (\S+) cannot be written: .*; the run goes on", said)
    assert sorted(lost) == ["masks", "metrics.jsonl", "out.log", "tensorboard"]
    assert "step_3.pt (epoch 0, step 3) was not saved" in said
    assert code == 1
    assert said.splitlines()[-1].startswith("error: the export cannot be written: ")
    assert said.splitlines()[-1].endswith(
        "; nor could the last checkpoint be; --resume latest trains again from the beginning"
    )
    end = json.loads((tmp_path / "logs" / "run" / "exit.json").read_text())
    assert end["reason"] in said.splitlines()[-1]


@pytest.mark.slow
def test_a_disk_that_is_full_from_the_start_is_one_sentence(tmp_path, world):
    code, said = train(tmp_path, world, num_kilobytes=0)
    assert code == 1
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: the run's folder cannot be written: ")


@pytest.mark.slow
def test_an_export_that_cannot_be_written_can_be_made_later(tmp_path, world, capfd):
    folder = tmp_path / "logs" / "run"
    # Where its folder would be there is a file that nobody removes.
    folder.mkdir(parents=True)
    (folder / ".export.unfinished").write_text("")
    assert main(flags(tmp_path, train_data=world.train_data, epochs=1)) == 1
    said = capfd.readouterr().err
    last = said.splitlines()[-1]
    assert last.startswith("error: the export cannot be written: ")
    assert last.endswith(f"; clip-pgs export {folder} makes it from the checkpoint")
    assert "Traceback" not in said
    (folder / ".export.unfinished").unlink()
    assert export([str(folder)]) == 0
    assert (folder / "export" / "open_clip_model.safetensors").is_file()


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_line(path, "first")
    with files_limited_to(10), pytest.raises(OSError, match=r"File too large|No space left"):
        append_line(path, "a second one")
    append_line(path, "third")
    assert path.read_text() == "first\nthird\n"
