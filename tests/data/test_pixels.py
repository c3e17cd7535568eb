import open_clip
import pytest
import torch
from torchvision.transforms import Compose, Normalize, ToTensor
from torchvision.transforms.functional import to_pil_image

from clip_pgs.data.decoding import PixelNormalizer, pixel_normalizer

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
CPU = torch.device("cpu")
LEVELS = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(3, 16, 16)


def test_every_level_becomes_what_torchvision_makes_of_it():
    expected = Compose([ToTensor(), Normalize(MEAN, STD)])(to_pil_image(LEVELS))
    got = PixelNormalizer(MEAN, STD, device=CPU)(LEVELS)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_a_batch_gives_the_bits_of_its_images():
    normalize = PixelNormalizer(MEAN, STD, device=CPU)
    batch = torch.stack([LEVELS, LEVELS.flip(1), LEVELS // 2])
    assert torch.equal(normalize(batch), torch.stack([normalize(image) for image in batch]))


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
