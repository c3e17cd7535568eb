"""Tiny data sets in clip_benchmark's webdataset layout; a picture is one of twelve colors."""

import io
import json
import tarfile
from pathlib import Path

import torch
from PIL import Image

NUM_COLORS = 12
COLORS = torch.nn.functional.normalize(
    torch.randn(NUM_COLORS, 3, generator=torch.Generator().manual_seed(0)), dim=-1
)


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
