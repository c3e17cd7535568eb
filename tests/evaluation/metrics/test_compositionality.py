import json
import shutil

import pytest
import torch
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import image_caption_selection

from clip_pgs.evaluation import load_model
from clip_pgs.evaluation.datasets.datasets import CAPTION_PAIR_SPLITS
from clip_pgs.evaluation.features.feature_cache import FeatureCache
from clip_pgs.evaluation.features.features import NonFiniteFeaturesError
from clip_pgs.evaluation.metrics.compositionality import compositionality, count_right


@pytest.fixture
def folder(data_root, tmp_path):
    copy = tmp_path / "sugar_crepe"
    shutil.copytree(data_root / "sugar_crepe", copy)
    return copy


def score(loaded, folder, split="add_att", *, cache=None):
    return compositionality(
        loaded,
        folder,
        split,
        device=torch.device("cpu"),
        batch_size=3,
        workers=0,
        amp=False,
        cache=cache or FeatureCache(loaded),
    )


def score_with_clip_benchmark(loaded, folder, split="add_att"):
    dataset = build_dataset(
        f"sugar_crepe/{split}",
        root=str(folder),
        transform=loaded.transform,
        task="image_caption_selection",
    )
    batches = [(image[None], [texts]) for image, texts in dataset]
    return image_caption_selection.evaluate(
        loaded.model, batches, loaded.tokenizer, "cpu", amp=False
    )


def rewrite(folder, split, pairs):
    items = json.loads((folder / f"{split}.json").read_text())
    for item, (caption, negative) in zip(items.values(), pairs, strict=True):
        item.update(caption=caption, negative_caption=negative)
    (folder / f"{split}.json").write_text(json.dumps(items))


def test_accuracy_equals_that_counted_by_hand(color_model, folder):
    # Image 3 is captioned as 4, and its negative is 3.
    metrics, details = score(color_model, folder)
    assert metrics == {"acc": 3 / 4}
    assert details == {"items": 4, "ties": 0, "images": 4}
    assert score(color_model, folder, "swap_obj")[0] == {"acc": 1.0}


def test_ties_are_wrong_and_counted(color_model, folder):
    rewrite(folder, "add_att", [("is 0", "was 0"), ("is 1", "is 2"), ("is 2", "is 2"), ("3", "4")])
    metrics, details = score(color_model, folder)
    assert metrics == {"acc": 2 / 4}
    assert details["ties"] == 2
    assert score_with_clip_benchmark(color_model, folder)["acc"] == 1.0


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_collapsed_model_scores_nothing(color_model, folder, noise):
    generator = torch.Generator().manual_seed(0)

    def constant(inputs):
        return torch.ones(len(inputs), 8) + noise * torch.randn(len(inputs), 8, generator=generator)

    color_model.model.__dict__.update(encode_image=constant, encode_text=constant)
    metrics, details = score(color_model, folder)
    assert metrics == {"acc": 0.0}
    assert details["ties"] == details["items"] == 4
    if noise == 0:
        assert score_with_clip_benchmark(color_model, folder)["acc"] == 1.0


def test_accuracy_equals_that_of_clip_benchmark_without_ties(finished_run, folder):
    words = ["red", "dog", "two cats", "a tree", "the sea", "night", "bread", "a man with a hat"]
    rewrite(folder, "add_att", [(words[index], words[index + 4]) for index in range(4)])
    loaded = load_model(finished_run)
    metrics, details = score(loaded, folder)
    assert details["ties"] == 0
    assert metrics["acc"] == score_with_clip_benchmark(loaded, folder)["acc"]


def test_random_pairs_agree_with_clip_benchmark():
    images_ND, true_ND, false_ND = torch.randn(3, 500, 16, generator=torch.Generator()).unbind()

    class PassThrough(torch.nn.Module):
        def encode_image(self, images_B1KD):
            return images_B1KD.flatten(1)

        def encode_text(self, features_TD):
            return features_TD

    texts_TD = torch.cat([true_ND, false_ND])
    batches = [(images_ND.view(500, 1, 4, 4), [[row, row + 500] for row in range(500)])]
    theirs = image_caption_selection.evaluate(
        PassThrough(), batches, lambda rows: texts_TD[rows], "cpu", amp=False
    )
    num_right, num_ties = count_right(images_ND, true_ND, false_ND)
    assert num_ties == 0
    assert num_right / 500 == pytest.approx(theirs["acc"], abs=1e-7)


def test_images_are_encoded_once_for_all_splits(color_model, folder, tmp_path):
    counts, encode_image = [], color_model.model.encode_image
    color_model.model.__dict__["encode_image"] = lambda pixels: (
        counts.append(len(pixels)) or encode_image(pixels)
    )
    cache = FeatureCache(color_model, folder=tmp_path / "features")
    for split in ("add_att", "swap_obj"):
        score(color_model, folder, split, cache=cache)
        cache.forget()
    assert sum(counts) == 6


def test_features_that_are_not_finite_stop_with_a_sentence(color_model, folder):
    color_model.model.__dict__["encode_image"] = lambda pixels: pixels.mean(dim=(2, 3)) / 0 * 0
    with pytest.raises(NonFiniteFeaturesError, match="features of colors on the images in sugar_"):
        score(color_model, folder)


def test_image_that_is_not_there_is_a_missing_file(color_model, folder):
    (folder / "val2017/2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks val2017/2.png \(1 of 4 images\)"):
        score(color_model, folder)
    assert score(color_model, folder, "swap_obj")[0] == {"acc": 1.0}


def test_split_that_is_not_there_is_a_missing_file(color_model, folder):
    with pytest.raises(FileNotFoundError, match=r"no file .*replace_rel.json"):
        score(color_model, folder, "replace_rel")


def test_unknown_split_is_refused(color_model, folder):
    with pytest.raises(ValueError, match=f"no split 'add'; choose from {CAPTION_PAIR_SPLITS[0]}"):
        score(color_model, folder, "add")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not JSON"),
        ("{}", "must hold items with filename, caption, negative_caption"),
        ('{"0": {"filename": "0.png", "caption": "it is 0"}}', "must hold items"),
    ],
)
def test_malformed_split_is_refused_and_harms_no_other(color_model, folder, content, sentence):
    (folder / "add_att.json").write_text(content)
    with pytest.raises(ValueError, match=rf"add_att.json {sentence}"):
        score(color_model, folder)
    assert score(color_model, folder, "swap_obj")[0] == {"acc": 1.0}
