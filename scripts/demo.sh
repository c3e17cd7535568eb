#!/usr/bin/env bash
# The demo: make the world, train with PGS, evaluate in all suites, draw what PGS keeps.
# `bash clip-train.sh` runs it. What is there already is kept; --fresh redoes the run, and flags
# after it go to training. A run that is being trained is never removed, and there is one demo at a
# time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

world=data/demo
run=logs/demo
table="$run/eval/table.txt"
picture="$run/pgs_keeps.png"

step() {
    printf '\n== %s\n' "$1"
}

# Keep a second demo out. The lock is on the open folder, so it stays when this Python ends, and goes
# with this shell and what it has started. Some file systems have no locks.
exec 9<.
if ! "$PYTHON" -c '
import sys

try:
    import fcntl

    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(1)
except (ImportError, OSError):
    pass
'; then
    refuse "another demo is running in this folder; wait for its end, or stop it"
fi

# Take the lock that training holds on its run, and with an argument run it as a command under it.
with_run_lock() {
    "$PYTHON" -c '
import json
import subprocess
import sys

run, *command = sys.argv[1:]
try:
    import fcntl

    lock = open(f"{run}/.lock", "r+")
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except (BlockingIOError, PermissionError):
    try:
        holder = json.load(lock)
        name = "process {process} on {host}".format_map(holder)
    except (ValueError, KeyError, TypeError, NameError):
        name = "another process"
    sys.exit(f"error: {run} is being trained by {name}; wait for its end, or stop it")
except (ImportError, OSError):
    pass
if command:
    sys.exit(subprocess.run(command).returncode)
' "$run" "$@" || exit 2
}

train() {
    "$PYTHON" -m clip_pgs.training --config configs/train/demo.yaml "$@"
}

if [[ "${1:-}" == --fresh ]]; then
    for flag in "${@:2}"; do
        case "$flag" in
        -h | --help | --check-only)
            train "${@:2}"
            exit
            ;;
        esac
    done
    with_run_lock
fi

step "1 of 4: the demo world"
"$PYTHON" -m clip_pgs.data world "$world"

if [[ "${1:-}" == --fresh ]]; then
    shift
    # Under another name, as the old run must not go before the new one is known to be possible.
    train "$@" --logs logs --name demo.fresh --check-only
    with_run_lock rm -rf "$run"
fi

step "2 of 4: training"
if [[ -d "$run/export" ]]; then
    echo "done before; bash clip-train.sh --fresh trains anew"
else
    train "$@" --logs logs --name demo --resume latest
fi

step "3 of 4: evaluation"
if [[ "$table" -nt "$run/export" ]]; then
    cat "$table"
else
    mkdir -p "$run/eval"
    bash clip-test.sh "$run" --suite all --datasets demo | tee "$table.part"
    mv "$table.part" "$table"
fi

step "4 of 4: what PGS keeps of six scenes"
if [[ ! "$picture" -nt "$run/export" ]]; then
    "$PYTHON" -m clip_pgs.inspection masks "$world"/scenes/*.png --model "$run" \
        --masking random cluster pgs --mask-ratio 0.5 --output "$picture" >/dev/null
fi
echo "$picture"

step "Where everything lies"
while read -r place meaning; do
    printf '%-34s %s\n' "$place" "$meaning"
done <<END
$run/export/ the model; open_clip opens it as local-dir:$PWD/$run/export
$run/eval/report/report.html the report: figures, and the published numbers beside it
$table the table above; beside it, one JSON per data set
$picture the picture
$run/out.log what training said; curves: tensorboard --logdir $run/tensorboard
$run/checkpoints/ weights and optimiser, to continue from
$world/ the generated images and captions
END
