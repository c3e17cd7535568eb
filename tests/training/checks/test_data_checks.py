import os
import shutil

import pytest

from clip_pgs.training import data_checks
from clip_pgs.training.options import parse_options
from support import runs
from support.options import SYNTHETIC, VALID, write_shards
from support.refusals import accept, refusal


def test_a_local_model_without_a_config_is_refused():
    assert "local-dir:nowhere" in refusal("--model", "local-dir:nowhere", *SYNTHETIC)


def test_no_data_at_all_is_refused():
    assert "there is no data" in refusal("--model", "ViT-B-16")


def test_evaluation_without_training_data_is_accepted(tmp_path):
    accept("--model", "ViT-B-16", "--val-data", write_shards(tmp_path / "val"))


def test_shards_with_their_sizes_need_no_number_of_samples(tmp_path):
    accept("--model", "ViT-B-16", "--train-data", write_shards(tmp_path / "train"))


def test_shards_without_sizes_are_counted(tmp_path):
    pattern = write_shards(tmp_path / "train")
    (tmp_path / "train" / "sizes.json").unlink()
    argv = ["--model", "ViT-B-16", "--train-data", pattern]
    assert "0 training samples: less than one optimizer step" in refusal(*argv)


def test_a_check_names_damaged_shards(tmp_path):
    pattern = str(runs.write_shards(tmp_path))
    argv = ["--model", "ViT-B-16", "--train-data", pattern, "--check-only"]
    first = next(tmp_path.rglob("*.tar"))
    for path in tmp_path.rglob("sizes.json"):
        path.unlink()
    assert data_checks.shard_warnings(parse_options(argv)) == []
    first.write_bytes(b"<html>")
    (sentence,) = data_checks.shard_warnings(parse_options(argv))
    assert sentence.startswith("1 training shard is damaged")
    assert str(first) in sentence


def test_commands_need_the_number_of_samples():
    argv = ["--model", "ViT-B-16", "--train-data", "pipe:cat {0..1}.tar"]
    assert "--train-num-samples" in refusal(*argv)
    accept(*argv, "--train-num-samples", "1000")


@pytest.mark.parametrize("flag", ["--train-data", "--val-data"])
@pytest.mark.parametrize(
    "pattern", ["nowhere/{0..3}.tar", "nowhere/*.tar", "nowhere.csv", "nowhere", "train/{0..9}.tar"]
)
def test_data_that_is_not_there_is_refused(tmp_path, flag, pattern):
    argv = ["--model", "ViT-B-16", "--train-data", write_shards(tmp_path / "train"), flag, pattern]
    message = refusal(*argv)
    assert flag in message
    assert pattern in message


def test_fewer_commands_than_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    options = ["--model", "ViT-B-16", "--train-num-samples", "1000", "--train-data"]
    assert "2 shards cannot feed 3 processes" in refusal(*options, "pipe:cat {0..1}.tar")
    accept(*options, "pipe:cat {0..1}.tar", "--dataset-resampled")
    accept(*options, write_shards(tmp_path / "train"))


@pytest.mark.parametrize(
    "flags", [["--batch-size", "1"], ["--unmasked-epochs", "1", "--unmasked-batch-size", "1"]]
)
def test_a_step_of_one_sample_is_refused(monkeypatch, flags):
    assert f"{flags[-2]} 1" in refusal(*VALID, *flags)
    monkeypatch.setenv("WORLD_SIZE", "2")
    accept(*VALID, *flags)


@pytest.mark.parametrize(
    ("argv", "free"),
    [
        (["--batch-size", "512", "--workers", "1"], 64e6),
        (["--batch-size", "64", "--workers", "4"], 64e6),
        (["--batch-size", "64", "--workers", "1", "--aug-cfg", "use_timm=True"], 64e6),
        (["--batch-size", "64", "--workers", "1", "--force-image-size", "448"], 64e6),
    ],
)
def test_workers_whose_batches_do_not_fit_into_shared_memory_are_refused(monkeypatch, argv, free):
    data = ["--model", "ViT-B-16", "--dataset-type", "synthetic", "--train-num-samples", "5000"]
    usage = shutil.disk_usage("/")._replace(free=int(free))
    monkeypatch.setattr(data_checks.shutil, "disk_usage", lambda _: usage)
    message = refusal(*data, *argv)
    assert "--shm-size" in message
    assert "--workers" in message
    accept(*data, *argv, "--workers", "0")
    accept(*data, *argv, "--batch-size", "4")


def test_little_shared_memory_is_told_in_kilobytes(monkeypatch):
    data = ["--dataset-type", "synthetic", "--train-num-samples", "50", "--batch-size", "2"]
    usage = shutil.disk_usage("/")._replace(free=64_000)
    monkeypatch.setattr(data_checks.shutil, "disk_usage", lambda _: usage)
    sizes = ["--force-image-size", "32", "--workers", "8"]
    message = refusal("--model", "ViT-B-32", *data, *sizes)
    assert "need 104 kB of shared memory, and /dev/shm has 64 kB" in message


def test_shared_memory_that_cannot_be_written_is_none(monkeypatch):
    allows = os.access
    monkeypatch.setattr(
        data_checks.os, "access", lambda path, mode: str(path) != "/dev/shm" and allows(path, mode)
    )
    data = ["--dataset-type", "synthetic", "--train-num-samples", "50", "--batch-size", "8"]
    message = refusal("--model", "ViT-B-32", *data, "--workers", "1")
    assert "/dev/shm has 0 kB" in message


def test_held_out_images_count_as_floats(tmp_path, monkeypatch):
    shards = ["--val-data", write_shards(tmp_path / "val"), "--workers", "1", "--batch-size", "64"]
    usage = shutil.disk_usage("/")._replace(free=int(64e6))
    monkeypatch.setattr(data_checks.shutil, "disk_usage", lambda _: usage)
    assert "--shm-size" in refusal("--model", "ViT-B-16", *shards)


def test_processes_count_towards_one_step(monkeypatch):
    argv = [*VALID, "--batch-size", "400"]
    accept(*argv)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "takes 1200" in refusal(*argv)


def test_upsampling_factors_need_resampling_and_one_factor_per_source(tmp_path):
    pattern = "::".join(write_shards(tmp_path / name) for name in ("a", "b"))
    argv = ["--model", "ViT-B-16", "--train-data", pattern, "--train-data-upsampling-factors"]
    assert "needs --dataset-resampled" in refusal(*argv, "1::2")
    assert "for each of the 2 data sources" in refusal(*argv, "1::2::3", "--dataset-resampled")
    accept(*argv, "1::2", "--dataset-resampled")


def test_a_table_needs_its_columns_and_rows_for_one_step(tmp_path):
    (tmp_path / "pairs.csv").write_text("filepath\ttitle\n" + "a.png\ta cat\n" * 8)
    argv = ["--model", "ViT-B-16", "--train-data", "pairs.csv", "--batch-size"]
    accept(*argv, "8")
    assert "8 training samples" in refusal(*argv, "9")
    assert "no column 'caption'" in refusal(*argv, "8", "--csv-caption-key", "caption")


def test_imagenet_needs_a_folder_per_class(tmp_path):
    (tmp_path / "val").mkdir()
    argv = [*VALID, "--imagenet-val", "val"]
    assert refusal(*argv).startswith("--imagenet-val 'val': Couldn't find any class folder")
    for name in ("n01440764", "n01443537", "n01484850"):
        (tmp_path / "val" / name / "deeper").mkdir(parents=True)
    (tmp_path / "val" / "n01440764" / "deeper" / "a.JPEG").touch()
    (tmp_path / "val" / "n01443537" / "a.txt").touch()
    message = refusal(*argv)
    assert message.startswith("--imagenet-val 'val': ")
    assert "the classes n01443537, n01484850." in message
    for name in ("n01443537", "n01484850"):
        (tmp_path / "val" / name / "b.png").touch()
    assert "1000 classes, whose numbers are the folders' places, got 3" in refusal(*argv)
    for number in range(997):
        folder = tmp_path / "val" / f"n1{number:07}"
        folder.mkdir()
        (folder / "a.png").touch()
    accept(*argv)
