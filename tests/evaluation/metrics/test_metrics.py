import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from torch.nn.functional import normalize

from clip_pgs.evaluation.metrics.metrics import (
    classification_metrics,
    retrieval_metrics,
    zeroshot_logits,
)

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
