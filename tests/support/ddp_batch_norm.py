"""Run by `run_together`: synced BatchNorm over visible places, and of one process alone."""

import torch
import torch.distributed as dist
from torch import nn

from clip_pgs.integrations.open_clip import apply_masking
from clip_pgs.integrations.open_clip.conv import visible_batch_norm
from clip_pgs.integrations.open_clip.flops import count_flops
from clip_pgs.training.masks import draw_masks
from support.models import small_resnet_clip, text_batch


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
    # By processes of a group alone, here each one by itself.
    groups = [dist.new_group([other]) for other in range(dist.get_world_size())]
    alone, local = nn.SyncBatchNorm(3, process_group=groups[rank]), nn.BatchNorm2d(3)
    given = x.detach().float(), mask.float()
    assert torch.equal(visible_batch_norm(alone, *given), visible_batch_norm(local, *given))
    state = {"x": x, "mask": mask, "w": weights, "y": y, "gradient": gradient}
    state = {name: value.detach() for name, value in state.items()}
    torch.save({**state, "running_var": norm.running_var}, folder / f"{rank}.pt")


def first_alone(folder):
    """Count operations and draw masks in the first process, while the other goes on."""
    if dist.get_rank() == 0:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(small_resnet_clip())
        model.output_dict = True
        images, texts = torch.zeros(2, 3, 96, 96), text_batch(2)
        count_flops(model, images, texts)
        apply_masking(model, "random", mask_ratio=0.5)
        model.visual.image_mean = model.visual.image_std = (0.5, 0.5, 0.5)
        count_flops(model, images, texts)
        draw_masks(model, images, seed=0)
        assert any(type(module) is nn.SyncBatchNorm for module in model.modules())
    dist.barrier()
