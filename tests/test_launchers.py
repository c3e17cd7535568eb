"""clip-train.sh, as a process."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.chaos import descendants
from support.runs import write_model
from support.scripts import ENVIRONMENT, ROOT, run


def tiny_run(folder, *, name):
    """Return flags of a run of two steps on images made up on the spot."""
    flags = f"--dataset-type synthetic --train-num-samples 16 --batch-size 4 --name {name}"
    flags += " --epochs 1 --warmup 1 --workers 0 --precision fp32 --device cpu --masking pgs"
    return ["--model-config", write_model(folder), "--logs", "my logs", *flags.split()]


def test_help_is_short_and_names_the_full_one(tmp_path):
    done = run(ROOT / "clip-train.sh", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "clip-pgs train --help-all" in done.stdout
    assert len(done.stdout.splitlines()) < 27


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_machine(command, folder, *, rank, port):
    """Start one of two machines, which are one here."""
    machines = {"NNODES": "2", "NODE_RANK": str(rank), "NPROC_PER_NODE": "1"}
    machines |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env={**ENVIRONMENT, **machines}, **pipes)


def wait_until_idle(folder, *, num_processes):
    """Wait until the processes that train there are all there and take no processor time."""
    spent, since = None, time.monotonic()
    while time.monotonic() - since < 3:
        now = {}
        for place in Path("/proc").glob("[0-9]*"):
            # It may have ended meanwhile.
            with contextlib.suppress(OSError):
                words = (place / "cmdline").read_bytes().decode(errors="replace").split("\0")
                is_there = any(folder in word for word in words)
                if is_there and words[1:4:2] == ["-u", "clip_pgs.training"]:
                    stat = (place / "stat").read_text().rpartition(")")[2].split()
                    now[place.name] = sum(map(int, stat[11:13])) // 10
        if now != spent or len(now) != num_processes:
            spent, since = now, time.monotonic()
        time.sleep(0.3)


@pytest.mark.slow
def test_two_machines_train_one_model_with_logs_in_a_folder_of_ones_own(tmp_path):
    flags, port = [str(flag) for flag in tiny_run(tmp_path, name="nodes")], free_port()
    command = ["bash", str(ROOT / "clip-train.sh"), *flags]
    machines = [start_machine(command, tmp_path, rank=rank, port=port) for rank in range(2)]
    outputs = [machine.communicate(timeout=400)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(outputs)
    assert "frame #" not in "".join(outputs)
    log = (tmp_path / "my logs" / "nodes" / "out.log").read_text()
    assert "Process 0 of 2" in log
    assert "Training: 1 epoch of 2 steps" in log
    assert (tmp_path / "my logs/nodes/export/open_clip_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("odd", "change", "sentence"),
    [
        # What a run would take in silence, and what one machine refuses.
        (1, ["--lr", "0.5", "--resume", "latest"], "was started otherwise than process 0: lr "),
        # Which of its processes torch calls the first is chance, and so is who finds it.
        (0, ["--resume", "gone.pt"], "gone.pt'"),
    ],
)
def test_machines_of_different_commands_end_together_in_a_sentence(tmp_path, odd, change, sentence):
    flags, port = [str(flag) for flag in tiny_run(tmp_path, name="nodes")], free_port()
    command = [sys.executable, "-m", "clip_pgs.cli", "train", *flags]
    machines = [
        start_machine([*command, *(change if rank == odd else [])], tmp_path, rank=rank, port=port)
        for rank in range(2)
    ]
    outputs = [machine.communicate(timeout=100)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [2, 2], "\n".join(outputs)
    for output in outputs:
        *early, said = output.splitlines()
        assert sentence in said
        assert all(line.endswith("waiting for the other machines, to tell them") for line in early)
    assert not (tmp_path / "my logs").exists()


@pytest.mark.slow
def test_a_machine_that_nobody_joins_ends_in_a_sentence():
    command = [sys.executable, "-m", "clip_pgs.launch", "--nnodes", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", f"localhost:{free_port()}"]
    # Where minutes are torchrun's default.
    command += ["--rdzv-conf", "is_host=1,join_timeout=2", "-m", "clip_pgs.training"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: the other machines did not come")
    assert ended.stderr.count("\n") == 1


def rank_process(machine):
    """Return the process id of the one rank of a machine."""
    for child in descendants(machine.pid):
        with contextlib.suppress(OSError):
            if b"\0-u\0-m\0clip_pgs.training\0" in Path(f"/proc/{child}/cmdline").read_bytes():
                return child
    raise AssertionError("the machine has no rank")


@contextlib.contextmanager
def ended(machines):
    """End all processes of machines that still run at the end of the block."""
    try:
        yield machines
    finally:
        for machine in machines:
            for process in [machine.pid, *descendants(machine.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            machine.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("is_all_killed", [True, False])
def test_a_machine_that_loses_another_says_so_once(tmp_path, is_all_killed):
    flags, port = [str(flag) for flag in tiny_run(tmp_path, name="nodes")], free_port()
    command = [sys.executable, "-m", "clip_pgs.cli", "train", *flags, "--epochs", "9999"]
    log, end = tmp_path / "my logs/nodes/out.log", time.monotonic() + 100
    machines = [start_machine(command, tmp_path, rank=rank, port=port) for rank in range(2)]
    with ended(machines):
        while not (log.is_file() and "Epoch 2 of" in log.read_text()):
            assert time.monotonic() < end
            time.sleep(0.2)
        killed = [rank_process(machines[0])]
        if is_all_killed:
            killed = [machines[0].pid, *descendants(machines[0].pid)]
        for process in killed:
            os.kill(process, signal.SIGKILL)
        outputs = [machine.communicate(timeout=100)[0] for machine in machines]
    assert machines[1].returncode == 1
    (said,) = [line for line in outputs[1].splitlines() if "INFO" not in line]
    assert re.match(r"error: rank [01]: another process of the run is gone: ", said)
    if not is_all_killed:
        assert machines[0].returncode == 1
        (said,) = [line for line in outputs[0].splitlines() if "INFO" not in line]
        assert re.match(r"error: process [01] was ended by SIGKILL$", said)


@pytest.mark.slow
def test_a_run_of_two_machines_restarts_on_both_and_tells_the_end_of_its_last_attempt(tmp_path):
    flags, port = [str(flag) for flag in tiny_run(tmp_path, name="nodes")], free_port()
    command = ["env", "MAX_RESTARTS=2", sys.executable, "-m", "clip_pgs.cli", "train", *flags]
    command += ["--epochs", "9999"]
    log, end = tmp_path / "my logs/nodes/out.log", time.monotonic() + 150

    def wait_for(is_there):
        while not (log.is_file() and is_there(log.read_text())):
            assert time.monotonic() < end
            time.sleep(0.2)

    machines = [start_machine(command, tmp_path, rank=rank, port=port) for rank in range(2)]
    with ended(machines):
        wait_for(lambda text: "Saved epoch_1.pt" in text)
        os.kill(rank_process(machines[1]), signal.SIGKILL)
        wait_for(lambda text: "Resuming" in text)
        num_epochs = log.read_text().count("Epoch ")
        wait_for(lambda text: text.count("Epoch ") >= num_epochs + 2)
        for machine in machines:
            machine.terminate()
        outputs = [machine.communicate(timeout=100)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [85, 85], "\n".join(outputs)
    for output in outputs:
        assert output.splitlines()[-1].startswith("stopped by SIGTERM at sample ")


@pytest.mark.slow
def test_a_machine_that_waits_for_another_leaves_at_a_signal(tmp_path):
    # It meets a machine that goes no further: its process would wait for half an hour.
    flags, port = [str(flag) for flag in tiny_run(tmp_path, name="nodes")], free_port()
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, time\n"
        "if sys.orig_argv[1:4:2] == ['-u', 'clip_pgs.training']:\n"
        "    print('goes no further', flush=True)\n"
        "    time.sleep(200)\n"
    )
    command = [sys.executable, "-m", "clip_pgs.cli", "train", *flags]
    waiting = start_machine(command, tmp_path, rank=0, port=port)
    path = f"{tmp_path}:{ENVIRONMENT.get('PYTHONPATH', '')}"
    stuck = ["env", f"PYTHONPATH={path}", *command]
    other = start_machine(stuck, tmp_path, rank=1, port=port)
    try:
        assert any("goes no further" in line for line in iter(other.stdout.readline, ""))
        wait_until_idle(str(tmp_path), num_processes=2)
        started = time.monotonic()
        waiting.terminate()
        output = waiting.communicate(timeout=60)[0]
        assert time.monotonic() - started < 10
        assert waiting.returncode == 85
        assert output == "stopped by SIGTERM\n"
    finally:
        for machine in (waiting, other):
            machine.terminate()
            machine.communicate(timeout=60)


@pytest.mark.slow
def test_a_signal_ends_two_processes_with_one_sentence_and_no_traceback(tmp_path):
    flags = [str(flag) for flag in tiny_run(tmp_path, name="left")]
    with subprocess.Popen(
        [sys.executable, "-m", "clip_pgs.cli", "train", *flags, "--nproc", "2", "--epochs", "9999"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as launch:
        lines = iter(launch.stdout.readline, "")
        assert any("Epoch 2 of" in line for line in lines)
        launch.terminate()
        rest = [*lines]
        assert launch.wait(timeout=300) == 85
    assert [line for line in rest if "INFO" not in line] == [rest[-1]]
    assert rest[-1].startswith("stopped by SIGTERM at sample ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "arguments", "sentence"),
    [
        ("1", ["gone.yaml"], "error: "),
        ("2", ["--model", "ViT-B-32", "--maskin", "pgs"], "error: unknown option --maskin "),
    ],
)
def test_bad_input_ends_with_code_2_one_sentence_and_nothing_made(
    tmp_path, processes, arguments, sentence
):
    done = run(ROOT / "clip-train.sh", *arguments, cwd=tmp_path, NPROC_PER_NODE=processes)
    assert done.returncode == 2
    assert done.stderr.startswith(sentence)
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        (
            {"NPROC_PER_NODE": "all"},
            "NPROC_PER_NODE must be a whole number in [1, 1000000], got 'all'",
        ),
        (
            {"NNODES": "0", "NPROC_PER_NODE": "1"},
            "NNODES must be a whole number in [1, 1000000], got '0'",
        ),
        (
            {"NNODES": "2", "NPROC_PER_NODE": "1", "NODE_RANK": "1"},
            "NNODES=2 needs NODE_RANK, a number from 0, and MASTER_ADDR",
        ),
        (
            {"NNODES": "2", "NPROC_PER_NODE": "1", "NODE_RANK": "2", "MASTER_ADDR": "localhost"},
            "NODE_RANK must be a whole number in [0, 1], got '2'",
        ),
        *(
            ({name: "two"}, f"{name} must be a whole number in [0, 1000000], got 'two'")
            for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS")
        ),
        *(
            (
                {
                    "NNODES": "2",
                    "NPROC_PER_NODE": "1",
                    "NODE_RANK": "1",
                    "MASTER_ADDR": "localhost",
                    "MASTER_PORT": port,
                },
                f"MASTER_PORT must be a whole number in [1, 65535], got {port!r}",
            )
            for port in ("abc", "0", "65536", "-1")
        ),
    ],
)
def test_a_wrong_environment_variable_is_named(tmp_path, environment, sentence):
    done = run(ROOT / "clip-train.sh", "--model", "ViT-B-32", cwd=tmp_path, **environment)
    assert (done.returncode, done.stderr) == (2, f"error: {sentence}\n")
