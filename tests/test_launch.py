"""Exit codes and signals of a launch, with a stub for torchrun; the real one: test_launchers.py."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios

import pytest

from clip_pgs.launch import Processes, _Launch

LEAVE = """
import os, signal, sys, time
def leave(code, reason):
    path = os.path.join(os.environ["CLIP_PGS_LAUNCH_DIR"], "exit.0000")
    open(path, "w").write(f"{code}\\n{reason}\\n")
    sys.exit(1)
"""


class Stub(Processes):
    """Machine 1 of 2, which leaves the check to machine 0; a script stands for torchrun."""

    script = ""

    def torchrun(self, module, arguments):
        return [
            sys.executable,
            "-c",
            f"import os, signal, sys, time\n{LEAVE}\n{self.script}",
            *arguments,
        ]


@pytest.fixture
def launch():
    """Run a script as torchrun would be, and give the signals back afterwards."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    # A background shell has Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def run(script, *arguments, command="train"):
        processes = Stub(2, 2, 1, "host:1")
        object.__setattr__(processes, "script", script)
        return getattr(_Launch(), command)(arguments, processes)

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_runs_own_exit_code_and_reason_are_told(launch, capfd):
    assert launch("leave(85, 'stopped at step 7')") == 85
    assert capfd.readouterr().err == "stopped at step 7\n"


@pytest.mark.parametrize(("script", "code"), [("", 0), ("sys.exit(1)", 1), ("os.kill(0, 9)", 137)])
def test_what_ends_without_a_reason_keeps_torchruns_code(launch, script, code):
    script = script.replace("os.kill(0", "os.kill(os.getpid()")
    assert launch(script) == code


# Notes the signals that it gets, and waits a little for one more.
PART = """
import signal, sys, time
def note(number, frame):
    print(signal.Signals(number).name, flush=True)
    noted.append(number)
noted = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, note)
print("ready", flush=True)
for _ in range(1000):
    time.sleep(0.02)
    if noted:
        break
time.sleep(0.3)
sys.exit(1)
"""
LAUNCHER = """
import sys
from clip_pgs.launch import Processes, _Launch
class Stub(Processes):
    def torchrun(self, module, arguments):
        return [sys.executable, "-c", *arguments]
sys.exit(_Launch().train(sys.argv[1:], Stub(2, 2, 1, "host:1")))
"""


@pytest.mark.parametrize(
    ("source", "heard", "code"),
    [
        ([signal.SIGTERM, signal.SIGTERM], "SIGTERM", 85),
        ([signal.SIGINT, signal.SIGTERM], "SIGINT", 130),
        ("terminal", "SIGINT", 130),
        ([signal.SIGKILL], "SIGTERM", -9),
    ],
)
def test_processes_hear_of_one_signal_wherever_it_comes_from(source, heard, code):
    terminal, end = pty.openpty()

    def take_terminal():
        # Ctrl-C comes as in a terminal, also where whoever runs the tests has it ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        fcntl.ioctl(end, termios.TIOCSCTTY, 0)

    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, PART],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    with launcher:
        assert launcher.stdout.readline() == "ready\n"
        if source == "terminal":
            os.write(terminal, b"\x03")
        else:
            for number in source:
                launcher.send_signal(number)
        # To its end: that of the process that the launcher started.
        assert launcher.stdout.read() == f"{heard}\n"
    assert launcher.returncode == code
    os.close(terminal)
    os.close(end)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 85), (signal.SIGINT, 130)])
def test_a_signal_before_there_is_anything_to_save_has_its_own_code(launch, number, code):
    script = f"os.kill(os.getppid(), {int(number)}); signal.pause() if {int(number)} == 15 else 0"
    assert launch(f"{script}\nsys.exit(1)") == code


def test_an_evaluation_ends_with_the_code_in_its_file(launch):
    assert launch("open(sys.argv[-1], 'w').write('1\\n')", "run", command="evaluate") == 1
    assert launch("sys.exit(3)", "run", command="evaluate") == 3


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Processes(3)),
        ({"MAX_RESTARTS": "2"}, Processes(3, max_restarts=2)),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "7"},
            Processes(3, 2, 1, "h:7"),
        ),
    ],
)
def test_processes_are_read_from_the_environment(monkeypatch, variables, expected):
    for name in ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MAX_RESTARTS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Processes.of_environment("3") == expected


@pytest.mark.parametrize("nproc", ["0", "-1", "two", "", "1.5"])
def test_a_wrong_number_of_processes_is_named(nproc):
    with pytest.raises(ValueError, match=r"--nproc must be a whole number in \[1, "):
        Processes.of_environment(nproc)
