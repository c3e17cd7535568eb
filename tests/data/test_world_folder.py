from __future__ import annotations

import json
import shutil
import threading
import time

import pytest

from clip_pgs.data.__main__ import main
from clip_pgs.data.world import describe_world, write_world

TINY = {"num_train": 4, "num_val": 2, "num_per_class": 1}
NUM_VARIANTS = 5


def contents(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def test_complete_world_is_left_alone(tmp_path):
    write_world(tmp_path / "demo", **TINY)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*")}
    write_world(tmp_path / "demo", **TINY)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*")} == times


@pytest.mark.parametrize("damage", ["world.json", "train/00000.tar", "words.json"])
def test_world_that_lost_a_file_is_written_anew(tmp_path, damage):
    root = tmp_path / "demo"
    write_world(root, **TINY)
    before = contents(root)
    (root / damage).unlink()
    write_world(root, **TINY)
    assert contents(root) == before


def test_truncated_shard_is_written_anew(tmp_path):
    root = tmp_path / "demo"
    write_world(root, **TINY)
    before = contents(root)
    with (root / "train" / "00000.tar").open("r+b") as file:
        file.truncate(1000)
    write_world(root, **TINY)
    assert contents(root) == before


SAME = b'"version": 2, "seed": 0, "num_train": 4, "num_val": 2, "num_per_class": 1'


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b"{%s}" % SAME,
        b'{%s, "files": []}' % SAME,
        b'{%s, "files": {}, "parts": {"train": 4}}' % SAME,
        b'{%s, "files": {}, "parts": {}}' % SAME,
        b'{%s, "files": {"../demo": "4"}, "parts": {"train": {"num_samples": 4}}}' % SAME,
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


def test_world_of_the_first_version_is_replaced(tmp_path):
    root = tmp_path / "demo"
    write_world(root, **TINY)
    expected = contents(root)
    world = json.loads((root / "world.json").read_text())
    for name in ("eval/sugar_crepe", "foreground"):
        shutil.rmtree(root / name)
    files = {name: size for name, size in world["files"].items() if (root / name).exists()}
    first = {**world, "version": 1, "digest": "8d398c", "files": files}
    del first["parts"]
    (root / "world.json").write_text(json.dumps(first))
    write_world(root, **TINY)
    assert contents(root) == expected


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


def test_folder_with_other_files_is_refused_and_kept(tmp_path):
    (tmp_path / "diary.txt").write_text("dear diary")
    with pytest.raises(ValueError, match="something else than a demo world"):
        write_world(tmp_path, **TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["diary.txt"]


@pytest.mark.parametrize("counts", [{"num_train": 0}, {"num_val": -1}, {"num_per_class": 0}])
def test_count_below_one_is_refused(tmp_path, counts):
    with pytest.raises(ValueError, match="must be at least 1"):
        write_world(tmp_path / "demo", **counts)
