"""What is evaluated: suites, and the lists of data sets they run over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clip_pgs.evaluation.datasets.datasets import (
    PAIRS_TYPE,
    DamagedDataError,
    EvalSet,
    declared_type,
    is_caption_pairs,
    is_template,
    locate,
)


@dataclass(frozen=True)
class Suite:
    """A kind of evaluation.

    Attributes:
        name: What users type after `--suite`.
        task: clip_benchmark's name of the task.
        types: Types of data sets that it can evaluate.
        takes_by_type: Whether `--suite all` gives it the sets of these types in a list of one's
            own. The other suites take only those that are marked for them.
    """

    name: str
    task: str
    types: tuple[str, ...]
    takes_by_type: bool = True

    @property
    def list_stem(self) -> str:
        """Name of its lists in `configs/eval`, without `_demo.txt` or `_paper.txt`."""
        return self.name.replace("-", "_")


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "zeroshot-classification", "zeroshot_classification", ("classification", "multilabel")
        ),
        Suite("zeroshot-retrieval", "zeroshot_retrieval", ("retrieval",)),
        Suite("linear-probe", "linear_probe", ("classification",), takes_by_type=False),
        Suite("robustness", "zeroshot_classification", ("classification",), takes_by_type=False),
        Suite("compositionality", "image_caption_selection", (PAIRS_TYPE,)),
    )
}

DEFAULT_ROOTS = {"demo": "data/demo/eval", "paper": "data/eval"}
_RETRIEVAL_NAMES = ("mscoco_captions", "flickr8k", "flickr30k")


@dataclass(frozen=True)
class ListLine:
    """A line of a data set list.

    Attributes:
        name: The data set.
        suite: The suite the line is marked for, or None.
    """

    name: str
    suite: str | None


def load_suite(
    name: str = "all", *, datasets: str = "demo", data_root: str | None = None
) -> list[EvalSet]:
    """Return the data sets that a suite evaluates, present or not.

    Args:
        name: A key of `SUITES`, or "all".
        datasets: "demo" or "paper", the lists in `configs/eval`; or the path of a list of your
            own, with one data set per line. A line `SUITE: NAME` is for that suite alone. Other
            lines go to every suite asked for that can evaluate their type; with "all", to
            zero-shot classification, zero-shot retrieval or compositionality.
        data_root: Where the data sets are: a folder, a template with `{dataset}` or
            `{dataset_cleaned}`, or "hub". By default `data/demo/eval` for "demo", `data/eval`
            for "paper", and the working directory for a list of your own.

    Returns:
        The sets, suite by suite. Of robustness, the first is the one the others vary.

    Raises:
        ValueError: If suite, list or data root is unknown, a list is empty, names a data set
            twice or marks one for a suite that cannot evaluate it, or none of its data sets
            belongs to the suite.
    """
    if name != "all" and name not in SUITES:
        raise ValueError(f"unknown suite {name!r}; choose from {', '.join(SUITES)}, all")
    suites = list(SUITES.values()) if name == "all" else [SUITES[name]]
    if data_root is None:
        data_root = DEFAULT_ROOTS.get(datasets, ".")
    elif not data_root:
        raise ValueError("the data root is empty; name a folder, or . for the working directory")
    elif not (data_root == "hub" or is_template(data_root) or Path(data_root).is_dir()):
        raise ValueError(f"data root {data_root} is not a folder")

    if datasets in DEFAULT_ROOTS:
        eval_sets = [
            eval_set
            for suite in suites
            for eval_set in _sets_of(
                suite, read_list(_lists_folder() / f"{suite.list_stem}_{datasets}.txt"), data_root
            )
        ]
        return _without_clash(eval_sets, datasets)
    if not Path(datasets).is_file():
        raise ValueError(f"unknown data set list {datasets!r}; choose demo, paper or a list file")
    lines = read_list(Path(datasets))
    types = {line: _type_of(line.name, data_root) for line in lines}
    _check_marks(types, datasets)
    eval_sets = []
    for suite in suites:
        by_type = suite.takes_by_type or name != "all"
        chosen = [
            line
            for line in lines
            if line.suite == suite.name
            or (line.suite is None and by_type and types[line] in suite.types)
        ]
        eval_sets += _sets_of(suite, chosen, data_root)
    if not eval_sets:
        raise ValueError(f"{datasets} names no data set of the suite {name}")
    return _without_clash(eval_sets, datasets)


def read_list(path: Path) -> list[ListLine]:
    """Read a list: one data set per line, `SUITE: NAME` or `NAME`; `#` starts a comment.

    Args:
        path: The list file.

    Raises:
        ValueError: If the list is empty or is no text.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the data set list {path}: {error}") from error
    texts = [line.split("#")[0].strip() for line in content.splitlines()]
    lines = [_read_line(text) for text in texts if text]
    if not lines:
        raise ValueError(f"{path} names no data set")
    return lines


def _read_line(text: str) -> ListLine:
    mark, colon, name = text.partition(":")
    # A colon may also be a path's; only a suite before it makes it a mark.
    if colon and mark.strip() in SUITES:
        return ListLine(name.strip(), mark.strip())
    return ListLine(text, None)


def _check_marks(types: dict[ListLine, str], datasets: str) -> None:
    for line, data_type in types.items():
        if line.suite is not None and data_type not in SUITES[line.suite].types:
            raise ValueError(
                f"{datasets} marks {line.name} for {line.suite}, which cannot evaluate "
                f"{data_type} sets"
            )


def _without_clash(eval_sets: list[EvalSet], datasets: str) -> list[EvalSet]:
    by_stem: dict[str, EvalSet] = {}
    for eval_set in eval_sets:
        other = by_stem.setdefault(eval_set.file_stem, eval_set)
        if other is not eval_set:
            raise ValueError(f"{datasets} has two data sets named {eval_set.name}")
    return eval_sets


def _sets_of(suite: Suite, lines: Sequence[ListLine], data_root: str) -> list[EvalSet]:
    eval_sets = []
    for number, line in enumerate(lines):
        name, location = locate(line.name, data_root)
        is_reference = suite.name == "robustness" and number == 0
        eval_sets.append(EvalSet(name, location, suite.name, suite.task, is_reference))
    return eval_sets


def _type_of(name: str, data_root: str) -> str:
    if is_caption_pairs(name):
        return PAIRS_TYPE
    shown, location = locate(name, data_root)
    # A set that is not there is reported under the suite that its name suggests.
    by_name = "retrieval" if shown in _RETRIEVAL_NAMES else "classification"
    try:
        return declared_type(location) or by_name
    except DamagedDataError:
        # Told when its turn comes.
        return by_name


def _lists_folder() -> Path:
    package = Path(__file__).resolve().parents[2]
    # An installed package carries the lists; a clone keeps them at its top.
    installed = package / "configs" / "eval"
    return installed if installed.is_dir() else package.parents[1] / "configs" / "eval"
