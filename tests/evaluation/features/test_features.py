import json
import shutil
import tarfile

import pytest
import torch
from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier
from PIL import Image
from torch.nn.functional import normalize

from clip_pgs.evaluation import EvalSet, load_model
from clip_pgs.evaluation.features.feature_cache import FeatureCache
from clip_pgs.evaluation.features.features import (
    NonFiniteFeaturesError,
    class_features,
    image_features,
    text_features,
)
from clip_pgs.evaluation.features.fingerprints import data_fingerprint, transform_description

CPU = torch.device("cpu")


@pytest.fixture
def six(data_root):
    return EvalSet(
        "six", str(data_root / "six"), "zeroshot-classification", "zeroshot_classification"
    )


@pytest.fixture
def pairs(data_root):
    return EvalSet("pairs", str(data_root / "pairs"), "zeroshot-retrieval", "zeroshot_retrieval")


def encode(loaded, eval_set, *, cache=None, split="test", batch_size=5):
    return image_features(
        loaded,
        eval_set,
        split=split,
        device=CPU,
        batch_size=batch_size,
        workers=0,
        amp=False,
        cache=cache or FeatureCache(loaded),
    )


def count_images(loaded):
    """Count the images that a model encodes from now on."""
    counts = []
    encode_image = loaded.model.encode_image

    def counted(pixels, *args, **kwargs):
        counts.append(len(pixels))
        return encode_image(pixels, *args, **kwargs)

    # Not among the plain attributes that make a model's fingerprint.
    loaded.model.__dict__["encode_image"] = counted
    return counts


def images_of(folder):
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    yield Image.open(tar.extractfile(member)).convert("RGB")


def test_features_are_those_of_the_model_image_by_image(finished_run, six, data_root):
    loaded = load_model(finished_run)
    features = encode(loaded, six)
    with torch.no_grad():
        expected = [
            loaded.model.encode_image(loaded.transform(image)[None])
            for image in images_of(data_root / "six/test")
        ]
    torch.testing.assert_close(features.images, torch.cat(expected))
    # One shard after the other: the even images, then the odd ones.
    assert features.labels.tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert features.classes == [f"number {index}" for index in range(6)]
    assert features.templates == ["a {c}", "the {c}"]


def test_captions_stay_with_their_images(color_model, pairs, tmp_path):
    cache = FeatureCache(color_model, folder=tmp_path)
    for kept in (cache, FeatureCache(color_model, folder=tmp_path)):
        features = encode(color_model, pairs, cache=kept)
        assert features.labels is None
        assert features.captions[:2] == [["it is 0", "so 0"], ["it is 1", "so 1"]]
        nearest = normalize(features.images, dim=-1) @ color_model.model.colors.T
        assert nearest.argmax(dim=1)[:3].tolist() == [1, 0, 2]


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


def test_data_that_moved_are_the_same_data(six, tmp_path):
    shutil.copytree(six.location, tmp_path / "elsewhere")
    assert data_fingerprint(str(tmp_path / "elsewhere"), "test") == data_fingerprint(
        six.location, "test"
    )


def test_same_weights_in_another_architecture_give_other_features(finished_run, six, tmp_path):
    plain, quick = load_model(finished_run), load_model(finished_run)
    for module in quick.model.visual.modules():
        if hasattr(module, "num_heads"):
            module.num_heads, module.head_dim = 1, 16
    first = encode(plain, six, cache=FeatureCache(plain, folder=tmp_path))
    second = encode(quick, six, cache=FeatureCache(quick, folder=tmp_path))
    assert not torch.equal(first.images, second.images)


@pytest.mark.parametrize("content", [b"", b"half", None])
def test_damaged_file_is_not_used(color_model, six, tmp_path, content):
    good = encode(color_model, six, cache=FeatureCache(color_model, folder=tmp_path))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-7] if content is None else content)
    cache, counts = FeatureCache(color_model, folder=tmp_path), count_images(color_model)
    assert torch.equal(encode(color_model, six, cache=cache).images, good.images)
    assert sum(counts) == 12


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


def test_transform_of_open_clip_is_described_without_addresses(finished_run):
    first, again = load_model(finished_run).transform, load_model(finished_run).transform
    description = transform_description(first)
    assert description == transform_description(again)
    assert "Normalize" in description
    assert "0x" not in description


def test_precision_is_part_of_the_key(color_model):
    cache = FeatureCache(color_model)
    keys = {cache.key("images", "six", device=CPU, amp=amp) for amp in (False, True)}
    assert len(keys) == 2


def test_features_that_are_not_finite_stop_with_a_sentence(color_model, six, tmp_path):
    encode_image = color_model.model.encode_image

    def broken(pixels):
        features_BD = encode_image(pixels)
        features_BD[0, 0] = torch.nan
        return features_BD

    color_model.model.__dict__["encode_image"] = broken
    sentence = "the features of colors on six are not finite: 3 of 12 hold a NaN or an infinity"
    with pytest.raises(NonFiniteFeaturesError, match=sentence):
        encode(color_model, six, cache=FeatureCache(color_model, folder=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_split_that_is_not_there_is_a_missing_file(color_model, pairs):
    with pytest.raises(FileNotFoundError, match=r"has no train/nshards\.txt"):
        encode(color_model, pairs, split="train")


def test_model_is_left_in_its_own_mode(color_model, six):
    color_model.model.train()
    encode(color_model, six)
    assert color_model.model.training


def test_equal_texts_have_equal_features_whatever_their_place(finished_run):
    loaded = load_model(finished_run)
    texts = ["a cat", "two dogs", "a cat", "a bird in a tree", "a cat"]
    features_TD = text_features(loaded, texts, device=CPU, batch_size=2, amp=False)
    assert torch.equal(features_TD[0], features_TD[2])
    assert torch.equal(features_TD[0], features_TD[4])
    with torch.no_grad():
        expected_TD = loaded.model.encode_text(loaded.tokenizer(texts))
    torch.testing.assert_close(features_TD, expected_TD)


def test_texts_that_are_not_finite_stop_with_a_sentence(color_model):
    color_model.model.colors.data[3] = torch.inf
    with pytest.raises(NonFiniteFeaturesError, match="of colors on texts are not finite: 1 of 2"):
        text_features(color_model, ["number 3", "number 4"], device=CPU, amp=False)


def test_classes_equal_those_of_clip_benchmark(finished_run):
    loaded = load_model(finished_run)
    names, templates = ["cat", "dog", "tall tree"], ["a {c}", "a photo of a {c}.", "{c}"]
    classes_CD = class_features(
        loaded, names, templates, device=CPU, amp=False, cache=FeatureCache(loaded)
    )
    theirs_DC = zero_shot_classifier(
        loaded.model, loaded.tokenizer, names, templates, "cpu", amp=False
    )
    torch.testing.assert_close(classes_CD, theirs_DC.T)


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


@pytest.mark.parametrize(("names", "templates"), [([], ["a {c}"]), (["cat"], [])])
def test_classes_need_names_and_templates(color_model, names, templates):
    counts = f"got {len(names)} and {len(templates)}"
    with pytest.raises(ValueError, match=f"needs class names and templates, {counts}"):
        class_features(
            color_model, names, templates, device=CPU, amp=False, cache=FeatureCache(color_model)
        )


def test_large_files_are_told_apart_by_a_sample_of_their_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("clip_pgs.evaluation.features.fingerprints._WHOLE_FILE_BYTES", 1000)
    monkeypatch.setattr("clip_pgs.evaluation.features.fingerprints._BLOCK_BYTES", 16)
    found = []
    for number in range(2):
        folder = tmp_path / str(number)
        (folder / "test").mkdir(parents=True)
        (folder / "test/nshards.txt").write_text("1")
        (folder / "test/0.tar").write_bytes(bytes(4000) + bytes([number]))
        found.append(data_fingerprint(str(folder), "test"))
    assert found[0] != found[1]


def test_nothing_is_known_of_data_on_a_server():
    assert data_fingerprint("https://example.org/wds_six", "test") is None


def test_changed_captions_change_the_data(data_root, tmp_path):
    folder = tmp_path / "sugar_crepe"
    shutil.copytree(data_root / "sugar_crepe", folder)
    before = data_fingerprint(str(folder), "add_att")
    items = json.loads((folder / "add_att.json").read_text())
    items["0"]["caption"] = "it is 9"
    (folder / "add_att.json").write_text(json.dumps(items))
    assert data_fingerprint(str(folder), "add_att") != before
