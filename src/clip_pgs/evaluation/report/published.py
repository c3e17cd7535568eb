"""The figures of the CLIP-PGS paper (https://arxiv.org/abs/2503.17080), as results of its methods.

Two files hold them: `clip_pgs_cvpr2025.csv`, a row per figure in percent, and beside it a JSON
file with their source, the training behind them, and how many test images (items, for
compositionality) each data set has. The latter tells a set of the paper from a slice of it and
from another set of the same name, neither of which can be compared with the paper. A set that
circulates in several versions has a range.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

from clip_pgs.evaluation.results import DONE, Result

PAPER = "clip_pgs_cvpr2025"

# clip_benchmark's names where the file has plainer ones.
_METRICS = {("linear_probe", "acc1"): "lp_acc1"}
_REFERENCE = ("robustness", "imagenet1k")
# What the names of its sets begin with in configs/eval, some of them.
_COLLECTIONS = ("vtab", "sugar_crepe")


@dataclass(frozen=True)
class PublishedMethod:
    """One row of the paper's tables.

    Attributes:
        name: Such as "CLIP-PGS-0.3".
        results: Its figures, a result per suite and data set, metrics in [0, 1].
        averages: The averages that the paper prints, in [0, 1], by suite and name, such as
            ("robustness", "ood_average").
        relative_time: Training time as a multiple of CLIP's; None where the paper has none.
    """

    name: str
    results: tuple[Result, ...]
    averages: dict[tuple[str, str], float]
    relative_time: float | None


@dataclass(frozen=True)
class Paper:
    """A paper's figures and where they come from.

    Attributes:
        title: Of the paper.
        citation: Short, for captions.
        address: Where to find it.
        training: Data, model and length behind every row, for captions.
        recipe: The same in full.
        tables: What the table of each suite is about.
        sizes: Lowest and highest number of test images, or of items for compositionality, by
            suite and data set.
        rows: The figures as the file has them.
    """

    title: str
    citation: str
    address: str
    training: str
    recipe: str
    tables: dict[str, str]
    sizes: dict[str, dict[str, tuple[int, int]]]
    rows: tuple[dict[str, str], ...]

    @cached_property
    def methods(self) -> list[PublishedMethod]:
        """The methods compared, in the paper's order."""
        names = [row["method"] for row in self.rows if row["suite"] == "cost"]
        return [self._method(name) for name in names]

    @cached_property
    def ablation(self) -> dict[str, dict[tuple[str, str], float]]:
        """The ablation: figures in [0, 1] by variant, then data set and metric."""
        variants: dict[str, dict[tuple[str, str], float]] = {}
        for row in self.rows:
            if row["suite"] == "ablation":
                cell = (row["dataset"], row["metric"])
                variants.setdefault(row["method"], {})[cell] = _share(row["value"])
        return variants

    def set_names(self, results: Iterable[Result]) -> dict[tuple[str, str], str]:
        """Return which data sets of a report are the paper's: its names by suite and full name.

        Of several whose names end alike, one under clip_benchmark's name is the paper's; where
        none is, nothing tells which of them it is, and they all are other sets.

        Args:
            results: All of the report.
        """
        found: dict[tuple[str, str], dict[str, bool]] = {}
        for result in results:
            if (name := self.set_name(result)) is not None:
                is_done = found.setdefault((result.suite, name), {})
                is_done[result.dataset] = is_done.get(result.dataset, False) or (
                    result.status == DONE
                )
        names = {}
        for (suite, name), is_done in found.items():
            full_names = [full for full in is_done if is_done[full]] or list(is_done)
            known = [full for full in known_names(name) if full in full_names]
            if known or len(full_names) == 1:
                names[suite, (known or full_names)[0]] = name
        return names

    def set_name(self, result: Result) -> str | None:
        """Return which of the paper's data sets a result may be of, None if of none of them.

        Args:
            result: Of any status; one that is not done is judged by its name alone.
        """
        name = result.dataset.rsplit("/", 1)[-1]
        size = self.sizes.get(result.suite, {}).get(name)
        if size is None:
            return None
        num_items = result.details.get("items", result.samples)
        return name if result.status != DONE or size[0] <= num_items <= size[1] else None

    def source(self, suite: str) -> str:
        """Name the table that the published rows of a suite come from, for captions."""
        return f"{self.citation} ({self.address}), table of {self.tables[suite]}"

    def _method(self, name: str) -> PublishedMethod:
        metrics: dict[tuple[str, str], dict[str, float | None]] = {}
        averages: dict[tuple[str, str], float] = {}
        relative_time = None
        for row in self.rows:
            if row["method"] != name or row["suite"] == "ablation":
                continue
            suite, dataset = row["suite"].replace("_", "-"), row["dataset"]
            metric = _METRICS.get((row["suite"], row["metric"]), row["metric"])
            if suite == "cost":
                relative_time = float(row["value"])
            elif "average" in dataset:
                averages[suite, dataset.removeprefix("average_")] = _share(row["value"])
            else:
                metrics.setdefault((suite, dataset), {})[metric] = _share(row["value"])
        results = tuple(
            Result(
                suite=suite,
                dataset=dataset,
                status=DONE,
                metrics=values,
                samples=self.sizes[suite][dataset][1],
                task=suite.replace("-", "_"),
                model=name,
                pretrained=self.address,
                weights_digest="",
                details={"is_reference": True} if (suite, dataset) == _REFERENCE else {},
            )
            for (suite, dataset), values in metrics.items()
        )
        return PublishedMethod(name, results, averages, relative_time)


def known_names(name: str) -> list[str]:
    """Return what clip_benchmark calls a data set of the paper, or its folder is called.

    Args:
        name: The last part of those names.
    """
    return [*(f"{collection}/{name}" for collection in _COLLECTIONS), name]


def _share(percent: str) -> float:
    """Return a percentage as a share, without the noise of a binary division."""
    return round(float(percent) / 100, 6)


def read_paper(name: str = PAPER) -> Paper:
    """Read a paper's figures from the package data.

    Args:
        name: The files' name without ending.
    """
    folder = files("clip_pgs.evaluation.report")
    facts: dict[str, Any] = json.loads(folder.joinpath(f"{name}.json").read_text("utf-8"))
    sizes = {
        suite: {dataset: (low, high) for dataset, (low, high) in of_suite.items()}
        for suite, of_suite in facts.pop("sizes").items()
    }
    lines = folder.joinpath(f"{name}.csv").read_text("utf-8").splitlines()
    return Paper(sizes=sizes, rows=tuple(csv.DictReader(lines)), **facts)
