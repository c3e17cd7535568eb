"""Gradients of one training step, for a batch in one piece or in several."""

import math
from types import SimpleNamespace

import torch
from torch.nn.parallel import DistributedDataParallel

from clip_pgs.training.build import build_loss, build_model
from clip_pgs.training.masks import StepMasks, micro_batch_rows
from clip_pgs.training.options import parse_options
from clip_pgs.training.step import compute_gradients
from support.runs import flags

GLOBAL_BATCH = 16
MASKINGS = {
    "none": {"masking": "none"},
    "random": {"masking": "random", "mask_ratio": 0.5},
    "pgs": {"masking": "pgs", "mask_ratio": 0.5},
    "pgs-adaptive": {"masking": "pgs", "mask_ratio": 0.5, "mask_ratio_min": 0.2},
}


def global_batch():
    """Return images (16, 3, 32, 32) and captions' tokens (16, 12)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(GLOBAL_BATCH, 3, 32, 32, generator=generator)
    texts = torch.randint(1, 49000, (GLOBAL_BATCH, 12), generator=generator)
    # CLIP pools the text at the highest token.
    texts[:, 8] = 49407
    texts[:, 9:] = 0
    return images, texts


def step_gradients(
    config,
    *,
    masking="random",
    accum_freq=1,
    rank=0,
    world_size=1,
    static_graph=False,
    **options,
):
    """Return {parameter: gradient} and the losses of one step of the global batch.

    Args:
        config: Path of a model config.
        masking: One of `MASKINGS`.
        accum_freq: Micro-batches.
        rank: This process; with several, the process group is there already.
        world_size: Processes.
        static_graph: Tell DDP so.
        **options: More flags, with underscores.
    """
    options = {"dataset_type": "synthetic", **MASKINGS[masking], **options}
    args = parse_options(flags(config.parent, model=config, **options))
    args.rank, args.world_size, args.distributed = rank, world_size, world_size > 1
    model = build_model(args, torch.device("cpu")).model.train()
    masks = None
    batch_size = GLOBAL_BATCH // accum_freq // world_size
    if args.masking != "none":
        options = SimpleNamespace(
            seed=1,
            batch_size=batch_size,
            accum_freq=accum_freq,
            rank=rank,
            world_size=world_size,
        )
        masks = StepMasks(model, options)
        masks.start_step(3, total_steps=6, device=torch.device("cpu"))
    images, texts = global_batch()
    rows = [
        micro_batch_rows(micro_batch=a, rank=rank, world_size=world_size, batch_size=batch_size)
        for a in range(accum_freq)
    ]
    parallel = model
    if world_size > 1:
        parallel = DistributedDataParallel(model, static_graph=static_graph)
    losses = compute_gradients(
        parallel,
        [(images[part], texts[part]) for part in rows],
        build_loss(args, model),
        before_forward=masks.set_noise if masks else None,
    )
    return {name: p.grad for name, p in model.named_parameters()}, losses


def relative_difference(gradients, expected):
    """Return the norm of the difference of all gradients over the norm of the expected ones."""
    difference = sum(
        (gradients[name] - expected[name]).double().square().sum() for name in expected
    )
    norm = sum(gradient.double().square().sum() for gradient in expected.values())
    return math.sqrt(difference / norm)
