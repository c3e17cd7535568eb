import tarfile

import pytest
import torch
from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier
from PIL import Image
from torch.nn.functional import normalize

from clip_pgs.evaluation import load_model
from clip_pgs.evaluation.features.class_features import class_features
from clip_pgs.evaluation.features.feature_cache import FeatureCache
from clip_pgs.evaluation.features.features import (
    NonFiniteFeaturesError,
    text_features,
)
from support.encoding import CPU, encode


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


def test_captions_stay_with_their_images(color_model, pairs, tmp_path):
    cache = FeatureCache(color_model, folder=tmp_path)
    for kept in (cache, FeatureCache(color_model, folder=tmp_path)):
        features = encode(color_model, pairs, cache=kept)
        assert features.labels is None
        assert features.captions[:2] == [["it is 0", "so 0"], ["it is 1", "so 1"]]
        nearest = normalize(features.images, dim=-1) @ color_model.model.colors.T
        assert nearest.argmax(dim=1)[:3].tolist() == [1, 0, 2]


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
