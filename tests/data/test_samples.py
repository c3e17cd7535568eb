from __future__ import annotations

import io
import json
import random

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision import transforms

from clip_pgs.data.order import stable_seed
from clip_pgs.data.samples import (
    MAX_CAPTION_BYTES,
    MAX_CAPTIONS,
    BadSampleError,
    RawSample,
    SampleDecoder,
    decode_captions,
    decode_image,
)


def encode(image, image_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def raw(image=None, *captions, **options):
    """Return a pair as it is stored."""
    return RawSample("data/0.tar", "a", image, captions, **options)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_png_mode_becomes_the_same_rgb(mode):
    image = Image.new("RGB", (6, 4), (255, 255, 255)).convert(mode)
    decoded = decode_image(raw(encode(image)))
    assert decoded.mode == "RGB"
    assert decoded.size == (6, 4)
    assert np.asarray(decoded).min() == 255


def test_palette_with_transparency_keeps_its_colours():
    image = Image.new("RGB", (4, 4), (200, 30, 60)).quantize(4)
    decoded = decode_image(raw(encode(image, transparency=1)))
    assert decoded.getpixel((0, 0)) == (200, 30, 60)


def test_an_image_that_its_transform_makes_too_large_is_a_bad_sample():
    transform = open_clip.image_transform(4096, is_train=False)
    decoder = SampleDecoder(transform, lambda texts: torch.zeros(len(texts), 2), seed=1)
    with pytest.raises(BadSampleError, match="600 x 6"):
        decoder(raw(encode(Image.new("RGB", (600, 6))), b"a line"), epoch=0)


def test_cmyk_jpeg_becomes_rgb():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red, green, blue = decode_image(raw(encode(image, "JPEG", quality=100))).getpixel((3, 3))
    assert red > 240
    assert green < 15
    assert blue < 15


def test_sixteen_bit_grey_is_scaled():
    pixels = np.array([[0, 0x8000, 0xFFFF]], dtype=np.uint16)
    decoded = decode_image(raw(encode(Image.fromarray(pixels))))
    assert np.asarray(decoded)[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"x" * 99, lambda b: b""])
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_damaged_image_is_a_bad_sample(make_image, image_format, damage):
    with pytest.raises(BadSampleError) as error:
        decode_image(raw(damage(make_image(0, image_format=image_format))))
    assert error.value.reason == "unreadable image"
    assert error.value.detail


def test_decompression_bomb_is_a_bad_sample(monkeypatch, make_image):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadSampleError, match="exceeds limit"):
        decode_image(raw(make_image(0)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ((), "no caption"),
        ([b" \n"], "empty caption"),
        ([b"\xff\xfe"], "caption is not UTF-8"),
        ([b"a", bytes(MAX_CAPTION_BYTES + 1)], "too large caption"),
        ([bytes(MAX_CAPTION_BYTES // 2)] * 3, "too large caption"),
        ([b"a"] * (MAX_CAPTIONS + 1), "too many captions"),
    ],
)
def test_bad_caption_has_a_reason(data, reason):
    with pytest.raises(BadSampleError) as error:
        decode_captions(raw(None, *data))
    assert error.value.reason == reason


def test_a_json_of_many_captions_is_bad_too():
    record = json.dumps({"texts": ["a"] * (MAX_CAPTIONS + 1)}).encode()
    with pytest.raises(BadSampleError, match="too many captions"):
        decode_captions(raw(None, record), caption_key="texts")


@pytest.fixture
def decoder():
    transform = transforms.Compose([transforms.RandomResizedCrop(8), transforms.ToTensor()])
    return SampleDecoder(transform, lambda texts: torch.full((len(texts), 2), 7), seed=1)


def test_augmentation_depends_on_seed_epoch_and_sample_alone(decoder, make_image):
    raw = RawSample("data/0.tar", "a", make_image(0), (b"text",))
    first, _ = decoder(raw, epoch=0)
    decoder(RawSample("data/0.tar", "b", make_image(0), (b"text",)), epoch=0)
    torch.rand(3)
    random.random()
    moved = RawSample("elsewhere/0.tar", "a", make_image(0), (b"text",))
    assert torch.equal(decoder(raw, epoch=0)[0], first)
    assert torch.equal(decoder(moved, epoch=0)[0], first)


def test_augmentation_differs_between_epochs_keys_visits_and_seeds(decoder, make_image):
    image = make_image(0)
    raw = RawSample("0.tar", "a", image, (b"text",))
    other_seed = SampleDecoder(decoder.transform, decoder.tokenize, seed=2)
    crops = [
        decoder(raw, epoch=0)[0],
        decoder(raw, epoch=1)[0],
        decoder(RawSample("0.tar", "b", image, (b"text",)), epoch=0)[0],
        decoder(RawSample("0.tar", "a", image, (b"text",), repeat=1), epoch=0)[0],
        other_seed(raw, epoch=0)[0],
    ]
    assert len({crop.numpy().tobytes() for crop in crops}) == len(crops)


def test_image_is_what_the_samples_own_seed_makes_of_it(decoder, make_image):
    raw = RawSample("data/0.tar", "a", make_image(0), (b"text",), repeat=2)
    seed = stable_seed(1, 3, "0.tar", "a", 2)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    expected = decoder.transform(decode_image(raw))
    assert torch.equal(decoder(raw, epoch=3)[0], expected)


def draw_three_ways(captions):
    drawn = [random.getrandbits(30), np.random.randint(2**30), torch.randint(2**30, ()).item()]
    return torch.tensor([drawn] * len(captions))


def test_text_draws_depend_on_seed_epoch_and_sample_alone(make_image):
    raw = RawSample("0.tar", "a", make_image(0), (b"text",))
    other = RawSample("0.tar", "b", make_image(0), (b"text",))

    def draw(raw, *, epoch=0, seed=1, transform):
        return tuple(SampleDecoder(transform, draw_three_ways, seed)(raw, epoch=epoch)[1].tolist())

    plain = {"transform": transforms.ToTensor()}
    crop = {"transform": transforms.Compose([transforms.RandomResizedCrop(8), *plain.values()])}
    assert draw(raw, **plain) == draw(raw, **crop)
    draws = [draw(raw, **plain), draw(raw, epoch=1, **plain), draw(raw, seed=2, **plain)]
    assert len({*draws, draw(other, **plain)}) == 4
