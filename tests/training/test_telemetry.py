"""What a run measures of itself, and where it goes."""

import io
import json
import os
import re
import sys
from operator import methodcaller
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clip_pgs.figure import GAP, MARGIN
from clip_pgs.integrations.open_clip.flops import SampleFlops
from clip_pgs.training.checkpoint import Cost
from clip_pgs.training.checks import check_options
from clip_pgs.training.loggers import JsonLines, MetricLoggers
from clip_pgs.training.options import parse_options
from clip_pgs.training.step import StepResult
from clip_pgs.training.telemetry import Telemetry, WindowMeter
from support.runs import flags, run

OPEN_CLIP_TAGS = {
    "train/loss",
    "train/contrastive_loss",
    "train/lr",
    "train/scale",
    "train/data_time",
    "train/batch_time",
    "train/samples_per_second",
    "train/samples_per_second_per_gpu",
    "val/clip_val_loss",
    "val/image_to_text_R@1",
    "val/image_to_text_R@5",
    "val/image_to_text_R@10",
    "val/image_to_text_mean_rank",
    "val/text_to_image_median_rank",
    "val/num_samples",
    "val/epoch",
}
OWN_TAGS = {
    "train/data_wait_share",
    "train/mask_ratio_mean",
    "train/mask_ratio_min",
    "train/mask_ratio_max",
    "train/tokens_kept",
    "train/samples",
    "train/flops",
    "train/grad_norm",
    "train/skipped_samples",
    "train/skipped_steps",
    "val_by_samples/clip_val_loss",
    "val_by_gflops/clip_val_loss",
}


@pytest.fixture(scope="module")
def events(finished_run):
    accumulator = EventAccumulator(str(finished_run / "tensorboard"))
    accumulator.Reload()
    return accumulator


def entries(finished_run, kind):
    lines = (finished_run / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


def test_tensorboard_has_the_tags_of_open_clip_and_ours(events):
    assert set(events.Tags()["scalars"]) >= OPEN_CLIP_TAGS | OWN_TAGS
    assert events.Tags()["images"] == ["masks"]


def test_validation_is_drawn_against_epochs_and_samples(events):
    by_epoch = [point.step for point in events.Scalars("val/clip_val_loss")]
    by_samples = [point.step for point in events.Scalars("val_by_samples/clip_val_loss")]
    assert (by_epoch, by_samples) == ([1, 2], [32, 64])


def test_curves_against_samples_and_operations_outlive_a_resume(tmp_path):
    options = SimpleNamespace(report_targets=["tensorboard"], batch_size=8)
    for first_step, epochs in ((0, (1, 2)), (8, (3,))):
        loggers = MetricLoggers(options, tmp_path, first_step=first_step)
        for epoch in epochs:
            cost = {"steps": 4 * epoch, "samples": 32 * epoch, "flops": 9e18 * epoch, "seconds": 1}
            values = {"loss": float(epoch), "epoch": epoch}
            told = {"epoch": epoch, "cost": cost, "data": {}}
            loggers.each(methodcaller("validation", values, **told))
        loggers.each(methodcaller("close"))
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"kind": "val", "step": 7, "samples": 1e300, "flops": 1, "seconds": 1}\n')
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    drawn = {
        tag: [(point.step, point.value) for point in events.Scalars(f"{tag}/loss")]
        for tag in ("val", "val_by_samples", "val_by_gflops")
    }
    tags = set(events.Tags()["scalars"])
    assert tags.isdisjoint({"val_by_samples/epoch", "val_by_samples/batch_size"})
    assert drawn == {
        "val": [(1, 1), (2, 2), (3, 3)],
        "val_by_samples": [(32, 1), (64, 2), (96, 3)],
        "val_by_gflops": [(9 * 10**9, 1), (18 * 10**9, 2), (27 * 10**9, 3)],
    }


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """Weights & Biases itself, without a login, in a folder of its own."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name, folder in (("HOME", "home"), ("WANDB_DIR", "curves")):
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(name, str(tmp_path / folder))
    import wandb

    yield wandb
    wandb.teardown()


@pytest.mark.slow
def test_weights_and_biases_gets_curves_masks_and_tables(tmp_path, world, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = {"train_data": world.train_data, "val_data": world.val_data, "masking": "pgs"}
    # No id of theirs holds a "#", and brackets are a pattern's.
    folder = run(tmp_path, report_to="wandb", name="lr #[1]", **options)
    assert not (folder / "tensorboard").exists()
    (stored,) = (tmp_path / "curves" / "wandb").glob("offline-run-*")
    (curves,) = stored.glob("*.wandb")
    for name in ("train/loss", "val/clip_val_loss", "lr #[1]"):
        assert name.encode() in curves.read_bytes()
    assert list(stored.glob("files/**/params.txt"))
    # It takes no row of an earlier step than the last, and says so.
    assert "ignoring" not in (stored / "logs" / "debug-internal.log").read_text()
    assert {path.name[:8] for path in stored.glob("files/media/images/*.png")} == {
        "masks_0_",
        "masks_3_",
        "masks_7_",
    }
    tables = [json.loads(path.read_text()) for path in stored.glob("files/media/table/*.json")]
    assert all(table["columns"] == ["measurement", "value"] for table in tables)
    losses = {dict(table["data"])["clip_val_loss"] for table in tables}
    assert losses == {entry["clip_val_loss"] for entry in entries(folder, "val")}


def test_runs_of_one_name_are_two_and_a_resumed_one_is_one(tmp_path, wandb, monkeypatch):
    asked = []
    monkeypatch.setattr(wandb, "init", lambda **options: asked.append(options))
    monkeypatch.setattr(wandb, "save", lambda path, base_path: None)
    options = parse_options(flags(tmp_path, report_to="wandb", train_data="x"))
    for arm in ("plain", "pgs", "pgs"):
        (tmp_path / arm).mkdir(exist_ok=True)
        MetricLoggers(options, tmp_path / arm, first_step=0)
    ids = [said["id"] for said in asked]
    assert ids[0] != ids[1] == ids[2]
    assert [said["resume"] for said in asked] == [None, None, "allow"]


def test_without_a_login_a_new_run_is_refused_and_a_resumed_one_goes_on(tmp_path, wandb, caplog):
    argv = flags(tmp_path, report_to="wandb", dataset_type="synthetic", train_num_samples=64)
    with pytest.raises(ValueError, match=r"--report-to wandb .* WANDB_MODE=offline"):
        check_options(parse_options(argv))
    assert not (tmp_path / "logs").exists()
    loggers = MetricLoggers(parse_options(argv), tmp_path, first_step=0)
    loggers.each(methodcaller("train", {"loss": 1.0}, epoch=0, step=0))
    assert "wandb cannot be written: No API key" in caplog.text
    assert len(entries(tmp_path, "train")) == 1


@pytest.mark.parametrize("name", ["a/b:c", "a#b", "100%", "x" * 129])
@pytest.mark.parametrize("resume", [[], ["--resume", "latest", "--name", "here"]])
def test_a_project_that_wandb_does_not_take_is_refused(tmp_path, wandb, monkeypatch, name, resume):
    monkeypatch.setenv("WANDB_MODE", "offline")
    argv = flags(tmp_path, report_to="wandb", dataset_type="synthetic", train_num_samples=64)
    with pytest.raises(ValueError, match=r"--wandb-project-name: .*name '"):
        check_options(parse_options([*argv, "--wandb-project-name", name, *resume]))
    assert not (tmp_path / "logs").exists()


def test_a_resumed_run_goes_on_where_wandb_does_not_take_its_environment(
    tmp_path, wandb, monkeypatch, caplog
):
    monkeypatch.setenv("WANDB_RESUME", "perhaps")
    options = parse_options(flags(tmp_path, report_to="wandb", train_data="x", resume="latest"))
    MetricLoggers(options, tmp_path, first_step=0)
    assert "wandb cannot be written: 1 validation error" in caplog.text


def test_metrics_file_counts_samples_and_flops(finished_run):
    train = entries(finished_run, "train")
    assert [entry["samples"] for entry in train] == [8, 16, 24, 32, 40, 48, 56, 64]
    per_sample = {round(entry["flops"] / entry["samples"]) for entry in train}
    assert len(per_sample) == 1
    assert per_sample.pop() > 1e6


def test_metrics_file_tells_the_seconds_since_the_run_began(finished_run):
    everything = [*entries(finished_run, "train"), *entries(finished_run, "val")]
    everything.sort(key=lambda entry: (entry["step"], entry["kind"]))
    seconds = [entry["seconds"] for entry in everything]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


def test_mask_ratios_are_within_the_bounds_of_the_options(finished_run):
    for entry in entries(finished_run, "train"):
        # 16 patches: floor(0.3 * 16) = 4 and 8 masked at least and at most.
        assert 0.25 <= entry["mask_ratio_min"] <= entry["mask_ratio_mean"]
        assert entry["mask_ratio_mean"] <= entry["mask_ratio_max"] <= 0.5
        assert entry["tokens_kept"] == pytest.approx(16 * (1 - entry["mask_ratio_mean"]))


def test_results_are_appended_as_open_clip_does(finished_run):
    lines = (finished_run / "checkpoints" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]


def test_log_has_plain_lines_and_says_where_everything_lies(finished_run):
    text = (finished_run / "out.log").read_text()
    assert "\r" not in text
    line = r"INFO \| Epoch 2/2 100%  loss \d\.\d+  lr \S+  mask 0\.\d\d.* img/s  wait \d+%  0s left"
    assert re.search(f"{line}\n", text)
    assert f"local-dir:{finished_run / 'export'}" in text.splitlines()[-1]
    assert "8 steps, 64 samples" in text


def test_a_training_line_fits_120_columns_and_names_a_loss_once(caplog):
    caplog.set_level("INFO")
    telemetry = Telemetry(
        SimpleNamespace(
            rank=0,
            world_size=1,
            log_every_n_steps=1,
            max_bad_steps=9,
            epochs=32,
            unmasked_epochs=0,
        ),
        MetricLoggers(None, None, first_step=0),
        Cost(),
        device=torch.device("cpu"),
        steps_left=10**9,
    )
    telemetry.report_flops(SampleFlops(total=1e9))
    telemetry.start_phase(num_patches=196, samples_per_step=4096)
    model = SimpleNamespace(logit_scale=torch.zeros(()), logit_bias=None)
    for step in range(1, 4):
        loss = torch.tensor(12.345678)
        kept = [torch.tensor([98, 137])]
        telemetry.step(
            StepResult(
                {"contrastive_loss": loss, "loss": loss},
                grad_norm=torch.tensor(1.0),
                kept_counts=kept,
                is_bad=torch.tensor(0.0),
                lr=2.123e-09,
            ),
            model=model,
            epoch=11,
            done=step * 4096,
            steps_left=2678 - step,
            data_seconds=0.0,
        )
    *_, last = [record.getMessage() for record in caplog.records]
    assert last.startswith("Epoch 12/32   0%  loss 12.35  lr 2.1e-09  mask 0.30-0.50  ")
    assert last.endswith(" left")
    assert len("2026-11-28,15:57:46 | INFO | " + last) <= 120
    assert last.count("loss") == 1


def test_a_run_says_nothing_as_a_warning_where_nothing_is_wrong(finished_run):
    text = (finished_run / "out.log").read_text()
    assert "WARNING" not in text
    assert text.count("Saved epoch_") == 2


def test_environment_names_versions_device_and_command(finished_run):
    environment = json.loads((finished_run / "env.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["world_size"] == 1
    assert {"clip_pgs", "open_clip_torch", "command", "device", "date", "git_commit"} <= set(
        environment
    )


def test_mask_pictures_show_images_above_what_is_kept(finished_run):
    picture = Image.open(finished_run / "masks" / "epoch_2.png")
    # Four images of a micro-batch, 32 pixels each, enlarged sevenfold.
    assert picture.width == 2 * MARGIN + 4 * 224 + 3 * GAP
    assert picture.height > 2 * 224


def test_meter_averages_losses_and_takes_the_extremes_of_masks():
    meter = WindowMeter(num_patches=10, samples_per_step=4)
    for loss, kept in ((1.0, [5, 7]), (3.0, [6, 9])):
        facts = {"grad_norm": torch.tensor(1.0), "is_bad": torch.tensor(0.0), "lr": 0.1}
        losses = {"loss": torch.tensor(loss)}
        result = StepResult(losses, kept_counts=[torch.tensor(kept)], **facts)
        meter.add(result, data_seconds=0.0)
    values = meter.read(world_size=2)
    assert values["loss"] == 2.0
    assert values["tokens_kept"] == 6.75
    assert values["mask_ratio_mean"] == pytest.approx(0.325)
    assert (values["mask_ratio_min"], values["mask_ratio_max"]) == pytest.approx((0.1, 0.5))
    assert values["samples_per_second_per_gpu"] == values["samples_per_second"] / 2


def test_half_a_line_of_a_killed_run_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 3}\n{"kind": "train", "step": 4}\n{"kind": "tr')
    JsonLines(path, first_step=4, batch_size=8)
    assert path.read_text() == '{"kind": "train", "step": 3}\n'


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "is_shown"), [(Terminal(), True), (io.StringIO(), False)])
def test_a_progress_bar_is_for_terminals_alone(monkeypatch, stream, is_shown):
    monkeypatch.setattr(sys, "stderr", stream)
    telemetry = Telemetry(
        SimpleNamespace(rank=0, world_size=1, log_every_n_steps=99, max_bad_steps=9),
        MetricLoggers(None, None, first_step=0),
        # With another batch size since: not as many as one size alone would take.
        Cost(steps=5),
        device=torch.device("cpu"),
        steps_left=2,
    )
    telemetry.close()
    assert ("5/7" in stream.getvalue()) == is_shown
