# Sourced by quickstart.sh and test.sh: a virtual environment with pinned versions.
#   PYTHON                  interpreter to build it with (3.11 or newer; default: first suitable)
#   TOKENCLEAN_VENV         where it lives (default: .venv in the checkout)
#   TOKENCLEAN_TORCH_INDEX  index URL to take torch from (a CPU or CUDA build); default: pip's own
# usage: setup_environment EXTRAS   ("" or "[dev]"); leaves $python set to the environment's own.

setup_environment() {
    local extras="$1" venv="${TOKENCLEAN_VENV:-$root/.venv}" candidate want
    python="$venv/bin/python"
    if [ ! -x "$python" ]; then
        for candidate in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
            if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
                echo "setup: creating $venv with $("$candidate" --version)"
                "$candidate" -m venv "$venv"
                break
            fi
        done
        [ -x "$python" ] || { echo "setup: Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11" >&2; exit 1; }
    fi
    # The stamp makes a second run skip pip altogether; it changes with the requirements.
    want="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum) ${extras} $root"
    if [ "$(cat "$venv/.tokenclean-stamp" 2>/dev/null)" != "$want" ]; then
        echo "setup: installing pinned packages (several minutes the first time)"
        if [ -n "${TOKENCLEAN_TORCH_INDEX:-}" ]; then
            "$python" -m pip install --quiet --index-url "$TOKENCLEAN_TORCH_INDEX" "$(grep '^torch==' "$root/constraints.txt")"
        else
            "$python" -m pip install --quiet "$(grep '^torch==' "$root/constraints.txt")"
        fi
        "$python" -m pip install --quiet -c "$root/constraints.txt" -e "$root$extras"
        echo "$want" > "$venv/.tokenclean-stamp"
    fi
}
