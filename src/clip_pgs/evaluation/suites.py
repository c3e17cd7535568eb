"""What is evaluated: suites, and the lists of data sets they run over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clip_pgs.evaluation.datasets import EvalSet, dataset_type, is_template, locate


@dataclass(frozen=True)
class Suite:
    """A kind of evaluation.

    Attributes:
        name: What users type after `--suite`.
        task: clip_benchmark's name of the task.
        accepts: Says whether a data set of a declared type belongs to the suite.
    """

    name: str
    task: str
    accepts: Callable[[str], bool]


SUITES = {
    suite.name: suite
    for suite in (
        Suite("zeroshot-classification", "zeroshot_classification", lambda t: t != "retrieval"),
        Suite("zeroshot-retrieval", "zeroshot_retrieval", lambda t: t == "retrieval"),
    )
}

_DEFAULT_ROOTS = {"demo": "data/demo/eval", "paper": "data/eval"}
_RETRIEVAL_NAMES = ("mscoco_captions", "flickr8k", "flickr30k")


def load_suite(
    name: str = "all", *, datasets: str = "demo", data_root: str | None = None
) -> list[EvalSet]:
    """Return the data sets that a suite evaluates, present or not.

    Args:
        name: A key of `SUITES`, or "all".
        datasets: "demo" or "paper", the lists in `configs/eval`; or the path of a list of your
            own, with one data set per line, from which each suite takes the sets of its type.
        data_root: Where the data sets are: a folder, a template with `{dataset}` or
            `{dataset_cleaned}`, or "hub". By default `data/demo/eval` for "demo", `data/eval`
            for "paper", and the working directory for a list of your own.

    Raises:
        ValueError: If suite, list or data root is unknown, a list is empty or names a data set
            twice, or none of its data sets belongs to the suite.
    """
    if name != "all" and name not in SUITES:
        raise ValueError(f"unknown suite {name!r}; choose from {', '.join(SUITES)}, all")
    suites = list(SUITES.values()) if name == "all" else [SUITES[name]]
    if data_root is None:
        data_root = _DEFAULT_ROOTS.get(datasets, ".")
    elif not (data_root == "hub" or is_template(data_root) or Path(data_root).is_dir()):
        raise ValueError(f"data root {data_root} is not a folder")

    if datasets in _DEFAULT_ROOTS:
        eval_sets = [
            _eval_set(line, data_root, suite)
            for suite in suites
            for line in read_list(_lists_folder() / f"{suite.task}_{datasets}.txt")
        ]
        return _without_clash(eval_sets, datasets)
    if not Path(datasets).is_file():
        raise ValueError(f"unknown data set list {datasets!r}; choose demo, paper or a list file")
    lines = read_list(Path(datasets))
    eval_sets = [
        _eval_set(line, data_root, suite)
        for suite in suites
        for line in lines
        if suite.accepts(_type_of(line, data_root))
    ]
    if not eval_sets:
        raise ValueError(f"{datasets} names no data set of the suite {name}")
    return _without_clash(eval_sets, datasets)


def read_list(path: Path) -> list[str]:
    """Read a list: one data set per line, `#` starts a comment.

    Args:
        path: The list file.

    Raises:
        ValueError: If the list is empty.
    """
    lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    names = [line for line in lines if line]
    if not names:
        raise ValueError(f"{path} names no data set")
    return names


def _without_clash(eval_sets: list[EvalSet], datasets: str) -> list[EvalSet]:
    by_stem: dict[str, EvalSet] = {}
    for eval_set in eval_sets:
        other = by_stem.setdefault(eval_set.file_stem, eval_set)
        if other is not eval_set:
            raise ValueError(f"{datasets} has two data sets named {eval_set.name}")
    return eval_sets


def _eval_set(line: str, data_root: str, suite: Suite) -> EvalSet:
    name, location = locate(line, data_root)
    return EvalSet(name=name, location=location, suite=suite.name, task=suite.task)


def _type_of(line: str, data_root: str) -> str:
    name, location = locate(line, data_root)
    # A set that is not there is reported under the suite that its name suggests.
    by_name = "retrieval" if name in _RETRIEVAL_NAMES else "classification"
    return dataset_type(location) or by_name


def _lists_folder() -> Path:
    package = Path(__file__).resolve().parents[1]
    # An installed package carries the lists; a clone keeps them at its top.
    installed = package / "configs" / "eval"
    return installed if installed.is_dir() else package.parents[1] / "configs" / "eval"
