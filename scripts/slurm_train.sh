#!/usr/bin/env bash
# Train on several nodes with Slurm. From the repository root, on a file system all nodes share:
#   sbatch --nodes=2 --gpus-per-node=8 scripts/slurm_train.sh configs/train/NAME.yaml --name RUN
# sbatch's own options win over the requests below; your cluster may want --partition and --account.
# Without GPUs: --gpus-per-node=0 --cpus-per-task=N.
# The arguments, and OMP_NUM_THREADS and NPROC_PER_NODE where set, are those of clip-train.sh.
#
# Two minutes before its time is up (Slurm may say so a minute earlier), and when it is preempted,
# the job saves and queues itself again; it goes on at that step, given a --name. You say so with
#   scancel --signal=USR1 JOB      to save and queue again
#   scancel JOB                    to save and end
# MAX_RESTARTS=3 lets it survive dying processes.
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
root="${SLURM_SUBMIT_DIR:-}"
if [[ ! -f "$root/scripts/environment.sh" ]]; then
    echo "error: submit this script from the repository root with sbatch, got folder '$root'" >&2
    exit 2
fi
cd "$root"

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

# On one node of the run. Slurm may signal this shell alone, so it passes the signals on.
# srun ends the other nodes when one fails; they save, leave with 85, and the highest code counts.
# So the codes of a failure, 1 and 2, go above 85 here, and back below.
# shellcheck disable=SC2016  # Each node expands this by itself.
on_node='
    for name in TERM USR1; do
        trap "asked=1; [[ -n \${!:-} ]] || exit 85; kill -$name \$! 2>/dev/null || true" "$name"
    done
    NODE_RANK="$SLURM_NODEID" bash clip-train.sh "$@" &
    while kill -0 "$!" 2>/dev/null; do wait "$!"; done
    wait "$!"
    code=$?
    # Slurm signals each process of a step: a launcher that is still starting dies of it (138, 143;
    # bash says -1 where it was gone before it could be told), and there is nothing to save.
    [[ -n "${asked:-}" ]] && ((code == 138 || code == 143 || code == -1)) && code=85
    ((code == 1 || code == 2)) && code=$((code + 100))
    exit "$code"'

# Slurm may signal this shell as well; it waits for the run to save.
trap ':' TERM USR1
status=0
srun --ntasks="$NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    bash -c "$on_node" clip-train "$@" || status=$?
((status == 101 || status == 102)) && status=$((status - 100))

# Its time limit, a preemption or SIGUSR1 queue a job again; scancel alone ends it.
if ((status == 85)); then
    # A task of an array may have the array's own id as well, which would mean all tasks.
    job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
    job="${job:-$SLURM_JOB_ID}"
    case "$(scontrol show job --oneliner "$job")" in
    *" JobState=RUNNING "* | *" Reason=TimeLimit "* | *" PreemptTime="[0-9]*)
        scontrol requeue "$job"
        ;;
    esac
fi
exit "$status"
