"""Which files a report's folder holds after a second report."""

import re
import shutil
from pathlib import Path

import pytest

from clip_pgs import plots
from clip_pgs.evaluation.__main__ import main
from clip_pgs.evaluation.report.command import write_report
from clip_pgs.evaluation.results import write_result
from clip_pgs.files import folder_lock
from support.disk import files_limited_to
from support.reports import make_result, save_results, save_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run in `logs`, and in `report` its report with figures on several suites."""
    folder = tmp_path_factory.mktemp("made")
    write_report([save_run(folder / "logs")], folder / "report")
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy of the report."""
    return shutil.copytree(made / "report", tmp_path / "report")


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def fewer(tmp_path):
    """Results of which a report has one figure."""
    save_results(tmp_path / "few", [make_result("shape", metrics={"acc1": 0.5})])
    return tmp_path / "few"


def test_figures_that_a_second_report_does_not_show_are_removed(folder, fewer):
    assert len(names(folder / "figures")) > 8
    write_report([fewer], folder)
    stem = "zeroshot-classification_other"
    assert names(folder / "figures") == {f"{stem}.png", f"{stem}.svg"}
    assert names(folder) == {"report.html", "report.md", "results.csv", "figures"}


def test_two_reports_into_one_folder_come_one_after_the_other(folder, fewer, monkeypatch):
    write_figures = plots.write_figures

    def write(*args, **options):
        with pytest.raises(ValueError, match="busy"), folder_lock(folder, on_busy=refuse):
            pass
        write_figures(*args, **options)

    def refuse():
        raise ValueError("busy")

    monkeypatch.setattr(plots, "write_figures", write)
    write_report([fewer], folder)
    with folder_lock(folder, on_busy=refuse):
        pass


@pytest.mark.parametrize(
    "suites", [("m\u00fcde", "m\u00f6de"), ("a.b", "a-b"), ("x" + "y" * 70, "z" + "y" * 70)]
)
def test_each_suite_of_ones_own_has_a_figure(tmp_path, suites):
    results = [
        make_result("mine", suite, {"acc": 0.25 * number})
        for number, suite in enumerate(suites, start=1)
    ]
    for number, result in enumerate(results):
        write_result(result, tmp_path / f"eval/{number}.json")
    folder = write_report([tmp_path / "eval"], tmp_path / "report")
    drawn = sorted((folder / "figures").glob("*.svg"))
    assert len(drawn) == len({path.read_bytes() for path in drawn}) == 2
    shown = re.findall(r"\(figures/([^)]*)\.png\)", (folder / "report.md").read_text("utf-8"))
    assert {path.stem for path in drawn} == set(shown)


def test_scores_of_zero_are_drawn_without_a_warning(tmp_path, recwarn):
    results = [make_result(name, metrics={"acc1": 0.0}) for name in ("a", "b")]
    save_results(tmp_path / "eval", results)
    write_report([tmp_path / "eval"], tmp_path / "report")
    assert not [str(warning.message) for warning in recwarn]


def test_files_of_others_stay(folder, fewer):
    figures = folder / "figures"
    # A copy of a figure, one's own picture under a name of ours, notes, a link and a folder.
    (figures / "radar_before.png").write_bytes((figures / "radar.png").read_bytes())
    (figures / "rada.svg").write_bytes((figures / "radar.svg").read_bytes())
    (figures / "cost.png").write_bytes(b"my own")
    (figures / "notes.txt").write_text("clip-pgs evaluation report (notes)")
    (figures / "robustness_other.svg").unlink()
    (figures / "robustness_other.svg").symlink_to(figures / "radar_before.png")
    (figures / "compositionality_other.png").unlink()
    (figures / "compositionality_other.png").mkdir()
    (folder / "mine.md").write_text("mine")
    write_report([fewer], folder)
    assert names(figures) == {
        "radar_before.png",
        "rada.svg",
        "cost.png",
        "notes.txt",
        "robustness_other.svg",
        "compositionality_other.png",
        "zeroshot-classification_other.png",
        "zeroshot-classification_other.svg",
    }
    assert (figures / "cost.png").read_bytes() == b"my own"
    assert (folder / "mine.md").read_text() == "mine"


def test_figures_are_neither_written_nor_removed_through_a_link(folder, fewer):
    mine = (folder / "figures").rename(folder.parent / "mine")
    (folder / "figures").symlink_to(mine)
    before = {path: path.stat().st_mtime_ns for path in mine.iterdir()}
    with pytest.raises(OSError, match="it is a link"):
        write_report([fewer], folder)
    assert {path: path.stat().st_mtime_ns for path in mine.iterdir()} == before


def test_the_same_report_twice_is_the_same_folder(folder, made):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    write_report([made / "logs"], folder)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before


def test_no_earlier_figure_goes_where_the_new_report_cannot_be_made(folder, made, tmp_path):
    before = names(folder / "figures")
    (tmp_path / "broken.json").write_text('{"weights_digest": "x"}')
    with pytest.raises(ValueError, match="is no result"):
        write_report([made / "logs", tmp_path / "broken.json"], folder)
    assert names(folder / "figures") == before


def test_a_full_disk_ends_a_report_with_the_name_of_a_file_and_leaves_none_cut(
    made, tmp_path, capsys
):
    with files_limited_to(9000):
        assert main(["report", str(made / "logs"), "-o", str(tmp_path)]) == 1
    figures = tmp_path / "figures"
    said = re.fullmatch(r"error: (.*): File too large\n", capsys.readouterr().err)
    assert Path(said[1]).parent == figures
    assert not [path for path in figures.iterdir() if not is_whole(path)]


def is_whole(path):
    return path.read_bytes().endswith((b"</svg>\n", b"IEND\xaeB`\x82"))
