from __future__ import annotations

import io
import pickle
import signal
import time

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision.transforms import Compose, Grayscale, Normalize, ToTensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from clip_pgs.data.bad_samples import StalledDataError
from clip_pgs.data.decoding import (
    PixelNormalizer,
    RandomCrop,
    UnreadableImageError,
    check_resized,
    faster_transform,
    pixel_normalizer,
    rgb_pixels,
    time_limit,
    to_rgb,
)
from support.images import smooth_images
from support.processes import run_suspended

SIZE = 32
LEVEL_STD = torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None] * 255


def transform(**options):
    return open_clip.image_transform(SIZE, is_train=True, **options)


def photo(width=96, height=72, *, mode="RGB", seed=0):
    """Return an image with smooth parts and sharp edges."""
    smooth = smooth_images(1, height=height, width=width, seed=seed)[0]
    pixels = (smooth.permute(1, 2, 0) * 50 + 128).clamp(0, 255).to(torch.uint8).numpy().copy()
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (250, 20, 60)
    return Image.fromarray(pixels).convert(mode)


def encoded(image, kind="JPEG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def crop(data, fast, *, seed, reduces=True):
    torch.manual_seed(seed)
    image = Image.open(io.BytesIO(data))
    full_size, box = image.size, fast.draw(image)
    reduction = fast.reduction(box) if reduces else 1
    return fast.cut(rgb_pixels(image, data, reduction=reduction), box, full_size=full_size)


def normalised(pixels, plain):
    """Return what a model receives of a crop that stands for a plain transform's."""
    return pixel_normalizer(plain, device=torch.device("cpu"))(pixels)


def levels_apart(one, other):
    """Return how far two results lie apart, in steps of 8-bit images."""
    return ((one - other) * LEVEL_STD).abs()


@pytest.mark.parametrize("aug_cfg", [{}, {"scale": (0.08, 1.0)}])
def test_crops_are_those_of_openclip_up_to_one_level_of_rounding(aug_cfg):
    plain = transform(aug_cfg=open_clip.AugmentationCfg(**aug_cfg))
    fast = faster_transform(plain)
    assert isinstance(fast, RandomCrop)
    for seed in range(12):
        data = encoded(photo(90 + 7 * seed, 150 - 5 * seed, seed=seed), quality=90)
        torch.manual_seed(seed)
        expected = plain(Image.open(io.BytesIO(data)).convert("RGB"))
        state = torch.get_rng_state()
        got = normalised(crop(data, fast, seed=seed), plain)
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
        assert levels_apart(got, expected).max() <= 1.01
        assert levels_apart(got, expected).mean() <= 0.1
        assert torch.equal(torch.get_rng_state(), state)


def test_an_image_given_whole_is_cropped_the_same():
    plain = transform()
    fast, image = faster_transform(plain), photo()
    torch.manual_seed(3)
    expected = plain(image)
    torch.manual_seed(3)
    assert levels_apart(normalised(fast(image), plain), expected).max() <= 1.01


@pytest.mark.parametrize(("width", "height", "factor"), [(320, 240, 2), (640, 480, 4)])
def test_large_files_shrink_while_they_are_decoded(width, height, factor):
    plain = transform(aug_cfg=open_clip.AugmentationCfg(scale=(0.9, 1.0)))
    fast = faster_transform(plain)
    data = encoded(photo(width, height), quality=95)
    for seed in range(8):
        torch.manual_seed(seed)
        box = fast.draw(Image.open(io.BytesIO(data)))
        assert fast.reduction(box) == factor
        # What remains is the shift of an edge to the nearest pixel of the smaller image.
        whole = normalised(crop(data, fast, seed=seed, reduces=False), plain)
        assert levels_apart(normalised(crop(data, fast, seed=seed), plain), whole).mean() <= 2


@pytest.mark.parametrize(
    ("box", "factor"),
    [
        ((0, 0, 127, 500), 1),
        ((0, 0, 128, 128), 2),
        ((0, 0, 500, 255), 2),
        ((0, 0, 256, 256), 4),
        ((9, 9, 512, 600), 8),
        ((9, 9, 20, 20), 1),
    ],
)
def test_a_reduced_crop_stays_twice_as_large_as_needed(box, factor):
    assert faster_transform(transform()).reduction(box) == factor


def test_a_box_of_a_reduced_image_moves_by_half_a_pixel_at_most():
    fast = faster_transform(transform())
    column = torch.arange(100, dtype=torch.uint8).expand(3, 50, 100)
    # Columns 37 to 141 of 200 are columns 18.5 to 70.5 of 100.
    cut = fast.cut(column, (0, 37, 100, 104), full_size=(200, 100))
    assert cut.float().mean().item() == pytest.approx((18.5 + 70.5 - 1) / 2, abs=0.6)


@pytest.mark.parametrize(
    "other",
    [
        open_clip.image_transform(SIZE, is_train=False),
        Compose([*transform().transforms[:-1], Grayscale(3), transform().transforms[-1]]),
        pil_to_tensor,
    ],
    ids=["validation", "grey", "a function"],
)
def test_other_transforms_stay_as_they_are(other):
    assert faster_transform(other) is other


def test_a_crop_goes_to_worker_processes():
    fast, data = faster_transform(transform()), encoded(photo())
    there = pickle.loads(pickle.dumps(fast))
    assert torch.equal(crop(data, there, seed=1), crop(data, fast, seed=1))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG")],
)
def test_pixels_are_pillows(mode, kind):
    data = encoded(photo(mode=mode), kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    pixels = rgb_pixels(Image.open(io.BytesIO(data)), data)
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)


def test_a_file_cut_short_is_refused_as_pillow_refuses_it():
    data = encoded(photo(300, 300))[:-900]
    with pytest.raises(OSError, match="truncated"):
        rgb_pixels(Image.open(io.BytesIO(data)), data)


MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
CPU = torch.device("cpu")
LEVELS = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(3, 16, 16)


@pytest.mark.parametrize("sides", [(400, 9), (9, 400), (30, 30)])
@pytest.mark.parametrize("size", [64, (64, 96), (96, 64)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_an_image_is_refused_where_resizing_makes_it_too_large(monkeypatch, sides, size, mode):
    image = Image.new("RGB", sides)
    resizing = open_clip.image_transform(size, is_train=False, resize_mode=mode)
    num_pixels = np.prod(resizing.transforms[0](image).size)
    monkeypatch.setattr("clip_pgs.data.decoding.MAX_RESIZED_PIXELS", num_pixels)
    check_resized(image, resizing)
    monkeypatch.setattr("clip_pgs.data.decoding.MAX_RESIZED_PIXELS", num_pixels - 1)
    if mode == "shortest" and sides != (30, 30):
        with pytest.raises(UnreadableImageError, match=f"{num_pixels} of {sides[0]} x {sides[1]}"):
            check_resized(image, resizing)
    else:
        # It is about as large as the input itself.
        check_resized(image, resizing)


@pytest.mark.parametrize("sides", [(400, 400), (600, 400), (100, 800), (1600, 100)])
@pytest.mark.parametrize("size", [224, 448, 1024, 4096])
def test_photographs_and_panoramas_are_resized_for_any_usual_input(sides, size):
    check_resized(Image.new("RGB", sides), open_clip.image_transform(size, is_train=False))


def test_a_timer_of_somebody_elses_goes_on_after_a_limit():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
    start = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        while not rung and time.monotonic() < start + 30:
            with time_limit(60, StalledDataError("late")):
                time.sleep(0.01)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert rung


PAUSED = """
import time
from clip_pgs.data.decoding import time_limit

with time_limit(2.0, RuntimeError("late")):
    end = time.monotonic() + 4 + {more}
    print("begun", flush=True)
    # It may be stopped before it comes to this.
    time.sleep(max(0, end - time.monotonic()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("more", "code"), [(1.0, 0), (3.0, 1)])
def test_a_process_that_was_suspended_has_its_time_anew(more, code):
    ended, _, error = run_suspended(PAUSED.format(more=more), seconds=4)
    assert ("late" in error) == bool(code)
    assert ended == code


def test_every_level_becomes_what_torchvision_makes_of_it():
    expected = Compose([ToTensor(), Normalize(MEAN, STD)])(to_pil_image(LEVELS))
    got = PixelNormalizer(MEAN, STD, device=CPU)(LEVELS)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_a_batch_gives_the_bits_of_its_images():
    normalize = PixelNormalizer(MEAN, STD, device=CPU)
    batch = torch.stack([LEVELS, LEVELS.flip(1), LEVELS // 2])
    assert torch.equal(normalize(batch), torch.stack([normalize(image) for image in batch]))


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [(np.int32, 90, 90), (np.int32, 90 * 256, 90), (np.uint16, 90, 0), (np.uint16, 23130, 90)],
)
def test_wide_gray_is_scaled_by_what_it_holds(dtype, value, expected):
    image = to_rgb(Image.fromarray(np.full((2, 3), value, dtype)))
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", (expected,) * 3)


def test_the_bytes_stay_as_they_are():
    levels = LEVELS.clone()
    PixelNormalizer(MEAN, STD, device=CPU)(levels)
    assert torch.equal(levels, LEVELS)


def test_floats_are_refused():
    with pytest.raises(ValueError, match=r"pixels must be of type uint8, got torch\.float32"):
        PixelNormalizer(MEAN, STD, device=CPU)(LEVELS.float())


@pytest.mark.parametrize(("is_train", "normalises"), [(True, True), (False, False)])
def test_only_crops_that_come_as_bytes_are_left_to_the_device(is_train, normalises):
    transform = open_clip.image_transform(16, is_train=is_train)
    assert (pixel_normalizer(transform, device=CPU) is not None) == normalises
