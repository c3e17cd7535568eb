"""The evaluation sets of the demo world, as clip_benchmark reads them."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from clip_benchmark.datasets.builder import build_dataset

from clip_pgs.data.world.captions import TASKS, hard_negatives
from clip_pgs.data.world.draw import draw_scene
from clip_pgs.data.world.scene import COLORS, SHAPES
from support.worlds import VARIANTS, members


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *((name, split) for name in ("shape", "color") for split in ("train", "test")),
        *((name, "test") for name in VARIANTS),
    ],
)
def test_clip_benchmark_reads_balanced_classes(world, name, split):
    root = str(world / "eval" / name)
    dataset = build_dataset(f"wds/{name}", root=root, split=split, transform=np.asarray)
    counts = Counter(label for _, label in dataset)
    assert dataset.classes == list(COLORS if name == "color" else SHAPES)
    assert all("{c}" in template for template in dataset.templates)
    assert set(counts) == set(range(len(dataset.classes)))
    assert len(set(counts.values())) == 1


def test_labels_name_what_is_drawn(world):
    for name, attribute in (("shape", "shape"), ("color", "color")):
        classes = (world / "eval" / name / "classnames.txt").read_text().split()
        stored = members(world / "eval" / name / "test" / "0.tar")
        labels = [key for key in stored if key.endswith(".cls")]
        for key in labels:
            scene = json.loads(stored[key.replace(".cls", ".json")])
            assert classes[int(stored[key])] == scene["things"][0][attribute]


def test_clip_benchmark_reads_retrieval_captions_that_are_all_different(world):
    root = str(world / "eval" / "retrieval")
    dataset = build_dataset(
        "wds/retrieval", root=root, task="zeroshot_retrieval", transform=np.asarray
    )
    captions = [lines for _, lines in dataset]
    assert all(len(lines) == 1 for lines in captions)
    assert len({lines[0] for lines in captions}) == len(captions) == 18


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_has_the_keys_labels_and_masks_of_shape_in_its_order(world, name):
    plain = members(world / "eval" / "shape" / "test" / "0.tar")
    variant = members(world / "eval" / name / "test" / "0.tar")
    assert list(variant) == list(plain)
    for member, data in plain.items():
        if member.endswith((".cls", ".mask.png")):
            assert variant[member] == data
    for file in ("classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"):
        assert (world / "eval" / name / file).read_bytes() == (
            world / "eval" / "shape" / file
        ).read_bytes()


@pytest.mark.parametrize("task", TASKS)
def test_clip_benchmark_reads_hard_negatives(world, task):
    dataset = build_dataset(
        f"sugar_crepe/{task}",
        root=str(world / "eval" / "sugar_crepe"),
        task="image_caption_selection",
        transform=np.asarray,
    )
    assert len(dataset) == 9
    for item, (picture, captions) in zip(hard_negatives(task, 0, 9), dataset, strict=False):
        assert captions == [item.sample.caption, item.negative]
        difference = picture.astype(int) - draw_scene(item.sample.scene).pixels
        assert np.abs(difference).mean() < 6
