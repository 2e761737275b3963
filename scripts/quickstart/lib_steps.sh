# shellcheck shell=bash
# The steps of scripts/quickstart.sh: each one runs once, is timed, and resumes if it was interrupted.
# Sourced, not executed.
#
# A step leaves two stamps, one when it starts and one when it is complete. Its result is valid as long
# as it exists and no earlier step ran after it. The partial result of an interrupted step is kept under
# the same condition and removed otherwise.

# begin_steps FOLDER
begin_steps() {
    stamps=$1/.steps
    times=$1/times.tsv
    previous=$stamps/begun
    number=0
    running=
    mkdir -p "$stamps"
    [[ -e $previous ]] || touch "$previous"
    bold='' faint='' plain=''
    [[ ! -t 1 ]] || bold=$'\033[1m' faint=$'\033[2m' plain=$'\033[0m'
    trap end_steps EXIT
}

# Print how to resume if a step did not complete.
end_steps() {
    local status=$? unfinished=$running
    record_time
    [[ -z $unfinished ]] ||
        printf '\nStopped in step %d, %s (status %d). Run the same command to resume.\n' \
            "$number" "$unfinished" "$status"
}

# quoted COMMAND...: print the command as it can be typed.
quoted() {
    local word words=()
    for word; do
        [[ $word != *[!A-Za-z0-9_./=:,-]* && -n $word ]] || word=\"$word\"
        words+=("$word")
    done
    printf '%s' "${words[*]}"
}

# step NAME RESULT COMMAND...
step() {
    local name=$1 result=$2 stamp
    shift 2
    number=$((number + 1))
    stamp=$stamps/$(printf '%02d' "$number")
    printf '\n%s%2d  %s%s\n' "$bold" "$number" "$name" "$plain"
    if [[ -e $result && -e $stamp.done && ! $previous -nt $stamp.done ]]; then
        printf '    already complete: %s\n' "$result"
    else
        if [[ ! -e $stamp.begun || -e $stamp.done || $previous -nt $stamp.begun ]]; then
            rm -rf "$result" "$stamp.done"
            touch "$stamp.begun"
        fi
        printf '    %s%s%s\n' "$faint" "$(quoted "$@")" "$plain"
        running=$name
        begin=$EPOCHREALTIME
        "$@"
        record_time
        touch "$stamp.done"
    fi
    previous=$stamp.done
}

# Record the time of a step; interrupted steps count too.
record_time() {
    [[ -n $running ]] || return 0
    awk -v name="$running" -v begin="$begin" -v end="$EPOCHREALTIME" \
        'BEGIN { printf "%s\t%.1f\n", name, end - begin }' >>"$times"
    running=
}

# sum_of_times: print minutes and seconds of all steps, including those of earlier runs.
sum_of_times() {
    awk -F '\t' '{ sum += $2 } END { printf "%d min %02d s\n", sum / 60, sum % 60 }' "$times"
}
