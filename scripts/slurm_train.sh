#!/usr/bin/env bash
# Train on several nodes with Slurm. From the repository root, on a file system all nodes share:
#   sbatch --nodes=2 --gpus-per-node=8 scripts/slurm_train.sh configs/train/NAME.yaml --name RUN
# sbatch's own options win over the requests below; your cluster may want --partition and --account.
# The arguments, and OMP_NUM_THREADS and NPROC_PER_NODE where set, are those of clip-train.sh.
#
# Two minutes before its time is up, and when it is preempted, the job saves and queues itself
# again; it goes on at that step, given a --name. MAX_RESTARTS=3 lets it survive dying processes.
#SBATCH --job-name=clip-pgs
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=48:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail
# Slurm runs a copy of this file, so its own place says nothing about the repository's.
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch from the repository root}"

# Set up here, once, before all nodes look for the same .venv.
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

NNODES="$SLURM_JOB_NUM_NODES"
hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
MASTER_ADDR="${hosts%%$'\n'*}"
MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
# srun does not take over sbatch's --cpus-per-task by itself.
SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
export NNODES MASTER_ADDR MASTER_PORT SRUN_CPUS_PER_TASK

# Slurm sends SIGTERM to this shell as well; it waits for the run to save.
trap ':' TERM
status=0
# shellcheck disable=SC2016  # SLURM_NODEID differs from node to node, so each expands its own.
srun --ntasks-per-node=1 --kill-on-bad-exit=1 \
    bash -c 'NODE_RANK="$SLURM_NODEID" exec bash clip-train.sh "$@"' clip-train "$@" || status=$?

if ((status == 85)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
