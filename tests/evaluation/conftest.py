"""Tiny data sets in clip_benchmark's webdataset layout, and tiny models to score on them."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import ToTensor

from clip_pgs.evaluation import LoadedModel

NUM_COLORS = 12
COLORS = torch.nn.functional.normalize(
    torch.randn(NUM_COLORS, 3, generator=torch.Generator().manual_seed(0)), dim=-1
)

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


def color_png(index: int) -> bytes:
    red, green, blue = ((0.5 + 0.4 * COLORS[index]) * 255).round().int().tolist()
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (red, green, blue)).save(stream, format="png")
    return stream.getvalue()


def write_dataset(
    folder: Path,
    samples,
    *,
    kind: str,
    num_shards: int = 1,
    num_classes: int = 0,
    split: str = "test",
):
    """Write samples, pairs of a colour number and a label (a number, or a list of captions)."""
    (folder / split).mkdir(parents=True)
    (folder / "dataset_type.txt").write_text(kind)
    (folder / split / "nshards.txt").write_text(str(num_shards))
    if kind == "classification":
        names = "".join(f"number {index}\n" for index in range(num_classes))
        (folder / "classnames.txt").write_text(names)
        (folder / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c}\n")
    for shard in range(num_shards):
        with tarfile.open(folder / split / f"{shard}.tar", "w") as tar:
            for key, (color, label) in list(enumerate(samples))[shard::num_shards]:
                is_caption = kind == "retrieval"
                text = "\n".join(label) if is_caption else str(label)
                add_member(tar, f"{key:04}.png", color_png(color))
                add_member(tar, f"{key:04}.{'txt' if is_caption else 'cls'}", text.encode())


def write_pairs(folder: Path, splits) -> None:
    """Write SugarCrepe's layout; a split is triples of a colour, the caption's and the other."""
    (folder / "val2017").mkdir(parents=True, exist_ok=True)
    for split, triples in splits.items():
        items = {}
        for number, (color, true, false) in enumerate(triples):
            (folder / "val2017" / f"{color}.png").write_bytes(color_png(color))
            names = {"caption": f"it is {true}", "negative_caption": f"it is {false}"}
            items[str(number)] = {"filename": f"{color}.png", **names}
        (folder / f"{split}.json").write_text(json.dumps(items))


def add_member(tar, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


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
