#!/usr/bin/env bash
# The whole path on the embedded data, from nothing but Python 3.10 or newer:
#
#   bash run_all.sh            sets up .venv, then data, DDPM and Robust_adv training on corrupted shapes, samples, grids
#   bash run_all.sh test       sets up .venv, then runs the tests
#
# PYTHON=/path/to/python uses that environment as it is. A run that was stopped goes on where it was; finished stages are
# skipped. The paper-scale commands of every table are in README.md.
set -euo pipefail
cd "$(dirname "$0")"

set_up() {
    if [ -n "${PYTHON:-}" ]; then return; fi
    PYTHON=.venv/bin/python
    if cmp -s requirements.txt .venv/installed.txt; then return; fi
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "run_all.sh: error: python3 is $(python3 --version 2>&1 || echo missing); 3.10 or newer is needed" >&2
        exit 2
    fi
    echo "run_all.sh: making .venv with the packages of requirements.txt"
    if ! python3 -m venv .venv; then
        echo "run_all.sh: error: python3 -m venv failed; on Debian or Ubuntu: apt install python3-venv" >&2
        exit 2
    fi
    "$PYTHON" -m pip install --quiet --requirement requirements.txt
    cp requirements.txt .venv/installed.txt
}

# Runs and prints one stage, a command that can be copied out.
stage() {
    echo
    echo "\$ python $*"
    "$PYTHON" "$@"
}

main_job() {
    local began=$SECONDS network=(--mult 1,2 --attn 8)
    local training=(--data shapes --size 16 --p 0.9 --sigma 0.2 --batch 32 --steps 300 --lr 2e-3 --ema 0.98 "${network[@]}")
    stage data.py shapes --size 16
    for method in ddpm adv; do
        stage train.py "${training[@]}" --method $method --out runs/shapes16-$method
        if [ ! -e runs/shapes16-$method/samples.npz ]; then
            stage sample.py runs/shapes16-$method --n 64 --sampler ddim --steps 100 --batch 64 \
                --out runs/shapes16-$method/samples.npz
        fi
    done
    echo
    echo "done in $(( (SECONDS - began) / 60 )) min $(( (SECONDS - began) % 60 )) s. Compare the grids of the same seeds:"
    echo "  runs/shapes16-ddpm/samples.png   plain DDPM, which learns the noise of its training data"
    echo "  runs/shapes16-adv/samples.png    Robust_adv, which unlearns it"
}

case "${1:-main}" in
    main) set_up; main_job ;;
    test) set_up; "$PYTHON" -m pytest -q test_core.py ;;
    *) echo "run_all.sh: error: '$1' is not known; it is: bash run_all.sh [test]" >&2; exit 2 ;;
esac
