#!/usr/bin/env bash
# Formatting, lint, types, import contract and tests; on a bare machine, what they need comes first.
set -uo pipefail

usage() {
    cat <<'EOF'
usage: bash scripts/test.sh [--fast | --slow] [--no-lint] [--python PYTHON] [-- PYTEST ARGUMENTS]

  --fast             what two minutes are enough for: no slow tests, none that need torch_xla, and
                     of the others none in tests/integration and none marked unhurried
  --slow             the slow tests too
  --no-lint          the tests alone: no formatting, lint, type or import checks
  --python PYTHON    test with this interpreter as it is, and install nothing
  -- ARGUMENTS       for pytest: paths choose among the test files, the rest goes to every process

The last line is the sum over every pytest process: N passed, N failed[, N skipped].
EOF
}

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
. scripts/lib_test.sh

marks="not slow"
fast=false
with_xla=true
with_lint=true
python=
options=()
paths=()
while (($#)); do
    case $1 in
        --fast) fast=true with_xla=false ;;
        --slow) marks= ;;
        --no-lint) with_lint=false ;;
        --python) python=${2:?needs an interpreter} && shift ;;
        -h | --help) usage && exit ;;
        --)
            shift
            for argument; do
                if [[ -e ${argument%%::*} ]]; then paths+=("$argument"); else options+=("$argument"); fi
            done
            break
            ;;
        *) usage >&2 && printf 'test.sh: unknown option: %s\n' "$1" >&2 && exit 2 ;;
    esac
    shift
done

if [[ -z $python ]]; then
    bash install_spmd.sh || exit 1
    python=.venv/bin/python
fi

# The same numbers wherever this runs, and no network. Two processes share a small machine's cores.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false WANDB_MODE=offline

if $with_lint; then
    heading "checks"
    tools=$(dirname "$python")
    step "ruff format" "$tools/ruff" format --check --quiet --diff .
    step "ruff check" "$tools/ruff" check --quiet .
    step "mypy" "$tools/mypy"
    step "import contract" "$tools/lint-imports"
    mapfile -t scripts < <(find . -path './.?*' -prune -o -name '*.sh' -print | sort)
    step "shellcheck" "$tools/shellcheck" "${scripts[@]}" .ci/run
fi

# Whoever names files wants them whole.
left_out=
if $fast && ((!${#paths[@]})); then
    marks="$marks and not unhurried"
    left_out=tests/integration/
fi

plain_files=()
xla_files=()
while read -r file; do
    case ${file%%::*} in
        *_xla.py) xla_files+=("$file") ;;
        "${left_out:-:}"*) ;;
        *) plain_files+=("$file") ;;
    esac
done < <(test_files "${paths[@]:-tests}")

if ((${#plain_files[@]})); then
    heading "tests on plain torch"
    # Each file stays whole on one of two workers.
    run_pytest "plain torch" "${marks:+$marks and }not xla" \
        -n 2 --dist loadfile --durations=10 "${options[@]}" "${plain_files[@]}"
fi

if $with_xla && ((${#xla_files[@]})); then
    heading "tests on XLA, 4 virtual devices: one process per file, two at a time"
    if "$python" -c 'import torch_xla' 2>/dev/null; then
        export PJRT_DEVICE=CPU CPU_NUM_DEVICES=4
        for file in "${xla_files[@]}"; do
            while (($(jobs -rp | wc -l) >= 2)); do wait -n; done
            # A third of the time to compile. Convolutions, though, would be computed slowly.
            flags=--xla_backend_optimization_level=0
            [[ $file != *gan* && $file != *evaluate* ]] || flags=
            XLA_FLAGS="$flags ${XLA_FLAGS:-}" \
                run_pytest "$file" "$marks" -p no:cacheprovider "${options[@]}" "$file" &
        done
        wait
    else
        printf 'NOT RUN, torch_xla is not installed here: %s\n' "${xla_files[@]}"
    fi
fi

finish
