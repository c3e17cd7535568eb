"""The flags of a run that survives: what it saves, and what ends it."""

from __future__ import annotations

from typing import Any

from clip_pgs.training.flags.flag_types import OwnParser, count, ratio

RUN_DEFAULTS: dict[str, Any] = {
    "keep_checkpoints": 3,
    "max_bad_steps": 10,
    "data_timeout": 300.0,
    "max_bad_share": 0.1,
    # Before NCCL gives up, after ten minutes, with an error that names nobody.
    "hang_timeout": 480.0,
}


def add_run_flags(parser: OwnParser) -> None:
    """Add the groups "Saving and resuming" and "What ends a run"."""
    group = parser.add_argument_group(
        "Saving and resuming",
        "Beside the epochs' checkpoints. SIGTERM, SIGUSR1 and Ctrl-C save before they end a run; "
        "--resume latest goes on at the very step, with the same samples, masks and rates.",
    )
    group.add_argument(
        "--save-every-steps",
        type=count,
        metavar="N",
        help="save checkpoints/step_N.pt every N optimizer steps (default: none)",
    )
    group.add_argument(
        "--save-every-minutes",
        type=ratio,
        metavar="M",
        help="save one when the last is M minutes old (default: none)",
    )
    group.add_argument(
        "--keep-checkpoints",
        type=int,
        metavar="K",
        help="keep the last K step_N.pt (default: 3); those of epochs are kept as --save-frequency "
        "and --delete-previous-checkpoint say",
    )
    group.add_argument(
        "--accept-changes",
        action="store_true",
        help="with --resume latest, go on although model, masking, data or seed are not the run's",
    )
    group = parser.add_argument_group("What ends a run")
    group.add_argument(
        "--max-bad-steps",
        type=int,
        metavar="N",
        help="steps without a finite loss and gradient are skipped; N in a row end the run "
        "(default: 10)",
    )
    group.add_argument(
        "--max-bad-share",
        type=float,
        metavar="F",
        help="largest share of samples that may be unusable (default: 0.1); each is a line of "
        "skipped.jsonl in the run's folder",
    )
    group.add_argument(
        "--data-timeout",
        type=float,
        metavar="S",
        help="seconds without a batch after which loading has failed (default: 300; 0 waits for "
        "ever)",
    )
    group.add_argument(
        "--hang-timeout",
        type=float,
        metavar="S",
        help="seconds after which a run in which nothing happens is ended by name of the process "
        "that hangs (default: 480; 0 waits for ever): in one place of a step, or without processor "
        "time in an evaluation, a save, or a step of one process on a CPU, which may otherwise "
        "take as long as they take",
    )
