import io
import os
import random
import re
import warnings
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
    ("config", "library"),
    [
        ('{"model_type": "vit_mae"}', "transformers"),
        ('{"architecture": "vit_base_patch16_224"}', "another library (its config.json)"),  # timm
        ("[]", "another library (its config.json)"),
        ('{"model_ty', "another library (its config.json)"),
    ],
)
def test_a_folder_of_another_library_is_refused_with_the_name_that_is_known(
    tmp_path, config, library
):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match="holds no checkpoint") as refused:
        find_checkpoint(tmp_path)
    assert f"is a model of {library}, " in str(refused.value)


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


@pytest.mark.parametrize("use_mmap", [True, False])
@pytest.mark.parametrize(
    ("layer", "is_code_large"),
    [(torch.nn.Linear(2, 2), False), (torch.nn.TransformerEncoderLayer(8, 1, 8), True)],
    ids=lambda value: type(value).__name__,
)
def test_a_torchscript_file_is_named_as_one_with_the_way_to_go(
    tmp_path, layer, is_code_large, use_mmap
):
    path = tmp_path / "ViT-B-32.pt"
    torch.jit.script(layer).save(path)
    # Of code, which is compressed in it, a real model has more than a layer.
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(part.file_size for part in archive.infolist())
    assert (unpacked > path.stat().st_size) == is_code_large
    with pytest.raises(ValueError, match=r"TorchScript.*--pretrained openai"):
        read_checkpoint(path, use_mmap=use_mmap)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_an_archive_of_others_is_called_so(tmp_path, write):
    with (tmp_path / "a.npz").open("wb") as file:
        write(file, weights=np.zeros(9000), more=np.zeros(9))
    with pytest.raises(ValueError, match=r"a\.npz' .*: it is a zip archive that torch.save"):
        read_checkpoint(tmp_path / "a.npz", use_mmap=True)


VIEWS = {
    "of one number": torch.zeros(1).expand(2**45),
    "of one row": torch.zeros(1, 4).expand(2, 4),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("use_mmap", [True, False])
@pytest.mark.parametrize("part", ["state_dict", "optimizer", "masking_state", "clip_pgs", "other"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_view_of_more_than_the_file_holds_is_refused_by_name(
    tmp_path, view, part, use_mmap, is_zip
):
    content = {"state_dict": {"a": torch.zeros(2)}}
    content.setdefault(part, {})["large"] = view
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
    said = f"cannot be read: {part}/large stands for {view.numel()} elements"
    with pytest.raises(ValueError, match=said):
        read_checkpoint(tmp_path / "a.pt", use_mmap=use_mmap)


def test_views_that_the_file_holds_whole_are_read(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    weights = {"whole": whole, "tied": whole, "turned": whole.T, "part": whole[1:, ::2]}
    torch.save(weights | {"row": whole[0].expand(1, 4), "none": torch.zeros(0)}, tmp_path / "a.pt")
    read = read_checkpoint(tmp_path / "a.pt", use_mmap=True)["state_dict"]
    for name, weight in weights.items():
        assert torch.equal(read[name], weight)


def test_lists_that_refer_to_one_another_without_end_are_refused(tmp_path):
    nested = []
    for _ in range(60):
        nested = [nested, nested]
    with pytest.raises(ValueError, match="more often than it has bytes"):
        read_checkpoint(save(tmp_path / "a.pt", clip_pgs=nested))


@pytest.mark.parametrize("part", ["state_dict", "optimizer"])
def test_tensors_of_parts_of_their_own_sizes_are_refused_by_name(tmp_path, part):
    content = {"state_dict": {"a": torch.zeros(2)}}
    parts = [torch.ones(2), torch.ones(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content.setdefault(part, {})["odd"] = torch.nested.nested_tensor(parts)
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=f"{part}/odd is no dense tensor .*nested"):
            read_checkpoint(tmp_path / "a.pt")


EXOTIC = [
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn_x2")
    if hasattr(torch, name)
]


@pytest.mark.parametrize("dtype", EXOTIC, ids=str)
@pytest.mark.parametrize("part", ["state_dict", "optimizer"])
def test_floats_that_no_training_computes_with_are_refused_by_name(tmp_path, dtype, part):
    content = {"state_dict": {"a": torch.zeros(2)}}
    content.setdefault(part, {})["odd"] = torch.zeros(2, dtype=torch.uint8).view(dtype)
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=f"{part}/odd is no dense tensor .*{dtype}"):
        read_checkpoint(tmp_path / "a.pt", use_mmap=True)


def pack_anew(path, change):
    """Write the parts of an archive again, each as `change` makes it."""
    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data, compress_type=change(name))


@pytest.mark.parametrize("use_mmap", [True, False])
@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
@pytest.mark.parametrize("which", ["", "data/0", "data.pkl"])
def test_a_compressed_archive_is_called_so(tmp_path, use_mmap, method, which):
    path = save(tmp_path / "a.pt", other=torch.zeros(10_000))
    pack_anew(path, lambda name: method if name.endswith(which) else zipfile.ZIP_STORED)
    with pytest.raises(ValueError, match=r"compressed zip archive.*writes it plain"):
        read_checkpoint(path, use_mmap=use_mmap)


def test_an_archive_that_was_packed_anew_without_compression_is_read(tmp_path):
    path = save(tmp_path / "a.pt", other=torch.arange(100))
    pack_anew(path, lambda name: zipfile.ZIP_STORED)
    assert torch.equal(read_checkpoint(path, use_mmap=True)["other"], torch.arange(100))


def test_an_archive_with_one_part_under_many_names_is_refused(tmp_path):
    path = save(tmp_path / "a.pt", other=torch.zeros(10_000))
    with zipfile.ZipFile(path, "a") as archive:
        part = next(info for info in archive.infolist() if info.file_size >= 40_000)
        archive.filelist += [part] * 9
        archive._didModify = True
    with pytest.raises(ValueError, match="more bytes than the file has"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["epoch_2.pt", "step_7.pt", "epoch_latest.pt"])
def test_what_only_names_the_newest_says_which_file_to_give(tmp_path, name):
    (tmp_path / "latest").write_text(f"{name}\n")
    said = f"only names a checkpoint; give {str(tmp_path / name)!r}"
    with pytest.raises(ValueError, match=re.escape(said)):
        read_checkpoint(tmp_path / "latest")


def test_a_checkpoint_may_be_called_latest(tmp_path):
    assert read_checkpoint(save(tmp_path / "latest", epoch=3))["epoch"] == 3


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


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("name", ["logit_scale", "ln_final.weight", "visual.conv1.weight"])
def test_integers_in_place_of_floats_are_refused_by_name(name, dtype, custom_text):
    weights = small_clip().state_dict()
    weights[name] = weights[name].to(dtype)
    with pytest.raises(ValueError, match=rf"{name} is {str(dtype)[6:]} in the file, float32"):
        fit_weights(weights, small_clip(custom_text=custom_text))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_another_width_and_integers_of_the_models_own_fit(dtype):
    model = torch.nn.BatchNorm1d(2)
    weights = {
        n: t.to(dtype) if t.is_floating_point() else t for n, t in model.state_dict().items()
    }
    model.load_state_dict(fit_weights(weights, model))


def test_weights_that_do_not_fit_are_named():
    weights = small_clip(custom_text=True).state_dict()
    with pytest.raises(ValueError, match="only the model has"):
        fit_weights({"logit_scale": weights["logit_scale"]}, small_clip())
    with pytest.raises(ValueError, match="only the"):
        fit_weights(weights, small_clip())


@pytest.mark.parametrize("use_mmap", [False, True])
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_folder_whose_name_is_no_text_is_read_from(tmp_path, name, use_mmap):
    path = tmp_path / os.fsdecode(b"caf\xe9") / name
    path.parent.mkdir()
    weights = {"a": torch.arange(3.0)}
    data = io.BytesIO()
    torch.save(weights, data)
    whole = data.getvalue() if name == "a.pt" else safetensors.torch.save(weights)
    path.write_bytes(whole)
    read = read_checkpoint(path, use_mmap=use_mmap)["state_dict"]
    assert read["a"].tolist() == [0, 1, 2]
