#!/usr/bin/env bash
# Lint, types and tests in a pinned environment.
#   bash scripts/test.sh          the default tier
#   bash scripts/test.sh --all    the slow tier too
#   bash scripts/test.sh ARGS...  anything else goes to pytest
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/setup.sh"
setup_environment "[dev]"
cd "$root"

tier=(-m "not slow")
if [ "${1:-}" = "--all" ]; then
    tier=()
    shift
fi
# One thread: models this small run many times slower on two. Nothing may reach for a hub.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1

"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
"$python" -m pytest "${tier[@]}" "$@"
