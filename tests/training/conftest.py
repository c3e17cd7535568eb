"""Runs that several test files look at; each is trained once."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from support.runs import run, write_shards


@dataclass
class World:
    """A folder with training and validation data."""

    folder: Path
    train_data: str
    val_data: str


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Training and validation shards, 32 and 12 samples."""
    folder = tmp_path_factory.mktemp("world")
    return World(
        folder,
        write_shards(folder / "train"),
        write_shards(folder / "val", num_shards=1, samples_per_shard=12, seed=1),
    )


@pytest.fixture(scope="session")
def finished_options(world):
    """What `finished_run` was started with."""
    return {
        "train_data": world.train_data,
        "val_data": world.val_data,
        "masking": "pgs",
        "mask_ratio": 0.5,
        "mask_ratio_min": 0.3,
        "accum_freq": 2,
        "batch_size": 4,
        "report_to": "tensorboard",
    }


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, finished_options):
    """A run of two epochs, each of four steps of two micro-batches, with adaptive masks."""
    return run(tmp_path_factory.mktemp("finished"), **finished_options)
