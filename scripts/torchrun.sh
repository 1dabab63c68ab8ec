#!/usr/bin/env bash
# One run in several processes, on one machine or on several, started by torchrun.
#   bash scripts/torchrun.sh VERB [OPTIONS ...]     VERB: fit, score or clean
# PROCESSES   on this machine; default: one per GPU, without GPUs two
# MACHINES    how many; the same command is given on each, and all see the same files
# MAIN        HOST:PORT of the first machine, where there are several
# TOKENCLEAN_VENV  environment to take torchrun from, if none is activated; default: .venv here
# Told to stop (SIGTERM, SIGUSR1, Ctrl-C) it lets the step or shard be finished and ends with 143; the
# same command goes on from there (`score` with another number of processes if need be).
set -euo pipefail
# A process group of its own for the run: Ctrl-C would reach it without this script, and be ignored.
set -m
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# An activated environment goes first.
PATH="$PATH:${TOKENCLEAN_VENV:-$root/.venv}/bin"
if ! command -v torchrun >/dev/null; then
    echo "torchrun.sh: no torchrun: activate the environment, or name its folder in TOKENCLEAN_VENV" >&2
    exit 2
fi
verb="${1:?usage: bash scripts/torchrun.sh VERB [OPTIONS ...]}"
shift

processes="${PROCESSES:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)}"
[ "$processes" -gt 0 ] || processes=2
machines="${MACHINES:-1}"
place=(--standalone)
if [ "$machines" -gt 1 ]; then
    : "${MAIN:?HOST:PORT of the first of several machines}"
    place=(--nnodes "$machines" --rdzv-backend c10d --rdzv-endpoint "$MAIN" --rdzv-id tokenclean)
fi
# Without this each process would take a thread per core.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

told="" run=""
stop() {
    told=yes waiting=yes
    [ -z "$run" ] || kill -USR1 "$run" 2>/dev/null || true
}
trap stop USR1 TERM INT

# Nothing is started anew inside of a call: what ended is to be looked at. torchrun passes SIGUSR1 on
# only if asked to, and would kill after half a minute what is still at a shard.
torchrun "${place[@]}" --nproc-per-node "$processes" --max-restarts 0 \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 600 \
    -m tokenclean "$verb" --trainer.strategy ddp "$@" \
    --trainer.devices "$processes" --trainer.num_nodes "$machines" &
run=$!

# A signal interrupts `wait`, which then does not say how the run ended.
code=0 waiting=yes
while [ -n "$waiting" ]; do
    waiting=""
    wait "$run" && code=0 || code=$?
done
# torchrun itself has one code for whatever ends its processes.
if [ -n "$told" ] && [ "$code" -ne 0 ]; then
    echo "torchrun.sh: stopped as told; the same command goes on where it stopped" >&2
    code=143
fi
exit "$code"
