"""Pictures of `--imagenet-val` and `--imagenet-v2` are decoded as all others are."""

import struct
import zlib
from types import SimpleNamespace

import pytest
from PIL import EpsImagePlugin, Image
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from clip_pgs.data.bad_samples import UnusableDataError
from clip_pgs.training.validation import _Pictures


def bomb(path):
    """Write the head of a picture of 900 million pixels."""
    head = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", b""), (b"IEND", b""))
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


FAULTS = {
    "eps": lambda path: Image.new("RGB", (8, 8)).save(path, "EPS"),
    "bomb": bomb,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "no picture": lambda path: path.write_bytes(b"no picture"),
}


@pytest.fixture
def folder(tmp_path):
    """Two classes, of which the second has one red picture."""
    for name in ("n0", "n1"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / name / "a.png")
    return tmp_path


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hostile_picture_is_named_and_starts_no_interpreter(folder, monkeypatch, fault):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("started"))
    FAULTS[fault](folder / "n1" / "a.png")
    pictures = _Pictures(ImageFolder(folder), pil_to_tensor)
    assert pictures[0][0].shape == (3, 8, 8)
    with pytest.raises(UnusableDataError, match=r"n1/a\.png: "):
        pictures[1]


def test_labels_are_the_places_of_folders_and_in_v2_their_names(folder):
    assert [label for _, label in _Pictures(ImageFolder(folder), pil_to_tensor)] == [0, 1]
    (folder / "n1").rename(folder / "731")
    second = SimpleNamespace(fnames=[folder / "731" / "a.png"])
    ((pixels, label),) = list(_Pictures(second, pil_to_tensor))
    assert (label, pixels[:, 0, 0].tolist()) == (731, [255, 0, 0])
