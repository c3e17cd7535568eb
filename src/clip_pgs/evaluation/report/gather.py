"""Find results: in run folders, evaluation folders, single result files and tables of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from clip_pgs.common import EVAL_NAME
from clip_pgs.evaluation.report.training_facts import TrainingFacts, read_training_facts
from clip_pgs.evaluation.results import (
    Result,
    epoch_folders,
    is_epoch_folder,
    read_csv,
    read_result,
    read_results,
    run_of_results,
    run_of_weights,
)


@dataclass(frozen=True)
class Run:
    """One model as it was evaluated: one set of weights.

    Attributes:
        name: Of the model; with the start of the digest where two models share a name.
        results: A result per suite and data set.
        training: What is known of its training.
        epochs: Results of evaluations in training, by the number of completed epochs.
    """

    name: str
    results: tuple[Result, ...]
    training: TrainingFacts
    epochs: dict[int, list[Result]] = field(default_factory=dict)

    @property
    def weights_digest(self) -> str:
        """SHA-256 of the weights."""
        return self.results[0].weights_digest


def gather_runs(sources: Sequence[str | Path]) -> list[Run]:
    """Read results and what is known of the training behind them.

    Args:
        sources: Run folders (their `eval`), folders of result files, folders of such folders,
            result files (JSON) or tables (`results.csv`). Where two hold a result of the same
            weights on the same data set, the later date counts.

    Returns:
        One run per set of weights, in the order of the sources. What a run scored in training
        (`eval/epoch_N`) is no run of its own; the last epoch stands for a run that was not
        evaluated afterwards.

    Raises:
        ValueError: If a source does not exist, holds no result or cannot be read.
    """
    found: dict[str, dict[tuple[str, str], Result]] = {}
    folders: dict[str, Path] = {}
    for source in sources:
        for place, results in _read_source(Path(source)):
            for result in results:
                by_set = found.setdefault(result.weights_digest, {})
                earlier = by_set.get((result.suite, result.dataset))
                if earlier is None or earlier.date <= result.date:
                    by_set[result.suite, result.dataset] = result
                folders.setdefault(result.weights_digest, place)
    names = [next(iter(by_set.values())).model for by_set in found.values()]
    runs = []
    for digest, by_set in found.items():
        first = next(iter(by_set.values()))
        name = first.model if names.count(first.model) == 1 else f"{first.model} @{digest[:6]}"
        run = run_of_results(folders[digest])
        training = read_training_facts(run or run_of_weights(first.pretrained), first.pretrained)
        # Other checkpoints of a run have results elsewhere; the curve belongs to the run itself.
        epochs = {} if run is None else _read_epochs(run)
        runs.append(Run(name, tuple(by_set.values()), training, epochs))
    return runs


def _read_source(source: Path) -> list[tuple[Path, list[Result]]]:
    """Return the results of a source, with the folder that each part lies in."""
    if source.is_file():
        results = read_csv(source) if source.suffix == ".csv" else _read_json(source)
        return [(source.parent, results)]
    if not source.is_dir():
        raise ValueError(f"there are no results at {source}: it does not exist")
    inside = sorted(path for path in source.iterdir() if path.is_dir() and path.name != EVAL_NAME)
    places = [
        source,
        source / EVAL_NAME,
        *(place for path in inside for place in (path, path / EVAL_NAME)),
    ]
    parts = [
        (place, _read_folder(place))
        for place in places
        if place.is_dir() and (place == source or not is_epoch_folder(place))
    ]
    parts = [(place, results) for place, results in parts if results]
    if not parts:
        raise ValueError(f"{source} holds no results; evaluate first, `bash clip-test.sh RUN`")
    return parts


def _read_epochs(run: Path) -> dict[int, list[Result]]:
    """Return what a run scored in training, in the order of the epochs, under the run's name."""
    epochs = {epoch: _read_files(folder) for epoch, folder in epoch_folders(run).items()}
    return {
        epoch: [replace(result, model=run.name) for result in results]
        for epoch, results in epochs.items()
        if results
    }


def _read_files(folder: Path) -> list[Result]:
    try:
        return read_results(folder)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder} holds a damaged result file: {error}") from error


def _read_folder(folder: Path) -> list[Result]:
    results = _read_files(folder)
    run = run_of_results(folder)
    if run is None or is_epoch_folder(folder):
        return results
    if not results and folder.resolve() == run / EVAL_NAME:
        epochs = _read_epochs(run)
        return epochs[max(epochs)] if epochs else []
    # A run that was trained anew leaves the results of its old weights until they are redone.
    newest = max(results, key=lambda result: result.date, default=None)
    return [r for r in results if newest is not None and r.weights_digest == newest.weights_digest]


def _read_json(path: Path) -> list[Result]:
    try:
        result = read_result(path)
    except TypeError:
        result = None
    if result is None:
        raise ValueError(f"{path} is no result of an evaluation")
    return [result]
