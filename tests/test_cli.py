"""`clip-pgs`, as a process."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys

import pytest

from clip_pgs.cli import COMMANDS, main
from support.scripts import ENVIRONMENT, ROOT

SYNTHETIC = ["--dataset-type", "synthetic", "--train-num-samples", "64", "--warmup", "1"]


def run(*argv, cwd, **environment):
    command = [sys.executable, "-m", "clip_pgs.cli", *map(str, argv)]
    variables = {**ENVIRONMENT, "PYTHONPATH": str(ROOT / "src"), **environment}
    options = {"capture_output": True, "text": True, "timeout": 400}
    return subprocess.run(command, cwd=cwd, env=variables, **options)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "10000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ],
)
def test_threads_wait_asleep_before_long_unless_told_otherwise(monkeypatch, given, found):
    monkeypatch.setattr("os.environ", dict(given))
    seen = []
    monkeypatch.setattr(
        "clip_pgs.cli._function",
        lambda name: lambda argv: seen.append(os.environ.get("GOMP_SPINCOUNT")) or 0,
    )
    assert main(["train"]) == 0
    assert seen == [found]


@pytest.mark.parametrize(
    ("end", "said", "code"),
    [
        (lambda: signal.raise_signal(signal.SIGTERM), "stopped by SIGTERM", 85),
        (lambda: signal.raise_signal(signal.SIGINT), "interrupted", 130),
    ],
)
@pytest.mark.parametrize("command", ["data", "inspect"])
def test_a_command_that_is_told_to_leave_says_so(monkeypatch, capsys, command, end, said, code):
    # Who runs the tests in the background may have Ctrl-C ignored, and then it stays so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr("clip_pgs.cli._function", lambda name: lambda argv: end())
    try:
        assert main([command]) == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == f"{said}\n"


IMPORT = """
import os, signal, sys
from clip_pgs import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
def run(argv):
    try:
        import module
    except BaseException:
        print("cut short", file=sys.stderr)
    import time
    time.sleep(60)
cli._function = lambda name: run
sys.exit(cli.main([sys.argv[1]]))
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 85), ("SIGINT", 130)])
def test_a_signal_waits_for_the_end_of_an_import(tmp_path, name, code):
    module = f"import os, signal\nos.kill(os.getpid(), signal.{name})\nprint('whole')\n"
    (tmp_path / "module.py").write_text(module)
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{ROOT / 'src'}:{tmp_path}"}
    command = [sys.executable, "-c", IMPORT, "data"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=50)
    assert (done.returncode, done.stdout) == (code, "whole\n")
    assert done.stderr == ("interrupted\n" if name == "SIGINT" else f"stopped by {name}\n")


def test_a_signal_that_an_import_outlasts_does_not_meet_what_comes_after(tmp_path):
    module = "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n"
    (tmp_path / "module.py").write_text(module)
    code = (
        "from clip_pgs.common import catching\nimport signal, time\n"
        "with catching(lambda *_: print('handled'), signal.SIGTERM):\n    import module\n"
        "time.sleep(0.5)\n"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{ROOT / 'src'}:{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=50)
    assert done.returncode == 0


TWICE = """
import atexit, os, signal, sys
from clip_pgs import cli, common
number, common.ECHO_SECONDS = int(sys.argv[1]), float(sys.argv[2])
signal.signal(signal.SIGINT, signal.default_int_handler)
def run(argv):
    try:
        signal.raise_signal(number)
    finally:
        signal.raise_signal(number)
        print("in order", file=sys.stderr)
cli._function = lambda name: run
# Python has taken its handlers back by then.
class Late:
    def __del__(self, kill=os.kill, process=os.getpid()):
        kill(process, number)
sys.late = Late()
sys.exit(cli.main(["data"]))
"""


@pytest.mark.parametrize(
    ("number", "echo", "said", "code"),
    [
        (signal.SIGTERM, 60, "in order\nstopped by SIGTERM\n", 85),
        (signal.SIGINT, 60, "in order\ninterrupted\n", 130),
        (signal.SIGTERM, -1, "", -signal.SIGTERM),
        (signal.SIGINT, -1, "interrupted\n", 130),
    ],
)
def test_a_second_signal_is_an_echo_at_first_and_then_ends_at_once(number, echo, said, code):
    command = [sys.executable, "-c", TWICE, str(int(number)), str(echo)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, said)


NO_ROOM = f"error: standard output: {os.strerror(errno.ENOSPC)}\n"


@pytest.mark.parametrize("command", ["clip_pgs --version", "clip_pgs.data --help"])
@pytest.mark.parametrize(
    ("place", "code", "said"),
    [(">&-", 0, ""), (">&- <&- 2>&-", 0, ""), (">/dev/full", 1, NO_ROOM), (">&$PIPE", 141, "")],
)
def test_what_nobody_reads_is_no_fault_and_a_full_disk_is_told(command, place, code, said):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m {command} {place}"],
        capture_output=True,
        text=True,
        pass_fds=[writer],
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT / "src"), "PIPE": str(writer)},
        timeout=60,
    )
    os.close(writer)
    assert (done.stdout, done.stderr, done.returncode) == ("", said, code)


NOISY = """
import logging, sys
from clip_pgs import cli
def run(argv):
    logging.basicConfig()
    for _ in range(3):
        logging.warning("odd")
        print("so far", file=sys.stderr, flush=True)
    if argv:
        raise RuntimeError("a fault of the program")
    print("done")
    return 7
cli._function = lambda name: run
sys.exit(cli.main(["data", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(("argument", "said", "code"), [("", "done\n", 7), ("fail", "", 1)])
@pytest.mark.parametrize("place", ["2>/dev/full", "2>&-", "2>&$PIPE"])
def test_a_stderr_that_takes_nothing_changes_neither_work_nor_exit_code(
    place, argument, said, code
):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "$NOISY" {argument} {place}'],
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=[writer],
        env={
            **ENVIRONMENT,
            "PYTHONPATH": str(ROOT / "src"),
            "PIPE": str(writer),
            "NOISY": NOISY,
        },
        timeout=60,
    )
    os.close(writer)
    assert (done.stdout, done.returncode) == (said, code)


class Unwritable(io.StringIO):
    def __init__(self, number):
        super().__init__()
        self.number = number

    def write(self, text):
        raise OSError(self.number, os.strerror(self.number))


def test_a_refusal_is_one_where_stderr_takes_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Unwritable(errno.ENOSPC))
    assert main(["no-command"]) == 2


@pytest.mark.parametrize("command", ["--help", "completion bash", "study --help"])
@pytest.mark.parametrize(
    ("stream", "code", "said"),
    [
        (None, 0, ""),
        (Unwritable(errno.ENOSPC), 1, NO_ROOM),
        (Unwritable(errno.EPIPE), 141, ""),
    ],
)
def test_a_call_from_python_ends_so_too(monkeypatch, capsys, command, stream, code, said):
    monkeypatch.setattr(sys, "stdout", stream)
    try:
        found = main(command.split())
    except SystemExit as end:
        found = end.code
    assert (found, sys.stdout, capsys.readouterr().err) == (code, stream, said)


IMPORTERS = (
    "-m clip_pgs.evaluation",
    "-m clip_pgs.inspection masks -o y.png",
    "-m clip_pgs.data",
    "-m clip_pgs.cli data",
    "scripts/download_cc12m.py",
)


@pytest.mark.parametrize("modules", [("typing",), ("torch", "tqdm", "huggingface_hub")], ids=str)
@pytest.mark.parametrize("command", IMPORTERS)
def test_ctrl_c_while_a_command_is_imported_shows_no_traceback(tmp_path, command, modules):
    for name in modules:
        (tmp_path / f"{name}.py").write_text("raise KeyboardInterrupt")
    done = subprocess.run(
        [sys.executable, *command.split(), "x"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])},
        capture_output=True,
        text=True,
    )
    # An evaluation that had begun says that it goes on.
    assert done.stderr in ("interrupted\n", "interrupted; the same command continues\n")
    assert done.returncode in (130, -signal.SIGINT)


def processor_seconds(*command):
    """Return what a command computes: unlike its duration, that is the same on a busy machine."""
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0
    return usage.ru_utime + usage.ru_stime


def test_help_names_the_commands_and_takes_little_more_than_python_itself(tmp_path):
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    for name in COMMANDS:
        assert f"  {name} " in done.stdout
    help_seconds = processor_seconds("-m", "clip_pgs.cli", "--help")
    assert help_seconds < 10 * max(processor_seconds("-c", "pass"), 0.01)


ARGUMENTS = [
    ["train", "--help"],
    ["mae", "--help"],
    ["study", "--help"],
    ["demo", "--help"],
    ["train", "demo", "--maskin", "pgs"],
    ["train", "demo", "--masking", "pgss"],
    ["train", "demo", "--epochs", "0"],
    ["train", "--model", "ViT-B-33", *SYNTHETIC],
    ["train", "gone.yaml"],
    ["train", "demo", "--nproc", "none"],
    ["train", "demo", "--name", "a/b"],
    ["test", "--help"],
    ["test", "logs/demo", "--sweet", "all"],
    ["test", "logs/demo", "--suite", "sweet"],
    ["test", "logs/demo", "--batch-size", "0"],
    ["test", "sets", "--help"],
    ["test", "sets", "--datasets", "gone"],
    ["test", "report", "--help"],
    ["test", "report"],
    ["data", "--help"],
    ["data", "world", "--help"],
    ["data", "pack", "pairs.csv"],
    ["export", "--help"],
    ["export", "logs/gone"],
    ["export", "logs/demo", "--push"],
    ["inspect", "--help"],
    ["inspect", "masks", "--help"],
    ["inspect", "masks", "photo.jpg", "--out", "masks.png"],
    ["inspect", "kept", "photos", "--foreground", "masks", "--maskings", "pgss:edges=false"],
    ["trian"],
    [],
]
# One process for all of them, as each would start Python anew.
TELL = """\
import contextlib, io, json, os, sys
from clip_pgs.cli import main
said = []
for argv in json.loads(sys.argv[1]):
    error = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        try:
            code = main(argv)
        except SystemExit as left:
            code = left.code
    heavy = sorted({"torch", "open_clip", "numpy"} & set(sys.modules))
    said.append((code, error.getvalue(), heavy, os.listdir()))
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """By the place in `ARGUMENTS`: exit code, stderr, heavy modules there are then, and files."""
    command = [sys.executable, "-c", TELL, json.dumps(ARGUMENTS)]
    folder = tmp_path_factory.mktemp("empty")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "number", range(len(ARGUMENTS)), ids=[" ".join(each) or "nothing" for each in ARGUMENTS]
)
def test_help_and_what_is_wrong_are_told_without_torch(told, number):
    code, error, heavy, files = told[number]
    is_help = "--help" in ARGUMENTS[number]
    assert code == (0 if is_help else 2), error
    assert error.count("\n") == (0 if is_help or not ARGUMENTS[number] else 1)
    assert (heavy, files) == ([], [])


@pytest.mark.slow
def test_a_wrong_option_takes_a_part_of_what_torch_takes_to_import():
    torch = processor_seconds("-c", "import torch")
    for command in ("train", "test", "data", "inspect"):
        assert processor_seconds("-m", "clip_pgs.cli", command, "demo", "--bad") < torch / 3
    # The core: one per cent of it is less than what two imports differ by.
    core = processor_seconds("-c", "import clip_pgs; clip_pgs.create_masking")
    assert core < 1.5 * torch


@pytest.mark.slow
def test_a_bundled_config_is_found_in_a_folder_without_configs(tmp_path):
    # One of that name is no config.
    (tmp_path / "demo").mkdir()
    done = run("train", "demo", "--check-only", *SYNTHETIC, cwd=tmp_path)
    assert done.returncode == 0
    unread = "is not read with --dataset-type synthetic, whose images are black"
    assert done.stderr.splitlines() == [
        f"WARNING: {flag} {unread}" for flag in ("--train-data", "--val-data")
    ]
    assert "tokens kept  32 of 64" in done.stdout
    assert list(tmp_path.iterdir()) == [tmp_path / "demo"]


@pytest.mark.slow
def test_two_processes_are_checked_for_as_such(tmp_path):
    flags = ["--batch-size", "64", "--check-only", *SYNTHETIC]
    done = run("train", "demo", "--nproc", "2", *flags, cwd=tmp_path)
    assert done.returncode == 2
    # 64 pictures are a batch of one process alone.
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["train demo", "test logs/demo", "data world data/demo"])
def test_a_working_directory_that_was_removed_is_named(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert main(command.split()) == 2
    assert "working directory" in capsys.readouterr().err


@pytest.mark.slow
def test_completion_is_of_commands_options_and_names(tmp_path):
    script = run("completion", "bash", cwd=tmp_path).stdout

    def complete(*words):
        texts = " ".join(f"'{word}'" for word in words)
        asked = f"COMP_WORDS=({texts}); COMP_CWORD={len(words) - 1}; _clip_pgs clip-pgs"
        command = ["bash", "-c", f'{script}\n{asked}\necho "${{COMPREPLY[@]}}"']
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert complete("clip-pgs", "tr") == ["train"]
    assert complete("clip-pgs", "train", "--mask-ratio-m") == ["--mask-ratio-min"]
    assert complete("clip-pgs", "train", "--masking", "pg") == ["pgs", "pgs-released"]
    assert complete("clip-pgs", "train", "--config", "vit_l") == ["vit_l14_pgs05_cc12m"]
    assert complete("clip-pgs", "train", "--precision", "fp") == ["fp16", "fp32"]
    assert complete("clip-pgs", "data", "wor") == ["words", "world"]
    assert complete("clip-pgs", "data", "pack", "--shard") == ["--shard-size"]
    assert complete("clip-pgs", "inspect", "cost", "--captions", "f") == ["flickr8k"]
    assert "--data-root" in complete("clip-pgs", "test", "logs/demo", "--data")
    assert complete("clip-pgs", "test", "report", "logs/demo", "--out") == ["--output"]
    assert complete("clip-pgs", "export", "--pu") == ["--push-to-hub"]
    assert complete("clip-pgs", "demo", "--fr") == ["--fresh"]


# One process for all calls; it ends at the first that fails.
CALLS = """\
import json, sys
import clip_pgs.common
from clip_pgs.cli import main
print(clip_pgs.__file__, clip_pgs.common.CONFIGS)
for argv in json.loads(sys.argv[1]):
    try:
        code = main(argv)
    except SystemExit as left:
        code = left.code
    if code:
        sys.exit(f"{argv} ended with {code}")
"""


@pytest.mark.slow
def test_the_wheel_trains_in_an_empty_folder(tmp_path):
    pytest.importorskip("hatchling")
    python = [sys.executable, "-m"]
    wheels, target, folder = tmp_path / "wheels", tmp_path / "installed", tmp_path / "empty"
    folder.mkdir()
    build = [*python, "hatchling", "build", "-t", "wheel", "-d", str(wheels)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    install = [*python, "pip", "install", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*install, *map(str, wheels.iterdir())], check=True, capture_output=True)

    small = ["--num-train", "128", "--num-val", "16", "--num-per-class", "2"]
    data = ["--train-data", "data/demo/train/00000.tar", "--batch-size", "32", "--warmup", "2"]
    calls = [
        ["data", "world", "data/demo", *small],
        *(
            ["train", "--config", config, *data, "--check-only"]
            for config in ("demo", "configs/train/demo_cluster.yaml")
        ),
        ["test", "sets"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", CALLS, json.dumps(calls)],
        cwd=folder,
        env={**ENVIRONMENT, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].count(str(target)) == 2
    assert done.stdout.count("the options are valid\n") == 2
    assert "retrieval" in done.stdout.rpartition("the options are valid\n")[2]
    bundled = {path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*") if path.is_file()}
    assert bundled <= {
        path.relative_to(target / "clip_pgs") for path in target.rglob("configs/*/*")
    }


@pytest.mark.parametrize("argv", [["-m", "theirs.train", "-m", "clip_pgs"], ["-mtheirs.train"]])
def test_a_program_of_ones_own_that_imports_the_package_keeps_its_hooks(tmp_path, argv):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "__init__.py").write_text(
        "import sys\ndef hook(*_): pass\nsys.excepthook = hook\nimport clip_pgs\n"
    )
    (theirs / "train.py").write_text(
        "import sys\nprint(sys.excepthook.__module__, sys.stdout.errors, sys.path[0])\n"
    )
    env = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(
        [sys.executable, *argv], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.stdout.split() == ["theirs", "strict", str(tmp_path)], done.stderr


@pytest.mark.parametrize("argv", [["-m", "clip_pgs"], ["-mclip_pgs"], ["-um", "clip_pgs.figure"]])
def test_no_file_of_the_working_directory_stands_for_a_module(tmp_path, argv):
    (tmp_path / "argparse.py").write_text("raise SystemExit('harmed')")
    done = subprocess.run(
        [sys.executable, *argv, "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
