"""Checkpoint files: written whole, found again, kept as long as asked, saved when due."""

import hashlib
import logging
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from clip_pgs.checkpoint_reading import load_checkpoint, newest_checkpoint
from clip_pgs.training.checkpoint import (
    CheckpointStore,
    find_latest,
    name_latest,
    write_checkpoint,
)
from support.disk import files_limited_to
from support.runs import run


def content(epoch=0, *, step=0, value=1.0, **more):
    return {"epoch": epoch, "step": step, "state_dict": {"w": torch.full((200,), value)}, **more}


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


def test_the_latest_is_found_where_no_file_can_be_written(tmp_path):
    write(tmp_path, "epoch_2.pt", 2, step=8)
    (tmp_path / "latest").unlink(missing_ok=True)
    # The folder may lie on a disk that is full or can only be read.
    (tmp_path / ".latest.unfinished").mkdir()
    assert find_latest(tmp_path).name == "epoch_2.pt"
    assert not (tmp_path / "latest").exists()


@pytest.mark.parametrize("damage", [flip_byte, halve, empty])
def test_a_damaged_file_is_named_set_aside_and_the_one_before_is_used(tmp_path, caplog, damage):
    write(tmp_path, "step_4.pt", 0, step=4)
    damage(write(tmp_path, "step_6.pt", 0, step=6))
    with caplog.at_level(logging.WARNING):
        assert find_latest(tmp_path).name == "step_4.pt"
    assert "step_6.pt" in caplog.text
    assert (tmp_path / "step_6.pt.damaged").exists()
    assert not (tmp_path / "step_6.pt").exists()


def test_the_newest_is_missed_where_it_was_removed(tmp_path, caplog):
    write(tmp_path, "step_4.pt", 0, step=4)
    (tmp_path / "latest").write_text("step_6.pt\n")
    assert find_latest(tmp_path).name == "step_4.pt"
    assert "step_6.pt is gone: going on from step_4.pt" in caplog.text


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


REPOSITORY = Path(__file__).parents[2]


def names(folder):
    return sorted(path.name for path in folder.glob("*.pt"))


def save_all(store, *contents, kind="epoch"):
    for each in contents:
        store.save(each, f"{kind}_{each[kind]}.pt")
    return store.close()


def test_files_asked_for_are_written_and_no_other(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(content(epoch=1), "epoch_1.pt", "epoch_latest.pt")
    store.save(content(epoch=2), "epoch_latest.pt")
    store.save(content(epoch=2, step=6), "step_6.pt")
    assert store.close()
    assert names(tmp_path) == ["epoch_1.pt", "epoch_latest.pt", "step_6.pt"]
    assert load_checkpoint(tmp_path / "epoch_latest.pt")["epoch"] == 2


def test_latest_names_the_last_one_saved(tmp_path):
    store = CheckpointStore(tmp_path)
    for step, saved in ((4, ["epoch_1.pt", "epoch_latest.pt"]), (6, ["step_6.pt"])):
        store.save(content(epoch=1, step=step), *saved)
        store.wait()
        name = (tmp_path / "latest").read_text().strip()
        assert torch.load(tmp_path / name, weights_only=True)["step"] == step
    store.close()


def test_the_previous_epoch_is_deleted_once_the_next_is_there(tmp_path):
    store = CheckpointStore(tmp_path, delete_previous=True)
    save_all(store, content(epoch=2), content(epoch=4))
    assert names(tmp_path) == ["epoch_4.pt"]


def test_the_last_k_steps_are_kept_and_every_epoch(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    store.save(content(epoch=1, step=2), "epoch_1.pt")
    save_all(store, *(content(epoch=1, step=step) for step in (3, 9, 10, 11)), kind="step")
    assert names(tmp_path) == ["epoch_1.pt", "step_10.pt", "step_11.pt"]


def test_to_keep_no_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep_last must be >= 1, got 0"):
        CheckpointStore(tmp_path, keep_last=0)


def test_training_may_go_on_at_once(tmp_path):
    weights = torch.zeros(300_000)
    store = CheckpointStore(tmp_path)
    for step in range(1, 6):
        weights.fill_(step)
        store.save({"epoch": 0, "step": step, "state_dict": {"w": weights}}, f"step_{step}.pt")
        weights.fill_(-1.0)
    assert store.close()
    for step in range(1, 6):
        saved = load_checkpoint(tmp_path / f"step_{step}.pt")["state_dict"]["w"]
        assert torch.equal(saved, torch.full_like(weights, step))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["state_dict", "optimizer"])
def test_a_checkpoint_that_is_not_finite_is_never_written(tmp_path, caplog, value, part):
    store = CheckpointStore(tmp_path)
    store.save(content(epoch=1), "epoch_1.pt")
    bad = content(epoch=2)
    bad.setdefault(part, {})["w"] = torch.tensor([1.0, value])
    store.save(bad, "epoch_2.pt", "epoch_latest.pt")
    assert not store.close()
    assert names(tmp_path) == ["epoch_1.pt"]
    assert (tmp_path / "latest").read_text() == "epoch_1.pt\n"
    assert f"epoch_2.pt (epoch 2, step 0) was not saved: {part}/w holds 1 NaN" in caplog.text


def test_older_checkpoints_are_spoken_of_where_there_are_some(tmp_path, caplog):
    store = CheckpointStore(tmp_path)
    store.save(content(state_dict={"w": torch.tensor(float("nan"))}), "epoch_0.pt")
    assert not store.close()
    assert "was not saved" in caplog.text
    assert "older" not in caplog.text


def test_a_copy_that_does_not_fit_is_named_and_the_checkpoint_counts(tmp_path, caplog):
    caplog.set_level("INFO")
    store = CheckpointStore(tmp_path, delete_previous=True)
    store.save(content(epoch=1), "epoch_1.pt")
    store.wait()
    # A folder in its place refuses the copy, as a full disk would.
    (tmp_path / "epoch_latest.pt").mkdir()
    store.save(content(epoch=2), "epoch_2.pt", "epoch_latest.pt")
    assert store.close()
    assert load_checkpoint(tmp_path / "epoch_2.pt")["epoch"] == 2
    _, said, saved = caplog.messages
    assert said.startswith("epoch_latest.pt (epoch 2, step 0) was not saved: ")
    assert said.endswith("; epoch_2.pt, which has the same, was")
    assert saved.startswith("Saved epoch_2.pt (epoch 2, step 0)")
    # Else there would be room for none of those to come.
    assert not (tmp_path / "epoch_1.pt").exists()


def test_numbers_of_numpy_are_saved_as_plain_ones(tmp_path):
    record = {"loss": np.float64(0.5), "seen": np.int64(3), "rate": np.float32(0.25)}
    save_all(CheckpointStore(tmp_path), content(clip_pgs=record))
    loaded = torch.load(tmp_path / "epoch_0.pt", weights_only=True)["clip_pgs"]
    assert loaded == {"loss": 0.5, "seen": 3, "rate": 0.25}


def test_what_no_reader_would_take_is_refused_before_anything_is_written(tmp_path):
    store = CheckpointStore(tmp_path)
    with pytest.raises(ValueError, match="got a set at clip_pgs/names"):
        store.save(content(clip_pgs={"names": {"a"}}), "epoch_0.pt")
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_named_and_removed(tmp_path, caplog):
    (tmp_path / ".step_8.pt.unfinished").write_bytes(b"half")
    with caplog.at_level(logging.WARNING):
        CheckpointStore(tmp_path).close()
    assert "Removed .step_8.pt.unfinished" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_loses_nothing_older_and_saving_goes_on(tmp_path, caplog):
    store = CheckpointStore(tmp_path, keep_last=1)
    store.save(content(step=1), "step_1.pt")
    assert store.wait()
    large = {"epoch": 0, "step": 2, "state_dict": {"w": torch.ones(1_000_000)}}
    with files_limited_to(1_000_000):
        store.save(large, "step_2.pt")
        assert not store.wait()
    assert (
        "step_2.pt (epoch 0, step 2) was not saved: File too large; older checkpoints are untouched"
        in caplog.text
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["SHA256SUMS", "latest", "step_1.pt"]
    assert (tmp_path / "latest").read_text() == "step_1.pt\n"
    store.save(large, "step_2.pt")
    # Where a run fails after it has closed it, it does so again.
    assert store.close()
    assert store.close()
    assert names(tmp_path) == ["step_2.pt"]


@pytest.mark.slow
def test_no_kill_leaves_a_latest_that_does_not_load(tmp_path, monkeypatch, capsys):
    script = str(REPOSITORY / "scripts" / "chaos_checkpoints.py")
    command = [script, "--kills", "20", "--folder", str(tmp_path / "checkpoints")]
    ended = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "20 kills" in ended.stdout
    assert "0 unreadable" in ended.stdout
    # A second trial would go on from these checkpoints and count them as its own.
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as again:
        runpy.run_path(script, run_name="__main__")
    assert again.value.code == 2
    assert "--folder" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("is_measured", "expected"),
    [
        (False, ["epoch_1.pt", "epoch_2.pt", "step_2.pt", "step_6.pt"]),
        # What is measured in between may take long.
        (True, ["epoch_1.pt", "epoch_2.pt", "step_4.pt", "step_6.pt", "step_8.pt"]),
    ],
)
def test_the_end_of_an_epoch_is_saved_once(tmp_path, world, is_measured, expected):
    val_data = world.val_data if is_measured else None
    options = {"save_every_steps": 2, "keep_checkpoints": 3, "val_data": val_data}
    folder = run(tmp_path, train_data=world.train_data, **options)
    saved = sorted(path.name for path in (folder / "checkpoints").glob("*.pt"))
    assert saved == expected
    text = (folder / "out.log").read_text()
    assert text.count("Saved step_4.pt") == int(is_measured)


def test_an_epoch_without_a_file_of_its_own_keeps_that_of_its_last_step(tmp_path, world):
    options = {"save_every_steps": 4, "save_frequency": 0}
    folder = run(tmp_path, train_data=world.train_data, **options)
    saved = sorted(path.name for path in (folder / "checkpoints").glob("*.pt"))
    assert saved == ["epoch_2.pt", "step_4.pt"]
