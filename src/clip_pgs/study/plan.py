"""A study file: what is trained and evaluated how often, and what is read off, said beforehand.

    name: demo                       # results go to logs/study/demo
    base: ../train/demo.yaml         # a training config, relative to this file
    overrides: {mask-ratio: 0.75}    # for all arms
    seeds: [0, 1, 2, 3, 4, 5]
    evaluations:                     # for all arms; each is a call of clip-pgs test
      - {suite: all, datasets: configs/eval/study_demo.txt, data-root: data/demo/eval}
    arms:
      random: {train: {masking: random}}
      pgs:
        train: {masking: pgs}
        evaluate:                    # ways to evaluate the same run; by default one, `unmasked`
          unmasked: {}
          masked: {inference-masking: run}
    reference: random                # an arm, or a list of arms
    metrics:                         # means of SUITE/DATASET/METRIC; a list in a list is one value
      shape: [zeroshot-classification/shape/acc1]
    primary: shape
    keep_checkpoints: false          # of runs that are done; their exports stay

Options are named like the flags of the two commands, and passed on as they are.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml
from torch import nn

from clip_pgs.common import expand_home, explained
from clip_pgs.evaluation.command import (
    check_call,
    choose_device,
    inference_choice,
    make_parser,
)
from clip_pgs.evaluation.datasets import PRESENT, EvalSet, check_presence
from clip_pgs.evaluation.features import content_digest
from clip_pgs.evaluation.masked_inference import masking_of
from clip_pgs.evaluation.report.command import FIGURES_NAME
from clip_pgs.evaluation.runner import data_identity
from clip_pgs.evaluation.suites import get_suite, why_undefined
from clip_pgs.training.checks import check_options
from clip_pgs.training.config import nearest_names, read_mapping
from clip_pgs.training.options import SEED, TrainOptions, parse_options

UNMASKED = "unmasked"
CONFIG_NAME = "train.yaml"
# What lies beside the folders of the arms.
JSON_NAME, CSV_NAME, MARKDOWN_NAME, HTML_NAME = (
    "results.json",
    "results.csv",
    "results.md",
    "index.html",
)
# What a study's file said at first, of which its page vouches.
PROTOCOL_NAME = "protocol.json"
# What results.csv has beside the metrics and their differences.
FIRST_COLUMNS = ("arm", "evaluation", "seed")
LAST_COLUMNS = ("training_flops", "training_seconds", "flops_per_image")
RESULTS_NAMES = (JSON_NAME, CSV_NAME, MARKDOWN_NAME, HTML_NAME, FIGURES_NAME, PROTOCOL_NAME)

_KEYS = (
    "name",
    "about",
    "base",
    "overrides",
    "seeds",
    "evaluations",
    "arms",
    "reference",
    "metrics",
    "primary",
    "keep_checkpoints",
)
_OPTIONAL = ("about", "overrides", "keep_checkpoints")
# File systems take 255 bytes, and a letter can have four.
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,59}")
# The study decides on these itself.
_OWN_TRAIN = {"base", "seed", "name", "logs", "resume", "accept-changes"}
_OWN_EVALUATE = {"output", "force", "no-report", "exit-code-file", "help"}
# A run's export has its own.
_OWN_EVALUATE |= {"model", "model-config", "pretrained"}

# A metric's name is a heading, and that of a file.
_METRIC = re.compile(r"(?!\.)[^/\\]{1,60}")

# A value `SUITE/DATASET/METRIC`, or the mean of such.
Formula = str | list[Any]


@dataclass(frozen=True)
class Arm:
    """One of the things that are compared.

    Attributes:
        name: Its name and its folder's.
        train: What it changes in the base config, the overrides for all arms included.
        evaluations: The flags of each way to evaluate its runs, beside those for all arms.
    """

    name: str
    train: dict[str, Any]
    evaluations: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Study:
    """A study as its file says it.

    Attributes:
        path: The file.
        name: Its name and its folder's.
        about: What it is for, in words.
        base: The training config that all arms start from.
        arms: By their names, in order.
        seeds: Each is one run of every arm.
        references: Arms that the others are compared with.
        evaluations: Flags of evaluation for all arms, a set of them for each call.
        metrics: By their names, in order.
        primary: The metric that counts.
        keep_checkpoints: Whether runs that are done keep theirs, beside their exports.
        root: The folder of all studies.
    """

    path: Path
    name: str
    about: str
    base: Path
    arms: dict[str, Arm]
    seeds: tuple[int, ...]
    references: tuple[str, ...]
    evaluations: tuple[dict[str, Any], ...]
    metrics: dict[str, Formula]
    primary: str
    keep_checkpoints: bool
    root: Path

    @property
    def folder(self) -> Path:
        """Where everything of the study lies."""
        return self.root / self.name

    @property
    def rows(self) -> list[tuple[str, str]]:
        """Arm and evaluation of each row of the tables."""
        return [(arm.name, name) for arm in self.arms.values() for name in arm.evaluations]

    @property
    def protocol(self) -> dict[str, Any]:
        """What the tables compare, and how: fixed before the first run, so that a p holds."""
        return {
            "primary": self.primary,
            "metrics": self.metrics,
            "reference": list(self.references),
            "seeds": list(self.seeds),
            "rows": [f"{arm} | {way}" for arm, way in self.rows],
        }

    def run(self, arm: str, seed: int) -> Path:
        """Return the run folder of an arm and a seed."""
        return self.folder / arm / f"seed_{seed}"

    def results(self, arm: str, seed: int, evaluation: str) -> Path:
        """Return the folder with the results of one evaluation of a run."""
        return self.run(arm, seed) / f"eval-{evaluation}"

    def train_arguments(self, arm: str, seed: int, config: Path) -> list[str]:
        """Return the flags that train one run, given the arm's config."""
        run = self.run(arm, seed)
        said = {"config": config, "seed": seed, "logs": run.parent, "name": run.name}
        return [f"--{name}={value}" for name, value in said.items()] + ["--resume=latest"]

    def evaluate_arguments(self, arm: str, evaluation: str) -> list[list[str]]:
        """Return the flags of each call that one evaluation of a run takes."""
        own = self.arms[arm].evaluations[evaluation]
        return [_words({**shared, **own}) for shared in self.evaluations]

    def config_text(self, arm: str, folder: Path | None = None) -> str:
        """Return the training config of an arm, as it is to lie in a folder; None is any folder."""
        base = str(self.base.absolute())
        if folder is not None:
            # The system follows links before it takes `..`. A config that is a link itself stays
            # one, as its own base is relative to where the link lies.
            place = self.base.parent.resolve() / self.base.name
            base = os.path.relpath(place, folder.resolve())
        return yaml.safe_dump({"base": base, **self.arms[arm].train}, sort_keys=False)


def read_study(path: Path, *, root: Path) -> Study:
    """Read a study file; what the commands make of its options is for `check_study`.

    Args:
        path: A YAML file, see above.
        root: The folder of all studies.

    Raises:
        ValueError: If it cannot be read, or does not say what a study is.
    """
    content = read_mapping(str(path))
    with explained(str(path)):
        return _study(path, content, root)


def _study(path: Path, content: dict[Any, Any], root: Path) -> Study:
    for key in content:
        if key not in _KEYS:
            raise ValueError(f"a study has no {key!r}; it takes {', '.join(_KEYS)}")
    for key in _KEYS:
        if key not in content and key not in _OPTIONAL:
            raise ValueError(f"a study needs {key!r}")
    overrides = _options("overrides", content.get("overrides"), refused=_OWN_TRAIN)
    arms = {
        _name("an arm", name): _arm(name, said, overrides)
        for name, said in _mapping("arms", content["arms"]).items()
    }
    base = path.parent / expand_home(_text("base", content["base"]))
    # os.path: a name that is too long is that of none.
    if not os.path.isfile(base):
        raise ValueError(f"'base' is a training config, and there is no {base}")
    for name in RESULTS_NAMES:
        if name in arms:
            raise ValueError(f"no arm can be named {name!r}, like a file of the study's results")
    metrics = {
        _metric(name): _formula(name, said)
        for name, said in _mapping("metrics", content["metrics"]).items()
    }
    references = _references(content["reference"], list(arms))
    rows = [f"{name} | {next(iter(arms[name].evaluations))}" for name in references]
    columns = {*FIRST_COLUMNS, *LAST_COLUMNS}
    columns |= {difference_name(metric, row) for metric in metrics for row in rows}
    for name in metrics:
        if name in columns:
            raise ValueError(f"no metric can be named {name!r}, like a column of {CSV_NAME}")
    keep_checkpoints = content.get("keep_checkpoints", True)
    if not isinstance(keep_checkpoints, bool):
        raise ValueError(f"'keep_checkpoints' is true or false, got {keep_checkpoints!r}")
    if content["primary"] not in list(metrics):
        raise ValueError(f"'primary' is one of {', '.join(metrics)}, got {content['primary']!r}")
    return Study(
        path=path,
        name=_name("the study", content["name"]),
        about=_text("about", content.get("about", "")),
        base=base,
        arms=arms,
        seeds=_seeds(content["seeds"]),
        references=references,
        evaluations=_evaluations(content["evaluations"]),
        metrics=metrics,
        primary=content["primary"],
        keep_checkpoints=keep_checkpoints,
        root=root,
    )


def difference_name(metric: str, reference: str) -> str:
    """Return what `results.csv` calls a metric's difference to the row of a reference."""
    return f"{metric} - {reference}"


def _references(said: Any, arms: list[str]) -> tuple[str, ...]:
    references = said if isinstance(said, list) else [said]
    if not references or any(name not in arms for name in references):
        raise ValueError(f"'reference' is one or more of {', '.join(arms)}, got {said!r}")
    if len(set(references)) < len(references):
        raise ValueError(f"'reference' names an arm twice, got {said}")
    return tuple(references)


def _arm(name: str, said: Any, overrides: dict[str, Any]) -> Arm:
    content = {} if said is None else said
    if not isinstance(content, dict) or content.keys() - {"train", "evaluate"}:
        raise ValueError(f"arm {name} takes 'train' and 'evaluate', got {said!r}")
    train = _options(f"train of arm {name}", content.get("train"), refused=_OWN_TRAIN)
    ways: Any = {UNMASKED: {}} if content.get("evaluate") is None else content["evaluate"]
    evaluations = {
        _name("an evaluation", way): _evaluation(f"{way} of arm {name}", flags)
        for way, flags in _mapping(f"evaluate of arm {name}", ways).items()
    }
    return Arm(name, {**overrides, **train}, evaluations)


def _evaluations(said: Any) -> tuple[dict[str, Any], ...]:
    calls = said if isinstance(said, list) else []
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"'evaluations' is a list of mappings of flags, got {said!r}")
    return tuple(_evaluation("evaluations", call) for call in calls)


def _evaluation(what: str, said: Any) -> dict[str, Any]:
    """Return flags of `clip-pgs test`; one that is null, which no command line shows, is known."""
    options = _options(what, said, refused=_OWN_EVALUATE)
    known = make_parser()._option_string_actions
    for name in options:
        if f"--{name}" not in known:
            near = nearest_names(f"--{name}", known, lists="`clip-pgs test --help`")
            raise ValueError(f"{what} names an unknown option {name!r}; {near}")
    return options


def _options(what: str, said: Any, *, refused: set[str]) -> dict[str, Any]:
    """Return a mapping of flags, named with hyphens."""
    content = {} if said is None else said
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{what} must be a mapping of options, got {said!r}")
    options = {name.replace("_", "-"): value for name, value in content.items()}
    if len(options) < len(content):
        raise ValueError(f"{what} gives an option twice, got {', '.join(content)}")
    for name in sorted(options.keys() & refused):
        raise ValueError(f"{what} cannot set {name!r}, which is the study's own")
    return options


def _mapping(what: str, said: Any) -> dict[Any, Any]:
    if not isinstance(said, dict) or not said:
        raise ValueError(f"{what} must be a mapping of names, got {said!r}")
    return said


def _name(what: str, said: Any) -> str:
    if not isinstance(said, str) or not _NAME.fullmatch(said):
        raise ValueError(f"the name of {what} is up to 60 letters, digits, . _ + -, got {said!r}")
    return said


def _metric(said: Any) -> str:
    if not isinstance(said, str) or not (_METRIC.fullmatch(said) and said.strip().isprintable()):
        raise ValueError(f"a metric's name is up to 60 characters without slashes, got {said!r}")
    return said


def _text(what: str, said: Any) -> str:
    if not isinstance(said, str):
        raise ValueError(f"{what} must be a text, got {said!r}")
    return said


def _seeds(said: Any) -> tuple[int, ...]:
    seeds = said if isinstance(said, list) else []
    if not seeds or any(type(seed) is not int or not SEED.holds(seed) for seed in seeds):
        raise ValueError(f"'seeds' is a list of whole numbers {SEED.text}, got {said!r}")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"'seeds' names one twice, got {said}")
    return tuple(seeds)


def _formula(name: str, said: Any, *, max_depth: int = 2) -> Formula:
    if isinstance(said, str) and said.count("/") >= 2:
        return said
    if isinstance(said, list) and said and max_depth:
        return [_formula(name, part, max_depth=max_depth - 1) for part in said]
    raise ValueError(
        f"metric {name!r} is a list of SUITE/DATASET/METRIC, or of lists of such, got {said!r}"
    )


def named_values(formula: Formula) -> Iterator[tuple[str, str, str]]:
    """Yield suite, data set and metric of each value that a formula takes."""
    if isinstance(formula, str):
        suite, _, rest = formula.partition("/")
        dataset, _, metric = rest.rpartition("/")
        yield suite, dataset, metric
    else:
        for part in formula:
            yield from named_values(part)


def evaluate_formula(
    formula: Formula, values: Mapping[tuple[str, str, str], float | None]
) -> float | None:
    """Return a metric, None where one of its values is not there.

    Args:
        formula: From a study.
        values: By suite, data set and metric.
    """
    if isinstance(formula, str):
        return values.get(next(named_values(formula)))
    parts = [evaluate_formula(part, values) for part in formula]
    known = [part for part in parts if part is not None]
    return sum(known) / len(known) if len(known) == len(parts) else None


def check_study(study: Study, *, are_data_needed: bool = True) -> dict[str, TrainOptions]:
    """Refuse what the commands for training and evaluation would refuse; nothing is created.

    Args:
        study: From `read_study`.
        are_data_needed: Whether training and evaluation data must be there.

    Returns:
        The options of each arm's runs, but for the seed.

    Raises:
        ValueError: With one sentence, for the first thing that is wrong.
    """
    options: dict[str, TrainOptions] = {}
    for arm in study.arms.values():
        said, model = _check_arm(study, arm.name, are_data_needed=are_data_needed)
        options[arm.name] = said
        for way in arm.evaluations:
            sets: list[EvalSet] = []
            place = f"{study.path}: evaluation {way} of arm {arm.name}"
            with explained(place, ValueError, OSError):
                for flags in study.evaluate_arguments(arm.name, way):
                    sets += _check_evaluation(flags, said, model)
            _check_sets(study, sets, are_data_needed=are_data_needed)
    return options


def read_options(study: Study) -> dict[str, TrainOptions]:
    """Return the options of each arm's runs, but for the seed; no data need be there.

    Raises:
        ValueError: If an option is none, or has a value that it cannot have.
    """
    return {arm: _check_arm(study, arm, are_data_needed=False)[0] for arm in study.arms}


def _check_arm(
    study: Study, arm: str, *, are_data_needed: bool
) -> tuple[TrainOptions, nn.Module | None]:
    """Return the options of an arm's runs, and their model on the device "meta", if data is there.

    Without data there is no model.
    """
    model = None
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, CONFIG_NAME)
        config.write_text(study.config_text(arm), encoding="utf-8")
        try:
            options = parse_options(study.train_arguments(arm, study.seeds[0], config))
            if are_data_needed:
                # Whether a run may go on is the study's own question.
                model = check_options(replace(options, logs="none", resume=None))
        except ValueError as error:
            sentence = str(error).removeprefix(f"{config}: ")
            raise ValueError(f"{study.path}: arm {arm}: {sentence}") from None
    return options, model


def _check_evaluation(
    flags: Sequence[str], trained: TrainOptions, model: nn.Module | None
) -> list[EvalSet]:
    """Return the data sets of a call, after all checks that it could make before its run is there.

    Args:
        flags: Of the call, without the run.
        trained: Options of the run.
        model: Its model, where that is at hand.
    """
    args = _parse_evaluation(flags)
    sets = check_call(args)
    choose_device(args.device)
    name, chosen = inference_choice(args)
    masking = masking_of(
        name, chosen, told=trained.values(), weights="the run", progress=1.0, state={}
    )
    if masking is not None and model is not None:
        with masking.applied(model):
            pass
    return sets


def evaluated_sets(calls: Iterable[Sequence[str]]) -> list[EvalSet]:
    """Return the data sets of calls of `clip-pgs test`.

    Args:
        calls: The flags of each, from `Study.evaluate_arguments`.
    """
    return [each for flags in calls for each in check_call(_parse_evaluation(flags))]


def data_digest(sets: Iterable[EvalSet]) -> str:
    """Return a digest of what data sets hold now.

    Raises:
        OSError: If a file cannot be read.
    """
    return content_digest([[each.suite, each.name, data_identity(each)] for each in sets])


def _parse_evaluation(flags: Sequence[str]) -> argparse.Namespace:
    parser = make_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    return parser.parse_args(["RUN", *flags])


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def _check_sets(study: Study, sets: Sequence[EvalSet], *, are_data_needed: bool) -> None:
    """Refuse data sets that are not there, that two calls name, or that a metric lacks."""
    names = [(eval_set.suite, eval_set.name) for eval_set in sets]
    for suite, name in names:
        if names.count((suite, name)) > 1:
            raise ValueError(f"{study.path}: two evaluations name {suite}/{name}")
    for metric, formula in study.metrics.items():
        for suite, dataset, value in named_values(formula):
            if (suite, dataset) not in names:
                raise ValueError(
                    f"{study.path}: metric {metric!r} takes {suite}/{dataset}, which is not "
                    f"evaluated; there are {', '.join('/'.join(name) for name in names)}"
                )
            if value not in get_suite(suite).metrics:
                known = ", ".join(get_suite(suite).metrics)
                raise ValueError(
                    f"{study.path}: metric {metric!r}: {suite} has no {value!r}; it has {known}"
                )
    for eval_set in sets if are_data_needed else ():
        presence = check_presence(eval_set)
        if presence.state != PRESENT:
            reason = presence.reason or f"looked for in {eval_set.location}"
            raise ValueError(f"{study.path}: {eval_set.name} is {presence.state}: {reason}")
        for suite, dataset, value in named_values(study.metrics[study.primary]):
            is_read = (suite, dataset) == (eval_set.suite, eval_set.name)
            if is_read and (lack := why_undefined(value, eval_set)) is not None:
                raise ValueError(
                    f"{study.path}: the primary metric {study.primary!r} takes "
                    f"{suite}/{dataset}/{value}, which has no value: {lack}"
                )


def _words(options: Mapping[str, Any]) -> list[str]:
    """Return options as the words of a command line: a list gives several, a mapping pairs."""
    words: list[str] = []
    for name, value in options.items():
        if value is None:
            continue
        if isinstance(value, dict):
            words += [f"--{name}", *(f"{key}={item}" for key, item in value.items())]
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words.append(f"--{name}={value}")
    return words
