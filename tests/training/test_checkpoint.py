import pickle
import shutil

import pytest
import torch

from clip_pgs.training.checkpoint import find_latest, load_checkpoint, save_checkpoint
from support.runs import run


def checkpoint(epoch):
    return {"epoch": epoch, "name": "run", "state_dict": {"weight": torch.ones(2)}}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


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


def test_files_asked_for_are_written_and_no_other(tmp_path):
    for epoch in (1, 2, 3):
        save_checkpoint(
            checkpoint(epoch),
            tmp_path,
            is_numbered=epoch != 2,
            is_latest=True,
        )
    assert names(tmp_path) == ["epoch_1.pt", "epoch_3.pt", "epoch_latest.pt"]


def test_the_previous_checkpoint_is_deleted_once_the_next_is_there(tmp_path):
    for epoch in (2, 4):
        save_checkpoint(checkpoint(epoch), tmp_path, delete_previous=True)
    save_checkpoint(checkpoint(5), tmp_path, is_numbered=False, delete_previous=True)
    assert names(tmp_path) == ["epoch_4.pt"]


def test_the_latest_is_the_one_with_most_epochs(tmp_path):
    assert find_latest(tmp_path) is None
    for epoch in (2, 10):
        save_checkpoint(checkpoint(epoch), tmp_path)
    assert find_latest(tmp_path).name == "epoch_10.pt"
    save_checkpoint(checkpoint(11), tmp_path, is_numbered=False, is_latest=True)
    assert find_latest(tmp_path).name == "epoch_latest.pt"


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_names_that_wrappers_left_are_made_plain(tmp_path, prefix):
    torch.save({"epoch": 1, "state_dict": {f"{prefix}weight": torch.ones(2)}}, tmp_path / "a.pt")
    assert list(load_checkpoint(tmp_path / "a.pt")["state_dict"]) == ["weight"]


class RunsCode:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_file_with_code_in_it_is_refused(tmp_path, capsys):
    torch.save({"state_dict": RunsCode()}, tmp_path / "code.pt", pickle_module=pickle)
    with pytest.raises(ValueError, match=r"code\.pt' cannot be read"):
        load_checkpoint(tmp_path / "code.pt")
    assert "code ran" not in capsys.readouterr().out


def test_half_a_file_is_refused_by_name(tmp_path):
    save_checkpoint(checkpoint(1), tmp_path)
    path = tmp_path / "epoch_1.pt"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"epoch_1\.pt' cannot be read"):
        load_checkpoint(path)


def test_a_checkpoint_of_open_clip_under_ddp_continues_here(tmp_path, world, finished_run):
    ours = torch.load(finished_run / "checkpoints" / "epoch_1.pt", weights_only=True)
    theirs = {name: ours[name] for name in ("epoch", "name", "optimizer")}
    theirs["state_dict"] = {f"module.{name}": t for name, t in ours["state_dict"].items()}
    torch.save(theirs, tmp_path / "theirs.pt")
    folder = run(tmp_path, train_data=world.train_data, resume=tmp_path / "theirs.pt")
    assert names(folder / "checkpoints") == ["epoch_2.pt"]


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
