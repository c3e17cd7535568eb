import hashlib
import logging
import shutil
import subprocess

import pytest
import torch

from clip_pgs.checkpoint_io import newest_checkpoint
from clip_pgs.training.checkpoints.checkpoint_files import (
    find_latest,
    name_latest,
    write_checkpoint,
)


def content(epoch, *, step=0, value=1.0):
    return {"epoch": epoch, "step": step, "state_dict": {"weight": torch.full((200,), value)}}


def write(folder, name, epoch, *, step=0):
    write_checkpoint(content(epoch, step=step), folder / name)
    return folder / name


def flip_byte(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def test_there_is_no_latest_in_an_empty_folder(tmp_path):
    assert find_latest(tmp_path) is None


def test_the_latest_is_the_one_that_got_furthest(tmp_path):
    write(tmp_path, "epoch_2.pt", 2, step=8)
    write(tmp_path, "epoch_10.pt", 10, step=40)
    assert find_latest(tmp_path).name == "epoch_10.pt"
    write(tmp_path, "step_42.pt", 10, step=42)
    write(tmp_path, "step_9.pt", 2, step=9)
    assert find_latest(tmp_path).name == "step_42.pt"
    write(tmp_path, "epoch_latest.pt", 11, step=44)
    assert find_latest(tmp_path).name == "epoch_latest.pt"


@pytest.mark.parametrize("damage", [flip_byte, halve, empty])
def test_a_damaged_file_is_named_set_aside_and_the_one_before_is_used(tmp_path, caplog, damage):
    write(tmp_path, "step_4.pt", 0, step=4)
    damage(write(tmp_path, "step_6.pt", 0, step=6))
    with caplog.at_level(logging.WARNING):
        assert find_latest(tmp_path).name == "step_4.pt"
    assert "step_6.pt" in caplog.text
    assert (tmp_path / "step_6.pt.damaged").exists()
    assert not (tmp_path / "step_6.pt").exists()


@pytest.mark.parametrize("pointer", ["step_6.pt", "../step_6.pt", "/etc/hostname", ""])
def test_latest_names_the_one_before_once_its_file_is_set_aside(tmp_path, pointer):
    name_latest(write(tmp_path, "step_4.pt", 0, step=4))
    halve(write(tmp_path, "step_6.pt", 0, step=6))
    (tmp_path / "latest").write_text(pointer)
    find_latest(tmp_path)
    assert (tmp_path / "latest").read_text() == "step_4.pt\n"


def test_who_only_looks_moves_nothing(tmp_path):
    write(tmp_path, "step_4.pt", 0, step=4)
    flip_byte(write(tmp_path, "step_6.pt", 0, step=6))
    assert newest_checkpoint(tmp_path).name == "step_4.pt"
    assert (tmp_path / "step_6.pt").exists()


def test_sha256sum_agrees_with_the_list(tmp_path):
    write(tmp_path, "step_4.pt", 0, step=4)
    write(tmp_path, "step_6.pt", 0, step=6)
    (tmp_path / "step_4.pt").unlink()
    path = write(tmp_path, "epoch_1.pt", 1, step=8)
    listed = (tmp_path / "SHA256SUMS").read_text()
    assert [line.split("  ")[1] for line in listed.splitlines()] == ["step_6.pt", "epoch_1.pt"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() in listed
    if tool := shutil.which("sha256sum"):
        subprocess.run([tool, "--check", "--status", "SHA256SUMS"], cwd=tmp_path, check=True)


def test_a_file_is_whole_on_both_sides_of_its_replacement(tmp_path):
    path = write(tmp_path, "epoch_latest.pt", 1)
    sums, old = (tmp_path / "SHA256SUMS").read_text(), path.read_bytes()
    write_checkpoint(content(2, value=2.0), path)
    new_sum = (tmp_path / "SHA256SUMS").read_text()
    # As a process leaves it that dies just before, and just after, the file takes its place.
    (tmp_path / "SHA256SUMS").write_text(sums + new_sum)
    assert find_latest(tmp_path) == path
    path.write_bytes(old)
    assert find_latest(tmp_path) == path


def test_what_does_not_load_never_takes_a_place(tmp_path):
    path = write(tmp_path, "step_4.pt", 0, step=4)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="cannot be read"):
        write_checkpoint({"epoch": 0, "state_dict": {"weight": range(3)}}, path)
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["SHA256SUMS", "step_4.pt"]


def test_what_cannot_fit_on_the_disk_is_not_begun(tmp_path):
    huge = torch.ones(1).expand(10**15)
    with pytest.raises(OSError, match=r"No space left: it needs 4e\+06 GB of "):
        write_checkpoint({"epoch": 1, "state_dict": {"weight": huge}}, tmp_path / "epoch_1.pt")
    assert list(tmp_path.iterdir()) == []


def test_latest_is_the_name_of_a_file(tmp_path):
    name_latest(write(tmp_path, "step_4.pt", 0, step=4))
    assert (tmp_path / "latest").read_text() == "step_4.pt\n"
