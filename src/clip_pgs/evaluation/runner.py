"""Evaluate one model over many data sets; one that fails does not stop the others.

What is done is kept by content: a result whose identity (a digest of weights, architecture,
transform, tokenizer, precision, task and data) is that of the present call is not computed again.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist

import clip_pgs
from clip_pgs.common import explained, one_sentence
from clip_pgs.evaluation.datasets import (
    CLASS_NAMES,
    TEMPLATES,
    DamagedDataError,
    EvalSet,
    ServerError,
    count_shards,
    has_folder,
    is_remote,
    local_files,
    read_metadata,
    require,
    server_versions,
)
from clip_pgs.evaluation.features import (
    RULES,
    WHOLE_FILE_BYTES,
    Encoder,
    NonFiniteFeaturesError,
    content_digest,
    files_fingerprint,
    tokenizer_description,
)
from clip_pgs.evaluation.models import LoadedModel, check_finite, weights_digest
from clip_pgs.evaluation.results import (
    CSV_NAME,
    DONE,
    FAILED,
    MISSING,
    Result,
    read_result,
    read_results,
    telling_once,
    write_csv,
    write_result,
)
from clip_pgs.evaluation.suites import SUITES, Scores, get_suite, is_listed
from clip_pgs.files import own_file
from clip_pgs.registry import own_code
from clip_pgs.tables import counted, duration

logger = logging.getLogger(__name__)

FEATURES_NAME = "features"
ERRORS_NAME = "errors.log"
# torchrun looks after its processes several times a second.
_LOST_SECONDS = 10
# Shards of a split that a server is asked about.
_MAX_COMPARED = 1000
_MAX_FILE_NAME = 220
_PACKAGES = ("open_clip_torch", "torch", "torchvision", "numpy", "pillow")


@dataclass(frozen=True)
class Ranks:
    """This process among those of a torchrun launch, which share data sets between them.

    Attributes:
        rank: Its number, from 0.
        world_size: How many there are.
        local_rank: Its number on this machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value on every rank, in their order, once all have come.

        Args:
            value: What pickle takes.
        """
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        try:
            dist.all_gather_object(values, value)
        except RuntimeError:
            # Where a process is gone, what started them asks the others to leave.
            time.sleep(_LOST_SECONDS)
            raise
        return values


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Join the processes that torchrun started, and leave them at the end.

    Yields:
        This process among them; the only one where there was no torchrun.

    Raises:
        ValueError: If the environment tells of processes, and not how to reach them.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Ranks()
        return
    # Ranks meet at the end alone, and the largest data set may take hours longer than the rest.
    with explained("the processes that WORLD_SIZE announces cannot be joined"):
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield Ranks(dist.get_rank(), world_size, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        dist.destroy_process_group()


@telling_once()
def evaluate(
    loaded: LoadedModel,
    eval_sets: Sequence[EvalSet],
    *,
    output: str | Path | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    amp: bool | None = None,
    force: bool = False,
    keep_features: bool = True,
    ranks: Ranks | None = None,
) -> list[Result]:
    """Score a model on data sets.

    A result in `output` of the same model and data is kept, whatever either was called, so that
    an interrupted evaluation continues where it stopped.

    Args:
        loaded: The model; it is scored where it is, in eval mode, and left in its own mode.
        eval_sets: From `load_suite`.
        output: Folder for the result files and `results.csv`, made if need be; None writes none.
            A set without a folder whose name no list of `configs/eval` has leaves no file.
        batch_size: Images per step, >= 1.
        workers: Processes that read images; None takes up to 4.
        amp: Whether to use half precision; None means on CUDA only.
        force: Whether to redo what is done.
        keep_features: Whether to keep image features in files, in `output`/features.
        ranks: Processes that share the data sets. Each calls this function with its own copy of
            the model and gets the results of all.

    Returns:
        One result per data set, in the same order, its `status` "done", "missing" or "failed".

    Raises:
        ValueError: If weights or features are not finite, an option is out of its range, or the
            file of a result holds that of another data set, whose name differs in its signs.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    workers = min(4, os.cpu_count() or 1) if workers is None else workers
    if workers < 0:
        raise ValueError(f"workers must be >= 0, got {workers}")
    check_finite(loaded.model, name=loaded.source)
    ranks = ranks or Ranks()
    folder = None if output is None else Path(output)
    on_cuda = next(loaded.model.parameters()).is_cuda
    encoder = Encoder(
        loaded,
        batch_size=batch_size,
        workers=workers,
        amp=on_cuda if amp is None else amp,
        folder=folder / FEATURES_NAME if folder is not None and keep_features else None,
    )
    evaluation = _Evaluation(encoder, folder, is_forced=force)
    evaluation.check_names(eval_sets)
    share, complaint = evaluation.run(eval_sets, ranks)
    gathered = ranks.gather((share, complaint))
    if ranks.is_main:
        evaluation.write_csv()
    for _, complaint in gathered:
        if complaint is not None:
            raise ValueError(complaint)
    results = {number: result for share, _ in gathered for number, result in share.items()}
    return [results[number] for number in range(len(eval_sets))]


class _Evaluation:
    """The results of one model: what is kept of earlier calls, computed, and written.

    Args:
        encoder: Of the model.
        folder: Where the files are; None keeps none.
        is_forced: Whether to compute again what is there.
    """

    def __init__(self, encoder: Encoder, folder: Path | None, *, is_forced: bool) -> None:
        loaded = encoder.loaded
        self._encoder = encoder
        self._folder = folder
        self._is_forced = is_forced
        self._model_identity = [
            RULES,
            encoder.cache.fingerprint,
            encoder.cache.transform,
            encoder.amp,
        ]
        self._tokenizer = tokenizer_description(loaded.tokenizer)
        masking = loaded.masking
        self._ending = "" if masking is None else masking.file_ending
        if masking is not None:
            self._model_identity.append(masking.description())
        self._record: dict[str, Any] = {
            "model": loaded.name,
            "pretrained": loaded.source,
            "weights_digest": weights_digest(loaded.model),
            "inference_masking": "" if masking is None else masking.label,
            "flops_per_image": encoder.flops_per_image(),
            "training": loaded.training,
            "settings": {
                "device": str(encoder.device),
                "amp": encoder.amp,
                "batch_size": encoder.reading.batch_size,
            },
            "versions": {
                "clip-pgs": clip_pgs.__version__,
                **{package: version(package) for package in _PACKAGES},
            },
        }

    def check_names(self, eval_sets: Sequence[EvalSet]) -> None:
        """Refuse to replace the score of another data set: `a/b` and `a-b` have one file."""
        for eval_set in [] if self._is_forced else eval_sets:
            kept = self._read(eval_set)
            if kept is None or kept.status != DONE or kept.dataset == eval_set.name:
                continue
            # One folder under its other name is the same set.
            if os.path.realpath(kept.location) != os.path.realpath(eval_set.location):
                raise ValueError(
                    f"{self._path(self._folder or Path(), eval_set)} holds the result of "
                    f"{kept.dataset}, which that of {eval_set.name} would replace; name another "
                    "folder with --output, or replace it with --force"
                )

    def run(
        self, eval_sets: Sequence[EvalSet], ranks: Ranks
    ) -> tuple[dict[int, Result], str | None]:
        """Score this rank's data sets.

        Returns:
            The results by the data set's number, and why the model cannot be scored at all, or
            None.
        """
        sizes = sizes_to_read(eval_sets)
        numbers = divide(eval_sets, sizes, ranks.world_size)[ranks.rank]
        who = f"rank {ranks.rank} " if ranks.world_size > 1 else ""
        location, spent, num_read = "", 0.0, 0
        results: dict[int, Result] = {}
        for count, number in enumerate(numbers, start=1):
            eval_set = eval_sets[number]
            if eval_set.location != location:
                # Sets of one location follow each other; what they share is of no use afterwards.
                self._encoder.cache.forget()
                location = eval_set.location
            start = time.perf_counter()
            try:
                result, is_new = self._result_of(eval_set)
            except NonFiniteFeaturesError as error:
                # The other ranks wait for this one; it speaks up when they meet.
                return results, str(error)
            results[number] = result
            seconds = time.perf_counter() - start
            if is_new and result.status == DONE:
                spent, num_read = spent + seconds, num_read + (sizes[number] or 0)
            left = seconds_left(spent, num_read, [sizes[n] for n in numbers[count:]])
            outcome = _outcome(result, is_new, seconds, left)
            place = f"{who}[{count}/{len(numbers)}]"
            level = logging.INFO if result.status == DONE else logging.WARNING
            logger.log(level, "%s %s %s: %s", place, eval_set.suite, eval_set.name, outcome)
            if ranks.is_main and is_new:
                self.write_csv()
        return results, None

    def write_csv(self) -> None:
        """Gather every result of these weights, also those of earlier calls, in one table."""
        if self._folder is None or not self._folder.is_dir():
            return
        digest = self._record["weights_digest"]
        results = [r for r in read_results(self._folder) if r.weights_digest == digest]
        if not results:
            return
        try:
            write_csv(results, self._folder / CSV_NAME)
        except OSError as error:
            path = self._folder / CSV_NAME
            logger.warning("%s cannot be written: %s", path, one_sentence(error))

    def _result_of(self, eval_set: EvalSet) -> tuple[Result, bool]:
        """Return a data set's result, and whether it was computed now."""
        start = time.perf_counter()
        scores, status, reason, identity, data = Scores({}, 0), DONE, None, "", ""
        try:
            require(eval_set)
            identity = self._identity_of(eval_set)
            data = data_digest(eval_set) if identity else ""
            kept = None if self._is_forced else self._kept(eval_set, identity, data)
            if kept is not None:
                return kept, False
            returned = SUITES.get(eval_set.suite)(self._encoder, eval_set)
            if not isinstance(returned, Scores):
                raise TypeError(f"a suite must return Scores, got {type(returned).__name__}")
            scores = returned
        except NonFiniteFeaturesError:
            raise
        # A server that is silent today is a disk that is not mounted.
        except (FileNotFoundError, ServerError) as error:
            status, reason = MISSING, one_sentence(error)
        # Anything may be wrong with other people's files, and the rest must run. What asks the
        # process to leave is no Exception, and ends the evaluation.
        except Exception as error:
            is_told = isinstance(error, DamagedDataError)
            kind = "" if is_told else f"{type(error).__name__}: "
            status, reason = FAILED, f"{kind}{one_sentence(error)}"
            if not self._keep_traceback(eval_set) and not is_told:
                logger.warning("%s failed: %s", eval_set.name, traceback.format_exc())
        result = Result(
            **_origin(eval_set),
            status=status,
            metrics=scores.metrics,
            samples=scores.samples,
            error=reason,
            seconds=round(time.perf_counter() - start, 2),
            details={**scores.details, **_role(eval_set)},
            identity=identity,
            data_digest=data,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **self._record,
        )
        return self._write(result, eval_set), True

    def _identity_of(self, eval_set: EvalSet) -> str:
        """Return a digest of all that a result depends on, but names and paths; "" if unknown."""
        tokenizer = self._tokenizer if get_suite(eval_set.suite).needs_text else ""
        if self._encoder.cache.transform is None or tokenizer is None:
            return ""
        data = data_identity(eval_set)
        if data is None:
            return ""
        parts = [*self._model_identity, tokenizer, eval_set.task, eval_set.splits, data]
        return content_digest(parts)

    def _kept(self, eval_set: EvalSet, identity: str, data: str) -> Result | None:
        """Return the result of an earlier call under its present name, if its content is equal."""
        kept = self._read(eval_set)
        if kept is None or kept.status != DONE or not identity or kept.identity != identity:
            return None
        details = {key: value for key, value in kept.details.items() if key != "is_reference"}
        present = replace(
            kept,
            **_origin(eval_set),
            **{name: self._record[name] for name in ("model", "pretrained")},
            details={**details, **_role(eval_set)},
            data_digest=data,
            flops_per_image=self._record["flops_per_image"] or kept.flops_per_image,
            training=self._record["training"] or kept.training,
        )
        return kept if present == kept else self._write(present, eval_set)

    def _write(self, result: Result, eval_set: EvalSet) -> Result:
        if self._folder is None:
            return result
        earlier, path = self._read(eval_set), self._path(self._folder, eval_set)
        aside = path.with_name(f"{path.stem}@unscored.json")
        is_unknown = earlier is None and not has_folder(eval_set.location)
        if result.status == MISSING and is_unknown and not is_listed(eval_set):
            # The name may be mistyped; reports would call it missing for good.
            return result
        if result.status != DONE and earlier is not None and earlier.status == DONE:
            # A disk that is not mounted today, or a GPU that is full, takes no number away.
            if earlier.weights_digest == result.weights_digest:
                return result
            # Nor do other weights; reports tell that these have none.
            path = aside
        try:
            write_result(result, path)
            if path != aside:
                aside.unlink(missing_ok=True)
        except OSError as error:
            reason = f"cannot write the result: {error}"
            return replace(result, status=FAILED, error=reason)
        return result

    def _read(self, eval_set: EvalSet) -> Result | None:
        if self._folder is None:
            return None
        return read_result(self._path(self._folder, eval_set))

    def _path(self, folder: Path, eval_set: EvalSet) -> Path:
        ending = self._ending
        # File systems take 255 bytes, of which a result that is unfinished or aside needs some.
        if len(os.fsencode(eval_set.file_stem + ending)) > _MAX_FILE_NAME:
            ending = f"@{content_digest(ending)[:16]}"
        return folder / f"{eval_set.file_stem}{ending}.json"

    def _keep_traceback(self, eval_set: EvalSet) -> bool:
        """Add the traceback to a file; return whether that could be done."""
        if self._folder is None:
            return False
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = own_file(self._folder / ERRORS_NAME)
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{eval_set.suite} {eval_set.name}\n{traceback.format_exc()}\n")
        except OSError:
            return False
        return True


def data_identity(eval_set: EvalSet) -> list[Any] | None:
    """Return what tells the content of a data set from another, wherever it lies.

    Of one on a server it is the address, the small files, and what the server tells of the shards.
    The code of a suite of one's own goes with it, since it says what is read.

    Returns:
        Plain types; None for a server that tells nothing of a shard.

    Raises:
        OSError: If a file cannot be read.
    """
    location, code = eval_set.location, own_code(SUITES.get(eval_set.suite).__module__)
    own = [code] if code else []
    if not is_remote(location):
        return [files_fingerprint(Path(location), local_files(eval_set)), *own]
    counts = {split: count_shards(location, split) for split in eval_set.splits}
    shards = [
        f"{split}/{number}.tar"
        for split, count in counts.items()
        for number in range(min(count, _MAX_COMPARED))
    ]
    versions = server_versions(location, shards)
    if len(versions) < len(shards) or not all(map(any, versions)):
        return None
    texts = [read_metadata(location, name) for name in (CLASS_NAMES, TEMPLATES)]
    return [location, *texts, counts, versions, *own]


def data_digest(eval_set: EvalSet) -> str:
    """Return a digest of a data set's files that tells other data from a copy on another machine.

    Returns:
        64 hexadecimal digits; "" for a set on a server, and for one with a file of which the time
        of its last change stands for its bytes.

    Raises:
        OSError: If a file cannot be read.
    """
    paths = local_files(eval_set)
    if not paths or any(path.stat().st_size > WHOLE_FILE_BYTES for path in paths):
        return ""
    return files_fingerprint(Path(eval_set.location), paths)


def _origin(eval_set: EvalSet) -> dict[str, Any]:
    names = ("suite", "task", "location")
    return {"dataset": eval_set.name, **{name: getattr(eval_set, name) for name in names}}


def _role(eval_set: EvalSet) -> dict[str, bool]:
    return {"is_reference": True} if eval_set.is_reference else {}


def _outcome(result: Result, is_new: bool, seconds: float, left: float | None) -> str:
    if result.status != DONE:
        return f"{result.status}: {result.error}"
    if not is_new:
        return "done before"
    rate = result.samples / max(seconds, 1e-9)
    rest = "" if left is None else f", {duration(left)} left"
    return f"{counted(result.samples, 'sample')} in {seconds:.1f} s, {rate:.0f}/s{rest}"


def divide(
    eval_sets: Sequence[EvalSet], sizes: Sequence[int | None], world_size: int
) -> list[list[int]]:
    """Spread data sets over ranks, the largest first, each to the rank with the least so far.

    Suites that read the same folder go to one rank, one after the other, as they share its image
    features.

    Args:
        eval_sets: All data sets.
        sizes: Bytes that are read for each and for none before it; None where unknown.
        world_size: Number of ranks.

    Returns:
        The numbers of the data sets of each rank, in the order to score them. The same on every
        rank.
    """
    groups: dict[str, list[int]] = {}
    for number, eval_set in enumerate(eval_sets):
        groups.setdefault(eval_set.location, []).append(number)
    loads = {tuple(group): sum(sizes[n] or 0 for n in group) for group in groups.values()}
    shares: list[list[tuple[int, ...]]] = [[] for _ in range(world_size)]
    totals = [0] * world_size
    for group in sorted(loads, key=lambda group: (-loads[group], group)):
        # The number of groups decides among those whose size is not known.
        rank = min(range(world_size), key=lambda rank: (totals[rank], len(shares[rank]), rank))
        totals[rank] += loads[group]
        shares[rank].append(group)
    return [[number for group in sorted(share) for number in group] for share in shares]


def sizes_to_read(eval_sets: Sequence[EvalSet]) -> list[int | None]:
    """Return the bytes that are read for each data set and for none before it; None if unknown."""
    seen: set[Path] = set()
    sizes: list[int | None] = []
    for eval_set in eval_sets:
        if is_remote(eval_set.location):
            sizes.append(None)
            continue
        try:
            paths = set(local_files(eval_set)) - seen
            sizes.append(sum(path.stat().st_size for path in paths))
            seen |= paths
        # A data set that is not there, or damaged, is told when its turn comes.
        except (OSError, ValueError):
            sizes.append(0)
    return sizes


def seconds_left(spent: float, num_read: int, sizes: Sequence[int | None]) -> float | None:
    """Return how long the rest will take, or None where nothing tells.

    Args:
        spent: Seconds that what was scored by now took.
        num_read: Its bytes.
        sizes: Bytes of each data set that is left; None where unknown.
    """
    known = [size for size in sizes if size is not None]
    if not known or len(known) < len(sizes) or not num_read:
        return None
    return spent * sum(known) / num_read
