#!/usr/bin/env bash
# Train a model, or, without arguments, run the demo. See --help.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

usage() {
    cat <<'HELP'
Usage:
  bash clip-train.sh                     the demo: data, training, evaluation and a picture in
                                         logs/demo; continues or shows what is there already
  bash clip-train.sh --fresh [FLAGS]     the demo again from the start; FLAGS go to training
  bash clip-train.sh CONFIG.yaml [FLAGS] a run of configs/train/ on all GPUs of this machine
  bash clip-train.sh FLAGS               a run told by flags alone

Environment (defaults in brackets):
  NPROC_PER_NODE    processes on this machine [its GPUs; 1 without]
  NNODES            machines [1]; with more, each starts this command with
  NODE_RANK           its number, from 0,
  MASTER_ADDR         the address of machine 0, and
  MASTER_PORT         a free port there [29500]
  MAX_RESTARTS      times that several processes start again, from the last
                    checkpoint, after one of them has died [0]

Exit codes: 0 done, 2 bad input, 85 told to leave by SIGTERM or SIGUSR1, and saved,
130 Ctrl-C, 1 anything else. --resume latest goes on after any of them.

All training flags: python -m clip_pgs.training --help
HELP
}

case "${1:-}" in
-h | --help)
    usage
    exit 0
    ;;
"" | --fresh)
    exec bash "$root/scripts/demo.sh" "$@"
    ;;
-*) ;;
*)
    set -- --config "$@"
    ;;
esac

NNODES="${NNODES:-1}"
MAX_RESTARTS="${MAX_RESTARTS:-0}"
# shellcheck source=scripts/environment.sh
source "$root/scripts/environment.sh"
count_processes
require_counts NNODES
if [[ ! "$MAX_RESTARTS" =~ ^[0-9]+$ ]]; then
    refuse "MAX_RESTARTS must be a whole number, got '$MAX_RESTARTS'"
fi

if ((NNODES == 1 && NPROC_PER_NODE == 1)); then
    exec "$PYTHON" -m clip_pgs.training "$@"
fi

if ((NNODES == 1)); then
    rendezvous=(--standalone)
else
    if [[ ! "${NODE_RANK:-}" =~ ^[0-9]+$ || -z "${MASTER_ADDR:-}" ]]; then
        refuse "NNODES=$NNODES needs NODE_RANK, a number from 0, and MASTER_ADDR"
    fi
    rendezvous=(
        --nnodes "$NNODES"
        --rdzv-backend c10d
        --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}"
        --rdzv-conf "is_host=$((NODE_RANK == 0))"
    )
fi

# A worker's exit code 2 reaches us as torchrun's 1, below pages of its own, so bad input is refused
# here. Machine 0 checks for all: once it has started, the run folder exists for the others.
if ((${NODE_RANK:-0} == 0)); then
    WORLD_SIZE=$((NNODES * NPROC_PER_NODE)) "$PYTHON" -m clip_pgs.training --check-only "$@"
fi

share_cores

# Signals come to this shell, or to all at once; torchrun ends with 1 whatever ended the run. So the
# run leaves its own exit code and reason here.
launch="$(mktemp -d)"
trap 'rm -rf "$launch"' EXIT
export CLIP_PGS_LAUNCH_DIR="$launch"

# Else processes that start again look for the addresses of those before them
# (https://github.com/pytorch/pytorch/issues/135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# Without `--` torchrun takes --logs, --name and others for abbreviations of its own flags.
"$PYTHON" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$NPROC_PER_NODE" \
    --max-restarts "$MAX_RESTARTS" --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m -- clip_pgs.training "$@" &
torchrun=$!
stopped=""

# shellcheck disable=SC2329  # The traps call it.
pass_on() {
    # A second signal would keep torchrun from waiting for the run to save.
    if [[ -z "$stopped" ]]; then
        kill -s "$1" "$torchrun" 2>/dev/null || true
    fi
    stopped="$1"
}
for name in TERM HUP USR1; do
    # shellcheck disable=SC2064  # The name is this turn's.
    trap "pass_on $name" "$name"
done
# A terminal sends Ctrl-C to torchrun, too.
trap 'stopped=INT' INT

status=0
while kill -0 "$torchrun" 2>/dev/null; do
    wait "$torchrun" || true
done
wait "$torchrun" || status=$?

if ((status != 0)); then
    reason=""
    for file in "$launch"/exit.*; do
        if [[ -f "$file" ]]; then
            { read -r status && read -r reason; } <"$file"
        fi
    done
    if [[ -n "$reason" ]]; then
        printf '%s\n' "$reason" >&2
    elif [[ "$stopped" == TERM || "$stopped" == USR1 || "$stopped" == HUP ]]; then
        # It came before there was anything to save.
        status=85
    fi
fi
exit "$status"
