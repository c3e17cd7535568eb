import torch

from clip_pgs.data.plan import stable_seed
from clip_pgs.training.seeding import micro_batch_rows, step_noise

CPU = torch.device("cpu")


def noise(*, seed=0, step=5, num_samples=16):
    return step_noise(seed, step, num_samples=num_samples, num_patches=9, device=CPU)


def test_noise_is_keyed_by_seed_and_step():
    assert torch.equal(noise(), noise())
    assert not torch.equal(noise(), noise(seed=1))
    assert not torch.equal(noise(), noise(step=6))


def test_noise_leaves_the_global_stream_alone():
    state = torch.get_rng_state()
    noise()
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_uniform_in_the_unit_interval():
    values = noise(num_samples=4000)
    assert values.dtype == torch.float32
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean().item() - 0.5) < 0.01


def test_micro_batches_of_all_ranks_cover_the_global_batch_once():
    rows = [
        row
        for micro_batch in range(3)
        for rank in range(2)
        for row in range(16)[
            micro_batch_rows(micro_batch=micro_batch, rank=rank, world_size=2, batch_size=2)
        ]
    ]
    assert rows == list(range(12))


def test_keys_are_not_sums():
    # Seed 0 on rank 1 and seed 1 on rank 0 share a stream in OpenCLIP.
    assert stable_seed(0, "step", 0, 1) != stable_seed(1, "step", 0, 0)
