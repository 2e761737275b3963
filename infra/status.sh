#!/usr/bin/env bash
# What a pod is doing: the resource, and the run on every host with its last step and that one's age.
. "$(dirname "${BASH_SOURCE[0]}")/lib_pod.sh"

usage() {
    cat <<'TEXT'
usage: bash infra/status.sh [--dry-run] [--env=FILE]

A host is idle, running, ended (by itself), stopped (by infra/stop.sh) or died (without a word, as in a
restart of the machine). The step is that of the newest metrics.jsonl, which process 0 writes.
TEXT
}
read_options "$@"
if $dry_run; then
    on_hosts all state
    exit
fi
state=$(pod_state)
say "$NAME ($SLICES x $ACCELERATOR, $CAPACITY, $ZONE): $state"
[[ $state == ready* ]] || exit 0
hosts=$(on_hosts all state) || say "note: not every host answers"
printf '%-16s %-8s %-6s %-8s %s\n' host run status step written
while read -r host run status step age; do
    [[ $age == - ]] || age="$age s ago"
    printf '%-16s %-8s %-6s %-8s %s\n' "${host%:}" "$run" "$status" "$step" "$age"
done < <(sort -V <<<"$hosts")
