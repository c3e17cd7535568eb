"""What a report makes of the evaluations that runs made of themselves in training."""

import json

import pytest
import torch

from clip_pgs.evaluation.report.command import write_report
from clip_pgs.evaluation.report.figures import make_panel
from clip_pgs.evaluation.report.gather import gather_runs, group_by_seed
from support.reports import Page, make_result, save_checkpoint, save_results, save_run


def save_epochs(run, *, scores, **changes):
    """Write what a run scored on `shape` and `color` after each epoch, as training does."""
    for epoch, values in scores.items():
        place = f"epoch_{epoch}"
        common = {"model": place, "pretrained": f"{run} after {epoch} epochs", **changes}
        digest = f"{run.name} {epoch}"
        results = [
            make_result(name, metrics={"acc1": value}, **{"weights_digest": digest, **common})
            for name, value in zip(("shape", "color"), values, strict=False)
        ]
        save_results(run / "eval" / place, results)


@pytest.mark.parametrize("inside", ["", "eval", ".."])
def test_epochs_of_an_evaluated_run_are_no_models_of_their_own(tmp_path, inside):
    run = save_run(tmp_path / "logs")
    save_epochs(run, scores={1: (0.1, 0.2), 10: (0.5, 0.6), 9: (0.4, 0.5)})
    (found,) = gather_runs([run / inside])
    assert found.name == "demo_0"
    assert {result.weights_digest for result in found.results} == {"d0"}
    assert list(found.epochs) == [1, 9, 10]


@pytest.mark.parametrize("inside", ["", "eval", ".."])
def test_the_last_epoch_stands_for_a_run_that_was_not_evaluated_since(tmp_path, inside):
    run = tmp_path / "logs" / "mine"
    digest = save_checkpoint(run, seed=3)
    save_epochs(run, scores={1: (0.1, 0.2), 4: (0.4, 0.5)})
    save_epochs(run, scores={5: (0.5, 0.6)}, weights_digest=digest)
    # Where it was told to leave, after it was evaluated.
    checkpoint = torch.load(run / "checkpoints/epoch_5.pt")
    later = {**checkpoint, "state_dict": {"weight": torch.ones(2)}, "step": 7}
    torch.save(later, run / "checkpoints/step_7.pt")
    (found,) = gather_runs([run / inside])
    assert (found.name, found.training.seed) == ("mine", 3)
    scores = {result.dataset: result.metrics["acc1"] for result in found.results}
    assert scores == {"shape": 0.5, "color": 0.6}


def test_an_epoch_that_is_asked_for_by_its_folder_is_shown(tmp_path):
    run = save_run(tmp_path / "logs")
    save_epochs(run, scores={1: (0.1, 0.2), 2: (0.5, 0.6)})
    (found,) = gather_runs([run / "eval" / "epoch_1"])
    assert (found.name, found.weights_digest) == ("epoch_1", "demo_0 1")


def test_a_checkpoint_called_by_its_epoch_is_a_model(tmp_path):
    for name in ("epoch_1", "epoch_2"):
        save_results(tmp_path / name, [make_result("shape", model=name, weights_digest=name)])
    assert [run.name for run in gather_runs([tmp_path])] == ["epoch_1", "epoch_2"]


def test_a_folder_without_results_in_any_epoch_is_told(tmp_path):
    run = tmp_path / "run"
    save_checkpoint(run)
    (run / "eval" / "epoch_1").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no results"):
        gather_runs([run])


def test_a_curve_is_the_mean_over_shared_sets_and_seeds(tmp_path):
    # After two epochs the first seed lacks `color`: what all have is `shape` alone.
    for number, scores in enumerate(
        [{1: (0.1, 0.9), 2: (0.2,), 3: (0.5, 0.9)}, {1: (0.3, 0.9), 3: (0.6, 0.9), 4: (0.7, 0.9)}]
    ):
        save_epochs(save_run(tmp_path, number), scores=scores)
    models = group_by_seed(gather_runs([tmp_path]))
    panel = make_panel("zeroshot-classification", models)
    assert panel.title == "Zero-shot classification, 1 of 2 sets"
    assert panel.lines == [("demo", [(1, pytest.approx(20)), (3, pytest.approx(55))])]
    assert make_panel("linear-probe", models) is None


@pytest.mark.parametrize(
    ("before", "after", "epochs"),
    [
        ({"data_digest": "a"}, {"data_digest": "a"}, [1, 2, 3, 4]),
        ({"data_digest": "a"}, {"data_digest": "b"}, [3, 4]),
        ({"samples": 60, "data_digest": "a"}, {"samples": 10}, [3, 4]),
        # Of an earlier version.
        ({}, {"data_digest": "b"}, [1, 2, 3, 4]),
    ],
)
def test_a_curve_joins_scores_of_the_same_data_alone(tmp_path, caplog, before, after, epochs):
    run = save_run(tmp_path)
    save_epochs(run, scores={1: (0.1, 0.2), 2: (0.2, 0.3)}, **before)
    save_epochs(run, scores={3: (0.5, 0.6), 4: (0.6, 0.7)}, **after)
    panel = make_panel("zeroshot-classification", group_by_seed(gather_runs([tmp_path])))
    ((_, points),) = panel.lines
    assert [epoch for epoch, _ in points] == epochs
    told = [r.getMessage() for r in caplog.records if "other data" in r.getMessage()]
    assert len(told) == (len(epochs) < 4)
    assert all("shape" in each and "color" in each and "epoch 2" in each for each in told)


@pytest.mark.parametrize(
    ("changes", "samples"),
    [
        ({}, [64, 128, 192]),
        ({"num_samples": 40}, [128, 192]),
        ({"data": {"val_data": "a"}}, [128, 192]),
        ({"batch_size": 4}, [128, 192]),
    ],
)
def test_the_curve_of_a_validation_loss_is_of_the_same_data(tmp_path, caplog, changes, samples):
    run = save_run(tmp_path)
    line = {"kind": "val", "num_samples": 19, "batch_size": 8, "data": {"val_data": "b"}}
    lines = [
        {**line, **(changes if number == 1 else {}), "samples": 64 * number, "clip_val_loss": 2.5}
        for number in (1, 2, 3)
    ]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (run / "metrics.jsonl").write_text(text + '{"kind": "train", "samples": 192, "loss": 1}\n')
    (found,) = gather_runs([run])
    assert [x for x, _ in found.curve("clip_val_loss")] == samples
    assert found.curve("loss") == [(192, 1)]
    assert ("validation loss" in caplog.text) == (len(samples) < 3)


def test_scores_of_the_end_of_training_stand_beside_later_ones_of_the_same_weights(tmp_path):
    run = tmp_path / "mine"
    digest = save_checkpoint(run, seed=3)
    save_epochs(run, scores={4: (0.3, 0.4)})
    save_epochs(run, scores={5: (0.5, 0.6)}, weights_digest=digest)
    later = {"model": "mine", "weights_digest": digest, "pretrained": str(run / "export")}
    results = [
        make_result("shape", metrics={"acc1": 0.7}, **later),
        make_result("color", metrics={"acc1": 0.2}, inference_masking="pgs 0.5", **later),
    ]
    save_results(run / "eval", results)
    runs = {found.inference_masking: found for found in gather_runs([run])}
    names = sorted(found.name for found in runs.values())
    assert names == ["mine", "mine, through pgs 0.5"]
    scores = {result.dataset: result.metrics["acc1"] for result in runs[""].results}
    assert scores == {"shape": 0.7, "color": 0.6}
    # Where the later evaluation was of a mask alone.
    (run / "eval").rename(tmp_path / "eval")
    save_epochs(run, scores={5: (0.5, 0.6)}, weights_digest=digest)
    save_results(run / "eval", results[1:])
    assert sorted(found.inference_masking for found in gather_runs([run])) == ["", "pgs 0.5"]


@pytest.mark.parametrize("status", ["missing", "failed"])
def test_a_later_try_without_a_number_does_not_hide_the_score_of_the_end_of_training(
    tmp_path, caplog, status
):
    run = tmp_path / "mine"
    digest = save_checkpoint(run, seed=3)
    save_epochs(run, scores={5: (0.5, 0.6)}, weights_digest=digest)
    later = {"model": "mine", "weights_digest": digest, "date": "2026-12-01"}
    lacking = make_result("shape", status=status, samples=0, **later)
    # Those of one set differ by rounding, and are one score.
    save_results(run / "eval", [lacking, make_result("color", metrics={"acc1": 0.601}, **later)])
    (found,) = gather_runs([run])
    assert {r.dataset: r.metrics["acc1"] for r in found.results} == {"shape": 0.5, "color": 0.601}
    assert not caplog.messages


def test_the_epoch_that_holds_scores_of_the_newest_weights_is_named(tmp_path, caplog):
    run = save_run(tmp_path)
    digest = save_checkpoint(run, samples=70_000)
    record = torch.load(run / "checkpoints/epoch_5.pt")["clip_pgs"]
    save_epochs(run, scores={6: (0.4, 0.5)})
    assert gather_runs([run])[0].weights_digest == "d0"
    said = "with the same --datasets and --data-root as before score those"
    assert caplog.messages[0].endswith(said)
    caplog.clear()
    save_epochs(run, scores={7: (0.5, 0.6)}, weights_digest=digest, training=record)
    assert gather_runs([run])[0].weights_digest == "d0"
    (said,) = caplog.messages
    assert said.endswith(f", and {run}/eval/epoch_7 holds what they scored in training")


@pytest.mark.slow
@pytest.mark.parametrize(("epochs", "is_shown"), [((1, 2), True), ((2,), False)])
def test_a_curve_of_two_points_or_more_is_drawn(tmp_path, epochs, is_shown):
    run = save_run(tmp_path / "logs")
    save_epochs(run, scores={epoch: (0.1 * epoch,) for epoch in epochs})
    report = write_report([run], tmp_path / "report")
    assert (report / "figures/epochs.svg").is_file() == is_shown
    assert ("figures/epochs.png" in (report / "report.md").read_text()) == is_shown
    page = Page((report / "report.html").read_text())
    assert ("evaluations in training" in page.text) == is_shown
    assert "epoch_" not in (report / "results.csv").read_text()
