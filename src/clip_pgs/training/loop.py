"""A training run from its options to its export."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import asdict
from pathlib import Path

import torch

from clip_pgs.training.build import build_model
from clip_pgs.training.checkpoints.checkpoint import restore
from clip_pgs.training.checks import option_warnings
from clip_pgs.training.distributed import Meeting, process_group
from clip_pgs.training.launch import (
    default_name,
    load_start,
    log_file,
    open_sinks,
    write_run_files,
)
from clip_pgs.training.options import TrainOptions
from clip_pgs.training.precision import supported_precision
from clip_pgs.training.run_folder import run_folder
from clip_pgs.training.survival.exits import (
    FAILED,
    BadInputError,
    ExitReport,
    StoppedError,
    UnwrittenError,
    unwritten_folder,
)
from clip_pgs.training.survival.interrupts import AskedToLeave, Interrupts
from clip_pgs.training.survival.lock import run_lock
from clip_pgs.training.survival.watchdog import Watchdog
from clip_pgs.training.telemetry.lenient import lenient_threads
from clip_pgs.training.telemetry.run_log import logging_to
from clip_pgs.training.telemetry.telemetry import Cost
from clip_pgs.training.trainer import Trainer
from clip_pgs.training.validation import Evaluate, Validation, describe_metrics, save_results

_logger = logging.getLogger(__name__)


def train(
    args: TrainOptions,
    *,
    evaluate: Evaluate | None = None,
    interrupts: Interrupts | None = None,
) -> Path | None:
    """Train a model, or only evaluate one where no training data is given.

    Args:
        args: From `parse_options`, checked by `check_options`; it is not changed.
        evaluate: Measures more on rank 0, every `--eval-every` epochs and at the end.
        interrupts: Signals, where the caller catches them already.

    Returns:
        The run's folder, None with `--logs none`.

    Raises:
        ValueError: If the data does not fill one step, or `--resume` names no checkpoint.
        BadInputError: If another process trains this run.
        StoppedError: If a signal asked the run to leave; it has saved where it is.
        UnwrittenError: If its folder cannot be written.
        UnusableDataError, StalledDataError, BadNumbersError, OtherProcessError: See `Trainer.run`.
    """
    asked_device = args.device
    args = dataclasses.replace(args)
    interrupts = interrupts or Interrupts()
    report = ExitReport(interrupts)
    with interrupts.caught(), report, process_group(args) as device:
        report.rank = args.rank
        meeting = Meeting(args)
        args.name = meeting.share(args.name or default_name(args))
        folder = run_folder(args)
        sentences = option_warnings(args) if args.rank == 0 else []
        with run_lock(folder if args.rank == 0 else None):
            if folder is not None and args.rank == 0:
                report.folder = folder
                report.forget()
                try:
                    write_run_files(args, folder, device)
                except OSError as error:
                    raise unwritten_folder(error) from error
            # From here on each process may fail on its own.
            meeting.wait()
            report.folder = folder
            try:
                path = log_file(args)
            except OSError as error:
                raise unwritten_folder(error) from error
            level = _log_level(args, has_file=path is not None)
            with lenient_threads(), logging_to(path, level=level):
                _logger.info("Process %d of %d on %s", args.rank, args.world_size, device)
                for sentence in sentences:
                    _logger.warning("%s", sentence)
                if torch.device(asked_device).type != device.type:
                    _logger.warning("%s is not available: running on %s", asked_device, device)
                args.precision = supported_precision(args.precision, device)
                if args.train_data or args.dataset_type == "synthetic":
                    _train(args, device, folder, meeting, interrupts, report, evaluate=evaluate)
                else:
                    _evaluate_only(args, device, folder, meeting, interrupts, evaluate=evaluate)
                meeting.wait()
    return folder


def _train(
    args: TrainOptions,
    device: torch.device,
    folder: Path | None,
    meeting: Meeting,
    interrupts: Interrupts,
    report: ExitReport,
    *,
    evaluate: Evaluate | None,
) -> None:
    def report_hang(sentence: str) -> None:
        if report.write(FAILED, sentence):
            _logger.error("%s", sentence)

    watchdog = Watchdog(args, on_hang=report_hang)
    try:
        try:
            trainer = Trainer(
                args,
                device,
                folder,
                meeting,
                interrupts=interrupts,
                watchdog=watchdog,
                evaluate=evaluate,
            )
        except ValueError as error:
            raise BadInputError(str(error)) from error
        trainer.run()
    finally:
        watchdog.close()


def _log_level(args: TrainOptions, *, has_file: bool) -> int:
    if args.rank != 0 and not has_file:
        return logging.ERROR
    return logging.DEBUG if args.debug else logging.INFO


def _evaluate_only(
    args: TrainOptions,
    device: torch.device,
    folder: Path | None,
    meeting: Meeting,
    interrupts: Interrupts,
    *,
    evaluate: Evaluate | None,
) -> None:
    """Measure the model once, as it comes or with the weights that `--resume` names."""
    parts = build_model(args, device)
    try:
        checkpoint = load_start(args, folder, meeting) or {}
    except ValueError as error:
        raise BadInputError(str(error)) from error
    epoch = restore(checkpoint, model=parts.model) if checkpoint else 0
    if args.rank != 0:
        return
    validation = Validation(args, parts, evaluate=evaluate)
    try:
        with interrupts.breakable():
            metrics = validation.run(epoch=epoch, epochs=epoch)
    except AskedToLeave:
        raise StoppedError(f"stopped by {interrupts.name}", interrupts.code) from None
    finally:
        validation.close()
    for line in describe_metrics(metrics):
        _logger.info("After epoch %d: %s", epoch, line)
    if folder is None:
        return
    try:
        save_results(metrics, folder / "checkpoints")
    except OSError as error:
        raise UnwrittenError(f"the measurements cannot be written: {error}") from error
    cost = {**asdict(Cost()), **checkpoint.get("clip_pgs", {}).get("cost", {})}
    for sink in open_sinks(args, folder, first_step=cost["steps"]):
        sink.validation(metrics, epoch=epoch, cost=cost)
        sink.close()
    _logger.info("Measurements are in %s", folder / "checkpoints")
