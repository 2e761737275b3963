"""A fake Google Cloud of TPU pods in a folder, whose hosts really run commands.

``install`` writes these programs for PATH. They are bash scripts, which start faster than Python:

- ``gcloud`` knows the commands and options of Google Cloud SDK 528 that the scripts may use, and
  refuses others. ``... tpu-vm ssh`` calls ``ssh``, as the real one does.
- ``ssh`` runs the command with bash in the home of the host, which is removed with the node.
- ``tmux`` starts a session for a command, and ``hostname`` prints the name of a TPU VM.
- ``sleep`` sleeps for 10 ms.

Every call is recorded in ``calls``. The state is a file ``nodes/NAME`` for each node (its state and
number of hosts) and ``queued/NAME`` for each queued resource (its next states; its nodes are in
``NAME.nodes``). A test controls the cloud with files: each query of a node's state consumes one
line of ``events``, ``preempt`` or anything else; ``refusals`` holds reasons why the next creations
fail; ``silent``, ``no-bucket`` and ``unreachable`` (with names of hosts) switch on failures;
``batch-size`` is how many hosts of a node ``ssh`` connects to at a time by default, instead of 64.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

NOTE = r"""#!/bin/bash
printf -v call '%s\x1f' "${0##*/}" "$@"
printf '%s\x1e' "$call" >>"$FAKE_CLOUD/calls"
[[ -n ${FAKE_HOST-} ]] || cd "$FAKE_CLOUD"
"""

GCLOUD = (
    NOTE
    + r"""
refuse() { echo "ERROR: (gcloud) $*" >&2; exit 1; }
next_line() { [[ -s $1 ]] && head -n 1 "$1" && sed -i 1d "$1"; }

if [[ "$1 $2" == "storage ls" ]]; then
    [[ ! -e $FAKE_CLOUD/no-bucket ]] || refuse "HTTPError 403: no storage.objects.list access"
    exit
fi
[[ "$1 $2" == "compute tpus" ]] || refuse "Invalid choice: $*"
what="$3 $4" name=$5
shift 5
declare -A given=([--project]= [--zone]= [--accelerator-type]=v6e-0)
for word; do given[${word%%=*}]=${word#*=}; done
wide='--zone --project --quiet --format --verbosity'
create='--accelerator-type --spot --reserved --service-account --network --labels'
case $what in
    "tpu-vm create") known="$create --version" ;;
    "queued-resources create")
        known="$create --runtime-version --node-id --node-count --node-prefix" ;;
    "tpu-vm ssh") known="--worker --command --batch-size" ;;
    "queued-resources delete") known=--force ;;
    "tpu-vm describe" | "tpu-vm delete" | "queued-resources describe") known= ;;
    *) refuse "Invalid choice: $what" ;;
esac
for word; do
    [[ " $wide $known " == *" ${word%%=*} "* ]] || refuse "unrecognized: $word"
done
[[ "${given[--project]} ${given[--zone]}" == "my-project us-east5-b" ]] || refuse "FORBIDDEN"
[[ ! -e silent ]] || refuse "Network is unreachable"
mkdir -p nodes queued hosts
hosts=$((${given[--accelerator-type]##*-} / 4))

case $what in
    *create)
        ! reason=$(next_line refusals) || refuse "$reason"
        [[ ! -e nodes/$name && ! -e queued/$name ]] || refuse "ALREADY_EXISTS: $name"
        if [[ $what == tpu-vm* ]]; then
            echo "READY $hosts" >"nodes/$name"
        else
            names=${given[--node-id]-}
            for ((i = 0; i < ${given[--node-count]:-0}; i++)); do
                names+=" ${given[--node-prefix]}-$i"
            done
            for node in $names; do echo "$node $hosts"; done >"queued/$name.nodes"
            echo "ACCEPTED WAITING_FOR_RESOURCES ACTIVE" >"queued/$name"
        fi ;;
    "queued-resources describe")
        [[ -e queued/$name ]] || refuse "NOT_FOUND: Resource '$name' was not found"
        [[ ${given[--format]} == "value(state.state)" ]] || refuse "no such field"
        read -r state others <"queued/$name"
        echo "$state"
        [[ -z $others ]] || echo "$others" >"queued/$name"
        [[ $others != ACTIVE ]] ||
            while read -r node hosts; do
                echo "READY $hosts" >"nodes/$node"
            done <"queued/$name.nodes" ;;
    "tpu-vm describe")
        [[ -e nodes/$name ]] || refuse "NOT_FOUND: Resource '$name' was not found"
        read -r state hosts <"nodes/$name"
        case ${given[--format]} in
            "value(networkEndpoints.len())") echo "$hosts" ;;
            "value(state)")
                if [[ $(next_line events) == preempt ]]; then
                    state=PREEMPTED
                    echo "PREEMPTED $hosts" >"nodes/$name"
                    for entry in queued/*[!s]; do
                        [[ ! -e $entry ]] || echo SUSPENDED >"$entry"
                    done
                    for pid in hosts/"$name"-w-*/{.tmux-rae_xla,rae_xla.run/pid}; do
                        kill -KILL -- "-$(<"$pid")"
                    done 2>/dev/null
                fi
                echo "$state" ;;
            *) refuse "no such field" ;;
        esac ;;
    *delete)
        names=$name
        if [[ $what == queued* ]]; then
            [[ -n ${given[--force]} ]] || refuse "it has nodes"
            names=$(cut -d ' ' -f 1 "queued/$name.nodes")
            rm "queued/$name" "queued/$name.nodes"
        fi
        for node in $names; do rm -r "nodes/$node" hosts/"$node"-w-*; done ;;
    *ssh)
        read -r state hosts <"nodes/$name" && [[ $state == READY ]] || refuse "TPU $name is $state"
        echo "SSH: Attempting to connect to worker 0..." >&2
        jobs=() first=0 last=$((hosts - 1)) status=0
        batch=${given[--batch-size]-$(cat batch-size 2>/dev/null || echo 64)}
        [[ $batch != all ]] || batch=$hosts
        [[ ${given[--worker]} == all ]] || first=${given[--worker]} last=$first
        for ((i = first; i <= last; i++)); do
            ssh -T "me@$name-w-$i" -- "${given[--command]}" <&0 &
            jobs+=($!)
            if ((${#jobs[@]} == batch || i == last)); then
                for job in "${jobs[@]}"; do wait "$job" || status=$?; done
                jobs=()
            fi
        done
        exit "$status" ;;
esac
"""
)

SSH = (
    NOTE
    + r"""
host=${2#*@}
! grep -qx "$host" unreachable 2>/dev/null || exit 255
mkdir -p "hosts/$host"
cd "hosts/$host"
for fd in {3..9} {60..63}; do eval "exec $fd>&-"; done # ssh passes on only the standard three
exec env -i PATH="$PATH" FAKE_CLOUD="$FAKE_CLOUD" HOME="$PWD" FAKE_HOST="$host" bash -c "${@: -1}"
"""
)

TMUX = (
    NOTE
    + r"""
session=$HOME/.tmux-rae_xla
case $* in
    "new-session -d -s rae_xla "*)
        setsid bash -c "${@: -1}" <>/dev/null >&0 2>&0 &
        echo $! >"$session" ;;
    "has-session -t =rae_xla")
        read -r pid <"$session" && read -r line <"/proc/$pid/stat" && [[ $line != *") Z "* ]] ;;
    *) exit 9 ;;
esac 2>/dev/null
"""
)

PROGRAMS = {
    "gcloud": GCLOUD,
    "ssh": SSH,
    "tmux": TMUX,
    "hostname": '#!/bin/bash\necho "$FAKE_HOST"\n',
    "sleep": NOTE + "exec /bin/sleep 0.01\n",
}


def install(folder: Path) -> None:
    """Write the programs into a new folder."""
    folder.mkdir()
    for name, text in PROGRAMS.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def calls(cloud: Path) -> list[list[str]]:
    """Return the calls so far, as lists of words."""
    path = cloud / "calls"
    text = path.read_text() if path.exists() else ""
    return [call.split("\x1f")[:-1] for call in text.split("\x1e")[:-1]]


def end_processes(home: Path) -> None:
    """Kill the processes of a host, as a restart of the machine does."""
    for path in (home / ".tmux-rae_xla", home / "rae_xla.run/pid"):
        if path.exists():
            with suppress(ProcessLookupError, ValueError):
                os.killpg(int(path.read_text()), signal.SIGKILL)
