# shellcheck shell=bash
# Functions of scripts/test.sh: timed checks, pytest processes, and their total. Sourced, not
# executed. test.sh defines `python`, the interpreter, and `options`, the arguments for pytest.

results=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; wait; rm -rf "$results"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# A training through the command line, which takes seconds. It replaces tests/integration on
# interpreters that run only the fast tests.
# shellcheck disable=SC2034  # used by test.sh
training_test=tests/integration/test_data_plane.py

heading() { printf '\n== %s\n' "$1"; }

seconds_since() { awk -v begin="$1" -v end="$EPOCHREALTIME" 'BEGIN { print end - begin }'; }

# report VERDICT NAME BEGIN [SUMMARY]
report() { printf '%-7s %7.1f s  %-36s %s\n' "$1" "$(seconds_since "$3")" "$2" "${4:-}"; }

# file_for NAME: print the path, without a suffix, of the result files of a step or process.
file_for() { printf '%s/%s' "$results" "${1//[^A-Za-z0-9_.]/-}"; }

# step NAME COMMAND...: run a check; its output is shown only if it fails.
step() {
    local name=$1 begin=$EPOCHREALTIME output
    shift
    if output=$("$@" 2>&1 </dev/null); then
        report ok "$name" "$begin"
    else
        printf '%s\n' "$output"
        report FAILED "$name" "$begin"
        printf 'FAILED  %s\n' "$name" >"$(file_for "$name").failed_step"
        return 1
    fi
}

# install_for VERSION: install an environment with plain torch for another Python, as .venv-VERSION.
install_for() {
    bash install_spmd.sh --accelerator cuda --python "$1" --venv ".venv-$1"
}

# test_files PATH...: list the test files under these paths; `file::name` arguments are kept.
# tests/integration comes first: whoever starts the long files first finishes first.
test_files() {
    local path
    for path; do
        if [[ $path == *::* ]]; then echo "$path"; else find "$path" -name 'test_*.py'; fi
    done | sort -u | awk '/integration/ { print; next } { rest[++n] = $0 }
        END { for (i = 1; i <= n; i++) print rest[i] }'
}

# test_plain NAME MARKS FILES...: two workers, each of which runs whole files.
test_plain() {
    local name=$1 marks=$2
    shift 2
    # shellcheck disable=SC2154  # test.sh defines options
    run_pytest "$name" "${marks:+$marks and }not xla" \
        -n 2 --dist loadfile --no-loadscope-reorder --durations=10 "${options[@]}" "$@"
}

# test_xla MARKS FILES...: a process for each file, because the number of devices and the flags of the
# compiler are fixed once torch_xla has started, as is SPMD. Two groups share a process each: most
# files of tests/integration, which do not use torch_xla themselves but start command lines, and
# those of tests/models, which use one device without SPMD.
test_xla() {
    local marks=$1 file runs=() models=()
    shift
    export PJRT_DEVICE=CPU CPU_NUM_DEVICES=4
    for file; do
        case $file in
            *gan*_xla.py* | *evaluate*_xla.py*) xla_process "$file" "" "$marks" "$file" ;;
            tests/integration/*) runs+=("$file") ;;
            tests/models/*) models+=("$file") ;;
        esac
    done
    ((${#runs[@]} == 0)) ||
        xla_process "tests/integration, other files" "$no_optimisation" "$marks" "${runs[@]}"
    ((${#models[@]} == 0)) ||
        xla_process "tests/models, other files" "$no_optimisation" "$marks" "${models[@]}"
    for file; do
        case $file in
            *gan*_xla.py* | *evaluate*_xla.py* | tests/integration/* | tests/models/*) ;;
            *) xla_process "$file" "$no_optimisation" "$marks" "$file" ;;
        esac
    done
    wait
    unset PJRT_DEVICE CPU_NUM_DEVICES
}

# Without optimisation the compiler needs a third of the time, but convolutions run slowly.
no_optimisation=--xla_backend_optimization_level=0

# xla_process NAME FLAGS MARKS FILES...: start one process in the background, at most two at a time.
xla_process() {
    local name=$1 flags=$2 marks=$3
    shift 3
    while (($(jobs -rp | wc -l) >= 2)); do wait -n; done
    XLA_FLAGS="$flags ${XLA_FLAGS:-}" \
        run_pytest "$name" "$marks" -p no:cacheprovider --durations=5 "${options[@]}" "$@" &
}

# run_pytest NAME MARKS ARGUMENTS...: run one pytest process. Its exit status, log and junit report
# are left for `finish`. In the foreground its output appears immediately, in the background only
# after a failure.
run_pytest() {
    local name=$1 marks=$2 begin=$EPOCHREALTIME stem status verdict=ok
    shift 2
    stem=$(file_for "$name")
    # shellcheck disable=SC2154  # test.sh defines python
    local command=("$python" -m pytest -m "$marks" --junitxml="$stem.xml" "$@")
    if ((BASH_SUBSHELL)); then
        "${command[@]}" >"$stem.log" 2>&1 </dev/null &
        # shellcheck disable=SC2064  # expands now: this process
        trap "kill $!; exit 143" TERM
        wait $!
        status=$?
    else
        "${command[@]}" 2>&1 </dev/null | tee "$stem.log"
        status=${PIPESTATUS[0]}
    fi
    # Status 5 means that no test ran. That is an error, unless -m or -k deselected the tests. (With
    # workers pytest does not report deselected tests; `finish` then checks the total.)
    if ((status == 5)) && grep -qE '[0-9]+ deselected|[0-9]+ workers? \[' "$stem.log"; then
        verdict=none
        status=0
    elif ((status)); then
        verdict=FAILED
        ((BASH_SUBSHELL == 0)) || printf '%s\n' "$(<"$stem.log")"
    fi
    printf '%s %s\n' "$status" "$name" >"$stem.status"
    report "$verdict" "$name" "$begin" "$(grep -E ' in [0-9.]+s' "$stem.log" | tail -n 1 | tr -d '=')"
}

# finish: print the total over all processes; a process that died without a report is one failure.
finish() {
    local total failed_steps verdict=0
    heading "took $((SECONDS / 60)) min $((SECONDS % 60)) s"
    failed_steps=$(cat "$results"/*.failed_step 2>/dev/null)
    [[ -z $failed_steps ]] || printf '%s\n' "$failed_steps"
    total=$("$python" - "$results" <<'PY'
import sys
from pathlib import Path
from xml.etree import ElementTree

passed = failed = skipped = 0
for process in sorted(Path(sys.argv[1]).glob("*.status")):
    status, name = process.read_text().strip().split(" ", 1)
    bad = 0
    report = process.with_name(process.name.removesuffix(".status") + ".xml")
    if report.exists():
        suite = ElementTree.parse(report).getroot().find("testsuite")
        count = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
        bad = count["failures"] + count["errors"]
        passed += max(0, count["tests"] - bad - count["skipped"])
        skipped += count["skipped"]
    if status != "0":
        failed += max(1, bad)
        print(f"FAILED  {name} (exit status {status})")
if passed + failed == 0:
    print("FAILED  no test ran")
print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
PY
    ) || return 1
    [[ $total != *FAILED* ]] || verdict=1
    printf '%s\n' "$total"
    [[ -z $failed_steps ]] || verdict=1
    return $verdict
}
