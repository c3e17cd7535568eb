"""Run by `run_together`: options of the recipe that several processes alone have a use for."""

from contextlib import ExitStack
from types import SimpleNamespace
from unittest.mock import patch

import open_clip.loss
import torch
import torch.distributed as dist

from clip_pgs.training.build import build_loss, build_model
from clip_pgs.training.masks import StepMasks
from clip_pgs.training.options import parse_options
from support.runs import MODEL, flags, write_model

ROWS, SCALE, BIAS = 3, 5.0, -1.0
GATHERS = [(local, grad) for local in (False, True) for grad in (False, True)]
IMPLEMENTATIONS = {None: "exchange", "shift": "exchange", "reduce": "reduce", "gather": "gather"}
RESNET = {"image_size": 64, "layers": [1] * 4, "width": 8}


def features():
    """Return images and texts of all processes, (2 * ROWS, 4) each, of length 1."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(2, 2 * ROWS, 4, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(both, dim=-1).unbind()


def options_of(folder, rank, world_size, **said):
    """Return the options of one process, as `join_processes` leaves them."""
    said = {"dataset_type": "synthetic", "model": folder / "resnet.json", **said}
    options = parse_options(flags(folder, **said))
    options.rank, options.world_size, options.distributed = rank, world_size, world_size > 1
    return options


def encoded(folder, rank, world_size, **said):
    """Return what a masked ResNet makes of the rank's images of four, in train mode."""
    options = options_of(folder, rank, world_size, masking="random", **said)
    model = build_model(options, torch.device("cpu")).model.train()
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    batch_size = 4 // world_size
    place = {"batch_size": batch_size, "rank": rank, "world_size": world_size}
    masks = StepMasks(model, SimpleNamespace(seed=1, accum_freq=1, **place))
    masks.start_step(0, total_steps=1, device=torch.device("cpu"))
    masks.set_noise(0)
    with torch.no_grad():
        return model.encode_image(images[rank * batch_size :][:batch_size])


def main(folder):
    """Save each process's losses, gradients, collectives and features."""
    rank = dist.get_rank()
    saved = {"clip": {}, "siglip": {}}
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    scale, bias = (torch.tensor(value, dtype=torch.float64) for value in (SCALE, BIAS))
    for local, grad in GATHERS:
        images, texts = (f[own].clone().requires_grad_() for f in features())
        options = options_of(folder, rank, 2, local_loss=local, gather_with_grad=grad)
        loss = build_loss(options, torch.nn.Identity())(images, texts, scale)
        loss.backward()
        saved["clip"][local, grad] = loss.detach(), images.grad
    for implementation in IMPLEMENTATIONS:
        images, texts = (f[own] for f in features())
        options = options_of(folder, rank, 2, siglip=True, loss_dist_impl=implementation)
        loss = build_loss(options, torch.nn.Identity())
        with ExitStack() as stack:
            spies = {
                name: stack.enter_context(
                    patch.object(owner, attribute, wraps=getattr(owner, attribute))
                )
                for name, owner, attribute in (
                    ("exchange", open_clip.loss, "neighbour_exchange_with_grad"),
                    ("reduce", torch.distributed.nn, "all_reduce"),
                    ("gather", torch.distributed.nn, "all_gather"),
                )
            }
            value = loss(images, texts, scale, bias)
            called = [name for name, spy in spies.items() if spy.called]
        saved["siglip"][implementation] = value, called
    saved["norm"] = {sync: encoded(folder, rank, 2, use_bn_sync=sync) for sync in (False, True)}
    torch.save(saved, folder / f"{rank}.pt")


def write_resnet(folder):
    """Write the model's config."""
    write_model(folder, name="resnet", config={**MODEL, "vision_cfg": RESNET})
