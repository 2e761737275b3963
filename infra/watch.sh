#!/usr/bin/env bash
# Supervise a run until it is complete: create the pod, set it up and launch the run, and repeat this when
# the pod is preempted or the run exits early. The script itself may be stopped and started again.
. "$(dirname "${BASH_SOURCE[0]}")/lib_pod.sh"

usage() {
    cat <<'TEXT'
usage: bash infra/watch.sh [--delete] [--every=SECONDS] [--dry-run] [--env=FILE] COMMAND...

  COMMAND           as for infra/launch.sh; when restarted, it must resume, with checkpoints in a bucket
                    (checkpoint.dir=gs://...)
  --delete          delete the pod after success
  --every=SECONDS   time between two checks (default: 60)
  --dry-run         print the commands of a first start without running them

Exits with status 0 when all hosts did, 75 after infra/stop.sh, 2 when the run reports a user error, and 1 after
5 failures without progress (12 if hosts only lost a connection). Log: results/pods/NAME.journal.
TEXT
}
delete=false every=60
option() { case $1 in --delete) delete=true ;; --every=*) every=${1#*=} ;; *) false ;; esac }
read_options "$@"
((${#words[@]})) || { usage >&2 && fail "no command was given"; }
[[ $every =~ ^[1-9][0-9]*$ ]] || fail "--every=$every is not a number of seconds"
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
! command -v flock >/dev/null || flock --nonblock 9 || fail "another watch.sh supervises $NAME: $journal"

# failures: restarts without progress; best: last step; grace: checks until lingering hosts are killed
failures=0 best=0 grace=5 pause=30 known=false
note_change() { [[ $1 == "${!2:-}" ]] || { printf -v "$2" %s "$1" && note "$1"; }; } # MESSAGE VARIABLE
finish() { note "$2" && exit "$1"; }
retry() { # MESSAGE: wait 30 s, then one minute, two, up to 15
    note "$1: retrying in $pause s" && sleep "$pause"
    pause=$((pause < 450 ? 2 * pause : 900))
}
begin() {
    { infra setup --commit="$commit" && infra launch "${words[@]}"; } || { retry "launch failed" && return; }
    known=true && note "launched: $(quoted "${words[@]}")"
}
of() { grep -cE "^[^ ]+ ($1) " <<<"$hosts" || true; } # STATE: the number of hosts in it
check_hosts() { # read their states and act on them
    local hosts count=0 node some all running idle stopped complete again wrong lost failed step
    for node in "${nodes[@]}"; do
        some=$(query tpu-vm "$node" "networkEndpoints.len()")
        [[ $some =~ ^[1-9][0-9]*$ ]] && count=$((count + some)) || return 0
    done
    hosts=$(on_hosts all state 2>/dev/null) || true
    all=$(of '.*') running=$(of 'running -') idle=$(of 'idle -') stopped=$(of 'stopped [-0-9]+')
    complete=$(of 'ended 0') again=$(of 'ended 75') wrong=$(of 'ended 2') lost=$(of 'ended 77')
    failed=$((all - running - idle - stopped - complete - again - wrong))
    note_change "hosts: $all of $count answer: $running running, $idle idle, $complete complete, $again to restart, $((failed + wrong)) failed, $stopped stopped" last_hosts
    step=$(awk -v best="$best" '$4 + 0 > best { best = $4 } END { print best }' <<<"$hosts")
    ((step == best)) || failures=0 best=$step
    if ((all < count)); then
        $known || begin # not set up yet; otherwise temporarily unreachable
        return 0
    fi
    known=true
    if ((running == count)); then
        grace=5 pause=30
    elif ((complete == count)); then
        ! $delete || infra delete --yes || note "not deleted: infra/delete.sh"
        finish 0 "complete, at step $best"
    elif ((wrong)); then
        on_hosts all end 60 || true
        finish 2 "the run reported an error that a restart cannot fix: see infra/logs.sh --all"
    elif ((running)); then # complete hosts may exit first; after an early exit the rest must follow or it hangs
        ((running + complete < count && --grace <= 0)) || return 0
        note "the remaining hosts do not exit: killed" && on_hosts all end 60 || true
    elif ((stopped)); then
        finish 75 "stopped at step $best, by infra/stop.sh"
    elif ((failed && ++failures >= (failed == lost ? 12 : 5))); then # 12: an outage of almost two hours
        finish 1 "failed $failures times at step $best: see infra/logs.sh --all; the pod was not deleted"
    else
        ((failed == 0)) || retry "the run failed ($failures)"
        begin
    fi
}
note "watching $NAME, code ${commit:0:12}"
for ((;; )); do
    state=$(pod_state)
    note_change "pod: $state" last_state
    case $state in
        none*) if infra create --no-wait; then known=false; else retry "creation failed"; fi ;;
        lost*) infra delete --yes || retry "deletion failed" && continue ;;
        ready*) check_hosts ;;
    esac
    sleep "$every"
done
