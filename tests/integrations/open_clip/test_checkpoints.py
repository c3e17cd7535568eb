import os
import random

import pytest
import torch

from clip_pgs.integrations.open_clip.checkpoints import newest_checkpoint, read_checkpoint


def touch(path, *, seconds):
    path.write_bytes(b"")
    os.utime(path, (seconds, seconds))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("is_zip", [True, False])
def test_whatever_is_damaged_a_file_is_read_or_refused_in_a_sentence(tmp_path, is_zip):
    path = tmp_path / "a.pt"
    content = {"epoch": 1, "state_dict": {"a": torch.arange(9.0)}, "clip_pgs": {"b": ["c", 0.5]}}
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    whole = path.read_bytes()
    refusals = []
    for seed in range(300):
        chance = random.Random(seed)
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 3))):
            damaged[chance.randrange(min(700, len(damaged)))] = chance.randrange(256)
        path.write_bytes(damaged[: chance.choice((None, chance.randrange(len(damaged))))])
        for use_mmap in (False, True):
            try:
                read_checkpoint(path, use_mmap=use_mmap)
            except ValueError as error:
                refusals.append(str(error))
    assert len(refusals) > 300
    for sentence in refusals:
        assert sentence.startswith(f"checkpoint '{path}' cannot be read: ")
        assert "\n" not in sentence


def test_the_newest_is_what_latest_names(tmp_path):
    touch(tmp_path / "step_4.pt", seconds=1)
    touch(tmp_path / "epoch_1.pt", seconds=2)
    (tmp_path / "latest").write_text("step_4.pt\n")
    assert newest_checkpoint(tmp_path) == tmp_path / "step_4.pt"


@pytest.mark.parametrize("pointer", ["gone.pt", "../outside.pt", "/etc/hostname", "", ".."])
def test_a_latest_that_names_nothing_beside_it_is_passed_over(tmp_path, pointer):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    touch(tmp_path / "outside.pt", seconds=9)
    touch(folder / "epoch_2.pt", seconds=2)
    touch(folder / "step_9.pt", seconds=3)
    (folder / "latest").write_text(pointer)
    assert newest_checkpoint(folder) == folder / "step_9.pt"


def test_a_folder_without_checkpoints_has_no_newest(tmp_path):
    assert newest_checkpoint(tmp_path) is None
