"""Signals that come while a block runs which has some seconds to end by itself."""

import os
import signal
import time

import pytest

from clip_pgs.training.survival import interrupts
from clip_pgs.training.survival.interrupts import AskedToLeave, Interrupts

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


@pytest.fixture
def caught(monkeypatch):
    monkeypatch.setattr(interrupts, "_ECHO_SECONDS", 0.05)
    # Who runs the tests in the background may have Ctrl-C ignored, which would stay so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    found = Interrupts()
    with found.caught():
        yield found
    signal.signal(signal.SIGINT, before)


def send_and_sleep(caught, number):
    with caught.breakable(patience=0.3):
        os.kill(os.getpid(), number)
        time.sleep(20)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_block_is_broken_off_when_its_patience_is_over(caught, number):
    started = time.monotonic()
    with pytest.raises(AskedToLeave):
        send_and_sleep(caught, number)
    assert 0.3 <= time.monotonic() - started < 10


@pytest.mark.parametrize("number", SIGNALS)
def test_nothing_reminds_a_block_that_has_ended(caught, number):
    with caught.breakable(patience=0.3):
        os.kill(os.getpid(), number)
    # Were it reminded, Ctrl-C would break off the save that follows.
    time.sleep(0.6)
    assert caught.name == signal.Signals(number).name


def test_a_second_ctrl_c_ends_the_run_at_once(caught):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
