import json
import logging
from functools import partial

import open_clip
import pytest
import torch

from support.runs import COCA, run, write_csv, write_model

LOCKED_TEXT = {"lock_text": True, "lock_text_freeze_layer_norm": True}


def weights(folder, *, epoch=1):
    checkpoint = torch.load(folder / "checkpoints" / f"epoch_{epoch}.pt", weights_only=True)
    return checkpoint["state_dict"]


def metrics(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


def are_equal(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_bit_for_bit(tmp_path, world):
    options = {"train_data": world.train_data, "epochs": 1, "masking": "random", "workers": 1}
    first = run(tmp_path, name="first", **options)
    again = run(tmp_path, name="again", **options)
    other = run(tmp_path, name="other", seed=1, **options)
    assert are_equal(weights(first), weights(again))
    assert not are_equal(weights(first), weights(other))


def test_a_run_leaves_what_its_folder_promises(finished_run):
    found = {path.name for path in finished_run.iterdir()}
    assert {"out.log", "params.txt", "env.json", "checkpoints", "tensorboard"} <= found
    assert {"masks", "export", "metrics.jsonl"} <= found
    assert "masking: pgs\n" in (finished_run / "params.txt").read_text()
    options = json.loads((finished_run / "options.json").read_text())
    assert len(options["train_files"]) == len(options["train_indexes"]) > 0
    assert all(options["train_indexes"])
    masks = {path.name for path in (finished_run / "masks").glob("*.png")}
    assert masks == {"epoch_0.png", "epoch_1.png", "epoch_2.png"}


@pytest.mark.slow
def test_training_learns(tmp_path, world):
    folder = run(tmp_path, train_data=world.train_data, epochs=8, masking="pgs", seed=2)
    losses = [entry["loss"] for entry in metrics(folder, "train")]
    assert sum(losses[-4:]) < 0.85 * sum(losses[:4])


def test_resume_latest_on_a_new_name_starts_fresh(tmp_path, world):
    folder = run(tmp_path, train_data=world.train_data, epochs=1, resume="latest")
    assert [entry["step"] for entry in metrics(folder, "train")] == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_resumed_run_repeats_no_line_of_its_curves(tmp_path, world):
    options = {"train_data": world.train_data, "save_most_recent": True}
    folder = run(tmp_path, **options)
    (folder / "checkpoints" / "epoch_latest.pt").unlink()
    (folder / "checkpoints" / "epoch_2.pt").unlink()
    run(tmp_path, resume="latest", **options)
    assert [entry["step"] for entry in metrics(folder, "train")] == list(range(8))
    assert metrics(folder, "train")[-1]["samples"] == 64
    assert len(json.loads((folder / "env.json").read_text())["earlier_launches"]) == 1


def test_logs_none_writes_nothing(tmp_path, world, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    folder = run(
        tmp_path, train_data=world.train_data, val_data=world.val_data, epochs=1, logs="none"
    )
    assert folder is None
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_the_run_writes_into_a_folder_of_its_own_name(tmp_path, world):
    folder = run(tmp_path, name=None, train_data=world.train_data, epochs=1)
    assert folder.parent == tmp_path / "logs"
    assert "model_tiny-lr_0.001-b_8" in folder.name


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"siglip": True, "masking": "pgs"}, id="siglip"),
        pytest.param({"grad_checkpointing": True, "masking": "random"}, id="grad-checkpointing"),
        pytest.param(
            {"precision": "amp_bf16", "masking": "pgs", "grad_clip_norm": 1.0}, id="bf16-clipping"
        ),
        pytest.param({"opt": "timm/lamb", "lr_scheduler": "const"}, id="timm-constant-rate"),
        pytest.param({"lock_image": True, "save_frequency": 0}, id="locked-image-tower"),
        pytest.param(
            {"lr_scheduler": "const-cooldown", "epochs_cooldown": 1, **LOCKED_TEXT},
            id="cooldown-locked-text-tower",
        ),
    ],
)
def test_a_variant_trains_to_its_end(tmp_path, world, options):
    folder = run(tmp_path, train_data=world.train_data, epochs=1, **options)
    assert all(value.isfinite().all() for value in weights(folder).values())
    assert (folder / "export" / "open_clip_model.safetensors").exists()


@pytest.mark.slow
def test_coca_trains_with_both_losses(tmp_path, world):
    model = write_model(tmp_path, name="captioner", config=COCA)
    options = {"masking": "pgs", "mask_ratio_min": 0.2, "val_data": world.val_data}
    folder = run(tmp_path, model=model, train_data=world.train_data, epochs=1, **options)
    entry = metrics(folder, "train")[-1]
    assert entry["caption_loss"] + entry["contrastive_loss"] == pytest.approx(entry["loss"])
    assert "val_generative_loss" in metrics(folder, "val")[-1]


def test_siglip_changes_nothing_of_a_coca(tmp_path, world):
    model = write_model(tmp_path, name="captioner", config=COCA)
    options = {"model": model, "train_data": world.train_data, "epochs": 1, "batch_size": 16}
    plain, siglip = (run(tmp_path, name=f"{on}", siglip=on, **options) for on in (False, True))
    losses = [[entry["loss"] for entry in metrics(each, "train")] for each in (plain, siglip)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_compiled_training_saves_plain_names(tmp_path, world, monkeypatch):
    # A backend that makes code takes a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    options = {"masking": "random", "torchcompile": True, "batch_size": 32}
    folder = run(tmp_path, train_data=world.train_data, epochs=1, **options)
    assert "visual.conv1.weight" in weights(folder)


def test_csv_trains(tmp_path):
    table = write_csv(tmp_path / "pairs")
    folder = run(tmp_path, train_data=table, val_data=table, epochs=1)
    assert [entry["step"] for entry in metrics(folder, "train")] == [0, 1]
    assert metrics(folder, "val")[0]["num_samples"] == 16


def test_synthetic_data_trains(tmp_path):
    folder = run(
        tmp_path, dataset_type="synthetic", train_num_samples=24, epochs=1, masking="random"
    )
    assert metrics(folder, "train")[-1]["samples"] == 24


def test_a_published_checkpoint_is_tuned_with_masks(tmp_path, world, finished_run):
    start = finished_run / "checkpoints" / "epoch_2.pt"
    options = {"pretrained": start, "masking": "random", "mask_ratio": 0.25, "lr": 1e-9}
    folder = run(tmp_path, train_data=world.train_data, epochs=1, **options)
    # A rate of nearly nothing keeps the weights where they came from.
    before = weights(finished_run, epoch=2)
    for name, value in weights(folder).items():
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=0)
    assert metrics(folder, "train")[0]["mask_ratio_mean"] == 0.25


def test_evaluation_alone_measures_the_resumed_weights(tmp_path, world, finished_run):
    folder = run(
        tmp_path,
        val_data=world.val_data,
        batch_size=4,
        resume=finished_run / "checkpoints" / "epoch_2.pt",
        report_to="tensorboard",
    )
    (measured,) = metrics(folder, "val")
    expected = metrics(finished_run, "val")[-1]
    assert measured["clip_val_loss"] == pytest.approx(expected["clip_val_loss"])
    assert measured["samples"] == 64
    assert not (folder / "export").exists()
    assert list((folder / "checkpoints").glob("*.pt")) == []


def test_an_evaluation_of_ones_own_joins_the_curves(tmp_path, world):
    seen = []

    def evaluate(*, model, transform, tokenize, epoch, record):
        seen.append((epoch, model.training))
        return {"own_accuracy": 0.25}

    options = {"train_data": world.train_data, "epochs": 3, "eval_every": 2}
    folder = run(tmp_path, evaluate=evaluate, **options)
    # The end is always due.
    assert seen == [(2, False), (3, False)]
    assert [entry["own_accuracy"] for entry in metrics(folder, "val")] == [0.25, 0.25]
    assert "own_accuracy" in (folder / "export" / "README.md").read_text()


def test_logging_is_as_it_was_after_a_run(finished_run):
    assert finished_run.exists()
    files = [h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)]
    assert not any("out.log" in handler.baseFilename for handler in files)


def test_a_saved_model_opens_in_plain_open_clip(finished_run):
    model = open_clip.create_model("tiny", pretrained=str(finished_run / "checkpoints/epoch_2.pt"))
    assert torch.equal(
        model.state_dict()["logit_scale"], weights(finished_run, epoch=2)["logit_scale"]
    )
