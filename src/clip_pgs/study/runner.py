"""Trains and evaluates what a study lacks, in processes of their own, seed by seed across arms."""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import clip_pgs
from clip_pgs.checkpoint_reading import newest_checkpoint
from clip_pgs.common import one_sentence
from clip_pgs.evaluation.results import DONE, read_results
from clip_pgs.files import (
    CHECKPOINTS_NAME,
    EXIT_NAME,
    own_file,
    read_json_object,
    write_text,
)
from clip_pgs.launch import Processes, share_cores
from clip_pgs.launch import start as start_child
from clip_pgs.registry import OWN_MODULES
from clip_pgs.study.plan import CONFIG_NAME, Study, data_digest, evaluated_sets
from clip_pgs.study.record import (
    Code,
    Evaluated,
    Record,
    differences,
    missing_part,
    option_changes,
    read_code,
    read_record,
    read_spent,
    write_record,
)
from clip_pgs.tables import duration, plain
from clip_pgs.training.build import model_digest
from clip_pgs.training.data_checks import has_training_data, training_files
from clip_pgs.training.options import TrainOptions
from clip_pgs.training.run_folder import holds_run, read_options_file
from clip_pgs.training.stop import StopSignals

OUTPUT_NAME = "study.log"

_POLL_SECONDS = 0.2
# Imports and checks before a run's own clock starts; for the time left alone.
_START_SECONDS = 10.0


@dataclass(frozen=True)
class Pair:
    """One run: an arm and a seed."""

    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}"


def num_processes() -> int:
    """Return the processes of one run: NPROC_PER_NODE, else the GPUs of this machine, else 1."""
    return Processes.of_environment(None, num_nodes="1").per_node


def refuse_other_runs(
    study: Study, options: dict[str, TrainOptions], pairs: Sequence[Pair], code: Code
) -> dict[Pair, list[str]]:
    """Return how runs that are there differ from those that the study means, by run."""
    files = {
        arm: training_files(said) if has_training_data(said) else []
        for arm, said in options.items()
    }
    found = {
        pair: differences(
            replace(options[pair.arm], seed=pair.seed),
            study.run(pair.arm, pair.seed),
            code,
            files=files[pair.arm],
        )
        for pair in pairs
    }
    return {pair: changes for pair, changes in found.items() if changes}


@dataclass(eq=False)
class Runner:
    """Runs what a study lacks.

    Args:
        study: What to run.
        options: The options of each arm's runs, but for the seed.
        pairs: The runs, in order.
        code: The code as it was checked.
        jobs: Runs at the same time.
        changed: How runs that are there differ from what the study means; those are kept.
        accepts_changes: Whether differences, of the code too, are taken note of and no reason to
            stop.
        signals: Signals to this process.
    """

    study: Study
    options: dict[str, TrainOptions]
    pairs: Sequence[Pair]
    code: Code
    jobs: int
    changed: dict[Pair, list[str]]
    accepts_changes: bool
    signals: StopSignals

    def __post_init__(self) -> None:
        # Of a run in several processes, the command shares the cores out itself.
        self._variables = share_cores(self.jobs) if num_processes() == 1 else {}
        maskings = (options.masking for options in self.options.values())
        # An evaluation would take what a run records for that of a stranger.
        modules = {name.partition(":")[0] for name in maskings if ":" in name}
        self._variables[OWN_MODULES] = ",".join(sorted(modules))
        self._sets = {
            (arm, way): evaluated_sets(self.study.evaluate_arguments(arm, way))
            for arm in dict.fromkeys(pair.arm for pair in self.pairs)
            for way in self.study.arms[arm].evaluations
        }
        # What lies there as the study begins; another launch notices what changed meanwhile.
        self._data = {place: data_digest(sets) for place, sets in self._sets.items()}
        self._lock = threading.Lock()
        self._children: set[subprocess.Popen[bytes]] = set()
        self._is_stopping = False
        self._ended: set[Pair] = set()
        self._num_failed = 0
        self._other_code = ""

    def run(self) -> int:
        """Train and evaluate what is missing.

        Returns:
            0 if all of it is there now, 1 if something failed, else the code of the signal that
            ended it.

        Raises:
            KeyboardInterrupt: At a second Ctrl-C; the processes are killed.
        """
        for pair in self.pairs:
            self._note_accepted(pair)
        missing = [pair for pair in self.pairs if not self._is_complete(pair)]
        self._ended = set(self.pairs) - set(missing)
        self._say(f"{len(missing)} of {len(self.pairs)} runs are left{self._time_left()}")
        with ThreadPoolExecutor(self.jobs) as pool:
            ends = [pool.submit(self._complete, pair) for pair in missing]
            try:
                while wait(ends, timeout=_POLL_SECONDS).not_done:
                    if self.signals.code and not self._is_stopping:
                        self._say(f"{self.signals.name}: stopping; the same command goes on")
                        self._stop(signal.SIGTERM)
            except BaseException:
                self._stop(signal.SIGKILL)
                raise
            for end in ends:
                end.result()
        if self.signals.code:
            return self.signals.code
        if self._other_code:
            sys.stderr.write(f"error: {self._other_code}\n")
        return 1 if self._num_failed or self._other_code else 0

    def _stop(self, number: int) -> None:
        self._is_stopping = True
        with self._lock:
            for child in self._children:
                # A launcher passes on what asks it to leave, and what it started ends with it.
                with suppress(ProcessLookupError):
                    if number == signal.SIGKILL:
                        os.killpg(child.pid, number)
                    else:
                        child.send_signal(number)

    def _complete(self, pair: Pair) -> None:
        """Train and evaluate one run, as far as that is not done."""
        if self._is_stopping or not self._is_same_code():
            return
        start = time.monotonic()
        reason = self._train(pair)
        for way in self.study.arms[pair.arm].evaluations:
            if not reason and not self._is_stopping:
                reason = self._evaluate(pair, way)
        if self._is_stopping or (self._other_code and not reason):
            return
        run = self.study.run(pair.arm, pair.seed)
        write_record(replace(read_record(run), failed=reason), run)
        if not reason and not self.study.keep_checkpoints:
            # The export has the weights; only going on from here needs more.
            shutil.rmtree(run / CHECKPOINTS_NAME, ignore_errors=True)
        with self._lock:
            self._ended.add(pair)
            self._num_failed += bool(reason)
        spent = duration(time.monotonic() - start)
        outcome = f"failed: {reason}" if reason else f"done in {spent}"
        count = f"[{len(self._ended)}/{len(self.pairs)}]"
        self._say(f"{count} {pair}: {outcome}{self._time_left()}")

    def _is_complete(self, pair: Pair) -> bool:
        """Return whether a run is trained, and evaluated as its study says by the present code."""
        ways = self.study.arms[pair.arm].evaluations
        run = self.study.run(pair.arm, pair.seed)
        is_ready = not missing_part(run) and not read_record(run).failed
        return is_ready and all(self._is_evaluated(pair, way) for way in ways)

    def _is_evaluated(self, pair: Pair, way: str) -> bool:
        done = read_record(self.study.run(pair.arm, pair.seed)).evaluations.get(way)
        if done is None or done.flags != self.study.evaluate_arguments(pair.arm, way):
            return False
        if done.data and done.data != self._data[pair.arm, way]:
            return False
        if done.code != self.code.evaluation and not self.accepts_changes:
            return False
        results = read_results(self.study.results(pair.arm, pair.seed, way))
        scored = {(r.suite, r.dataset) for r in results if r.status == DONE}
        return scored >= {(each.suite, each.name) for each in self._sets[pair.arm, way]}

    def _is_same_code(self) -> bool:
        """Return whether processes that start now run the code that was checked."""
        with self._lock:
            if self.accepts_changes or self._other_code:
                return not self._other_code
            if read_code() != self.code:
                self._other_code = (
                    "the code changed while the study ran, which began nothing more; run it from "
                    "a checkout that nobody edits, or go on with --accept-changes"
                )
        return not self._other_code

    def _train(self, pair: Pair) -> str:
        """Train a run, or go on with it; return why it failed, "" if it did not."""
        study, run = self.study, self.study.run(pair.arm, pair.seed)
        missing = missing_part(run)
        if not missing:
            return ""
        record = before = read_record(run)
        if record.spent is not None:
            # It was trained, and something is gone.
            newest = newest_checkpoint(run / CHECKPOINTS_NAME)
            if newest is None:
                return (
                    f"{run} lacks {missing}, and a checkpoint to go on from; put one of them "
                    "back, or remove the run to train it anew"
                )
            self._say(f"{pair}: it lacks {missing}, and goes on from {newest}")
        config = run.parent / CONFIG_NAME
        run.mkdir(parents=True, exist_ok=True)
        with self._lock:
            write_text(config, study.config_text(pair.arm, config.parent))
        code = read_code().training if self.accepts_changes else self.code.training
        if not holds_run(run):
            record = Record(clip_pgs.__version__, [], model_digest(self.options[pair.arm]))
        arguments = study.train_arguments(pair.arm, pair.seed, config)
        changes = self.changed.get(pair, [])
        if changes:
            arguments.append("--accept-changes")
        record = replace(
            record,
            code=list(dict.fromkeys([*record.code, code])),
            # Weights that are made anew are evaluated anew.
            evaluations={},
            accepted=[],
            trained_under=list(dict.fromkeys([*record.trained_under, *changes])),
        )
        write_record(record, run)
        ended = read_options_file(run), _read_exit(run)
        exit_code, reason = self._launch("train", arguments, run)
        if exit_code:
            if changes and (read_options_file(run), _read_exit(run)) == ended:
                # It was refused or told to leave first, and nothing was trained under them.
                write_record(before, run)
            return reason
        write_record(replace(record, spent=read_spent(run)), run)
        return ""

    def _evaluate(self, pair: Pair, way: str) -> str:
        """Evaluate a run in one way; return why that failed, "" if it did not."""
        study, run = self.study, self.study.run(pair.arm, pair.seed)
        if self._is_evaluated(pair, way) or not self._is_same_code():
            return ""
        record = read_record(run)
        output = study.results(pair.arm, pair.seed, way)
        calls = study.evaluate_arguments(pair.arm, way)
        record.evaluations.pop(way, None)
        write_record(record, run)
        # What was scored by other code, or through another mask, must not stay beside the new.
        try:
            if output.exists():
                shutil.rmtree(output)
        except OSError as error:
            reason = one_sentence(error)
            return f"evaluation {way}: the old scores in {output} cannot be removed: {reason}"
        code = read_code().evaluation if self.accepts_changes else self.code.evaluation
        start = time.monotonic()
        for flags in calls:
            arguments = [str(run), f"--output={output}", "--no-report", *flags]
            exit_code, reason = self._launch("test", arguments, run)
            if exit_code:
                errors = [r.error for r in read_results(output) if r.status != DONE and r.error]
                return f"evaluation {way}: {plain(errors[0]) if errors else reason}"
        seconds = round(time.monotonic() - start, 1)
        record.evaluations[way] = Evaluated(calls, code, seconds, self._data[pair.arm, way])
        write_record(record, run)
        return ""

    def _launch(self, command: str, arguments: list[str], run: Path) -> tuple[int, str]:
        """Run `clip-pgs train` or `test`; return its exit code, and its last words."""
        ended_before = _read_exit(run)
        with own_file(run / OUTPUT_NAME).open("ab") as output:
            start = output.tell()
            with self._lock:
                if self._is_stopping:
                    return 1, "stopped"
                child = start_child(
                    [sys.executable, "-m", "clip_pgs.cli", command, *arguments],
                    env=os.environ | self._variables,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    # The lock on the folder stays as long as something of the study runs.
                    close_fds=False,
                )
                self._children.add(child)
            code = child.wait()
            with self._lock:
                self._children.discard(child)
        if code < 0:
            return code, f"it was ended by {signal.Signals(-code).name}"
        ended = _read_exit(run)
        return code, _last_words(run, start, ended if ended != ended_before else {})

    def _note_accepted(self, pair: Pair) -> None:
        """Note how a run that is kept differs now, but for options, which its folder has."""
        run = self.study.run(pair.arm, pair.seed)
        accepted = self.changed.get(pair, [])
        if accepted:
            meant = replace(self.options[pair.arm], seed=pair.seed)
            known = option_changes(meant, run, files=None)
            accepted = [change for change in accepted if change not in known]
        if (record := read_record(run)).accepted != accepted:
            write_record(replace(record, accepted=accepted), run)

    def _time_left(self) -> str:
        """Return how long the rest will take, from what the runs that are done took."""
        ended = [pair for pair in self.pairs if pair in self._ended]
        records = [read_record(self.study.run(pair.arm, pair.seed)) for pair in ended]
        seconds = [
            (record.spent.seconds or 0.0)
            + _START_SECONDS
            + sum(done.seconds for done in record.evaluations.values())
            for record in records
            if record.spent is not None and not record.failed
        ]
        left = len(self.pairs) - len(ended)
        if not seconds or not left:
            return ""
        return f"; about {duration(left * statistics.fmean(seconds) / self.jobs)} left"

    def _say(self, sentence: str) -> None:
        sys.stdout.write(f"{sentence}\n")
        sys.stdout.flush()


def _read_exit(run: Path) -> dict[str, Any]:
    """Return what a run wrote of its last end, empty if nothing readable."""
    try:
        return read_json_object(run / EXIT_NAME, what="it")
    except ValueError:
        return {}


def _last_words(run: Path, start: int, ended: dict[str, Any]) -> str:
    """Return why a process failed: its last error in the study's log, from a place on.

    Without one it is the reason that a run left, since one that hangs writes stacks behind it, else
    its last line.
    """
    with (run / OUTPUT_NAME).open("rb") as file:
        file.seek(start)
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    reasons = [str(ended["reason"])] if ended.get("code") and "reason" in ended else []
    return plain((errors or reasons or lines or ["it said nothing"])[-1])
