#!/usr/bin/env bash
# Start a run on every host of a pod, in tmux, where it outlives the connection. Safe to run again.
. "$(dirname "${BASH_SOURCE[0]}")/lib_pod.sh"

usage() {
    cat <<'TEXT'
usage: bash infra/launch.sh [--dry-run] [--env=FILE] COMMAND...

  COMMAND     what every host runs in its copy of the code: rae-xla train ..., or
              bash scripts/examples/stage2_ditdh_xl.sh
  --dry-run   print the commands and run none

The hosts find each other by the TPU's metadata. Variables named in PASS_ENV go along, on standard
input. The same run is not started twice; where another goes on, nothing is done.
TEXT
}
read_options "$@"
must_be PASS_ENV '([A-Za-z_][A-Za-z0-9_]*( |$))*' "names of variables, with a space between"
((${#words[@]})) || { usage >&2 && fail "there is no command"; }

script=$(mktemp) # readable for this user alone
trap 'rm -f "$script"' EXIT
{
    for name in $PASS_ENV; do
        [[ -z ${!name:-} ]] || printf 'export %s=%q\n' "$name" "${!name}"
    done
    printf 'exec ' && quoted "${words[@]}" && printf '\n# complete\n'
} >"$script"
$dry_run || say "starting on $NAME: $(quoted "${words[@]}")"
send "$script" "bash rae_xla/infra/host.sh NODE start" || fail "the run was not started on every host; see above"
$dry_run || say "infra/status.sh, infra/logs.sh and infra/stop.sh tell and do the rest"
