from __future__ import annotations

import argparse
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from clip_pgs.data.world.writing import write_world
from support.worlds import COUNTS


def encode_image(number: int, *, image_format: str = "JPEG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format=image_format)
    return buffer.getvalue()


def write_tar(path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def make_image():
    """Encode a noise image that depends on a number."""
    return encode_image


@pytest.fixture
def make_tar():
    """Write a tar file of named members."""
    return write_tar


@pytest.fixture
def make_shards(tmp_path):
    """Write numbered pairs, caption "17" with image 17, and return the folder."""

    def make(sizes: list[int], *, folder: str = "shards", first: int = 0, with_sizes: bool = True):
        root = tmp_path / folder
        number = first
        for index, size in enumerate(sizes):
            members = []
            for _ in range(size):
                members += [
                    (f"{number:05d}.jpg", encode_image(number)),
                    (f"{number:05d}.txt", str(number).encode()),
                    (f"{number:05d}.json", b"{}"),
                ]
                number += 1
            write_tar(root / f"{index}.tar", members)
        if with_sizes:
            stated = {f"{index}.tar": size for index, size in enumerate(sizes)}
            (root / "sizes.json").write_text(json.dumps(stated))
        return root

    return make


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The folder of a small demo world."""
    root = tmp_path_factory.mktemp("worlds") / "demo"
    write_world(root, **COUNTS)
    return root


@pytest.fixture
def make_args():
    """Return the data options as the trainer parses them, with small batches."""

    def make(**options) -> argparse.Namespace:
        defaults = {
            "train_data": None,
            "val_data": None,
            "dataset_type": "auto",
            "dataset_resampled": False,
            "train_data_upsampling_factors": None,
            "train_num_samples": None,
            "val_num_samples": None,
            "csv_separator": "\t",
            "csv_img_key": "filepath",
            "csv_caption_key": "title",
            "caption_key": None,
            "mae": None,
            "workers": 0,
            "batch_size": 5,
            "accum_freq": 1,
            "seed": 0,
            "text_masking": "none",
            "text_tokens": None,
            "text_masking_options": {},
            "data_timeout": 60.0,
            "max_bad_share": None,
        }
        unknown = set(options) - set(defaults)
        assert not unknown, unknown
        return argparse.Namespace(**{**defaults, **options})

    return make
