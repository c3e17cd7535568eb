import shutil

import pytest

from clip_pgs.evaluation.__main__ import main


@pytest.fixture
def sets(data_root, tmp_path):
    return shutil.copytree(data_root, tmp_path / "sets")


@pytest.fixture
def run(tmp_path, sets, capsys):
    """Return what runs the command on some lines and returns its exit code and its output."""

    def run_command(*lines, root=sets):
        path = tmp_path / "list.txt"
        path.write_text("\n".join(lines))
        code = main(["sets", "--datasets", str(path), "--data-root", str(root)])
        return code, capsys.readouterr().out

    return run_command


def row(output, name):
    return next(line for line in output.splitlines() if line.split()[:1] == [name]).split(None, 2)


def test_sets_that_are_all_there_give_exit_code_0(run, sets):
    code, output = run("six", "linear-probe: six", "pairs", "sugar_crepe/add_att")
    assert code == 0
    assert row(output, "six") == ["six", "present", str(sets / "six")]
    assert "linear-probe" in output
    assert "To get" not in output


@pytest.mark.parametrize(
    ("lines", "damage", "name", "reason"),
    [
        (["six"], "six/test/1.tar", "six", "lacks test/1.tar (1 of 2 shards)"),
        (["six"], "six/classnames.txt", "six", "has no classnames.txt"),
        (["linear-probe: six"], "six/train/nshards.txt", "six", "has no train/nshards.txt"),
        (
            ["sugar_crepe/add_att"],
            "sugar_crepe/val2017/2.png",
            "sugar_crepe/add_att",
            "lacks val2017/2.png (1 of 4 images)",
        ),
    ],
)
def test_a_set_that_lacks_a_file_is_incomplete_and_says_which(
    run, sets, lines, damage, name, reason
):
    (sets / damage).unlink()
    code, output = run(*lines)
    assert code == 1
    _, state, told = row(output, name)
    assert state == "incomplete"
    assert reason in told


def test_a_set_that_is_not_there_is_missing(run):
    code, output = run("six", "not/here", "sugar_crepe/swap_att")
    assert code == 1
    assert row(output, "not/here")[1] == "missing"
    # Its folder is there, and holds other splits.
    assert row(output, "sugar_crepe/swap_att")[1] == "incomplete"
    assert row(output, "six")[1] == "present"


def test_paper_sets_come_with_the_commands_that_bring_them(tmp_path, capsys):
    assert main(["sets", "--datasets", "paper", "--data-root", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "zeroshot-classification  0 of 17 present" in output
    download = "hf download clip-benchmark/wds_vtab-cifar10 --repo-type dataset"
    # It serves zero-shot classification and the linear probe.
    assert output.count(download) == 1
    assert f"{download} --local-dir {tmp_path}/vtab/cifar10" in output
    assert output.count("val2017.zip -o") == 1
    assert f"sugar-crepe/main/data/swap_att.json -o {tmp_path}/sugar_crepe/swap_att.json" in output


def test_demo_sets_come_with_the_command_that_makes_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sets"]) == 1
    last_lines = capsys.readouterr().out.splitlines()[-2:]
    assert last_lines == [
        "To get what is not there:",
        "  clip-pgs data world data/demo",
    ]


def test_bad_request_gives_exit_code_2_and_one_sentence(capsys):
    assert main(["sets", "--suite", "robust"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: unknown suite 'robust'")
    assert message.count("\n") == 1


def test_a_set_that_declares_no_type_there_is_is_not_present(run, sets):
    (sets / "six/dataset_type.txt").write_text("zeroshot_classification")
    code, output = run("zeroshot-classification: six")
    assert code == 1
    _, state, told = row(output, "six")
    assert state == "incomplete"
    assert "dataset_type.txt must hold one of classification, multilabel, retrieval" in told
