#!/usr/bin/env bash
# Check formatting, lint and types, and run the tests. On a bare machine, install first.
set -uo pipefail

usage() {
    cat <<'USAGE'
usage: bash scripts/test.sh [--fast | --nightly] [--no-lint] [--python PYTHON] [-- PYTEST ARGUMENTS]

Without an option, every invariant is tested at the smallest scale that can break it: at most 15
minutes on two cores.

  --fast             at most two minutes: no test that is marked slow, none of tests/integration and
                     none that needs torch_xla
  --nightly          the exhaustive tests too (all topologies, many kills, long runs), and the fast
                     tests on every other supported Python; run it before a release
  --slow             the default; accepted for older callers
  --no-lint          tests only: no formatting, lint, type or shell checks
  --python PYTHON    an interpreter: use its environment as it is and install nothing.
                     A version, such as 3.10: use .venv-3.10 with plain torch, and install it first
  -- ARGUMENTS       arguments for pytest; paths select test files, everything else is passed to
                     every pytest process

The last line is the total over all pytest processes: N passed, N failed[, N skipped].
USAGE
}

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
. scripts/lib_install.sh
. scripts/lib_test.sh

level=default
with_lint=true
python=
options=()
paths=()
while (($#)); do
    case $1 in
        --fast) level=fast ;;
        --slow) level=default ;;
        --nightly) level=nightly ;;
        --no-lint) with_lint=false ;;
        --python) python=${2:?needs an interpreter or a version} && shift ;;
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
elif [[ $python == 3.* ]]; then
    install_for "$python" || exit 1
    python=.venv-$python/bin/python
fi

# The same numbers on every machine, and no network access. Two processes share two cores.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false WANDB_MODE=offline

if $with_lint; then
    heading "checks"
    tools=$(dirname "$python")
    mapfile -t scripts < <(find . -path './.?*' -prune -o -name '*.sh' -print | sort)
    step "mypy" "$tools/mypy" >"$results/mypy.out" & # takes a minute at first: alongside the tests
    mypy_job=$!
    step "ruff format" "$tools/ruff" format --check --quiet --diff .
    step "ruff check" "$tools/ruff" check --quiet .
    step "shellcheck" "$tools/shellcheck" "${scripts[@]}" .ci/run
fi

# Files that are named explicitly run in full, but for their nightly tests.
marks="not nightly"
left_out=
case $level in
    nightly) marks= ;;
    fast) ((${#paths[@]})) || marks="not slow and not nightly" left_out=tests/integration/ ;;
esac

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
    test_plain "plain torch" "$marks" "${plain_files[@]}"
fi

if $with_lint; then
    wait "$mypy_job"
    cat "$results/mypy.out"
fi

if [[ $level != fast ]] && ((${#xla_files[@]})); then
    heading "tests on XLA, 4 virtual devices: two processes at a time"
    if "$python" -c 'import torch_xla' 2>/dev/null; then
        test_xla "$marks" "${xla_files[@]}"
    else
        printf 'NOT RUN, torch_xla is not installed in this environment: %s\n' "${xla_files[@]}"
    fi
fi

if [[ $level == nightly ]] && ((!${#paths[@]})); then
    main_version=$("$python" -c 'import sys; print(f"3.{sys.version_info.minor}")')
    PATH=$PWD/$(dirname "$python"):$PATH # uv of this environment shares its downloads with the others
    mapfile -t fast_files < <(test_files tests | grep -v -e '^tests/integration/' -e '_xla\.py$')
    for version in 3.10 3.11 3.12; do
        [[ $version != "$main_version" ]] || continue
        heading "fast tests and a training on Python $version"
        if ! find_python "$version" >/dev/null; then
            printf 'NOT RUN, there is no Python %s on this machine\n' "$version"
        elif step "install for Python $version" install_for "$version"; then
            python=.venv-$version/bin/python
            test_plain "Python $version" "not slow and not nightly" "${fast_files[@]}"
            test_plain "training on Python $version" "not nightly" $training_test
        fi
    done
fi

finish
