import csv
import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clip_pgs.checkpoint_reading import weights_digest
from clip_pgs.evaluation.command import inference_choice, make_parser
from clip_pgs.evaluation.masked_inference import masking_of
from clip_pgs.evaluation.report.command import write_report
from clip_pgs.evaluation.report.gather import Run, gather_runs, group_by_seed
from clip_pgs.evaluation.report.training_facts import TrainingFacts
from clip_pgs.evaluation.results import write_csv
from support.reports import demo_results, make_result, save_checkpoint, save_results, save_run


@pytest.mark.parametrize("inside", ["", "eval", "..", "eval/zeroshot-classification_shape.json"])
def test_run_is_found_from_any_of_its_folders_and_files(tmp_path, inside):
    run = save_run(tmp_path / "logs")
    (found,) = gather_runs([run / inside])
    assert found.name == "demo_0"
    assert found.training.samples == 60_000


def test_table_holds_what_the_files_hold(tmp_path):
    write_csv(demo_results(), tmp_path / "results.csv")
    (run,) = gather_runs([tmp_path / "results.csv"])
    assert [(r.suite, r.dataset, r.samples) for r in run.results] == [
        (r.suite, r.dataset, r.samples) for r in demo_results()
    ]
    assert [r.metrics for r in run.results] == [r.metrics for r in demo_results()]


def test_a_folder_with_a_table_alone_is_read(tmp_path):
    write_csv(demo_results(), tmp_path / "results.csv")
    (run,) = gather_runs([tmp_path])
    assert len(run.results) == len(demo_results())


@pytest.mark.parametrize("is_run", [True, False])
def test_a_folder_with_a_table_alone_is_read_beside_others(tmp_path, is_run):
    save_run(tmp_path)
    other = tmp_path / "other"
    results = demo_results(1, weights_digest=save_checkpoint(other) if is_run else "d1")
    place = other / "eval" if is_run else other
    place.mkdir(parents=True)
    write_csv(results, place / "results.csv")
    for source in (tmp_path, other):
        assert "demo_1" in {run.results[0].model for run in gather_runs([source])}


def test_tables_that_are_not_of_an_evaluation_are_left_in_their_folders(tmp_path, caplog):
    save_results(tmp_path / "eval", demo_results())
    for name, text in (("report", "kind,model,suite,sets\n"), ("study", "arm,evaluation,seed\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.csv").write_text(text)
    assert len(gather_runs([tmp_path])) == 1
    assert not caplog.messages
    write_csv(demo_results(1), tmp_path / "study/results.csv")
    with (tmp_path / "study/results.csv").open("a") as file:
        file.write("half a row")
    assert len(gather_runs([tmp_path])) == 1
    assert f"left out {tmp_path / 'study/results.csv'}: " in caplog.text


@pytest.mark.parametrize("has_files", [True, False])
def test_a_report_does_not_replace_the_table_of_an_evaluation(tmp_path, has_files):
    table = tmp_path / "results.csv"
    write_csv(demo_results(), table)
    if has_files:
        save_results(tmp_path, demo_results())
    before = table.read_bytes()
    with pytest.raises(ValueError, match=r"holds an evaluation, whose results\.csv"):
        write_report([tmp_path], tmp_path)
    assert table.read_bytes() == before


@pytest.mark.parametrize("status", ["weird", "", "DONE"])
def test_a_result_of_an_unknown_status_is_left_out_and_named(tmp_path, caplog, status):
    results = [make_result("good"), make_result("odd", status=status)]
    save_results(tmp_path / "files", results)
    write_csv(results, tmp_path / "results.csv")
    for source in (tmp_path / "files", tmp_path / "results.csv"):
        (run,) = gather_runs([source])
        assert [result.dataset for result in run.results] == ["good"]
    assert caplog.text.count(f"status {status!r}") == 2


def test_later_result_replaces_an_earlier_one_of_the_same_weights_and_says_so(tmp_path, caplog):
    for folder, date, acc1 in (("old", "2026-01-01", 0.1), ("new", "2026-02-01", 0.2)):
        save_results(tmp_path / folder, [make_result("shape", metrics={"acc1": acc1}, date=date)])
    (run,) = gather_runs([tmp_path / "new", tmp_path / "old"])
    assert [result.metrics for result in run.results] == [{"acc1": 0.2}]
    assert f"{tmp_path / 'old'} has other scores of demo on shape" in caplog.text
    assert "those of 2026-02-01 count" in caplog.text


def test_a_table_has_no_other_scores_than_the_files_it_was_made_from(tmp_path, caplog):
    results = [make_result("shape", metrics={"acc1": 0.1, "acc5": None})]
    save_results(tmp_path / "files", results)
    write_csv(results, tmp_path / "results.csv")
    gather_runs([tmp_path / "files", tmp_path / "results.csv"])
    assert caplog.text == ""
    write_csv([replace(results[0], metrics={"acc1": 0.2})], tmp_path / "results.csv")
    gather_runs([tmp_path / "files", tmp_path / "results.csv"])
    assert f"{tmp_path / 'results.csv'} has other scores of demo on shape" in caplog.text


@pytest.mark.parametrize("is_table_first", [True, False])
@pytest.mark.parametrize("tells", [{"details": {"classes": 12}}, {"data_digest": "a"}])
def test_a_table_takes_not_the_place_of_the_file_it_was_made_from(tmp_path, tells, is_table_first):
    results = [make_result("shape", metrics={"acc1": 0.1}, **tells)]
    save_results(tmp_path / "files", results)
    write_csv(results, tmp_path / "results.csv")
    sources = [tmp_path / "files", tmp_path / "results.csv"]
    (run,) = gather_runs(sources[::-1] if is_table_first else sources)
    (result,) = run.results
    assert {name: getattr(result, name) for name in tells} == tells
    # A later one does.
    write_csv([replace(results[0], date="2027-01-01")], tmp_path / "results.csv")
    (run,) = gather_runs(sources)
    assert run.results[0].date == "2027-01-01"


def test_what_is_done_counts_before_a_later_try_that_failed(tmp_path, caplog):
    save_results(tmp_path / "old", [make_result("shape", metrics={"acc1": 0.1}, date="2026-01-01")])
    failed = make_result("shape", status="failed", samples=0, date="2026-02-01")
    save_results(tmp_path / "new", [failed])
    for sources in (("old", "new"), ("new", "old")):
        (run,) = gather_runs([tmp_path / source for source in sources])
        assert [result.status for result in run.results] == ["done"]
    assert not caplog.messages


def test_models_that_were_scored_on_other_numbers_of_samples_are_told(tmp_path, caplog):
    save_results(tmp_path / "a", [make_result("shape"), make_result("color")])
    other = [make_result("shape", samples=36, weights_digest="d1")]
    save_results(tmp_path / "b", [*other, make_result("color", weights_digest="d1")])
    assert len(gather_runs([tmp_path / "a", tmp_path / "b"])) == 2
    said = "shape (zeroshot-classification) was scored with 36 and 600 samples"
    assert said in caplog.text
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("digests", "is_told"),
    [(("a", "b"), True), (("a", "a"), False), (("a", ""), False), (("", ""), False)],
)
def test_models_that_were_scored_on_other_data_of_one_name_are_told(
    tmp_path, caplog, digests, is_told
):
    for number, digest in enumerate(digests):
        result = make_result(
            "shape",
            metrics={"acc1": 0.5},
            model=f"m{number}",
            weights_digest=f"d{number}",
            data_digest=digest,
        )
        save_results(tmp_path / f"run_{number}" / "eval", [result])
    gather_runs([tmp_path])
    said = "shape (zeroshot-classification) was scored on other data for m1 than for m0"
    assert (said in caplog.text) == is_told


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"inference_masking": "pgs 0.5"}, ("five", "five, through pgs 0.5")),
        ({"weights_digest": "d1"}, ("five @d0", "five @d1")),
    ],
)
def test_models_of_one_name_that_were_scored_on_other_data_are_told_apart(
    tmp_path, caplog, changed, names
):
    for number, change in enumerate(({}, changed)):
        result = make_result(
            "shape",
            metrics={"acc1": 0.5},
            data_digest=f"data {number}",
            **{"model": "five", "weights_digest": "d0", **change},
        )
        save_results(tmp_path / f"run_{number}" / "eval", [result])
    gather_runs([tmp_path])
    assert f"on other data for {names[1]} than for {names[0]}: " in caplog.text


def test_scores_that_differ_are_told_with_the_mask_that_they_were_made_through(tmp_path, caplog):
    for number in range(2):
        metrics = {"acc1": 0.5 + number / 4}
        result = make_result("shape", metrics=metrics, inference_masking="pgs 0.5", model="five")
        save_results(tmp_path / f"run_{number}" / "eval", [result])
    gather_runs([tmp_path])
    assert "has other scores of five, through pgs 0.5 on shape" in caplog.text


def test_results_of_weights_that_a_run_has_no_more_are_left_out(tmp_path):
    run = save_run(tmp_path)
    old = make_result("gone", weights_digest="old", date="2026-01-01T00:00:00+00:00")
    save_results(run / "eval", [old])
    (found,) = gather_runs([run])
    assert "gone" not in [result.dataset for result in found.results]


@pytest.mark.parametrize(
    ("mask", "flags"),
    [
        ("", ""),
        ("pgs 0.5", "--inference-masking pgs --inference-mask-ratio 0.5"),
        ("attentive 0.5 merge=2x2 as trained", "--inference-masking run"),
        (
            "pgs 0.3-0.6 edges=False merge=2x2 merge_counts=True",
            "--inference-masking pgs --inference-mask-ratio 0.6 --inference-merge 2x2 "
            "--inference-merge-counts --inference-masking-option mask_ratio_min=0.3 edges=False",
        ),
    ],
)
def test_scores_of_weights_before_are_told_once_with_the_command_for_new_ones(
    tmp_path, caplog, mask, flags
):
    run = save_run(tmp_path)
    place = {"weights_digest": "old", "date": "2026-01-01", "inference_masking": mask}
    old = [make_result(name, **place) for name in ("gone", "other")]
    failed = make_result("third", status="failed", **place)
    save_results(run / "eval", [*old, failed])
    names = {found.name for found in gather_runs([run, run / "eval", tmp_path])}
    assert names == {"demo_0"}
    (said,) = caplog.messages
    through = f" through {mask}" if mask else ""
    command = f"clip-pgs test {run} --suite zeroshot-classification {flags}".rstrip()
    assert said == (
        f"{run}/eval holds scores of other weights than its latest, which the report leaves out: "
        f"gone and other{through} (`{command}` with the same --datasets and --data-root as before "
        "scores them anew)"
    )
    if "run" not in flags:
        name, options = inference_choice(make_parser().parse_args(command.split()[2:]))
        asked = masking_of(name, options, told={}, weights="", progress=1.0, state={})
        assert (asked.label if asked else "") == mask


def test_weights_that_could_not_be_scored_do_not_hide_the_scores_of_those_before(tmp_path, caplog):
    run = save_run(tmp_path)
    later = {"weights_digest": "new", "date": "2026-12-01", "training": {"recipe": {"seed": 1}}}
    missing = [make_result(name, status="missing", samples=0, **later) for name in ("gone", "lost")]
    save_results(run / "eval", missing)
    (found,) = gather_runs([run])
    assert found.weights_digest == "d0"
    assert not caplog.messages
    # Where they have a score, the report is on them, and says what they lack.
    save_results(run / "eval", [make_result("six", **later)])
    (found,) = gather_runs([run])
    statuses = {result.dataset: result.status for result in found.results}
    assert statuses == {"six": "done", "gone": "missing", "lost": "missing"}
    assert "leaves out" in caplog.text


@pytest.mark.parametrize("source", ["", "eval", ".."])
def test_a_damaged_result_is_told_once_wherever_it_lies(tmp_path, caplog, source):
    run = save_run(tmp_path)
    masked = make_result("masked", inference_masking="pgs 0.5")
    save_results(run / "eval", [masked])
    places = [run / place for place in ("eval", "eval/epoch_1", "eval/epoch_2")]
    for place in places:
        save_results(place, [make_result("good")])
        (place / "cut.json").write_text("{")
    assert len(gather_runs([run / source, run / source])) == 2
    told = [Path(path).resolve() for path in re.findall(r"left out (\S+)/cut.json", caplog.text)]
    assert sorted(told) == places


def test_two_weights_of_one_name_are_two_models_told_apart(tmp_path):
    save_results(
        tmp_path,
        [
            make_result("shape", weights_digest="a" * 64),
            make_result("color", weights_digest="b" * 64),
        ],
    )
    assert {run.name for run in gather_runs([tmp_path])} == {"demo @aaaaaa", "demo @bbbbbb"}


def test_runs_of_one_name_in_folders_of_arms_are_called_by_both(tmp_path):
    runs = [(arm, number) for arm in ("random", "pgs") for number in (0, 1)]
    for place, (arm, number) in enumerate(runs):
        name = f"demo_{number}"
        result = make_result("shape", model=name, weights_digest=f"{place}" * 8)
        save_run(tmp_path / arm, number, results=[result])
    found = gather_runs([tmp_path / arm / f"demo_{number}" for arm, number in runs])
    assert [run.name for run in found] == [f"{arm}/demo_{number}" for arm, number in runs]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ({"note.txt": "nothing"}, "holds no results"),
        ({"a.json": '{"weights_digest": "x"}'}, "holds no results"),
    ],
)
def test_folder_without_results_is_an_error_that_names_it(tmp_path, content, message):
    folder = tmp_path / "place"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        gather_runs([folder])
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("models/hf_mae", "hf_mae"),
        ("models/hf_mae/export", "hf_mae"),
        ("models/lone.pt", "lone"),
        ("logs/a/checkpoints/epoch_1.pt", "a_epoch_1"),
        ("hf-hub:someone/some-model", "some-model"),
    ],
)
def test_a_model_that_is_no_run_is_told_where_its_results_are(tmp_path, monkeypatch, source, name):
    monkeypatch.chdir(tmp_path)
    if source.endswith(".pt"):
        Path(source).parent.mkdir(parents=True)
        Path(source).write_bytes(b"PK\x03\x04\xff")
    elif ":" not in source:
        Path(source).mkdir(parents=True)
    folder = f"eval_results/{name}"
    with pytest.raises(ValueError, match=source) as caught:
        gather_runs([source])
    assert folder not in str(caught.value)
    save_results(tmp_path / folder, [make_result("shape")])
    with pytest.raises(ValueError, match=f"{source}.*; those of the model are in {folder}, name "):
        gather_runs([source])
    assert len(gather_runs([folder])) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.json", "[1]"), ("a.json", "{"), ("a.csv", "x,y\n1,2\n"), ("a.csv", "")],
)
def test_file_that_is_no_result_is_an_error(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"is no (result|table) of an evaluation"):
        gather_runs([tmp_path / name])


def test_facts_come_from_the_record_of_the_checkpoint(tmp_path):
    (run,) = gather_runs([save_run(tmp_path, number=2)])
    facts = run.training
    assert (facts.architecture, facts.masking, facts.seed) == ("demo_vit", "pgs 0.5", 2)
    assert (facts.flops, facts.seconds) == (4.4e13, 185.0)
    assert facts.hardware == "1 x AMD EPYC (2 threads)"
    assert facts.short_data == "demo/train"


def test_facts_come_from_the_logs_where_the_checkpoint_is_gone(tmp_path):
    run = tmp_path / "demo_0"
    save_results(run / "eval", demo_results())
    options = {
        "model": "ViT-B-16",
        "train_data": "data/cc12m/cc12m-train-{0000..2175}.tar",
        "masking": "pgs",
        "masking_options": {"mask_ratio": 0.5, "mask_ratio_min": 0.3, "edges": False},
        "seed": 4,
    }
    (run / "options.json").write_text(json.dumps(options))
    last = json.dumps({"kind": "train", "step": 9, "samples": 640, "flops": 2.5e9})
    (run / "metrics.jsonl").write_text(f'{{"samples": 64, "flops": 1e8}}\n{last}\n{{"kind": "tr')
    (found,) = gather_runs([run])
    facts = found.training
    assert (facts.samples, facts.flops, facts.seconds) == (640, 2.5e9, None)
    assert (facts.masking, facts.seed) == ("pgs 0.3-0.5 edges=False", 4)
    assert facts.short_data == "data/cc12m"
    (run / "options.json").write_text(json.dumps({**options, "merge": "2x2"}))
    (found,) = gather_runs([run])
    assert found.training.masking == "pgs 0.3-0.5 edges=False merge=2x2"


SCHEDULE = {"mask_schedule": "linear", "mask_ratio_end": 0.25, "mask_schedule_steps": 3}
TEXT = {"text_masking": "frequency", "text_tokens": 8}
MAE = {"model_type": "vit_mae", "mask_ratio": 0.75}


@pytest.mark.parametrize(
    ("options", "masking"),
    [
        (SCHEDULE, "pgs 0.5 to 0.25 (linear, 3 levels)"),
        ({**SCHEDULE, "unmasked_epochs": 1}, "pgs 0.5 to 0.25 (linear, 3 levels), then 1 epoch"),
        ({"unmasked_epochs": 2}, "pgs 0.5, then 2 epochs unmasked"),
        ({"train_image_size": 112}, "pgs 0.5 at 112 pixels"),
        ({"masking": "none", "masking_options": {}, **TEXT}, "none + text frequency 8 tokens"),
        (
            {**TEXT, "text_masking_options": {"frequencies": "a/w.json"}},
            "tokens frequencies=w.json",
        ),
        ({"masking": "none", "masking_options": {}, "force_patch_dropout": 0.5}, "dropout=0.5"),
        ({"mae": MAE, "mae_sign": "hide", "masking_options": {}}, "pgs 0.75 mae_sign=hide"),
        ({"mae": MAE, "mae_sign": "keep"}, "pgs 0.5"),
        ({"mae_sign": "hide"}, "pgs 0.5"),
    ],
)
def test_a_masking_is_named_with_all_that_makes_the_training_another_one(
    tmp_path, options, masking
):
    recorded = {name: options[name] for name in ("masking", "masking_options") if name in options}
    if "text_masking" in options:
        recorded["text_masking"] = options["text_masking"]
    recipe = {"seed": 0, **{n: v for n, v in options.items() if n not in ("masking", "mae")}}
    recorded |= {"recipe": recipe, "options": options}
    if "mae" in options:
        recorded["open_clip_config"] = {"model_cfg": options["mae"]}
        recorded["options"] = {**options, "mae": {"model_type": "vit_mae"}}
    (found,) = gather_runs([save_run(tmp_path, **recorded)])
    assert masking in found.training.masking
    run = tmp_path / "logs"
    save_results(run / "eval", demo_results())
    saved = {"masking": "pgs", "masking_options": {"mask_ratio": 0.5}, **options}
    (run / "options.json").write_text(json.dumps(saved))
    (found_in_logs,) = gather_runs([run])
    assert found_in_logs.training.masking == found.training.masking


@pytest.mark.parametrize(
    ("was", "now", "masking"),
    [
        (
            {**SCHEDULE, "mask_schedule_steps": 4},
            {},
            "pgs 0.5 to 0.25 (linear, 4 levels), then pgs 0.5",
        ),
        (
            {"mask_schedule": "constant", "mask_ratio_end": None},
            {**SCHEDULE, "unmasked_epochs": 2},
            "pgs 0.5, then pgs 0.5 to 0.25 (linear, 3 levels), then 2 epochs unmasked",
        ),
        ({"masking": "random"}, {"unmasked_epochs": 2}, "random 0.5, then pgs 0.5, then 2 epochs"),
        ({"unmasked_epochs": 0}, {"unmasked_epochs": 2}, "pgs 0.5, then 2 epochs unmasked"),
        ({"text_masking": "none"}, TEXT, "pgs 0.5, then pgs 0.5 + text frequency 8 tokens"),
        (
            {"masking_options": {}},
            {"mae": MAE, "mae_sign": "hide"},
            "pgs 0.75 mae_sign=hide, then pgs 0.5 mae_sign=hide",
        ),
    ],
)
def test_maskings_that_were_changed_stand_one_after_the_other(tmp_path, was, now, masking):
    recipe = {"seed": 0, **now}
    config = {"model_cfg": {**MAE, "mask_ratio": 0.5} if "mae" in now else {}}
    options = {**now, "mask_schedule_steps": 3, "changes": [[9, was]]}
    run = save_run(tmp_path, recipe=recipe, open_clip_config=config, options=options)
    (found,) = gather_runs([run])
    assert found.training.masking.startswith(masking)


@pytest.mark.parametrize("place", ["run/checkpoints/epoch_5.pt", "run/export"])
def test_facts_are_those_of_the_weights_that_were_scored_alone(tmp_path, caplog, place):
    weights = {"pretrained": str(tmp_path / place)}
    digest = save_checkpoint(tmp_path / "run", samples=12_000)
    (tmp_path / "run/export").mkdir()
    save_results(tmp_path / "elsewhere", demo_results(weights_digest=digest, **weights))
    # A table tells nothing of the training.
    (tmp_path / "theirs").mkdir()
    write_csv(demo_results(weights_digest="0", **weights), tmp_path / "theirs/results.csv")
    (mine,) = gather_runs([tmp_path / "elsewhere"])
    assert (mine.training.samples, mine.training.seed) == (12_000, 0)
    assert not caplog.messages
    (theirs,) = gather_runs([tmp_path / "theirs"])
    assert theirs.training == TrainingFacts()
    # The run trains on, into the same file.
    save_checkpoint(tmp_path / "run", samples=36_000)
    (mine,) = gather_runs([tmp_path / "elsewhere"])
    assert mine.training == TrainingFacts()
    assert len(caplog.messages) == 2
    assert all(weights["pretrained"] in message for message in caplog.messages)


def test_results_of_a_run_that_trained_on_are_not_told_its_later_training(tmp_path):
    digest = save_checkpoint(tmp_path / "run", samples=12_000)
    save_results(tmp_path / "run/eval", demo_results(weights_digest=digest))
    save_checkpoint(tmp_path / "run", samples=36_000)
    (found,) = gather_runs([tmp_path / "run"])
    assert found.training.samples is None


def test_a_result_tells_its_training_whatever_became_of_the_weights(tmp_path, caplog):
    run = save_run(tmp_path, samples=12_000)
    save_checkpoint(run, samples=36_000)
    (found,) = gather_runs([run])
    assert found.training.samples == 12_000
    (run / "checkpoints/epoch_5.pt").unlink()
    caplog.clear()
    assert gather_runs([run])[0].training == found.training
    assert not caplog.messages


def trained_on(run, digest, **changes):
    """Score a run's export, and let the run train on, or be trained otherwise."""
    save_checkpoint(run, samples=12_000)
    record = torch.load(run / "checkpoints/epoch_5.pt")["clip_pgs"]
    model = {"model": run.name, "pretrained": str(run / "export"), "training": record}
    save_results(run / "eval", [make_result("shape", weights_digest=digest, **model)])
    copy = run.parent / "c"
    shutil.copytree(run, copy)
    save_checkpoint(copy, **changes)
    return copy


@pytest.mark.parametrize("changes", [{"samples": 36_000}, {"samples": 12_000, "seed": 4}])
@pytest.mark.parametrize("is_done", [True, False])
def test_results_that_are_not_of_a_runs_newest_weights_are_told_once(
    tmp_path, caplog, changes, is_done
):
    run = tmp_path / "a"
    copy = trained_on(run, "d0", **changes)
    (copy / "exit.json").write_text(json.dumps({"code": 0 if is_done else 85}))
    (found,) = gather_runs([copy, run, copy / "eval"])
    # They are those of the run that they were copied from, and so is all else that is shown.
    assert (found.name, found.training.samples) == ("a", 12_000)
    (said, same) = caplog.messages
    assert same.startswith(f"{copy} and {run} have results of the same weights")
    assert re.match(
        f"the results in {copy}/eval are not of the newest weights of {copy}[,;] ", said
    )
    assert ("36,000 samples and not 12,000" in said) == ("seed" not in changes)
    place = "with the same --datasets and --data-root as before"
    assert re.search(rf"`clip-pgs test {copy}` {place} scores? those$", said)
    assert ("`clip-pgs export " in said) != is_done


def test_an_old_checkpoint_that_was_scored_on_purpose_keeps_its_name(tmp_path, caplog):
    run = save_run(tmp_path, results=[])
    record = torch.load(run / "checkpoints/epoch_5.pt")["clip_pgs"]
    record["cost"]["samples"] = 12_000
    place = {"pretrained": str(run / "checkpoints/epoch_1.pt"), "model": "demo_0_epoch_1"}
    save_results(run / "eval", [make_result("shape", training=record, **place)])
    (found,) = gather_runs([run])
    assert found.name == "demo_0_epoch_1"
    (said,) = caplog.messages
    assert "which saw 60,000 samples and not 12,000" in said


@pytest.mark.parametrize("has_checkpoints", [True, False])
def test_a_run_that_was_copied_or_moved_has_the_name_of_its_folder(
    tmp_path, caplog, has_checkpoints
):
    result = make_result("shape", model="demo_0", pretrained="logs/demo_0/export")
    run = save_run(tmp_path, results=[result])
    (run / "metrics.jsonl").write_text('{"step": 899, "samples": 60000}\n')
    (run / "options.json").write_text("{}")
    run.rename(tmp_path / "other")
    if not has_checkpoints:
        shutil.rmtree(tmp_path / "other/checkpoints")
    (found,) = gather_runs([tmp_path / "other"])
    assert found.name == "other"
    assert not caplog.messages
    # Without checkpoints, the measurements tell.
    (tmp_path / "other/metrics.jsonl").write_text('{"step": 999, "samples": 70000}\n')
    assert gather_runs([tmp_path / "other"])[0].name == ("other" if has_checkpoints else "demo_0")
    assert len(caplog.messages) == (0 if has_checkpoints else 1)
    caplog.clear()
    # A file that was cut short tells nothing.
    (tmp_path / "other/metrics.jsonl").write_text('{"step": 9, "samples": 600}\n')
    gather_runs([tmp_path / "other"])
    assert not caplog.messages


def test_a_checkpoint_that_is_gone_took_not_what_another_did(tmp_path):
    save_checkpoint(tmp_path / "run", samples=12_000)
    weights = str(tmp_path / "run/checkpoints/epoch_2.pt")
    save_results(tmp_path / "elsewhere", demo_results(pretrained=weights))
    (found,) = gather_runs([tmp_path / "elsewhere"])
    assert found.training == TrainingFacts()


@pytest.mark.parametrize(("name", "samples"), [("mean.pt", None), ("epoch_5.pt", 36_000)])
def test_weights_without_a_record_are_told_a_whole_run_only_at_its_end(tmp_path, name, samples):
    run = tmp_path / "run"
    save_checkpoint(run)
    (run / "options.json").write_text(json.dumps({"model": "ViT-B-16", "masking": "pgs"}))
    (run / "metrics.jsonl").write_text('{"step": 9, "samples": 36000, "flops": 2.5e9}\n')
    # Such as a mean of epochs, or what an earlier version saved.
    weights = {"weight": torch.full((1,), 7.0)}
    torch.save({"epoch": 5, "state_dict": weights}, run / "checkpoints" / name)
    scored = {"pretrained": f"{run}/checkpoints/{name}", "weights_digest": weights_digest(weights)}
    save_results(tmp_path / "results", demo_results(**scored))
    (found,) = gather_runs([tmp_path / "results"])
    assert found.training.samples == samples


def test_checkpoint_of_another_trainer_leaves_blanks(tmp_path):
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, tmp_path / "other.pt")
    results = demo_results(pretrained=str(tmp_path / "other.pt"))
    save_results(tmp_path / "results", results)
    (found,) = gather_runs([tmp_path / "results"])
    assert found.training.samples is None
    assert found.training.data == found.training.masking == ""


def models_of(tmp_path):
    return [(model.name, model.seeds) for model in group_by_seed(gather_runs([tmp_path]))]


def test_runs_that_differ_in_their_seed_alone_are_one_model(tmp_path):
    for number in range(3):
        save_run(tmp_path, number)
    assert models_of(tmp_path) == [("demo", [0, 1, 2])]


@pytest.mark.parametrize(
    "change",
    [
        {"masking": "random"},
        {"samples": 30_000, "cost": {"steps": 450, "samples": 30_000}},
        {"data": {"train_data": "data/other.tar"}},
        {"recipe": {"epochs": 6, "batch_size": 64, "seed": 1}},
    ],
)
def test_runs_that_differ_in_more_are_two_models(tmp_path, change):
    save_run(tmp_path, 0)
    save_run(tmp_path, 1, **change)
    assert models_of(tmp_path) == [("demo_0", [0]), ("demo_1", [1])]


@pytest.mark.parametrize(
    ("changes", "is_one"),
    [
        ([{"open_clip_config": {"model_cfg": {"embed_dim": n}}} for n in (8, 16)], False),
        ([{"options": {"beta2": n}} for n in (0.9, 0.98)], False),
        ([{"options": {"train_files": n}} for n in "ab"], False),
        ([{"options": {"changes": n}} for n in ([], [[9, {"epochs": 1}]])], False),
        # What one of an earlier version does not tell is not known to differ.
        ([{"options": {"beta2": 0.9}}, {}], True),
        ([{"options": {"train_data": n, "train_files": "same"}} for n in "ab"], True),
        ([{"data": {"train_data": f"/{n}/data/train/{{0..9}}.tar"}} for n in "ab"], True),
        ([{"data": {"train_data": "s3://x/t/0.tar", "pretrained": n}} for n in "ab"], False),
        ([{"data": {"train_data": f"s3://{n}/t/0.tar"}} for n in "ab"], False),
        ([{"device": n} for n in ("CPU", "GPU")], True),
    ],
)
def test_runs_are_one_model_where_all_that_they_tell_but_the_seed_and_places_is_equal(
    tmp_path, changes, is_one
):
    for number, change in enumerate(changes):
        save_run(tmp_path, number, **change)
    assert len(models_of(tmp_path)) == 2 - is_one


def test_options_of_runs_count_where_their_checkpoints_tell_less(tmp_path):
    for number in range(2):
        run = save_run(tmp_path, number)
        saved = {"seed": number, "batch_size": 64, "train_data": f"/{number}/a.tar", "launch": {}}
        (run / "options.json").write_text(json.dumps({**saved, "train_files": ["a.tar: 9 bytes"]}))
    assert len(models_of(tmp_path)) == 1
    saved = {"grad_clip_norm": 0.1, "batch_size": 64}
    for number in range(2):
        path = tmp_path / f"demo_{number}/options.json"
        path.write_text(json.dumps({**saved, "grad_clip_norm": 0.1 * number}))
    assert len(models_of(tmp_path)) == 2
    # It went on with other options since.
    path.write_text(json.dumps({**saved, "batch_size": 128, "grad_clip_norm": 0.2}))
    assert len(models_of(tmp_path)) == 1


def test_repetition_with_the_same_seed_is_no_second_seed(tmp_path):
    save_run(tmp_path, 0)
    run = tmp_path / "demo_1"
    digest = save_checkpoint(run, seed=0, device="another")
    save_results(run / "eval", demo_results(1, weights_digest=digest))
    assert models_of(tmp_path) == [("demo_0", [0]), ("demo_1", [0])]


def test_a_run_whose_first_steps_nobody_measured_does_not_look_cheap(tmp_path):
    spent = {"steps": 900, "samples": 60_000, "flops": 1e10, "seconds": 1.0}
    for number, unmeasured in enumerate((0, 450)):
        save_run(tmp_path, number, cost={**spent, "unmeasured_steps": unmeasured})
    (whole,), (continued,) = (gather_runs([tmp_path / f"demo_{number}"]) for number in range(2))
    assert (whole.training.flops, whole.training.seconds) == (1e10, 1.0)
    assert (continued.training.flops, continued.training.seconds) == (None, None)
    assert continued.training.samples == 60_000


@pytest.mark.usefixtures("without_pictures")
def test_a_report_tells_how_a_run_began_and_what_it_had_changed(tmp_path):
    changes = [[None, {"resume": "old/epoch_3.pt"}], [9, {"masking": "random", "lr": 0.1}]]
    run = save_run(
        tmp_path,
        masking="pgs",
        masking_options={},
        data={"train_data": "a.tar", "pretrained": "laion2b_e16"},
        options={"changes": [*changes, [12, {"train_files": "0f", "masking_options": {"a": 1}}]]},
    )
    (model,) = group_by_seed(gather_runs([run]))
    assert model.training.masking == "random a=1, then pgs a=1, then pgs"
    folder = write_report([run], tmp_path / "report")
    sentence = (
        "began with the weights laion2b_e16; went on from old/epoch_3.pt, of whose training "
        "nothing is known; had masking random, lr 0.1 until step 9; had other train_files, "
        "masking_options {'a': 1} until step 12"
    )
    shown = (folder / "report.md").read_text().replace("\\", "")
    assert f"demo_0 {sentence}." in shown
    rows = csv.DictReader((folder / "results.csv").open())
    assert {row["history"] for row in rows if row["kind"] == "run"} == {sentence}


def test_runs_of_the_same_weights_are_one_and_it_is_told(tmp_path, caplog):
    run = save_run(tmp_path)
    shutil.copytree(run, tmp_path / "copy")
    assert len(gather_runs([run, tmp_path / "copy"])) == 1
    (said,) = [record.message for record in caplog.records]
    copy = tmp_path / "copy"
    assert said == f"{run} and {copy} have results of the same weights: they are one run here"
    caplog.clear()
    # One run by two of its folders.
    assert len(gather_runs([run, run / "eval"])) == 1
    assert not caplog.records


def test_runs_of_unknown_recipe_are_never_merged(tmp_path):
    for number in range(2):
        save_results(tmp_path / f"demo_{number}", demo_results(number))
    assert models_of(tmp_path) == [("demo_0", []), ("demo_1", [])]


@pytest.mark.parametrize(
    ("names", "common"),
    [
        (("pgs_seed10", "pgs_seed11"), "pgs"),
        (("vit_b16_0", "vit_b16_1"), "vit_b16"),
        # As in a study, where the folder of the arm has its name.
        (("mine/pgs/seed_0", "mine/pgs/seed_1"), "pgs"),
        (("mine/pgs/0", "mine/pgs/1", "mine/pgs/10"), "pgs"),
        (("mine/pgs/seed_1", "mine/pgs/seed_12"), "pgs"),
        (("mine/pgs/seed_0",), "pgs/seed_0"),
        # A mean is that of no single run.
        ("ab", "a and 1 other"),
        (("alpha", "beta", "gamma"), "alpha and 2 others"),
    ],
)
def test_model_is_named_by_what_its_runs_have_in_common(tmp_path, names, common):
    for number, name in enumerate(names):
        run = tmp_path / name
        digest = save_checkpoint(run, seed=number)
        results = demo_results(model=run.name, weights_digest=digest)
        save_results(run / "eval", results)
    models = group_by_seed(gather_runs([tmp_path / name for name in names]))
    assert [model.name for model in models] == [common]


@pytest.mark.usefixtures("without_pictures")
def test_groups_of_seeds_of_one_name_are_told_apart(tmp_path):
    # Three recipes of two seeds each, and one whose name has a number of its own.
    names = [f"exp_{number}" for number in range(6)]
    for number, name in enumerate(["exp (2)", *names]):
        run = tmp_path / name
        recipe = {"batch_size": 64 + (number + 1) // 2, "seed": number}
        digest = save_checkpoint(run, seed=number, recipe=recipe)
        shape = make_result("shape", metrics={"acc1": number / 10}, weights_digest=digest)
        save_results(run / "eval", [replace(shape, model=name)])
    models = group_by_seed(gather_runs([tmp_path]))
    assert [model.name for model in models] == ["exp (2)", "exp", "exp (3)", "exp (4)"]
    folder = write_report([tmp_path], tmp_path / "report")
    rows = csv.DictReader((folder / "results.csv").open())
    seeds = {row["model"]: row["seeds"] for row in rows if row["kind"] == "run"}
    assert seeds == {"exp (2)": "0", "exp": "1 2", "exp (3)": "3 4", "exp (4)": "5 6"}


def test_a_curve_of_the_loss_leaves_out_lines_of_an_epochs_first_step(tmp_path):
    run = save_run(tmp_path)
    steps = {0: 4.0, 9: 3.0, 10: 1.0, 19: 2.0}
    lines = [{"step": s, "samples": 8 * (s + 1), "loss": y, "lr": y} for s, y in steps.items()]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (found,) = gather_runs([run])
    assert found.curve("loss") == [(80, 3.0), (160, 2.0)]
    assert len(found.curve("lr")) == 4


def test_a_curve_of_a_long_run_takes_no_time():
    lines = tuple({"step": step, "samples": 8 * step, "loss": 1.0} for step in range(30_000))
    run = Run("long", (), TrainingFacts(), measured=lines)
    began = time.process_time()
    assert len(run.curve("loss")) == len(lines)
    # With all lines looked at for each it takes ten seconds.
    assert time.process_time() - began < 2


def test_a_curve_is_what_a_run_measured_by_the_samples_it_had_seen(tmp_path):
    run = save_run(tmp_path)
    lines = ['{"step": 0, "samples": 64, "loss": 3.5}', '{"step": 1, "samples": 128, "loss": 2.5}']
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"samples": "x"}']))
    (found,) = gather_runs([run])
    assert found.curve("loss") == [(64, 3.5), (128, 2.5)]
    assert found.curve("lr") == []
