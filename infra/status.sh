#!/usr/bin/env bash
# Show the state of a pod: the resource, and the run on every host with the age of its last step.
. "$(dirname "${BASH_SOURCE[0]}")/lib_pod.sh"

usage() {
    cat <<'TEXT'
usage: bash infra/status.sh [--dry-run] [--env=FILE]

A host is idle, running, ended (the command exited), stopped (by infra/stop.sh) or died (without an exit
status, as when the machine restarted). The step is the last one in metrics.jsonl, which process 0 writes.
TEXT
}
read_options "$@"
if $dry_run; then
    on_hosts all state
    exit
fi
state=$(pod_state)
info "$NAME ($SLICES x $ACCELERATOR, $CAPACITY, $ZONE): $state"
[[ $state == ready* ]] || exit 0
hosts=$(on_hosts all state) || info "note: not every host answered"
printf '%-16s %-8s %-6s %-8s %s\n' host run status step written
while read -r host run status step age; do
    [[ $age == - ]] || age="$age s ago"
    printf '%-16s %-8s %-6s %-8s %s\n' "${host%:}" "$run" "$status" "$step" "$age"
done < <(sort -V <<<"$hosts")
