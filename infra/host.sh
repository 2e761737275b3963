#!/usr/bin/env bash
# Commands that run on a host of a pod. The other scripts call it over ssh: host.sh NODE VERB ARGUMENT...
set -euo pipefail
node=$1 verb=$2
shift 2
worker=$(hostname)
me=$node/${worker##*-w-}
code=$HOME/rae_xla run=$HOME/rae_xla.run session=rae_xla
info() { printf '%s: %s\n' "$me" "$*"; }
fail() { info "error: $*" >&2 && exit 2; }
alive() { tmux has-session -t "=$session" 2>/dev/null; }
umask 077 && mkdir -p "$code" "$run" && cd "$code"

# Print one line, which watch.sh parses: STATE, exit status, last step, its age in seconds.
report() {
    local state=idle status=- step=- age=- metrics
    [[ ! -e $run/command ]] || state=died
    [[ ! -e $run/status ]] || state=ended status=$(<"$run/status")
    ! alive || state=running status=-
    [[ $state == idle || ! -e $run/stop ]] || state=${state/#*ed/stopped}
    metrics=$(find results -name metrics.jsonl -newer "$run/command" -printf "%T@ %p\n" 2>/dev/null | sort -n | tail -n 1) || true
    if [[ -n $metrics ]]; then
        step=$(tail -n 1 "${metrics#* }" | grep -oE '"step": *[0-9]+' | grep -oE '[0-9]+' || echo -)
        age=$(($(date +%s) - ${metrics%%.*}))
    fi
    info "$state $status $step $age"
}

# Print the id of the process that trains, not of the shells that wait for it.
main_process() {
    local pid child
    pid=$(<"$run/pid")
    while [[ $(ps -o comm= -p "$pid") == *sh ]] && child=$(pgrep -o -P "$pid"); do pid=$child; done
    echo "$pid"
}

case $verb in
    unpack) # FILE COMMIT: unpack the code and remove files that only the previous code had
        [[ $(cat .commit 2>/dev/null) != "$2" ]] || { info "code is up to date: ${2:0:12}" && exit; }
        ! alive || fail "a run is active on this host with other code: stop it first (infra/stop.sh)"
        [[ ! -e .files ]] || xargs -0 rm -f -- <.files
        rm -f .commit
        tar -xzf "$1"
        tar -tzf "$1" | grep -v '/$' | tr '\n' '\0' >.files
        echo "$2" >.commit
        info "code: ${2:0:12}"
        ;;
    install) # BUCKET MOUNT_POINT
        command -v tmux >/dev/null || sudo apt-get install -y -o DPkg::Lock::Timeout=300 tmux
        bash install_spmd.sh --accelerator tpu 2>&1 | sed -u "s|^|$me: |"
        [[ -z $1 ]] || gcloud storage ls "gs://$1" >/dev/null ||
            fail "gs://$1 cannot be listed from here: give the pod's service account the role Storage Object Admin on it"
        [[ -z $2 ]] || bash setup_gcs_mount.sh "gs://$1" "$2" 2>&1 | sed -u "s|^|$me: |"
        ;;
    doctor) .venv/bin/rae-xla doctor "$@" 2>&1 | sed -u "s|^|$me: |" ;;
    start) # reads the script to run, which may contain secrets, from standard input
        cat >"$run/command.new"
        [[ $(tail -n 1 "$run/command.new") == "# complete" ]] || fail "the command arrived incomplete"
        [[ -e .venv/bin/activate ]] || fail "this host is not set up: infra/setup.sh"
        if alive; then
            cmp -s "$run/command.new" "$run/command" || fail "another run is active on this host: stop it first (infra/stop.sh)"
            info "already running" && exit
        fi
        mv "$run/command.new" "$run/command" && rm -f "$run/status" "$run/stop" "$run/pid"
        tmux new-session -d -s "$session" "bash infra/host.sh $node run"
        info "started; log: $run/log"
        ;;
    run) # in tmux
        trap '' HUP
        # shellcheck source=/dev/null
        . .venv/bin/activate
        printf '\n== %s, %s, %s\n' "$(date -u +%FT%TZ)" "$me" "$(cat .commit)" >>"$run/log"
        setsid bash "$run/command" >>"$run/log" 2>&1 </dev/null &
        echo $! >"$run/pid"
        wait $! && status=0 || status=$?
        printf '== exit status %s\n' "$status" >>"$run/log"
        echo "$status" >"$run/status.new" && mv "$run/status.new" "$run/status"
        ;;
    state) report ;;
    free) bash infra/free_tpu.sh "$@" 2>&1 | sed -u "s|^|$me: |" ;;
    log) tail -n "$1" ${2:+"$2"} "$run/log" | sed -u "s|^|$me: |" ;;
    stop | end) # SECONDS: SIGTERM, on which a run saves; SIGKILL after that time. `stop` also marks the run as stopped.
        if alive; then
            [[ $verb == end ]] || touch "$run/stop"
            kill -TERM "$(main_process)" || true
            for ((i = 0; i < $1; i++)); do
                alive || break
                sleep 1
            done
            if alive; then
                info "still running after $1 s: killed"
                kill -KILL -- "-$(<"$run/pid")"
                while alive; do sleep 1; done
            fi
        fi
        report
        ;;
    *) fail "unknown verb: $verb" ;;
esac
