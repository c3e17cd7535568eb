from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import open_clip
import webdataset
from PIL import Image

from clip_pgs.data.world import WORLD_VERSION, draw_scene
from clip_pgs.data.world.hard_negatives import TASKS, hard_negatives
from clip_pgs.data.world.parts import list_parts
from clip_pgs.data.world.shard_file import Digest
from clip_pgs.data.world.splits import EVAL_SETS, captioned, held_out, shown
from clip_pgs.data.world.vocabulary import SHAPES
from support.worlds import COUNTS, VARIANTS, members

# Of the world with these counts and seed 0, the first 16 digits. They change with WORLD_VERSION and
# with nothing else.
DIGESTS = {
    "train": "11c3af2ec13df1ec",
    "val": "711b11a32bdfee81",
    "eval/shape": "55e6a7aa1cbd10ea",
    "eval/color": "dd160c5deef9646d",
    "eval/retrieval": "0263073482cf71be",
    "eval/shape_noise": "4b3a9e9aa4a42b27",
    "eval/shape_blur": "8ab5bfed877141b3",
    "eval/shape_grey": "10b9c8fda7d2ffa5",
    "eval/shape_outline": "81aff05d19cc02ac",
    "eval/shape_background": "ccbe6be6b79b20bc",
    "eval/sugar_crepe": "1c1fc954bc7ac6d2",
    "scenes": "3d4a0e8e7874c795",
    "foreground": "49b389c7d166ddf1",
}
# Of what the first version held. What a model learns and its figures on these sets depend on it, so
# that it changes with SCENE_VERSION and with nothing else.
FIRST_PARTS = ("train", "val", "eval/shape", "eval/color", "eval/retrieval", "scenes")
FIRST_DIGEST = "8d398c569b773d8dc7a6390716ce64fdbdca2c3641e369d8af6f26df911d0931"


def contents(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def test_digests_of_pixels_masks_and_captions_are_the_published_ones(world):
    stated = json.loads((world / "world.json").read_text())
    assert stated["version"] == WORLD_VERSION
    assert {name: part["digest"][:16] for name, part in stated["parts"].items()} == DIGESTS


def test_what_the_first_version_held_is_as_it_was(tmp_path):
    parts = {part.name: part for part in list_parts(0, **COUNTS)}
    digest = Digest()
    for name in FIRST_PARTS:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        parts[name].write(folder, digest, lambda: None)
    assert digest.hexdigest() == FIRST_DIGEST


def test_another_process_writes_the_same_bytes(world, tmp_path):
    script = (
        "from clip_pgs.data.world import write_world;"
        f"write_world({str(tmp_path / 'again')!r}, **{COUNTS!r})"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    assert contents(tmp_path / "again") == contents(world)


def test_folder_has_the_documented_layout(world):
    assert set(contents(world)) == {
        "world.json",
        "words.json",
        "train/00000.tar",
        "train/sizes.json",
        "val/00000.tar",
        "val/sizes.json",
        *(f"scenes/{folder}{number}.png" for folder in ("", "masks/") for number in range(6)),
        "scenes/captions.txt",
        *(
            f"eval/{name}/{file}"
            for name in ("shape", "color")
            for file in (
                "classnames.txt",
                "zeroshot_classification_templates.txt",
                "dataset_type.txt",
                "train/nshards.txt",
                "train/0.tar",
                "test/nshards.txt",
                "test/0.tar",
            )
        ),
        "eval/retrieval/dataset_type.txt",
        "eval/retrieval/test/nshards.txt",
        "eval/retrieval/test/0.tar",
        *(
            f"eval/{name}/{file}"
            for name in VARIANTS
            for file in (
                "classnames.txt",
                "zeroshot_classification_templates.txt",
                "dataset_type.txt",
                "test/nshards.txt",
                "test/0.tar",
            )
        ),
        *(f"eval/sugar_crepe/{task}.json" for task in TASKS),
        *(
            f"eval/sugar_crepe/val2017/{task}-{number:06d}.jpg"
            for task in TASKS
            for number in range(9)
        ),
        *(f"foreground/images/{number}.png" for number in range(6)),
        *(f"foreground/masks/{number}.png" for number in range(6)),
    }
    assert json.loads((world / "train" / "sizes.json").read_text()) == {"00000.tar": 24}


def test_train_shards_open_through_webdataset(world):
    shard = str(world / "train" / "00000.tar")
    dataset = webdataset.WebDataset(shard, shardshuffle=False).decode("pil")
    samples = list(dataset.to_tuple("jpg", "txt", "json", "mask.png"))
    assert len(samples) == 24
    image, caption, scene, mask = samples[0]
    assert image.size == mask.size == (64, 64)
    assert scene["things"][0]["shape"] in SHAPES
    assert len(caption.split()) > 1


def test_stored_picture_and_mask_are_those_of_the_drawn_scene(world):
    stored = members(world / "train" / "00000.tar")
    for sample in captioned("train", 0, 0, 5):
        drawing = draw_scene(sample.scene)
        picture = np.asarray(Image.open(io.BytesIO(stored[f"{sample.key}.jpg"]))).astype(int)
        mask = np.asarray(Image.open(io.BytesIO(stored[f"{sample.key}.mask.png"])))
        assert np.abs(picture - drawing.pixels).mean() < 4
        assert np.array_equal(mask, drawing.foreground)
        assert stored[f"{sample.key}.txt"].decode() == sample.caption


def test_no_image_is_in_two_splits(world):
    pictures = Counter()
    for shard in world.rglob("*.tar"):
        pictures.update(data for name, data in members(shard).items() if name.endswith(".jpg"))
    pictures.update(path.read_bytes() for path in world.rglob("*.jpg"))
    pictures.update(path.read_bytes() for path in world.rglob("*.png") if "masks" not in path.parts)
    tests, crepes, shown_and_foreground = 3 * 12 * (1 + len(VARIANTS)) + 3 * 10 + 18, 7 * 9, 6 + 6
    assert len(pictures) == 24 + 8 + 3 * (12 + 10) + tests + crepes + shown_and_foreground
    assert max(pictures.values()) == 1


def test_every_caption_fits_the_demo_models_context():
    tokenizer = open_clip.SimpleTokenizer()
    captions = [sample.caption for sample in captioned("train", 0, 0, 2000)]
    captions += [sample.caption for sample in EVAL_SETS["retrieval"].splits["test"](0, 100)]
    items = [item for task in TASKS for item in hard_negatives(task, 0, 150)]
    captions += [caption for item in items for caption in (item.sample.caption, item.negative)]
    assert max(len(tokenizer.encode(caption)) for caption in captions) + 2 <= 32


def test_shown_scenes_are_saved_with_masks_and_captions(world):
    captions = (world / "scenes" / "captions.txt").read_text().splitlines()
    for number, sample in enumerate(shown(0)):
        drawing = draw_scene(sample.scene)
        picture = Image.open(world / "scenes" / f"{number}.png")
        mask = Image.open(world / "scenes" / "masks" / f"{number}.png")
        assert np.array_equal(np.asarray(picture), drawing.pixels)
        assert np.array_equal(np.asarray(mask), drawing.foreground)
        assert captions[number] == sample.caption


def test_foreground_pictures_and_masks_have_the_same_names(world):
    folder = world / "foreground"
    for number, sample in enumerate(held_out(0, 6)):
        drawing = draw_scene(sample.scene)
        picture = Image.open(folder / "images" / f"{number}.png")
        mask = Image.open(folder / "masks" / f"{number}.png")
        assert np.array_equal(np.asarray(picture), drawing.pixels)
        assert np.array_equal(np.asarray(mask), drawing.foreground)


def test_foreground_scenes_are_those_of_training_in_kind():
    numbers = Counter(len(sample.scene.things) for sample in held_out(0, 100))
    assert numbers.keys() == {1, 2, 3}


def test_names_of_pictures_sort_in_their_order(tmp_path):
    counts = {"num_train": 4, "num_val": 2, "num_per_class": 6}
    (part,) = (part for part in list_parts(0, **counts) if part.name == "foreground")
    part.write(tmp_path, Digest(), lambda: None)
    names = sorted(path.name for path in (tmp_path / "masks").iterdir())
    assert names == [f"{number:02d}.png" for number in range(12)]


def test_words_of_the_training_captions_are_counted(world):
    captions = (sample.caption for sample in captioned("train", 0, 0, COUNTS["num_train"]))
    expected = Counter(word for text in captions for word in re.findall(r"\w+", text.lower()))
    counts = json.loads((world / "words.json").read_text())["counts"]
    assert {word: count for word, count in counts.items() if word.isalnum()} == expected


def test_larger_training_set_starts_with_the_smaller_one():
    smaller, larger = captioned("train", 0, 0, 3), captioned("train", 0, 0, 5)
    assert list(smaller) == list(larger)[:3]


def test_seeds_share_no_scene():
    first, second = ({s.scene for s in captioned("train", seed, 0, 50)} for seed in (0, 1))
    assert not first & second
