#!/usr/bin/env bash
# Runs on a host of a pod (host.sh NODE free): end the processes that hold its TPU, and remove the lock file of
# libtpu. A process that was killed by its terminal or by another user may live on and hold the chips.
# free_tpu.sh [DEVICES [LOCK]]: the tests give a folder that replaces /dev, and another lock file.
set -euo pipefail
devices=${1:-/dev} lock=${2:-/tmp/libtpu_lockfile}
as_root=()
[[ $(id -u) == 0 ]] || ! sudo -n true 2>/dev/null || as_root=(sudo -n) # processes of other users, too

holders() { # print the ids of processes that have a chip open: accelN up to TPU v4, vfio/N later
    { "${as_root[@]}" find /proc/[0-9]*/fd -lname "$devices/accel[0-9]*" -o -lname "$devices/vfio/[0-9]*"; } 2>/dev/null |
        cut -d / -f 3 | sort -un || true
}
mapfile -t pids < <(holders)
for pid in "${pids[@]}"; do
    echo "ending process $pid, which holds a TPU: $(ps -o user=,args= -p "$pid" | cut -c 1-120)"
    "${as_root[@]}" kill -TERM "$pid" || true
done
for ((i = 0; i < 10; i++)); do
    [[ -n $(holders) ]] || break
    sleep 1
done
mapfile -t pids < <(holders)
((${#pids[@]} == 0)) || "${as_root[@]}" kill -KILL "${pids[@]}" || true
"${as_root[@]}" rm -f "$lock"
sleep 1
mapfile -t pids < <(holders)
((${#pids[@]} == 0)) || { echo "error: still held by ${pids[*]}: restart the machine" && exit 2; }
echo "the TPU is free"
