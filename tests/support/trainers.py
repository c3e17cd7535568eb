"""A trainer of one phase, for tests that take its steps one by one."""

import torch

from clip_pgs.training.build import build_model
from clip_pgs.training.checks import check_options
from clip_pgs.training.options import parse_options
from clip_pgs.training.phases import plan_phases
from clip_pgs.training.trainer import PhaseTrainer
from support.runs import flags


def open_trainer(folder, *, scaler=None, **options):
    """Return the trainer of a run's first phase, in this process alone.

    Args:
        folder: Holds the model config and would hold the logs.
        scaler: Scales the loss.
        **options: As for `support.runs.flags`.
    """
    args = parse_options(flags(folder, **options))
    check_options(args)
    args.rank, args.local_rank, args.world_size, args.distributed = 0, 0, 1, False
    device = torch.device("cpu")
    parts = build_model(args, device)
    phase = plan_phases(args, parts)[0]
    return PhaseTrainer(phase, parts, device, scaler=scaler, checkpoint=None)
