import pytest

from clip_pgs.evaluation.__main__ import main
from clip_pgs.evaluation.report.command import run
from support.reports import save_run


@pytest.mark.slow
def test_command_writes_all_files_and_names_the_page(tmp_path, capsys):
    output = tmp_path / "out" / "report"
    assert run([str(save_run(tmp_path / "logs")), "-o", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}/report.html\n"
    names = {path.name for path in output.iterdir()}
    assert names == {"report.html", "report.md", "results.csv", "figures"}


@pytest.mark.slow
def test_evaluation_hands_its_report_command_on(tmp_path):
    output = tmp_path / "report"
    assert main(["report", str(save_run(tmp_path / "logs")), "-o", str(output)]) == 0
    assert (output / "report.html").is_file()


def test_no_results_is_one_sentence_and_code_2(tmp_path, capsys):
    assert run([str(tmp_path), "-o", str(tmp_path / "report")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path} holds no results")
    assert error.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_output_that_is_a_file_is_one_sentence_and_code_2(tmp_path, capsys):
    (tmp_path / "report").write_text("mine")
    assert run([str(save_run(tmp_path / "logs")), "-o", str(tmp_path / "report")]) == 2
    assert capsys.readouterr().err == f"error: the output {tmp_path}/report is not a folder\n"
    assert (tmp_path / "report").read_text() == "mine"


@pytest.mark.parametrize("name", ["results.csv", "report.md", "report.html"])
def test_a_file_of_ones_own_is_not_replaced(tmp_path, monkeypatch, capsys, name):
    logs = save_run(tmp_path / "logs")
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("mine\n")
    assert run([str(logs), "-o", "."]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {name} is not of an earlier report")
    assert error.count("\n") == 1
    assert (tmp_path / name).read_text() == "mine\n"
    assert {path.name for path in tmp_path.iterdir()} == {"logs", name}


def test_missing_arguments_are_code_2(capsys):
    with pytest.raises(SystemExit) as caught:
        run([])
    assert caught.value.code == 2
    assert "RESULTS" in capsys.readouterr().err
