#!/usr/bin/env bash
# Carry a run through to its end: create the pod, set it up, launch; when the pod is preempted or the
# run ends before its time, again. It is safe to end it and to run it again.
. "$(dirname "${BASH_SOURCE[0]}")/lib_pod.sh"

usage() {
    cat <<'TEXT'
usage: bash infra/watch.sh [--delete] [--every=SECONDS] [--dry-run] [--env=FILE] COMMAND...

  COMMAND           as for infra/launch.sh; started again, it must go on where it stopped, with
                    checkpoints in a bucket (checkpoint.dir=gs://...)
  --delete          delete the pod after success
  --every=SECONDS   between two looks (60)
  --dry-run         print the commands of a first start and run none

Ends with 0 when all hosts did; 75 when infra/stop.sh stopped the run; 2 when the run cannot work as it
is; 1 after five failures without a step between. It keeps results/pods/NAME.journal, and the commit.
TEXT
}
delete=false every=60
option() { case $1 in --delete) delete=true ;; --every=*) every=${1#*=} ;; *) false ;; esac }
read_options "$@"
((${#words[@]})) || { usage >&2 && fail "there is no command"; }
[[ $every =~ ^[1-9][0-9]*$ ]] || fail "--every=$every is no number of seconds"
commit=$(git -C "$root" rev-parse HEAD)

infra() { bash "$root/infra/$1.sh" --env="$settings" "${@:2}" </dev/null; }
if $dry_run; then
    infra create --dry-run && infra setup --dry-run --commit="$commit" && infra launch --dry-run "${words[@]}"
    exit
fi
journal=$root/results/pods/$NAME.journal
mkdir -p "${journal%/*}"
note() { printf '%s %s\n' "$(date -u +%FT%TZ)" "$*" | tee -a "$journal"; }
exec 9>>"$journal"
! command -v flock >/dev/null || flock --nonblock 9 || fail "another watch.sh looks after $NAME: $journal"

# Of the run: failures without a step between, the last step; patience with hosts that end apart.
failures=0 best=0 patience=5 pause=30 known=false
tell() { [[ $1 == "${!2:-}" ]] || { printf -v "$2" %s "$1" && note "$1"; }; } # what is new
finish() { note "$2" && exit "$1"; }
retry() { # MESSAGE: 30 s, one minute, two, up to 15
    note "$1: again in $pause s" && sleep "$pause"
    pause=$((pause < 450 ? 2 * pause : 900))
}
begin() {
    { infra setup --commit="$commit" && infra launch "${words[@]}"; } || { retry "not started" && return; }
    known=true && note "launched: $(quoted "${words[@]}")"
}
of() { grep -cE "^[^ ]+ ($1) " <<<"$hosts" || true; } # how many hosts say so
look() { # at the hosts, and do what is to be done
    local hosts count=0 node some all running idle stopped complete again wrong failed step
    for node in "${nodes[@]}"; do
        some=$(ask tpu-vm "$node" "networkEndpoints.len()")
        [[ $some =~ ^[1-9][0-9]*$ ]] && count=$((count + some)) || return 0
    done
    hosts=$(on_hosts all state 2>/dev/null) || true
    all=$(of '.*') running=$(of 'running -') idle=$(of 'idle -') stopped=$(of 'stopped [-0-9]+')
    complete=$(of 'ended 0') again=$(of 'ended 75') wrong=$(of 'ended 2')
    failed=$((all - running - idle - stopped - complete - again - wrong))
    tell "hosts: $all of $count answer: $running run, $idle idle, $complete complete, $again to be started again, $((failed + wrong)) failed, $stopped stopped" told
    step=$(awk -v best="$best" '$4 + 0 > best { best = $4 } END { print best }' <<<"$hosts")
    ((step == best)) || failures=0 best=$step
    if ((all < count)); then
        $known || begin # not set up yet; else not reachable for the moment
        return 0
    fi
    known=true
    if ((running == count)); then
        patience=5 pause=30
    elif ((complete == count)); then
        ! $delete || infra delete --yes || note "not deleted: infra/delete.sh"
        finish 0 "complete, at step $best"
    elif ((wrong)); then
        on_hosts all end 60 || true
        finish 2 "the run cannot work as it is: infra/logs.sh --all says why"
    elif ((running)); then # hosts that are complete wait for none; others end soon, or the rest hangs
        ((running + complete < count && --patience <= 0)) || return 0
        note "the others do not end: killed" && on_hosts all end 60 || true
    elif ((stopped)); then
        finish 75 "stopped at step $best, by infra/stop.sh"
    elif ((failed && ++failures >= 5)); then
        finish 1 "failed five times at step $best: infra/logs.sh --all; the pod is still there"
    else
        ((failed == 0)) || retry "the run failed ($failures)"
        begin
    fi
}
note "watching $NAME, code ${commit:0:12}"
for ((;; )); do
    state=$(pod_state)
    tell "pod: $state" before
    case $state in
        none*) if infra create --no-wait; then known=false; else retry "not created"; fi ;;
        lost*) infra delete --yes || retry "not deleted" && continue ;;
        ready*) look ;;
    esac
    sleep "$every"
done
