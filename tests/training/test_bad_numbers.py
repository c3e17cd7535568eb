"""Losses and gradients that are not finite: what a run does about them."""

import json
import shutil
from time import sleep

import pytest
import torch

from clip_pgs.training.step import update_weights
from clip_pgs.training.stop import BadNumbersError
from clip_pgs.training.trainer import PhaseTrainer
from support.models import small_clip
from support.resuming import last_checkpoint
from support.runs import MODEL, run, write_model

_next_batches = PhaseTrainer.next_batches


@pytest.fixture
def spoil(monkeypatch):
    """Return a function that makes the images of these steps NaN."""

    def spoil_steps(steps):
        count = iter(range(10_000))

        def next_batches(self):
            batches, seconds = _next_batches(self)
            if next(count) in steps:
                batches = [(images * torch.nan, texts) for images, texts in batches]
            return batches, seconds

        monkeypatch.setattr(PhaseTrainer, "next_batches", next_batches)

    return spoil_steps


def train_lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("opt", ["adamw", pytest.param("timm/lamb", marks=pytest.mark.slow)])
@pytest.mark.parametrize("accum_freq", [1, 2])
def test_a_bad_step_is_skipped_and_counted(tmp_path, world, spoil, opt, accum_freq):
    spoil({1, 2})
    options = {"batch_size": 8 // accum_freq, "accum_freq": accum_freq, "opt": opt}
    folder = run(tmp_path, train_data=world.train_data, epochs=1, **options)
    checkpoint = last_checkpoint(folder)
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    assert checkpoint["clip_pgs"]["cost"]["skipped_steps"] == 2
    assert [line["skipped_steps"] for line in train_lines(folder)] == [0, 1, 2, 2]
    if opt == "adamw":
        taken = {int(state["step"]) for state in checkpoint["optimizer"]["state"].values()}
        assert taken == {2}


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"masking": "random", "accum_freq": 2}, marks=pytest.mark.slow)]
)
def test_a_bad_step_leaves_the_statistics_of_batch_norm_alone(tmp_path, world, spoil, options):
    spoil({1, 2})
    resnet = {"image_size": 64, "layers": [1] * 4, "width": 8}
    model = write_model(tmp_path, config={**MODEL, "vision_cfg": resnet})
    options = {"model": model, "batch_size": 8 // options.get("accum_freq", 1), **options}
    folder = run(tmp_path, train_data=world.train_data, epochs=1, **options)
    assert (folder / "export").exists()
    weights = last_checkpoint(folder)["state_dict"]
    assert all(value.isfinite().all() for value in weights.values())
    # Accumulation runs each of two micro-batches twice.
    passes = 2 * (4 if "accum_freq" in options else 1)
    counted = {int(n) for name, n in weights.items() if name.endswith("num_batches_tracked")}
    assert counted == {passes}


def test_the_mean_of_a_window_leaves_bad_steps_out(tmp_path, world, spoil):
    spoil({1})
    folder = run(tmp_path, train_data=world.train_data, epochs=1, log_every_n_steps=4)
    assert all(line["loss"] < 10 for line in train_lines(folder))


def test_too_many_in_a_row_end_the_run_and_leave_the_last_good_checkpoint(tmp_path, world, spoil):
    spoil(range(3, 100))
    options = {"max_bad_steps": 3, "save_every_steps": 2, "epochs": 4}
    with pytest.raises(BadNumbersError, match="not finite in 3 steps in a row"):
        run(tmp_path, train_data=world.train_data, **options)
    folder = tmp_path / "logs" / "run"
    checkpoint = last_checkpoint(folder)
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    assert json.loads((folder / "exit.json").read_text())["code"] == 1


def test_a_run_without_a_single_good_step_is_no_success(tmp_path, world, spoil):
    spoil(range(100))
    with pytest.raises(BadNumbersError, match="not finite in any of the 4 steps"):
        run(tmp_path, train_data=world.train_data, epochs=1)
    assert not (tmp_path / "logs" / "run" / "export").exists()


@pytest.mark.parametrize(
    ("last", "way_back"),
    [
        ("saved", "--resume latest trains again from step_2.pt on"),
        ("none", "--resume latest trains again from the beginning"),
        ("removed", "no checkpoint is left to go on from"),
    ],
)
def test_a_last_step_that_breaks_the_weights_says_what_a_resume_would_do(
    tmp_path, world, monkeypatch, last, way_back
):
    folder = tmp_path / "logs" / "run"
    train_step = PhaseTrainer.train_step

    def break_weights(self, batches):
        result = train_step(self, batches)
        if self.steps_left == 0:
            self.model.logit_scale.data.fill_(torch.nan)
            if last == "removed":
                while not (folder / "checkpoints" / "latest").exists():
                    sleep(0.01)
                shutil.rmtree(folder / "checkpoints")
        return result

    monkeypatch.setattr(PhaseTrainer, "train_step", break_weights)
    options = {} if last == "none" else {"save_every_steps": 2}
    with pytest.raises(BadNumbersError) as ended:
        run(tmp_path, train_data=world.train_data, epochs=1, **options)
    said = "no model is exported: state_dict/logit_scale holds 1 NaN or infinite values of 1; "
    assert str(ended.value) == said + way_back
    assert not (folder / "export").exists()


@pytest.mark.parametrize("is_fused", [True, False])
def test_gradients_that_are_not_finite_change_no_weight_and_no_moment(is_fused):
    model = small_clip()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=is_fused)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    _, first = update_weights(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(model.parameters()).grad.view(-1)[0] = torch.inf
    _, second = update_weights(model, optimizer)
    assert (first.item(), second.item()) == (0.0, 1.0)
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert optimizer.state[parameter]["step"] == 1
