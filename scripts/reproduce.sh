#!/usr/bin/env bash
# Every study in order, then RESULTS.md from what they left. Safe to run again: a finished run is
# not repeated, one that was cut off goes on where it stopped.
#   bash scripts/reproduce.sh            hours on one core; may be stopped and started again
#   bash scripts/reproduce.sh --quick    one seed, small pools: does it run? about ten minutes
#   bash scripts/reproduce.sh --estimate what it would cost
# Studies can be named to run only those: bash scripts/reproduce.sh main rounds
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/setup.sh"
quick="" estimate="" studies=()
for word in "$@"; do
    case "$word" in
        --quick) quick=yes ;;
        --estimate) estimate=yes ;;
        -*) echo "reproduce: unknown option $word" >&2; exit 2 ;;
        *) studies+=("$word") ;;
    esac
done
# rounds, scores, examples and theory read the runs of main
[ ${#studies[@]} -gt 0 ] || studies=(main rounds scores examples theory ours rules noise keep references regimes samples schedule)
setup_environment ""
cd "$root"
# One thread: models this small run many times slower on two.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

options_of() {  # what a study is called with, beside its configuration
    local words=()
    if [ -n "$quick" ]; then
        words+=(--quick)
        grep -q '^  of: outputs/main$' "configs/study/$1.yaml" && words+=(--study.of outputs/main_quick)
    fi
    echo ${words[@]+"${words[@]}"}
}

runs_models() { ! grep -q '^  of:' "configs/study/$1.yaml"; }

for study in "${studies[@]}"; do
    [ -f "configs/study/$study.yaml" ] || { echo "reproduce: configs/study/$study.yaml does not exist" >&2; exit 2; }
done
if [ -n "$estimate" ] || [ -z "$quick" ]; then
    for study in "${studies[@]}"; do
        runs_models "$study" || continue
        echo "== $study"
        "$python" -m tokenclean study -c "configs/study/$study.yaml" $(options_of "$study") --estimate 2>/dev/null \
            | grep -E '^\||^Budget' || echo "no estimate; run it to see why"
    done
    [ -z "$estimate" ] || exit 0
fi
failed=()
for study in "${studies[@]}"; do
    echo "== $study"
    "$python" -m tokenclean study -c "configs/study/$study.yaml" $(options_of "$study") || failed+=("$study")
done
"$python" scripts/write_results.py ${quick:+--quick}
if [ ${#failed[@]} -gt 0 ]; then
    echo "reproduce: failed: ${failed[*]}" >&2
    exit 1
fi
