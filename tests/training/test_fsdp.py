"""`--fsdp`: a model that processes shard trains as one that each of them has whole."""

import functools
import signal

import open_clip
import pytest
import torch

from clip_pgs.training.__main__ import main
from support.gradients import relative_difference
from support.options import VALID
from support.ranks import Stop, output, train_together
from support.resuming import differences, last_checkpoint
from support.runs import flags

# Of 32 samples, two at a time in each process.
CASES = {
    "padded tokens, accumulation, clipping, checkpointed blocks": {
        "masking": "pgs",
        "mask_ratio_min": 0.2,
        "accum_freq": 2,
        "grad_clip_norm": 0.5,
        "grad_checkpointing": True,
    },
    "packed tokens, a loss in chunks": {
        "masking": "pgs",
        "mask_ratio_min": 0.2,
        "pack_tokens": True,
        "loss_chunk": 3,
    },
    "a calibrated strategy, SigLIP, unmasked tuning": {
        "masking": "cluster",
        "siglip": True,
        "unmasked_epochs": 1,
    },
    "a teacher": {"masking": "attentive"},
}


def train(folder, *, num_processes=2, trouble=None, codes=0, **options):
    """Train on as many processes and return the content of the run's last checkpoint."""
    argv = flags(folder, **{"batch_size": 2, "epochs": 1, "precision": "fp32", **options})
    seen = train_together(folder, argv, num_processes=num_processes, trouble=trouble)
    assert seen == num_processes * [codes], output(folder)
    return last_checkpoint(folder / "logs" / options.get("name", "run"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, world):
    """Return what gives the checkpoint of a whole run in single precision with a masking."""

    @functools.cache
    def get(masking):
        options = {"train_data": world.train_data, "masking": masking, "fsdp": True}
        return train(tmp_path_factory.mktemp("trained"), **options)

    return get


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_ddp(tmp_path, world, case):
    options = {"train_data": world.train_data, **CASES[case]}
    expected = train(tmp_path, name="whole", **options)
    sharded = train(tmp_path, name="sharded", fsdp=True, **options)
    assert relative_difference(sharded["state_dict"], expected["state_dict"]) <= 1e-5
    for name, weight in expected["state_dict"].items():
        assert sharded["state_dict"][name].shape == weight.shape
    moments, expected_moments = (c["optimizer"]["state"] for c in (sharded, expected))
    assert {n: s["exp_avg"].shape for n, s in moments.items()} == {
        n: s["exp_avg"].shape for n, s in expected_moments.items()
    }


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_by_bit_and_on_four_processes_and_one(tmp_path, world, trained):
    options = {"train_data": world.train_data, "masking": "pgs", "fsdp": True}
    asked = Stop(rank=1, step=3, number=signal.SIGUSR1)
    stopped = train(tmp_path, trouble=asked, codes=85, save_every_steps=2, **options)
    assert stopped["step"] == 3
    again = train(tmp_path, resume="latest", **options)
    assert differences(again, trained("pgs")) == []
    own, every = output(tmp_path).split("this process holds ")[1].split(" weights")[0].split(" of ")
    assert int(own) < 0.6 * int(every)

    longer = options | {"resume": "latest", "epochs": 2}
    assert train(tmp_path, num_processes=4, batch_size=1, **longer)["epoch"] == 2
    alone = longer | {"fsdp": False, "epochs": 3, "batch_size": 4}
    last = train(tmp_path, num_processes=1, **alone)
    assert last["epoch"] == 3
    folder = tmp_path / "logs" / "run" / "export"
    model, *_ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    weights = model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in last["state_dict"].items())


@pytest.mark.slow
@pytest.mark.parametrize("masking", ["pgs", "none"])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_half_precision_is_near_single(tmp_path, world, trained, masking, checkpoints):
    options = {"train_data": world.train_data, "masking": masking, "fsdp": True}
    half = train(tmp_path, precision="amp_bf16", grad_checkpointing=checkpoints, **options)
    assert all(weight.dtype == torch.float32 for weight in half["state_dict"].values())
    assert relative_difference(half["state_dict"], trained(masking)["state_dict"]) <= 1e-2


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ([], "--fsdp"),
        (["--precision", "amp"], "--precision"),
        (["--precision", "fp32", "--torchcompile"], "--torchcompile"),
        (["--precision", "fp32", "--opt", "timm/lamb"], "--opt"),
    ],
)
def test_what_cannot_be_sharded_is_refused(tmp_path, capsys, more, part):
    argv = [*VALID, "--fsdp", "--precision", "fp32", *more, "--logs", str(tmp_path / "logs")]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1
    assert not (tmp_path / "logs").exists()
