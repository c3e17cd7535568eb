"""Convolutional towers see the cells that stay, as if the others were not there."""

import copy
from functools import partial

import pytest
import torch
from timm.models.convnext import ConvNeXt
from torch import nn

from clip_pgs import PatchSelection
from clip_pgs.integrations.open_clip import (
    apply_masking,
    force_selection,
    last_selection,
    num_patches,
    patch_size,
    remove_masking,
    set_masking_noise,
    set_masking_progress,
)
from clip_pgs.integrations.open_clip.conv import visible_batch_norm
from clip_pgs.masking.sampling import kept_patches
from support import ddp_batch_norm
from support.models import over, small_convnext_clip, small_resnet_clip
from support.ranks import output, run_together

TOWERS = {
    "resnet": small_resnet_clip,
    "convnext": small_convnext_clip,
    "convnext, overlapping stem": partial(small_convnext_clip, stem_type="overlap_act"),
    "convnext, global response": partial(small_convnext_clip, use_grn=True, ls_init_value=None),
    "convnext, global response by convolutions": partial(
        small_convnext_clip, use_grn=True, conv_mlp=True
    ),
    "convnext, batch norm": partial(small_convnext_clip, norm_layer="batchnorm2d", conv_mlp=True),
    "convnext, norm before the head": partial(small_convnext_clip, head_norm_first=True),
}
every_tower = over("build", TOWERS, "resnet", "convnext", "convnext, global response")
CELLS = 9
ROWS = torch.tensor([[0, 1, 4, 8], [2, 3, 5, 7]])
FEW = PatchSelection(ROWS)
PADDED = PatchSelection(
    torch.cat([ROWS, ROWS[:, -1:]], dim=1),
    torch.tensor([[True, True, True, True, False]]).repeat(2, 1),
)
# Not known to be all of them without a look.
ALL = PatchSelection(torch.arange(CELLS).repeat(2, 1), torch.ones(2, CELLS, dtype=torch.bool))


def images(*, seed=0):
    return torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(seed))


def visible_pixels(selection):
    cells = kept_patches(selection, CELLS).reshape(2, 1, 3, 3)
    return cells.repeat_interleave(32, 2).repeat_interleave(32, 3)


def masked(plain, masking="random", **options):
    return apply_masking(copy.deepcopy(plain), masking, **options).train()


@every_tower
def test_eval_mode_state_and_class_are_those_of_the_plain_tower(build):
    plain = build()
    model = masked(plain, "pgs").eval()
    assert (num_patches(model), patch_size(model)) == (CELLS, (32, 32))
    assert model.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(model.visual(images()), plain.eval().visual(images()))
    assert type(remove_masking(model).visual) is type(plain.visual)


@every_tower
@pytest.mark.parametrize("selection", [ALL, PatchSelection(ALL.index)], ids=["valid", "plain"])
def test_keeping_every_cell_in_train_mode_is_the_plain_tower(build, selection):
    plain = build().train()
    model = masked(plain)
    with force_selection(model, selection):
        got = model.visual(images())
    torch.testing.assert_close(got, plain.visual(images()), atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(model.visual.buffers(), plain.visual.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


@every_tower
def test_masked_inference_sees_the_cells_that_stay_alone(build):
    plain = build().eval()
    model = masked(plain, when="always").eval()
    with torch.no_grad():
        with force_selection(model, ALL):
            whole = model.visual(images())
        torch.testing.assert_close(whole, plain.visual(images()), atol=1e-5, rtol=1e-5)
        with force_selection(model, FEW):
            few = model.visual(images())
            lost = model.visual(torch.where(visible_pixels(FEW), images(), torch.nan))
    assert torch.equal(few, lost)
    assert (few - whole).norm() > 0.01 * whole.norm()


@every_tower
def test_nothing_of_a_dropped_cell_reaches_the_feature_or_gets_a_gradient(build):
    model = masked(build())
    pixels = images().requires_grad_()
    seen = visible_pixels(FEW)
    with force_selection(model, FEW):
        features = model.visual(pixels)
        features.square().sum().backward()
        others = model.visual(torch.where(seen, images(), images(seed=1) * 100))
        lost = model.visual(torch.where(seen, images(), torch.nan))
    assert torch.equal(features, others)
    assert torch.equal(features, lost)
    assert (pixels.grad[~seen.expand_as(pixels)] == 0).all()
    gradient_of_cells = pixels.grad.unflatten(3, (3, 32)).unflatten(2, (3, 32)).abs()
    assert (gradient_of_cells.sum(dim=(1, 3, 5)).reshape(2, 9)[kept_patches(FEW, 9)] > 0).all()


@every_tower
def test_padding_slots_change_nothing(build):
    model = masked(build())
    features = []
    for selection in (FEW, PADDED):
        with force_selection(model, selection):
            features.append(model.visual(images()))
    torch.testing.assert_close(*features, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_batch_norm_is_that_of_the_visible_places_alone(dtype):
    generator = torch.Generator().manual_seed(0)
    x = (3 + 2 * torch.randn(4, 5, 6, 6, generator=generator)).to(dtype).requires_grad_()
    mask = torch.rand(4, 1, 6, 6, generator=generator) < 0.4
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    norm = nn.BatchNorm2d(5, dtype=wide)
    nn.init.normal_(norm.weight, generator=generator)
    nn.init.normal_(norm.bias, generator=generator)
    oracle = copy.deepcopy(norm)

    got = visible_batch_norm(norm, x, mask.to(dtype))
    places = x.movedim(1, 3)[mask[:, 0]]
    # The layer itself, given a dense batch of nothing but visible places.
    dense = oracle(places.to(wide)[:, :, None, None])[:, :, 0, 0].to(dtype)
    assert got.dtype == dtype
    torch.testing.assert_close(got.movedim(1, 3)[mask[:, 0]], dense)
    assert (got.movedim(1, 3)[~mask[:, 0]] == 0).all()
    weights = torch.randn(dense.shape, generator=generator).to(dtype)
    (mine,) = torch.autograd.grad((got.movedim(1, 3)[mask[:, 0]] * weights).sum(), x)
    (theirs,) = torch.autograd.grad((dense * weights).sum(), x)
    torch.testing.assert_close(mine, theirs, atol=1e-2 if dtype == torch.bfloat16 else 1e-9, rtol=0)
    for own, expected in zip(norm.buffers(), oracle.buffers(), strict=True):
        torch.testing.assert_close(own, expected)

    norm.eval()
    dense = oracle.eval()(places.to(wide)[:, :, None, None])[:, :, 0, 0].to(dtype)
    got = visible_batch_norm(norm, x, mask.to(dtype))
    torch.testing.assert_close(got.movedim(1, 3)[mask[:, 0]], dense)
    assert norm.num_batches_tracked == 1


@pytest.mark.slow
def test_synced_batch_norm_is_that_of_the_visible_places_of_all_processes(tmp_path):
    assert run_together(ddp_batch_norm.main, tmp_path) == [0, 0], output(tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    x, mask, weights = (torch.cat([part[name] for part in parts]) for name in ("x", "mask", "w"))
    norm = nn.BatchNorm2d(3, dtype=torch.float64)
    y = visible_batch_norm(norm, x.requires_grad_(), mask)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    torch.testing.assert_close(torch.cat([part["y"] for part in parts]), y)
    torch.testing.assert_close(torch.cat([part["gradient"] for part in parts]), gradient)
    for part in parts:
        torch.testing.assert_close(part["running_var"], norm.running_var)


@pytest.mark.slow
def test_what_one_process_does_alone_waits_for_no_synced_batch_norm(tmp_path):
    assert run_together(ddp_batch_norm.first_alone, tmp_path) == [0, 0], output(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "masking"), [(small_resnet_clip, "pgs"), (small_convnext_clip, "saliency-crop")]
)
def test_a_compiled_tower_is_one_graph(build, masking):
    model = masked(build(), masking)
    set_masking_noise(model, torch.rand(2, CELLS, generator=torch.Generator().manual_seed(0)))
    expected = model.visual(images())
    torch._dynamo.reset()
    compiled = torch.compile(model.visual, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), expected, atol=1e-5, rtol=1e-5)


@every_tower
def test_a_window_is_encoded_as_an_image_of_its_own(build):
    model = masked(build(), "saliency-crop", side=0.67)
    model.visual(images())
    selection = last_selection(model)
    assert selection.window == (2, 2)
    windows = []
    for row, image in zip(selection.index.tolist(), images(), strict=True):
        top, left = row[0] // 3 * 32, row[0] % 3 * 32
        windows.append(image[:, top : top + 64, left : left + 64])
    last = model.visual.run_stages(torch.stack(windows), None)
    expected = model.visual.pool_cells(last.flatten(2).mT, selection)
    with force_selection(model, selection):
        torch.testing.assert_close(model.visual(images()), expected)


@pytest.mark.parametrize("build", [small_resnet_clip, small_convnext_clip])
def test_a_tower_trains_on_smaller_images_and_is_the_plain_one_in_eval_mode(build):
    plain = build()
    model = masked(plain, "none", image_size=64)
    assert num_patches(model) == 4
    small = images()[:, :, :64, :64]
    model.visual(small).square().sum().backward()
    assert all(p.grad is not None for p in model.visual.parameters() if p.requires_grad)
    apply_masking(model, "pgs", image_size=64)
    set_masking_progress(model, 0.5)
    model.visual(small)
    assert last_selection(model).index.shape == (2, 2)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval().visual(images()), plain.eval().visual(images()))


def test_blocks_that_are_computed_again_see_the_same_cells():
    gradients = []
    for checkpointing in (False, True):
        model = masked(small_convnext_clip())
        model.set_grad_checkpointing(checkpointing)
        with force_selection(model, FEW):
            features = model.visual(images())
        with force_selection(model, ALL):
            model.visual(images())
        features.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.visual.parameters()]))
    torch.testing.assert_close(*gradients)


def replaced(trunk):
    model = small_convnext_clip()
    model.visual.trunk = trunk
    return model


@pytest.mark.parametrize(
    ("build", "options", "sentence"),
    [
        (lambda: small_resnet_clip(image_size=112), {}, "multiples of 32"),
        (lambda: replaced(ConvNeXt(output_stride=16)), {}, "reduces images by 16"),
        (lambda: replaced(ConvNeXt(global_pool="max")), {}, "otherwise than by a mean"),
        (
            lambda: small_convnext_clip(norm_layer="groupnorm1", conv_mlp=True),
            {},
            "normalizes by GroupNorm1",
        ),
        (small_resnet_clip, {"merge": "2x2"}, "a convolutional tower has none"),
        (small_resnet_clip, {"image_size": 80}, "multiples of the patch of 32 x 32"),
        (small_resnet_clip, {"image_size": 128}, "at most 96 x 96, got 128 x 128"),
    ],
    ids=["size", "stride", "pool", "norm", "merge", "small size", "larger size"],
)
def test_what_cannot_be_masked_is_named(build, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        apply_masking(build(), "pgs", **options)


def test_attentive_needs_attention_over_the_image():
    with pytest.raises(ValueError, match="is of convolutions"):
        apply_masking(small_convnext_clip(), "attentive")
