"""Run by `run_together`: gradients of each case on two processes, saved by the first."""

import torch
import torch.distributed as dist

from support.gradients import step_gradients

# name: (options of `step_gradients`, which of the two models)
CASES = {
    "clip-random": ({"masking": "random"}, "tiny"),
    "clip-pgs": ({"masking": "pgs"}, "tiny"),
    "clip-pgs-adaptive": ({"masking": "pgs-adaptive"}, "tiny"),
    "siglip-pgs": ({"masking": "pgs", "siglip": True}, "tiny"),
    "coca-random": ({"masking": "random"}, "tiny_coca"),
}
PARALLEL = {"local_loss": True, "gather_with_grad": True, "world_size": 2}


def main(folder):
    """Save {case: {accumulation: gradients}} of rank 0; all ranks hold the same."""
    rank = dist.get_rank()
    saved = {}
    for name, (options, model) in CASES.items():
        config = folder / f"{model}.json"
        # Two is enough for a step without all-reduce and one with.
        saved[name] = {
            accum_freq: step_gradients(
                config, accum_freq=accum_freq, rank=rank, **PARALLEL, **options
            )[0]
            for accum_freq in (1, 2)
        }
    saved["static-graph"] = {
        2: step_gradients(
            folder / "tiny.json", accum_freq=2, rank=rank, static_graph=True, **PARALLEL
        )[0]
    }
    if rank == 0:
        torch.save(saved, folder / "gradients.pt")
