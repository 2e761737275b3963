# shellcheck shell=bash disable=SC2034  # the variables are used by the scripts that source this file
# Functions of the scripts in this folder: options, settings, gcloud, hosts. Sourced, not executed.
set -euo pipefail
info() { printf 'pod: %s\n' "$*"; }
fail() { printf 'pod: error: %s\n' "$*" >&2 && exit 2; }
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || fail "bash 4.4 is needed (macOS: brew install bash)"
root=$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
settings=$root/infra/pod.env dry_run=false
option() { false; } # scripts with more options override this
# read_options ARGUMENT...: parse options, read the settings, set $words to the remaining arguments.
read_options() {
    while (($#)); do
        case $1 in
            -h | --help) usage && exit ;;
            --dry-run) dry_run=true ;;
            --env=*) settings=${1#--env=} ;;
            --) shift && break ;;
            -*) option "$1" || { usage >&2 && fail "unknown option: $1"; } ;;
            *) break ;;
        esac
        shift
    done
    words=("$@")
    [[ -f $settings ]] || fail "$settings does not exist: copy infra/pod.env.example and fill it in"
    NAME='' PROJECT='' ZONE='' ACCELERATOR='' RUNTIME_VERSION='' KIND=vm CAPACITY=on-demand SLICES=1
    BUCKET='' MOUNT_POINT='' CREATE_OPTIONS=() PASS_ENV="BUCKET SLICES WANDB_API_KEY HF_TOKEN"
    # shellcheck source=/dev/null
    . "$settings"
    must_be NAME '[a-z]([a-z0-9-]{0,48}[a-z0-9])?' "a-z, 0-9 and '-', beginning with a letter"
    must_be PROJECT '[a-z][a-z0-9.:-]+' "the id of a Google Cloud project"
    must_be ZONE '[a-z]+-[a-z]+[0-9]+-[a-z]' "such as us-east5-b"
    must_be KIND 'vm|queued' "vm or queued"
    must_be CAPACITY 'on-demand|spot|reserved' "on-demand, spot or reserved"
    must_be SLICES '[1-9][0-9]?' "a number of slices"
    must_be BUCKET '([a-z0-9][a-z0-9._-]+[a-z0-9])?' "the name of a bucket, without gs://"
    ((SLICES == 1)) || [[ $KIND == queued ]] || fail "$settings: SLICES=$SLICES needs KIND=queued"
    nodes=("$NAME")
    ((SLICES == 1)) || mapfile -t nodes < <(seq -f "$NAME-%.0f" 0 $((SLICES - 1)))
}
must_be() { [[ ${!1} =~ ^($2)$ ]] || fail "$settings: $1='${!1}' is invalid: it must be $3"; }
quoted() { printf '%q ' "$@"; }
# tpus WORD...: run `gcloud compute tpus WORD...` for this project and zone, or print it (--dry-run).
tpus() {
    local command=(gcloud compute tpus "$@" --zone="$ZONE" --project="$PROJECT" --quiet)
    if $dry_run; then quoted "${command[@]}" && echo; else "${command[@]}"; fi
}
# query RESOURCE NAME FIELD: print the value, "none" (no such resource) or "unknown" (no answer).
query() {
    local answer
    if answer=$(tpus "$1" describe "$2" --format="value($3)" --verbosity=error 2>&1 </dev/null); then
        echo "$answer"
    elif [[ $answer == *NOT_FOUND* ]]; then echo none; else echo unknown; fi
}
# pod_state: print none, waiting, ready, lost or unknown, then the states that gcloud reports.
pod_state() {
    local states=() node state=waiting
    [[ $KIND == vm ]] || states=("$(query queued-resources "$NAME" state.state)")
    for node in "${nodes[@]}"; do states+=("$(query tpu-vm "$node" state)"); done
    case " ${states[*]} " in
        *" unknown "*) state=unknown ;;
        " none "*) state=none ;;
        *" PREEMPTED "* | *" TERMINATED "* | *" SUSPENDED "* | *" FAILED "*) state=lost ;;
    esac
    [[ ! " ${states[*]}" =~ ^(\ READY|\ ACTIVE)+$ ]] || state=ready
    echo "$state ${states[*]}"
}

# on_host NODE WORKER COMMAND [OPTION...]: run it over ssh, without the progress messages of gcloud.
on_host() {
    tpus tpu-vm ssh "$1" --worker="$2" --command="$3" "${@:4}" \
        2> >(grep --line-buffered -vE '^(SSH: Attempting|Using ssh batch size)' >&2)
}
wait_for() { local job status=0 && for job; do wait "$job" || status=$?; done && return "$status"; }

# on_hosts WORKER COMMAND...: run infra/host.sh on one worker of each node, or on `all`, in parallel. (Not 64 at
# a time, gcloud's default: the hosts of a run wait for each other.)
on_hosts() {
    local node jobs=()
    for node in "${nodes[@]}"; do
        on_host "$node" "$1" "bash rae_xla/infra/host.sh $(quoted "$node" "${@:2}")" --batch-size=all </dev/null &
        jobs+=($!)
    done
    wait_for "${jobs[@]}"
}

# send FILE COMMAND: run a command that reads FILE on every host, 8 at a time; NODE in it is replaced.
# (With --worker=all only one host would get the input.)
send() {
    local node worker count=1 jobs=()
    for node in "${nodes[@]}"; do
        $dry_run || count=$(query tpu-vm "$node" "networkEndpoints.len()")
        [[ $count =~ ^[1-9][0-9]*$ ]] || fail "$node: the number of its hosts is unknown ($count)"
        for ((worker = 0; worker < count; worker++)); do
            on_host "$node" "$worker" "${2//NODE/$node}" <"$1" & # bash keeps the exit status until `wait`
            jobs+=($!) && { ((${#jobs[@]} % 8)) || wait "${jobs[@]: -8}" || true; }
        done
    done
    wait_for "${jobs[@]}"
}
