"""The masks of a run's steps, and the pictures of them."""

import math

import pytest
import torch

from clip_pgs.data.order import stable_seed
from clip_pgs.figure import CAPTION_SIZE, GAP, MARGIN, TITLE_SIZE
from clip_pgs.integrations.open_clip import apply_masking, num_patches, patch_size
from clip_pgs.training.masks import MaskPictures, draw_masks, micro_batch_rows, step_noise
from support.images import smooth_images
from support.models import small_clip, small_resnet_clip


def masked_model(build=small_clip):
    model = apply_masking(build(), "random", mask_ratio=0.5)
    model.visual.image_mean, model.visual.image_std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    return model


def test_half_of_each_image_is_grey_below_the_whole_one():
    images = smooth_images(3, height=64, width=64) * 0.3
    picture = draw_masks(masked_model(), images, seed=0)
    # Enlarged fourfold to reach 224 pixels; a title above, a caption below.
    top, below = MARGIN + TITLE_SIZE + GAP, 256 + CAPTION_SIZE + 2 * GAP
    whole, painted = (
        picture[:, y : y + 256 : 4, MARGIN : MARGIN + 256 : 4] for y in (top, top + below)
    )
    assert torch.allclose(whole, (images[0] * 0.25 + 0.5).clamp(0, 1), atol=1 / 255)
    is_grey = (painted == 127 / 255).all(dim=0)
    assert is_grey.float().mean().item() == 0.5
    assert torch.equal(painted[:, ~is_grey], whole[:, ~is_grey])


def test_a_picture_tells_epoch_strategy_and_ratio():
    images = smooth_images(2, height=64, width=64)
    pictures = [
        draw_masks(masked_model(), images, seed=0, title=title, name=name)
        for title, name in (("epoch 1", "pgs"), ("epoch 2", "pgs"), ("epoch 1", "random"))
    ]
    is_title = slice(MARGIN, MARGIN + TITLE_SIZE)
    assert not torch.equal(*(picture[:, is_title] for picture in pictures[:2]))
    assert not torch.equal(*(picture[:, is_title] for picture in pictures[::2]))
    # The ratio of all of them is said once.
    assert (pictures[0][:, -MARGIN - CAPTION_SIZE :] == 1).all()
    assert (pictures[0][:, is_title, MARGIN + 256 + GAP :] == 1).all()


@pytest.mark.parametrize("build", [small_clip, small_resnet_clip])
def test_drawing_leaves_model_and_random_stream_alone(build):
    model = masked_model(build).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    side = patch_size(model)[0] * math.isqrt(num_patches(model))
    draw_masks(model, smooth_images(2, height=side, width=side), seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    # BatchNorm's statistics among them.
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_run_killed_while_it_kept_its_images_keeps_others_when_it_goes_on(tmp_path):
    (tmp_path / ".images.pt.unfinished").write_bytes(b"half")
    MaskPictures(tmp_path, masked_model(), name="random", seed=0).choose(smooth_images(12, seed=0))
    assert [path.name for path in tmp_path.iterdir()] == ["images.pt"]


def test_a_resumed_run_draws_on_the_images_of_its_start(tmp_path):
    model = masked_model()
    pictures = []
    for seed in (0, 1):
        run = MaskPictures(tmp_path, model, name="random", seed=0)
        run.choose(smooth_images(12, height=64, width=64, seed=seed))
        pictures.append(run.draw(0))
    assert torch.equal(*pictures)
    assert len(torch.load(tmp_path / "images.pt", weights_only=True)) == 8


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1).expand(9, 3, 64, 64),
        torch.zeros(9, 3, 64, 64),
        torch.zeros(0, 3, 64, 64),
        torch.zeros(8, 3, 32, 32),
        torch.zeros(8, 3, 64, 64, dtype=torch.float64),
        torch.tensor(0.0),
        {"images": torch.zeros(8, 3, 64, 64)},
        b"no images",
    ],
    ids=["a view", "too many", "none", "smaller", "doubles", "a number", "a dict", "damaged"],
)
def test_images_that_are_not_of_the_run_are_named_and_replaced(tmp_path, caplog, images):
    path = tmp_path / "images.pt"
    if isinstance(images, bytes):
        path.write_bytes(images)
    else:
        torch.save(images, path)
    run = MaskPictures(tmp_path, masked_model(), name="random", seed=0)
    run.choose(smooth_images(12, height=64, width=64))
    assert str(path) in caplog.text
    assert len(torch.load(path, weights_only=True)) == 8
    assert run.draw(0) is not None


CPU = torch.device("cpu")


def noise(*, seed=0, step=5, num_samples=16):
    return step_noise(seed, step, num_samples=num_samples, num_patches=9, device=CPU)


def test_noise_is_keyed_by_seed_and_step():
    assert torch.equal(noise(), noise())
    assert not torch.equal(noise(), noise(seed=1))
    assert not torch.equal(noise(), noise(step=6))


def test_noise_leaves_the_global_stream_alone():
    state = torch.get_rng_state()
    noise()
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_uniform_in_the_unit_interval():
    values = noise(num_samples=4000)
    assert values.dtype == torch.float32
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean().item() - 0.5) < 0.01


def test_micro_batches_of_all_ranks_cover_the_global_batch_once():
    rows = [
        row
        for micro_batch in range(3)
        for rank in range(2)
        for row in range(16)[
            micro_batch_rows(micro_batch=micro_batch, rank=rank, world_size=2, batch_size=2)
        ]
    ]
    assert rows == list(range(12))


def test_keys_are_not_sums():
    # Seed 0 on rank 1 and seed 1 on rank 0 share a stream in OpenCLIP.
    assert stable_seed(0, "step", 0, 1) != stable_seed(1, "step", 0, 0)
