import math

import pytest
import torch

from clip_pgs.training.step import update_weights
from support.models import small_clip


def model_with_gradients(*, scale=1.0):
    model = small_clip()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, scale)
    return model


@pytest.mark.parametrize(("start", "expected"), [(9.0, math.log(100)), (-3.0, 0.0)])
def test_logit_scale_stays_within_its_bounds(start, expected):
    model = model_with_gradients()
    model.logit_scale.data.fill_(start)
    update_weights(model, torch.optim.SGD(model.parameters(), lr=1e-9))
    assert model.logit_scale.item() == pytest.approx(expected)


def test_gradients_are_clipped_to_the_norm():
    model = model_with_gradients(scale=7.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    norm, _ = update_weights(model, torch.optim.SGD(model.parameters(), lr=1.0), grad_clip_norm=0.5)
    moved = sum((p.detach() - before[name]).square().sum() for name, p in model.named_parameters())
    count = sum(p.numel() for p in model.parameters())
    assert norm.item() == pytest.approx(7 * math.sqrt(count), rel=1e-4)
    assert math.sqrt(moved) == pytest.approx(0.5, rel=1e-3)


def test_gradients_are_forgotten_after_the_step():
    model = model_with_gradients()
    update_weights(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    assert all(parameter.grad is None for parameter in model.parameters())
