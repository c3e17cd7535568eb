"""`clip-pgs demo`, with a stub for what trains and evaluates; the real parts: test_demo.py."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clip_pgs.demo import main
from clip_pgs.files import write_json
from clip_pgs.training.options import IDENTITY, RECIPE, names_of, read_options
from support.reports import make_result, save_results
from support.scripts import write_executable

# Leaves behind what each part of the demo would, and writes down its arguments.
STUB_PYTHON = """#!/usr/bin/env bash
echo "$2 ${*:3}" >>calls.log
case "$2 $*" in
*--check-only*) ;;
clip_pgs.data*) mkdir -p data/demo/train ;;
clip_pgs.training*) mkdir -p logs/demo/export ;;
clip_pgs.cli*) touch logs/demo/export/README.md && echo "the table" ;;
clip_pgs.inspection*) touch logs/demo/pgs_keeps.png ;;
esac
exit "${FAIL:-0}"
"""
PYTHON = sys.executable
PARTS = ["data", "training", "cli"]


@pytest.fixture
def demo(tmp_path, monkeypatch, capfd):
    """Run the demo in an empty folder, and return its output and the modules that it ran."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    write_executable(tmp_path / "python", STUB_PYTHON)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))

    def run_demo(*arguments, code=0):
        calls = Path("calls.log")
        calls.write_text("")
        assert main(arguments) == code
        output, error = capfd.readouterr()
        return error if code else output, calls.read_text().splitlines()

    return run_demo


def modules(calls):
    """Return them in their order, but for the drawing, which runs beside the evaluation."""
    every = [call.split()[0].removeprefix("clip_pgs.") for call in calls]
    return [module for module in every if module != "inspection"]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_demo_makes_data_trains_evaluates_and_draws(demo):
    output, calls = demo()
    assert modules(calls) == PARTS
    assert [call.split()[1] for call in calls if ".inspection" in call] == ["masks"]
    assert "the table" in output
    assert Path("logs/demo/eval/table.txt").read_text() == "the table\n"
    assert "logs/demo/pgs_keeps.png" in output


def test_the_demo_shows_a_finished_result_without_doing_it_again(demo):
    first, _ = demo()
    second, calls = demo()
    assert [call.split()[0] for call in calls] == ["clip_pgs.data"]
    assert "the table" in second
    assert second.splitlines()[-6:] == first.splitlines()[-6:]


def test_the_demo_continues_an_unfinished_run(demo):
    demo()
    shutil.rmtree("logs/demo/export")
    Path("logs/demo/checkpoints").mkdir()
    _, calls = demo()
    assert modules(calls) == PARTS
    assert calls[1].endswith("--name demo --resume latest")
    assert Path("logs/demo/checkpoints").exists()


def test_a_fresh_demo_replaces_its_run_alone_and_passes_flags_on(demo):
    demo()
    for kept in ("logs/demo/old", "logs/another"):
        Path(kept).mkdir()
    _, calls = demo("--fresh", "--epochs", "1")
    assert modules(calls) == ["data", "training", *PARTS[1:]]
    assert "--check-only" in calls[1]
    assert "--epochs 1" in calls[2]
    assert not Path("logs/demo/old").exists()
    assert Path("logs/another").exists()


def test_the_exit_code_of_a_part_that_fails_is_the_demos(demo, monkeypatch):
    monkeypatch.setenv("FAIL", "85")
    error, calls = demo(code=85)
    assert (error, modules(calls)) == ("", ["data"])


@pytest.mark.parametrize(
    ("part", "number", "code", "said"),
    [
        ("data", "TERM", 85, "stopped by SIGTERM; the same command begins again"),
        ("training", "INT", 130, "interrupted; clip-pgs demo goes on where it was"),
    ],
)
def test_a_demo_that_is_told_to_leave_takes_its_part_along(
    demo, tmp_path, part, number, code, said
):
    # In the first moment there is no part yet that the demo could take along.
    stub = f"[[ $2 != clip_pgs.{part} ]] && exit; "
    stub += f"echo $$ >part; sleep 1; kill -{number} $PPID; exec sleep 60"
    done = run_process(tmp_path, stub)
    assert (done.returncode, done.stderr) == (code, f"{said}\n")
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("part").read_text()), 0)


@pytest.mark.parametrize(("number", "code"), [("TERM", 85), ("INT", 130)])
def test_a_second_signal_of_one_stop_lets_the_part_end_in_order(
    tmp_path, monkeypatch, number, code
):
    monkeypatch.chdir(tmp_path)
    # A shell hears SIGINT at the end of what it runs, so that this runs little.
    stub = f"trap 'kill -{number} $PPID; sleep 0.2; echo saved >end; exit' {number}; sleep 1; "
    stub += f"kill -{number} $PPID; for _ in {{1..600}}; do sleep 0.1; done"
    done = run_process(tmp_path, stub)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == 1
    assert Path("end").read_text() == "saved\n"


def run_process(folder, stub):
    """Run the demo as a process, with a stub for its parts."""
    write_executable(folder / "python", f"#!/usr/bin/env bash\n{stub}\n")
    script = f"import signal, sys; sys.executable = {str(folder / 'python')!r}; "
    # Who runs the tests in the background may have Ctrl-C ignored.
    script += "signal.signal(signal.SIGINT, signal.default_int_handler); "
    # On a busy machine an echo takes longer.
    script += "from clip_pgs import common; common.ECHO_SECONDS = 30; "
    script += "from clip_pgs.cli import main; sys.exit(main(['demo']))"
    return subprocess.run([PYTHON, "-c", script], capture_output=True, text=True, timeout=50)


def test_a_failed_evaluation_ends_the_drawing_beside_it(tmp_path, monkeypatch):
    stub = """#!/usr/bin/env bash
case "$2 $*" in
clip_pgs.cli*)
    for _ in {1..100}; do [[ -s part ]] && exit 3 || sleep 0.1; done
    ;;
clip_pgs.training*) mkdir -p logs/demo/export ;;
clip_pgs.inspection*) echo $$ >part; exec sleep 60 ;;
esac
"""
    monkeypatch.chdir(tmp_path)
    write_executable(tmp_path / "python", stub)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert main([]) == 3
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("part").read_text()), 0)


@pytest.mark.parametrize("holder", [{"process": 7, "host": "here"}, "", [], {"process": 7}])
def test_a_run_that_is_being_trained_is_not_removed(demo, holder):
    demo()
    lock = Path("logs/demo/.lock")
    lock.write_text(json.dumps(holder))
    before = contents(Path("logs/demo"))
    with holding(lock):
        error, calls = demo("--fresh", code=2)
    assert contents(Path("logs/demo")) == before
    assert error.startswith("error: logs/demo is being trained by ")
    assert error.count("\n") == 1
    assert calls == []
    # What a run leaves behind that has ended, or was killed, holds nothing.
    demo("--fresh")


@contextlib.contextmanager
def holding(path):
    """Let another process hold a file's lock: a lock is a process's own."""
    script = "import fcntl, sys; file = open(sys.argv[1], 'r+'); fcntl.lockf(file, fcntl.LOCK_EX)"
    script += "; print('held', flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([PYTHON, "-c", script, str(path)], text=True, **pipes)
    assert process.stdout.readline() == "held\n"
    try:
        yield
    finally:
        process.communicate("\n", timeout=60)


@pytest.mark.parametrize("kind", ["link", "dangling link", "file", "mount point"])
@pytest.mark.parametrize("flags", [[], ["--check-only"]])
def test_what_a_fresh_demo_cannot_replace_is_refused_first(demo, monkeypatch, kind, flags):
    demo()
    run, elsewhere = Path("logs/demo"), Path("elsewhere")
    if kind == "mount point":
        monkeypatch.setattr(Path, "is_mount", lambda path: path == run)
    else:
        run.rename(elsewhere)
        if kind == "file":
            run.touch()
        else:
            run.symlink_to(elsewhere.absolute() if kind == "link" else "nowhere")
    before = contents(Path())
    error, calls = demo("--fresh", *flags, code=2)
    assert error.startswith(f"error: {run} is ")
    assert error.count("\n") == 1
    assert calls == []
    assert contents(Path()) == before | {Path("calls.log"): b""}
    if kind == "link":
        # It goes on through it, and a help is no work.
        demo()
        demo("--fresh", "--help")


@pytest.mark.parametrize("step", ["rename", "rmtree"])
def test_a_run_that_cannot_be_removed_ends_a_fresh_demo_in_a_sentence(demo, monkeypatch, step):
    demo()

    def fail(path, *_, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(*{"rename": (Path, "rename"), "rmtree": (shutil, "rmtree")}[step], fail)
        error, calls = demo("--fresh", code=2)
    assert "demo" in error
    assert error.endswith(": Permission denied\n")
    assert error.count("\n") == 1
    assert "--check-only" in calls[-1]
    demo("--fresh")
    assert [path.name for path in Path("logs").iterdir()] == ["demo"]


@pytest.mark.parametrize("content", [b"", b"\n", b"the \xff table\n"])
def test_a_damaged_table_is_made_anew(demo, content):
    demo()
    table = Path("logs/demo/eval/table.txt")
    table.write_bytes(content)
    output, calls = demo()
    assert modules(calls) == ["data", "cli"]
    assert "the table" in output
    assert table.read_text() == "the table\n"


@pytest.mark.parametrize("kind", ["full disk", "file", "folder", "picture", "lock", "run"])
def test_a_place_that_cannot_be_written_or_read_ends_the_demo_in_a_sentence(
    demo, monkeypatch, kind
):
    demo()
    place, arguments, code = Path("logs/demo/eval/table.txt"), [], 2
    place.unlink()
    if kind == "full disk":
        code = 1
        monkeypatch.setattr("clip_pgs.demo.write_text", failing(errno.ENOSPC, place))
    elif kind == "file":
        place = place.parent
        place.rmdir()
        place.touch()
    elif kind == "folder":
        place.mkdir()
    elif kind == "picture":
        place = Path("logs/demo/pgs_keeps.png")
        place.unlink()
        monkeypatch.setattr(Path, "touch", failing(errno.EACCES, place))
    else:
        arguments = ["--fresh"]
        place = Path("logs/demo")
        if kind == "lock":
            place /= ".lock"
            place.touch()
        broken = "clip_pgs.demo.take_lock" if kind == "lock" else "pathlib.Path.is_symlink"
        monkeypatch.setattr(broken, failing(errno.EACCES, place))
    error, _ = demo(*arguments, code=code)
    assert error.startswith(f"error: {place}: ")
    assert error.count("\n") == 1


def failing(number, place):
    """Return what fails as the system does where it cannot do what is asked."""

    def fail(*_, **__):
        raise OSError(number, os.strerror(number), str(place))

    return fail


@pytest.mark.parametrize("arguments", [[], ["--fresh"]])
def test_a_second_demo_in_one_folder_is_refused(demo, arguments):
    demo()
    folder = os.open(".", os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        before = contents(Path("logs"))
        error, calls = demo(*arguments, code=2)
        assert contents(Path("logs")) == before
    finally:
        os.close(folder)
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert calls == []
    demo()


@pytest.mark.parametrize(
    ("flags", "is_compared"),
    [
        ([], True),
        (["--workers", "2"], True),
        (["--epochs", "1"], False),
        (["--seed", "1"], False),
        (["--mask-ratio", "0.75"], False),
        (["--train-data", "data/other.tar"], False),
    ],
)
def test_the_figures_of_random_patches_stand_beside_a_run_of_the_same_recipe_alone(
    demo, flags, is_compared
):
    demo()
    record(flags)
    finished, _ = demo()
    assert ("zero-shot shape 16.3" in finished) == is_compared
    Path("logs/demo/eval/table.txt").unlink()
    stopped, _ = demo()
    assert ("zero-shot shape 16.3" in stopped) == is_compared


@pytest.mark.parametrize("content", [None, "[]", "{"])
def test_a_run_that_does_not_say_its_recipe_is_compared_with_none(demo, content):
    demo()
    if content is not None:
        Path("logs/demo/options.json").write_text(content)
    output, _ = demo()
    assert "the table" in output
    assert "16.3" not in output


def test_a_run_that_went_on_after_an_end_of_its_own_is_compared_with_none(demo):
    demo()
    record([])
    for changes, is_compared in (([], True), ([[40, {"epochs": 1}]], False)):
        told = {"options": {"changes": changes}}
        save_results(Path("logs/demo/eval"), [make_result("shape", training=told)])
        output, _ = demo()
        assert ("16.3" in output) == is_compared


def record(flags):
    """Write the options that training with such flags leaves behind."""
    options = read_options(["--config", "demo", *flags])
    names = [*names_of(IDENTITY), *names_of(RECIPE), "train_data"]
    write_json(Path("logs/demo/options.json"), {name: getattr(options, name) for name in names})


@pytest.mark.parametrize("flag", ["--help", "--check-only"])
def test_asking_what_a_fresh_demo_would_do_removes_nothing(demo, flag):
    demo()
    before = contents(Path("logs"))
    _, calls = demo("--fresh", "--epochs", "1", flag)
    assert modules(calls) == ["training"]
    # The name of the run that is there would be refused.
    assert "--name demo.fresh" in calls[0]
    assert contents(Path("logs")) == before


def test_a_fresh_demo_is_checked_before_its_data_are_there(demo):
    output, calls = demo("--fresh", "--check-only", "--epochs", "1")
    assert (output.count("\n"), calls) == (1, [])
    assert "the options are valid" in output
    assert "--opt" in demo("--fresh", "--check-only", "--opt", "nosuch", code=2)[0]
    error, calls = demo("--fresh", "--trial", code=2)
    assert "clip-pgs data world data/demo" in error
    assert calls == []
    assert contents(Path()) == {Path("calls.log"): b""}
    demo("--fresh", "--help")


def test_flags_that_need_what_the_demo_makes_first_are_no_fault(demo):
    words = ["--text-masking", "frequency", "--text-tokens", "8"]
    words += ["--text-masking-option", "frequencies=data/demo/words.json"]
    _, calls = demo("--fresh", *words)
    assert modules(calls) == ["data", "training", *PARTS[1:]]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--name", "foo"], "--name"),
        (["--epochs", "1", "--logs=other"], "--logs"),
        (["--resume", "latest"], "--resume"),
        (["--config", "demo_random"], "--config"),
        (["--check-only", "--name", "foo"], "--name"),
        (["--epochs", "x"], "--epochs"),
        (["--masking", "nosuch"], "--masking"),
        (["--nproc", "2"], "--nproc"),
        (["--opt", "nosuch"], "--opt"),
        (["--pretrained", "nosuch"], "--pretrained"),
        (["--report-to", "nosuch"], "--report-to"),
        (["--device", "cuda:99"], "--device"),
        (["--model-config", "nosuch.json"], "--model-config"),
        (["--force-patch-dropout", "0.5"], "--force-patch-dropout"),
    ],
)
def test_flags_that_a_fresh_demo_cannot_obey_are_refused_first(demo, flags, said):
    demo()
    before = contents(Path("logs"))
    error, calls = demo("--fresh", *flags, code=2)
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
    assert calls == []
    assert contents(Path("logs")) == before
