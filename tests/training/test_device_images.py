"""Images cross over to the device as bytes; what the model receives stays what it was."""

import open_clip
import pytest
import torch

from support.trainers import open_trainer

MEAN, STD = (
    torch.tensor(numbers)[:, None, None]
    for numbers in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
)


def stored_images(trainer):
    trainer.phase.stream.start_at(0, 0)
    return [images for images, _ in trainer.phase.stream]


def received_images(trainer):
    trainer.start_epoch(0)
    received = [
        images for _ in range(trainer.steps_left) for images, _ in trainer.next_batches()[0]
    ]
    trainer.phase.stream.close()
    return received


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accum_freq", [1, 2])
def test_the_model_receives_each_crop_as_if_it_were_normalised_alone(
    tmp_path, world, workers, accum_freq
):
    trainer = open_trainer(
        tmp_path, train_data=world.train_data, workers=workers, accum_freq=accum_freq
    )
    stored, received = stored_images(trainer), received_images(trainer)
    assert len(stored) == len(received) == 4
    for crops, images in zip(stored, received, strict=True):
        assert crops.dtype == torch.uint8
        assert images.dtype == torch.float32
        for crop, image in zip(crops, images, strict=True):
            # The operations of a worker that sends floats, in their order.
            expected = crop.float().mul_(1 / (255 * STD)).sub_(MEAN / STD)
            assert torch.equal(image, expected)


def test_what_the_model_receives_is_openclips_normalisation_up_to_rounding(tmp_path, world):
    trainer = open_trainer(tmp_path, train_data=world.train_data)
    crops, images = stored_images(trainer)[0], received_images(trainer)[0]
    torch.testing.assert_close(images, (crops / 255 - MEAN) / STD, atol=1e-6, rtol=0)


def test_a_runs_own_mean_and_deviation_count(tmp_path, world):
    options = {"image_mean": (0.5, 0.4, 0.3), "image_std": (0.2, 0.25, 0.5)}
    trainer = open_trainer(tmp_path, train_data=world.train_data, **options)
    crops, images = stored_images(trainer)[0], received_images(trainer)[0]
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in options.values())
    torch.testing.assert_close(images, (crops / 255 - mean) / std, atol=1e-6, rtol=0)


def test_another_transform_gives_the_floats_it_made(tmp_path, world):
    options = {"aug_cfg": ["use_timm=True"]}
    trainer = open_trainer(tmp_path, train_data=world.train_data, **options)
    stored, received = stored_images(trainer), received_images(trainer)
    assert stored[0].dtype == torch.float32
    assert all(map(torch.equal, stored, received))


def test_pure_bfloat16_gets_the_same_images_rounded(tmp_path, world):
    plain = received_images(open_trainer(tmp_path, train_data=world.train_data))
    options = {"train_data": world.train_data, "precision": "pure_bf16"}
    halved = received_images(open_trainer(tmp_path, **options))
    assert halved[0].dtype == torch.bfloat16
    assert all(torch.equal(half, full.bfloat16()) for half, full in zip(halved, plain, strict=True))


def test_synthetic_images_are_bytes_too(tmp_path):
    trainer = open_trainer(tmp_path, dataset_type="synthetic", train_num_samples=8)
    assert stored_images(trainer)[0].dtype == torch.uint8
    black = -(MEAN / STD).expand(8, 3, 32, 32)
    assert torch.equal(received_images(trainer)[0], black)
