#!/usr/bin/env bash
# Start a run on every host of a pod, in tmux, so that it survives the connection. Repeated runs are safe.
. "$(dirname "${BASH_SOURCE[0]}")/lib_pod.sh"

usage() {
    cat <<'TEXT'
usage: bash infra/launch.sh [--dry-run] [--env=FILE] COMMAND...

  COMMAND     the command that every host runs in its copy of the code: rae-xla train ..., or
              bash scripts/examples/stage2_ditdh_xl.sh
  --dry-run   print the commands without running them

The hosts find each other through the metadata of the TPU. The variables named in PASS_ENV are sent on
standard input. A run that is already active is not started twice; a different one is an error.
TEXT
}
read_options "$@"
must_be PASS_ENV '([A-Za-z_][A-Za-z0-9_]*( |$))*' "names of variables, separated by spaces"
((${#words[@]})) || { usage >&2 && fail "no command was given"; }

script=$(mktemp) # mktemp makes it readable for this user only
trap 'rm -f "$script"' EXIT
{
    for name in $PASS_ENV; do
        [[ -z ${!name:-} ]] || printf 'export %s=%q\n' "$name" "${!name}"
    done
    printf 'exec ' && quoted "${words[@]}" && printf '\n# complete\n'
} >"$script"
$dry_run || info "starting on $NAME: $(quoted "${words[@]}")"
send "$script" "bash rae_xla/infra/host.sh NODE start" || fail "the run was not started on every host; see above"
$dry_run || info "follow it with infra/status.sh and infra/logs.sh; end it with infra/stop.sh"
