"""A run that is stopped at any step ends as the one that nothing stopped, bit for bit."""

import os
import re
import signal

import pytest
import torch

from clip_pgs.training.export_command import main as export
from clip_pgs.training.stop import StoppedError
from clip_pgs.training.trainer import Trainer
from support.resuming import KilledError, curves, differences, last_checkpoint, run_with_stops
from support.runs import MODEL, run, write_model

# Four steps an epoch, on 32 samples.
VARIANTS = {
    "unmasked": {"masking": "none"},
    "random, a schedule of ratios": {
        "masking": "random",
        "mask_schedule": "linear",
        "mask_ratio_end": 0.25,
        "mask_schedule_steps": 3,
    },
    "pgs, adaptive, accumulation, workers": {
        "masking": "pgs",
        "mask_ratio": 0.5,
        "mask_ratio_min": 0.2,
        "accum_freq": 2,
        "batch_size": 4,
        "workers": 2,
    },
    "cluster, calibrated": {"masking": "cluster", "mask_ratio": 0.5},
    "attentive, a teacher, random captions": {
        "masking": "attentive",
        "text_masking": "random",
        "text_tokens": 6,
    },
    "a tower with BatchNorm": {"masking": "random", "model": "resnet"},
}
RESNET = {**MODEL, "vision_cfg": {"image_size": 64, "layers": [1] * 4, "width": 8}}


@pytest.fixture(scope="module", params=list(VARIANTS))
def whole(request, tmp_path_factory, world):
    """The options of a run of two epochs, and where it left its last checkpoint."""
    # Its curves have a line for the first step of an epoch, and one for the other three.
    options = {"train_data": world.train_data, "log_every_n_steps": 3, **VARIANTS[request.param]}
    if "model" in options:
        options["model"] = write_model(tmp_path_factory.mktemp("model"), config=RESNET)
    return options, run(tmp_path_factory.mktemp("whole"), **options)


@pytest.mark.slow
def test_signals_at_any_step_change_nothing(tmp_path, whole):
    options, expected = whole
    folder = run_with_stops(tmp_path, [1, 4, 6], **options)
    assert differences(last_checkpoint(folder), last_checkpoint(expected)) == []
    assert curves(folder) == curves(expected)
    said, wanted = ((place / "out.log").read_text() for place in (folder, expected))
    losses = r"Epoch \d of \d: mean loss \S+"
    assert set(re.findall(losses, said)) == set(re.findall(losses, wanted))
    assert re.search(r"mean loss \S+, trained in \S+ since the run was resumed", said)
    assert "resumed" not in wanted


@pytest.mark.slow
def test_deaths_repeat_steps_and_change_nothing(tmp_path, whole):
    options, expected = whole
    folder = run_with_stops(tmp_path, [1, 5], by="death", save_every_steps=3, **options)
    assert differences(last_checkpoint(folder), last_checkpoint(expected)) == []
    assert curves(folder) == curves(expected)


@pytest.mark.slow
@pytest.mark.parametrize("step", [7, 8, 9, 13])
def test_unmasked_tuning_goes_on_at_any_step(tmp_path, world, tuned, step):
    options, expected = tuned
    folder = run_with_stops(tmp_path, [step], **options)
    assert differences(last_checkpoint(folder), last_checkpoint(expected)) == []


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, world):
    """Two masked epochs of four steps, then one of eight without masks."""
    options = {"train_data": world.train_data, "masking": "attentive", "unmasked_epochs": 1}
    options["unmasked_batch_size"] = 4
    return options, run(tmp_path_factory.mktemp("tuned"), **options)


def end_before_the_first_step(folder, *, by, **options):
    """Start a run that is stopped, or dies, when it has read its data."""

    def fetch(self, *args):
        if by == "death":
            raise KilledError
        os.kill(os.getpid(), signal.SIGTERM)
        return fetch_epoch(self, *args)

    fetch_epoch = Trainer._fetch_epoch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_fetch_epoch", fetch)
        with pytest.raises((StoppedError, KilledError)):
            run(folder, **options)


@pytest.mark.parametrize("by", ["signal", "death"])
@pytest.mark.parametrize("file", ["epoch_1.pt", "step_6.pt"])
def test_a_run_that_begins_with_anothers_checkpoint_goes_on_from_it(tmp_path, world, by, file):
    options = {"train_data": world.train_data, "masking": "random"}
    whole = run(tmp_path, name="whole", save_every_steps=6, **options)
    begun = whole / "checkpoints" / file
    # With which a run from the beginning would not end alike.
    options["lr"] = 5e-3
    unbroken = run(tmp_path, name="unbroken", resume=begun, **options)
    end_before_the_first_step(tmp_path, by=by, resume=begun, **options)
    begun.unlink()
    ended = run(tmp_path, resume="latest", **options)
    assert differences(last_checkpoint(ended), last_checkpoint(unbroken)) == []


def test_a_run_that_begins_with_weights_alone_keeps_them(tmp_path, world):
    options = {"train_data": world.train_data, "masking": "random"}
    weights = last_checkpoint(run(tmp_path, name="other", seed=1, **options))["state_dict"]
    torch.save(weights, tmp_path / "weights.pt")
    whole = run(tmp_path, name="whole", resume=tmp_path / "weights.pt", **options)
    end_before_the_first_step(tmp_path, by="death", resume=tmp_path / "weights.pt", **options)
    ended = run(tmp_path, resume="latest", **options)
    assert differences(last_checkpoint(ended), last_checkpoint(whole)) == []
    # And each checkpoint tells where they came from.
    told, wanted = (last_checkpoint(each)["clip_pgs"]["options"] for each in (ended, whole))
    assert told["changes"] == wanted["changes"]


def test_a_run_in_a_folder_of_open_clip_leaves_its_files_as_they_are(tmp_path, world):
    options = {"train_data": world.train_data}
    folder = run(tmp_path, epochs=1, **options)
    theirs = folder / "checkpoints" / "epoch_1.pt"
    ours = last_checkpoint(folder)
    for path in (*theirs.parent.iterdir(), folder / "options.json"):
        path.unlink()
    torch.save({name: ours[name] for name in ("epoch", "name", "state_dict", "optimizer")}, theirs)
    before = theirs.read_bytes()
    end_before_the_first_step(tmp_path, by="signal", resume="latest", **options)
    assert theirs.read_bytes() == before
    assert (theirs.parent / "latest").read_text() == "epoch_1.pt\n"
    assert last_checkpoint(run(tmp_path, resume="latest", **options))["epoch"] == 2
    assert theirs.read_bytes() == before


def test_a_run_that_begins_at_its_end_holds_the_checkpoint(tmp_path, world):
    options = {"train_data": world.train_data, "masking": "random"}
    whole = run(tmp_path, name="whole", **options)
    copy = run(tmp_path, resume=whole, **options)
    assert differences(last_checkpoint(copy), last_checkpoint(whole)) == []
    assert export([str(copy)]) == 0
    assert last_checkpoint(run(tmp_path, resume="latest", **options | {"epochs": 3}))["epoch"] == 3


CLUSTER = {"masking": "cluster", "mask_ratio": 0.5}
ADAPTIVE = {"masking": "pgs", "mask_ratio": 0.5, "mask_ratio_min": 0.2}


@pytest.mark.parametrize("resumes", ["file", pytest.param("latest", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("before", "after", "learns"),
    [
        ({"masking": "attentive"}, {"masking": "random"}, None),
        ({**ADAPTIVE, "masking_option": "mask_ratio_mean=0.35"}, ADAPTIVE, None),
        pytest.param(CLUSTER, {"masking": "attentive"}, "teacher", marks=pytest.mark.slow),
        pytest.param({"masking": "attentive"}, CLUSTER, "strategy", marks=pytest.mark.slow),
    ],
    ids=["without a teacher", "no longer calibrated", "with a teacher", "calibrated"],
)
def test_a_run_that_goes_on_with_another_masking_begins_that_anew(
    tmp_path, world, caplog, resumes, before, after, learns
):
    options = {"train_data": world.train_data, "save_every_steps": 2}
    first = run(tmp_path, name="first", epochs=1, **options, **before)
    (first / "checkpoints" / "epoch_1.pt").unlink()
    (first / "checkpoints" / "latest").write_text("step_2.pt\n")
    for path in first.rglob("step_4.pt"):
        path.unlink()
    options |= after
    if resumes == "file":
        options["name"] = "second"
        run(tmp_path, epochs=1, resume=first / "checkpoints" / "step_2.pt", **options)
    else:
        options |= {"name": "first", "accept_changes": True}
        run(tmp_path, epochs=1, resume="latest", **options)
    assert "What the masking had found is left out" in caplog.text
    # And what it then began goes on.
    caplog.clear()
    state = last_checkpoint(run(tmp_path, epochs=2, resume="latest", **options)).get(
        "masking_state"
    )
    assert "left out" not in caplog.text
    found = {part for part, values in (state or {}).items() if any(map(len, values.values()))}
    assert found == ({learns} if learns else set())
