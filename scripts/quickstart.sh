#!/usr/bin/env bash
# Self-evolving token cleaning end to end on the embedded pool and base, with its baselines.
# Downloads packages, nothing else. Safe to run again: a finished run only prints its table.
#   bash scripts/quickstart.sh [OPTIONS OF tokenclean clean ...]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/setup.sh"
setup_environment ""
cd "$root"

# One thread: a model this small runs many times slower on two.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

started=$(date +%s)
"$python" -m tokenclean.data.planted --out outputs/planted_small --samples 1200
"$python" -m tokenclean clean \
    -c configs/model/planted.yaml -c configs/data/planted_small.yaml -c configs/fit/planted.yaml \
    -c configs/clean/planted.yaml -c configs/clean/quickstart.yaml --name quickstart "$@"
if [ -f outputs/quickstart/results.json ]; then # not after --estimate
    "$python" -m tokenclean report outputs/quickstart
fi
cat <<'E'

How to read this: ORACLE trains on the planted truth, FULL on every token, RESTART_FULL on every token
in the rounds of SELF_EVOLVING. Where the base already knows the answers (capital, craft, export), the
published score ranks corrupted answers highest, and SELF_EVOLVING loses what the base knew. That is a
property of the method on this pool, not a failed run: the README's "What to expect" has all arms over
three seeds.
E
echo "quickstart: $(($(date +%s) - started)) s after installation; everything is in outputs/quickstart,"
echo "what was cleaned in outputs/quickstart/report/report.html"
