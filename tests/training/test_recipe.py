"""Options that OpenCLIP obeys change what they are for; each against a computation of our own."""

import numpy as np
import pytest
import torch
from PIL import Image

from clip_pgs.integrations.open_clip.conv import aside_from_training
from clip_pgs.training.build import build_model, create_model
from clip_pgs.training.options import parse_options
from support import ddp_recipe
from support.ddp_recipe import BIAS, ROWS, SCALE
from support.ranks import output, run_together
from support.runs import MODEL, flags, write_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the folder, and what each of two processes saved."""
    folder = tmp_path_factory.mktemp("recipe")
    ddp_recipe.write_resnet(folder)
    assert run_together(ddp_recipe.main, folder) == [0, 0], output(folder)
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def clip_loss(images, texts, all_images, all_texts, first):
    """Return CLIP's loss of some rows against all, of which theirs begin at `first`."""
    labels = torch.arange(first, first + len(images))
    cross_entropy = torch.nn.functional.cross_entropy
    by_image = cross_entropy(SCALE * images @ all_texts.T, labels)
    return (by_image + cross_entropy(SCALE * texts @ all_images.T, labels)) / 2


@pytest.mark.slow
@pytest.mark.parametrize(("local", "grad"), ddp_recipe.GATHERS)
def test_who_has_which_loss_and_where_its_gradient_goes(saved, local, grad):
    for rank, said in enumerate(saved[1]):
        own = slice(rank * ROWS, (rank + 1) * ROWS)
        images, texts = ddp_recipe.features()
        images.requires_grad_()
        others = (images, texts) if grad or not local else (images.detach(), texts)
        losses = [
            clip_loss(images[rows], texts[rows], *others, rows.start)
            for rows in (slice(0, ROWS), slice(ROWS, 2 * ROWS))
        ]
        whole = clip_loss(images, texts, images, texts, 0)
        loss = losses[rank] if local else whole
        # Gathered with gradients, the sum of all processes' losses pulls at each feature.
        pulling = (sum(losses) if local else 2 * whole) if grad else loss
        (gradient,) = torch.autograd.grad(pulling, images)
        value, found = said["clip"][local, grad]
        torch.testing.assert_close(value, loss.detach())
        torch.testing.assert_close(found, gradient[own])


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ddp_recipe.IMPLEMENTATIONS)
def test_the_implementation_of_siglips_loss_is_the_one_that_is_said(saved, implementation):
    for rank, said in enumerate(saved[1]):
        images, texts = ddp_recipe.features()
        signs = 2 * torch.eye(2 * ROWS, dtype=torch.float64) - 1
        terms = -torch.nn.functional.logsigmoid(signs * (SCALE * images @ texts.T + BIAS))
        value, called = said["siglip"][implementation]
        torch.testing.assert_close(value, terms[rank * ROWS :][:ROWS].sum() / ROWS)
        assert called == [ddp_recipe.IMPLEMENTATIONS[implementation]]


@pytest.mark.slow
def test_synced_norms_see_the_batch_of_all_processes(saved):
    folder, ranks = saved
    expected = ddp_recipe.encoded(folder, 0, 1)
    synced, alone = (torch.cat([said["norm"][sync] for said in ranks]) for sync in (True, False))
    torch.testing.assert_close(synced, expected, rtol=1e-4, atol=1e-5)
    assert (alone - expected).abs().max() > 0.01 * expected.abs().max()


def evaluated(tmp_path, picture, **said):
    """Return what evaluations and the export make of a picture; training augments otherwise."""
    options = parse_options(
        flags(tmp_path, dataset_type="synthetic", image_mean=[0] * 3, image_std=[1] * 3, **said)
    )
    return create_model(options, torch.device("meta"))[2](picture)


def test_images_are_resized_by_the_interpolation_that_is_said(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    made = {}
    for name, resampling in (("bilinear", Image.BILINEAR), ("bicubic", Image.BICUBIC)):
        made[name] = evaluated(tmp_path, picture, image_interpolation=name).numpy()
        by_pillow = np.asarray(picture.resize((32, 32), resampling)) / 255
        assert np.abs(made[name] - by_pillow.transpose(2, 0, 1)).max() < 0.01
    assert np.abs(made["bilinear"] - made["bicubic"]).max() > 0.1


def test_pictures_that_are_not_square_are_cut_padded_or_squeezed_as_said(tmp_path):
    # A white middle between black sides, each as wide.
    picture = Image.new("RGB", (90, 30))
    picture.paste((255, 255, 255), (30, 0, 60, 30))
    whites = {}
    for mode in ("shortest", "longest", "squash"):
        made = evaluated(tmp_path, picture, image_resize_mode=mode)
        whites[mode] = (made.mean(0) > 0.5).float().mean().item()
    assert whites["shortest"] > 0.95
    assert whites["squash"] == pytest.approx(1 / 3, abs=0.05)
    assert whites["longest"] == pytest.approx(1 / 9, abs=0.05)


def test_syncing_keeps_the_activations_that_timm_puts_into_its_layers(tmp_path):
    tower = {"timm_model_name": "test_efficientnet", "timm_proj": "linear", "image_size": 32}
    path = write_model(tmp_path, name="timm", config={**MODEL, "vision_cfg": tower})
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    made = {}
    for syncs in (False, True):
        said = flags(tmp_path, model=path, dataset_type="synthetic", use_bn_sync=syncs)
        options = parse_options(said)
        options.distributed = syncs
        model = build_model(options, torch.device("cpu")).model
        kinds = {type(module).__name__ for module in model.modules()}
        assert ("SyncBatchNormAct" in kinds) == syncs
        with torch.no_grad(), aside_from_training(model):
            made[syncs] = [model.encode_image(images)]
            model.eval()
            made[syncs].append(model.encode_image(images))
        assert kinds == {type(module).__name__ for module in model.modules()}
    for plain, synced in zip(made[False], made[True], strict=True):
        torch.testing.assert_close(synced, plain)


def test_a_buffer_that_a_pass_aside_makes_does_not_end_it():
    module = torch.nn.BatchNorm1d(2)
    with aside_from_training(module):
        module(torch.rand(3, 2))
        module.register_buffer("seen", torch.ones(1))
    assert module.num_batches_tracked == 0
    assert module.seen == 1
