"""OpenCLIP's losses beside those in chunks, on one process or several."""

import copy
from functools import partial

import torch
import torch.distributed as dist
from open_clip.loss import ClipLoss, CoCaLoss, SigLipLoss

from clip_pgs.training.chunked_loss import in_chunks

ROWS = 5
GATHERS = [{"local_loss": local, "gather_with_grad": grad} for local in (0, 1) for grad in (0, 1)]
CASES = {
    **{
        f"clip-local{gather['local_loss']}-grad{gather['gather_with_grad']}": partial(
            ClipLoss, cache_labels=True, **gather
        )
        for gather in GATHERS
    },
    "coca": partial(CoCaLoss, 2.0, 1.0, local_loss=True, gather_with_grad=True, cache_labels=True),
    **{
        f"siglip-{name}": partial(SigLipLoss, dist_impl=name)
        for name in ("bidir", "shift", "reduce", "gather")
    },
}


def loss_inputs(case, *, batch_size, rank=0):
    """Return what a model hands to the loss of a case: leaves, where they have gradients."""
    generator = torch.Generator().manual_seed(rank)
    images, texts = torch.nn.functional.normalize(
        torch.randn(2, batch_size, 16, generator=generator), dim=-1
    )
    inputs = {"image_features": images, "text_features": texts, "logit_scale": torch.tensor(14.0)}
    if case == "coca":
        inputs["logits"] = torch.randn(batch_size, 6, 9, generator=generator)
        inputs["labels"] = torch.randint(9, (batch_size, 6), generator=generator)
    elif case.startswith("siglip"):
        # The softmax does not depend on it: its gradient there is rounding.
        inputs["logit_bias"] = torch.tensor(-2.0)
    return {
        name: value.clone().requires_grad_(value.is_floating_point())
        for name, value in inputs.items()
    }


def value_and_gradients(loss, inputs):
    """Return the sum of a loss's terms and the gradient of each input."""
    total = sum(loss(**inputs, output_dict=True).values())
    total.backward()
    gradients = {name: value.grad for name, value in inputs.items() if value.requires_grad}
    return {"loss": total.detach(), **gradients}


def compare(case, *, batch_size=17, **place):
    """Assert that a case's loss in chunks has the value and gradients of OpenCLIP's."""
    plain = CASES[case](**place)
    chunked = in_chunks(copy.deepcopy(plain), ROWS)
    inputs = partial(loss_inputs, case, batch_size=batch_size, rank=place.get("rank", 0))
    expected = value_and_gradients(plain, inputs())
    for name, value in value_and_gradients(chunked, inputs()).items():
        difference = (value - expected[name]).abs().max() / expected[name].abs().max()
        assert difference <= 1e-6, f"{case}, {name}: {difference}"


def compare_all(_folder):
    """Compare all cases in one of two processes."""
    for case in CASES:
        compare(case, rank=dist.get_rank(), world_size=2)
