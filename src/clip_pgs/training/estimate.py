"""What a run will cost, said before it starts: `--check-only`, and with `--trial` by ten steps."""

from __future__ import annotations

import dataclasses
import resource
import sys
from collections.abc import Iterable
from statistics import median
from time import perf_counter
from typing import Any

import torch
from open_clip import get_input_dtype
from open_clip_train.distributed import world_info_from_env
from torch import Tensor, nn

from clip_pgs.integrations.apply import last_selection, masking_or_none
from clip_pgs.integrations.open_clip import allow_short_text
from clip_pgs.integrations.open_clip.flops import count_sample_flops
from clip_pgs.tables import Table, counted, duration, scaled
from clip_pgs.training.build import (
    build_model,
    context_length,
    create_scaler,
    input_size,
    supported_precision,
)
from clip_pgs.training.options import TrainOptions
from clip_pgs.training.phases import phase_options, plan_phases
from clip_pgs.training.run_folder import keeps_logs
from clip_pgs.training.trainer import PhaseTrainer

TRIAL_STEPS = 10
_ADAM_MOMENTS = 2


def estimate(options: TrainOptions, model: nn.Module) -> Table:
    """Say what can be known of a run without computing anything of it.

    Args:
        options: Checked.
        model: As `check_options` returns it.

    Returns:
        Parameters; tokens kept and operations per sample, each at most, in the masked phase;
        disk for checkpoints; memory for weights, gradients and the two moments of AdamW.
    """
    rows = [("parameters", _parameters(model))]
    if all(parameter.is_meta for parameter in model.parameters()):
        dtype = get_input_dtype(options.precision)
        images = torch.empty((2, 3, *input_size(options)), device="meta", dtype=dtype)
        length = options.text_tokens or context_length(options)
        texts = torch.zeros((2, length), dtype=torch.int64, device="meta")
        masking = masking_or_none(model)
        if masking is not None:
            # Which patches they are is of no account, and no data says how many can be packed.
            masking.pack_tokens = False
        flops = count_sample_flops(
            model if options.mae is not None else allow_short_text(model),
            images,
            texts,
            is_masked=masking is not None,
            extra_forward=options.accum_freq > 1,
        )
        operations = f"{scaled(flops.total, 'FLOP')} per sample"
        if options.train_num_samples is not None:
            total = flops.total * options.train_num_samples * options.epochs
            operations += f", {scaled(total, 'FLOP')} in {counted(options.epochs, 'epoch')}"
        rows += [("tokens kept", _tokens(model)), ("operations", operations)]
    weights = _num_bytes(model.state_dict().values())
    trained = _num_bytes(p for p in model.parameters() if p.requires_grad)
    state = weights + _ADAM_MOMENTS * trained
    rows += [
        ("checkpoints", _disk(options, state)),
        ("memory", f"{scaled(state + trained, 'B')} per device, and what a batch takes"),
    ]
    notes = "Operations and tokens are upper bounds. --trial measures time and memory."
    return Table.of(("this run", "will take"), rows, notes=[notes])


def trial(options: TrainOptions) -> Table:
    """Take a few steps of each phase on the run's device, and say what the run will take by them.

    Nothing is written. Of several processes it is the first, which waits for no other.

    Args:
        options: Checked; they are not changed.

    Raises:
        ValueError: If the data does not fill one step.
        UnusableDataError, StalledDataError: If it cannot be read.
    """
    options = dataclasses.replace(options)
    name = options.device if torch.cuda.is_available() or "device" in options.given else "cpu"
    device = torch.device(name)
    options.precision = supported_precision(options.precision, device)
    parts = build_model(options, device)
    scaler = create_scaler(options.precision, device)
    rows: list[tuple[str, str]] = [("parameters", _parameters(parts.model))]
    total, seconds_left, state = 0.0, 0.0, 0
    _, _, world_size = world_info_from_env()
    for planned in plan_phases(dataclasses.replace(options, world_size=world_size), parts):
        alone = dataclasses.replace(planned.options, world_size=1)
        phase = dataclasses.replace(planned, options=alone)
        trainer = PhaseTrainer(phase, parts, device, scaler=scaler, checkpoint=None)
        trainer.start_epoch(phase.first_epoch)
        seconds: list[float] = []
        kept: list[Tensor] = []
        trainer.follow_schedule()
        for _ in range(min(TRIAL_STEPS, trainer.steps_left)):
            started = perf_counter()
            batches, _ = trainer.next_batches()
            kept += trainer.train_step(batches).kept_counts
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(perf_counter() - started)
        flops = trainer.count_flops(*batches[0])
        # The first steps compile, and fill the loader.
        each = median(seconds[len(seconds) // 2 :])
        samples = planned.num_steps * planned.samples_per_step
        total += samples * flops.total
        seconds_left += phase.num_steps * each
        moments = (v for s in trainer.optimizer.state.values() for v in s.values())
        weights = _num_bytes(parts.model.state_dict().values())
        state = max(state, weights + _num_bytes(v for v in moments if isinstance(v, Tensor)))
        if kept and trainer.masks is not None:
            mean = torch.cat(kept).float().mean().item()
            rows.append(("tokens kept", f"{mean:.1f} of {trainer.masks.num_patches} patches"))
        rows.append((f"{phase.name} steps", f"{phase.num_steps}, {each:.3g} s each"))
        phase.stream.close()
    rows += [
        ("operations", f"{scaled(total, 'FLOP')} in all"),
        ("checkpoints", _disk(options, state)),
        ("memory", f"{scaled(_peak(device), 'B')} on {device.type} at most"),
        ("time", f"{duration(seconds_left)}, without validation and saving"),
    ]
    return Table.of(("this run", "will take"), rows)


def _parameters(model: nn.Module) -> str:
    every = [*model.parameters()]
    trained = sum(p.numel() for p in every if p.requires_grad)
    return f"{scaled(sum(p.numel() for p in every))}, {scaled(trained)} of them trained"


def _tokens(model: nn.Module) -> str:
    """Return how many patches the image tower was just given, before others are merged."""
    masking = masking_or_none(model)
    if masking is None:
        return "all patches"
    selection = last_selection(model)
    assert selection is not None
    text = f"{selection.index.shape[1]} of {masking.grid.num_patches} patches"
    return text if selection.valid is None else f"at most {text}"


def _disk(options: TrainOptions, state: int) -> str:
    """Return how much the checkpoints take that the run keeps."""
    if not keeps_logs(options):
        return "none"
    epochs = 0
    for phase in phase_options(options):
        every = options.save_frequency
        epochs += phase.epochs // every if every else 0
        epochs += int(not every or phase.epochs % every > 0)
    if options.delete_previous_checkpoint:
        epochs = 1
    has_steps = options.save_every_steps is not None or options.save_every_minutes is not None
    files = epochs + options.save_most_recent + has_steps * options.keep_checkpoints
    return f"{counted(files, 'file')} of {scaled(state, 'B')}, {scaled(files * state, 'B')} in all"


def _peak(device: torch.device) -> int:
    """Return the most bytes that were taken on a GPU, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo


def _num_bytes(tensors: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
