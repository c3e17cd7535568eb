"""Runs and results made up for reports, with numbers that can be followed by hand."""

from dataclasses import replace
from html.parser import HTMLParser

import torch

from clip_pgs.checkpoint_reading import weights_digest
from clip_pgs.evaluation import Result
from clip_pgs.evaluation.results import write_result

# A model whose name is markup in HTML and in Markdown.
EVIL_NAME = '<b>"R&D"</b> | `x`'
DEMO_SHAPE_ACC = (0.50, 0.53, 0.62)
DEMO_PAIRS = {"replace_obj": 0.8, "swap_obj": 0.6, "add_att": 0.7}


def make_result(dataset, suite="zeroshot-classification", metrics=None, **changes):
    fields = {
        "status": "done",
        "samples": 600,
        "error": None,
        "seconds": 1.0,
        "task": "",
        "location": "",
        "model": "demo",
        "pretrained": "",
        "weights_digest": "d0",
        "date": "2026-11-22T03:00:00+00:00",
        "versions": {"torch": "2.11.0"},
    }
    return Result(suite=suite, dataset=dataset, metrics=metrics or {}, **{**fields, **changes})


def save_results(folder, results):
    for result in results:
        name = f"{result.suite}_{result.dataset}".replace("/", "-")
        write_result(result, folder / f"{name}.json")


def save_checkpoint(run, *, seed=0, masking="pgs", samples=60_000, **record):
    """Write a checkpoint as training does, with a weight or two, and return their digest."""
    cost = {"steps": 900, "samples": samples, "flops": 4.4e13, "seconds": 185.0}
    record = {
        "version": "0.1.0",
        "model": "demo_vit",
        "masking": masking,
        "masking_options": {} if masking == "none" else {"mask_ratio": 0.5},
        "data": {"train_data": "data/demo/train/{00000..00011}.tar", "dataset_type": "webdataset"},
        "recipe": {"epochs": 5, "batch_size": 64, "seed": seed},
        "device": "AMD EPYC (2 threads)",
        "world_size": 1,
        "cost": cost,
        **record,
    }
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    weights = {"weight": torch.tensor([seed, samples], dtype=torch.float32)}
    content = {"epoch": 5, "state_dict": weights, "clip_pgs": record}
    torch.save(content, run / "checkpoints/epoch_5.pt")
    return weights_digest(weights)


def demo_results(number=0, **changes):
    """Results on sets that are not the paper's; this `sugar_crepe` is not SugarCrepe."""
    common = {"model": f"demo_{number}", "weights_digest": f"d{number}", **changes}
    shape = {"acc1": DEMO_SHAPE_ACC[number], "acc5": 0.9, "mean_per_class_recall": 0.5}
    retrieval = {
        f"{kind}_retrieval_recall@{k}": value
        for kind in ("text", "image")
        for k, value in ((1, 0.4), (5, 0.8), (10, 0.9))
    }
    robust = {"shape": 0.5, "shape_noise": 0.3, "shape_blur": 0.4}
    return [
        make_result("shape", metrics=shape, details={"classes": 12}, **common),
        make_result("color", metrics={"acc1": 0.9}, details={"classes": 10}, **common),
        make_result("retrieval", "zeroshot-retrieval", retrieval, **{**common, "samples": 300}),
        make_result("shape", "linear-probe", {"lp_acc1": 0.6}, **common),
        *(
            make_result(
                name,
                "robustness",
                {"acc1": value},
                details={"classes": 12, "is_reference": name == "shape"},
                **common,
            )
            for name, value in robust.items()
        ),
        *(
            make_result(
                f"sugar_crepe/{name}",
                "compositionality",
                {"acc": value},
                details={"items": 150, "ties": 2, "images": 90},
                **{**common, "samples": 150},
            )
            for name, value in DEMO_PAIRS.items()
        ),
    ]


def save_run(logs, number=0, results=None, **checkpoint):
    """Write a run and results that tell its training, under digests that can be read."""
    run = logs / f"demo_{number}"
    save_checkpoint(run, seed=number, **checkpoint)
    record = torch.load(run / "checkpoints/epoch_5.pt")["clip_pgs"]
    results = demo_results(number) if results is None else results
    save_results(run / "eval", [replace(result, training=record) for result in results])
    return run


def paper_results(**changes):
    """Results of one model on some of the paper's sets, at their full size."""
    common = {"model": "mine", "weights_digest": "c0", **changes}
    sizes = {
        "imagenet1k": (50_000, 0.370),
        "imagenetv2": (10_000, 0.310),
        "imagenet-a": (7_500, 0.090),
        "imagenet-r": (30_000, 0.480),
        "imagenet-o": (2_000, 0.400),
        "imagenet_sketch": (50_889, 0.250),
    }
    return [
        make_result("food101", metrics={"acc1": 0.45}, **{**common, "samples": 25_250}),
        make_result("vtab/cifar10", metrics={"acc1": 0.65}, **{**common, "samples": 10_000}),
        make_result(
            "sun397",
            status="missing",
            error="no folder data/eval/sun397",
            **{**common, "samples": 0},
        ),
        *(
            make_result(name, "robustness", {"acc1": value}, **{**common, "samples": samples})
            for name, (samples, value) in sizes.items()
        ),
    ]


class Page(HTMLParser):
    """Reads a page: its tables by their label, the addresses that it loads, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.loads, self.tags, self.ids, self.links = {}, [], [], set(), []
        self.text = ""
        self._label = self._row = self._cell = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.ids.add(attributes.get("id"))
        self.loads += [attributes[name] for name in ("src", "srcset", "data") if name in attributes]
        if tag == "link":
            self.loads.append(attributes.get("href"))
        if tag == "a":
            self.links.append(attributes["href"])
        if attributes.get("role") == "region":
            self._label = attributes["aria-label"]
        if tag == "table":
            self.tables[self._label] = []
        if tag == "tr":
            self._row = []
            self.tables[self._label].append(self._row)
        if tag in ("td", "th"):
            self._row.append("")
            self._cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = None
        if tag == "span" and self._cell:
            self._row[-1] += " "

    def handle_data(self, data):
        self.text += data
        if self._cell:
            self._row[-1] += data

    def table(self, beginning):
        """Return the rows of the table whose label begins so, stripped."""
        (rows,) = [rows for label, rows in self.tables.items() if label.startswith(beginning)]
        return [[" ".join(cell.split()) for cell in row] for row in rows]
