import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from clip_pgs.training.checkpoints.checkpoint import load_checkpoint
from clip_pgs.training.checkpoints.checkpoint_store import CheckpointStore
from support.disk import files_limited_to

REPOSITORY = Path(__file__).parents[3]


def content(*, epoch=0, step=0, value=1.0, **more):
    return {"epoch": epoch, "step": step, "state_dict": {"w": torch.full((200,), value)}, **more}


def names(folder):
    return sorted(path.name for path in folder.glob("*.pt"))


def save_all(store, *contents, **options):
    for each in contents:
        store.save(each, **options)
    return store.close()


def test_files_asked_for_are_written_and_no_other(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(content(epoch=1), as_epoch=True, as_most_recent=True)
    store.save(content(epoch=2), as_most_recent=True)
    assert store.save(content(epoch=2, step=5)) == 0.0
    store.save(content(epoch=2, step=6), as_step=True)
    assert store.close()
    assert names(tmp_path) == ["epoch_1.pt", "epoch_latest.pt", "step_6.pt"]
    assert load_checkpoint(tmp_path / "epoch_latest.pt")["epoch"] == 2


def test_latest_names_the_last_one_saved(tmp_path):
    store = CheckpointStore(tmp_path)
    for step, options in ((4, {"as_epoch": True, "as_most_recent": True}), (6, {"as_step": True})):
        store.save(content(epoch=1, step=step), **options)
        store.wait()
        name = (tmp_path / "latest").read_text().strip()
        assert torch.load(tmp_path / name, weights_only=True)["step"] == step
    store.close()


def test_the_previous_epoch_is_deleted_once_the_next_is_there(tmp_path):
    store = CheckpointStore(tmp_path, delete_previous=True)
    save_all(store, content(epoch=2), content(epoch=4), as_epoch=True)
    assert names(tmp_path) == ["epoch_4.pt"]


def test_the_last_k_steps_are_kept_and_every_epoch(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    store.save(content(epoch=1, step=2), as_epoch=True)
    save_all(store, *(content(epoch=1, step=step) for step in (3, 9, 10, 11)), as_step=True)
    assert names(tmp_path) == ["epoch_1.pt", "step_10.pt", "step_11.pt"]


def test_to_keep_no_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep_last must be >= 1, got 0"):
        CheckpointStore(tmp_path, keep_last=0)


def test_training_may_go_on_at_once(tmp_path):
    weights = torch.zeros(300_000)
    store = CheckpointStore(tmp_path)
    for step in range(1, 6):
        weights.fill_(step)
        store.save({"epoch": 0, "step": step, "state_dict": {"w": weights}}, as_step=True)
        weights.fill_(-1.0)
    assert store.close()
    for step in range(1, 6):
        saved = load_checkpoint(tmp_path / f"step_{step}.pt")["state_dict"]["w"]
        assert torch.equal(saved, torch.full_like(weights, step))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["state_dict", "optimizer"])
def test_a_checkpoint_that_is_not_finite_is_never_written(tmp_path, caplog, value, part):
    store = CheckpointStore(tmp_path)
    store.save(content(epoch=1), as_epoch=True)
    bad = content(epoch=2)
    bad.setdefault(part, {})["w"] = torch.tensor([1.0, value])
    store.save(bad, as_epoch=True, as_most_recent=True)
    assert not store.close()
    assert names(tmp_path) == ["epoch_1.pt"]
    assert (tmp_path / "latest").read_text() == "epoch_1.pt\n"
    assert f"epoch_2.pt (epoch 2, step 0) was not saved: {part}/w holds 1 NaN" in caplog.text


def test_numbers_of_numpy_are_saved_as_plain_ones(tmp_path):
    record = {"loss": np.float64(0.5), "seen": np.int64(3), "rate": np.float32(0.25)}
    save_all(CheckpointStore(tmp_path), content(clip_pgs=record), as_epoch=True)
    loaded = torch.load(tmp_path / "epoch_0.pt", weights_only=True)["clip_pgs"]
    assert loaded == {"loss": 0.5, "seen": 3, "rate": 0.25}


def test_what_no_reader_would_take_is_refused_before_anything_is_written(tmp_path):
    store = CheckpointStore(tmp_path)
    with pytest.raises(ValueError, match="got a set at clip_pgs/names"):
        store.save(content(clip_pgs={"names": {"a"}}), as_epoch=True)
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
    store.save(content(step=1), as_step=True)
    assert store.wait()
    large = {"epoch": 0, "step": 2, "state_dict": {"w": torch.ones(1_000_000)}}
    with files_limited_to(1_000_000):
        store.save(large, as_step=True)
        assert not store.wait()
    assert "step_2.pt (epoch 0, step 2) was not saved: File too large" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["SHA256SUMS", "latest", "step_1.pt"]
    assert (tmp_path / "latest").read_text() == "step_1.pt\n"
    store.save(large, as_step=True)
    assert store.close()
    assert names(tmp_path) == ["step_2.pt"]
    assert (store.num_saved, store.num_failed) == (2, 1)


def test_no_kill_leaves_a_latest_that_does_not_load(tmp_path):
    script = REPOSITORY / "scripts" / "chaos_checkpoints.py"
    ended = subprocess.run(
        [sys.executable, script, "--kills", "20", "--folder", tmp_path / "checkpoints"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "20 kills" in ended.stdout
    assert "0 unreadable" in ended.stdout
