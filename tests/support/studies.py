"""Studies of two arms and two seeds on a few pictures."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from clip_pgs.evaluation.results import DONE, Result, write_result
from clip_pgs.study.plan import read_study
from clip_pgs.study.record import Evaluated, Record, Spent, write_record
from support.eval_sets import write_dataset
from support.runs import write_model, write_shards


@dataclass
class Files:
    """Where a study's file and results are; everything it needs lies in `folder`."""

    folder: Path

    @property
    def path(self):
        return self.folder / "study.yaml"

    @property
    def root(self):
        return self.folder / "logs"

    @property
    def study(self):
        return self.root / "tiny"

    def change(self, **parts):
        """Write the study file with other parts; None takes one out."""
        content = yaml.safe_load(self.path.read_text()) | parts
        kept = {name: value for name, value in content.items() if value is not None}
        self.path.write_text(yaml.safe_dump(kept, sort_keys=False))

    def argv(self, *flags):
        return [str(self.path), "--logs", str(self.root), *map(str, flags)]

    def start(self, *flags):
        """Start the command as a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "clip_pgs.study", *self.argv(*flags)],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def record(self, arm, seed):
        return json.loads((self.study / arm / f"seed_{seed}" / "study.json").read_text())


def write_study(folder):
    """Write a study and all that it needs."""
    data = write_shards(folder / "train", num_shards=1, samples_per_shard=16)
    order = [0, 0, 1, 1, 2, 2, 3, 3]
    samples = [(color, number) for number, color in enumerate(order)]
    labels = [(color, color) for color in order]
    write_dataset(folder / "sets/four", labels, kind="classification", num_classes=4)
    pairs = [(color, [f"number {number}"]) for color, number in samples]
    write_dataset(folder / "sets/pairs", pairs, kind="retrieval")
    (folder / "sets.txt").write_text("four\npairs\n")
    base = {
        "model-config": str(write_model(folder)),
        "train-data": data,
        "batch-size": 8,
        "epochs": 1,
        "warmup": 1,
        "lr": 1e-3,
        "workers": 0,
        "device": "cpu",
        "log-every-n-steps": 1,
        "save-most-recent": True,
        "save-frequency": 0,
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    study = {
        "name": "tiny",
        "base": "base.yaml",
        "overrides": {"mask-ratio": 0.5},
        "seeds": [0, 1],
        "evaluations": [
            {
                "suite": "all",
                "datasets": str(folder / "sets.txt"),
                "data-root": str(folder / "sets"),
                "workers": 0,
            }
        ],
        "arms": {
            "random": {"train": {"masking": "random"}},
            "pgs": {
                "train": {"masking": "pgs"},
                "evaluate": {"unmasked": {}, "masked": {"inference-masking": "run"}},
            },
        },
        "reference": "random",
        "metrics": {
            "score": [
                "zeroshot-classification/four/acc1",
                [
                    "zeroshot-retrieval/pairs/text_retrieval_recall@1",
                    "zeroshot-retrieval/pairs/image_retrieval_recall@1",
                ],
            ],
            "recall": "zeroshot-classification/four/mean_per_class_recall",
        },
        "primary": "score",
        "keep_checkpoints": False,
    }
    files = Files(folder)
    files.path.write_text(yaml.safe_dump(study, sort_keys=False))
    return files


def fill(study, values, *, code="one"):
    """Write runs of a study, and results whose primary metric is as said, arm by arm."""
    plan = read_study(study.path, root=study.root)
    for arm, scores in values.items():
        for seed, score in enumerate(scores):
            run = plan.run(arm, seed)
            done = Evaluated(plan.evaluate_arguments(arm, "unmasked"), code, 1.0)
            spent = Spent(1e12 if arm == "random" else 2e12, 60.0, "1 x a test")
            write_record(Record("0", [code], "", spent, {"unmasked": done}), run)
            folder = plan.results(arm, seed, "unmasked")
            # The mean of the two retrievals is the score, too.
            recalls = {"text_retrieval_recall@1": score - 0.1}
            recalls |= {"image_retrieval_recall@1": score + 0.1}
            classes = {"acc1": score, "mean_per_class_recall": score}
            for suite, dataset, metrics in (
                ("zeroshot-classification", "four", classes),
                ("zeroshot-retrieval", "pairs", recalls),
            ):
                result = Result(
                    suite=suite,
                    dataset=dataset,
                    status=DONE,
                    metrics=metrics,
                    samples=8,
                    error=None,
                    seconds=1.0,
                    task=suite,
                    location="",
                    model="m",
                    pretrained="",
                    weights_digest=f"{arm}{seed}",
                    flops_per_image=1e6,
                )
                write_result(result, folder / f"{suite}.json")
