"""What a report is about: results, the runs behind them, and the models that the runs are.

Results lie in run folders, evaluation folders, single files and tables of them. A file that is
damaged is left out, and a warning names it.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, count, pairwise
from pathlib import Path
from typing import Any

from clip_pgs.common import BATCH_LOSS, measured_alike, one_sentence
from clip_pgs.evaluation.report.published import known_names
from clip_pgs.evaluation.report.training_facts import (
    SAME_DATA,
    TrainingFacts,
    are_newest,
    read_measurements,
    read_training_facts,
)
from clip_pgs.evaluation.results import (
    CSV_NAME,
    DONE,
    Result,
    amount,
    epoch_folders,
    folder_of_model,
    is_epoch_folder,
    is_run,
    is_table,
    read_csv,
    read_result,
    read_results,
    run_of_results,
)
from clip_pgs.files import (
    CHECKPOINTS_NAME,
    EVAL_NAME,
    EXPORT_NAME,
    MASKS_NAME,
    METRICS_NAME,
    absence,
    list_folder,
)
from clip_pgs.tables import counted

logger = logging.getLogger(__name__)

_Read = Callable[[Path], list[Result]]
# Of a mask picture, in pixels: eight images beside each other stay legible at it.
_PICTURE_WIDTH = 1200
# Why names that end alike are two sets.
_UNTOLD = "one of them has no data_digest, which would tell whether their data are equal"
# What announces the seed at the end of a name, and its number.
_SEED = re.compile(r"[\W_]*(seed)?[\W_]*\d*", re.IGNORECASE)


@dataclass(frozen=True)
class Run:
    """One model as it was evaluated: one set of weights, and one way to mask images or none.

    Attributes:
        name: Of the model; with the start of the digest where two models share a name, and with
            the mask that images were encoded through.
        results: A result per suite and data set.
        training: What is known of its training.
        epochs: Results of evaluations in training, by the number of completed epochs.
        measured: The lines of its `metrics.jsonl`.
        masks: What its masking kept of a few images after the last epoch drawn, as WebP; b"" where
            the run has no such picture.
    """

    name: str
    results: tuple[Result, ...]
    training: TrainingFacts
    epochs: dict[int, list[Result]] = field(default_factory=dict)
    measured: tuple[dict[str, Any], ...] = ()
    masks: bytes = b""

    def curve(self, name: str) -> list[tuple[float, float]]:
        """Return a measurement against the samples seen, where both are numbers.

        A training loss is the mean over the steps since the line before, which at the start of an
        epoch is one. Such lines are left out: those of less than half of the longest.
        """
        points, steps = [], [-1.0]
        for line in self.measured:
            x, y = amount(line.get("samples")), amount(line.get(name))
            if x is not None and y is not None:
                points.append((x, y))
                steps.append(amount(line.get("step")) or 0.0)
        if name != "loss":
            return points
        spans = [after - before for before, after in pairwise(steps)]
        longest = max(spans, default=0.0)
        return [point for point, span in zip(points, spans, strict=True) if 2 * span >= longest]

    @property
    def weights_digest(self) -> str:
        """SHA-256 of the weights."""
        return self.results[0].weights_digest

    @property
    def inference_masking(self) -> str:
        """The mask that images were encoded through; "" for whole images."""
        return self.results[0].inference_masking

    @property
    def flops_per_image(self) -> float | None:
        """Floating-point operations of encoding an image; None where no result tells."""
        return max(result.flops_per_image or 0 for result in self.results) or None


@dataclass(frozen=True)
class Model:
    """Runs with the same recipe and different seeds, masked alike at inference, or one run.

    Attributes:
        name: What the names of the runs have in common.
        runs: At least one.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def training(self) -> TrainingFacts:
        """What the runs have in common."""
        return self.runs[0].training

    @property
    def seeds(self) -> list[int]:
        """The seeds that are known."""
        return [run.training.seed for run in self.runs if run.training.seed is not None]

    @property
    def inference_masking(self) -> str:
        """The mask that images were encoded through; "" for whole images."""
        return self.runs[0].inference_masking

    def mean(self, fact: str) -> float | None:
        """Return the mean over the runs of a cost, such as "seconds"; None if unknown."""
        values = [
            run.flops_per_image if fact == "flops_per_image" else getattr(run.training, fact)
            for run in self.runs
        ]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None


def gather_runs(sources: Sequence[str | Path]) -> list[Run]:
    """Read results and what is known of the training behind them.

    Args:
        sources: Run folders (their `eval`), folders of result files, folders of such folders,
            result files (JSON) or tables (`results.csv`, also one alone in a folder). Where two
            hold a result of the same weights, masked alike, on the same data set, one that is done
            counts, and of those the later.

    Returns:
        One run per set of weights and mask at inference, in the order of the sources. What a run
        scored in training (`eval/epoch_N`) is no run of its own; the last epoch stands for a run
        that was not evaluated afterwards.

    Raises:
        ValueError: If a source does not exist, holds no result or cannot be read.
    """
    found: dict[tuple[str, str], dict[tuple[str, str], Result]] = {}
    folders: dict[tuple[str, str], Path] = {}
    holders: dict[tuple[str, str], dict[Path, None]] = {}
    # The first run whose newest weights these are, and what to call it.
    own: dict[tuple[str, str], tuple[Path, str]] = {}
    is_newest: dict[Path, bool] = {}
    # Each folder once, as warnings name what is damaged there.
    read = functools.cache(_read_results)
    for source in sources:
        for place, results in _read_source(Path(source), read):
            run, folder = run_of_results(place), place.resolve()
            if folder not in is_newest:
                told = next((result.training for result in results if result.training), {})
                is_newest[folder] = are_newest(place, run, told, read)
                if not Path(source).is_file():
                    tell_left_out(place, read(place), results[0].weights_digest)
            for result in results:
                by_set = found.setdefault(result.model_key, {})
                key = result.suite, result.dataset
                earlier = by_set.get(key, result)
                by_set[key] = max(result, earlier, key=_rank)
                if earlier.status == result.status == DONE and _scores(earlier) != _scores(result):
                    where = source if Path(source).is_file() else place
                    model = result.model + _through(result.inference_masking)
                    said = (str(where), model, result.dataset, result.suite)
                    logger.warning(
                        "%s has other scores of %s on %s (%s) than a source before it; those of %s "
                        "count",
                        *map(one_sentence, (*said, by_set[key].date or "an unknown date")),
                    )
                folders.setdefault(result.model_key, place)
                if run is not None:
                    holders.setdefault(result.model_key, {})[run] = None
                if run is not None and is_newest[folder]:
                    # A run that was copied or moved has the name of its folder.
                    is_export = Path(result.pretrained).name == EXPORT_NAME
                    name = run.name if is_export else result.model
                    own.setdefault(result.model_key, (run, name))
    for same in dict.fromkeys(tuple(runs) for runs in holders.values() if len(runs) > 1):
        shown = one_sentence(" and ".join(map(str, same)))
        logger.warning("%s have results of the same weights: they are one run here", shown)
    places = {key: run_of_results(folder) for key, folder in folders.items()}
    names = {key: next(iter(by_set.values())).model for key, by_set in found.items()}
    for key, (run, name) in own.items():
        places[key], names[key] = run, name
    # As the runs of a study: its seeds have one name in the folder of every arm, which tells the
    # seed alone.
    unclear = {*_alike(names), *(key for key, name in names.items() if _SEED.fullmatch(name))}
    for key in unclear:
        if (run := places[key]) is not None and run.name == names[key]:
            names[key] = f"{run.parent.name}/{run.name}"
    for key in _alike(names):
        names[key] += f" @{key[0][:6]}"
    names = {key: name + _through(key[1]) for key, name in names.items()}
    shared = _shared_names(found.values())
    found = {
        key: {(r.suite, r.dataset): r for r in _renamed(by_set.values(), shared)}
        for key, by_set in found.items()
    }
    _tell_other_data(found, names)
    runs = []
    for key, by_set in found.items():
        mask, first, run = key[1], next(iter(by_set.values())), places[key]
        # Other checkpoints of a run have results elsewhere; the curve belongs to the run itself.
        epochs = {} if run is None else _read_epochs(run, read, mask)
        epochs = {epoch: _renamed(results, shared) for epoch, results in epochs.items()}
        epochs = _scores_of_latest_data(epochs, names[key])
        told = next((result.training for result in by_set.values() if result.training), {})
        training = read_training_facts(run, first.pretrained, digest=key[0], told=told)
        lines = [] if run is None else read_measurements(run / METRICS_NAME)
        measured = _losses_of_latest_data(lines, names[key])
        masks = b"" if run is None else _read_masks(run / MASKS_NAME)
        runs.append(Run(names[key], tuple(by_set.values()), training, epochs, measured, masks))
    return runs


def _read_results(folder: Path) -> list[Result]:
    """Return the results of a folder, those of its table where it holds no others."""
    results, table = read_results(folder), folder / CSV_NAME
    try:
        return results or (read_csv(table) if is_table(table) else [])
    except (OSError, ValueError) as error:
        logger.warning("left out %s: %s", table, one_sentence(error))
        return []


def _rank(result: Result) -> tuple[bool, str, bool]:
    """Return what decides which of two results of one model on one set counts: the larger.

    What is done counts, also where a later try failed; then the later, and of one the file, not
    the row of a table, which tells less.
    """
    tells_all = bool(result.details or result.data_digest or result.training)
    return result.status == DONE, result.date, tells_all


def _scores(result: Result) -> dict[str, float | None]:
    """Return the metrics that have a value: a table has none of the others."""
    return {name: value for name, value in result.metrics.items() if value is not None}


@dataclass
class _Called:
    """What models call one data set, and what tells it from others whose names end alike."""

    names: list[str]
    digests: set[str]
    counts: set[int]
    models: set[tuple[str, str]]


def _shared_names(
    models: Iterable[Mapping[tuple[str, str], Result]],
) -> dict[tuple[str, str], str]:
    """Return one name for each data set that models call otherwise, by suite and full name.

    Names that end alike are of one set where their data are equal. A warning tells of others of
    which no model has both: the models are not compared on them.
    """
    found: dict[tuple[str, str], dict[str, _Called]] = {}
    for by_set in models:
        for (suite, dataset), result in by_set.items():
            if result.status == DONE:
                alike = found.setdefault((suite, dataset.rsplit("/", 1)[-1]), {})
                called = alike.setdefault(dataset, _Called([dataset], set(), set(), set()))
                called.digests |= {result.data_digest} - {""}
                called.counts.add(result.samples)
                called.models.add(result.model_key)
    shared: dict[tuple[str, str], str] = {}
    apart: dict[str, list[str]] = {}
    for (suite, last), alike in found.items():
        sets: list[_Called] = []
        for called in alike.values():
            for same in [each for each in sets if each.digests & called.digests]:
                sets.remove(same)
                called = _Called(
                    [*same.names, *called.names],
                    same.digests | called.digests,
                    same.counts | called.counts,
                    same.models | called.models,
                )
            sets.append(called)
        for called in sets:
            name = next((n for n in known_names(last) if n in called.names), called.names[0])
            shared |= {(suite, other): name for other in called.names}
        for one, other in combinations(sets, 2):
            if one.models.isdisjoint(other.models):
                is_known = (one.digests and other.digests) or one.counts.isdisjoint(other.counts)
                reason = "their data differ" if is_known else _UNTOLD
                names = [shared[suite, called.names[0]] for called in (one, other)]
                apart.setdefault(reason, []).append(f"{' and '.join(names)} ({suite})")
    for reason, pairs in apart.items():
        logger.warning("these are two sets, as %s: %s", reason, one_sentence("; ".join(pairs)))
    return shared


def _renamed(results: Iterable[Result], shared: Mapping[tuple[str, str], str]) -> list[Result]:
    """Return a model's results under shared names; a second copy of a set keeps its own."""
    by_name: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        name = shared.get((result.suite, result.dataset), result.dataset)
        by_name.setdefault((result.suite, name), []).append(result)
    renamed = []
    for (_, name), same in by_name.items():
        done = [result for result in same if result.status == DONE] or same[:1]
        first = next((result for result in done if result.dataset == name), done[0])
        renamed += [replace(r, dataset=name) if r is first else r for r in done]
    return renamed


def _tell_other_data(
    models: Mapping[tuple[str, str], Mapping[tuple[str, str], Result]],
    names: Mapping[tuple[str, str], str],
) -> None:
    """Warn of sets on which models were scored with other data under one name."""
    done: dict[tuple[str, str], list[Result]] = {}
    for by_set in models.values():
        for key, result in by_set.items():
            if result.status == DONE:
                done.setdefault(key, []).append(result)
    for key, results in done.items():
        suite, dataset = map(one_sentence, key)
        counts = {result.samples for result in results}
        digests = {result.data_digest for result in results if result.data_digest}
        if len(counts) > 1:
            told = " and ".join(f"{count:,}" for count in sorted(counts))
            said = "%s (%s) was scored with %s samples: those are not the same data"
            logger.warning(said, dataset, suite, told)
        elif len(digests) > 1:
            models_of = {r.data_digest: names[r.model_key] for r in results if r.data_digest}
            said = "%s (%s) was scored on other data for %s than for %s: their files differ"
            first, *others = map(one_sentence, models_of.values())
            logger.warning(said, dataset, suite, " and ".join(others), first)


def _scores_of_latest_data(
    epochs: Mapping[int, list[Result]], name: str
) -> dict[int, list[Result]]:
    """Return a run's scores in training without those on other data than it was scored on last.

    Args:
        epochs: Results by the number of completed epochs, in order.
        name: Of the run.
    """
    latest = {
        _place_of(result): result
        for results in epochs.values()
        for result in results
        if result.status == DONE
    }
    kept: dict[int, list[Result]] = {}
    others: dict[str, int] = {}
    for epoch, results in epochs.items():
        for result in results:
            if result.status != DONE or _is_same_data(result, latest[_place_of(result)]):
                kept.setdefault(epoch, []).append(result)
            else:
                others[f"{result.dataset} ({result.suite})"] = epoch
    if others:
        logger.warning(
            "%s was scored in training on other data of %s until epoch %d than last; its curves "
            "leave those scores out",
            *map(one_sentence, (name, ", ".join(others))),
            max(others.values()),
        )
    return kept


def _is_same_data(one: Result, other: Result) -> bool:
    digests = {result.data_digest for result in (one, other) if result.data_digest}
    return one.samples == other.samples and len(digests) < 2


def _losses_of_latest_data(
    measured: Sequence[dict[str, Any]], name: str
) -> tuple[dict[str, Any], ...]:
    """Return a run's lines without validation losses that its last cannot be compared with."""
    losses = [line for line in measured if amount(line.get(BATCH_LOSS)) is not None]
    others = [line for line in losses if not measured_alike(BATCH_LOSS, line, losses[-1])]
    if others:
        logger.warning(
            "%s had other validation data, or batches of another size, for %s than last; its "
            "curve of the validation loss leaves those out",
            one_sentence(name),
            counted(len(others), "validation"),
        )
    left_out = set(map(id, others))
    return tuple(line for line in measured if id(line) not in left_out)


def _alike(names: Mapping[tuple[str, str], str]) -> list[tuple[str, str]]:
    """Return the models, by weights and mask, whose name those of other weights have, too."""
    weights: dict[str, set[str]] = {}
    for (digest, _), name in names.items():
        weights.setdefault(name, set()).add(digest)
    return [key for key, name in names.items() if len(weights[name]) > 1]


def group_by_seed(runs: Sequence[Run]) -> list[Model]:
    """Gather runs that differ only in their seed; a run of an unknown recipe stays alone.

    Two runs of the same recipe and the same seed are a repetition and say nothing about the
    spread over seeds, so that they stay apart from one another.

    Args:
        runs: In the order to show them.
    """
    groups: list[list[Run]] = []
    for run in runs:
        training, mask = run.training, run.inference_masking
        fitting = [
            group
            for group in groups
            if mask == group[0].inference_masking
            if all(training.is_seed_of(other.training) for other in group)
        ]
        if fitting:
            fitting[0].append(run)
        else:
            groups.append([run])
    names = []
    for group in groups:
        mask = _through(group[0].inference_masking)
        names.append(_common_name([run.name.removesuffix(mask) for run in group]) + mask)
    # Scores and looks are found by the name of a model, which no other has.
    apart: list[str] = []
    for name in names:
        numbered = (f"{name} ({number})" for number in count(2))
        free = (other for other in numbered if other not in [*names, *apart])
        apart.append(next(free) if name in apart else name)
    return [Model(name, tuple(group)) for name, group in zip(apart, groups, strict=True)]


def _read_source(source: Path, read: _Read) -> list[tuple[Path, list[Result]]]:
    """Return the results of a source, with the folder that each part lies in."""
    if source.is_file():
        if source.suffix == ".csv":
            results = read_csv(source)
        else:
            result = read_result(source)
            results = [] if result is None else [result]
        if not results:
            hint = _elsewhere(source, read)
            raise ValueError(f"{source} is no result of an evaluation{hint}")
        return [(source.parent, results)]
    if not source.is_dir():
        hint = _elsewhere(source, read)
        raise ValueError(f"there are no results at {source}: it {absence(source)}{hint}")
    inside = sorted(path for path in source.iterdir() if path.is_dir() and path.name != EVAL_NAME)
    named = [folder for place in (source, *inside) for folder in (place, place / EVAL_NAME)]
    # os.path: what lies in a folder that may not be read is none.
    folders = list(filter(os.path.isdir, named))
    parts = [
        (folder, _read_folder(folder, read))
        for folder in folders
        if folder == source or not is_epoch_folder(folder)
    ]
    parts = [(folder, results) for folder, results in parts if results]
    if not parts and (source / CSV_NAME).is_file():
        return _read_source(source / CSV_NAME, read)
    if not parts:
        # As in a study, whose runs have their results in folders of other names.
        for run in sorted([*inside, *source.glob("*/*")]):
            if is_run(run) and any(map(read, filter(os.path.isdir, list_folder(run)))):
                raise ValueError(f"{source} holds no results itself; name its runs, such as {run}")
        # Those that may not be read were left out.
        for folder in folders:
            if folder.name == EVAL_NAME:
                list_folder(folder)
        hint = _elsewhere(source, read) or "; evaluate first, `clip-pgs test RUN`"
        raise ValueError(f"{source} holds no results{hint}")
    return parts


def _elsewhere(source: Path, read: _Read) -> str:
    """Say in which other folder the results of a model lie that is no run; "" where they do not."""
    folder = folder_of_model(str(source))
    return f"; those of the model are in {folder}, name that folder" if read(folder) else ""


def _read_folder(folder: Path, read: _Read) -> list[Result]:
    if is_epoch_folder(folder):
        return _of_epoch(folder, read)
    results = read(folder)
    run = run_of_results(folder)
    if run is None:
        return results
    epochs = _read_epochs(run, read) if folder.resolve() == run / EVAL_NAME else {}
    last = epochs[max(epochs)] if epochs else []
    if not results:
        return last
    # A run that was trained anew leaves the results of its old weights until they are redone.
    scored = {result.weights_digest for result in (*results, *last) if result.status == DONE}
    digest = max(results, key=lambda r: (r.weights_digest in scored, r.date)).weights_digest
    own = [result for result in results if result.weights_digest == digest]
    done = {_place_of(result) for result in own if result.status == DONE}
    # After them, what these weights scored at the end of training and in no later evaluation.
    return own + [r for r in last if r.weights_digest == digest and _place_of(r) not in done]


def _place_of(result: Result) -> tuple[str, str, str]:
    return result.suite, result.dataset, result.inference_masking


def tell_left_out(place: Path, found: Iterable[Result], digest: str) -> None:
    """Warn of scores in a run that a report leaves out, as of weights before it trained on.

    Args:
        place: Where the results lie.
        found: All that lie there.
        digest: Of the weights that the report is about.
    """
    others: dict[str, list[Result]] = {}
    for result in [] if run_of_results(place) is None else found:
        if result.status == DONE and result.weights_digest != digest:
            others.setdefault(result.inference_masking, []).append(result)
    parts = []
    for mask, results in others.items():
        sets = dict.fromkeys(result.dataset for result in results)
        named = " and ".join(sets) if len(sets) < 3 else counted(len(sets), "data set")
        through = f" through {mask}" if mask else ""
        suites = dict.fromkeys(result.suite for result in results)
        suite = ["--suite", *suites] if len(suites) == 1 else []
        run = str(place if is_run(place) else place.parent)
        command = shlex.join(["clip-pgs", "test", run, *suite, *_mask_flags(mask)])
        them = "it" if len(sets) == 1 else "them"
        parts.append(f"{named}{through} (`{command}` {SAME_DATA} scores {them} anew)")
    if parts:
        logger.warning(
            "%s holds scores of other weights than its latest, which the report leaves out: %s",
            *map(one_sentence, (str(place), "; ".join(parts))),
        )


def _mask_flags(mask: str) -> list[str]:
    """Return the options of `clip-pgs test` for a mask as results name it; none for ""."""
    if not mask or mask.endswith(" as trained"):
        return ["--inference-masking", "run"] if mask else []
    named, *pairs = re.split(r" (?=\w+=)", mask)
    name, _, ratio = named.partition(" ")
    lowest, _, highest = ratio.rpartition("-")
    flags = ["--inference-masking", name]
    flags += ["--inference-mask-ratio", highest] if highest else []
    options = [f"mask_ratio_min={lowest}"] if lowest else []
    for pair in pairs:
        if pair.startswith("merge="):
            flags += ["--inference-merge", pair.removeprefix("merge=")]
        elif pair == "merge_counts=True":
            flags.append("--inference-merge-counts")
        else:
            options.append(pair)
    return [*flags, *(["--inference-masking-option", *options] if options else [])]


def _read_epochs(run: Path, read: _Read, mask: str | None = None) -> dict[int, list[Result]]:
    """Return what a run scored in training, in the order of the epochs, under the run's name.

    Args:
        run: Its folder.
        read: Reads the results of a folder.
        mask: That images were encoded through, "" for whole ones; None takes all.
    """
    epochs = {
        epoch: [
            replace(result, model=run.name)
            for result in _of_epoch(folder, read)
            if mask in (None, result.inference_masking)
        ]
        for epoch, folder in epoch_folders(run).items()
    }
    return {epoch: results for epoch, results in epochs.items() if results}


def _of_epoch(folder: Path, read: _Read) -> list[Result]:
    """Return what a run scored after an epoch, with the checkpoint of it where there is one."""
    checkpoint = folder.parent.parent / CHECKPOINTS_NAME / f"{folder.name}.pt"
    results = read(folder)
    if not checkpoint.is_file():
        return results
    return [replace(result, pretrained=str(checkpoint)) for result in results]


def _read_masks(folder: Path) -> bytes:
    """Return the newest picture of a run's masks, made small."""
    from clip_pgs.data.decoding import UnreadableImageError, open_image, to_rgb

    found = {
        path: re.fullmatch(r"epoch_(\d{1,9})\.png", path.name) for path in folder.glob("*.png")
    }
    pictures = {path: int(match[1]) for path, match in found.items() if match}
    if not pictures:
        return b""
    newest = max(pictures, key=lambda path: pictures[path])
    try:
        picture = to_rgb(open_image(newest))
    except UnreadableImageError as error:
        logger.warning("left out %s: it cannot be read (%s)", newest, one_sentence(error))
        return b""
    picture.thumbnail((_PICTURE_WIDTH, _PICTURE_WIDTH))
    content = io.BytesIO()
    picture.save(content, "WEBP", quality=80)
    return content.getvalue()


def _through(mask: str) -> str:
    """Return what follows a model's name where images are encoded through a mask."""
    return f", through {mask}" if mask else ""


def _common_name(names: Sequence[str]) -> str:
    """Return what names begin with, without what announces the seed: "pgs" of "pgs_seed3"."""
    if len(names) == 1:
        return names[0]
    start = names[0]
    while not all(name.startswith(start) for name in names):
        start = start[:-1]
    rests = [name[len(start) :] for name in names]
    if all(rest.isdigit() or not rest for rest in rests):
        # Of seeds 10 and 11 the names share a digit.
        start = start.rstrip("0123456789")
    start = re.sub(r"[\W_]*(seed)?[\W_]*$", "", start, flags=re.IGNORECASE)
    # A mean is that of no single run.
    return start or f"{names[0]} and {counted(len(names) - 1, 'other')}"
