"""Data that stops coming, and data of which too much is bad."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from multiprocessing import connection, resource_sharer

import pytest

from clip_pgs.data.bad_samples import Skip, SkipAccount, StalledDataError, UnusableDataError
from clip_pgs.data.loader import hear_parent_alone
from support.streams import AUGMENT, numbers, open_stream, read_from, with_options


@pytest.fixture
def args(make_shards, make_args):
    folder = make_shards([10, 10, 10])
    return make_args(train_data=f"{folder}/{{0..2}}.tar", batch_size=6, data_timeout=1.5)


@pytest.fixture(autouse=True)
def ended_workers():
    """Wait for workers that hang here, and not in the next test."""
    yield
    gc.collect()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_shard_that_gives_nothing_ends_the_stream_by_its_name(args, workers):
    path = args.train_data.replace("{0..2}", "1")
    stream = open_stream(with_options(args, workers=workers))
    os.unlink(path)
    os.mkfifo(path)
    with pytest.raises(StalledDataError) as error:
        read_from(stream)
    assert str(error.value).startswith("no batch for 1.5 seconds: worker ")
    assert f"is at {path}: sample " in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_command_that_gives_nothing_ends_the_stream_by_its_name(args, workers):
    shard = args.train_data.replace("{0..2}", "0")
    # The end of an archive is not the end of the command.
    command = f"pipe:head -c 40000 '{shard}'; sleep 20"
    with_options(args, train_data=command, train_num_samples=30, workers=workers)
    with pytest.raises(StalledDataError, match=r"is at pipe:head .*; sleep 20 after \d+ samples"):
        read_from(open_stream(args))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_process_that_is_suspended_while_it_awaits_a_batch_has_its_time_anew(args, workers):
    shard = args.train_data.replace("{0..2}", "0")
    command = f"pipe:sleep 8; cat '{shard}'"
    with_options(args, train_data=command, train_num_samples=10, workers=workers, data_timeout=4.0)
    stream = open_stream(args)

    def read():
        sys.exit(len(numbers(read_from(stream))))

    reader = multiprocessing.get_context("fork").Process(target=read)
    reader.start()
    time.sleep(1)
    os.kill(reader.pid, signal.SIGSTOP)
    time.sleep(5)
    os.kill(reader.pid, signal.SIGCONT)
    reader.join(60)
    # One whole batch.
    assert reader.exitcode == 6


def test_worker_that_dies_is_named_with_what_it_was_reading(args):
    def transform(image):
        if transform.num_done == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        transform.num_done += 1
        return AUGMENT(image)

    transform.num_done = 0
    stream = open_stream(with_options(args, workers=1), transform=transform)
    with pytest.raises(StalledDataError, match=r"a data worker died: worker 0 .* is at .*: sample"):
        read_from(stream)


def test_a_worker_that_dies_breaks_off_no_computation_but_the_next_read(args):
    stream = open_stream(with_options(args, workers=1))
    stream.start_at(0, 0)
    batches = iter(stream)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    until = time.monotonic() + 1
    while time.monotonic() < until:
        # The handler of the signal runs between two steps of this process.
        sum(range(1000))
    with pytest.raises(StalledDataError, match="a data worker died"):
        list(batches)


@pytest.mark.parametrize("error", [ConnectionResetError, EOFError])
def test_worker_that_dies_while_its_batch_is_fetched_is_told(args, error):
    def fetch():
        yield from ()
        raise error

    stream = open_stream(args)
    stream._loader = fetch()
    with pytest.raises(StalledDataError, match="a data worker died"):
        read_from(stream)


def test_worker_that_dies_between_samples_is_told_without_one(args):
    stream = open_stream(args)
    assert str(stream._stalled("a data worker died")) == (
        "a data worker died while no worker was at a sample"
    )


def test_no_limit_is_set_by_a_timeout_of_0(args):
    stream = open_stream(with_options(args, data_timeout=0.0))
    assert len(numbers(read_from(stream))) == 30


def test_time_spent_outside_the_stream_does_not_count(args):
    batches = iter(open_stream(with_options(args, data_timeout=0.3)))
    first = next(batches)
    # Longer than the limit, and no wait for data.
    signal.sigtimedwait([signal.SIGUSR2], 0.5)
    assert len(numbers([first, *batches])) == 30


def spoil(make_tar, make_image, folder, *, num_bad, size=100):
    members = []
    for number in range(size):
        image = make_image(number) if number >= num_bad else b"?"
        members += [(f"{number:04d}.jpg", image), (f"{number:04d}.txt", str(number).encode())]
    make_tar(folder / "0.tar", members)
    return f"{folder}/0.tar"


@pytest.mark.parametrize("workers", [0, 2])
def test_share_above_the_limit_stops_the_run_in_one_sentence(
    args, make_tar, make_image, tmp_path, workers
):
    path = spoil(make_tar, make_image, tmp_path, num_bad=21)
    with_options(args, train_data=path, max_bad_share=0.2, batch_size=10, workers=workers)
    with pytest.raises(UnusableDataError) as error:
        read_from(open_stream(args))
    assert re.match(
        r"21 of \d+ samples are bad, more than --max-bad-share 0.2 allows: "
        r"21 skipped \(unreadable image: 21\); the first is ",
        str(error.value),
    )
    assert "\n" not in str(error.value)


def test_a_run_ends_as_soon_as_an_epoch_is_certain_to_have_too_many_bad_samples(
    args, make_tar, make_image, tmp_path
):
    path = spoil(make_tar, make_image, tmp_path, num_bad=80)
    with_options(args, train_data=path, max_bad_share=0.5, batch_size=10)
    with pytest.raises(UnusableDataError) as error:
        read_from(open_stream(args))
    found = re.match(r"(\d+) of (\d+) samples are bad", str(error.value))
    num_bad, num_tried = int(found[1]), int(found[2])
    # By the sample after half of the epoch, though not by a share of fewer.
    assert 50 < num_bad <= 60
    assert num_bad <= num_tried < 90


def test_share_at_the_limit_goes_on(args, make_tar, make_image, tmp_path):
    path = spoil(make_tar, make_image, tmp_path, num_bad=20)
    stream = open_stream(with_options(args, train_data=path, max_bad_share=0.2, batch_size=10))
    for epoch in range(3):
        assert len(numbers(read_from(stream, epoch))) == 100


def test_a_burst_in_a_long_epoch_is_judged_with_the_thousand_samples_around_it():
    burst = [Skip("0.tar", f"{number}", "no caption") for number in range(100)]
    account = SkipAccount(max_bad_share=0.1, epoch_size=2400)
    account.add(burst, num_tried=100)
    account.add([], num_tried=899)
    with pytest.raises(UnusableDataError, match="101 of 1000 samples are bad"):
        account.add(burst[:1], num_tried=1)
    account = SkipAccount(max_bad_share=0.1, epoch_size=2400)
    with pytest.raises(UnusableDataError, match="101 of 101 samples are bad"):
        account.add([*burst, *burst[:1]], num_tried=101)


def test_without_a_limit_anything_but_nothing_goes(args, make_tar, make_image, tmp_path):
    path = spoil(make_tar, make_image, tmp_path, num_bad=99)
    with_options(args, train_data=path, batch_size=10)
    assert set(numbers(read_from(open_stream(args)))) == {99}
    spoil(make_tar, make_image, tmp_path, num_bad=100)
    with pytest.raises(UnusableDataError):
        read_from(open_stream(args))


def test_a_worker_that_hangs_leaves_for_its_parent_and_for_nobody_else():
    begun = multiprocessing.Event()

    def hang():
        hear_parent_alone(0)
        begun.set()
        time.sleep(60)

    worker = multiprocessing.get_context("fork").Process(target=hang)
    worker.start()
    assert begun.wait(10)
    subprocess.run(["bash", "-c", f"kill -TERM {worker.pid}"], check=True)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def test_a_worker_whose_parent_breaks_off_what_it_reads_of_it_prints_nothing(capfd):
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def serve():
        hear_parent_alone(0)
        there.send(resource_sharer.DupFd(0)._id[0])
        there.recv()

    worker = context.Process(target=serve)
    worker.start()
    address = here.recv()
    key = multiprocessing.current_process().authkey
    connection.Client(address, authkey=key).close()
    # Served after the one that was broken off.
    with connection.Client(address, authkey=key) as client:
        client.send(None)
        with pytest.raises(EOFError):
            client.recv()
    here.send(None)
    worker.join(10)
    assert capfd.readouterr().err == ""
