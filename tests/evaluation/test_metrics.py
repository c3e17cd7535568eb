import json
import shutil

import pytest
import torch
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import (
    image_caption_selection,
    zeroshot_classification,
    zeroshot_retrieval,
)
from torch.nn.functional import normalize

from clip_pgs.evaluation import load_model
from clip_pgs.evaluation.features import NonFiniteFeaturesError
from clip_pgs.evaluation.metrics import (
    classification_metrics,
    count_right,
    retrieval_metrics,
    zeroshot_logits,
)
from clip_pgs.evaluation.suites import get_suite, score_caption_pairs
from support.encoding import make_encoder

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


class PassThrough(torch.nn.Module):
    """A model whose inputs are features already."""

    def encode_image(self, features_BD):
        return features_BD

    def encode_text(self, features_TD):
        return features_TD


def random_features(num_rows, num_features=16, *, seed):
    return torch.randn(num_rows, num_features, generator=torch.Generator().manual_seed(seed))


def test_accuracies_equal_those_counted_by_hand():
    logits_NC = torch.tensor(
        [
            [9.0, 8, 7, 6, 5, 4],  # right
            [8.0, 9, 7, 6, 5, 4],  # second
            [1.0, 2, 3, 4, 5, 6],  # last
            [0.0, 9, 0, 0, 0, 0],  # right
        ]
    )
    metrics = classification_metrics(logits_NC, torch.tensor([0, 0, 0, 1]))
    assert metrics == {
        "acc1": 2 / 4,
        "acc5": 3 / 4,
        "mean_per_class_recall": pytest.approx((1 / 3 + 1) / 2),
    }


@pytest.mark.parametrize("num_classes", [3, 12])
def test_classification_equals_clip_benchmark_on_the_same_features(num_classes):
    images_ND = random_features(200, seed=0)
    classes_CD = normalize(random_features(num_classes, seed=1), dim=-1)
    labels = torch.randint(num_classes, (200,), generator=torch.Generator().manual_seed(2))

    class Batches(list):
        dataset = type("Dataset", (), {"classes": [str(number) for number in range(num_classes)]})

    theirs = zeroshot_classification.evaluate(
        PassThrough(),
        Batches(zip(images_ND.split(32), labels.split(32), strict=True)),
        lambda prompts: classes_CD[[int(prompt) for prompt in prompts]],
        Batches.dataset.classes,
        ["{c}"],
        device="cpu",
        amp=False,
    )
    ours = classification_metrics(zeroshot_logits(images_ND, classes_CD), labels)
    assert (ours["acc5"] is None) == (num_classes < 5)
    expected = {key: value for key, value in theirs.items() if ours[key] is not None}
    assert {key: ours[key] for key in expected} == pytest.approx(expected, abs=1e-9)


def test_labels_of_several_classes_give_the_average_precision_of_clip_benchmark():
    logits_NC = random_features(40, 4, seed=0)
    labels_NC = (random_features(40, 4, seed=1) > 0).long()
    precisions = zeroshot_classification.average_precision_per_class(logits_NC, labels_NC)
    expected = {"mean_average_precision": pytest.approx(precisions.mean().item())}
    assert classification_metrics(logits_NC, labels_NC) == expected


def test_permuted_labels_give_chance():
    labels = torch.arange(10).repeat(200)
    logits_NC = torch.nn.functional.one_hot(labels, 10).float()
    permuted = labels[torch.randperm(2000, generator=torch.Generator().manual_seed(0))]
    assert classification_metrics(logits_NC, labels)["acc1"] == 1.0
    metrics = classification_metrics(logits_NC, permuted)
    assert metrics["acc1"] == pytest.approx(0.1, abs=0.03)
    assert metrics["mean_per_class_recall"] == pytest.approx(0.1, abs=0.03)


def test_constant_features_give_chance():
    labels = torch.arange(10).repeat(20)
    logits_NC = zeroshot_logits(torch.ones(200, 4), normalize(torch.ones(10, 4), dim=-1))
    metrics = classification_metrics(logits_NC, labels)
    assert metrics["acc1"] == pytest.approx(0.1)
    assert metrics["mean_per_class_recall"] == pytest.approx(0.1)


def test_set_of_one_class_has_recall_of_that_class_alone():
    metrics = classification_metrics(torch.eye(3), torch.zeros(3, dtype=torch.int64))
    assert metrics["acc1"] == metrics["mean_per_class_recall"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("label", [-1, 3])
def test_label_that_is_no_class_is_refused(label):
    with pytest.raises(ValueError, match=rf"labels must be in \[0, 3\).*got {label}"):
        classification_metrics(torch.eye(3), torch.tensor([0, 1, label]))


def test_set_without_images_is_refused():
    with pytest.raises(ValueError, match="no image to score"):
        classification_metrics(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


def test_recalls_equal_those_counted_by_hand():
    # Images at 0, 30 and 90 degrees; of two texts each, one of image 1 is nearer to image 2.
    def at(*degrees):
        angle = torch.tensor(degrees, dtype=torch.float32).deg2rad()
        return torch.stack([angle.cos(), angle.sin()], dim=1)

    metrics = retrieval_metrics(
        at(0, 30, 90), at(1, 2, 31, 89, 88, 90), torch.tensor([0, 0, 1, 1, 2, 2]), recall_at=(1, 2)
    )
    assert metrics["image_retrieval_recall@1"] == pytest.approx(5 / 6)
    assert metrics["text_retrieval_recall@1"] == 1.0
    assert metrics["image_retrieval_recall@2"] == 1.0


def test_retrieval_equals_clip_benchmark_on_the_same_features():
    images_ND, texts_TD = random_features(150, seed=0), random_features(300, seed=1)
    texts_TD += images_ND.repeat_interleave(2, dim=0)
    numbers = [[str(2 * image), str(2 * image + 1)] for image in range(150)]
    theirs = zeroshot_retrieval.evaluate(
        PassThrough(),
        [(images_ND[:70], numbers[:70]), (images_ND[70:], numbers[70:])],
        lambda texts: texts_TD[[int(text) for text in texts]],
        device="cpu",
        amp=False,
        recall_k_list=[1, 5, 10],
    )
    ours = retrieval_metrics(images_ND, texts_TD, torch.arange(150).repeat_interleave(2))
    assert ours == pytest.approx(theirs, abs=1e-9)


def test_recall_among_fewer_than_k_is_undefined():
    metrics = retrieval_metrics(torch.eye(4), torch.eye(4), torch.arange(4))
    assert metrics["image_retrieval_recall@1"] == 1.0
    assert metrics["image_retrieval_recall@5"] is None
    assert metrics["text_retrieval_recall@10"] is None


@pytest.fixture
def folder(data_root, tmp_path):
    copy = tmp_path / "sugar_crepe"
    shutil.copytree(data_root / "sugar_crepe", copy)
    return copy


def score(loaded, folder, split="add_att", *, encoder=None):
    eval_set = get_suite("compositionality").eval_set(f"{folder.name}/{split}", str(folder))
    scores = score_caption_pairs(encoder or make_encoder(loaded, batch_size=3), eval_set)
    return scores.metrics, scores.details


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
    encoder = make_encoder(color_model, tmp_path / "features")
    for split in ("add_att", "swap_obj"):
        score(color_model, folder, split, encoder=encoder)
        encoder.cache.forget()
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
