"""Averages over data sets, as the CLIP-PGS paper (https://arxiv.org/abs/2503.17080) takes them.

Robustness: `id_average` is the mean over all sets, ImageNet-1K among them, and `ood_average` the
mean without it. Compositionality: `object` is the mean of SugarCrepe's add_obj, replace_obj and
swap_obj, `attribute` that of add_att, replace_att and swap_att, and `relation` is replace_rel.
The paper's printed averages follow from its cells but for these: the `ood_average` of CLIP is 29.9
(printed 29.0) and of A-CLIP 29.3 (30.3); the `object` average of CLIP is 73.9 (73.7) and of A-CLIP
70.2 (71.6); the `attribute` average of A-CLIP is 68.5 (68.4) and of E-CLIP 67.9 (68.4).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from clip_pgs.evaluation.results import DONE, Result, ordered_metrics

# The sets that others vary, where a result does not say it of itself.
REFERENCE_NAMES = ("imagenet1k", "shape")
COMPOSITIONALITY_PARTS = {
    "object": ("add_obj", "replace_obj", "swap_obj"),
    "attribute": ("add_att", "replace_att", "swap_att"),
    "relation": ("replace_rel",),
}


@dataclass(frozen=True)
class Average:
    """One metric, averaged.

    Attributes:
        suite: Such as "robustness".
        name: "average", over the suite; "id_average", "ood_average", "object", "attribute" or
            "relation".
        metric: Such as "acc1".
        value: Mean over `sets`, in [0, 1].
        sets: The data sets that it covers.
        missing: Those that belong to it but have no such number. Beside published averages such a
            mean says nothing.
    """

    suite: str
    name: str
    metric: str
    value: float
    sets: tuple[str, ...]
    missing: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether every data set that belongs to the average is in it."""
        return not self.missing


def averages(results: Iterable[Result]) -> list[Average]:
    """Average the results of one model.

    Args:
        results: Of any suites, finished or not.

    Returns:
        The averages, suite by suite in the order of the results. One that covers no data set is
        left out, and so are `id_average` and `ood_average` where it is unknown which set is the
        original: the one whose `details` hold `is_reference`, else one of `REFERENCE_NAMES`.

    Raises:
        ValueError: If the results are those of several models, or of one set twice.
    """
    results = list(results)
    digests = {result.weights_digest for result in results}
    if len(digests) > 1:
        raise ValueError(f"averages are of one model's results, got those of {len(digests)}")
    averaged = []
    for suite in dict.fromkeys(result.suite for result in results):
        members = [result for result in results if result.suite == suite]
        names = [result.dataset for result in members]
        if len(set(names)) < len(names):
            raise ValueError(f"averages of {suite} need each data set once, got {', '.join(names)}")
        for name, group in _groups(suite, members).items():
            averaged += _means(suite, name, group, members)
    return averaged


def _groups(suite: str, members: Sequence[Result]) -> dict[str, list[str]]:
    """Return which data sets each average of a suite covers."""
    names = [result.dataset for result in members]
    groups = {"average": names}
    if suite == "robustness":
        references = _references(members)
        if references:
            groups["id_average"] = names
            groups["ood_average"] = [name for name in names if name not in references]
    if suite == "compositionality":
        folders = dict.fromkeys(name.rpartition("/")[0] for name in names)
        for part, splits in COMPOSITIONALITY_PARTS.items():
            # With several folders, as a list of one's own may have, each split counts in each.
            groups[part] = [
                f"{folder}/{split}" if folder else split for folder in folders for split in splits
            ]
    return groups


def _references(members: Sequence[Result]) -> set[str]:
    declared = {result.dataset for result in members if result.details.get("is_reference")}
    return declared or {result.dataset for result in members if result.dataset in REFERENCE_NAMES}


def _means(suite: str, name: str, group: Sequence[str], members: Sequence[Result]) -> list[Average]:
    by_name = {result.dataset: result for result in members if result.status == DONE}
    means = []
    for metric in ordered_metrics(by_name.values()):
        values = {
            dataset: value
            for dataset in group
            if dataset in by_name and (value := by_name[dataset].metrics.get(metric)) is not None
        }
        if values:
            missing = tuple(dataset for dataset in group if dataset not in values)
            mean = sum(values.values()) / len(values)
            means.append(Average(suite, name, metric, mean, tuple(values), missing))
    return means
