# shellcheck shell=bash
# Shared by scripts/first_run_gpu.sh and scripts/first_run_tpu.sh.

# first_run KIND [OUT]: install unless done, and write results/first_run_KIND.json.
first_run() {
    local kind=$1 out=${2:-results/first_run_$1.json} options=()
    if [[ ${SMOKE:-0} == 1 ]]; then
        options=(--smoke)
    else
        bash install_spmd.sh
    fi
    local python=${PYTHON:-.venv/bin/python}
    printf 'first run on a %s: at most ten minutes\n' "${kind^^}"
    "$python" -m rae_xla.tools.first_run "$out" "${options[@]}"
}
