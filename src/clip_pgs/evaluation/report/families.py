"""Two families of data sets: the paper's, and all others, which no published row is about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from clip_pgs.evaluation.published import Paper
from clip_pgs.evaluation.results import DONE, Result

PAPER_SETS, OTHER_SETS = "paper", "other"


def split_families(results: Iterable[Result], paper: Paper) -> dict[str, list[Result]]:
    """Part the results of one run into the paper's data sets and others.

    A slice of a set of the paper, or another set of its name (the demo world has its own
    `sugar_crepe`), counts as another set; so do the missing and failed sets beside it.

    Args:
        results: Of one run.
        paper: Knows its sets by name and size.

    Returns:
        The results by family; those on the paper's sets under its names for them, each once: a
        second copy, such as `cifar10` beside `vtab/cifar10`, is another set.
    """
    results = list(results)
    namesakes = {
        result.suite
        for result in results
        if result.status == DONE
        and paper.set_name(result) is None
        and paper.set_name(replace(result, status="")) is not None
    }
    families: dict[str, list[Result]] = {PAPER_SETS: [], OTHER_SETS: []}
    taken = set()
    for result in results:
        name = paper.set_name(result)
        is_stray = result.status != DONE and result.suite in namesakes
        if name is None or is_stray or (result.suite, name) in taken:
            families[OTHER_SETS].append(result)
        else:
            families[PAPER_SETS].append(replace(result, dataset=name))
            taken.add((result.suite, name))
    return families
