import random
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from clip_pgs.checkpoint_reading import (
    find_checkpoint,
    fit_weights,
    newest_checkpoint,
    read_checkpoint,
)
from support.models import small_clip


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("is_zip", [True, False])
def test_whatever_is_damaged_a_file_is_read_or_refused_in_a_sentence(tmp_path, is_zip):
    path = tmp_path / "a.pt"
    content = {"epoch": 1, "state_dict": {"a": torch.arange(9.0)}, "clip_pgs": {"b": ["c", 0.5]}}
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    whole = path.read_bytes()
    refusals = []
    for seed in range(300):
        chance = random.Random(seed)
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 3))):
            damaged[chance.randrange(min(700, len(damaged)))] = chance.randrange(256)
        path.write_bytes(damaged[: chance.choice((None, chance.randrange(len(damaged))))])
        for use_mmap in (False, True):
            try:
                read_checkpoint(path, use_mmap=use_mmap)
            except ValueError as error:
                refusals.append(str(error))
    assert len(refusals) > 300
    for sentence in refusals:
        assert sentence.startswith(f"checkpoint '{path}' cannot be read: ")
        assert "\n" not in sentence


def save(path, **content):
    torch.save({"state_dict": {"a": torch.zeros(2)}, **content}, path)
    return path


def test_the_newest_got_furthest_whatever_was_written_last(tmp_path):
    save(tmp_path / "epoch_2.pt", epoch=2, step=8)
    save(tmp_path / "step_9.pt", epoch=2, step=9)
    save(tmp_path / "epoch_1.pt", epoch=1, step=4)
    assert newest_checkpoint(tmp_path) == tmp_path / "step_9.pt"
    assert newest_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("inner", ["checkpoints", "."])
def test_a_folder_stands_for_its_newest_whole_checkpoint(tmp_path, inner):
    folder = tmp_path / inner
    folder.mkdir(exist_ok=True)
    save(folder / "epoch_1.pt", epoch=1)
    (folder / "epoch_2.pt").write_bytes(b"half")
    assert find_checkpoint(tmp_path) == folder / "epoch_1.pt"


def test_a_folder_without_checkpoints_is_refused_and_a_file_is_itself(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    assert find_checkpoint(tmp_path / "a.pt") == tmp_path / "a.pt"


@pytest.mark.parametrize(
    "number", [np.float64(0.5), np.float32(0.5), np.int64(3), np.bool_(True), np.uint8(3)]
)
@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numbers_of_numpy_in_an_older_optimizer_are_read_as_plain_ones(tmp_path, number, module):
    path = save(tmp_path / "a.pt", epoch=np.int64(4), optimizer={"groups": [{"lr": number}]})
    # numpy renamed what makes its scalars; files of either name are about.
    written = {b"numpy._core.multiarray", b"numpy.core.multiarray"} - {module.encode()}
    rewrite_pickle(path, written.pop(), module.encode())
    content = read_checkpoint(path)
    assert content["epoch"] == 4
    assert content["optimizer"]["groups"] == [{"lr": number.item()}]
    assert type(content["optimizer"]["groups"][0]["lr"]) is type(number.item())


def rewrite_pickle(path, old, new):
    """Exchange a module's name in the pickle of a torch file."""
    with zipfile.ZipFile(path) as archive:
        parts = {info: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for info, data in parts.items():
            archive.writestr(info.filename, data.replace(b"c" + old, b"c" + new))


def test_other_objects_of_numpy_are_refused(tmp_path):
    path = save(tmp_path / "a.pt", other=np.zeros(3, dtype=object))
    with pytest.raises(ValueError, match="nothing in it was run"):
        read_checkpoint(path)


def test_a_torchscript_file_is_named_as_one_with_the_way_to_go(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "ViT-B-32.pt")
    with pytest.raises(ValueError, match=r"TorchScript.*--pretrained openai"):
        read_checkpoint(tmp_path / "ViT-B-32.pt")


@pytest.mark.parametrize("name", ["a.ckpt", "a", "a.pt", "a.safetensors", "a.model"])
@pytest.mark.parametrize("form", ["zip", "safetensors"])
def test_a_file_is_taken_for_what_it_holds_not_for_its_name(tmp_path, name, form):
    if name == "a.safetensors" and form == "zip":
        pytest.skip("such a name promises what it holds")
    weights = {"a": torch.arange(3.0)}
    if form == "zip":
        torch.save({"state_dict": weights}, tmp_path / name)
    else:
        safetensors.torch.save_file(weights, tmp_path / name)
    assert torch.equal(read_checkpoint(tmp_path / name)["state_dict"]["a"], weights["a"])


@pytest.mark.parametrize("custom_text", [False, True])
def test_weights_of_a_plain_clip_fit_its_custom_text_model(custom_text):
    weights = small_clip().state_dict()
    model = small_clip(custom_text=custom_text, seed=1)
    model.load_state_dict(fit_weights(weights, model))
    assert torch.equal(model.visual.proj, weights["visual.proj"])


def test_weights_that_do_not_fit_are_named():
    weights = small_clip(custom_text=True).state_dict()
    with pytest.raises(ValueError, match="only the model has"):
        fit_weights({"logit_scale": weights["logit_scale"]}, small_clip())
    with pytest.raises(ValueError, match="only the"):
        fit_weights(weights, small_clip())
