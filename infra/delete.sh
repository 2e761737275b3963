#!/usr/bin/env bash
# Delete a pod and everything on its disks, after a confirmation. Buckets are not touched.
. "$(dirname "${BASH_SOURCE[0]}")/lib_pod.sh"

usage() {
    cat <<'TEXT'
usage: bash infra/delete.sh [--yes] [--dry-run] [--env=FILE]

  --yes       delete without confirmation
  --dry-run   print the command without running it
TEXT
}
sure=false
option() { [[ $1 == --yes ]] && sure=true; }
read_options "$@"
if ! $dry_run; then
    state=$(pod_state)
    case $state in
        none*) info "$NAME does not exist in $ZONE" && exit ;;
        unknown*) fail "gcloud does not answer: nothing was deleted" ;;
    esac
    if ! $sure; then
        read -r -p "Delete $NAME in $ZONE ($state), and everything on its disks? Type its name: " answer || true
        [[ ${answer:-} == "$NAME" ]] || fail "not deleted"
    fi
    info "deleting $NAME"
fi
if [[ $KIND == queued ]]; then
    tpus queued-resources delete "$NAME" --force # --force: with its nodes
else
    tpus tpu-vm delete "$NAME"
fi
