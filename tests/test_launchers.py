"""The shell scripts, as processes. Where the real thing takes minutes, a stub stands for it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from support.runs import write_model

ROOT = Path(__file__).parents[1]
# The environment that runs the tests, active; not the one that made the variables of a launcher.
ENVIRONMENT = {
    **{name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ},
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
}


def run(script, *arguments, cwd, timeout=400, **environment):
    return subprocess.run(
        ["bash", str(script), *map(str, arguments)],
        cwd=cwd,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def tiny_run(folder, *, name):
    """Return flags of a run of two steps on images made up on the spot."""
    flags = f"--dataset-type synthetic --train-num-samples 16 --batch-size 4 --name {name}"
    flags += " --epochs 1 --warmup 1 --workers 0 --precision fp32 --device cpu --masking pgs"
    return ["--model-config", write_model(folder), "--logs", "my logs", *flags.split()]


def write_executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def test_help_is_short_and_names_the_full_one(tmp_path):
    done = run(ROOT / "clip-train.sh", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "python -m clip_pgs.training --help" in done.stdout
    assert len(done.stdout.splitlines()) < 25


def test_two_processes_train_with_logs_in_a_folder_of_ones_own(tmp_path):
    flags = tiny_run(tmp_path, name="two")
    done = run(ROOT / "clip-train.sh", *flags, cwd=tmp_path, NPROC_PER_NODE="2")
    assert done.returncode == 0, done.stderr
    assert "Process 0 of 2" in (tmp_path / "my logs" / "two" / "out.log").read_text()
    assert (tmp_path / "my logs/two/export/open_clip_model.safetensors").is_file()


def test_two_machines_train_one_model(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = [str(flag) for flag in tiny_run(tmp_path, name="nodes")]
    machines = [
        subprocess.Popen(
            ["bash", str(ROOT / "clip-train.sh"), *flags],
            cwd=tmp_path,
            env={
                **ENVIRONMENT,
                "NPROC_PER_NODE": "1",
                "NNODES": "2",
                "NODE_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [machine.communicate(timeout=400)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(outputs)
    log = (tmp_path / "my logs" / "nodes" / "out.log").read_text()
    assert "Process 0 of 2" in log
    assert "Training epochs 0 to 1 of 2 steps each" in log


@pytest.mark.parametrize(
    ("processes", "arguments", "sentence"),
    [
        ("1", ["gone.yaml"], "error: "),
        ("2", ["--model", "ViT-B-32", "--maskin", "pgs"], "error: unknown option --maskin "),
    ],
)
def test_bad_input_ends_with_code_2_one_sentence_and_nothing_made(
    tmp_path, processes, arguments, sentence
):
    done = run(ROOT / "clip-train.sh", *arguments, cwd=tmp_path, NPROC_PER_NODE=processes)
    assert done.returncode == 2
    assert done.stderr.startswith(sentence)
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"NPROC_PER_NODE": "all"}, "NPROC_PER_NODE must be a whole number above 0, got 'all'"),
        ({"NNODES": "0", "NPROC_PER_NODE": "1"}, "NNODES must be a whole number above 0, got '0'"),
        (
            {"NNODES": "2", "NPROC_PER_NODE": "1", "NODE_RANK": "1"},
            "NNODES=2 needs NODE_RANK, a number from 0, and MASTER_ADDR",
        ),
    ],
)
def test_a_wrong_environment_variable_is_named(tmp_path, environment, sentence):
    done = run(ROOT / "clip-train.sh", "--model", "ViT-B-32", cwd=tmp_path, **environment)
    assert (done.returncode, done.stderr) == (2, f"error: {sentence}\n")


# A Python that makes environments of itself and writes down what pip is told.
STUB_PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
"-c "*) exit 0 ;;
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip") if [[ "$3" == install ]]; then echo "$@" >>pip.log; exit "${PIP_EXIT:-0}"; fi ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """A copy of what setup.sh reads, in a folder with a space."""
    root = tmp_path / "a clone"
    (root / "scripts").mkdir(parents=True)
    for name in ("setup.sh", "environment.sh", "constraints.txt", "slurm_train.sh"):
        shutil.copy(ROOT / "scripts" / name, root / "scripts")
    shutil.copy(ROOT / "pyproject.toml", root)
    write_executable(tmp_path / "stub" / "python3", STUB_PYTHON)
    return root


def set_up(clone, **environment):
    stub = clone.parent / "stub" / "python3"
    return run(clone / "scripts" / "setup.sh", cwd=clone.parent, PYTHON=str(stub), **environment)


def installations(clone):
    return (clone / "pip.log").read_text().splitlines()


def test_setup_makes_an_environment_with_all_extras_once(clone):
    first, second = set_up(clone), set_up(clone)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert "takes minutes" in first.stdout
    assert second.stdout == ""
    (command,) = installations(clone)
    assert command.endswith("--constraint scripts/constraints.txt --editable .[training,eval,dev]")


@pytest.mark.parametrize("name", ["pyproject.toml", "scripts/constraints.txt"])
def test_setup_installs_again_when_the_requirements_change(clone, name):
    set_up(clone)
    (clone / ".venv" / "kept").touch()
    with (clone / name).open("a") as file:
        file.write("# changed\n")
    assert set_up(clone).returncode == 0
    assert len(installations(clone)) == 2
    assert (clone / ".venv" / "kept").exists()


def test_setup_starts_over_after_it_was_broken_off(clone):
    failed = set_up(clone, PIP_EXIT="1")
    assert failed.returncode == 1
    assert "error: the packages could not be installed" in failed.stderr
    (clone / ".venv" / "half a package").touch()
    done = set_up(clone)
    assert done.returncode == 0
    assert "making it anew" in done.stdout
    assert not (clone / ".venv" / "half a package").exists()


def test_setup_makes_a_new_environment_when_the_old_one_lost_its_python(clone):
    set_up(clone)
    (clone / ".venv" / "bin" / "python").unlink()
    assert set_up(clone).returncode == 0
    assert (clone / ".venv" / "bin" / "python").exists()


def test_setup_refuses_an_old_python_in_one_sentence(clone):
    old = clone.parent / "old python"
    write_executable(old, "#!/usr/bin/env bash\nexit 1\n")
    done = run(clone / "scripts" / "setup.sh", cwd=clone, PYTHON=str(old))
    assert done.returncode == 1
    assert done.stderr == (f"error: Python 3.10 or newer is needed, and none of these is: {old}\n")
    assert not (clone / ".venv").exists()


def picked_python(clone, **environment):
    script = clone.parent / "print_python.sh"
    script.write_text(f'source "{clone}/scripts/environment.sh"\necho "$PYTHON"\n')
    done = run(script, cwd=clone.parent, **environment)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1])


def test_an_active_environment_that_has_the_package_is_used_as_it_is(clone):
    python = picked_python(clone)
    assert python.parent == Path(sys.executable).parent
    assert not (clone / ".venv").exists()


def test_an_active_environment_without_the_package_gives_way_to_venv(clone):
    # `python` and `python3` fail to find the package, and are good enough to make .venv.
    stub = clone.parent / "stub"
    write_executable(stub / "python3", STUB_PYTHON.replace("exit 0", '[[ "$2" != *requires* ]]', 1))
    shutil.copy(stub / "python3", stub / "python")
    python = picked_python(clone, PATH=f"{stub}:{os.environ['PATH']}")
    assert python == clone / ".venv" / "bin" / "python"
    assert len(installations(clone)) == 1


# Leaves behind what each part of the demo would, and writes down its arguments.
STUB_DEMO = """#!/usr/bin/env bash
if [[ "$1" == -c ]]; then exit 0; fi
echo "$2 ${*:3}" >>calls.log
case "$2 $*" in
*--check-only*) ;;
clip_pgs.training*) mkdir -p logs/demo/export ;;
clip_pgs.evaluation*) echo "the table" ;;
clip_pgs.inspection*) touch logs/demo/pgs_keeps.png ;;
esac
"""


@pytest.fixture
def demo(clone):
    """Run `clip-train.sh` in a clone, and return its output and the modules that it ran."""
    for name in ("clip-train.sh", "clip-test.sh", "scripts/demo.sh"):
        shutil.copy(ROOT / name, clone / name)
    stub = clone.parent / "stub"
    write_executable(stub / "python", STUB_DEMO)

    def run_demo(*arguments):
        calls = clone / "calls.log"
        calls.write_text("")
        path = f"{stub}:{os.environ['PATH']}"
        done = run(clone / "clip-train.sh", *arguments, cwd=clone.parent, PATH=path)
        assert done.returncode == 0, done.stderr
        return done.stdout, calls.read_text().splitlines()

    return run_demo


def modules(calls):
    return [call.split()[0].removeprefix("clip_pgs.") for call in calls]


def test_the_demo_makes_data_trains_evaluates_and_draws(demo):
    output, calls = demo()
    assert modules(calls) == ["data", "training", "evaluation", "inspection"]
    assert "the table" in output
    assert "logs/demo/pgs_keeps.png" in output


def test_the_demo_shows_a_finished_result_without_doing_it_again(demo):
    first, _ = demo()
    second, calls = demo()
    assert modules(calls) == ["data"]
    assert "the table" in second
    assert second.splitlines()[-6:] == first.splitlines()[-6:]


def test_the_demo_continues_an_unfinished_run(demo, clone):
    demo()
    shutil.rmtree(clone / "logs" / "demo" / "export")
    (clone / "logs" / "demo" / "checkpoints").mkdir()
    _, calls = demo()
    assert modules(calls) == ["data", "training", "evaluation", "inspection"]
    assert calls[1].endswith("--name demo --resume latest")
    assert (clone / "logs" / "demo" / "checkpoints").exists()


def test_a_fresh_demo_replaces_its_run_alone_and_passes_flags_on(demo, clone):
    demo()
    for kept in ("logs/demo/old", "logs/another"):
        (clone / kept).mkdir()
    _, calls = demo("--fresh", "--epochs", "1")
    assert modules(calls) == ["data", "training", "training", "evaluation", "inspection"]
    assert "--check-only" in calls[1]
    assert "--epochs 1" in calls[2]
    assert not (clone / "logs" / "demo" / "old").exists()
    assert (clone / "logs" / "another").exists()


@pytest.fixture
def slurm(clone):
    """Run a job of two nodes with a launcher of one's own in place of clip-train.sh."""
    stub = clone.parent / "stub"
    for name, text in {
        "scontrol": 'if [[ "$1" == requeue ]]; then echo "requeued $2"; exit; fi\n'
        "printf 'node-a\\nnode-b\\n'",
        # Like srun, it runs the command that follows its own options once per node.
        "srun": 'while [[ "$1" == --* ]]; do shift; done\n'
        'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || exit $?; done',
    }.items():
        write_executable(stub / name, f"#!/usr/bin/env bash\n{text}\n")
    job = {"SLURM_SUBMIT_DIR": clone, "SLURM_JOB_NUM_NODES": 2, "SLURM_JOB_ID": 12345}
    job |= {"SLURM_JOB_NODELIST": "node-[a-b]", "PATH": f"{stub}:{ENVIRONMENT['PATH']}"}
    (stub / "python3").unlink()
    # Slurm runs a copy of the script from a folder of its own.
    copy = shutil.copy(clone / "scripts" / "slurm_train.sh", clone.parent / "slurm_script")
    variables = {name: str(value) for name, value in job.items()}

    def run_job(launcher, *arguments):
        (clone / "clip-train.sh").write_text(launcher)
        return run(copy, *arguments, cwd=clone.parent, **variables)

    return run_job


def test_slurm_starts_the_launcher_on_every_node_with_its_rank(slurm):
    launcher = 'echo "$NODE_RANK of $NNODES at $MASTER_ADDR:$MASTER_PORT" "$@"\n'
    done = slurm(launcher, "a config.yaml", "--epochs", "1")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "0 of 2 at node-a:22345 a config.yaml --epochs 1",
        "1 of 2 at node-a:22345 a config.yaml --epochs 1",
    ], done.stderr


@pytest.mark.parametrize(("code", "lines"), [(85, ["requeued 12345"]), (1, []), (2, [])])
def test_slurm_queues_a_run_again_that_saved_and_left(slurm, code, lines):
    done = slurm(f"exit {code}\n", "--name", "run")
    assert (done.returncode, done.stdout.splitlines()) == (code, lines)
