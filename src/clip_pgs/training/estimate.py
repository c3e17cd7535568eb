"""What a run will cost, said before it starts: `--check-only`, and with `--trial` by ten steps."""

from __future__ import annotations

import dataclasses
import resource
import sys
from collections.abc import Iterable, Sequence
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from open_clip import get_input_dtype
from open_clip_train.distributed import world_info_from_env
from torch import Tensor, nn

from clip_pgs.common import one_sentence
from clip_pgs.integrations.apply import masking_or_none
from clip_pgs.integrations.open_clip import (
    allow_short_text,
    last_selection,
    num_patches,
    set_mask_ratio,
)
from clip_pgs.integrations.open_clip.flops import count_flops
from clip_pgs.tables import Table, counted, duration, scaled
from clip_pgs.training.build import (
    build_model,
    context_length,
    create_scaler,
    input_size,
    supported_precision,
)
from clip_pgs.training.data_checks import (
    has_training_data,
    num_training_samples,
    samples_per_step,
)
from clip_pgs.training.masks import mask_levels
from clip_pgs.training.options import TrainOptions
from clip_pgs.training.phases import (
    patch_dropouts,
    phase_options,
    plan_phases,
    total_epochs,
    unmask,
)
from clip_pgs.training.run_folder import keeps_logs
from clip_pgs.training.step import Batch
from clip_pgs.training.trainer import PhaseTrainer

TRIAL_STEPS = 10
# Of a schedule, mask ratios whose operations are counted; they are quadratic in the patches, so
# that a line between two of these is at or above what lies between.
_MAX_COUNTED = 5
_ADAM_MOMENTS = 2


def estimate(options: TrainOptions, model: nn.Module) -> Table:
    """Say what can be known of a run without computing anything of it.

    Tokens and operations are left out where something computes with values, which there are none.

    Args:
        options: Checked.
        model: As `check_options` returns it.

    Returns:
        Parameters; tokens kept and operations, each at most: per sample at the first and the last
        mask ratio and in the unmasked phase, and in all; disk for checkpoints; memory for weights,
        gradients and the two moments of AdamW. Of a run that only evaluates, parameters and memory.
    """
    weights = _num_bytes(model.state_dict().values())
    if not has_training_data(options):
        rows = [
            ("parameters", scaled(sum(p.numel() for p in model.parameters()))),
            ("memory", f"{scaled(weights, 'B')}, and what a batch takes"),
        ]
        return Table.of(("this evaluation", "will take"), rows)
    rows = [("parameters", _parameters(model))]
    trained = _num_bytes(p for p in model.parameters() if p.requires_grad)
    state = weights + _ADAM_MOMENTS * trained
    notes = ["Operations and tokens are upper bounds. --trial measures time and memory."]
    if all(parameter.is_meta for parameter in model.parameters()):
        try:
            rows += _tokens_and_operations(options, model)
        # Code of one's own and of libraries may need values, or a device that autocast knows.
        except Exception as error:
            said = f"{type(error).__name__}: {one_sentence(error)}"
            rows.append(("operations", f"not counted, as without data there is {said}"))
    rows += [
        ("checkpoints", _disk(options, state)),
        ("memory", f"{scaled(state + trained, 'B')} per device, and what a batch takes"),
    ]
    return Table.of(("this run", "will take"), rows, notes=notes)


def trial(options: TrainOptions) -> Table:
    """Take a few steps of each phase on the run's device, and say what the run will take by them.

    Where a schedule changes the mask ratio, they are taken at the first and at the last one: one of
    these takes the most memory. Nothing is written. Of several processes it is the first, which
    waits for no other.

    Args:
        options: Checked; they are not changed.

    Raises:
        ValueError: If the data does not fill one step, or there is none to train on.
        UnusableDataError, StalledDataError: If it cannot be read.
    """
    if not has_training_data(options):
        raise ValueError("--trial takes steps of training, and there is no --train-data")
    options = dataclasses.replace(options)
    name = options.device if torch.cuda.is_available() or "device" in options.given else "cpu"
    device = torch.device(name)
    options.precision = supported_precision(options.precision, device)
    parts = build_model(options, device)
    scaler = create_scaler(options.precision, device)
    rows: list[tuple[str, str]] = [("parameters", _parameters(parts.model))]
    total, seconds_left, state, has_untried = 0.0, 0.0, 0, False
    _, _, world_size = world_info_from_env()
    for planned in plan_phases(dataclasses.replace(options, world_size=world_size), parts):
        alone = dataclasses.replace(planned.options, world_size=1)
        phase = dataclasses.replace(planned, options=alone)
        trainer = PhaseTrainer(phase, parts, device, scaler=scaler, checkpoint=None)
        levels = mask_levels(phase.options, num_steps=phase.num_steps)
        flops: list[float] = []
        tried: list[_Tried] = []
        step = 0
        counted_levels = _spread(len(levels))
        for number, (_, num_steps) in enumerate(levels):
            if number in (0, len(levels) - 1):
                trainer.start_epoch(phase.first_epoch)
                trainer.go_to(step)
                tried.append(_try_level(trainer, device, num_steps=num_steps))
            if number in counted_levels:
                trainer.go_to(step)
                trainer.follow_schedule()
                flops.append(trainer.count_flops(*tried[-1].batch).total)
            step += num_steps
        flops = _between(levels, counted_levels, flops)
        # Sorted, since a mask ratio may rise.
        few, many = sorted([(flops[0], tried[0].seconds), (flops[-1], tried[-1].seconds)])
        each = np.interp(flops, [few[0], many[0]], [few[1], many[1]])
        for (_, num_steps), operations, step_seconds in zip(levels, flops, each, strict=True):
            total += num_steps * planned.samples_per_step * operations
            seconds_left += num_steps * float(step_seconds)
        has_untried = has_untried or len(levels) > 2
        moments = (v for s in trainer.optimizer.state.values() for v in s.values())
        weights = _num_bytes(parts.model.state_dict().values())
        state = max(state, weights + _num_bytes(v for v in moments if isinstance(v, Tensor)))
        if trainer.masks is not None:
            means = _span([f"{end.tokens_kept:.1f}" for end in tried])
            rows.append(("tokens kept", f"{means} of {trainer.masks.num_patches} patches"))
        times = _span([f"{end.seconds:.3g} s" for end in tried])
        rows.append((f"{phase.name} steps", f"{phase.num_steps}, {times} each"))
        phase.stream.close()
    rows += [
        ("operations", f"{scaled(total, 'FLOP')} in all"),
        ("checkpoints", _disk(options, state)),
        ("memory", f"{scaled(_peak(device), 'B')} on {device.type} at the peak of these steps"),
        ("time", f"{duration(seconds_left)}, without validation and saving"),
    ]
    notes = [
        "Steps were taken at the first and the last mask ratio. The time at those between follows "
        "from their operations."
    ]
    return Table.of(("this run", "will take"), rows, notes=notes if has_untried else [])


class _Tried(NamedTuple):
    """What a few steps at one mask ratio took: each of them, and the patches kept of an image."""

    seconds: float
    tokens_kept: float
    batch: Batch


def _try_level(trainer: PhaseTrainer, device: torch.device, *, num_steps: int) -> _Tried:
    seconds: list[float] = []
    kept: list[Tensor] = []
    trainer.follow_schedule()
    for _ in range(min(TRIAL_STEPS, trainer.steps_left, num_steps)):
        started = perf_counter()
        batches, _ = trainer.next_batches()
        kept += trainer.train_step(batches).kept_counts
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(perf_counter() - started)
    mean = torch.cat(kept).float().mean().item() if kept else 0.0
    # The first steps compile, and fill the loader.
    return _Tried(median(seconds[len(seconds) // 2 :]), mean, batches[0])


def _tokens_and_operations(options: TrainOptions, model: nn.Module) -> list[tuple[str, str]]:
    """Return the rows of both, counted on the meta device; unmasked epochs unmask the model."""
    num_samples = num_training_samples(options) if has_training_data(options) else None
    total = 0.0
    tokens = [f"{1 - dropout.prob:.2g} of all patches" for dropout in patch_dropouts(model)[:1]]
    operations: list[str] = []
    for phase in phase_options(options):
        when = "" if phase is options else " when unmasked"
        if when:
            is_masked = masking_or_none(model) is not None
            unmask(model)
            if tokens:
                count = f" {num_patches(model)}" if is_masked else ""
                tokens.append(f"all{count}{when}")
        num_steps = (num_samples or 0) // samples_per_step(phase) * phase.epochs
        flops: list[float] = []
        kept: list[str] = []
        at_most = ""
        levels = mask_levels(phase, num_steps=num_steps or phase.mask_schedule_steps)
        counted_levels = _spread(len(levels))
        for ratio in [levels[number][0] for number in counted_levels]:
            if ratio is not None:
                set_mask_ratio(model, ratio)
            flops.append(_meta_flops(phase, model))
            if masking_or_none(model) is not None:
                selection = last_selection(model)
                assert selection is not None
                # Before others are merged.
                kept.append(str(selection.index.shape[1]))
                at_most = at_most if selection.valid is None else "at most "
        each_level = _between(levels, counted_levels, flops)
        for (_, steps), operations_each in zip(levels, each_level, strict=True):
            total += steps * samples_per_step(phase) * operations_each
        if kept:
            tokens.append(f"{at_most}{_span(kept)} of {num_patches(model)} patches")
        each = f"{_span([scaled(value, 'FLOP') for value in flops])} per sample"
        if each not in operations:
            operations.append(f"{each}{when}")
    if num_samples is not None:
        operations.append(f"{scaled(total, 'FLOP')} in {counted(total_epochs(options), 'epoch')}")
    tokens = tokens or ["all patches"]
    return [("tokens kept", ", ".join(tokens)), ("operations", ", ".join(operations))]


def _spread(num_levels: int) -> list[int]:
    """Return the numbers of the levels of a schedule that are counted, the first and last too."""
    return np.unique(np.linspace(0, num_levels - 1, _MAX_COUNTED).round().astype(int)).tolist()


def _between(
    levels: Sequence[tuple[float | None, int]], numbers: Sequence[int], values: Sequence[float]
) -> list[float]:
    """Return a value for each level, by its mask ratio on lines between those of some levels."""
    ratios = [ratio or 0.0 for ratio, _ in levels]
    known = sorted((ratios[number], value) for number, value in zip(numbers, values, strict=True))
    places, heights = zip(*known, strict=True)
    return np.interp(ratios, places, heights).tolist()


def _meta_flops(options: TrainOptions, model: nn.Module) -> float:
    """Return the operations of one sample, its caption and count of patches as long as can be."""
    dtype = get_input_dtype(options.precision)
    images = torch.empty((2, 3, *input_size(options)), device="meta", dtype=dtype)
    length = options.text_tokens or context_length(options)
    texts = torch.zeros((2, length), dtype=torch.int64, device="meta")
    masking = masking_or_none(model)
    if masking is not None:
        # Which patches they are is of no account, and no data says how many can be packed.
        masking.pack_tokens = False
    model = model if options.mae is not None else allow_short_text(model)
    return count_flops(model, images, texts, extra_forward=options.accum_freq > 1)


def _span(figures: Sequence[str]) -> str:
    """Return the first and the last of them, or one where they are alike."""
    first, last = figures[0], figures[-1]
    return first if first == last else f"{first} to {last}"


def _parameters(model: nn.Module) -> str:
    every = [*model.parameters()]
    trained = sum(p.numel() for p in every if p.requires_grad)
    return f"{scaled(sum(p.numel() for p in every))}, {scaled(trained)} of them trained"


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
