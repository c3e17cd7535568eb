"""Runs that are stopped at a step and go on, compared with one that nothing stopped."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from clip_pgs.training.stop import StoppedError
from clip_pgs.training.trainer import Trainer
from support.runs import run

_save_if_due = Trainer.save_if_due


def last_checkpoint(folder: Path):
    """Return the content of the checkpoint that a run's `latest` names."""
    path = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
    return torch.load(path, weights_only=True)


def differences(first, second):
    """Return the names of what differs between two checkpoints that should be bit-equal."""
    names = []
    for part in ("state_dict", "optimizer", "masking_state", "epoch", "step", "position"):
        names += _differences(first.get(part), second.get(part), part)
    return names


def _differences(first, second, name):
    if isinstance(first, torch.Tensor):
        return [] if torch.equal(first, second) else [name]
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return [name]
        return [d for key in first for d in _differences(first[key], second[key], f"{name}/{key}")]
    if isinstance(first, (list, tuple)):
        pairs = zip(first, second, strict=True)
        return [d for i, (a, b) in enumerate(pairs) for d in _differences(a, b, f"{name}/{i}")]
    return [] if first == second else [name]


class KilledError(Exception):
    """Ends a run in a way that it does not expect."""


def run_with_stops(folder, steps, *, by="signal", **options):
    """Train to the end through stops, each followed by a launch with `--resume latest`.

    Args:
        folder: As for `run`.
        steps: The run's optimiser steps after which it is stopped.
        by: "signal" for SIGUSR1, which saves, or "death", after which the last save counts.
        **options: As for `run`.

    Returns:
        The run's folder.
    """
    waiting = list(steps)

    def save_if_due(self, trainer):
        _save_if_due(self, trainer)
        if waiting and self.step == waiting[0]:
            waiting.pop(0)
            if by == "death":
                raise KilledError
            os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "save_if_due", save_if_due)
        for _ in steps:
            with pytest.raises((StoppedError, KilledError)):
                run(folder, resume="latest", **options)
        return run(folder, resume="latest", **options)


def curves(folder):
    """Return what a run measured, line by line, but for its time and for FLOPs, as counted.

    A launch counts operations on its first batch, of which an adaptive mask keeps its own share.
    """
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    measured = re.compile(r"seconds|.*time|.*per_second.*|.*share|flops")
    return [
        {name: value for name, value in json.loads(line).items() if not measured.fullmatch(name)}
        for line in lines
    ]
