"""Signals, exit codes and their reasons, who may use a run's name, two launches of one run."""

import errno
import io
import json
import os
import re
import shutil
import signal
import tarfile
import threading
import time
from pathlib import Path

import pytest

from clip_pgs.data import preflight
from clip_pgs.data.bad_samples import Skip, UnusableDataError
from clip_pgs.training import stop, validation
from clip_pgs.training.__main__ import main
from clip_pgs.training.loggers import SkipLog
from clip_pgs.training.run_folder import note_launch
from clip_pgs.training.stop import ExitReport, StoppedError, StopRequest, StopSignals
from clip_pgs.training.trainer import Trainer
from support.chaos import Launch, num_steps
from support.disk import files_limited_to
from support.ranks import output, train_together
from support.resuming import differences, last_checkpoint
from support.runs import flags, holding, run, write_shards

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


@pytest.fixture
def caught(monkeypatch):
    monkeypatch.setattr(stop, "ECHO_SECONDS", 0.05)
    # Who runs the tests in the background may have Ctrl-C ignored, which would stay so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    found = StopSignals()
    with found.caught():
        yield found
    signal.signal(signal.SIGINT, before)


def send_and_sleep(caught, number):
    with caught.interruptible(patience=0.3):
        os.kill(os.getpid(), number)
        time.sleep(20)
        pytest.fail("the block went on")


def test_a_signal_that_is_ignored_stays_so_while_others_end_the_process():
    before = {n: signal.getsignal(n) for n in (signal.SIGHUP, signal.SIGTERM)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop.signals_by_default():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is before[signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])


@pytest.mark.parametrize("number", SIGNALS)
def test_a_block_is_broken_off_when_its_patience_is_over(caught, number):
    started = time.monotonic()
    with pytest.raises(StopRequest):
        send_and_sleep(caught, number)
    assert time.monotonic() - started >= 0.3


@pytest.mark.parametrize("number", SIGNALS)
def test_nothing_reminds_a_block_that_has_ended(caught, number):
    with caught.interruptible(patience=0.3):
        os.kill(os.getpid(), number)
    # Were it reminded, Ctrl-C would break off the save that follows.
    time.sleep(0.6)
    assert caught.name == signal.Signals(number).name


def test_a_second_ctrl_c_ends_the_run_at_once(caught):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def tell(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [4, 8])
def test_a_run_with_validation_workers_ends_with_0_and_without_a_traceback(
    tmp_path, world, batch_size
):
    data = {"train_data": world.train_data, "val_data": world.val_data}
    argv = flags(tmp_path, **data, workers=3, batch_size=batch_size, epochs=1)
    assert train_together(tmp_path, argv, num_processes=1) == [0], output(tmp_path)
    assert "Traceback" not in output(tmp_path)
    assert "After epoch 1:\n" in output(tmp_path)


@pytest.mark.slow
def test_a_run_that_only_evaluates_with_workers_ends_with_0(tmp_path, world):
    argv = flags(tmp_path, val_data=world.val_data, workers=2, batch_size=4)
    assert train_together(tmp_path, argv, num_processes=1) == [0], output(tmp_path)
    assert "Traceback" not in output(tmp_path)


@pytest.mark.slow
def test_a_signal_to_a_run_and_its_workers_saves_where_it_is(tmp_path, world):
    # As where Slurm signals each process of a job, or systemd each of a service.
    options = {"train_data": world.train_data, "epochs": 8, "save_frequency": 8, "workers": 1}
    folder = tmp_path / "logs" / "run"
    launch = Launch(tmp_path, flags(tmp_path, **options))
    assert launch.wait_until(lambda: num_steps(folder) >= 3)
    assert launch.signal_everything(signal.SIGTERM) > 1
    assert launch.wait() == 85, launch.output()
    assert launch.output().splitlines()[-1].startswith("stopped by SIGTERM at sample ")
    assert last_checkpoint(folder)["step"] == num_steps(folder) < 32
    run(tmp_path, **options, resume="latest")
    whole = run(tmp_path, **options, name="whole")
    assert differences(last_checkpoint(folder), last_checkpoint(whole)) == []


def swallow(**_):
    """Evaluate as code does that lets nothing pass."""
    try:
        tell()
        time.sleep(20)
    except Exception:
        pytest.fail("the signal was swallowed")
    pytest.fail("the evaluation went on")


class Fragile:
    def __del__(self):
        tell()
        time.sleep(0.01)


def lose_in_a_destructor(**_):
    """Evaluate where the first interruption is lost."""
    fragile = Fragile()
    del fragile
    time.sleep(20)
    pytest.fail("the evaluation went on")


@pytest.mark.slow
@pytest.mark.parametrize("evaluate", [swallow, lose_in_a_destructor])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_evaluation_swallows_a_signal(tmp_path, world, evaluate, monkeypatch):
    monkeypatch.setattr(stop, "_AGAIN_SECONDS", 0.3)
    with pytest.raises(StoppedError, match="stopped by SIGTERM at sample 32 of epoch 1"):
        run(tmp_path, train_data=world.train_data, epochs=1, evaluate=evaluate)
    folder = run(
        tmp_path,
        train_data=world.train_data,
        epochs=1,
        resume="latest",
        evaluate=lambda **_: {"accuracy": 0.25},
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["accuracy"] for line in lines if line["kind"] == "val"] == [0.25]


def test_an_evaluation_without_training_leaves_when_told_to(tmp_path, world):
    with pytest.raises(StoppedError) as stopped:
        run(tmp_path, val_data=world.val_data, evaluate=swallow)
    assert stopped.value.exit_code == 85


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 85), (signal.SIGINT, 130)])
def test_a_signal_before_the_start_has_its_exit_code_and_creates_nothing(
    tmp_path, world, number, code, monkeypatch, capfd
):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(preflight, "preflight", lambda *_, **__: tell(number))
    assert main(flags(tmp_path, train_data=world.train_data)) == code
    signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().err == f"stopped by {number.name} before the start\n"
    assert not (tmp_path / "logs").exists()


def test_an_evaluation_that_cannot_write_ends_no_run(tmp_path, world, capfd):
    def evaluate(**_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    data = {"train_data": world.train_data, "val_data": world.val_data}
    folder = run(tmp_path, **data, epochs=1, evaluate=evaluate)
    said = capfd.readouterr().err
    assert "evaluation after epoch 1 could not be finished" in said
    assert re.search(r"After epoch 1:\n\n.*\nclip_val_loss +\d", said)
    assert (folder / "export").is_dir()


def test_held_out_data_that_is_damaged_for_an_epoch_ends_no_run(tmp_path, world, capfd):
    whole = Path(world.val_data).parent
    shards = tmp_path / "val"
    shutil.copytree(whole, shards)

    def evaluate(*, epoch, **_):
        for shard in shards.glob("*.tar"):
            shard.write_bytes(b"" if epoch == 1 else (whole / shard.name).read_bytes())
        return {"accuracy": epoch / 4}

    val_data = str(shards / Path(world.val_data).name)
    data = {"train_data": world.train_data, "val_data": val_data}
    folder = run(tmp_path, **data, epochs=3, evaluate=evaluate)
    assert "The validation after epoch 2 could not be finished" in capfd.readouterr().err
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if line["kind"] == "val"]
    assert [line["accuracy"] for line in measured] == [0.25, 0.5, 0.75]
    assert ["clip_val_loss" in line for line in measured] == [True, False, True]


def test_damaged_data_of_an_evaluation_without_training_is_an_error(tmp_path, world, monkeypatch):
    shutil.copytree(Path(world.val_data).parent, tmp_path / "val")
    measure = validation.evaluate_with_open_clip

    def damage_and_measure(*args, **options):
        for shard in (tmp_path / "val").glob("*.tar"):
            shard.write_bytes(b"")
        return measure(*args, **options)

    monkeypatch.setattr(validation, "evaluate_with_open_clip", damage_and_measure)
    with pytest.raises(UnusableDataError, match="no usable sample"):
        run(tmp_path, val_data=str(tmp_path / "val" / Path(world.val_data).name))


def test_an_evaluation_that_fails_ends_the_run_with_its_epoch_saved(tmp_path, world):
    def evaluate(**_):
        raise RuntimeError("no such metric")

    with pytest.raises(RuntimeError, match="no such metric"):
        run(tmp_path, train_data=world.train_data, epochs=2, evaluate=evaluate)
    checkpoint = last_checkpoint(tmp_path / "logs" / "run")
    assert (checkpoint["epoch"], checkpoint["step"]) == (1, 4)
    folder = run(tmp_path, train_data=world.train_data, epochs=2, resume="latest")
    assert (folder / "export").is_dir()


def test_a_user_sees_what_each_epoch_brought(tmp_path, world, capfd):
    def evaluate(*, epoch, **_):
        return {"zeroshot/shapes/acc1": 0.5, "zeroshot/average/acc1": 0.6 - epoch / 10}

    data = {"train_data": world.train_data, "val_data": world.val_data}
    run(tmp_path, **data, epochs=2, evaluate=evaluate)
    said = capfd.readouterr().err
    for epoch in (1, 2):
        assert f"Epoch {epoch} of 2: mean loss " in said
        assert f"After epoch {epoch}:\n" in said
    assert len(re.findall(r"^clip_val_loss +\d", said, re.M)) == 2
    assert re.findall(r"^zeroshot/average/acc1 +(.+)", said, re.M) == [
        "0.5000  *",
        "0.4000  0.5000 after epoch 1",
    ]
    assert "zeroshot/shapes" not in said


@pytest.fixture
def holder(tmp_path):
    with holding(tmp_path / "logs" / "run") as process:
        yield process


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.slow
def test_a_run_that_trains_is_left_alone(tmp_path, world, holder, monkeypatch, capfd):
    monkeypatch.setattr(stop, "LOCK_SECONDS", 0.3)
    folder = tmp_path / "logs" / "run"
    before = contents(folder)
    argv = flags(tmp_path, train_data=world.train_data, resume="latest")
    assert main(argv) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "is being trained" in line]
    assert f"{folder} is being trained by process {holder.pid} on " in line
    assert contents(folder) == before


@pytest.mark.slow
def test_a_name_that_another_launch_took_meanwhile_is_refused(tmp_path, world, holder, capfd):
    folder = tmp_path / "logs" / "run"

    def finish():
        (folder / "options.json").write_text("{}")
        holder.kill()

    timer = threading.Timer(3, finish)
    timer.start()
    try:
        assert main(flags(tmp_path, train_data=world.train_data)) == 2
    finally:
        timer.join()
    said = capfd.readouterr().err
    assert f"run {folder} exists; use --resume latest" in said
    assert sorted(path.name for path in folder.iterdir() if path.suffix == ".json") == [
        "options.json"
    ]


@pytest.mark.slow
def test_a_launch_goes_on_when_the_one_before_is_gone(tmp_path, world, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (
        run(tmp_path, train_data=world.train_data, resume="latest", epochs=1) / "export"
    ).is_dir()


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_too_many_bad_samples_end_the_run_with_code_2_after_it_saved(tmp_path, capfd):
    data = write_shards(tmp_path / "train")
    spoil_shard(tmp_path / "train" / "00001.tar", num_good=10)
    assert main(flags(tmp_path, train_data=data, epochs=4)) == 2
    assert "more than --max-bad-share 0.1 allows" in capfd.readouterr().err
    folder = tmp_path / "logs" / "run"
    assert json.loads((folder / "exit.json").read_text())["code"] == 2
    assert (folder / "checkpoints" / "latest").exists()
    with pytest.raises(UnusableDataError):
        run(tmp_path, train_data=data, epochs=4, resume="latest")
    assert run(tmp_path, train_data=data, epochs=4, resume="latest", max_bad_share=0.9)


def test_lines_that_a_resumed_run_repeats_are_dropped(tmp_path):
    log = SkipLog(tmp_path, rank=0, step=0)
    shard = Skip("a.tar", "", "empty shard")
    log(shard)
    for log.step in (1, 2, 3):
        log(Skip("b.tar", str(log.step), "no caption"))
    again = SkipLog(tmp_path, rank=0, step=3)
    again(shard)
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["", "1", "2"]
    assert (log.take_count(), again.take_count()) == (4, 0)


def test_lines_that_cannot_be_dropped_on_a_full_disk_stay_as_they_are(tmp_path, caplog):
    log = SkipLog(tmp_path, rank=0, step=0)
    for log.step in (1, 2, 3):
        log(Skip("b.tar", str(log.step), "no caption"))
    before = (tmp_path / "skipped.jsonl").read_text()
    with files_limited_to(10):
        SkipLog(tmp_path, rank=0, step=3)
    assert (tmp_path / "skipped.jsonl").read_text() == before
    assert "skipped.jsonl cannot be written: File too large; the run goes on" in caplog.text


@pytest.mark.parametrize("is_told_to_launcher", [False, True])
def test_a_reason_that_a_full_disk_refuses_is_logged_and_leaves_no_empty_file(
    tmp_path, caplog, monkeypatch, is_told_to_launcher
):
    if is_told_to_launcher:
        (tmp_path / "launch").mkdir()
        monkeypatch.setenv("CLIP_PGS_LAUNCH_DIR", str(tmp_path / "launch"))
    report = ExitReport(StopSignals())
    report.folder = tmp_path
    with files_limited_to(10):
        report.write_error("a step takes too long")
    assert "a step takes too long" in caplog.text
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    report.write_error("another")
    assert json.loads((tmp_path / "exit.json").read_text())["reason"] == "another"
    caplog.clear()
    report.write_error("of a process that is later")
    assert caplog.text == ""
    assert json.loads((tmp_path / "exit.json").read_text())["reason"] == "another"


@pytest.fixture
def begun(tmp_path, world, monkeypatch):
    """Return the flags of a run whose first epoch a launch named "job-1" has done."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    argv = flags(tmp_path, train_data=world.train_data, epochs=1)
    assert main(argv) == 0
    return argv


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(("has_begun_it", "code"), [(True, 0), (False, 2)])
def test_a_launch_that_torchrun_calls_as_all_others_goes_on_with_what_it_has_begun_alone(
    begun, tmp_path, monkeypatch, has_begun_it, code
):
    folder = tmp_path / "launch"
    folder.mkdir()
    monkeypatch.setenv("CLIP_PGS_LAUNCH_DIR", str(folder))
    if has_begun_it:
        note_launch(tmp_path / "logs" / "run")
        (folder / "exit.0000").write_text("1\nrank 0: another process of the run is gone\n")
    # As on a machine whose process did not die, and on one whose process was refused the name.
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0" if has_begun_it else "1")
    assert main(begun) == code
    (end,) = folder.glob("exit.*")
    assert end.read_text().startswith(f"{code}\n")
    assert ("exists; use --resume latest to continue it" in end.read_text()) == bool(code)


@pytest.mark.slow
def test_changed_options_are_accepted_when_told_to(tmp_path, world, capfd):
    argv = flags(tmp_path, train_data=world.train_data, epochs=1)
    assert main(argv) == 0
    more = [*argv, "--epochs", "2", "--resume", "latest", "--seed", "5", "--masking", "random"]
    assert main(more) == 2
    assert "seed 0 -> 5" in capfd.readouterr().err
    assert main([*more, "--accept-changes"]) == 0
    # Who reads the card learns of the options that it had before.
    (card,) = tmp_path.rglob("export/README.md")
    (told,) = [line for line in card.read_text().splitlines() if line.startswith("It had ")]
    assert "masking none" in told
    assert "epochs 1" in told
    assert "seed 0" in told
    assert told.endswith(" until step 4.")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "samples"), [(4, [8, 12, 16, 20, 24, 28, 32]), (12, [8, 20, 32]), (16, [8, 24])]
)
def test_a_run_goes_on_with_another_batch_size_from_the_same_sample(
    tmp_path, world, caplog, size, samples
):
    options = {"train_data": world.train_data, "epochs": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "save_if_due", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(StoppedError, match="at sample 8 of epoch 1"):
            run(tmp_path, **options)
    caplog.set_level("INFO")
    folder = run(tmp_path, resume="latest", **{**options, "batch_size": size})
    assert f"batch_size 8 -> {size}: from the same number of samples, in the order" in caplog.text
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines] == samples
    shares = [int(share) for share in re.findall(r"Epoch 1/1 +(\d+)%", caplog.text)]
    assert shares[-1] == 100
    assert shares == sorted(set(shares))
    assert re.search(r"Training: 1 epoch of \d steps?, the first from sample 8 on", caplog.text)


@pytest.mark.slow
def test_a_contrastive_loss_over_smaller_batches_is_not_called_the_best(tmp_path, world, caplog):
    options = {"train_data": world.train_data, "val_data": world.val_data, "resume": "latest"}
    caplog.set_level("INFO")
    run(tmp_path, epochs=1, **options)
    run(tmp_path, epochs=2, batch_size=2, **options)
    run(tmp_path, epochs=3, **options)
    losses = re.findall(r"^clip_val_loss +([\d.]+) +(.*?) *$", caplog.text, re.M)
    assert len(losses) == 3
    (first, _), (second, best), (third, best_of_first_size) = losses
    assert float(second) < float(first)
    assert best == "*"
    # Of the first and third epoch, whatever the second had.
    assert best_of_first_size == ("*" if third <= first else f"{first} after epoch 1")
    recalls = re.findall(r"^image_to_text_R@5 .*", caplog.text, re.M)
    assert len(recalls) == 3
