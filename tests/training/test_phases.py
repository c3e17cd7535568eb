"""Runs that go on without masks: epochs, rates, costs, and what a resumed run repeats."""

import json
import shutil
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from clip_pgs.training.__main__ import main
from clip_pgs.training.phases import Phase, steps_after
from support.runs import COCA, MODEL, flags, run, write_model

EPOCHS, UNMASKED_EPOCHS = 3, 2
RECIPE = {
    "masking": "attentive",
    "mask_ratio": 0.5,
    "mask_schedule": "linear",
    "mask_ratio_end": 0.25,
    "mask_schedule_steps": 3,
    "text_masking": "random",
    "text_tokens": 6,
    "epochs": EPOCHS,
    "unmasked_epochs": UNMASKED_EPOCHS,
    "unmasked_lr": 1e-4,
    "unmasked_batch_size": 4,
}


@pytest.fixture(scope="module")
def tuned_options(world):
    return {"train_data": world.train_data, **RECIPE}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tuned_options):
    """Three masked epochs of four steps, then two unmasked ones of eight."""
    return run(tmp_path_factory.mktemp("tuned"), **tuned_options)


def train_lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def load(folder, epoch):
    return torch.load(folder / "checkpoints" / f"epoch_{epoch}.pt", weights_only=True)


def masked_and_unmasked(folder):
    lines = train_lines(folder)
    return (
        [line for line in lines if line["epoch"] < EPOCHS],
        [line for line in lines if line["epoch"] >= EPOCHS],
    )


@pytest.mark.slow
def test_steps_and_epochs_go_on_through_both_phases(tuned):
    lines = train_lines(tuned)
    assert [line["step"] for line in lines] == list(range(3 * 4 + 2 * 8))
    assert [line["epoch"] for line in lines] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 8 + [4] * 8
    assert lines[-1]["samples"] == 5 * 32


def test_unmasked_epochs_mask_nothing_and_draw_no_masks(tuned):
    masked, unmasked = masked_and_unmasked(tuned)
    assert all("mask_ratio_mean" in line for line in masked)
    assert not any("mask_ratio_mean" in line for line in unmasked)
    pictures = {path.stem for path in (tuned / "masks").glob("*.png")}
    assert pictures == {"epoch_0", "epoch_1", "epoch_2", "epoch_3"}


def test_a_schedule_takes_its_levels_over_the_masked_steps(tuned):
    masked, _ = masked_and_unmasked(tuned)
    ratios = [line["mask_ratio_mean"] for line in masked]
    assert ratios == pytest.approx([0.5] * 4 + [0.375] * 4 + [0.25] * 4)


def test_the_unmasked_rate_rises_over_a_tenth_of_an_epoch_and_falls_to_zero(tuned):
    _, unmasked = masked_and_unmasked(tuned)
    rates = [line["lr"] for line in unmasked]
    # ceil(0.1 * 8) = 1 step of warm-up, then a cosine.
    assert rates[0] == pytest.approx(1e-4)
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] < 2e-6


def test_each_sample_costs_what_its_phase_and_ratio_cost(tmp_path, world, tuned):
    masked, unmasked = masked_and_unmasked(tuned)
    lines = [{"flops": 0, "samples": 0}, *masked, *unmasked]
    costs = [
        (after["flops"] - before["flops"]) / (after["samples"] - before["samples"])
        for before, after in pairwise(lines)
    ]
    assert [len(set(map(round, costs[start : start + 4]))) for start in (0, 4, 8)] == [1, 1, 1]
    assert costs[0] < costs[4] < costs[8] < costs[12]
    # Whole images and captions cost what they cost a run that never masked anything.
    plain = run(tmp_path, train_data=world.train_data, epochs=1)
    line = train_lines(plain)[-1]
    assert costs[12] == pytest.approx(line["flops"] / line["samples"])
    assert len(set(map(round, costs[12:]))) == 1


def test_a_teachers_cost_is_counted_and_shown(tuned):
    masked, unmasked = masked_and_unmasked(tuned)
    assert all(0.02 < line["selection_flops_share"] < 0.5 for line in masked)
    assert not any("selection_flops_share" in line for line in unmasked)
    cost = load(tuned, 5)["clip_pgs"]["cost"]
    by_hand = sum(
        after["selection_flops_share"] * (after["flops"] - before["flops"])
        for before, after in pairwise([{"flops": 0}, *masked])
    )
    assert cost["selection_flops"] == pytest.approx(by_hand)
    assert "% of them to choose its patches" in (tuned / "out.log").read_text()


@pytest.mark.parametrize(
    ("epoch", "position", "left"),
    [(0, 0, 28), (0, 8, 27), (2, 24, 17), (3, 0, 16), (3, 4, 15), (4, 0, 8), (5, 0, 0)],
)
def test_the_steps_after_a_place_are_those_of_its_phase_and_of_later_ones(epoch, position, left):
    sizes = {"batch_size": 8, "accum_freq": 1, "world_size": 1}
    masked = SimpleNamespace(epochs=EPOCHS, **sizes)
    tuning = SimpleNamespace(epochs=UNMASKED_EPOCHS, **{**sizes, "batch_size": 4})
    phases = [
        Phase("masked", masked, None, 4),
        Phase("unmasked", tuning, None, 8, first_epoch=EPOCHS, first_step=12),
    ]
    assert steps_after(phases, epoch, position) == left


def test_tuning_starts_with_a_fresh_optimizer(tuned):
    def steps(epoch):
        return {int(state["step"]) for state in load(tuned, epoch)["optimizer"]["state"].values()}

    assert (steps(3), steps(4), steps(5)) == ({12}, {8}, {16})


TIMM = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
DROPPING = {
    "OpenCLIP's": MODEL,
    "timm's": {**MODEL, "vision_cfg": {**TIMM, "image_size": 32, "patch_size": 16}},
}


@pytest.mark.parametrize("name", DROPPING)
def test_unmasked_epochs_see_whole_images_after_patch_dropout(tmp_path, world, capsys, name):
    model = write_model(tmp_path, name="dropping", config=DROPPING[name])
    options = {"model": model, "train_data": world.train_data, "epochs": 1, "batch_size": 16}
    tuning = {"force_patch_dropout": 0.5, "unmasked_epochs": 1}
    folder = run(tmp_path, **options, **tuning)
    flops = [0, *(line["flops"] for line in train_lines(folder)[1::2])]
    dropped, whole = (after - before for before, after in pairwise(flops))
    plain = train_lines(run(tmp_path, name="plain", **options))[-1]["flops"]
    assert dropped < whole == pytest.approx(plain)
    # A run that goes on within them sees whole images, too.
    copied = shutil.copytree(folder, tmp_path / "logs" / "resumed")
    (copied / "checkpoints" / "epoch_2.pt").unlink()
    run(tmp_path, name="resumed", resume="latest", **options, **tuning)
    assert train_lines(copied)[-1]["flops"] == train_lines(folder)[-1]["flops"]
    expected, again = load(folder, 2)["state_dict"], load(copied, 2)["state_dict"]
    assert all(torch.equal(again[name], value) for name, value in expected.items())
    # What is said before counts them alike.
    assert main([*flags(tmp_path, **{**options, "name": "checked"}, **tuning), "--check-only"]) == 0
    said = capsys.readouterr().out
    assert "0.5 of all patches, all when unmasked" in said
    assert said.count(" per sample") == 2


@pytest.mark.parametrize("before", [{"skip_scheduler": True}, {"lr_scheduler": "const"}], ids=str)
def test_unmasked_epochs_have_their_schedule_whatever_came_before(tmp_path, world, before):
    tuning = {"unmasked_epochs": 1, "unmasked_lr": 1e-4, "unmasked_warmup": 2}
    folder = run(tmp_path, train_data=world.train_data, epochs=1, warmup=0, **before, **tuning)
    rates = [line["lr"] for line in train_lines(folder)]
    assert rates[:4] == pytest.approx([1e-3] * 4)
    assert rates[4:6] == pytest.approx([5e-5, 1e-4])
    assert rates[-1] < rates[-2] <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [1, 3, 4])
def test_a_run_resumed_in_either_phase_ends_bit_equal(tmp_path, tuned, tuned_options, epoch):
    copied = tmp_path / "logs" / "run"
    shutil.copytree(tuned, copied)
    for path in (copied / "checkpoints").glob("epoch_*.pt"):
        if int(path.stem.removeprefix("epoch_")) > epoch:
            path.unlink()
    run(tmp_path, resume="latest", **tuned_options)
    expected, again = load(tuned, 5), load(copied, 5)
    for name, value in expected["state_dict"].items():
        assert torch.equal(again["state_dict"][name], value), name
    assert again["clip_pgs"]["cost"]["flops"] == expected["clip_pgs"]["cost"]["flops"]
    assert [line["step"] for line in train_lines(copied)] == list(range(28))


def test_the_teacher_is_saved_while_there_is_one_and_never_exported(tuned):
    assert load(tuned, 2)["masking_state"]["teacher"]
    assert "masking_state" not in load(tuned, 4)
    names = load(tuned, 2)["state_dict"].keys()
    assert names == load(tuned, 5)["state_dict"].keys()
    assert not any("teacher" in name for name in names)


def test_the_model_card_tells_of_both_phases(tuned):
    card = (tuned / "export" / "README.md").read_text()
    assert "for 3 epochs with the masking `attentive`" in card
    assert "the masking `random` of its captions" in card
    assert "then for 2 without any, at a learning rate of up to 0.0001" in card
    assert "| of them to choose patches | " in card
    assert "| mask_ratio_end | 0.25 |" in card


@pytest.mark.slow
def test_a_calibrated_threshold_is_kept_and_carried_on(tmp_path, world):
    options = {"train_data": world.train_data, "masking": "cluster", "mask_ratio": 0.5}
    folder = run(tmp_path, name="whole", **options)
    (numbers,) = {str(load(folder, epoch)["masking_state"]["strategy"]) for epoch in (2,)}
    shutil.copytree(folder, tmp_path / "logs" / "resumed")
    (tmp_path / "logs" / "resumed" / "checkpoints" / "epoch_2.pt").unlink()
    resumed = run(tmp_path, name="resumed", resume="latest", **options)
    assert str(load(resumed, 2)["masking_state"]["strategy"]) == numbers
    again, expected = load(resumed, 2)["state_dict"], load(folder, 2)["state_dict"]
    assert all(torch.equal(again[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_a_caption_model_is_tuned_after_short_captions(tmp_path, world):
    model = write_model(tmp_path, name="captioner", config=COCA)
    options = {"text_tokens": 6, "masking": "random", "unmasked_epochs": 1, "epochs": 1}
    folder = run(tmp_path, model=model, train_data=world.train_data, **options)
    assert train_lines(folder)[-1]["caption_loss"] > 0


@pytest.mark.slow
def test_text_alone_can_be_masked_and_each_phases_last_epoch_is_kept(tmp_path, world):
    options = {"text_tokens": 4, "epochs": 2, "unmasked_epochs": 1, "save_frequency": 0}
    folder = run(tmp_path, train_data=world.train_data, **options)
    names = {path.name for path in (folder / "checkpoints").glob("*.pt")}
    assert names == {"epoch_2.pt", "epoch_3.pt"}
    flops = [0, *(line["flops"] for line in train_lines(folder)[3::4])]
    short, also_short, whole = (after - before for before, after in pairwise(flops))
    assert short == also_short < whole
    card = (folder / "export" / "README.md").read_text()
    assert "no masking of the image tower's patches and the masking `truncate`" in card
