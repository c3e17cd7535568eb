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

It sets up .venv on first use, then runs `clip-pgs train`.
Environment (defaults in brackets):
  NPROC_PER_NODE    processes on this machine, as --nproc [its GPUs; 1 without]
  NNODES            machines [1]; with more, each starts this command with
  NODE_RANK           its number, from 0,
  MASTER_ADDR         the address of machine 0, and
  MASTER_PORT         a free port there [29500]
  MAX_RESTARTS      times that several processes start again, from the last
                    checkpoint, after one of them has died [0]

Exit codes: 0 done, 2 bad input, 85 told to leave by SIGTERM or SIGUSR1, and saved,
130 Ctrl-C, 1 anything else. --resume latest goes on after any of them.

All training flags: clip-pgs train --help-all
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
esac

# shellcheck source=scripts/environment.sh
source "$root/scripts/environment.sh"
exec "$PYTHON" -m clip_pgs.cli train "$@"
