"""scripts/slurm_train.sh, with stubs for Slurm."""

from __future__ import annotations

import shutil

import pytest

from support.scripts import ENVIRONMENT, run, write_executable


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
