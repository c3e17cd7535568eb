"""When features are computed again, and when those in memory or on disk serve."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from clip_pgs.evaluation import EvalSet, load_model
from clip_pgs.evaluation.features.class_features import class_features
from clip_pgs.evaluation.features.feature_cache import FeatureCache
from clip_pgs.evaluation.features.fingerprints import data_fingerprint
from support.encoding import CPU, count_images, encode


def test_suites_share_the_features_of_a_split(color_model, six):
    cache, counts = FeatureCache(color_model), count_images(color_model)
    probed = EvalSet(six.name, six.location, "linear-probe", "linear_probe")
    assert encode(color_model, six, cache=cache).images is not None
    assert encode(color_model, probed, cache=cache).labels is not None
    assert sum(counts) == 12
    assert len(encode(color_model, probed, split="train", cache=cache).images) == 24
    assert sum(counts) == 36


def test_features_on_disk_outlive_the_call(color_model, six, tmp_path):
    first = encode(color_model, six, cache=FeatureCache(color_model, folder=tmp_path))
    cache, counts = FeatureCache(color_model, folder=tmp_path), count_images(color_model)
    again = encode(color_model, six, cache=cache)
    assert counts == []
    assert torch.equal(again.images, first.images)
    assert torch.equal(again.labels, first.labels)


def test_features_that_were_let_go_of_are_found_on_disk(color_model, six, tmp_path):
    cache, counts = FeatureCache(color_model, folder=tmp_path), count_images(color_model)
    encode(color_model, six, cache=cache)
    cache.forget()
    encode(color_model, six, cache=cache)
    assert sum(counts) == 12


def test_checkpoint_that_was_overwritten_gives_its_own_features(
    finished_run, six, save_run, tmp_path
):
    run, kept = tmp_path / "run", tmp_path / "features"
    shutil.copytree(finished_run, run)
    old = load_model(run)
    old_features = encode(old, six, cache=FeatureCache(old, folder=kept))
    with torch.no_grad():
        old.model.visual.proj.neg_()
    save_run(run, old.model)

    new = load_model(run)
    assert new.source == str(run / "export")
    new_features = encode(new, six, cache=FeatureCache(new, folder=kept))
    assert torch.equal(new_features.images, encode(new, six).images)
    assert not torch.allclose(new_features.images, old_features.images, atol=1e-3)


def test_data_that_changed_under_the_same_path_are_encoded_again(color_model, six, tmp_path):
    folder, kept = tmp_path / "six", tmp_path / "features"
    shutil.copytree(six.location, folder)
    here = EvalSet("six", str(folder), six.suite, six.task)
    before = encode(color_model, here, cache=FeatureCache(color_model, folder=kept))
    # The other shard twice: names and sizes stay as they were.
    assert (folder / "test/0.tar").stat().st_size == (folder / "test/1.tar").stat().st_size
    shutil.copyfile(folder / "test/1.tar", folder / "test/0.tar")
    after = encode(color_model, here, cache=FeatureCache(color_model, folder=kept))
    assert torch.equal(after.images[:6], after.images[6:])
    assert not torch.equal(after.images, before.images)


def test_same_weights_in_another_architecture_give_other_features(finished_run, six, tmp_path):
    plain, quick = load_model(finished_run), load_model(finished_run)
    for module in quick.model.visual.modules():
        if hasattr(module, "num_heads"):
            module.num_heads, module.head_dim = 1, 16
    first = encode(plain, six, cache=FeatureCache(plain, folder=tmp_path))
    second = encode(quick, six, cache=FeatureCache(quick, folder=tmp_path))
    assert not torch.equal(first.images, second.images)


@pytest.mark.parametrize("content", [b"", b"half", None, b"\xff" * 100])
def test_damaged_file_is_not_used(color_model, six, tmp_path, content):
    good = encode(color_model, six, cache=FeatureCache(color_model, folder=tmp_path))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-7] if content is None else content)
    cache, counts = FeatureCache(color_model, folder=tmp_path), count_images(color_model)
    assert torch.equal(encode(color_model, six, cache=cache).images, good.images)
    assert sum(counts) == 12


@pytest.mark.parametrize(
    ("tensors", "notes"),
    [
        ({"images": torch.zeros(12, 3)}, {}),
        ({"images": torch.zeros(12, 3)}, {"texts": "["}),
        ({"other": torch.zeros(12, 3)}, {"texts": "{}"}),
        ({"images": torch.zeros(12)}, {"texts": "{}"}),
        ({"images": torch.zeros(12, 3), "labels": torch.zeros(11)}, {"texts": "{}"}),
        ({"images": torch.zeros(12, 3)}, {"texts": '{"captions": [["a"]]}'}),
    ],
)
def test_file_of_another_shape_is_not_used_and_named(
    color_model, six, tmp_path, caplog, tensors, notes
):
    good = encode(color_model, six, cache=FeatureCache(color_model, folder=tmp_path))
    (path,) = tmp_path.iterdir()
    save_file(tensors, path, metadata={"key": path.stem, **notes})
    again = encode(color_model, six, cache=FeatureCache(color_model, folder=tmp_path))
    assert torch.equal(again.images, good.images)
    assert path.name in caplog.text


def test_features_that_cannot_be_kept_are_told_and_used(color_model, six, tmp_path, caplog):
    (tmp_path / "features").touch()
    cache = FeatureCache(color_model, folder=tmp_path / "features")
    assert len(encode(color_model, six, cache=cache).images) == 12
    assert "cannot be kept" in caplog.text


def test_file_of_other_features_is_not_used(color_model, six, tmp_path):
    encode(color_model, six, cache=FeatureCache(color_model, folder=tmp_path))
    (path,) = tmp_path.iterdir()
    color_model.model.colors.data += 0.1
    changed = FeatureCache(color_model, folder=tmp_path)
    key = changed.key("images", data_fingerprint(six.location, "test"), device=CPU, amp=False)
    path.rename(tmp_path / f"{key}.safetensors")
    assert changed.get(key) is None


def test_finished_call_leaves_no_half_written_file(color_model, six, tmp_path):
    encode(color_model, six, cache=FeatureCache(color_model, folder=tmp_path))
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_transform_that_cannot_be_described_keeps_nothing_on_disk(color_model, six, tmp_path):
    to_tensor = color_model.transform
    object.__setattr__(color_model, "transform", lambda image: 1 - to_tensor(image))
    encode(color_model, six, cache=FeatureCache(color_model, folder=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_precision_is_part_of_the_key(color_model):
    cache = FeatureCache(color_model)
    keys = {cache.key("images", "six", device=CPU, amp=amp) for amp in (False, True)}
    assert len(keys) == 2


def test_list_of_classes_is_encoded_once(finished_run):
    loaded = load_model(finished_run)
    cache, calls = FeatureCache(loaded), []
    encode_text = loaded.model.encode_text
    loaded.model.__dict__["encode_text"] = lambda tokens: (
        calls.append(len(tokens)) or encode_text(tokens)
    )
    for templates in (["a {c}"], ["a {c}"], ["the {c}"]):
        class_features(loaded, ["cat", "dog"], templates, device=CPU, amp=False, cache=cache)
        cache.forget()
    assert calls == [2, 2]
