"""Tiny data sets in clip_benchmark's webdataset layout, and tiny models to score on them."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torchvision.transforms import ToTensor

from clip_pgs.evaluation import LoadedModel
from support.eval_sets import COLORS, NUM_COLORS, write_dataset, write_pairs

TINY_CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


class ColorModel(torch.nn.Module):
    """Embeds an image as its mean colour, and "number 7" as colour 7: wrong only on wrong data."""

    def __init__(self):
        super().__init__()
        self.colors = torch.nn.Parameter(COLORS.clone())

    def encode_image(self, pixels):
        return pixels.mean(dim=(2, 3)) - 0.5

    def encode_text(self, tokens):
        return self.colors[tokens[:, 0]]


def color_tokenizer(texts):
    return torch.tensor([[int(text.split()[-1])] for text in texts])


@pytest.fixture
def color_model():
    return LoadedModel(ColorModel(), ToTensor(), color_tokenizer, "colors", "a test")


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """Six classes with 3 of 12 test images mislabelled, and a clean train split of 24; 12
    image-caption pairs with 2 swapped; two splits of caption pairs with 1 of 4 and 0 of 2 wrong.
    """
    root = tmp_path_factory.mktemp("sets")
    labels = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    seen = [0, 0, 1, 1, 2, 3, 3, 3, 4, 0, 1, 5]
    write_dataset(
        root / "six",
        list(zip(seen, labels, strict=True)),
        kind="classification",
        num_shards=2,
        num_classes=6,
    )
    write_dataset(
        root / "six",
        [(number % 6, number % 6) for number in range(24)],
        kind="classification",
        num_classes=6,
        split="train",
    )
    write_pairs(
        root / "sugar_crepe",
        {
            "add_att": [(0, 0, 1), (1, 1, 2), (2, 2, 3), (3, 4, 3)],
            "swap_obj": [(5, 5, 6), (6, 6, 7)],
        },
    )
    order = [1, 0, *range(2, NUM_COLORS)]
    pairs = [(color, [f"it is {n}", f"so {n}"]) for color, n in zip(order, range(12), strict=True)]
    write_dataset(root / "pairs", pairs, kind="retrieval")
    return root


@pytest.fixture
def damaged_folder(tmp_path):
    """A data set of two classes whose only shard is no tar file."""
    folder = tmp_path / "damaged"
    (folder / "test").mkdir(parents=True)
    (folder / "test/nshards.txt").write_text("1")
    (folder / "test/0.tar").write_bytes(b"no tar at all" * 100)
    (folder / "classnames.txt").write_text("number 0\nnumber 1\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    return folder


@pytest.fixture
def dataset_list(tmp_path):
    path = tmp_path / "sets.txt"
    path.write_text("six\nwds/pairs  # captions\n")
    return path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A run folder as training leaves it: one checkpoint, and the export of the same weights."""
    run = tmp_path_factory.mktemp("logs") / "tiny_run"
    (run / "checkpoints").mkdir(parents=True)
    config_path = run.parent / "tiny-eval-vit.json"
    config_path.write_text(json.dumps(TINY_CONFIG))
    open_clip.add_model_config(config_path)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-eval-vit")
    save_run_files(run, model)
    return run


@pytest.fixture
def save_run():
    """Return what writes a model as the checkpoint and the export of a run."""
    return save_run_files


def save_run_files(run: Path, model: torch.nn.Module) -> None:
    export = run / "export"
    shutil.rmtree(export, ignore_errors=True)
    export.mkdir(parents=True)
    preprocess = {"size": 16, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    config = {"model_cfg": TINY_CONFIG, "preprocess_cfg": preprocess}
    (export / "open_clip_config.json").write_text(json.dumps(config))
    state_dict = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state_dict, export / "open_clip_model.safetensors")
    (run / "checkpoints").mkdir(exist_ok=True)
    torch.save({"epoch": 1, "state_dict": state_dict}, run / "checkpoints/epoch_1.pt")
    (run / "checkpoints/latest").write_text("epoch_1.pt\n")


@pytest.fixture
def run(finished_run, tmp_path, monkeypatch):
    """A copy of the run in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_run, tmp_path / "logs/tiny_run")
    return Path("logs/tiny_run")


@pytest.fixture
def without_pictures(monkeypatch):
    """Save no drawing, which takes seconds: the figures of a report are empty files."""
    monkeypatch.setattr("clip_pgs.plots.picture", lambda *_, **__: b"")


@pytest.fixture
def options(dataset_list, data_root):
    sets = ["--datasets", str(dataset_list), "--data-root", str(data_root)]
    return [*sets, "--workers", "0", "--no-report"]
