#!/usr/bin/env bash
# Builds the wheel, installs it in an environment of its own and works with it from another folder.
# The environment shares the packages of .venv (made by scripts/test.sh), but not the checkout, so
# that what the wheel lacks is missed. Downloads nothing.
#   bash scripts/wheel.sh [FOLDER]    leaves the wheel in FOLDER (default: outputs/wheel)
#   PYTHON                            interpreter that has the packages (default: that of .venv)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-${TOKENCLEAN_VENV:-$root/.venv}/bin/python}"
out="$(mkdir -p "${1:-$root/outputs/wheel}" && cd "${1:-$root/outputs/wheel}" && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
[ -x "$python" ] || { echo "wheel: no $python; run scripts/test.sh first, or set PYTHON" >&2; exit 1; }

# From a copy: a build leaves folders behind, and an old one's would be packed again.
mkdir "$work/source"
(cd "$root" && tar -cf - --exclude=__pycache__ pyproject.toml README.md LICENSE tokenclean) \
    | tar -xf - -C "$work/source"
# Every time stamp in it alike, so that the same tree gives the same bytes.
export SOURCE_DATE_EPOCH=315532800
"$python" -m build --wheel --no-isolation --outdir "$out" "$work/source" >"$work/log" 2>&1 \
    || { cat "$work/log" >&2; exit 1; }
wheel="$(ls -t "$out"/tokenclean-*.whl | head -n 1)"
echo "wheel: $wheel"

"$python" -m venv --without-pip "$work/venv"
"$python" -m pip --disable-pip-version-check --python "$work/venv/bin/python" \
    install --quiet --no-deps --no-index "$wheel"
site="$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
# A path in a .pth file is searched last, and the .pth files in that folder, the checkout's among
# them, are not read.
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/packages.pth"

mkdir "$work/elsewhere"
cd "$work/elsewhere"
unset PYTHONPATH
export PATH="$work/venv/bin:$PATH" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
tokenclean --version
tokenclean --help >help.txt
base="$(python -c 'import tokenclean, pathlib; print(pathlib.Path(tokenclean.__file__).parent)')/data/planted_base"
case "$base" in "$work"/*) ;; *) echo "wheel: $base is not the installed package" >&2; exit 1 ;; esac

python -m tokenclean.data.planted --out planted --samples 60
common=(--model.base.name "$base" --data.path planted/pool.jsonl --data.max_length 512
    --trainer.enable_progress_bar false)
tokenclean fit "${common[@]}" --data.subset 0 --name warmup
tokenclean score "${common[@]}" --name base
tokenclean score "${common[@]}" --model.adapters outputs/warmup --name reference
tokenclean select --base outputs/base --reference outputs/reference \
    --selection.rule token_cleaning --name selected
tokenclean fit "${common[@]}" --data.path outputs/selected --name cleaned
tokenclean clean "${common[@]}" --attributes.experts maths --name loop --loop.arms \
    '{self_evolving: {schedule: self_evolving}, xtf: {schedule: fixed_model, rule: xtf_paper}}'
tokenclean evaluate --help >help.txt
tokenclean report outputs/loop >report.txt
tokenclean show outputs/loop --arm self_evolving --first 2 --text >shown.txt
tokenclean export outputs/loop --arm self_evolving --to jsonl --out exported
tokenclean fit "${common[@]}" --data.path exported --name again
for made in outputs/cleaned/adapter/adapter_model.safetensors outputs/loop/report/report.html \
    outputs/again/adapter/adapter_model.safetensors; do
    [ -s "$made" ] || { echo "wheel: $made was not made" >&2; exit 1; }
done
echo "wheel: works outside of the checkout"
