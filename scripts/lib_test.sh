# shellcheck shell=bash
# The parts of scripts/test.sh: timed steps, pytest processes and their sum. Sourced, not run.

results=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; wait; rm -rf "$results"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
failed_steps=()

heading() { printf '\n== %s\n' "$1"; }

seconds_since() { awk -v begin="$1" -v end="$EPOCHREALTIME" 'BEGIN { print end - begin }'; }

# report VERDICT NAME BEGIN [SUMMARY]
report() { printf '%-7s %7.1f s  %-36s %s\n' "$1" "$(seconds_since "$3")" "$2" "${4:-}"; }

# step NAME COMMAND...: a check, whose output is shown only when it fails.
step() {
    local name=$1 begin=$EPOCHREALTIME output
    shift
    if output=$("$@" 2>&1 </dev/null); then
        report ok "$name" "$begin"
    else
        printf '%s\n' "$output"
        report FAILED "$name" "$begin"
        failed_steps+=("$name")
    fi
}

# test_files PATH...: the test files under these paths, and `file::name` arguments as they are.
test_files() {
    local path
    for path; do
        if [[ $path == *::* ]]; then echo "$path"; else find "$path" -name 'test_*.py'; fi
    done | sort -u
}

# run_pytest NAME MARKS ARGUMENTS...: one process. It leaves its exit status, its log and its junit
# report for `finish`; what it prints appears at once, or all together if it runs in the background.
run_pytest() {
    local name=$1 marks=$2 begin=$EPOCHREALTIME stem status verdict=ok
    shift 2
    stem=$results/${name//[^A-Za-z0-9_]/-}
    # shellcheck disable=SC2154  # test.sh knows the interpreter
    local command=("$python" -m pytest -m "$marks" --junitxml="$stem.xml" "$@")
    if ((BASH_SUBSHELL)); then
        "${command[@]}" >"$stem.log" 2>&1 </dev/null &
        # shellcheck disable=SC2064  # this process
        trap "kill $!; exit 143" TERM
        wait $!
        status=$?
    else
        "${command[@]}" 2>&1 </dev/null | tee "$stem.log"
        status=${PIPESTATUS[0]}
    fi
    # A process that runs no test is at fault, unless -m or -k deselected what it found. (With
    # workers pytest does not say; there the sum of all processes must not be nothing.)
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

# finish: the sum over all processes; one that died without a report counts as one failure.
finish() {
    local sums verdict=0
    heading "took $((SECONDS / 60)) min $((SECONDS % 60)) s"
    ((${#failed_steps[@]} == 0)) || printf 'FAILED  %s\n' "${failed_steps[@]}"
    sums=$("$python" - "$results" <<'PY'
import sys
from pathlib import Path
from xml.etree import ElementTree

passed = failed = skipped = 0
for process in sorted(Path(sys.argv[1]).glob("*.status")):
    status, name = process.read_text().strip().split(" ", 1)
    bad = 0
    if process.with_suffix(".xml").exists():
        suite = ElementTree.parse(process.with_suffix(".xml")).getroot().find("testsuite")
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
    [[ $sums != *FAILED* ]] || verdict=1
    printf '%s\n' "$sums"
    return $((verdict || ${#failed_steps[@]} > 0))
}
