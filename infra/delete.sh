#!/usr/bin/env bash
# Delete a pod, and with it everything on its disks; what is in buckets stays. Asks first.
. "$(dirname "${BASH_SOURCE[0]}")/lib_pod.sh"

usage() {
    cat <<'TEXT'
usage: bash infra/delete.sh [--yes] [--dry-run] [--env=FILE]

  --yes       do not ask
  --dry-run   print the command and run none
TEXT
}
sure=false
option() { [[ $1 == --yes ]] && sure=true; }
read_options "$@"
if ! $dry_run; then
    state=$(pod_state)
    case $state in
        none*) say "there is no $NAME in $ZONE" && exit ;;
        unknown*) fail "the cloud gives no answer: nothing was deleted" ;;
    esac
    if ! $sure; then
        read -r -p "Delete $NAME in $ZONE ($state), with all on its disks? Type its name: " answer || true
        [[ ${answer:-} == "$NAME" ]] || fail "not deleted"
    fi
    say "deleting $NAME"
fi
if [[ $KIND == queued ]]; then
    tpus queued-resources delete "$NAME" --force # its nodes, too
else
    tpus tpu-vm delete "$NAME"
fi
