import json
import math

import pytest
import torch

from clip_pgs.evaluation.in_training import EvaluationInTraining


@pytest.fixture
def options(dataset_list, data_root):
    return {"datasets": str(dataset_list), "data_root": str(data_root), "workers": 0}


def measure(evaluation, loaded, epoch=3):
    return evaluation(
        model=loaded.model, transform=loaded.transform, tokenize=loaded.tokenizer, epoch=epoch
    )


def test_values_are_named_by_suite_set_and_metric(color_model, options):
    evaluation = EvaluationInTraining(suite="all", run=None, **options)
    values = measure(evaluation, color_model)
    assert values["zeroshot-classification/six/acc1"] == 0.75
    assert values["zeroshot-classification/average/acc1"] == 0.75
    assert values["zeroshot-retrieval/pairs/text_retrieval_recall@1"] == pytest.approx(10 / 12)
    assert all(isinstance(value, float) for value in values.values())


def test_an_average_that_lacks_a_set_says_so(color_model, options, dataset_list, caplog):
    dataset_list.write_text("six\ngone\npairs\n")
    evaluation = EvaluationInTraining(suite="all", run=None, **options)
    # Epochs take days.
    assert "gone is missing: no folder" in caplog.text
    values = measure(evaluation, color_model)
    assert values["zeroshot-classification/average_of_1_of_2/acc1"] == 0.75
    assert "zeroshot-classification/average/acc1" not in values
    assert "zeroshot-retrieval/average/text_retrieval_recall@1" in values


def test_a_full_disk_does_not_stop_the_run(color_model, options, tmp_path):
    run = tmp_path / "run"
    run.touch()
    evaluation = EvaluationInTraining(suite="zeroshot-classification", run=run, **options)
    assert measure(evaluation, color_model) == {}


def test_every_epoch_has_a_folder_of_results(color_model, options, tmp_path):
    evaluation = EvaluationInTraining(suite="zeroshot-classification", run=tmp_path, **options)
    for epoch in (3, 6):
        measure(evaluation, color_model, epoch=epoch)
        path = tmp_path / f"eval/epoch_{epoch}/zeroshot_classification_six.json"
        content = json.loads(path.read_text())
        assert content["metrics"]["acc1"] == 0.75
        assert content["model"] == f"epoch_{epoch}"
        assert len(content["data_digest"]) == 64
    assert not list(tmp_path.glob("eval/*/features"))


def test_model_and_random_streams_are_left_as_they_were(color_model, options):
    evaluation = EvaluationInTraining(suite="linear-probe", run=None, **options)
    color_model.model.train()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert measure(evaluation, color_model)["linear-probe/six/lp_acc1"] > 0.5
    assert color_model.model.training
    assert torch.equal(torch.rand(1), expected)


def test_weights_that_are_not_finite_are_told_and_do_not_stop_the_run(color_model, options, caplog):
    evaluation = EvaluationInTraining(suite="all", run=None, **options)
    color_model.model.colors.data[0, 0] = math.nan
    assert measure(evaluation, color_model) == {}
    assert "not evaluated after epoch 3: the weights of epoch_3 are not finite" in caplog.text


def test_half_precision_weights_are_scored_in_float32(color_model, options):
    color_model.model.half()
    evaluation = EvaluationInTraining(suite="zeroshot-classification", run=None, **options)
    assert measure(evaluation, color_model)["zeroshot-classification/six/acc1"] == 0.75
    assert color_model.model.colors.dtype == torch.float16


def test_a_list_of_which_nothing_is_there_is_refused_at_the_start(tmp_path, options):
    path = tmp_path / "gone.txt"
    path.write_text("not/here\n")
    with pytest.raises(ValueError, match=r"none of the data sets to evaluate is there: no folder"):
        EvaluationInTraining(suite="all", run=None, **{**options, "datasets": str(path)})
