#!/usr/bin/env bash
# Stop a run: it finishes its step, saves a checkpoint and ends with status 75. The pod stays.
. "$(dirname "${BASH_SOURCE[0]}")/lib_pod.sh"

usage() {
    cat <<'TEXT'
usage: bash infra/stop.sh [--wait=SECONDS] [--dry-run] [--env=FILE]

  --wait=SECONDS   how long the run may take (600); what has not ended then is killed
  --dry-run        print the commands and run none

infra/watch.sh, wherever it runs, does not start a run again that was stopped so.
TEXT
}
seconds=600
option() { [[ $1 == --wait=* ]] && seconds=${1#*=}; }
read_options "$@"
[[ $seconds =~ ^[0-9]+$ ]] || fail "--wait=$seconds is no number of seconds"
$dry_run || say "stopping the run on $NAME"
on_hosts all stop "$seconds" || fail "not every host answered: infra/status.sh"
