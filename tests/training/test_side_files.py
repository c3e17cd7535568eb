"""Files of a run's folder that are damaged or gone: what a run can do without, and what not."""

import json
import os
import shutil
import signal
from contextlib import ExitStack

import pytest

from clip_pgs.training.__main__ import main
from clip_pgs.training.trainer import Trainer
from support.resuming import KilledError, last_checkpoint
from support.runs import flags, holding, run

_save_if_due = Trainer.save_if_due
DAMAGE = {
    "metrics.jsonl": b'\xff\xfe{"step": 1}\n[1, 2]\n{"step": "x"}\n',
    "skipped.jsonl": b"\xff\n17\n",
    "options.json": b"[]",
    "env.json": b"\xff{",
    "masks/images.pt": b"no images",
    "checkpoints/results.jsonl": b"\xff",
    "exit.json": b"[",
}


@pytest.mark.slow
def test_damaged_side_files_are_named_and_stop_no_resume(tmp_path, world, caplog):
    options = {"train_data": world.train_data, "masking": "random"}
    folder = run(tmp_path, **options, epochs=1)
    steps = (folder / "metrics.jsonl").read_bytes()
    for name, content in DAMAGE.items():
        (folder / name).write_bytes(content)
    (folder / "metrics.jsonl").write_bytes(steps + DAMAGE["metrics.jsonl"])
    assert main(flags(tmp_path, **options, epochs=2, resume="latest")) == 0
    said = "\n".join(r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    for name in ("metrics.jsonl", "skipped.jsonl", "options.json", "env.json", "images.pt"):
        assert name in said
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(8))
    assert json.loads((folder / "exit.json").read_text())["code"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("content", ["{", "[]", '{"launch": 3, "train_files": 7}', "\udcff"])
def test_options_of_another_shape_are_none(tmp_path, world, content):
    options = {"train_data": world.train_data, "epochs": 1}
    folder = run(tmp_path, **options)
    (folder / "options.json").write_bytes(content.encode(errors="surrogateescape"))
    # "train_files" of a number compares the pattern, as with a run of before.
    assert main(flags(tmp_path, **options, resume="latest")) == 0


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_all_damaged_begins_no_more(tmp_path, world, capfd):
    options = {"train_data": world.train_data, "save_every_steps": 2, "epochs": 1}
    folder = run(tmp_path, **options)
    for path in (folder / "checkpoints").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-50])
    before = (folder / "metrics.jsonl").read_bytes()
    # The second time, too.
    for _ in range(2):
        capfd.readouterr()
        assert main(flags(tmp_path, **options, resume="latest")) == 2
        assert "no checkpoint in " in capfd.readouterr().err.splitlines()[-1]
    assert (folder / "metrics.jsonl").read_bytes() == before
    for path in (folder / "checkpoints").glob("*.pt"):
        path.rename(f"{path}.damaged")
    assert main(flags(tmp_path, **options, resume="latest")) == 2


def remove_at(monkeypatch, step, remove):
    def save_if_due(self, trainer):
        _save_if_due(self, trainer)
        if self.step == step:
            self._store.wait()
            remove()

    monkeypatch.setattr(Trainer, "save_if_due", save_if_due)


@pytest.mark.slow
def test_what_was_saved_and_is_gone_is_missed_and_what_never_was_is_told(
    tmp_path, world, monkeypatch, caplog, capfd
):
    options = {"train_data": world.train_data, "epochs": 1, "resume": "latest"}

    def die():
        raise KilledError

    with monkeypatch.context() as patch:
        remove_at(patch, 3, die)
        with pytest.raises(KilledError):
            run(tmp_path, **options)
        remove_at(patch, 2, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        # It had not come to save anything.
        assert main(flags(tmp_path, **options)) == 85
    assert "its 3 steps are lost; starting fresh" in caplog.text
    checkpoints = tmp_path / "logs" / "run" / "checkpoints"
    for path in checkpoints.iterdir():
        path.unlink()
    capfd.readouterr()
    assert main(flags(tmp_path, **options)) == 2
    assert "had saved after 2 steps" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpoints", "."])
def test_a_folder_that_was_removed_in_mid_run_is_made_again(tmp_path, world, monkeypatch, name):
    folder = tmp_path / "logs" / "run"
    remove_at(monkeypatch, 3, lambda: shutil.rmtree(folder / name))
    run(tmp_path, train_data=world.train_data, val_data=world.val_data, save_every_steps=2)
    assert last_checkpoint(folder)["epoch"] == 2
    assert (folder / "checkpoints" / "results.jsonl").is_file()
    assert "masking" in json.loads((folder / "options.json").read_text())
    for part in ("params.txt", "env.json"):
        assert (folder / part).read_text()
    assert "Saved epoch_2.pt" in (folder / "out.log").read_text()


def test_a_removed_folder_that_another_run_took_meanwhile_is_left_to_it(
    tmp_path, world, monkeypatch, capfd
):
    folder = tmp_path / "logs" / "run"
    with ExitStack() as stack:
        others = []

        def replace_by_another_run():
            shutil.rmtree(folder)
            others.append(stack.enter_context(holding(folder)))

        remove_at(monkeypatch, 3, replace_by_another_run)
        assert main(flags(tmp_path, train_data=world.train_data, save_every_steps=1)) == 1
        assert f"process {others[0].pid} on " in capfd.readouterr().err.splitlines()[-1]
        assert list(folder.glob("**/*.pt")) == []


@pytest.mark.slow
def test_a_removed_folder_is_held_again(tmp_path, world, monkeypatch):
    folder = tmp_path / "logs" / "run"
    found = []
    remove_at(monkeypatch, 2, lambda: shutil.rmtree(folder))
    remove_at(monkeypatch, 3, lambda: found.append(json.loads((folder / ".lock").read_text())))
    run(tmp_path, train_data=world.train_data, save_every_steps=1)
    assert found[0]["process"] == os.getpid()


def test_no_run_ends_with_0_and_without_a_checkpoint(tmp_path, world, monkeypatch, capfd):
    folder = tmp_path / "logs" / "run"

    def replace_by_a_file():
        shutil.rmtree(folder / "checkpoints")
        (folder / "checkpoints").touch()

    remove_at(monkeypatch, 3, replace_by_a_file)
    assert main(flags(tmp_path, train_data=world.train_data, epochs=1)) == 1
    assert "the last checkpoint could not be written" in capfd.readouterr().err.splitlines()[-1]
