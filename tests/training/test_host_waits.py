"""Between two log lines nothing makes the host wait for the device, so that it runs ahead of it."""

from types import SimpleNamespace

import pytest
import torch

from clip_pgs.integrations.apply import masking_or_none
from clip_pgs.masking import list_maskings
from clip_pgs.training.checkpoint import Cost
from clip_pgs.training.loggers import MetricLoggers
from clip_pgs.training.telemetry import Telemetry
from support.host_waits import noting_host_waits
from support.trainers import open_trainer

CPU = torch.device("cpu")
# In the first steps of each tenth of a run it reads how much a batch masks.
CALIBRATED = {"cluster": {"masking_option": "threshold=0.5"}}


def take_steps(trainer, *, num_steps=3):
    """Return what would have waited in the steps behind an epoch's first."""
    telemetry = Telemetry(
        SimpleNamespace(rank=0, world_size=1, log_every_n_steps=99, max_bad_steps=9),
        MetricLoggers(None, None, first_step=0),
        Cost(),
        device=torch.device("cpu"),
        steps_left=7,
    )
    telemetry.start_phase(
        num_patches=trainer.masks.num_patches if trainer.masks else 0,
        samples_per_step=trainer.phase.samples_per_step,
    )
    masking = masking_or_none(trainer.model)
    if masking is not None:
        # As on a GPU, where packing is asked for and reads how many tokens there are.
        masking.pack_tokens = False
    trainer.start_epoch(0)
    trainer.train_step(trainer.next_batches()[0])
    all_waits = []
    for _ in range(num_steps):
        batches, seconds = trainer.next_batches()
        with noting_host_waits() as waits:
            result = trainer.train_step(batches)
            telemetry.step(
                result,
                model=trainer.model,
                epoch=0,
                done=trainer.position,
                steps_left=1,
                data_seconds=seconds,
            )
        all_waits += waits
    return all_waits


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"masking": "pgs", "mask_ratio_min": 0.3}, id="adaptive"),
        pytest.param(
            {"masking": "pgs", "mask_ratio_min": 0.3, "accum_freq": 2, "batch_size": 4},
            id="accumulation",
        ),
        pytest.param({"masking": "pgs", "grad_clip_norm": 1.0}, id="clipping"),
        pytest.param({"masking": "pgs", "precision": "amp_bf16"}, id="bfloat16"),
        pytest.param({"masking": "random", "siglip": True}, id="siglip"),
        pytest.param({"masking": "pgs", "grad_checkpointing": True}, id="checkpointing"),
        pytest.param(
            {"masking": "pgs", "merge": "2x2+candidates", "merge_counts": True}, id="merge"
        ),
        *(
            pytest.param({"masking": name, **CALIBRATED.get(name, {})}, id=name)
            for name in list_maskings()
        ),
    ],
)
def test_a_step_never_waits(tmp_path, world, options):
    assert take_steps(open_trainer(tmp_path, train_data=world.train_data, **options)) == []


def test_a_step_with_a_scaled_loss_never_waits(tmp_path, world):
    scaler = torch.amp.GradScaler("cpu")
    trainer = open_trainer(tmp_path, train_data=world.train_data, masking="pgs", scaler=scaler)
    assert take_steps(trainer) == []


def test_an_optimiser_that_is_not_fused_is_seen_to_wait(tmp_path, world):
    trainer = open_trainer(tmp_path, train_data=world.train_data, opt="timm/lamb")
    waits = take_steps(trainer, num_steps=1)
    assert any("step.py" in wait and "reads a number" in wait for wait in waits)


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64)),
    ],
    ids=["item", "bool", "mask", "nonzero", "tolist", "cpu", "tensor", "repeat"],
)
def test_what_waits_is_noted(waiting):
    values = torch.arange(4.0)
    with noting_host_waits() as waits:
        waiting(values)
    assert len(waits) == 1
