"""Run by `run_together`: two steps of attentive masking; each process saves its teacher."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from clip_pgs.integrations.open_clip import apply_masking, masking_state, update_masking
from support.models import image_batch, small_clip, text_batch


def main(folder):
    """Train on other images in each process and save {teacher, loss} as RANK.pt."""
    rank = dist.get_rank()
    model = apply_masking(small_clip(), "attentive", momentum=0.5).train()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        image, text, _ = parallel(image_batch(seed=10 * step + rank), text_batch(seed=rank))
        loss = (image - text).square().sum()
        # The scale takes no part in this loss, and DDP waits for every gradient.
        (loss + 0.0 * model.logit_scale).backward()
        optimizer.step()
        optimizer.zero_grad()
        update_masking(parallel, step=step, total_steps=2)
    state = {"teacher": masking_state(parallel)["teacher"], "loss": loss.detach()}
    torch.save(state, folder / f"{rank}.pt")
