"""What a checkpoint holds, who reads it, and how a run takes it up again."""

import os
import pickle
import re
import shutil
import subprocess
import sys

import pytest
import torch
from timm.optim import list_optimizers

from clip_pgs.checkpoint_reading import load_checkpoint
from clip_pgs.training.build import build_optimizer
from clip_pgs.training.checkpoint import (
    HostCopy,
    pack_checkpoint,
    restore,
    restore_optimizer,
    write_checkpoint,
)
from clip_pgs.training.options import parse_options
from support.resuming import differences
from support.runs import run, write_csv, write_model


def test_a_checkpoint_has_the_layout_of_open_clip(finished_run):
    loaded = torch.load(finished_run / "checkpoints" / "epoch_2.pt", weights_only=True)
    assert {"epoch", "name", "state_dict", "optimizer"} <= loaded.keys()
    assert (loaded["epoch"], loaded["name"]) == (2, "run")
    assert loaded["state_dict"]["visual.conv1.weight"].shape == (32, 3, 8, 8)


def test_a_record_says_what_the_run_did(finished_run):
    record = load_checkpoint(finished_run / "checkpoints" / "epoch_2.pt")["clip_pgs"]
    assert record["masking"] == "pgs"
    assert record["masking_options"] == {"mask_ratio": 0.5, "mask_ratio_min": 0.3}
    assert record["cost"]["steps"] == 8
    assert record["cost"]["samples"] == 64
    assert record["cost"]["flops"] > 0
    assert record["metrics"]["epoch"] == 2


def test_a_checkpoint_counts_epochs_steps_and_samples_of_the_epoch_under_way():
    content = pack_checkpoint(
        epoch=1, step=7, position=24, name="run", model=torch.nn.Linear(2, 1), record={}
    )
    assert (content["epoch"], content["step"], content["position"]) == (1, 7, 24)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_names_that_wrappers_left_are_made_plain(tmp_path, prefix):
    torch.save({"epoch": 1, "state_dict": {f"{prefix}weight": torch.ones(2)}}, tmp_path / "a.pt")
    assert list(load_checkpoint(tmp_path / "a.pt")["state_dict"]) == ["weight"]


# Where they are made, they look for a GPU or for a package of their own.
ELSEWHERE = ("bnb", "fused")


def steps(layer, optimizer, numbers):
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for parameter in layer.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        # Kron draws from the global stream.
        torch.manual_seed(number)
        optimizer.step()


@pytest.mark.filterwarnings("ignore")
def test_each_optimizer_that_a_run_may_name_goes_on_as_if_nothing_had_been(tmp_path, monkeypatch):
    # Kron compiles what it does to each shape.
    monkeypatch.setattr("timm.optim.kron.has_dynamo", False)
    names = [name for name in list_optimizers() if not name.startswith(ELSEWHERE)]
    names.remove("adahessian")
    others = []
    for name in names:
        argv = ["--model", "ViT-B-32", "--opt", f"timm/{name}", "--lr", "1e-2"]
        options = parse_options(argv)
        first = torch.nn.Linear(8, 8)
        used = build_optimizer(options, first)
        steps(first, used, range(3))
        content = pack_checkpoint(epoch=0, name="", model=first, record={}, optimizer=used)
        write_checkpoint(HostCopy().take(content), tmp_path / "step_3.pt")
        second = torch.nn.Linear(8, 8)
        restored = build_optimizer(options, second)
        checkpoint = load_checkpoint(tmp_path / "step_3.pt")
        restore(checkpoint, model=second)
        restore_optimizer(restored, checkpoint["optimizer"])
        steps(first, used, range(3, 6))
        steps(second, restored, range(3, 6))
        others += [] if torch.equal(first.weight, second.weight) else [name]
    assert len(names) > 50
    assert others == []


@pytest.mark.parametrize("state", [{}, None])
def test_a_loss_scaler_begins_anew_where_there_was_none(state):
    layer = torch.nn.Linear(1, 1)
    checkpoint = {"epoch": 1, "state_dict": layer.state_dict(), "scaler": state}
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    restore(checkpoint, model=layer, scaler=scaler)
    assert scaler.get_scale() == 8.0


def test_a_loss_scaler_takes_its_scale_and_not_how_it_grows():
    layer, now = torch.nn.Linear(1, 1), torch.amp.GradScaler("cpu").state_dict()
    scaler = torch.amp.GradScaler("cpu")
    saved = {**now, "scale": 4.0, "_growth_tracker": 3, "growth_factor": -1.0}
    restore(
        {"epoch": 1, "state_dict": layer.state_dict(), "scaler": saved}, model=layer, scaler=scaler
    )
    assert scaler.state_dict() == {**now, "scale": 4.0, "_growth_tracker": 3}


class MakesFile:
    def __init__(self, path):
        self._command = f"touch {path}"

    def __reduce__(self):
        return (os.system, (self._command,))


@pytest.mark.parametrize("place", ["state_dict", "optimizer", "clip_pgs"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_with_code_in_it_is_refused_in_a_sentence_and_not_run(tmp_path, place, is_zip):
    harm = MakesFile(tmp_path / "harmed")
    content = {"epoch": 1, "state_dict": {"weight": torch.ones(2)}, place: {"weight": harm}}
    path = tmp_path / "code.pt"
    torch.save(content, path, pickle_module=pickle, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match=r"code\.pt' cannot be read: .*") as refused:
        load_checkpoint(path)
    assert str(refused.value).endswith(
        "it holds posix.system, which is no tensor or plain type; nothing in it was run"
    )
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"state_dict": {}}, {"state_dict": {"a": 1}}])
def test_a_file_without_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt' cannot be read: it holds no state dict"):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("count", [-1, 1.5, "1", None])
def test_a_count_that_is_none_is_refused(tmp_path, count):
    torch.save({"epoch": count, "state_dict": {"a": torch.ones(1)}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=f"its epoch is {count!r}"):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(100), b"\x80\x02]"])
def test_a_file_that_is_no_checkpoint_is_refused_in_a_sentence(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"^checkpoint '.*a\.pt' cannot be read: [^\n]*$"):
        load_checkpoint(tmp_path / "a.pt")


def test_any_damaged_byte_is_noticed(tmp_path):
    path = tmp_path / "epoch_1.pt"
    write_checkpoint({"epoch": 1, "state_dict": {"weight": torch.arange(50.0)}}, path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 23):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"epoch_1\.pt'"):
            load_checkpoint(path)


def test_damage_to_a_file_of_open_clip_is_noticed_without_a_list_of_checksums(tmp_path):
    path = tmp_path / "epoch_1.pt"
    torch.save({"epoch": 1, "state_dict": {"weight": torch.full((50,), 3.0)}}, path)
    whole = path.read_bytes()
    place = whole.index(torch.full((4,), 3.0).numpy().tobytes())
    path.write_bytes(whole[:place] + b"\1" + whole[place + 1 :])
    with pytest.raises(ValueError, match=r"epoch_1\.pt' is damaged"):
        load_checkpoint(path)


def test_weights_of_another_model_are_refused_by_name():
    model = torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"weight has shape \(1, 3\) in the file, \(1, 2\)"):
        restore({"state_dict": torch.nn.Linear(3, 1).state_dict()}, model=model)
    with pytest.raises(ValueError, match="only the model has bias"):
        restore({"state_dict": torch.nn.Linear(2, 1, bias=False).state_dict()}, model=model)


def test_a_checkpoint_of_open_clip_under_ddp_continues_here(tmp_path, world, finished_run):
    ours = torch.load(finished_run / "checkpoints" / "epoch_1.pt", weights_only=True)
    theirs = {name: ours[name] for name in ("epoch", "name", "optimizer")}
    theirs["state_dict"] = {f"module.{name}": t for name, t in ours["state_dict"].items()}
    torch.save(theirs, tmp_path / "theirs.pt")
    folder = run(tmp_path, train_data=world.train_data, resume=tmp_path / "theirs.pt")
    files = sorted((folder / "checkpoints").glob("*.pt"))
    assert [path.name for path in files] == ["epoch_1.pt", "epoch_2.pt"]
    assert differences(torch.load(files[0], weights_only=True), {**ours, "step": 4}) == []
    # Nobody measured what theirs cost, but its samples are as many as its steps say.
    done = (folder / "out.log").read_text().partition("Done: ")[2].partition("\n")[0]
    assert re.fullmatch(
        r"8 steps, 64 samples, \S+ FLOPs in \S+, both without the first 4 steps", done
    )
    card = (folder / "export" / "README.md").read_text()
    assert "| samples seen | 64 |" in card
    for name in ("floating-point operations", "wall time"):
        assert re.search(rf"\| {name} \| [\w.+:]+, without the first 4 steps \|", card)


def test_samples_before_a_checkpoint_of_open_clip_are_those_of_their_phase(
    tmp_path, world, finished_run
):
    ours = torch.load(finished_run / "checkpoints" / "epoch_2.pt", weights_only=True)
    theirs = {name: ours[name] for name in ("epoch", "name", "state_dict", "optimizer")}
    torch.save(theirs, tmp_path / "a.pt")
    # Four steps of 8 samples, sixteen of 2, and the one epoch that is left.
    options = {"epochs": 1, "unmasked_epochs": 2, "unmasked_batch_size": 2, "masking": "random"}
    folder = run(tmp_path, train_data=world.train_data, resume=tmp_path / "a.pt", **options)
    assert "Done: 36 steps, 96 samples" in (folder / "out.log").read_text()


@pytest.mark.slow
def test_the_trainer_of_open_clip_continues_our_run_and_we_read_what_it_saves(
    tmp_path, finished_run
):
    path = finished_run / "checkpoints" / "epoch_1.pt"
    table = write_csv(tmp_path / "csv", num_samples=8)
    options = (
        f"--model tiny --train-data {table} --dataset-type csv --epochs 2 --batch-size 8 "
        f"--workers 0 --logs {tmp_path} --name theirs --device cpu --resume {path}"
    )
    program = (
        "import open_clip, open_clip_train.main as trainer; "
        f"open_clip.add_model_config({str(write_model(tmp_path))!r}); "
        f"trainer.main({options.split()!r})"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    saved = load_checkpoint(tmp_path / "theirs" / "checkpoints" / "epoch_2.pt")
    ours = load_checkpoint(path)
    assert saved["epoch"] == 2
    assert saved["state_dict"].keys() == ours["state_dict"].keys()
    # One step more than the four of our epoch: the moments went on, too.
    steps = {float(state["step"]) for state in saved["optimizer"]["state"].values()}
    assert steps == {5.0}


def test_a_resumed_run_ends_bit_equal_to_an_unbroken_one(tmp_path, finished_run, finished_options):
    copied = tmp_path / "logs" / "run"
    shutil.copytree(finished_run, copied)
    (copied / "checkpoints" / "epoch_2.pt").unlink()
    run(tmp_path, resume="latest", **finished_options)
    expected, again = (
        torch.load(folder / "checkpoints" / "epoch_2.pt", weights_only=True)
        for folder in (finished_run, copied)
    )
    for name, value in expected["state_dict"].items():
        assert torch.equal(again["state_dict"][name], value), name
    for number, state in expected["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(again["optimizer"]["state"][number][key], value), (number, key)
