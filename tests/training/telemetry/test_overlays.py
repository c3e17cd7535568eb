import torch

from clip_pgs.integrations.open_clip import apply_masking
from clip_pgs.training.telemetry.overlays import draw_masks, fixed_images
from support.images import smooth_images
from support.models import small_clip


def masked_model():
    model = apply_masking(small_clip(), "random", mask_ratio=0.5)
    model.visual.image_mean, model.visual.image_std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    return model


def test_half_of_each_image_is_grey_below_the_whole_one():
    images = smooth_images(3, height=64, width=64) * 0.3
    picture = draw_masks(masked_model(), images, seed=0)
    whole, painted = picture[:, 2:66, 2:66], picture[:, 68:132, 2:66]
    assert torch.allclose(whole, (images[0] * 0.25 + 0.5).clamp(0, 1))
    is_grey = (painted == 0.5).all(dim=0)
    assert is_grey.float().mean().item() == 0.5
    assert torch.equal(painted[:, ~is_grey], whole[:, ~is_grey])


def test_drawing_leaves_model_and_random_stream_alone():
    model = masked_model().eval()
    state = torch.get_rng_state()
    draw_masks(model, smooth_images(2, height=64, width=64), seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())


def test_a_run_killed_while_it_kept_its_images_keeps_others_when_it_goes_on(tmp_path):
    (tmp_path / ".images.pt.unfinished").write_bytes(b"half")
    assert len(fixed_images(tmp_path, smooth_images(12, seed=0))) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["images.pt"]


def test_a_resumed_run_draws_on_the_images_of_its_start(tmp_path):
    first = fixed_images(tmp_path, smooth_images(12, seed=0))
    again = fixed_images(tmp_path, smooth_images(12, seed=1))
    assert len(first) == 8
    assert torch.equal(first, again)
