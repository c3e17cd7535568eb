import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from clip_pgs.inspection.__main__ import main
from clip_pgs.inspection.cost.data import read_jpegs
from support.commands import refusal


def jpeg(size=(96, 64)):
    stream = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(stream, "JPEG")
    return stream.getvalue()


# By the last two letters of what it makes.
PACK = {"gz": gzip.compress, "z2": bz2.compress, "xz": lzma.compress}


def long_names():
    """Return a tar archive of headers that each say the name of the next one."""
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 2
    return (member.tobuf(tarfile.GNU_FORMAT) + b"a".ljust(512, b"\0")) * 3000


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "00000.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (("a.jpg", jpeg()), ("a.txt", b"text"), ("b.JPEG", jpeg((40, 30)))):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_shards_and_folders_give_their_jpeg_files(shard, tmp_path):
    (tmp_path / "c.jpg").write_bytes(jpeg((20, 20)))
    (tmp_path / "notes.txt").write_text("none")
    assert len(read_jpegs([shard])) == 2
    assert len(read_jpegs([shard, tmp_path])) == 3
    assert len(read_jpegs([shard, tmp_path], min_side=40)) == 2
    assert len(read_jpegs([shard, tmp_path], limit=1)) == 1


@pytest.mark.parametrize("ending", ["tar.gz", "tgz", "tar.bz2", "tar.xz", "TAR"])
def test_shards_have_the_endings_that_training_takes(shard, ending):
    pack = PACK.get(ending[-2:], bytes)
    path = shard.with_name(f"packed.{ending}")
    path.write_bytes(pack(shard.read_bytes()))
    assert len(read_jpegs([path])) == 2


@pytest.mark.parametrize("kind", ["pipe", "gz", "xz", "tar.gz", "cut", "headers", "empty"])
def test_a_shard_that_cannot_be_read_is_refused_in_a_sentence(shard, monkeypatch, capsys, kind):
    monkeypatch.chdir(shard.parent)
    path = Path("odd.tar.gz" if kind == "tar.gz" else "odd.tar")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "headers":
        path.write_bytes(long_names())
    elif kind == "empty":
        path.touch()
    else:
        path.write_bytes(PACK.get(kind[-2:], bytes)(shard.read_bytes())[:300])
    assert "odd.tar" in refusal(main, ["data", path], capsys)


def test_no_name_of_a_shard_runs_a_command(shard, monkeypatch, capsys):
    monkeypatch.chdir(shard.parent)
    name = "pipe:touch pwned; cat 00000.tar"
    shard.rename(name)
    assert len(read_jpegs([name])) == 2


def test_the_command_compares_both_paths(shard, tmp_path, capsys):
    flags = ["--image-size", "32", "--steps", "1", "-o", str(tmp_path)]
    assert main(["data", str(shard), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 JPEG files to crops of 32 x 32 pixels, one core"
    assert [line.split()[0] for line in lines[3:5]] == ["OpenCLIP", "clip-pgs"]
    content = json.loads((tmp_path / "data.json").read_text())
    assert content["num_images"] == 2
    assert content["ours"] > 0
    assert content["ratio"] > 0
    assert content["loader"] is None


def test_the_command_runs_the_loader_beside_steps(shard, tmp_path, capsys):
    flags = ["--image-size", "32", "--steps", "1", "--workers", "2", "--batch-size", "4"]
    flags += ["--batches", "3", "--step-seconds", "0.02", "-o", str(tmp_path)]
    assert main(["data", str(shard), *flags]) == 0
    heading, row = capsys.readouterr().out.splitlines()[-4:-2]
    assert heading.split()[:2] == ["workers", "images/s"]
    assert row.endswith("%")
    loader = json.loads((tmp_path / "data.json").read_text())["loader"]
    assert (loader["num_workers"], loader["batch_size"]) == (2, 4)
    assert loader["images_per_second"] == 2 * loader["images_per_second_per_worker"]
    assert loader["step_seconds"] == 0.02
    assert 0 <= loader["waiting_share"] < 1


def test_without_a_step_nothing_is_said_of_waiting(shard, tmp_path, capsys):
    flags = ["--image-size", "32", "--steps", "1", "--workers", "1", "--batch-size", "2"]
    assert main(["data", str(shard), *flags, "--batches", "2", "-o", str(tmp_path)]) == 0
    assert "waiting" not in capsys.readouterr().out
    loader = json.loads((tmp_path / "data.json").read_text())["loader"]
    assert loader["waiting_share"] is None


@pytest.mark.parametrize(
    "flags",
    [
        ["--steps", "0"],
        ["--steps", "9" * 30],
        ["--workers", "0"],
        ["--batches", "0"],
        ["--limit", "0"],
        ["--image-size", "100000000"],
        ["--workers", "1", "--step-seconds", "0"],
        ["--workers", "1", "--step-seconds", "nan"],
        ["--workers", "1", "--step-seconds", "inf"],
        ["--step-seconds", "1"],
        ["--batch-size", "8"],
        ["--batches", "3"],
        ["--min-side", "5000"],
        ["--min-side", "-1"],
        ["--output", "00000.tar"],
        ["none.tar"],
    ],
)
def test_bad_input_is_one_sentence(shard, monkeypatch, capsys, flags):
    monkeypatch.chdir(shard.parent)
    refusal(main, ["data", shard, *flags], capsys)


def test_a_folder_of_shards_is_told_how_to_name_them(shard, monkeypatch, capsys):
    monkeypatch.chdir(shard.parent.parent)
    folder = shard.parent.name
    assert f"write {folder}/*.tar" in refusal(main, ["data", folder], capsys)


@pytest.mark.parametrize(
    "content", [b"%!PS-Adobe-3.0 EPSF-3.0\n", b"", jpeg()[:500], b"GIF89a"], ids=range(4)
)
def test_what_is_no_jpeg_file_is_left_out(shard, content):
    (shard.parent / "a.jpg").write_bytes(content)
    (shard.parent / "b.jpg").write_bytes(jpeg())
    assert read_jpegs([shard.parent]) == [jpeg()]
    with pytest.raises(ValueError, match="no JPEG file"):
        read_jpegs([shard.parent / "a.jpg"])
