"""Gradient accumulation gives the gradient of the big batch, to 1e-6 in float32."""

import open_clip
import pytest
import torch
from open_clip.loss import ClipLoss

from clip_pgs.training.step import compute_gradients
from support.gradients import MASKINGS, global_batch, relative_difference, step_gradients
from support.runs import COCA, MODEL, write_model

TOLERANCE = 1e-6


@pytest.mark.parametrize(
    ("masking", "config", "options"),
    [
        *[pytest.param(masking, MODEL, {}, id=f"clip-{masking}") for masking in MASKINGS],
        pytest.param("pgs", MODEL, {"siglip": True}, id="siglip-pgs"),
        pytest.param("random", COCA, {}, id="coca-random", marks=pytest.mark.slow),
        pytest.param("pgs-adaptive", COCA, {}, id="coca-pgs-adaptive"),
    ],
)
def test_gradient_equals_the_big_batch(tmp_path, masking, config, options):
    path = write_model(tmp_path, config=config)
    big, big_losses = step_gradients(path, masking=masking, **options)
    cached, losses = step_gradients(path, masking=masking, accum_freq=4, **options)
    assert relative_difference(cached, big) <= TOLERANCE
    # The logit scale's gradient is small beside the others; OpenCLIP's is 4 times too large.
    for name in {"logit_scale", "logit_bias"} & big.keys():
        torch.testing.assert_close(cached[name], big[name], rtol=1e-5, atol=1e-7)
    for name, value in big_losses.items():
        torch.testing.assert_close(losses[name], value)


def test_another_mask_in_the_second_pass_would_be_noticed(tmp_path):
    path = write_model(tmp_path)
    masked, _ = step_gradients(path, masking="random")
    plain, _ = step_gradients(path, masking="none")
    assert relative_difference(masked, plain) > 1e-2


def test_second_pass_repeats_the_dropout_of_the_first(tmp_path):
    open_clip.add_model_config(write_model(tmp_path))
    model = open_clip.create_model("tiny", output_dict=True, force_patch_dropout=0.5).train()
    images, texts = global_batch()
    batches = list(zip(images.chunk(2), texts.chunk(2), strict=True))

    torch.manual_seed(5)
    outputs = [model(*batch) for batch in batches]
    joined = {name: torch.cat([out[name] for out in outputs]) for name in list(outputs[0])[:2]}
    ClipLoss()(**joined, logit_scale=model.logit_scale.exp()).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    torch.manual_seed(5)
    compute_gradients(model, batches, ClipLoss())
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert relative_difference(gradients, expected) <= TOLERANCE


def test_locked_tower_gets_no_gradient(tmp_path):
    open_clip.add_model_config(write_model(tmp_path))
    model = open_clip.create_model("tiny", output_dict=True).train()
    model.lock_image_tower()
    images, texts = global_batch()
    compute_gradients(model, list(zip(images.chunk(2), texts.chunk(2), strict=True)), ClipLoss())
    assert all(p.grad is None for p in model.visual.parameters())
    assert model.ln_final.weight.grad.abs().sum() > 0
