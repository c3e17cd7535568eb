"""The phases of a run: masked epochs, then, where asked for, unmasked ones.

Unmasked tuning is what GLIP (https://arxiv.org/abs/2403.15837) and CLIPF
(https://arxiv.org/abs/2412.16148) do by starting OpenCLIP's trainer a second time from the weights
alone, for one epoch at a learning rate of 1e-5: the optimizer is a fresh one of the same kind, its
moments start at zero, and the rate falls to 0 as a cosine, whatever schedule came before. The
warm-up over a tenth of an epoch is CLIPF's. FLIP (https://arxiv.org/abs/2212.00794) tunes for 0.32
epochs of its larger data. Captions are seen up to the model's full context length.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from clip_pgs.data.bad_samples import OnSkip
from clip_pgs.data.build import build_train_stream
from clip_pgs.data.loader import SampleStream
from clip_pgs.integrations.apply import masking_or_none, remove_masking
from clip_pgs.training.build import ModelParts
from clip_pgs.training.options import TrainOptions

# What the masked epochs alone are trained by, and a run in its unmasked ones can no longer change.
MASKED_ALONE = ("epochs", "lr", "lr_scheduler", "skip_scheduler", "warmup")
_WARMUP_EPOCHS = 0.1


@dataclass(frozen=True)
class Phase:
    """Epochs that are trained alike.

    Args:
        name: "masked" or "unmasked".
        options: The options as they are in this phase; `epochs` counts its own.
        stream: Its training samples.
        steps_per_epoch: Optimizer steps of an epoch.
        first_epoch: Epochs of the run before it.
        first_step: Optimizer steps of the run before it.
    """

    name: str
    options: TrainOptions
    stream: SampleStream
    steps_per_epoch: int
    first_epoch: int = 0
    first_step: int = 0

    @property
    def end_epoch(self) -> int:
        """Epochs of the run up to its end."""
        return self.first_epoch + self.options.epochs

    @property
    def num_steps(self) -> int:
        """Its optimizer steps."""
        return self.steps_per_epoch * self.options.epochs

    @property
    def samples_per_step(self) -> int:
        """Samples of a step over all ranks and micro-batches."""
        return self.options.batch_size * self.options.accum_freq * self.options.world_size

    def steps_before(self, epoch: int, position: int = 0) -> int:
        """Return the run's optimizer steps before a place in this phase.

        Args:
            epoch: One of its epochs, or its end.
            position: Samples of that epoch, over all ranks.
        """
        whole = (epoch - self.first_epoch) * self.steps_per_epoch
        return self.first_step + whole + position // self.samples_per_step


def steps_after(phases: Sequence[Phase], epoch: int, position: int) -> int:
    """Return the optimizer steps of a run after a place in it.

    Args:
        phases: Of the run, in their order.
        epoch: Completed epochs.
        position: Samples of the next one, over all ranks, that are behind.
    """
    left = 0
    for phase in phases:
        if epoch < phase.end_epoch:
            has_begun = epoch >= phase.first_epoch
            begun = phase.steps_before(epoch, position) - phase.first_step if has_begun else 0
            left += phase.num_steps - begun
    return left


def total_epochs(options: TrainOptions) -> int:
    """Return the epochs of a whole run."""
    return options.epochs + options.unmasked_epochs


def phase_options(options: TrainOptions) -> list[TrainOptions]:
    """Return the options of each phase of a run; the first are the run's own."""
    return [options, unmasked_options(options)] if options.unmasked_epochs > 0 else [options]


def plan_phases(
    options: TrainOptions, parts: ModelParts, *, on_skip: OnSkip | None = None
) -> list[Phase]:
    """Return the phases of a run in their order, with the samples of each.

    Args:
        options: Options, with `rank` and `world_size`.
        parts: The model's transforms and tokenizer.
        on_skip: Is told what of the data cannot be used.

    Raises:
        ValueError: If the data does not fill one step of a phase.
    """
    masked = Phase("masked", options, *_samples(options, parts, on_skip))
    if options.unmasked_epochs == 0:
        return [masked]
    tuning = unmasked_options(options)
    stream, steps_per_epoch = _samples(tuning, parts, on_skip)
    if options.unmasked_warmup is None:
        tuning.warmup = math.ceil(_WARMUP_EPOCHS * steps_per_epoch)
    unmasked = Phase(
        "unmasked",
        tuning,
        stream,
        steps_per_epoch,
        first_epoch=masked.end_epoch,
        first_step=masked.num_steps,
    )
    return [masked, unmasked]


def patch_dropouts(model: nn.Module) -> list[Any]:
    """Return the modules by which OpenCLIP's and timm's towers drop patches themselves."""
    # By name, since timm has had several of them.
    every = model.modules()
    return [module for module in every if type(module).__name__.startswith("PatchDropout")]


def unmask(model: nn.Module) -> None:
    """Let a model see whole images for good: without its masking, and without patch dropout."""
    if masking_or_none(model) is not None:
        remove_masking(model)
    for dropout in patch_dropouts(model):
        dropout.prob = 0.0


def unmasked_options(options: TrainOptions) -> TrainOptions:
    """Return a run's options as they are while nothing is masked; the warm-up may be None."""
    return dataclasses.replace(
        options,
        masking="none",
        masking_options={},
        mask_schedule="constant",
        train_image_size=None,
        text_masking="none",
        text_tokens=None,
        text_masking_options={},
        epochs=options.unmasked_epochs,
        lr=options.unmasked_lr,
        lr_scheduler="cosine",
        skip_scheduler=False,
        # None stands for a share of an epoch, which is not known yet.
        warmup=options.unmasked_warmup,  # type: ignore[arg-type]
        batch_size=options.unmasked_batch_size or options.batch_size,
        accum_freq=options.unmasked_accum_freq or options.accum_freq,
    )


def _samples(
    options: TrainOptions, parts: ModelParts, on_skip: OnSkip | None
) -> tuple[SampleStream, int]:
    """Return the training samples and the optimizer steps of an epoch."""
    stream = build_train_stream(
        options,
        transform=parts.training_transform(options),
        tokenize=parts.tokenize,
        rank=options.rank,
        world_size=options.world_size,
        on_skip=on_skip,
    )
    steps = (stream.num_batches or 0) // options.accum_freq
    if steps == 0:
        raise ValueError(
            f"--train-data gives {stream.num_batches} batches per process and epoch, fewer than "
            f"one step of --accum-freq {options.accum_freq} takes"
        )
    return stream, steps
