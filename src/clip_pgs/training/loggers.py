"""Where a run says what it does: log lines, curves, and the samples that it could not use.

A disk that is full ends none of it: what only tells of a run is written as far as it can be.
"""

from __future__ import annotations

import glob
import json
import logging
import secrets
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from clip_pgs.common import one_sentence
from clip_pgs.data.bad_samples import Skip
from clip_pgs.files import (
    LOG_NAME,
    METRICS_NAME,
    PARAMS_NAME,
    SKIPPED_NAME,
    WANDB_ID_NAME,
    append_line,
    own_file,
    read_file,
    read_json_lines,
    write_text,
)
from clip_pgs.tables import counted
from clip_pgs.training.options import TrainOptions

_FORMAT = "%(asctime)s | %(levelname)s | %(message)s"
_DATE_FORMAT = "%Y-%m-%d,%H:%M:%S"
_CHATTY = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch.fx", "PIL", "fsspec")

# What a line of a validation tells of its cost.
_COSTS = ("samples", "flops", "seconds")
_DRAWN_FLOPS = 1e9
_MAX_ID_BYTES = 2**10

Numbers = Mapping[str, float]

_logger = logging.getLogger(__name__)


class BestEffort:
    """Lets blocks go on that cannot write something, and says so the first time.

    Args:
        what: What they write, as a sentence begins with it.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._is_told = False

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if not isinstance(error, OSError):
            return False
        if not self._is_told:
            self._is_told = True
            _logger.warning(
                "%s cannot be written: %s; the run goes on", self._what, error.strerror or error
            )
        return True


class MetricLogger:
    """Takes measurements of rank 0; this one does nothing with them."""

    def train(self, values: Numbers, *, epoch: int, step: int) -> None:
        """Take a training window's values, by OpenCLIP's names without "train/"."""

    def validation(
        self, values: Numbers, *, epoch: int, cost: Numbers, data: Mapping[str, str]
    ) -> None:
        """Take a validation's values after `epoch` epochs.

        Args:
            values: By OpenCLIP's names without "val/".
            epoch: Completed epochs.
            cost: What was spent so far: "steps", "samples", "flops", "seconds".
            data: Digests of what was measured on; see `Validation.data`.
        """

    def picture(self, name: str, pixels: Tensor, *, step: int) -> None:
        """Take a picture of shape (3, H, W) in [0, 1]."""

    def close(self) -> None:
        """Write out what is left."""


class JsonLines(MetricLogger):
    """One JSON object per measurement, for programs: `metrics.jsonl`.

    Args:
        path: The file; lines of steps that a resumed run is about to repeat are dropped.
        first_step: The step this launch starts at.
        batch_size: Samples per process; some losses of a validation depend on it.
    """

    def __init__(self, path: Path, *, first_step: int, batch_size: int) -> None:
        self._path, self._batch_size = path, batch_size
        keep_lines_before(path, first_step)

    def train(self, values: Numbers, *, epoch: int, step: int) -> None:
        """Append a line of kind "train"."""
        self._append({"kind": "train", "epoch": epoch, "step": step, **values})

    def validation(
        self, values: Numbers, *, epoch: int, cost: Numbers, data: Mapping[str, str]
    ) -> None:
        """Append a line of kind "val"; its step is the last one taken."""
        entry = {"kind": "val", "epoch": epoch, "step": int(cost["steps"]) - 1}
        spent = {name: cost[name] for name in _COSTS}
        beside = {"batch_size": self._batch_size, "data": dict(data)}
        self._append({**entry, **spent, **beside, **values})

    def _append(self, entry: dict[str, Any]) -> None:
        append_line(self._path, json.dumps(entry))


class TensorBoard(MetricLogger):
    """OpenCLIP's tags, and validation curves against samples and FLOPs.

    Args:
        folder: Where event files go.
        first_step: The step this launch starts at; later points of an earlier launch are hidden.
        measured: `metrics.jsonl` without what this launch repeats.
    """

    def __init__(self, folder: Path, *, first_step: int, measured: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = first_step if first_step > 0 else None
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)
        # Points whose number of samples or operations is above that step are hidden with it.
        for line in read_json_lines(measured) if purge_step else ():
            if line is None or line.get("kind") != "val":
                continue
            numbers = {k: v for k, v in line.items() if type(v) in (int, float)}
            # The file may have been edited; TensorBoard counts in 64 bits.
            spent = (numbers.get("samples", -1), numbers.get("flops", -1) / _DRAWN_FLOPS)
            if all(0 <= amount < 2**63 for amount in spent):
                values = {
                    k: v for k, v in numbers.items() if k not in (*_COSTS, "batch_size", "step")
                }
                self._draw_costs(values, numbers)

    def train(self, values: Numbers, *, epoch: int, step: int) -> None:
        """Write `train/...` against steps."""
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def validation(
        self, values: Numbers, *, epoch: int, cost: Numbers, data: Mapping[str, str]
    ) -> None:
        """Write `val/...` against epochs, as OpenCLIP does, samples and 10**9 operations."""
        for name, value in values.items():
            self._writer.add_scalar(f"val/{name}", value, epoch)
        self._draw_costs(values, cost)

    def picture(self, name: str, pixels: Tensor, *, step: int) -> None:
        """Write a picture."""
        self._writer.add_image(name, pixels, step)

    def close(self) -> None:
        """Write out what is left."""
        self._writer.close()

    def _draw_costs(self, values: Numbers, cost: Numbers) -> None:
        for name in values.keys() - {"epoch"}:
            samples, flops = int(cost["samples"]), int(cost["flops"] / _DRAWN_FLOPS)
            self._writer.add_scalar(f"val_by_samples/{name}", values[name], samples)
            self._writer.add_scalar(f"val_by_gflops/{name}", values[name], flops)


class WeightsAndBiases(MetricLogger):
    """OpenCLIP's names in one Weights & Biases run, which the run's folder names.

    Args:
        options: The run's.
        folder: The run's folder: its `params.txt` is stored with the run.

    Raises:
        OSError: If nothing can be logged, as without a network.
    """

    def __init__(self, options: TrainOptions, folder: Path) -> None:
        import wandb

        self._wandb = wandb
        # Runs of one name, as the seeds of a study's arms, must not become one.
        id_file = folder / WANDB_ID_NAME
        is_known = id_file.is_file()
        if not is_known:
            write_text(id_file, secrets.token_hex(8))
        try:
            data = read_file(id_file, what=str(id_file), max_bytes=_MAX_ID_BYTES)
            self._run = wandb.init(
                project=options.wandb_project_name,
                name=options.name,
                id=data.decode("utf-8", "replace"),
                notes=options.wandb_notes,
                resume="allow" if is_known else None,
                config=options.values(),
            )
        except (wandb.Error, ValueError) as error:
            raise OSError(one_sentence(error)) from None
        # It takes a pattern.
        place = glob.escape(str(folder.resolve()))
        wandb.save(f"{place}/{PARAMS_NAME}", base_path=place)

    def train(self, values: Numbers, *, epoch: int, step: int) -> None:
        """Log `train/...` at a step."""
        self._run.log({f"train/{k}": v for k, v in values.items()} | {"step": step}, step=step)

    def validation(
        self, values: Numbers, *, epoch: int, cost: Numbers, data: Mapping[str, str]
    ) -> None:
        """Log `val/...`, and as a table, with epoch and cost, each of which can be the x axis."""
        entry: dict[str, Any] = {f"val/{name}": value for name, value in values.items()}
        entry["measured"] = self._wandb.Table(["measurement", "value"], data=list(values.items()))
        self._run.log(entry | {"epoch": epoch, **cost}, step=int(cost["steps"]))

    def picture(self, name: str, pixels: Tensor, *, step: int) -> None:
        """Log a picture."""
        self._run.log({name: self._wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MetricLoggers:
    """Where this process's measurements go.

    A logger that cannot be written says so once, and the run goes on.

    Args:
        options: The run's.
        folder: The run's folder on rank 0; None, elsewhere, has no logger.
        first_step: The step this launch starts at.
    """

    def __init__(self, options: TrainOptions, folder: Path | None, *, first_step: int) -> None:
        self._loggers: list[tuple[MetricLogger, BestEffort]] = []
        if folder is None:
            return
        targets = {*options.report_targets}
        makers: dict[str, Callable[[], MetricLogger]] = {
            METRICS_NAME: lambda: JsonLines(
                folder / METRICS_NAME, first_step=first_step, batch_size=options.batch_size
            )
        }
        if targets & {"tensorboard", "all"}:
            makers["tensorboard"] = lambda: TensorBoard(
                folder / "tensorboard", first_step=first_step, measured=folder / METRICS_NAME
            )
        if targets & {"wandb", "all"}:
            makers["wandb"] = lambda: WeightsAndBiases(options, folder)
        for name, make in makers.items():
            with BestEffort(name):
                self._loggers.append((make(), BestEffort(name)))

    def each(self, write: Callable[[MetricLogger], None]) -> None:
        """Let each logger write something."""
        for logger, best_effort in self._loggers:
            with best_effort:
                write(logger)


class SkipLog:
    """`skipped.jsonl`: every sample and shard that a process of the run could not use.

    Args:
        folder: The run's folder, in which all processes share the file; None counts only.
        rank: This process.
        step: The step this launch starts at; rank 0 drops the lines of later ones.

    Attributes:
        step: The optimizer step that samples are being fetched for.
    """

    def __init__(self, folder: Path | None, *, rank: int, step: int) -> None:
        self.step = step
        self._path = None if folder is None else folder / SKIPPED_NAME
        self._rank = rank
        self._shards: set[tuple[str | None, str | None]] = set()
        self._num_new = 0
        self._best_effort = BestEffort(SKIPPED_NAME)
        if self._path is not None and rank == 0:
            with self._best_effort:
                kept = keep_lines_before(self._path, step)
                self._shards = {(e.get("shard"), e.get("reason")) for e in kept if not e.get("key")}

    def __call__(self, skip: Skip) -> None:
        """Take in one."""
        if not skip.key:
            # A bad shard is found anew by each launch and each phase.
            if (skip.shard, skip.reason) in self._shards:
                return
            self._shards.add((skip.shard, skip.reason))
        self._num_new += 1
        if self._path is not None:
            entry = {"step": self.step, "rank": self._rank, **vars(skip)}
            with self._best_effort:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                append_line(self._path, json.dumps(entry))

    def take_count(self) -> int:
        """Return how many came since the last call."""
        count, self._num_new = self._num_new, 0
        return count


def keep_lines_before(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines of a file that a resumed run is about to repeat, and what is no line.

    Args:
        path: JSON objects with a "step", one a line; it need not be there.
        step: The first step that is repeated.

    Returns:
        The lines that are left.

    Raises:
        OSError: If the file cannot be read or written; it is as it was.
    """
    kept, num_lines, num_odd = [], 0, 0
    for entry in read_json_lines(path):
        num_lines += 1
        if entry is None or not isinstance(entry.get("step"), (int, float)):
            num_odd += 1
        elif entry["step"] < step:
            kept.append(entry)
    if num_odd:
        _logger.warning("%s: dropped %s without a step", path, counted(num_odd, "line"))
    if len(kept) < num_lines:
        write_text(path, "".join(f"{json.dumps(entry)}\n" for entry in kept))
    return kept


class _AboveProgressBar(logging.Handler):
    """Writes lines to standard error without breaking a progress bar there."""

    def emit(self, record: logging.LogRecord) -> None:
        # OpenCLIP tells its steps through the root logger: a matter for the file.
        if record.name == "root" and record.levelno < logging.WARNING:
            return
        # Where nobody listens any more, there is nobody to tell.
        with suppress(OSError):
            tqdm.write(self.format(record), file=sys.stderr)


class _RunFile(WatchedFileHandler):
    """Writes lines to the run's file; where it cannot, it says so once, elsewhere.

    A file that was removed is begun anew.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self._effort = BestEffort(path.name)

    def emit(self, record: logging.LogRecord) -> None:
        with self._effort:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise error
        super().handleError(record)

    def close(self) -> None:
        # What could not be written is tried again.
        with suppress(OSError):
            super().close()


@contextmanager
def logging_to(options: TrainOptions, folder: Path | None) -> Iterator[None]:
    """Log to standard error, and to a file in the run's folder, in OpenCLIP's form.

    Threads that cannot write, such as TensorBoard's, end without a traceback meanwhile: whoever
    gave them something to write is told by an error of its own.

    Args:
        options: The run's; ranks other than 0 log errors alone, and a file with `--log-local`.
        folder: The run's folder, which is made; None for no file.
    """
    handlers: list[logging.Handler] = [_AboveProgressBar()]
    has_file = options.local_rank == 0 if options.log_local else options.rank == 0
    if folder is not None and has_file:
        with BestEffort(LOG_NAME):
            folder.mkdir(parents=True, exist_ok=True)
            name = f"out-{options.rank}" if options.log_local else LOG_NAME
            handlers.append(_RunFile(own_file(folder / name)))
    root = logging.getLogger()
    level_before, hook_before = root.level, threading.excepthook
    is_quiet = options.rank != 0 and len(handlers) == 1
    root.setLevel(logging.ERROR if is_quiet else logging.DEBUG if options.debug else logging.INFO)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    # A library that logs through the root logger before the run makes it print each line twice.
    others = [handler for handler in root.handlers if type(handler) is logging.StreamHandler]
    for other in others:
        root.removeHandler(other)
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_FORMAT, datefmt=_DATE_FORMAT))
        root.addHandler(handler)

    def on_thread_end(ended: threading.ExceptHookArgs) -> None:
        if not isinstance(ended.exc_value, OSError):
            hook_before(ended)

    threading.excepthook = on_thread_end
    try:
        yield
    finally:
        threading.excepthook = hook_before
        root.setLevel(level_before)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
        for other in others:
            root.addHandler(other)
