"""The command: what it runs, goes on with and refuses."""

import json
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import yaml

from clip_pgs.files import folder_lock
from clip_pgs.study import plan
from clip_pgs.study.__main__ import main
from clip_pgs.training.options import read_options
from support.commands import refusal
from support.studies import fill


@pytest.mark.slow
def test_a_study_goes_on_where_a_signal_stopped_it(finished):
    files, (code, trained), (second_code, out) = finished
    assert code == 85
    assert trained == ["seed_1"]
    assert second_code == 0, out
    assert "1 of 2 runs are left" in out
    for arm in ("random", "pgs"):
        run = files.study / arm / "seed_1"
        assert (run / "export").is_dir()
        options = json.loads((run / "options.json").read_text())
        assert (options["masking"], options["seed"]) == (arm, 1)
        assert options["masking_options"] == {"mask_ratio": 0.5}
        assert len(list((run / "eval-unmasked").glob("*.json"))) == 2
        assert not (run / "checkpoints").exists()


@pytest.mark.slow
def test_one_run_is_evaluated_in_several_ways(finished):
    files, *_ = finished
    rows = json.loads((files.study / "results.json").read_text())["rows"]
    names = [(row["arm"], row["evaluation"]) for row in rows]
    assert names == [("random", "unmasked"), ("pgs", "unmasked"), ("pgs", "masked")]
    assert all(set(row["seeds"]) == {"1"} for row in rows)
    assert rows[1]["training_flops"] == rows[2]["training_flops"] > 0
    assert rows[0]["flops_per_image"] == rows[1]["flops_per_image"] > rows[2]["flops_per_image"]


@pytest.mark.slow
def test_what_is_finished_is_not_run_again(finished, capsys):
    files, *_ = finished
    paths = [*files.study.rglob("out.log"), *files.study.rglob("eval-unmasked/*.json")]
    before = {path: path.stat().st_mtime_ns for path in paths}
    assert main(files.argv()) == 0
    assert "0 of 2 runs are left" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.fixture
def copied(finished, tmp_path, monkeypatch):
    """A finished study that a test may change, in its folder."""
    monkeypatch.chdir(tmp_path)
    files, *_ = finished
    shutil.copytree(files.study, tmp_path / "logs/tiny")
    shutil.copy(files.path, tmp_path / "study.yaml")
    files = type(files)(tmp_path)
    files.change(base=str(finished[0].folder / "base.yaml"))
    return files


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "named"),
    [({"mask-ratio": 0.25}, "mask_ratio"), ({"mask-ratio": 0.5, "lr": 2e-3}, "lr 0.001")],
    ids=["masking", "recipe"],
)
def test_other_options_are_refused(copied, capsys, overrides, named):
    copied.change(overrides=overrides)
    assert named in refusal(main, copied.argv(), capsys)


@pytest.mark.parametrize(
    ("seeds", "more"), [([0], " (and 1 other) was made"), ([0, 1], " (and 3 others) was made")]
)
def test_how_many_runs_are_others_than_the_studys_is_told(study, capsys, seeds, more):
    study.change(seeds=seeds)
    for arm in ("random", "pgs"):
        for seed in seeds:
            run = study.study / arm / f"seed_{seed}"
            run.mkdir(parents=True)
            (run / "options.json").write_text("{}")
    assert f"{study.study}/random/seed_0{more}" in refusal(main, study.argv(), capsys)


@pytest.mark.slow
def test_other_code_is_refused_and_can_be_accepted(copied, capsys):
    path = copied.study / "pgs/seed_1/study.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "code": ["0ld"]}))
    assert "code 0ld" in refusal(main, copied.argv(), capsys)
    assert main(copied.argv("--accept-changes")) == 0
    assert "code 0ld" in copied.record("pgs", 1)["accepted"][0]
    assert copied.record("random", 1)["accepted"] == []


@pytest.mark.slow
def test_a_note_of_what_a_run_differs_in_ends_where_it_is_no_longer_true(copied):
    def notes(*flags):
        assert main(copied.argv(*flags)) == 0
        return [
            note
            for note in json.loads((copied.study / "results.json").read_text())["notes"]
            if "otherwise" in note
        ]

    told = "Kept although the study means otherwise (epochs 1 -> 2): random, seed 1; pgs, seed 1."
    assert notes() == []
    base = yaml.safe_load(copied.path.read_text())["overrides"]
    copied.change(overrides={**base, "epochs": 2})
    assert notes("--accept-changes") == notes("--report-only") == [told]
    copied.change(overrides=base)
    assert notes("--report-only") == notes() == []
    # Other data are compared where the study is run.
    options = copied.study / "pgs/seed_1/options.json"
    saved = options.read_text()
    options.write_text(json.dumps({**json.loads(saved), "train_files": ["old.tar: 1 bytes"]}))
    (note,) = notes("--accept-changes")
    assert "old.tar: 1 bytes is gone" in note
    options.write_text(saved)
    assert notes() == []


@pytest.mark.slow
@pytest.mark.parametrize("is_refused", [False, True])
def test_what_a_run_was_trained_on_under_is_told_for_ever(copied, monkeypatch, is_refused):
    run = copied.study / "pgs/seed_1"
    shutil.rmtree(run / "export")
    record = copied.record("pgs", 1)
    (run / "study.json").write_text(json.dumps({**record, "spent": None}))

    def launch(runner, command, arguments, run):
        if command == "train" and not is_refused:
            options = json.loads((run / "options.json").read_text())
            (run / "options.json").write_text(json.dumps({**options, "epochs": 2}))
        return (2, "it was refused") if is_refused else (0, "")

    monkeypatch.setattr("clip_pgs.study.runner.Runner._launch", launch)
    base = yaml.safe_load(copied.path.read_text())["overrides"]
    copied.change(overrides={**base, "epochs": 2})
    assert main(copied.argv("--accept-changes")) == is_refused
    copied.change(overrides=base if is_refused else {**base, "epochs": 2})
    assert main(copied.argv("--report-only")) == 0
    notes = json.loads((copied.study / "results.json").read_text())["notes"]
    told = "Trained on otherwise than they began (epochs 1 -> 2): pgs, seed 1."
    assert (told in notes) == (not is_refused)
    assert copied.record("pgs", 1)["evaluations"].keys() == record["evaluations"].keys()
    assert not any("otherwise" in note and "pgs" in note for note in notes if note != told)


@pytest.mark.slow
def test_what_other_data_scored_is_evaluated_again(copied, capsys):
    path = copied.study / "random/seed_1/study.json"
    record = json.loads(path.read_text())
    present = record["evaluations"]["unmasked"]["data"]
    assert present == copied.record("pgs", 1)["evaluations"]["unmasked"]["data"] != ""
    record["evaluations"]["unmasked"]["data"] = "0ther"
    path.write_text(json.dumps(record))
    assert main(copied.argv("--accept-changes")) == 0
    assert "1 of 2 runs are left" in capsys.readouterr().out
    assert copied.record("random", 1)["evaluations"]["unmasked"]["data"] == present


def test_data_are_told_apart_by_what_they_hold_wherever_they_lie(study):
    (shared, *_) = yaml.safe_load(study.path.read_text())["evaluations"]
    root = Path(shared["data-root"])

    def digest(folder):
        flags = [f"--{k}={v}" for k, v in {**shared, "data-root": folder}.items()]
        return plan.data_digest(plan.evaluated_sets([flags]))

    before = digest(root)
    shutil.copytree(root, study.folder / "moved")
    assert digest(study.folder / "moved") == before
    for names in (study.folder / "moved").rglob("classnames.txt"):
        names.write_text("\n".join(reversed(names.read_text().splitlines())) + "\n")
    assert digest(study.folder / "moved") != before


@pytest.mark.slow
def test_a_failed_run_is_told_and_the_others_are_run(study, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    # Fits the checks, and fails when a step has no finite loss.
    arms = {
        "bad": {"train": {"masking": "random", "lr": 1e15, "max-bad-steps": 1, "epochs": 3}},
        "good": {"train": {"masking": "random"}},
    }
    study.change(arms=arms, seeds=[0], reference="good")
    assert main(study.argv("--jobs", 2)) == 1
    out = capsys.readouterr().out
    assert "bad, seed 0: failed: the loss or its gradient was not finite" in out
    assert "good, seed 0: done" in out
    assert "not finite" in study.record("bad", 0)["failed"]
    assert study.record("good", 0)["failed"] == ""


BAD = {
    "an unknown key": {"colour": 1},
    "no metrics": {"metrics": None},
    "an unknown primary": {"primary": "score-2"},
    "an unknown reference": {"reference": "plain"},
    "no such base": {"base": "nowhere.yaml"},
    "a seed twice": {"seeds": [1, 1]},
    "a text as seed": {"seeds": ["one"]},
    "its own option": {"overrides": {"seed": 3}},
    "an unknown option": {"overrides": {"mask-ration": 0.5}},
    "a null for an unknown option": {"overrides": {"frobnicate": None}},
    "a null for an arm's unknown option": {"arms": {"random": {"train": {"frobnicate": None}}}},
    "an arm's own base": {"arms": {"random": {"train": {"base": "base.yaml"}}}},
    "a null for an unknown flag of evaluation": {"evaluations": [{"frobnicate": None}]},
    "a metric named like a path": {"metrics": {"../score": ["zeroshot-classification/four/acc1"]}},
    "a metric without a name": {"metrics": {"": ["zeroshot-classification/four/acc1"]}},
    "an option out of range": {"overrides": {"mask-ratio": 1.5}},
    "an unknown masking": {"arms": {"random": {"train": {"masking": "pgss"}}}},
    "an unknown suite": {"evaluations": [{"suite": "zero"}]},
    "an unknown flag of evaluation": {"evaluations": [{"sweet": "all"}]},
    "evaluations in a mapping": {"evaluations": {}},
    "an evaluation that is nothing": {"evaluations": [None]},
    "a metric of three levels": {"metrics": {"score": [[["zeroshot-classification/four/acc1"]]]}},
    "a metric of no value": {"metrics": {"score": [[]]}},
    "a metric that is not evaluated": {"metrics": {"score": ["zeroshot-retrieval/four/acc1"]}},
    "a metric that a suite lacks": {"metrics": {"score": ["zeroshot-classification/four/acc3"]}},
    "a name with a slash": {"name": "a/b"},
    "a name too long for a file": {"name": "a" * 61},
    "a base too long for a file": {"base": "a" * 5000},
    "no reference": {"reference": []},
    "a reference twice": {"reference": ["random", "random"]},
    "a mapping as reference": {"reference": {"random": 1}},
    "a list in the list of references": {"reference": [["random"]]},
    "a list as primary": {"primary": ["score"]},
    "a mapping as primary": {"primary": {"score": 1}},
    "no way to evaluate": {"arms": {"random": {"evaluate": {}}}},
}


@pytest.mark.parametrize("parts", BAD.values(), ids=BAD)
def test_a_bad_study_is_refused_before_anything_starts(study, capsys, parts):
    study.change(**parts)
    refusal(main, study.argv(), capsys)
    assert not study.root.exists()


@pytest.mark.parametrize(
    "name", [*plan.FIRST_COLUMNS, *plan.LAST_COLUMNS, "score - random | unmasked"]
)
def test_no_metric_is_named_like_a_column_of_the_results(study, capsys, name):
    metrics = yaml.safe_load(study.path.read_text())["metrics"]
    study.change(metrics={**metrics, name: metrics["recall"]})
    assert repr(name) in refusal(main, study.argv("--check-only"), capsys)
    study.change(metrics={**metrics, f"{name} of it": metrics["recall"]})
    assert main(study.argv("--check-only")) == 0


@pytest.mark.parametrize("name", plan.RESULTS_NAMES)
def test_no_arm_takes_the_place_of_the_results(study, capsys, name):
    study.change(arms={"random": {"train": {"masking": "random"}}, name: {}})
    assert repr(name) in refusal(main, study.argv("--check-only"), capsys)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"batch-size": 0}, "--batch-size"),
        ({"batch-size": "many"}, "--batch-size"),
        ({"workers": -1}, "--workers"),
        ({"device": "toaster"}, "toaster"),
        ({"device": "meta"}, "meta"),
        ({"data-root": "nowhere"}, "nowhere"),
        ({"model-config": "tiny.json"}, "model-config"),
        ({"help": True}, "help"),
        ({"frobnicate": None}, "frobnicate"),
        ({"inference-masking": "pgs", "inference-masking-option": {"colour": None}}, "colour"),
        ({"inference-masking": "nosuch"}, "nosuch"),
        ({"inference-masking": "pgs", "inference-mask-ratio": 7}, "mask_ratio"),
        ({"inference-mask-ratio": 0.5}, "--inference-masking"),
        ({"inference-masking": "pgs", "inference-merge": "9x9"}, "merge"),
        ({"inference-masking": "pgs", "inference-masking-option": {"colour": 1}}, "colour"),
        ({"inference-masking": "run", "inference-masking-option": {"solver": "?"}}, "solver"),
    ],
    ids=str,
)
def test_flags_of_evaluation_are_checked_before_a_run_is_trained(study, capsys, flags, named):
    study.change(arms={"pgs": {"train": {"masking": "pgs"}, "evaluate": {"odd": flags}}})
    study.change(reference="pgs", seeds=[0])
    error = refusal(main, study.argv("--check-only"), capsys)
    assert named in error
    assert "odd" in error
    assert "arm pgs" in error


@pytest.mark.parametrize(
    ("metric", "reason"),
    [
        ("acc5", "top-5 needs 5 classes, and it has 4"),
        ("mean_average_precision", "its images have one label each"),
    ],
)
def test_a_primary_metric_without_a_value_is_told_before_a_run(study, capsys, metric, reason):
    metrics = {"top": [f"zeroshot-classification/four/{metric}"]}
    study.change(metrics=metrics, primary="top")
    error = refusal(main, study.argv("--check-only"), capsys)
    assert f"takes zeroshot-classification/four/{metric}, which has no value: {reason}" in error


def test_a_config_that_is_its_own_base_is_named_as_the_user_knows_it(study, capsys):
    (study.folder / "loop.yaml").write_text("base: loop.yaml\n")
    study.change(base="loop.yaml")
    error = refusal(main, study.argv("--check-only"), capsys)
    assert f"{study.folder / 'loop.yaml'} is its own base" in error


def test_a_check_that_is_interrupted_says_so(study, capsys, monkeypatch):
    monkeypatch.setattr(plan, "check_study", lambda _: signal.raise_signal(signal.SIGINT))
    # In the background of a shell it would be ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(study.argv("--check-only")) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "interrupted\n"


def test_a_second_study_in_a_folder_is_refused(study, capsys, monkeypatch):
    study.study.mkdir(parents=True)
    monkeypatch.setattr("clip_pgs.study.runner.Runner.run", lambda _: 0)
    with folder_lock(study.study, on_busy=pytest.fail):
        sentence = refusal(main, study.argv(), capsys)
        assert f"{study.study} is running already" in sentence
        assert list(study.study.iterdir()) == []
        assert main(study.argv("--check-only")) == 0
        (study.study / "random/seed_0").mkdir(parents=True)
        assert main(study.argv("--report-only")) == 0
    assert main(study.argv()) == 0


def test_missing_evaluation_data_is_refused(study, capsys):
    shutil.rmtree(study.folder / "sets/pairs/test")
    assert "pairs" in refusal(main, study.argv(), capsys)


@pytest.mark.parametrize("flags", [["--arms", "plain"], ["--seeds", "7"], ["--jobs", "0"]], ids=str)
def test_what_the_study_lacks_cannot_be_chosen(study, capsys, flags):
    refusal(main, study.argv(*flags), capsys)


@pytest.mark.parametrize("flags", [["--logs", ""], ["--logs="]], ids=str)
def test_an_empty_place_is_not_the_working_directory(study, capsys, flags):
    sentence = refusal(main, [str(study.path), "--check-only", *flags], capsys)
    assert "--logs" in sentence


def test_a_report_takes_jobs_on_any_machine(study, capsys, monkeypatch):
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    fill(study, {"random": [0.3, 0.4], "pgs": [0.4, 0.5]})
    assert "--jobs" in refusal(main, study.argv("--jobs", 2), capsys)
    assert main(study.argv("--jobs", 2, "--report-only")) == 0


def test_the_command_on_the_page_finds_the_study(study):
    fill(study, {"random": [0.3, 0.4], "pgs": [0.4, 0.5]})
    assert main(study.argv("--report-only")) == 0
    assert command(study.study) == ["clip-pgs", "study", *study.argv()]
    (study.root / "study").mkdir()
    study.study.rename("logs/study/tiny")
    assert main([str(study.path), "--report-only"]) == 0
    assert command(Path("logs/study/tiny")) == ["clip-pgs", "study", str(study.path)]


def command(folder):
    return shlex.split(json.loads((folder / "results.json").read_text())["facts"]["command"])


def test_a_report_of_no_runs_is_refused_and_leaves_nothing(study, capsys):
    sentence = refusal(main, study.argv("--report-only"), capsys)
    assert f"{study.study} holds no run" in sentence
    assert main(study.argv("--report-only", "--check-only")) == 0
    assert "4 runs" in capsys.readouterr().out
    assert not study.root.exists()


def test_an_arm_that_warms_up_to_its_end_is_named(study, capsys):
    content = yaml.safe_load(study.path.read_text())
    study.change(arms=content["arms"] | {"short": {"train": {"masking": "none", "warmup": 100}}})
    assert main(study.argv("--check-only")) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("WARNING: arm short: --warmup 100 is longer than the run of 2 steps")


@pytest.mark.parametrize("base", ["base.yaml", "~/base.yaml"])
def test_a_valid_study_says_so_and_leaves_nothing(study, capsys, monkeypatch, base):
    monkeypatch.setenv("HOME", str(study.folder))
    study.change(base=base)
    assert main(study.argv("--check-only", "--seeds", "1")) == 0
    assert "2 runs" in capsys.readouterr().out
    assert main(study.argv("--check-only", "--seeds", "1", "--arms", "pgs")) == 0
    assert capsys.readouterr().out.endswith(" 1 run\n")
    assert not study.root.exists()


@pytest.mark.parametrize(
    ("link", "target", "base", "meant"),
    [
        ("logs", "big/a", "base.yaml", "."),
        ("logs", "other/logs", "base.yaml", "."),
        ("logs/tiny/random", "big/a", "base.yaml", "."),
        ("linked", "big/a", "linked/../base.yaml", "big"),
        # The base of a config that is a link lies beside the link.
        ("linked.yaml", "big/base.yaml", "linked.yaml", "."),
    ],
)
def test_a_run_is_trained_by_the_config_that_the_study_names_through_links(
    study, link, target, base, meant
):
    epochs = {place: number for number, place in enumerate((".", "other", "big", "big/a"), 1)}
    for place, number in epochs.items():
        Path(place).mkdir(parents=True, exist_ok=True)
        Path(place, "base.yaml").write_text("base: options.yaml\n")
        Path(place, "options.yaml").write_text(f"model: ViT-B-32\nepochs: {number}\n")
    Path("other/logs").mkdir()
    Path(link).parent.mkdir(parents=True, exist_ok=True)
    Path(link).symlink_to(Path(target).absolute())
    study.change(base=base)
    said = plan.read_study(Path("study.yaml"), root=Path("logs"))
    folder = said.run("random", 0).parent
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / plan.CONFIG_NAME
    for text in (said.config_text("random"), said.config_text("random", folder)):
        config.write_text(text)
        assert read_options(["--config", str(config)]).epochs == epochs[meant]
    # A folder that is moved with its config takes it along.
    assert not Path(yaml.safe_load(text)["base"]).is_absolute()


@pytest.mark.parametrize("is_link", [True, False])
def test_old_scores_that_cannot_be_removed_fail_the_run(study, capsys, monkeypatch, is_link):
    output = study.study / "random/seed_0/eval-unmasked"
    output.parent.mkdir(parents=True)
    if is_link:
        (study.folder / "elsewhere").mkdir()
        (study.folder / "elsewhere/old.json").write_text("{}")
        output.symlink_to(study.folder / "elsewhere")
    else:
        output.touch()
    monkeypatch.setattr("clip_pgs.study.runner.Runner._train", lambda *_: "")
    monkeypatch.setattr("clip_pgs.study.runner.Runner._launch", lambda *_: (0, ""))
    assert main(study.argv("--arms", "random", "--seeds", "0")) == 1
    assert f"{output} cannot be removed" in capsys.readouterr().out
    assert study.record("random", 0)["evaluations"] == {}
    assert (study.folder / "elsewhere/old.json").exists() == is_link
