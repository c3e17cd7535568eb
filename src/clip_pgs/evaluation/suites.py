"""Suites: what each measures, how, on which data sets, and how its numbers are worded.

A suite is a function from an encoder and a data set to `Scores`, registered with a `Suite`, which
help, lists, tables, averages and the report read. One outside this package is a module's that does
the same, asked for by `--suite package.module:function`.

Help and lists take no torch, so that what scores is imported when it does.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from clip_pgs.common import CONFIGS, explained, find_config
from clip_pgs.evaluation.datasets import (
    CAPTION_PAIR_SPLITS,
    CLASS_NAMES,
    DATA_TYPES,
    IMAGE_FOLDER,
    PAIRS_TYPE,
    DamagedDataError,
    EvalSet,
    ServerError,
    as_prompt,
    clean_name,
    declared_type,
    equal_names,
    image_paths,
    is_caption_pairs,
    is_template,
    locate,
    read_caption_pairs,
    read_class_names,
    read_templates,
    too_many_equal,
)
from clip_pgs.evaluation.results import COUNTS, Result, amount, is_share
from clip_pgs.files import read_file
from clip_pgs.registry import Registry
from clip_pgs.tables import counted

if TYPE_CHECKING:
    from clip_pgs.evaluation.features import Encoder

logger = logging.getLogger(__name__)

# Of the vote of the nearest, whose label tells it.
NUM_NEIGHBORS = 20

DEFAULT_ROOTS = {"demo": "data/demo/eval", "paper": "data/eval"}
_MAX_LINE, _MAX_NAME = 4096, 150
_MAX_LIST_BYTES = 2**24
# A quarter of the largest file of a result that is read.
_MAX_DETAILS = 2**24
_COMMENT = re.compile(r"(?:^|\s)#")
_RETRIEVAL_NAMES = ("mscoco_captions", "flickr8k", "flickr30k")


@dataclass(frozen=True)
class Scores:
    """What a model reaches on a data set.

    Attributes:
        metrics: In [0, 1], by name; None where one is not defined. A tensor or an array of one
            number becomes that number.
        samples: Number of images scored, or of caption pairs.
        details: What explains the numbers, as JSON holds it. Reports compute with "classes",
            "captions", "items" and "ties", which are numbers.

    Raises:
        TypeError: If a metric or `samples` is no number, or the details are not what JSON holds.
        ValueError: If one is out of its range, the details are large, or a metric has the name of
            another column of results.
    """

    metrics: dict[str, float | None]
    samples: int
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.metrics.items():
            if value is not None and not is_share(float(value)):
                raise ValueError(f"metric {name} must be in [0, 1] or None, got {value}")
        metrics = {str(name): v if v is None else float(v) for name, v in self.metrics.items()}
        object.__setattr__(self, "metrics", metrics)
        object.__setattr__(self, "samples", index(self.samples))
        _check_names(metrics)
        if not isinstance(self.details, dict):
            raise TypeError(f"details must be a dict, got {type(self.details).__name__}")
        # What is written otherwise would not be read again.
        told = {name: self.details[name] for name in COUNTS if name in self.details}
        for name, value in {"samples": self.samples, **told}.items():
            if amount(value) is None:
                raise ValueError(f"{name} must be a number that is not negative, got {value!r}")
        if (size := len(json.dumps(self.details, indent=2))) > _MAX_DETAILS:
            raise ValueError(f"details must take at most {_MAX_DETAILS} bytes of JSON, got {size}")


def _check_names(metrics: Iterable[str]) -> None:
    """Refuse a metric whose column in a table would be that of something else."""
    for name in {column.name for column in fields(Result)}.intersection(metrics):
        raise ValueError(f"a metric must not be named {name!r}: results have a column of that name")


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What a suite declares of itself.

    Attributes:
        name: What users type after `--suite`.
        title: Its name for people.
        summary: What it measures, in a line of help.
        task: clip_benchmark's name of the task.
        types: Types of data sets that it can evaluate.
        metrics: The labels of its metrics by name, for people, in the order to show them.
        main_metrics: Those of them that the main tables and figures show.
        unit: Of the main metrics. It ends in "percent", in which tables and figures show them.
        order: Place among the suites.
        splits: Parts of a data set that it reads; none where the set's name says it.
        needs_text: Whether it encodes captions or class names.
        takes_by_type: Whether `--suite all` gives it the sets of these types in a list of one's
            own. The other suites take only those that are marked for them.
        fact: What stands beside the metrics on the terminal, by its name in the details.
        has_reference: Whether the first set of its list is the one that the others vary, so that
            averages are taken with and without it.
        parts: Averages over some of the sets, by their names in the last part of the path.
        meanings: Of headings and averages that do not say it themselves, for a line below a table.

    Raises:
        ValueError: If the unit is another, a main metric is none of the metrics, or a metric has
            the name of another column of results.
    """

    name: str
    title: str
    summary: str
    task: str
    types: tuple[str, ...]
    metrics: Mapping[str, str]
    main_metrics: tuple[str, ...]
    unit: str
    order: int = 100
    splits: tuple[str, ...] = ("test",)
    needs_text: bool = True
    takes_by_type: bool = False
    fact: str | None = None
    has_reference: bool = False
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    meanings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.unit.endswith("percent"):
            raise ValueError(
                f"the unit of suite {self.name!r} must end in 'percent', in which its metrics are "
                f"shown, got {self.unit!r}"
            )
        _check_names(self.metrics)
        for name in self.main_metrics:
            if name not in self.metrics:
                choices = ", ".join(self.metrics) or "none"
                raise ValueError(
                    f"a main metric of suite {self.name!r} must be one of its metrics, {choices}, "
                    f"got {name!r}"
                )

    def eval_set(self, name: str, location: str, *, is_reference: bool = False) -> EvalSet:
        """Return a data set as this suite evaluates it."""
        splits = self.splits or (name.rsplit("/", 1)[-1],)
        return EvalSet(name, location, self.name, self.task, splits, is_reference)


Score = Callable[["Encoder", EvalSet], Scores]
SUITES: Registry[Score] = Registry("suite")


def register_suite(name: str, **declaration: Any) -> Callable[[Score], Score]:
    """Register the function that is decorated as a suite.

    Args:
        name: What users type.
        **declaration: The other fields of `Suite`.

    Raises:
        TypeError: If a field is missing or unknown.
        ValueError: See `Suite`.
    """
    return SUITES.register(name, declared=Suite(name=name, **declaration))


def suites() -> list[Suite]:
    """Return what the registered suites declare, in their order."""
    return sorted(map(get_suite, SUITES.names()), key=lambda suite: suite.order)


def get_suite(name: str) -> Suite:
    """Return what a suite declares.

    Args:
        name: Of a registered suite, or "package.module:function".

    Raises:
        ValueError: If there is no such suite.
    """
    return SUITES.declaration(name)["declared"]


_CLASS_METRICS = {"acc1": "top-1", "acc5": "top-5", "mean_per_class_recall": "class recall"}
_TOP_1 = "top-1 accuracy, percent"


def why_undefined(metric: str, eval_set: EvalSet) -> str | None:
    """Say why a classification metric has no value on a data set, None if it may have one.

    Args:
        metric: Such as "acc5", or "lp_acc5" of a linear probe.
        eval_set: The set, which is there.

    Raises:
        OSError: If it cannot be read.
        DamagedDataError: If what it says of its type or classes is no such thing.
    """
    metric = metric.removeprefix("lp_")
    if metric not in {*_CLASS_METRICS, "mean_average_precision"}:
        return None
    is_multilabel = declared_type(eval_set.location) == "multilabel"
    if is_multilabel != (metric == "mean_average_precision"):
        return f"its images have {'several labels' if is_multilabel else 'one label'} each"
    names = read_class_names(eval_set.location)
    if metric == "acc5" and names is not None and len(names) < 5:
        return f"top-5 needs 5 classes, and it has {len(names)}"
    return None


@register_suite(
    "robustness",
    title="Robustness",
    summary="acc1 on variants of a set, averages with and without the plain one",
    task="zeroshot_classification",
    types=("classification",),
    metrics=_CLASS_METRICS,
    main_metrics=("acc1",),
    unit=_TOP_1,
    order=4,
    has_reference=True,
    meanings={
        "ID average": "over all of these sets",
        "OOD average": "without the one that the others vary",
    },
)
@register_suite(
    "zeroshot-classification",
    title="Zero-shot classification",
    summary="acc1, acc5, mean per-class recall",
    task="zeroshot_classification",
    types=("classification", "multilabel"),
    metrics={**_CLASS_METRICS, "mean_average_precision": "mAP"},
    main_metrics=("acc1",),
    unit=_TOP_1,
    order=1,
    takes_by_type=True,
)
def score_classification(encoder: Encoder, eval_set: EvalSet) -> Scores:
    """Compare images with the mean prompt of each class."""
    from clip_pgs.evaluation.metrics import classification_metrics, zeroshot_logits

    features = encoder.images(eval_set)
    classes = read_class_names(eval_set.location) or []
    if features.labels is None:
        raise DamagedDataError(f"{eval_set.name} has captions, no classes")
    twice = equal_names(classes)
    if twice:
        logger.warning("classes of %s share a name: %s", eval_set.name, ", ".join(twice[:5]))
    if features.labels.ndim == 1:
        _check_labels(features.labels.tolist(), len(classes), eval_set)
    else:
        # Of features that were kept: their files hold no class names.
        if (num_labels := features.labels.shape[1]) != len(classes):
            raise DamagedDataError(
                f"{eval_set.location}/{CLASS_NAMES} must name a class for each of the {num_labels} "
                f"numbers of a picture's .npy, got {counted(len(classes), 'name')}"
            )
        shown = features.labels.any(dim=0).nonzero()[:, 0].tolist()
        effect = "; each of them counts as 0 in mAP, as in clip_benchmark"
        _tell_absent(shown, len(classes), eval_set, effect)
    classes_CD = encoder.classes(classes, read_templates(eval_set.location))
    logits_NC = zeroshot_logits(features.images, classes_CD)
    metrics = classification_metrics(logits_NC, features.labels)
    return Scores(metrics, len(features.images), {"classes": len(classes)})


def _check_labels(labels: list[int], num_classes: int, eval_set: EvalSet) -> None:
    if max(labels) >= num_classes:
        raise DamagedDataError(
            f"{eval_set.location}/{CLASS_NAMES} must name a class for each label, got "
            f"{counted(num_classes, 'name')} and the label {max(labels)}"
        )
    if num_classes == 1:
        raise DamagedDataError(
            f"{eval_set.location}/{CLASS_NAMES} must name two classes or more: of one, each model "
            "is right"
        )
    _tell_absent(labels, num_classes, eval_set)


def _tell_absent(shown: list[int], num_classes: int, eval_set: EvalSet, effect: str = "") -> None:
    absent = sorted(set(range(num_classes)) - set(shown))
    if absent:
        logger.warning(
            "%s has no picture of %d of its %d classes, the first is number %d%s",
            eval_set.name,
            len(absent),
            num_classes,
            absent[0],
            effect,
        )


_RECALLS = {
    f"{wanted}_retrieval_recall@{k}": f"{wanted} R@{k}"
    for wanted in ("text", "image")
    for k in (1, 5, 10)
}


@register_suite(
    "zeroshot-retrieval",
    title="Zero-shot retrieval",
    summary="recall at 1, 5, 10, both ways",
    task="zeroshot_retrieval",
    types=("retrieval",),
    metrics=_RECALLS,
    main_metrics=tuple(_RECALLS),
    unit="recall, percent",
    order=2,
    takes_by_type=True,
)
def score_retrieval(encoder: Encoder, eval_set: EvalSet) -> Scores:
    """Look for each image's captions, and for each caption's image."""
    import torch

    from clip_pgs.evaluation.metrics import retrieval_metrics

    features = encoder.images(eval_set)
    if features.captions is None:
        raise DamagedDataError(f"{eval_set.name} has classes, no captions")
    image_of_text = [number for number, captions in enumerate(features.captions) for _ in captions]
    if len(features.images) == 1:
        raise DamagedDataError(
            f"{eval_set.name} must have two pictures or more: of one, each model finds it"
        )
    texts = [text for captions in features.captions for text in captions]
    prompts = [
        text for captions in features.captions for text in dict.fromkeys(map(as_prompt, captions))
    ]
    if too_many_equal(prompts):
        logger.warning(
            "captions of %s are repeated, and one counts for its own picture alone: %s",
            eval_set.name,
            _quoted(equal_names(prompts)),
        )
    elif too_many_equal(texts):
        logger.warning(
            "captions of %s are repeated for one picture, and each of them counts: %s",
            eval_set.name,
            _quoted([text for captions in features.captions for text in equal_names(captions)]),
        )
    if num_equal := too_many_equal(features.digests or []):
        num_samples = len(features.images)
        logger.warning(
            "pictures of %s are repeated, and one counts for the captions of its own sample alone: "
            "%d samples show %s; all captions of a picture belong into one sample, a line each",
            eval_set.name,
            num_samples,
            counted(num_samples - num_equal, "different picture"),
        )
    texts_TD = encoder.texts(texts)
    metrics = retrieval_metrics(features.images, texts_TD, torch.tensor(image_of_text))
    return Scores(metrics, len(features.images), {"captions": len(image_of_text)})


def _quoted(texts: Sequence[str]) -> str:
    return ", ".join(f"{text[:80]!r}" for text in texts[:5])


@register_suite(
    "linear-probe",
    title="Linear probe",
    summary="logistic regression on features, tuned on a held-back fifth of train; and a vote of "
    "the 20 nearest images of train",
    task="linear_probe",
    types=("classification",),
    metrics={
        **{f"lp_{name}": label for name, label in _CLASS_METRICS.items()},
        "knn_acc1": f"{NUM_NEIGHBORS}-NN",
    },
    main_metrics=("lp_acc1",),
    unit=_TOP_1,
    order=3,
    splits=("train", "test"),
    needs_text=False,
    fact="regularization",
    meanings={
        "regularization": "C, the penalty's inverse, best on a held-back fifth of train",
        f"{NUM_NEIGHBORS}-NN": f"a vote of the {NUM_NEIGHBORS} nearest images of train",
    },
)
def score_linear_probe(encoder: Encoder, eval_set: EvalSet) -> Scores:
    """Score a linear classifier, and a vote of the nearest, on the features of test."""
    from clip_pgs.evaluation.probe import linear_probe, nearest_neighbors

    test = encoder.images(eval_set)
    train = encoder.images(eval_set, split="train")
    metrics, details = linear_probe(
        train,
        test,
        name=eval_set.name,
        classes=read_class_names(eval_set.location),
        device=encoder.device,
    )
    metrics["knn_acc1"] = nearest_neighbors(train, test, name=eval_set.name, device=encoder.device)
    return Scores(metrics, len(test.images), details)


@register_suite(
    "compositionality",
    title="Language compositionality",
    summary="which of two captions is true; a tie is wrong, and counted",
    task="image_caption_selection",
    types=(PAIRS_TYPE,),
    metrics={"acc": "accuracy"},
    main_metrics=("acc",),
    unit="accuracy, percent",
    order=5,
    splits=(),
    takes_by_type=True,
    fact="ties",
    meanings={"ties": "pairs whose two captions score alike, which count as wrong"},
    parts={
        "object": ("add_obj", "replace_obj", "swap_obj"),
        "attribute": ("add_att", "replace_att", "swap_att"),
        "relation": ("replace_rel",),
    },
)
def score_caption_pairs(encoder: Encoder, eval_set: EvalSet) -> Scores:
    """Compare each image with its caption and a hard negative; see `metrics`."""
    from clip_pgs.evaluation.metrics import count_right

    folder, split = Path(eval_set.location), eval_set.splits[0]
    own = image_paths(folder, split)
    pairs = read_caption_pairs(folder, split)
    # All splits at once, as they share most images.
    paths = _paths_of_all_splits(folder)
    try:
        encoded_ND = encoder.pictures(paths, folder)
    except DamagedDataError:
        # Where it is a picture of another split alone, this one can be scored.
        paths = own
        encoded_ND = encoder.pictures(paths, folder)
    row_of = {path.name: row for row, path in enumerate(paths)}
    images_ND = encoded_ND[[row_of[pair.file_name] for pair in pairs]]
    texts = [pair.caption for pair in pairs] + [pair.negative for pair in pairs]
    true_ND, false_ND = encoder.texts(texts, batch_size=encoder.reading.batch_size).chunk(2)
    num_right, num_ties = count_right(images_ND, true_ND, false_ND)
    details = {"items": len(pairs), "ties": num_ties, "images": len(own)}
    return Scores({"acc": num_right / len(pairs)}, len(pairs), details)


def _paths_of_all_splits(folder: Path) -> list[Path]:
    """Return the images of all splits, as far as they are there: a split may lack some."""
    names: set[str] = set()
    for split in CAPTION_PAIR_SPLITS:
        # What is wrong with another split is said when that one is scored.
        with contextlib.suppress(FileNotFoundError, ValueError):
            names |= {pair.file_name for pair in read_caption_pairs(folder, split)}
    paths = (folder / IMAGE_FOLDER / name for name in sorted(names))
    return [path for path in paths if path.is_file()]


class ListLine(NamedTuple):
    """A line of a data set list: the set, and the suite that it is marked for, or None."""

    name: str
    suite: str | None


def load_suite(
    name: str = "all", *, datasets: str = "demo", data_root: str | None = None
) -> list[EvalSet]:
    """Return the data sets that a suite evaluates, present or not.

    Args:
        name: Of a suite, "package.module:function", or "all".
        datasets: "demo" or "paper", or the name of another list in `configs/eval`; or the path of
            a list of your own, with one data set per line. A line `SUITE: NAME` is for that suite
            alone. Other lines go to every suite asked for that can evaluate their type; with
            "all", to zero-shot classification, zero-shot retrieval or compositionality.
        data_root: Where the data sets are: a folder, a template with `{dataset}` or
            `{dataset_cleaned}`, or "hub". By default `data/demo/eval` for "demo", `data/eval`
            for "paper", and the working directory for another list.

    Returns:
        The sets, suite by suite. Of robustness, the first is the one the others vary.

    Raises:
        ValueError: If suite, list or data root is unknown, a list is empty, names a data set
            twice or marks one for a suite that cannot evaluate it, or none of its data sets
            belongs to the suite.
    """
    chosen = suites() if name == "all" else [get_suite(name)]
    if data_root is None:
        data_root = DEFAULT_ROOTS.get(datasets, ".")
    elif not data_root:
        raise ValueError("the data root is empty; name a folder, or . for the working directory")
    elif not (data_root == "hub" or is_template(data_root) or Path(data_root).is_dir()):
        raise ValueError(
            f"data root {data_root} is not a folder; make it, or name the one that has the sets"
        )

    if is_template(data_root) and "@" in urlsplit(data_root).netloc:
        raise ValueError(
            "the data root must hold no user name or password, which results and reports would "
            "show; put them into ~/.netrc"
        )

    eval_sets: list[EvalSet] = []
    if datasets in DEFAULT_ROOTS:
        for suite in chosen:
            path = _list_path(suite.name, datasets)
            # A suite of another package has none.
            if name != "all" or path.is_file():
                eval_sets += _sets_of(suite, read_list(path), data_root)
    elif (list_path := Path(find_config(datasets, "eval"))).is_file():
        lines = read_list(list_path)
        types = {line: _type_of(line, data_root) for line in lines}
        _check_marks(types, datasets)
        for suite in chosen:
            takes_unmarked = suite.takes_by_type or name != "all"
            own = [
                line
                for line in lines
                if line.suite == suite.name
                or (line.suite is None and takes_unmarked and types[line] in suite.types)
            ]
            eval_sets += _sets_of(suite, own, data_root)
    else:
        raise ValueError(
            f"unknown data set list {datasets!r}: there is no such file, here or in configs/eval; "
            "choose demo, paper or a list file"
        )
    if not eval_sets:
        raise ValueError(f"{datasets} names no data set of the suite {name}")
    by_stem: dict[str, EvalSet] = {}
    for eval_set in eval_sets:
        # Results are files of this name, with what stands before and after it.
        if not 0 < len(os.fsencode(clean_name(eval_set.name))) <= _MAX_NAME:
            raise ValueError(
                f"{datasets} must name data sets by 1 to {_MAX_NAME} letters, digits and the like, "
                f"got {eval_set.name!r}"
            )
        if by_stem.setdefault(eval_set.file_stem, eval_set) is not eval_set:
            other = by_stem[eval_set.file_stem].name
            names = eval_set.name if other == eval_set.name else f"{other} or {eval_set.name}"
            raise ValueError(f"{datasets} has two data sets named {names}, as results name them")
    return eval_sets


def is_listed(eval_set: EvalSet) -> bool:
    """Say whether a list of `configs/eval` names a data set for its suite, in whatever folder."""
    paths = (_list_path(eval_set.suite, datasets) for datasets in DEFAULT_ROOTS)
    lines = (line for path in paths if path.is_file() for line in read_list(path))
    return eval_set.name.rsplit("/", 1)[-1] in {line.name.rsplit("/", 1)[-1] for line in lines}


def _list_path(suite: str, datasets: str) -> Path:
    return CONFIGS / "eval" / f"{suite.replace('-', '_')}_{datasets}.txt"


def read_list(path: Path) -> list[ListLine]:
    """Read a list: one data set per line, `SUITE: NAME` or `NAME`.

    `#` starts a comment where a line begins, or after white space.

    Args:
        path: The list file.

    Raises:
        ValueError: If the list is empty or is no text, or a line of it cannot be a data set.
    """
    what = f"the data set list {path}"
    data = read_file(path, what=what, max_bytes=_MAX_LIST_BYTES)
    with explained(f"cannot read {what}"):
        content = data.decode("utf-8-sig")
    lines = []
    for number, text in enumerate(content.splitlines(), start=1):
        name = _COMMENT.split(text, maxsplit=1)[0].strip()
        if len(name) > _MAX_LINE or "\0" in name:
            raise ValueError(
                f"line {number} of {path} must name a data set in at most {_MAX_LINE} characters, "
                f"got {name[:80]!r}"
            )
        mark, colon, rest = (part.strip() for part in name.partition(":"))
        # A colon may also be a path's; only a suite before it makes it a mark.
        is_marked = bool(colon) and mark in SUITES.names()
        if not is_marked and re.match(r"[\w-]+:\s", name):
            raise ValueError(
                f"line {number} of {path} must name a suite before its colon, one of "
                f"{', '.join(SUITES.names())}, got {mark!r}"
            )
        if name:
            lines.append(ListLine(rest, mark) if is_marked else ListLine(name, None))
    if not lines:
        raise ValueError(f"{path} names no data set")
    return lines


def _check_marks(types: dict[ListLine, str], datasets: str) -> None:
    for line, data_type in types.items():
        if line.suite is not None and data_type not in get_suite(line.suite).types:
            raise ValueError(
                f"{datasets} marks {line.name} for {line.suite}, which cannot evaluate "
                f"{data_type} sets"
            )


def _sets_of(suite: Suite, lines: Sequence[ListLine], data_root: str) -> Iterator[EvalSet]:
    for number, line in enumerate(lines):
        name, location = locate(line.name, data_root)
        yield suite.eval_set(name, location, is_reference=suite.has_reference and number == 0)


def _type_of(line: ListLine, data_root: str) -> str:
    if is_caption_pairs(line.name):
        return PAIRS_TYPE
    name, location = locate(line.name, data_root)
    try:
        if (declared := declared_type(location)) is not None:
            return declared
    # What is wrong with a set is told when its turn comes.
    except DamagedDataError:
        pass
    except ServerError as error:
        # A guess would score it as another set.
        if line.suite is None:
            raise ValueError(
                f"the type of {name} is unknown, and its line has no mark like "
                f"'zeroshot-retrieval: {line.name}': {error}"
            ) from error
    # One that is not there is reported under the suite of its mark, or that its name suggests.
    by_name = "retrieval" if name in _RETRIEVAL_NAMES else "classification"
    fits = DATA_TYPES if line.suite is None else get_suite(line.suite).types
    return next((kind for kind in (by_name, *DATA_TYPES) if kind in fits), by_name)
