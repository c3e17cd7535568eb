"""What a run says when it ends and who may use its name again."""

import io
import json
import os
import signal
import tarfile

import pytest

from clip_pgs.data.skips import Skip, UnusableDataError
from clip_pgs.training.__main__ import main
from clip_pgs.training.checkpoints.saving import RunSaver
from clip_pgs.training.survival.exits import StoppedError
from clip_pgs.training.telemetry.skip_log import SkipLog
from support.disk import files_limited_to
from support.runs import flags, run, write_shards


def spoil_shard(path, *, num_good):
    """Overwrite a shard with some good pairs and as many whose image is none."""
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]
    with tarfile.open(path, "w") as tar:
        for number, (name, content) in enumerate(members):
            info = tarfile.TarInfo(name)
            if name.endswith(".png") and number // 2 >= num_good:
                content = b"no image"
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_each_skip_is_a_line_and_the_totals_are_logged(tmp_path):
    data = write_shards(tmp_path / "train")
    spoil_shard(tmp_path / "train" / "00001.tar", num_good=13)
    folder = run(tmp_path, train_data=data, epochs=2, workers=1)
    lines = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    keys = sorted(line["key"] for line in lines)
    assert keys == sorted(2 * ["00013", "00014", "00015"])
    assert {line["reason"] for line in lines} == {"unreadable image"}
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])[
        "skipped_samples"
    ] == len(lines)


def test_too_many_bad_samples_end_the_run_with_code_2_after_it_saved(tmp_path, capfd):
    data = write_shards(tmp_path / "train")
    spoil_shard(tmp_path / "train" / "00001.tar", num_good=2)
    assert main(flags(tmp_path, train_data=data, epochs=4)) == 2
    assert "more than --max-bad-share 0.1 allows" in capfd.readouterr().err
    folder = tmp_path / "logs" / "run"
    assert json.loads((folder / "exit.json").read_text())["code"] == 2
    assert (folder / "checkpoints" / "latest").exists()
    with pytest.raises(UnusableDataError):
        run(tmp_path, train_data=data, epochs=4, resume="latest")
    assert run(tmp_path, train_data=data, epochs=4, resume="latest", max_bad_share=0.9)


def test_lines_that_a_resumed_run_repeats_are_dropped(tmp_path):
    log = SkipLog(tmp_path, rank=0)
    shard = Skip("a.tar", "", "empty shard")
    log(shard)
    log.open(step=0)
    for log.step in (1, 2, 3):
        log(Skip("b.tar", str(log.step), "no caption"))
    again = SkipLog(tmp_path, rank=0)
    again(shard)
    again.open(step=3)
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["", "1", "2"]
    assert (log.take_count(), again.take_count()) == (4, 0)


def test_lines_that_cannot_be_dropped_on_a_full_disk_stay_as_they_are(tmp_path, caplog):
    log = SkipLog(tmp_path, rank=0)
    log.open(step=0)
    for log.step in (1, 2, 3):
        log(Skip("b.tar", str(log.step), "no caption"))
    before = (tmp_path / "skipped.jsonl").read_text()
    with files_limited_to(10):
        SkipLog(tmp_path, rank=0).open(step=3)
    assert (tmp_path / "skipped.jsonl").read_text() == before
    assert "skipped.jsonl cannot be written: File too large; the run goes on" in caplog.text


@pytest.fixture
def begun(tmp_path, world, monkeypatch):
    """Return the flags of a run whose first epoch a launch named "job-1" has done."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    argv = flags(tmp_path, train_data=world.train_data, epochs=1)
    assert main(argv) == 0
    return argv


@pytest.mark.parametrize(
    ("environment", "code"),
    [
        ({}, 2),
        ({"TORCHELASTIC_RESTART_COUNT": "1"}, 0),
        ({"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "job-2"}, 2),
        ({"SLURM_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "job-2"}, 0),
        ({"SLURM_RESTART_COUNT": "1", "SLURM_JOB_ID": "8"}, 2),
    ],
)
def test_a_name_may_be_used_again_by_the_launch_that_was_restarted(
    begun, monkeypatch, capfd, environment, code
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(begun) == code
    if code:
        assert capfd.readouterr().err.count("exists; use --resume latest to continue it") == 1


def test_changed_options_are_accepted_when_told_to(tmp_path, world, capfd):
    argv = flags(tmp_path, train_data=world.train_data, epochs=1)
    assert main(argv) == 0
    more = [*argv, "--epochs", "2", "--resume", "latest", "--seed", "5"]
    assert main(more) == 2
    assert "seed 0 -> 5" in capfd.readouterr().err
    assert main([*more, "--accept-changes"]) == 0


def test_a_run_goes_on_with_another_batch_size_from_the_same_sample(tmp_path, world, caplog):
    options = {"train_data": world.train_data, "epochs": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunSaver, "save_due", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(StoppedError, match="at sample 8 of epoch 0"):
            run(tmp_path, **options)
    folder = run(tmp_path, resume="latest", **{**options, "batch_size": 4})
    assert "batch_size 8 -> 4: from the same number of samples, in the order" in caplog.text
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines] == [8, 12, 16, 20, 24, 28, 32]
