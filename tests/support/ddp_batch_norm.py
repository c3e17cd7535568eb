"""Run by `run_together`: synced BatchNorm over visible places, saved by each process."""

import torch
import torch.distributed as dist
from torch import nn

from clip_pgs.integrations.open_clip.conv import visible_batch_norm


def main(folder):
    """Normalize other maps in each process, of which other shares are visible."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    x, weights = (
        rank + torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    mask = (torch.rand(2, 1, 4, 4, generator=generator) < 0.3 + 0.4 * rank).double()
    norm = nn.SyncBatchNorm(3, dtype=torch.float64)
    y = visible_batch_norm(norm, x.requires_grad_(), mask)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    state = {"x": x, "mask": mask, "w": weights, "y": y, "gradient": gradient}
    state = {name: value.detach() for name, value in state.items()}
    torch.save({**state, "running_var": norm.running_var}, folder / f"{rank}.pt")
