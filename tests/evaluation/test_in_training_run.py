"""A training run that evaluates itself, from the command line."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from clip_pgs.evaluation.__main__ import main as evaluate
from clip_pgs.evaluation.report.gather import gather_runs
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
        given = {"train_data": train_data, "epochs": 3, **evaluation, **options}
        return flags(tmp_path, **given)

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


def test_each_evaluation_tells_the_training_until_then(argv, tmp_path, caplog):
    assert main(argv(eval_every=1)) == 0
    folder = tmp_path / "logs/run"
    for epoch in (1, 2, 3):
        path = folder / f"eval/epoch_{epoch}/zeroshot_classification_six.json"
        told = json.loads(path.read_text())["training"]
        assert (told["cost"]["steps"], told["cost"]["samples"]) == (4 * epoch, 32 * epoch)
        saved = torch.load(folder / f"checkpoints/epoch_{epoch}.pt")["clip_pgs"]
        assert told["recipe"] == json.loads(json.dumps(saved["recipe"], default=str))
        assert saved["metrics"]
        assert "metrics" not in told
    # As a run that stopped later, and has no checkpoint of this epoch.
    (folder / "checkpoints/epoch_1.pt").unlink()
    for epoch in (2, 3):
        shutil.rmtree(folder / f"eval/epoch_{epoch}")
    caplog.clear()
    (found,) = gather_runs([folder])
    assert (found.training.samples, found.training.seed) == (32, 0)
    assert found.training.flops
    assert "not told" not in caplog.text


def test_an_evaluation_without_training_tells_that_of_its_checkpoint(argv, tmp_path):
    assert main(argv(eval_suite=None, eval_datasets=None, eval_data_root=None)) == 0
    checkpoint = tmp_path / "logs/run/checkpoints/epoch_2.pt"
    held_out = tmp_path / "train/00000.tar"
    assert main(argv(train_data=None, val_data=held_out, name="again", resume=checkpoint)) == 0
    path = tmp_path / "logs/again/eval/epoch_2/zeroshot_classification_six.json"
    assert json.loads(path.read_text())["training"]["cost"]["steps"] == 8


def test_a_run_that_goes_on_tells_other_data_of_its_evaluation(argv, tmp_path, caplog, data_root):
    root = shutil.copytree(data_root, tmp_path / "sets")
    options = {"eval_data_root": root, "resume": "latest"}
    assert main(argv(epochs=1, **options)) == 0
    assert main(argv(epochs=2, **options)) == 0
    assert "other data" not in caplog.text
    shutil.copy(root / "six/test/1.tar", root / "six/test/0.tar")
    assert main(argv(epochs=3, **options)) == 0
    (told,) = [r.getMessage() for r in caplog.records if "other data" in r.getMessage()]
    assert "zeroshot-classification/six" in told
    table = (tmp_path / "logs/run/out.log").read_text().rpartition("best so far")[2]
    assert "acc1" in table
    assert "after epoch" not in table
    (found,) = gather_runs([tmp_path / "logs/run"])
    assert list(found.epochs) == [3]


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
