#!/usr/bin/env bash
# Stop a run: it finishes its step, saves a checkpoint and exits with status 75. The pod is kept.
. "$(dirname "${BASH_SOURCE[0]}")/lib_pod.sh"

usage() {
    cat <<'TEXT'
usage: bash infra/stop.sh [--wait=SECONDS] [--force] [--dry-run] [--env=FILE]

  --wait=SECONDS   time that the run gets to exit (default: 600); then it is killed
  --force          then end every process that holds a TPU, whoever started it, and remove the lock of libtpu
  --dry-run        print the commands without running them

infra/watch.sh does not restart a run that this script stopped.
TEXT
}
seconds=600 force=false
option() { case $1 in --wait=*) seconds=${1#*=} ;; --force) force=true ;; *) false ;; esac }
read_options "$@"
[[ $seconds =~ ^[0-9]+$ ]] || fail "--wait=$seconds is not a number of seconds"
$dry_run || info "stopping the run on $NAME"
on_hosts all stop "$seconds" || fail "not every host answered: infra/status.sh"
! $force || on_hosts all free || fail "not every host freed its TPU; see above"
