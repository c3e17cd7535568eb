"""A training run from its start to its export: processes, phases, epochs, steps.

`train` joins the run's processes and takes its folder; `Trainer.run` goes through phases, epochs
and steps, and saves, measures and leaves between them; `PhaseTrainer` holds the model, optimizer
and samples of a phase and takes its steps. The gradients of a step are in `step.py`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from itertools import islice
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, NoReturn

import torch
from open_clip import get_input_dtype
from open_clip_train.precision import get_autocast
from torch import Tensor

from clip_pgs.checkpoint_reading import (
    MOST_RECENT_NAME,
    find_non_finite,
    fit_weights,
    named_latest,
    named_tensors,
    newest_checkpoint,
)
from clip_pgs.common import one_sentence
from clip_pgs.data.bad_samples import StalledDataError, UnusableDataError
from clip_pgs.data.decoding import pixel_normalizer
from clip_pgs.data.order import stable_seed
from clip_pgs.files import CHECKPOINTS_NAME, EXPORT_NAME, MASKS_NAME, METRICS_NAME
from clip_pgs.integrations.apply import masking_or_none
from clip_pgs.integrations.open_clip import (
    CaptionGroups,
    masking_state,
    update_masking,
)
from clip_pgs.integrations.open_clip.flops import SampleFlops, count_sample_flops, few_texts
from clip_pgs.tables import counted
from clip_pgs.training.build import (
    ModelParts,
    build_loss,
    build_model,
    build_optimizer,
    build_schedule,
    build_trimmer,
    create_scaler,
    supported_precision,
)
from clip_pgs.training.checkpoint import (
    CheckpointStore,
    Cost,
    load_start,
    pack_checkpoint,
    restore,
    restore_masking,
    restore_optimizer,
    trained_steps,
)
from clip_pgs.training.data_checks import has_training_data, training_files
from clip_pgs.training.distributed import (
    ProcessGroup,
    full_tensor,
    gather,
    join_processes,
    meet_machines,
    parallelize,
    shard_model,
    spans_machines,
)
from clip_pgs.training.export import export_run, found_in_training, write_export
from clip_pgs.training.loggers import (
    BestEffort,
    MetricLoggers,
    SkipLog,
    keep_lines_before,
    logging_to,
)
from clip_pgs.training.masks import MaskPictures, StepMasks, seed_everything
from clip_pgs.training.option_warnings import option_warnings
from clip_pgs.training.options import TrainOptions
from clip_pgs.training.phases import Phase, plan_phases, steps_after, total_epochs, unmask
from clip_pgs.training.run_folder import (
    RunFiles,
    check_alike,
    default_name,
    describe_run,
    keeps_logs,
    note_launch,
    read_options_file,
    run_folder,
    save_indexes,
    taken_name,
    warn_of_changes,
    write_run_files,
)
from clip_pgs.training.step import (
    Batch,
    StepResult,
    Texts,
    compute_gradients,
    restore_where,
    update_weights,
)
from clip_pgs.training.stop import (
    FAILED,
    BadInputError,
    BadNumbersError,
    ExitReport,
    OtherProcessError,
    RunLock,
    StoppedError,
    StopRequest,
    StopSignals,
    UnwrittenError,
    Verdict,
    as_bad_input,
    stop_vote,
    writing,
)
from clip_pgs.training.telemetry import Telemetry
from clip_pgs.training.validation import (
    RESULTS_NAME,
    Evaluate,
    Validation,
    evaluate_only,
    metrics_table,
    save_results,
)
from clip_pgs.training.watchdog import Activity, Watchdog

# The first step compiles, and finds the fastest convolutions.
_FIRST_STEP_PATIENCE = 4.0
# A signal to all processes may reach those that load data first.
_SIGNAL_SECONDS = 1.0
# Samples that are longer in coming are not waited for by who is asked to leave.
_BATCH_SECONDS = 5.0
# Images may keep different counts, whose mean a few tell well enough.
_FLOP_SAMPLES = 16

_logger = logging.getLogger(__name__)


def train(
    options: TrainOptions,
    *,
    evaluate: Evaluate | None = None,
    signals: StopSignals | None = None,
) -> Path | None:
    """Train a model, or only evaluate one where no training data is given.

    Args:
        options: From `parse_options`, checked by `check_options`; they are not changed.
        evaluate: Measures more on rank 0, every `--eval-every` epochs and at the end.
        signals: Where the caller catches them already.

    Returns:
        The run's folder, None with `--logs none`.

    Raises:
        BadInputError: If the data does not fill one step, `--resume` names no checkpoint that
            fits, or another process trains this run.
        StoppedError: If a signal asked the run to leave; it has saved where it is.
        UnwrittenError: If its folder cannot be written.
        UnusableDataError, StalledDataError, BadNumbersError, OtherProcessError: See `Trainer.run`.
    """
    options = dataclasses.replace(options)
    signals = signals or StopSignals()
    report = ExitReport(signals)
    with signals.caught(), report, join_processes(options) as (device, group):
        is_main = options.rank == 0
        report.rank = options.rank
        if spans_machines():
            meet_machines(group)
            check_alike(options, group)
        options.name = group.broadcast(options.name or default_name(options))
        if options.local_rank == 0:
            report.forget_attempt()
        folder = run_folder(options)
        sentences = option_warnings(options) if is_main else []
        lock = RunLock(folder) if folder is not None and is_main else None
        with lock or nullcontext():
            if folder is not None and is_main:
                # Another process may have trained there since that was checked.
                if (taken := taken_name(options)) is not None:
                    raise BadInputError(taken)
                report.folder = folder
                report.forget()
                files = training_files(options) if has_training_data(options) else []
                with writing("the run's folder"):
                    write_run_files(options, folder, device, files=files)
            # From here on each process may fail on its own.
            group.barrier()
            if folder is not None and options.local_rank == 0 and not is_main:
                with writing("the folder of the launch"):
                    note_launch(folder)
            report.folder = folder
            with logging_to(options, folder):
                _logger.info("Process %d of %d on %s", options.rank, options.world_size, device)
                for sentence in sentences:
                    _logger.warning("%s", sentence)
                options.precision = supported_precision(options.precision, device)
                if has_training_data(options):
                    watchdog = Watchdog(options, on_hang=report.write_error)
                    with watchdog.watching(options):
                        with as_bad_input():
                            trainer = Trainer(
                                options,
                                device,
                                folder,
                                group,
                                signals=signals,
                                watchdog=watchdog,
                                evaluate=evaluate,
                                lock=lock,
                            )
                        trainer.run()
                        group.barrier()
                else:
                    evaluate_only(options, device, folder, group, signals, evaluate=evaluate)
                    group.barrier()
    return folder


class Trainer:
    """A run in one process.

    Args:
        options: The run's, with `rank`, `world_size` and `distributed`.
        device: This process's device.
        folder: The run's folder; rank 0 alone writes there, but for what is skipped. None keeps
            nothing.
        group: All processes.
        signals: Signals to this process.
        watchdog: Is told what this process does.
        evaluate: Measures more than OpenCLIP does.
        lock: What rank 0 holds on the folder.

    Raises:
        ValueError: If the data does not fill one step, or the checkpoint does not fit.
    """

    def __init__(
        self,
        options: TrainOptions,
        device: torch.device,
        folder: Path | None,
        group: ProcessGroup,
        *,
        signals: StopSignals,
        watchdog: Watchdog,
        evaluate: Evaluate | None,
        lock: RunLock | None,
    ) -> None:
        self._options = options
        self._lock = lock
        self._device = device
        self._group = group
        self._signals = signals
        self._watchdog = watchdog
        is_main = options.rank == 0
        self._folder = folder if is_main else None
        # Why this process cannot go on; the others hear of it at the next vote.
        self._error: Exception | None = None

        self._parts = build_model(options, device)
        self._scaler = create_scaler(options.precision, device)
        self._checkpoint = load_start(options, folder, group)
        self._first_epoch = self._first_position = 0
        if self._checkpoint is not None:
            self._first_epoch = restore(
                self._checkpoint, model=self._parts.model, scaler=self._scaler
            )
            self._first_position = self._checkpoint.get("position", 0)
            if (self._first_epoch, self._first_position) > (0, 0):
                restore_masking(self._checkpoint, model=self._parts.model, options=options)
        if options.fsdp:
            self._parts.sharded = shard_model(self._parts.model, options, device)
        # A place that is saved, or was never trained, needs no file of its own.
        self._saved_place = (self._first_epoch, self._first_position)
        self._saved_at = monotonic()
        self._found = found_in_training(self._checkpoint or {})
        has_begun = self._saved_place > (0, 0)
        start = None if self._checkpoint is None else self._checkpoint.get("clip_pgs", {})
        earlier = start or {} if has_begun else {}
        self._metrics: dict[str, float] = dict(earlier.get("metrics", {}))
        self._window = (self._checkpoint or {}).get("window")

        # Nothing is left to train; another trainer's checkpoint has no record to export.
        self._is_finished = bool(earlier) and self._first_epoch >= total_epochs(options)
        cost = Cost(**earlier.get("cost", {}))
        self._skips = SkipLog(folder, rank=options.rank, step=cost.steps)
        self._phases = plan_phases(options, self._parts, on_skip=self._skips)
        if has_begun:
            warn_of_changes(options, earlier, is_ordered=self._phases[0].stream.is_ordered)
        self._results_effort = BestEffort(RESULTS_NAME)
        self._is_measured = any(
            (options.val_data, options.imagenet_val, options.imagenet_v2, evaluate)
        )
        self._validation = Validation(options, self._parts, evaluate=evaluate) if is_main else None
        if cost.steps == 0 and self._first_epoch > 0:
            # OpenCLIP's checkpoints do not say what they took.
            for phase in self._phases:
                if phase.first_epoch < self._first_epoch:
                    end = min(phase.end_epoch, self._first_epoch)
                    cost.steps = phase.steps_before(end)
                    cost.samples += (cost.steps - phase.first_step) * phase.samples_per_step
            cost.unmeasured_steps = cost.steps
        self._telemetry = Telemetry(
            options,
            MetricLoggers(options, self._folder, first_step=cost.steps),
            cost,
            device=device,
            steps_left=steps_after(self._phases, self._first_epoch, self._first_position),
        )
        # What was measured after each epoch.
        self._measured: list[dict[str, Any]] = []
        self._store: CheckpointStore | None = None
        self._pictures: MaskPictures | None = None
        if self._folder is not None:
            with BestEffort(METRICS_NAME):
                entries = keep_lines_before(self._folder / METRICS_NAME, cost.steps)
                self._measured = [entry for entry in entries if entry.get("kind") == "val"]
            if self._validation is not None:
                self._validation.warn_of_changes(self._measured)
            samples = self._phases[0].stream.num_samples
            self._record = describe_run(
                options,
                self._parts.model,
                device,
                num_samples=samples,
                saved=read_options_file(self._folder)[0],
                earlier=earlier,
                start=start,
            )
            # The stream has indexed all shards.
            with writing("the run's folder"):
                save_indexes(options, self._folder)
            self._run_files = RunFiles(self._folder)
            self._store = CheckpointStore(
                self._folder / CHECKPOINTS_NAME,
                keep_last=options.keep_checkpoints,
                delete_previous=options.delete_previous_checkpoint,
            )
            watchdog.written = self._store.num_written
            self._keep_start(self._store)
            self._pictures = MaskPictures(
                self._folder / MASKS_NAME,
                self._parts.model,
                name=options.masking,
                seed=options.seed,
            )

    def _keep_start(self, store: CheckpointStore) -> None:
        """Save what the run begins with as its own, where it comes from elsewhere.

        Else `--resume latest` would begin anew until the run has saved, which a finished one never
        does. Of the run's own folder, `find_latest` has named one.
        """
        assert self._folder is not None
        start, folder = self._checkpoint, self._folder / CHECKPOINTS_NAME
        if start is None or named_latest(folder) is not None:
            return
        epoch, position = self._saved_place
        parts = ("optimizer", "scaler", "masking_state", "window")
        content = {name: start[name] for name in parts if name in start} | {
            "state_dict": fit_weights(start["state_dict"], self._parts.model),
            "epoch": epoch,
            "position": position,
            "step": self.step,
            "name": self._options.name or "",
            "clip_pgs": self._record_now(),
        }
        is_epoch = epoch > 0 and position == 0
        try:
            store.save(content, f"epoch_{epoch}.pt" if is_epoch else f"step_{self.step}.pt")
        except ValueError as error:
            # What another trainer keeps beside its numbers.
            _logger.warning("What the run begins with is not saved: %s", error)

    @property
    def step(self) -> int:
        """The optimizer steps that the run has behind it."""
        return self._telemetry.cost.steps

    def run(self) -> None:
        """Train the epochs that are left, then export the model.

        Raises:
            StoppedError: If a signal asked the run to leave; it has saved where it is.
            UnusableDataError, StalledDataError: If the data lets it down.
            BadNumbersError: If no step changes the weights any more.
            OtherProcessError: If another process raised one of these.
            UnwrittenError: If the export or the last checkpoint cannot be written.
        """
        try:
            for phase in self._phases:
                if self._first_epoch >= phase.end_epoch:
                    continue
                phase_trainer = self._start_phase(phase)
                for epoch in range(max(phase.first_epoch, self._first_epoch), phase.end_epoch):
                    for batches, data_seconds in self._fetch_epoch(phase_trainer, epoch):
                        result = phase_trainer.train_step(batches)
                        self._finish_step(phase_trainer, result, data_seconds)
                    self._finish_epoch(phase_trainer, epoch)
            self._watchdog.allow(Activity.EXPORTING, step=self.step)
            self._export()
            if self._options.rank == 0:
                self._watchdog.note(Activity.VOTING, step=self.step)
        except BaseException:
            # What is being saved is finished, whatever ended the run.
            if self._store is not None:
                self._watchdog.allow(Activity.WRITING, step=self.step)
                self._store.close()
            raise
        finally:
            for phase in self._phases:
                phase.stream.close()
            if self._validation is not None:
                self._validation.close()
            self._telemetry.close()

    def _start_phase(self, phase: Phase) -> PhaseTrainer:
        place = self._first_epoch, self._first_position
        is_midway = self._first_position > 0 and phase.first_epoch <= self._first_epoch
        _logger.info(
            "Training%s: %s of %s%s",
            "" if phase.name == "masked" else f" {phase.name}",
            counted(phase.end_epoch - max(phase.first_epoch, self._first_epoch), "epoch"),
            counted(phase.steps_per_epoch, "step"),
            f", the first from sample {self._first_position} on" if is_midway else "",
        )
        # A checkpoint at a phase's beginning holds the optimizer of the phase before.
        has_begun = (phase.first_epoch, 0) < place
        phase_trainer = PhaseTrainer(
            phase,
            self._parts,
            self._device,
            scaler=self._scaler,
            checkpoint=self._checkpoint if has_begun else None,
        )
        self._checkpoint = None
        self._telemetry.start_phase(
            num_patches=phase_trainer.masks.num_patches if phase_trainer.masks else 0,
            samples_per_step=phase.samples_per_step,
        )
        return phase_trainer

    def _fetch_epoch(
        self, phase_trainer: PhaseTrainer, epoch: int
    ) -> Iterator[tuple[list[Batch], float]]:
        """Yield each step's batches, and the seconds they took, once all processes have theirs."""
        position = self._first_position if epoch == self._first_epoch else 0
        phase_trainer.start_epoch(epoch, position)
        self._telemetry.start_epoch(is_resumed=position > 0, window=self._window)
        while phase_trainer.steps_left:
            is_first = not phase_trainer.has_begun
            patience = _FIRST_STEP_PATIENCE if is_first else 1.0
            self._skips.step = self.step
            self._watchdog.note(Activity.FETCHING, step=self.step, patience=patience)
            batches: list[Batch] = []
            seconds = 0.0
            try:
                with self._signals.interruptible(patience=_BATCH_SECONDS):
                    batches, seconds = phase_trainer.next_batches()
            except StopRequest:
                pass
            except (UnusableDataError, StalledDataError) as error:
                self._signals.wait(_SIGNAL_SECONDS)
                if not self._signals.code:
                    self._error = error
            self._watchdog.note(Activity.VOTING, step=self.step, patience=patience)
            place = (phase_trainer.epoch, phase_trainer.position)
            verdict = self._vote(phase_trainer, place, num_skipped=self._skips.take_count())
            self._telemetry.cost.skipped_samples += verdict.num_skipped
            self._watchdog.note(Activity.TRAINING, step=self.step, patience=patience)
            if (phase_trainer.follow_schedule() or is_first) and self._telemetry.is_active:
                self._telemetry.report_flops(phase_trainer.count_flops(*batches[0]))
            if is_first and phase_trainer.masks is not None and self._pictures is not None:
                self._pictures.choose(batches[0][0])
                self._draw_masks(epoch)
            yield batches, seconds

    def _finish_step(
        self, phase_trainer: PhaseTrainer, result: StepResult, data_seconds: float
    ) -> None:
        self._watchdog.note(Activity.SAVING, step=self.step)
        try:
            self._telemetry.step(
                result,
                model=self._parts.model,
                epoch=phase_trainer.epoch,
                done=phase_trainer.position,
                steps_left=phase_trainer.steps_left,
                data_seconds=data_seconds,
            )
        except BadNumbersError as error:
            # Rank 0 alone looks; the others hear of it before the next step.
            self._error = error
        self.save_if_due(phase_trainer)

    def save_if_due(self, phase_trainer: PhaseTrainer) -> None:
        """Save after a step where `--save-every-steps` or `--save-every-minutes` asks for it."""
        is_due = False
        try:
            is_due = self._error is None and self._is_save_due(phase_trainer)
        except BadNumbersError as error:
            self._error = error
        if self._options.fsdp:
            is_due = self._group.sum([is_due])[0] > 0
        if is_due:
            place = (phase_trainer.epoch, phase_trainer.position)
            self._save(phase_trainer, place, f"step_{self.step}.pt")

    def _is_save_due(self, phase_trainer: PhaseTrainer) -> bool:
        """Return whether rank 0 is to save now.

        Raises:
            BadNumbersError: If the last steps were not good enough to be saved.
        """
        options = self._options
        if self._store is None:
            return False
        every = options.save_every_steps
        is_due = every is not None and self.step % every == 0
        seconds = 60 * (options.save_every_minutes or 0)
        if seconds and monotonic() - self._saved_at >= seconds:
            # One that is late by the disk's fault does not hold the run up.
            is_due = is_due or not self._store.is_busy
        # At an epoch's end its own save follows at once, where nothing is measured before.
        is_epoch_saved = bool(self._epoch_names(phase_trainer, phase_trainer.epoch + 1))
        is_saved_next = phase_trainer.steps_left == 0 and not self._is_measured and is_epoch_saved
        if is_due and not is_saved_next:
            self._telemetry.check_numbers()
            return True
        return False

    def _epoch_names(self, phase_trainer: PhaseTrainer, epoch: int) -> list[str]:
        """Return the files to save after `epoch` epochs; a phase's last always is saved."""
        every, is_phase_end = self._options.save_frequency, epoch == phase_trainer.phase.end_epoch
        is_kept = is_phase_end or (every > 0 and epoch % every == 0)
        most_recent = [MOST_RECENT_NAME] if self._options.save_most_recent else []
        return [f"epoch_{epoch}.pt", *most_recent] if is_kept else most_recent

    def _save(self, phase_trainer: PhaseTrainer, place: tuple[int, int], *names: str) -> None:
        """Save a place in the run: completed epochs, and samples of the one under way.

        All processes take part where the model is sharded, else rank 0 alone.
        """
        saves = self._store is not None or (self._options.fsdp and keeps_logs(self._options))
        if not saves or not names:
            return
        epoch, position = place
        content = pack_checkpoint(
            epoch=epoch,
            step=self.step,
            position=position,
            name=self._options.name or "",
            model=phase_trainer.model,
            optimizer=phase_trainer.optimizer,
            scaler=self._scaler,
            masking_state=masking_state(phase_trainer.model) if phase_trainer.masks else {},
            record=self._record_now() if self._store is not None else {},
            window=self._telemetry.window if position > 0 else None,
        )
        self._found = found_in_training(content)
        if self._store is not None:
            if self._lock is not None:
                self._lock.keep()
            self._run_files.restore()
            if self._store.is_busy:
                self._watchdog.allow(Activity.WRITING, step=self.step)
            self._store.save(content, *names)
        else:
            for _, tensor in named_tensors(content):
                full_tensor(tensor)
        self._saved_at, self._saved_place = monotonic(), place

    def _record_now(self) -> dict[str, Any]:
        cost = asdict(self._telemetry.cost)
        return {**self._record, "cost": cost, "metrics": dict(self._metrics)}

    def _vote(self, phase_trainer: PhaseTrainer, place: tuple[int, int], **facts: Any) -> Verdict:
        """Go on where all processes do, else save `place` and leave; see `stop_vote`."""
        has_failed = self._error is not None
        verdict = stop_vote(self._group, self._signals, has_failed=has_failed, **facts)
        if verdict.stops:
            self._leave(phase_trainer, place, verdict)
        return verdict

    def _leave(
        self, phase_trainer: PhaseTrainer, place: tuple[int, int], verdict: Verdict
    ) -> NoReturn:
        # Rank 0 finds bad numbers, and rank 0 saves.
        is_new = not isinstance(self._error, BadNumbersError) and place != self._saved_place
        is_new = self._group.broadcast(is_new)
        self._watchdog.allow(Activity.WRITING, step=self.step)
        if is_new:
            self._save(phase_trainer, place, f"step_{self.step}.pt")
        is_saved = self._group.broadcast(self._store is None or self._store.wait())
        if self._error is not None:
            raise self._error
        if verdict.has_failed:
            raise OtherProcessError("another process of the run cannot go on")
        name = self._signals.name or "a signal to another process"
        where = f"sample {place[1]} of epoch {place[0] + 1}"
        if not is_saved:
            raise StoppedError(f"stopped by {name}; {where} could not be saved", FAILED)
        sentence = f"stopped by {name} at {where}; --resume latest goes on there"
        raise StoppedError(sentence, verdict.code)

    def _finish_epoch(self, phase_trainer: PhaseTrainer, epoch: int) -> None:
        """Draw, measure and save after an epoch; nobody goes on, or leaves, before rank 0 has."""
        epochs = total_epochs(self._options)
        self._watchdog.allow(Activity.EVALUATING, step=self.step)
        place = (epoch, phase_trainer.position)
        self._vote(phase_trainer, place)
        self._telemetry.finish_epoch(epoch + 1, epochs)
        is_done = True
        if self._parts.sharded is not None:
            gather(self._parts.sharded, self._parts.model)
        if self._validation is not None:
            try:
                with self._signals.interruptible():
                    if phase_trainer.masks is not None:
                        self._draw_masks(epoch + 1)
                    self._measure(self._validation, epoch + 1, epochs)
            except StopRequest:
                is_done = False
            # Whatever it is, the epoch is saved first.
            except Exception as error:
                self._error = error
        is_done = self._group.broadcast(is_done)
        if is_done:
            self._save(phase_trainer, (epoch + 1, 0), *self._epoch_names(phase_trainer, epoch + 1))
        place = (epoch + 1, 0) if is_done else place
        self._vote(phase_trainer, place, is_done=is_done and epoch + 1 == epochs)

    def _measure(self, validation: Validation, epoch: int, epochs: int) -> None:
        record = self._record_now() if self._folder is not None else {}
        metrics = validation.run(epoch=epoch, epochs=epochs, record=record)
        if not metrics:
            return
        self._metrics = metrics
        size, data = self._options.batch_size, validation.data()
        self._measured.append({"epoch": epoch, "batch_size": size, "data": data, **metrics})
        _logger.info("After epoch %d:\n\n%s", epoch, metrics_table(self._measured))
        self._telemetry.validation(metrics, epoch=epoch, data=data)
        if self._folder is not None:
            with self._results_effort:
                save_results(metrics, self._folder / CHECKPOINTS_NAME)

    def _draw_masks(self, epoch: int) -> None:
        picture = self._pictures.draw(epoch) if self._pictures is not None else None
        if picture is not None:
            self._telemetry.picture("masks", picture)

    def _export(self) -> None:
        """Write the finished model as OpenCLIP's files, once its checkpoint is on the disk."""
        if self._store is None or self._folder is None:
            return
        is_saved = self._store.wait()
        checkpoint = pack_checkpoint(
            epoch=total_epochs(self._options),
            name=self._options.name or "",
            model=self._parts.model,
            record=self._record_now(),
        )
        if self._lock is not None:
            self._lock.keep()
        cost = self._telemetry.cost
        unmeasured = cost.unmeasured_steps
        if 0 < cost.steps == cost.skipped_steps:
            raise BadNumbersError(
                "the loss or its gradient was not finite in any of the "
                f"{counted(cost.steps, 'step')}; no weight was changed, and no model is exported"
            )
        trouble = find_non_finite({"state_dict": checkpoint["state_dict"]})
        if trouble is not None:
            raise BadNumbersError(f"no model is exported: {trouble}; {self._way_back()}")
        try:
            if self._options.resume == "latest" and self._is_finished:
                # Its checkpoint tells on what it was trained, and its card keeps the scores.
                export = export_run(self._folder)
            else:
                export = write_export(checkpoint, self._folder / EXPORT_NAME, found=self._found)
        except (OSError, ValueError) as error:
            cure = f"clip-pgs export {self._folder} makes it from the checkpoint"
            if not is_saved:
                cure = f"nor could the last checkpoint be; {self._way_back()}"
            reason = f"the export cannot be written: {one_sentence(error)}"
            raise UnwrittenError(f"{reason}; {cure}") from error
        if not self._store.close():
            raise UnwrittenError(
                f"the last checkpoint could not be written or is gone; the export is in {export}"
            )
        _logger.info(
            "Done: %s, %s, %.3g FLOPs in %s%s",
            counted(cost.steps, "step"),
            counted(cost.samples, "sample"),
            cost.flops,
            timedelta(seconds=round(cost.seconds)),
            f", both without the first {counted(unmeasured, 'step')}" if unmeasured else "",
        )
        _logger.info("Checkpoints, curves and mask pictures are in %s", self._folder)
        opens = "OpenCLIP opens the model as local-dir:%s"
        if self._options.mae is not None:
            opens = "transformers opens the model as %s"
        _logger.info(opens, export)

    def _way_back(self) -> str:
        """Say from where `--resume latest` would make what could not be saved."""
        assert self._folder is not None
        newest = newest_checkpoint(self._folder / CHECKPOINTS_NAME)
        if newest is not None:
            return f"--resume latest trains again from {newest.name} on"
        if trained_steps(self._folder)[1]:
            return "no checkpoint is left to go on from"
        return "--resume latest trains again from the beginning"


class PhaseTrainer:
    """Trains the model through one phase, whose model, optimizer and samples it sets up.

    Args:
        phase: The phase; an unmasked one unmasks the model for good.
        parts: The model, as the phase before left it.
        device: This process's device.
        scaler: The run's loss scaler, if there is one.
        checkpoint: A checkpoint out of this phase to go on from; None starts the phase.

    Attributes:
        has_begun: Whether this launch has taken a step of the phase.
        epoch: The epoch under way, counted from the run's beginning.
        position: Samples of it, over all ranks, that the run has behind it.
        steps_left: Its steps that are not taken yet.
    """

    def __init__(
        self,
        phase: Phase,
        parts: ModelParts,
        device: torch.device,
        *,
        scaler: torch.amp.GradScaler | None,
        checkpoint: dict[str, Any] | None,
    ) -> None:
        options = phase.options
        self.phase = phase
        self._options = options
        self._device = device
        self._plain = parts.model
        self._sharded: Any = parts.sharded
        self.model = parts.model if parts.sharded is None else parts.sharded.model
        self._scaler = scaler
        if phase.name == "unmasked":
            unmask(self.model)
            unmask(self._plain)
        self.optimizer = build_optimizer(options, self.model)
        is_masked = masking_or_none(self.model) is not None
        self.masks = StepMasks(self.model, options) if is_masked else None
        # Statistics of BatchNorm: what a checkpoint holds and a forward pass changes.
        kept = self.model.state_dict().keys()
        self._buffers = [buffer for name, buffer in self.model.named_buffers() if name in kept]
        if checkpoint is not None:
            restore_optimizer(self.optimizer, checkpoint["optimizer"])
        self._schedule = build_schedule(
            options, self.optimizer, steps_per_epoch=phase.steps_per_epoch
        )
        self._loss = build_loss(options, self.model)
        self._trim = build_trimmer(options, self.model)
        self._parallel = self._sharded or parallelize(self.model, options, device)
        self._autocast = get_autocast(options.precision, device_type=device.type)
        self._input_dtype = get_input_dtype(options.precision)
        self._normalize = pixel_normalizer(parts.train_transform, device=device)
        self._samples: Iterator[Batch] = iter(())
        self._next_step = 0
        self.has_begun = False
        self.epoch = self.position = self.steps_left = 0

    def start_epoch(self, epoch: int, position: int = 0) -> None:
        """Begin one of the phase's epochs, or go on in it.

        Args:
            epoch: Counted from the run's beginning.
            position: Samples of it, over all ranks, that the run has behind it.
        """
        seed_everything(stable_seed(self._options.seed, "epoch", epoch, self._options.rank))
        stream = self.phase.stream
        stream.start_at(epoch, position)
        self.model.train()
        self._samples = self._on_device(iter(stream))
        self.epoch, self.position = epoch, position
        self.steps_left = (stream.num_batches_left or 0) // self._options.accum_freq
        self._next_step = self.phase.steps_before(epoch, position)

    def go_to(self, step: int) -> None:
        """Take the coming step for another of the phase, as a trial does; the data stays."""
        self._next_step = self.phase.first_step + step

    def next_batches(self) -> tuple[list[Batch], float]:
        """Return the coming step's micro-batches, and the seconds it waited for them.

        Raises:
            StalledDataError: If no sample comes, or if the data ended before the epoch.
            UnusableDataError: If too many samples, or all, cannot be used.
        """
        started = perf_counter()
        batches = list(islice(self._samples, self._options.accum_freq))
        if len(batches) < self._options.accum_freq:
            raise StalledDataError(
                f"the training data ended at sample {self.position} of epoch {self.epoch + 1}, at "
                f"step {self._next_step - self.phase.steps_before(self.epoch)} of "
                f"{self.phase.steps_per_epoch}"
            )
        return batches, perf_counter() - started

    def follow_schedule(self) -> bool:
        """Set the coming step's mask ratio; return whether it changed."""
        return self.masks is not None and self.masks.follow_schedule(
            self._next_step - self.phase.first_step, total_steps=self.phase.num_steps
        )

    def train_step(self, batches: list[Batch]) -> StepResult:
        """Take one optimizer step; return what it measured."""
        step = self._next_step
        step_in_phase, num_steps = step - self.phase.first_step, self.phase.num_steps
        masks = self.masks
        self.has_begun = True
        self._next_step += 1
        self.steps_left -= 1
        self.position += self.phase.samples_per_step
        lr = self._schedule(step_in_phase)
        # Dropout draws from the global stream; keyed by the step, it survives a resume.
        torch.manual_seed(stable_seed(self._options.seed, "step", step, self._options.rank))
        if self._sharded is not None:
            # The coming forward would do it; a strategy may look at the patch embedding before.
            self._sharded.unshard()
        if masks is not None:
            masks.start_step(step_in_phase, total_steps=num_steps, device=self._device)
            masks.calibrate(batches[0][0])
        buffers_before = [buffer.clone() for buffer in self._buffers]
        losses = compute_gradients(
            self._parallel,
            batches,
            self._loss,
            before_forward=masks.set_noise if masks else None,
            autocast=self._autocast,
            scaler=self._scaler,
        )
        grad_norm, is_bad = update_weights(
            self.model,
            self.optimizer,
            scaler=self._scaler,
            grad_clip_norm=self._options.grad_clip_norm,
        )
        restore_where(is_bad, self._buffers, buffers_before)
        if self._sharded is not None:
            self._show_logit_scale()
        if masks is not None:
            update_masking(self.model, step=step_in_phase, total_steps=num_steps)
        kept_counts = masks.finish_step() if masks else []
        return StepResult(losses, grad_norm, kept_counts, is_bad, lr)

    @torch.no_grad()
    def _show_logit_scale(self) -> None:
        """Tell the plain model the numbers that the log shows; `gather` brings all others."""
        for name in ("logit_scale", "logit_bias"):
            if (number := getattr(self.model, name, None)) is not None:
                current = full_tensor(number)
                if self._plain is not self.model:
                    getattr(self._plain, name).copy_(current)

    def count_flops(self, images: Tensor, texts: Texts) -> SampleFlops:
        """Count what one sample of such a batch costs, at the mask ratio of the coming step."""
        some_texts = few_texts(texts, _FLOP_SAMPLES)
        return count_sample_flops(
            self._plain,
            images[: len(some_texts)],
            some_texts,
            is_masked=self.masks is not None,
            autocast=self._autocast,
            extra_forward=self._options.accum_freq > 1,
        )

    def _on_device(self, samples: Iterator[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
        for images, texts in samples:
            # It reads lengths, which on a device would wait for it.
            trimmed = texts if self._trim is None else self._trim(texts)
            pixels = images.to(self._device, non_blocking=True)
            if self._normalize is not None:
                pixels = self._normalize(pixels)
            if self._device.type == "cuda":
                # What was trimmed is no longer in pinned memory: the copy would wait for the GPU.
                trimmed = _pinned(trimmed)
            yield pixels.to(dtype=self._input_dtype), trimmed.to(self._device, non_blocking=True)


def _pinned(texts: Texts) -> Texts:
    if isinstance(texts, Tensor):
        return texts.pin_memory()
    return CaptionGroups(tuple(t.pin_memory() for t in texts.tokens), texts.order.pin_memory())
