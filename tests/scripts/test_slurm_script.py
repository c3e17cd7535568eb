"""scripts/slurm_train.sh, with stubs for Slurm."""

from __future__ import annotations

import shutil

import pytest

from support.scripts import ENVIRONMENT, run, write_executable

_SCONTROL = """case "$1 $2" in
"show hostnames") printf 'node-a\\nnode-b\\n' ;;
"show job") echo "JobId=$4 $JOB_SAYS Requeue=1 Command=slurm_train.sh" ;;
*) echo "$1 $2" ;;
esac"""
# Like srun, it runs the command that follows its own options once per node, and ends with the
# highest code.
_SRUN = """while [[ "$1" == --* ]]; do echo "$1" >>"$SRUN_OPTIONS"; shift; done
highest=0
for SLURM_NODEID in 0 1; do
    export SLURM_NODEID
    "$@" &
    if [[ -n "${SIGNAL:-}" ]]; then
        until [[ -e "started.$SLURM_NODEID" ]]; do sleep 0.05; done
        kill "-$SIGNAL" $!
    fi
    code=0
    wait $! || code=$?
    ((code > highest)) && highest=$code
done
exit "$highest\""""


@pytest.fixture
def slurm(clone):
    """Run a job of two nodes with a launcher of one's own in place of clip-train.sh."""
    stub = clone.parent / "stub"
    for name, text in {"scontrol": _SCONTROL, "srun": _SRUN}.items():
        write_executable(stub / name, f"#!/usr/bin/env bash\n{text}\n")
    job = {"SLURM_SUBMIT_DIR": clone, "SLURM_JOB_NUM_NODES": 2, "SLURM_JOB_ID": 12345}
    job |= {"SLURM_JOB_NODELIST": "node-[a-b]", "PATH": f"{stub}:{ENVIRONMENT['PATH']}"}
    job |= {"SRUN_OPTIONS": clone.parent / "srun.txt", "JOB_SAYS": "JobState=RUNNING Reason=None"}
    (stub / "python3").unlink()
    # Slurm runs a copy of the script from a folder of its own.
    copy = shutil.copy(clone / "scripts" / "slurm_train.sh", clone.parent / "slurm_script")

    def run_job(launcher, *arguments, **variables):
        (clone / "clip-train.sh").write_text(launcher)
        variables = {name: str(value) for name, value in (job | variables).items()}
        return run(copy, *arguments, cwd=clone.parent, **variables)

    return run_job


def test_slurm_starts_the_launcher_once_on_every_node_with_its_rank(slurm, tmp_path):
    launcher = 'echo "$NODE_RANK of $NNODES at $MASTER_ADDR:$MASTER_PORT" "$@"\n'
    done = slurm(launcher, "a config.yaml", "--epochs", "1")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "0 of 2 at node-a:22345 a config.yaml --epochs 1",
        "1 of 2 at node-a:22345 a config.yaml --epochs 1",
    ], done.stderr
    # An sbatch that asks for more tasks on a node gets no second launcher there.
    assert {"--ntasks=2", "--ntasks-per-node=1"} <= {*(tmp_path / "srun.txt").read_text().split()}


@pytest.mark.parametrize(
    ("code", "says", "lines"),
    [
        (85, "JobState=RUNNING Reason=None PreemptTime=None", ["requeue 12345"]),
        (85, "JobState=COMPLETING Reason=TimeLimit PreemptTime=None", ["requeue 12345"]),
        (
            85,
            "JobState=COMPLETING Reason=None PreemptTime=2026-01-31T12:00:00",
            ["requeue 12345"],
        ),
        # What it says of a job that scancel ends.
        (85, "JobState=COMPLETING Reason=None PreemptTime=None", []),
        (1, "JobState=RUNNING Reason=None PreemptTime=None", []),
        (2, "JobState=RUNNING Reason=None PreemptTime=None", []),
    ],
)
def test_slurm_queues_a_run_again_that_saved_and_left_and_was_not_canceled(
    slurm, code, says, lines
):
    done = slurm(f"exit {code}\n", "--name", "run", JOB_SAYS=says)
    assert (done.returncode, done.stdout.splitlines()) == (code, lines), done.stderr


@pytest.mark.parametrize("code", [1, 2])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_node_that_fails_counts_and_not_those_that_srun_tells_to_leave(slurm, code, failing):
    done = slurm(f"((NODE_RANK == {failing})) && exit {code}\nexit 85\n", "--name", "run")
    assert (done.returncode, done.stdout) == (code, ""), done.stderr


@pytest.mark.parametrize("number", ["TERM", "USR1"])
def test_a_signal_to_a_node_reaches_its_launcher_which_is_waited_for(slurm, number):
    launcher = (
        f"trap 'sleep 0.2; echo saved; exit 85' {number}\n"
        'touch "started.$NODE_RANK"\n'
        "for _ in {1..400}; do sleep 0.05; done\n"
    )
    done = slurm(launcher, "--name", "run", SIGNAL=number)
    assert done.stdout.splitlines() == ["saved", "saved", "requeue 12345"], done.stderr
    assert done.returncode == 85


@pytest.mark.parametrize("number", ["TERM", "USR1"])
def test_a_signal_that_comes_before_the_launcher_listens_queues_the_job_again(slurm, number):
    # As Slurm does it, which signals every process of a step.
    done = slurm(f"kill -{number} $PPID; kill -{number} $$\n", "--name", "run")
    assert (done.returncode, done.stdout) == (85, "requeue 12345\n"), done.stderr
    # That of nobody but itself is a failure.
    assert slurm(f"kill -{number} $$\n", "--name", "run").stdout == ""


@pytest.mark.parametrize("number", ["TERM", "USR1"])
def test_a_signal_to_the_job_itself_lets_the_run_save(slurm, number):
    # The launcher is a child of a shell, which is one of srun, which is one of the script.
    above = "process=$PPID\n" + 2 * (
        "process=$(sed -n 's/^PPid:[[:space:]]*//p' /proc/$process/status)\n"
    )
    done = slurm(f"{above}kill -{number} $process; sleep 0.5; exit 85")
    assert done.returncode == 85
    assert done.stdout == "requeue 12345\n"


def test_a_task_of_an_array_queues_itself_again_and_not_the_others(slurm):
    array = {"SLURM_ARRAY_JOB_ID": 12345, "SLURM_ARRAY_TASK_ID": 3}
    done = slurm("exit 85\n", "--name", "run", **array)
    assert (done.returncode, done.stdout.splitlines()) == (85, ["requeue 12345_3"]), done.stderr


@pytest.mark.parametrize("folder", ["/", ""])
def test_a_job_of_another_folder_is_refused_in_a_sentence(slurm, folder):
    done = slurm("echo started\n", SLURM_SUBMIT_DIR=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: submit this script from the repository root ")
    assert done.stderr.count("\n") == 1
