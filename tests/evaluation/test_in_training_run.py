"""A training run that evaluates itself, from the command line."""

import json
from pathlib import Path

import pytest

from clip_pgs.evaluation.__main__ import main as evaluate
from clip_pgs.training.__main__ import main
from support.runs import flags, write_shards


@pytest.fixture
def argv(tmp_path, dataset_list, data_root):
    """Return what gives the command line of a run of three epochs, with some options more."""
    train_data = write_shards(tmp_path / "train")

    def command(**options):
        evaluation = {
            "eval_suite": "zeroshot-classification",
            "eval_datasets": dataset_list,
            "eval_data_root": data_root,
        }
        return flags(tmp_path, train_data=train_data, epochs=3, **{**evaluation, **options})

    return command


def test_a_run_scores_a_suite_every_n_epochs_and_at_the_end(argv, tmp_path):
    assert main(argv(eval_every=2)) == 0
    folder = tmp_path / "logs/run"
    assert sorted(path.name for path in (folder / "eval").iterdir()) == ["epoch_2", "epoch_3"]
    content = json.loads((folder / "eval/epoch_3/zeroshot_classification_six.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = {line["epoch"]: line for line in lines if line["kind"] == "val"}
    assert sorted(curve) == [2, 3]
    assert curve[3]["zeroshot-classification/six/acc1"] == content["metrics"]["acc1"]


@pytest.mark.slow
def test_evaluation_through_the_runs_own_mask_equals_that_of_the_finished_run(
    argv, tmp_path, capsys, dataset_list, data_root
):
    mask = {"masking": "pgs", "mask_ratio": 0.5, "eval_inference_masking": "run"}
    assert main(argv(eval_every=3, **mask)) == 0
    folder = tmp_path / "logs/run"
    name = "zeroshot_classification_six@pgs_0.5.json"
    (path,) = folder.glob("eval/epoch_3/*.json")
    assert path.name == name
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (curve,) = [line for line in lines if line["kind"] == "val"]
    in_training = json.loads(path.read_text())
    assert curve["zeroshot-classification@run/six/acc1"] == in_training["metrics"]["acc1"]
    sets = ["--datasets", str(dataset_list), "--data-root", str(data_root), "--no-report"]
    command = [str(folder), *sets, "--workers", "0", "--inference-masking", "run"]
    assert evaluate([*command, "--suite", "zeroshot-classification"]) == 0
    afterwards = json.loads((folder / "eval" / name).read_text())
    for fact in ("metrics", "inference_masking", "flops_per_image", "weights_digest"):
        assert afterwards[fact] == in_training[fact]
    card = (folder / "export/README.md").read_text()
    assert "--inference-masking pgs --inference-mask-ratio 0.5\n" in card


@pytest.mark.slow
def test_evaluation_changes_nothing_that_is_trained(argv, tmp_path):
    losses = []
    for name, suite in (("with", "zeroshot-classification"), ("without", None)):
        masked = {"masking": "cluster", "eval_inference_masking": "run"}
        assert main(argv(name=name, eval_suite=suite, **masked)) == 0
        text = Path(tmp_path, "logs", name, "metrics.jsonl").read_text()
        entries = [json.loads(line) for line in text.splitlines()]
        losses.append([entry["loss"] for entry in entries if entry["kind"] == "train"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"eval_suite": "zeroshot"}, "unknown suite 'zeroshot'"),
        ({"eval_datasets": "no_list.txt"}, "unknown data set list 'no_list.txt'"),
        ({"eval_every": 0}, "eval_every must be >= 1, got 0"),
        ({"eval_inference_masking": "pqs"}, "unknown masking 'pqs'"),
        ({"eval_inference_mask_ratio": 0.5}, "needs a masking's name"),
    ],
)
def test_bad_request_is_refused_before_anything_is_created(
    argv, tmp_path, capsys, options, sentence
):
    assert main(argv(**options)) == 2
    assert sentence in capsys.readouterr().err.replace("--eval-every", "eval_every")
    assert not (tmp_path / "logs").exists()


def test_flags_of_evaluation_without_a_suite_are_told_to_do_nothing(argv, caplog):
    assert main(argv(eval_suite=None, check_only=True)) == 0
    assert "--eval-datasets has no effect without --eval-suite" in caplog.text
