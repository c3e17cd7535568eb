"""The folder of the demo world: its content, and when it is written."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import open_clip
import pytest
import webdataset
from PIL import Image

from clip_pgs.data import commands
from clip_pgs.data.__main__ import main
from clip_pgs.data.world import writing
from clip_pgs.data.world.captions import TASKS, hard_negatives
from clip_pgs.data.world.draw import draw_scene
from clip_pgs.data.world.scene import SHAPES, WORLD_VERSION
from clip_pgs.data.world.splits import EVAL_SETS, captioned, held_out, shown
from clip_pgs.data.world.writing import Record, describe_world, list_parts, write_world
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
    record = Record()
    for name in FIRST_PARTS:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        parts[name].write(folder, record, map)
    assert record.digest() == FIRST_DIGEST


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(world, tmp_path):
    script = (
        "from clip_pgs.data.world.writing import write_world;"
        f"write_world({str(tmp_path / 'again')!r}, **{COUNTS!r})"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    assert contents(tmp_path / "again") == contents(world)


@pytest.mark.slow
def test_two_processes_draw_the_same_bytes(world, tmp_path):
    write_world(tmp_path / "again", **COUNTS, num_workers=2)
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
    part.write(tmp_path, Record(), map)
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


TINY = {"num_train": 4, "num_val": 2, "num_per_class": 1}
NUM_VARIANTS = 5


@pytest.fixture(scope="module")
def tiny_world(tmp_path_factory):
    """The folder of a world of `TINY`, which stays as it is."""
    root = tmp_path_factory.mktemp("tiny") / "demo"
    write_world(root, **TINY)
    return root


@pytest.fixture
def tiny(tiny_world, tmp_path):
    """A world of `TINY` of the test's own, with the times of its files."""
    return shutil.copytree(tiny_world, tmp_path / "demo")


def test_complete_world_is_left_alone(tiny):
    times = {path: path.stat().st_mtime_ns for path in tiny.rglob("*")}
    write_world(tiny, **TINY)
    assert {path: path.stat().st_mtime_ns for path in tiny.rglob("*")} == times


@pytest.mark.parametrize("damage", ["train/00000.tar", "words.json"])
def test_world_that_lost_a_file_is_written_anew(tiny, damage):
    before = contents(tiny)
    (tiny / damage).unlink()
    # As reading a larger shard leaves it.
    (tiny / "train" / ".00000.tar.index").write_bytes(b"")
    write_world(tiny, **TINY)
    assert contents(tiny) == before


def test_truncated_shard_is_written_anew(tiny):
    before = contents(tiny)
    with (tiny / "train" / "00000.tar").open("r+b") as file:
        file.truncate(1000)
    write_world(tiny, **TINY)
    assert contents(tiny) == before


SAME = b'"version": 2, "seed": 0, "num_train": 4, "num_val": 2, "num_per_class": 1'


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b'{%s, "files": {}, "parts": {"train": 4}}' % SAME,
        *(
            pytest.param(content, marks=pytest.mark.slow)
            for content in (
                b"\xff",
                b"[" * 100_000,
                b"{%s}" % SAME,
                b'{%s, "files": []}' % SAME,
                b'{%s, "files": {}, "parts": {}}' % SAME,
                b'{%s, "files": {"../demo": "4"}, "parts": {"train": {"num_samples": 4}}}' % SAME,
            )
        ),
    ],
)
def test_a_world_file_that_says_something_else_is_written_anew(tmp_path, content):
    root = tmp_path / "demo"
    root.mkdir()
    (root / "world.json").write_bytes(content)
    write_world(root, **TINY)
    assert "captioned scenes" in describe_world(root)


def test_a_link_to_a_folder_elsewhere_is_filled(tmp_path):
    (tmp_path / "demo").symlink_to(tmp_path / "disk" / "worlds")
    for seed in (0, 1):
        write_world(tmp_path / "demo", **TINY, seed=seed)
        assert json.loads((tmp_path / "disk/worlds/world.json").read_text())["seed"] == seed
    assert (tmp_path / "demo").is_symlink()


def test_of_two_that_write_one_world_at_a_time_one_waits(tmp_path):
    root = tmp_path / "demo"
    other = threading.Thread(target=write_world, args=(root,), kwargs=TINY)

    def start_the_other(done, total):
        if done == 3:
            other.start()
            time.sleep(0.2)

    write_world(root, **TINY, progress=start_the_other)
    other.join()
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_world_of_another_seed_is_replaced(tmp_path):
    root = tmp_path / "demo"
    write_world(root, **TINY, seed=1)
    write_world(root, **TINY, seed=0)
    assert json.loads((root / "world.json").read_text())["seed"] == 0


def test_world_of_the_first_version_is_replaced(tiny):
    expected = contents(tiny)
    world = json.loads((tiny / "world.json").read_text())
    for name in ("eval/sugar_crepe", "foreground"):
        shutil.rmtree(tiny / name)
    files = {name: size for name, size in world["files"].items() if (tiny / name).exists()}
    first = {**world, "version": 1, "digest": "8d398c", "files": files}
    del first["parts"]
    (tiny / "world.json").write_text(json.dumps(first))
    write_world(tiny, **TINY)
    assert contents(tiny) == expected


def test_interrupted_run_leaves_no_folder_and_the_next_one_completes(tmp_path):
    def interrupt(done, total):
        if done == 3:
            raise KeyboardInterrupt

    root = tmp_path / "demo"
    with pytest.raises(KeyboardInterrupt):
        write_world(root, **TINY, progress=interrupt)
    assert not root.exists()
    write_world(root, **TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_progress_counts_every_sample(tmp_path):
    calls = []
    write_world(tmp_path / "demo", **TINY, progress=lambda *call: calls.append(call))
    num_classified = 2 * (12 + 10) + NUM_VARIANTS * 12
    total = 4 + 2 + num_classified + 6 + 7 * 3 + 6 + 2
    assert calls == [(done, total) for done in range(1, total + 1)]


def test_command_lists_what_it_made(tmp_path, capsys):
    options = ["--num-train", "4", "--num-val", "2", "--num-per-class", "1"]
    assert main(["world", str(tmp_path / "demo"), *options]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"the demo world is in {tmp_path / 'demo'}"
    listed = {line.split()[0]: int(line.split()[1]) for line in lines}
    folders = {path.name for path in (tmp_path / "demo" / "eval").iterdir()}
    assert {f"eval/{name}" for name in folders} < listed.keys()
    assert listed["train"] == 4
    assert listed["eval/shape"] == 24
    assert listed["eval/sugar_crepe"] == 21
    assert listed["foreground"] == 2


@pytest.mark.parametrize("flag", ["--num-train", "--num-val", "--num-per-class"])
def test_a_world_that_the_disk_has_no_room_for_is_refused(tmp_path, capsys, flag):
    assert main(["world", str(tmp_path / "new/world"), flag, "9" * 17]) == 2
    assert "GB free" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["diary.txt", "train/00000.tar", "eval/mine/test/0.tar", "val/.00000.tar.index"]
)
def test_folder_with_other_files_is_refused_and_kept(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("dear diary")
    with pytest.raises(ValueError, match=f"something else than a demo world, {re.escape(name)}"):
        write_world(tmp_path, **TINY)
    assert contents(tmp_path) == {name: b"dear diary"}


@pytest.mark.parametrize(
    "name", ["train/00001.tar", "eval/mine/test/0.tar", "eval/color/notes.txt", "masks"]
)
def test_a_file_of_ones_own_in_a_world_is_kept(tiny, tmp_path, name):
    if name == "masks":
        (tiny / name).symlink_to(tmp_path)
    else:
        (tiny / name).parent.mkdir(parents=True, exist_ok=True)
        (tiny / name).write_text("mine")
    before = contents(tiny)
    # It is in nobody's way as long as the world is whole.
    write_world(tiny, **TINY)
    with pytest.raises(ValueError, match=re.escape(name)):
        write_world(tiny, **TINY, seed=1)
    (tiny / "val" / "00000.tar").unlink()
    with pytest.raises(ValueError, match=re.escape(name)):
        write_world(tiny, **TINY)
    del before["val/00000.tar"]
    assert contents(tiny) == before


def test_a_world_that_lost_what_names_its_files_is_no_world(tiny):
    (tiny / "world.json").unlink()
    before = contents(tiny)
    with pytest.raises(ValueError, match="something else than a demo world"):
        write_world(tiny, **TINY)
    assert contents(tiny) == before


@pytest.mark.parametrize(
    "counts", [{"num_train": 0}, {"num_val": -1}, {"num_per_class": 0}, {"num_workers": 0}]
)
def test_count_below_one_is_refused(tmp_path, counts):
    with pytest.raises(ValueError, match="must be at least 1"):
        write_world(tmp_path / "demo", **counts)


def test_a_killed_process_ends_the_command_in_a_sentence(tmp_path, monkeypatch, capsys):
    parent, draw = os.getpid(), writing.draw_scene

    def draw_or_die(scene):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(scene)

    # By this name processes find it again.
    monkeypatch.setattr(draw_or_die, "__module__", writing.__name__)
    monkeypatch.setattr(draw_or_die, "__qualname__", "draw_scene")
    monkeypatch.setattr(writing, "draw_scene", draw_or_die)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(commands, "_SIGNAL_SECONDS", 0.0)
    counts = [f"--num-{name}=40" for name in ("train", "val")]
    assert main(["world", str(tmp_path / "demo"), *counts, "--num-per-class=1"]) == 1
    error = "error: one of 2 processes that draw scenes was killed, maybe for want of memory\n"
    assert capsys.readouterr().err.endswith(error)
    assert list(tmp_path.iterdir()) == []
