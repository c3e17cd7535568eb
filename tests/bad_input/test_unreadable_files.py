"""Of what may not be read, as somebody else's folders, every command says just that."""

from pathlib import Path

import pytest

from clip_pgs.cli import main as clip_pgs
from clip_pgs.evaluation.models import load_model
from clip_pgs.study.record import Record, read_record, write_record
from clip_pgs.training.__main__ import main as training
from support.commands import refusal
from support.permissions import unreadable
from support.reports import save_run
from support.runs import flags


def train(*more):
    data = Path("data/{00000..00001}.tar")
    return [*flags(Path(), epochs=1, train_data=data), *more]


@pytest.mark.parametrize("path", ["logs", "logs/run", "logs/run/checkpoints", "data"])
@pytest.mark.parametrize("more", [[], ["--check-only"], ["--resume", "latest"]], ids=" ".join)
def test_training_is_refused(here, capsys, path, more):
    # That the name is taken shows without the files.
    if path == "logs/run/checkpoints":
        more = ["--resume", "latest"]
    if path == "data":
        more = [*more, "--name", "other"] if "latest" not in more else more
    with unreadable(here / path):
        error = refusal(training, train(*more), capsys)
    assert path in error
    assert "Permission denied" in error


def test_resuming_sets_aside_no_checkpoint_that_may_not_be_read(here, capsys):
    checkpoint = here / "logs/run/checkpoints/epoch_1.pt"
    with unreadable(checkpoint):
        assert "Permission denied" in refusal(training, train("--resume", "latest"), capsys)
    assert checkpoint.is_file()


@pytest.mark.parametrize("name", ["", "epoch_1.pt", "SHA256SUMS"])
def test_an_export_is_refused_without_a_word_of_damage(here, capsys, name):
    with unreadable(here / "logs/run/checkpoints" / name):
        error = refusal(clip_pgs, ["export", "logs/run"], capsys)
    assert error.endswith("Permission denied\n")


@pytest.mark.parametrize("name", ["", "latest", "epoch_1.pt"])
def test_an_export_is_evaluated_without_the_checkpoints_of_its_run(here, caplog, name):
    with unreadable(here / "logs/run/checkpoints" / name):
        loaded = load_model("logs/run")
    assert loaded.training == {}
    run = here / "logs/run"
    assert f"will not tell the training of {run}: {run}/checkpoints/" in caplog.text
    assert "Permission denied" in caplog.text


@pytest.mark.parametrize("path", ["logs/run", "logs/run/export"])
def test_an_evaluation_is_refused(here, capsys, path):
    with unreadable(here / path):
        error = refusal(clip_pgs, ["test", "logs/run", "--data-root", "."], capsys)
    assert error.endswith("Permission denied\n")


def test_a_checkpoint_in_such_a_folder_is_not_taken_for_a_name(here, capsys):
    path = "logs/run/checkpoints/epoch_1.pt"
    with unreadable(here / "logs/run"):
        error = refusal(clip_pgs, ["test", path, "--data-root", "."], capsys)
    assert f"{path}, which may not be read" in error


@pytest.mark.parametrize("left", ["1/checkpoints", "1/metrics.jsonl", "1/eval/epoch_1"])
def test_a_report_leaves_it_out(tmp_path, monkeypatch, caplog, left):
    monkeypatch.chdir(tmp_path)
    maskings = ("none", "pgs")
    runs = [save_run(Path("logs"), n, masking=name) for n, name in enumerate(maskings)]
    place = Path(f"logs/demo_{left}")
    if place.name == "epoch_1":
        place.mkdir()
    elif place.suffix:
        place.write_text("{}\n")
    with unreadable(place):
        assert clip_pgs(["test", "report", *map(str, runs)]) == 0
    assert f"left out {place}" in caplog.text.replace(f"{tmp_path}/", "")
    rows = Path("report/results.csv").read_text()
    assert "demo_0" in rows
    assert "demo_1" in rows


def test_a_report_on_results_that_may_not_be_read_does_not_ask_for_an_evaluation(tmp_path, capsys):
    run = save_run(tmp_path)
    with unreadable(run / "eval"):
        error = refusal(clip_pgs, ["test", "report", run], capsys)
    assert error.endswith("eval: Permission denied\n")


@pytest.mark.parametrize("argv", [["check"], ["words", "-o", "w.json"]], ids=["check", "words"])
@pytest.mark.parametrize("shards", ["data/{00000..00001}.tar", "data/*.tar"])
def test_shards_in_such_a_folder_are_not_said_to_be_absent(here, capsys, argv, shards):
    with unreadable(here / "data"):
        error = refusal(clip_pgs, ["data", argv[0], shards, *argv[1:]], capsys)
    assert error == "error: data: Permission denied\n"


@pytest.mark.parametrize("name", ["", "study.json"])
def test_the_record_of_a_study_is_not_called_damaged(tmp_path, name):
    run = tmp_path / "run"
    write_record(Record(), run)
    with unreadable(run / name), pytest.raises(PermissionError):
        read_record(run)
