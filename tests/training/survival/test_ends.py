"""How a run ends: its exit code, whatever is loading, measuring or starting when it does."""

import errno
import json
import os
import signal
import time

import pytest

from clip_pgs.data import preflight
from clip_pgs.training.__main__ import main
from clip_pgs.training.survival import interrupts
from clip_pgs.training.survival.exits import StoppedError
from support.ranks import output, train_together
from support.runs import flags, run


def tell(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("batch_size", [4, 8])
def test_a_run_with_validation_workers_ends_with_0_and_without_a_traceback(
    tmp_path, world, batch_size
):
    data = {"train_data": world.train_data, "val_data": world.val_data}
    argv = flags(tmp_path, **data, workers=3, batch_size=batch_size, epochs=1)
    assert train_together(tmp_path, argv, num_processes=1) == [0], output(tmp_path)
    assert "Traceback" not in output(tmp_path)
    assert "After epoch 1: clip_val_loss " in output(tmp_path)


def test_a_run_that_only_evaluates_with_workers_ends_with_0(tmp_path, world):
    argv = flags(tmp_path, val_data=world.val_data, workers=2, batch_size=4)
    assert train_together(tmp_path, argv, num_processes=1) == [0], output(tmp_path)
    assert "Traceback" not in output(tmp_path)


def swallow(**_):
    """Evaluate as code does that lets nothing pass."""
    try:
        tell()
        time.sleep(20)
    except Exception:
        return {"accuracy": 0.0}
    return {"accuracy": 0.5}


class Fragile:
    def __del__(self):
        tell()
        time.sleep(0.01)


def lose_in_a_destructor(**_):
    """Evaluate where the first interruption is lost."""
    fragile = Fragile()
    del fragile
    time.sleep(20)
    return {"accuracy": 0.5}


@pytest.mark.parametrize("evaluate", [swallow, lose_in_a_destructor])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_evaluation_swallows_a_signal(tmp_path, world, evaluate, monkeypatch):
    monkeypatch.setattr(interrupts, "_AGAIN_SECONDS", 0.3)
    started = time.monotonic()
    with pytest.raises(StoppedError, match="stopped by SIGTERM at sample 32 of epoch 0"):
        run(tmp_path, train_data=world.train_data, epochs=1, evaluate=evaluate)
    assert time.monotonic() - started < 15
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
    assert stopped.value.code == 85


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
    assert "After epoch 1: clip_val_loss" in said
    assert (folder / "export").is_dir()


def test_a_user_sees_what_each_epoch_brought(tmp_path, world, capfd):
    def evaluate(*, epoch, **_):
        return {"zeroshot/shapes/acc1": 0.5 + epoch / 100, "zeroshot/average/acc1": 0.25}

    data = {"train_data": world.train_data, "val_data": world.val_data}
    run(tmp_path, **data, epochs=2, evaluate=evaluate)
    said = capfd.readouterr().err
    for epoch in (1, 2):
        assert f"Epoch {epoch} of 2: mean loss " in said
        assert f"After epoch {epoch}: clip_val_loss " in said
        assert f"After epoch {epoch}: zeroshot/shapes acc1 0.5{epoch}" in said
        assert f"After epoch {epoch}: zeroshot/average acc1 0.25" in said
