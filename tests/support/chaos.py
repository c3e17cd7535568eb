"""A run that is killed, told to leave and robbed of checkpoints until it is done all the same."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from clip_pgs.checkpoint_reading import newest_checkpoint
from support.resuming import differences, last_checkpoint

ROOT = Path(__file__).parents[2]
SOFT = (signal.SIGTERM, signal.SIGUSR1)
_LAUNCH_SECONDS = 300
_LAUNCHER = -1


@dataclass
class Tally:
    """What a chaotic run went through.

    Attributes:
        actions: How often each signal was sent, and each fault done to its files.
        codes: How often each exit code came back.
        seconds_to_end: From each signal to the end of all processes.
        unreadable: How often the folder held no checkpoint that loads, after one had been saved.
        bad_samples: Samples that could not be used, as the curves count them at the end.
        lost: Samples that its curves miss or count twice, and bad ones that it does not tell.
        differences: What differs from a run that nothing disturbed.
    """

    actions: Counter[str] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)
    seconds_to_end: list[float] = field(default_factory=list)
    unreadable: int = 0
    bad_samples: int = 0
    lost: int = 0
    differences: list[str] = field(default_factory=list)


class Launch:
    """One launch of a run as a user makes it, in a session of its own.

    Args:
        folder: Where it runs.
        argv: Flags of training.
        num_processes: More than one goes by clip-train.sh.
        **environment: Further variables.
    """

    def __init__(self, folder, argv, *, num_processes=1, **environment):
        self._num_processes = num_processes
        command = [sys.executable, "-m", "clip_pgs.training", *argv]
        if num_processes > 1:
            command = ["bash", str(ROOT / "clip-train.sh"), *argv]
        self.log = (folder / "launch.txt").open("w+")
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env={
                **os.environ,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "NPROC_PER_NODE": str(num_processes),
                **environment,
            },
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self):
        """Return the exit code."""
        try:
            return self.process.wait(timeout=_LAUNCH_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill_everything()
            raise

    def output(self):
        """Return what was printed up to now."""
        self.log.seek(0)
        return self.log.read()

    def wait_until(self, condition):
        """Wait for a condition, or for the end; return whether the launch is still running."""
        end = time.monotonic() + _LAUNCH_SECONDS
        while self.process.poll() is None and not condition():
            assert time.monotonic() < end, self.output()
            time.sleep(0.02)
        return self.process.poll() is None

    def trainers(self):
        """Return the process ids of the ranks, in their order."""
        found = self._find_training()
        return [found[rank] for rank in sorted(found) if rank != _LAUNCHER]

    def launcher(self):
        """Return the process id of torchrun, None where there is none."""
        return self._find_training().get(_LAUNCHER)

    def _find_training(self):
        """Return the process ids of the ranks, and of what launched them, by rank."""
        found = {}
        alone = 0 if self._num_processes == 1 else _LAUNCHER
        for child in [self.process.pid, *descendants(self.process.pid)]:
            try:
                command = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
                entries = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ranks = [int(entry[5:]) for entry in entries if entry.startswith(b"RANK=")]
            if b"clip_pgs.training" in command and b"--check-only" not in command:
                # Workers look like the rank that they load data for, and are younger.
                found.setdefault(ranks[0] if ranks else alone, child)
        return found

    def signal_everything(self, number):
        """Signal all processes of the launch at once; return how many there were."""
        processes = [self.process.pid, *descendants(self.process.pid)]
        for process in processes:
            _kill(process, number)
        return len(processes)

    def kill_everything(self):
        """End all processes of the launch at once, as a machine that loses its power."""
        self.signal_everything(signal.SIGKILL)
        self.process.wait()


def descendants(process):
    """Return the process ids of all that a process has started, the oldest first."""
    try:
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
    except OSError:
        return []
    children = [int(child) for child in text.split()]
    return [*children, *(d for child in children for d in descendants(child))]


def _kill(process, number):
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return


def num_steps(folder):
    """Return how many steps the curves of a run with a line for each show."""
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def run_through_chaos(
    folder, argv, *, name, seed, num_stops, max_steps=12, num_processes=1, report=None
):
    """Train to the end through random stops and faults.

    Args:
        folder: Where the run's flags point from; its logs are in "logs".
        argv: Flags of training, without --name.
        name: The run's name.
        seed: Of what happens.
        num_stops: Launches that are stopped.
        max_steps: Steps that a launch may take at most before it is stopped.
        num_processes: Processes of the run.
        report: Called with a line on each stop.

    Returns:
        The tally, without the comparison.
    """
    rng = random.Random(seed)
    tally = Tally()
    path = folder / "logs" / name
    argv = [*argv, "--name", name, "--resume", "latest"]
    was_saved = False
    for number in range(num_stops):
        launch = Launch(folder, argv, num_processes=num_processes)
        goal = num_steps(path) + rng.randint(1, max_steps)
        if rng.random() < 0.15:
            is_running, kind = True, "early kill"
            time.sleep(rng.uniform(0, 8))
        else:
            is_running = launch.wait_until(lambda goal=goal: num_steps(path) >= goal)
            kinds = ["kill", "kill all", "SIGTERM", "SIGUSR1"]
            kind = rng.choice(kinds if num_processes == 1 else [*kinds, "kill launcher"])
        started = time.monotonic()
        if is_running:
            tally.actions[kind] += 1
            _stop(launch, kind, rng)
        code = launch.wait()
        seconds = time.monotonic() - started
        if not is_running:
            # It got to its end, or failed, which the last launch will show.
            break
        tally.codes[code] += 1
        tally.seconds_to_end.append(seconds)
        checkpoints = path / "checkpoints"
        was_saved = was_saved or (checkpoints / "latest").is_file()
        faults = []
        if was_saved:
            tally.unreadable += newest_checkpoint(checkpoints) is None
            faults = _damage(checkpoints, rng)
            tally.actions.update(faults)
        if report is not None:
            words = [kind, f"at step {num_steps(path)}", f"exit code {code} after {seconds:.1f} s"]
            report(f"stop {number + 1} of {num_stops}: {', '.join([*words, *faults])}")
    launch = Launch(folder, argv, num_processes=num_processes)
    code = launch.wait()
    tally.codes[code] += 1
    assert code == 0, launch.output()
    return tally


def _stop(launch, kind, rng):
    if kind in ("kill all", "early kill"):
        launch.kill_everything()
    elif kind == "kill":
        trainers = launch.trainers()
        if trainers:
            _kill(rng.choice(trainers), signal.SIGKILL)
    elif kind == "kill launcher":
        launcher = launch.launcher()
        if launcher is not None:
            _kill(launcher, signal.SIGKILL)
    else:
        _kill(launch.process.pid, getattr(signal, kind))


def _damage(checkpoints, rng):
    """Spoil the newest checkpoint now and then, where another one is there to fall back on."""
    files = sorted(checkpoints.glob("step_*.pt"), key=lambda path: path.stat().st_mtime)
    if len(files) < 2 or rng.random() > 0.3:
        return []
    kind = rng.choice(["file cut short", "file with a flipped bit", "file half written"])
    newest = files[-1]
    content = bytearray(newest.read_bytes())
    if kind == "file with a flipped bit":
        content[len(content) // 2] ^= 1
    else:
        content = content[: rng.randrange(len(content))]
    place = (
        newest if kind != "file half written" else newest.with_name(f".{newest.name}.unfinished")
    )
    place.write_bytes(content)
    return [kind]


def compare(tally, path, expected, *, num_steps, samples_per_step):
    """Complete a tally by what a finished run lost, against one that nothing disturbed."""
    lines = _json_lines(path / "metrics.jsonl")
    seen = {line["step"]: line["samples"] for line in lines}
    right = {step: (step + 1) * samples_per_step for step in range(num_steps)}
    wrong = sum(seen.get(step) != samples for step, samples in right.items())
    tally.lost = samples_per_step * (wrong + abs(len(lines) - num_steps))
    tally.bad_samples = lines[-1]["skipped_samples"]
    told, expected_told = (_skipped(each) for each in (path, expected))
    tally.lost += (told - expected_told).total() + (expected_told - told).total()
    tally.lost += abs(tally.bad_samples - expected_told.total())
    tally.differences = differences(last_checkpoint(path), last_checkpoint(expected))
    return tally


def _skipped(folder):
    path = folder / "skipped.jsonl"
    return Counter((e["step"], e["rank"], e["shard"], e["key"]) for e in _json_lines(path))


def _json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
