"""A text file of any size costs no memory: zeros take no place on a disk or in an archive."""

from pathlib import Path

import pytest
from PIL import Image

from clip_pgs.cli import main as clip_pgs
from clip_pgs.data.shards import count_samples
from clip_pgs.evaluation.suites import read_list
from clip_pgs.inspection.cost.data import read_jpegs
from clip_pgs.training.__main__ import main as training
from clip_pgs.training.checkpoint import trained_steps
from support.commands import refusal
from support.reports import save_run
from support.runs import flags

# More than a test may take.
SIZE = 2**35


def enlarge(path):
    with Path(path).open("ab") as file:
        file.truncate(SIZE)


def test_a_report_leaves_out_large_measurements(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    run = save_run(Path("logs"))
    enlarge(run / "metrics.jsonl")
    assert clip_pgs(["test", "report", str(run)]) == 0
    assert "metrics.jsonl: it cannot be read (it is larger than 1073741824 bytes)" in caplog.text
    assert "demo_0" in Path("report/results.csv").read_text()


def test_a_report_refuses_a_large_table(tmp_path, capsys):
    enlarge(tmp_path / "results.csv")
    error = refusal(clip_pgs, ["test", "report", tmp_path / "results.csv"], capsys)
    assert "results.csv is larger than" in error


def test_an_export_refuses_large_checksums_and_keeps_no_license_of_a_large_card(
    here, capsys, caplog
):
    enlarge("logs/run/export/README.md")
    assert clip_pgs(["export", "logs/run"]) == 0
    assert "README.md cannot be read: it is larger than" in caplog.text
    enlarge("logs/run/checkpoints/SHA256SUMS")
    error = refusal(clip_pgs, ["export", "logs/run"], capsys)
    assert "SHA256SUMS is larger than" in error


@pytest.mark.parametrize("name", ["sizes.json", "__len__"])
def test_a_large_size_beside_shards_is_refused(here, name):
    Path("data/sizes.json").unlink()
    enlarge(Path("data", name))
    with pytest.raises(ValueError, match=rf"data/{name} must .*: it is larger than"):
        count_samples(["data/00000.tar"])


def test_large_word_frequencies_are_refused(here, capsys):
    enlarge("words.json")
    masking = {"text_masking": "frequency", "text_tokens": 8}
    masking["text_masking_option"] = "frequencies=words.json"
    argv = flags(Path(), name="b", train_data="data/{00000..00001}.tar", **masking)
    assert "it is larger than" in refusal(training, argv, capsys)


def test_a_large_list_of_sets_is_refused(tmp_path):
    enlarge(tmp_path / "sets.txt")
    with pytest.raises(ValueError, match=r"sets\.txt is larger than"):
        read_list(tmp_path / "sets.txt")


def test_the_speed_of_data_is_measured_without_large_pictures(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "b.jpg")
    enlarge(tmp_path / "a.jpg")
    assert len(read_jpegs([tmp_path])) == 1


def test_of_a_large_log_the_beginning_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("clip_pgs.training.checkpoint.MAX_LINES_BYTES", 2**22)
    line = "2026-11-30,18:00:00 | INFO | Saved epoch_1.pt (epoch 1, step 4): held\n"
    Path(tmp_path, "out.log").write_text(line)
    enlarge(tmp_path / "out.log")
    assert trained_steps(tmp_path) == (4, True)
