"""Print means and 95 % intervals over seeds of the runs that compare_maskings.sh made.

python scripts/compare_table.py none random pgs
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np
from scipy import stats

COLUMNS = {
    "image R@1": "image_retrieval_recall@1",
    "image R@5": "image_retrieval_recall@5",
    "image R@10": "image_retrieval_recall@10",
    "text R@10": "text_retrieval_recall@10",
    "acc1": "acc1",
    "acc5": "acc5",
}


def read_run(folder: Path) -> dict[str, float]:
    """Return a run's scores in percent by "data set, metric", and its cost."""
    scores: dict[str, float] = {}
    with (folder / "eval" / "results.csv").open() as file:
        for row in csv.DictReader(file):
            for title, name in COLUMNS.items():
                if row.get(name):
                    scores[f"{row['dataset']}, {title}"] = 100 * float(row[name])
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    scores["TFLOPs of training"] = last["flops"] / 1e12
    return scores


def interval(values: list[float]) -> str:
    """Return mean and half width of the 95 % interval of the mean (Student's t)."""
    if len(set(values)) == 1:
        return f"{values[0]:.2f}"
    error = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return f"{np.mean(values):.2f} ± {error:.2f}"


def main() -> None:
    """Print a Markdown table, a row per score and a column per masking."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("maskings", nargs="+")
    parser.add_argument("--logs", type=Path, default=Path("logs"))
    options = parser.parse_args()
    runs = {
        masking: [read_run(path) for path in sorted(options.logs.glob(f"compare_{masking}_*/"))]
        for masking in options.maskings
    }
    titles = [f"`{name}`, {len(found)} seeds" for name, found in runs.items()]
    print("| | " + " | ".join(titles) + " |")
    print("|---" * (len(runs) + 1) + "|")
    for score in runs[options.maskings[0]][0]:
        cells = [interval([run[score] for run in found]) for found in runs.values()]
        print(f"| {score} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
