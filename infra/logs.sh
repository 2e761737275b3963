#!/usr/bin/env bash
# Show and follow the output of a run, on worker 0 or on all hosts. Ctrl-C does not stop the run.
. "$(dirname "${BASH_SOURCE[0]}")/lib_pod.sh"

usage() {
    cat <<'TEXT'
usage: bash infra/logs.sh [--all | --worker=N] [--lines=N] [--no-follow] [--dry-run] [--env=FILE]

  --all         every host; each line begins with its host, NODE/WORKER
  --worker=N    this worker of every slice (default: 0)
  --lines=N     start with the last N lines (default: 50)
  --no-follow   exit after these lines
  --dry-run     print the commands without running them
TEXT
}
worker=0 lines=50 follow=-F
option() {
    case $1 in
        --all) worker=all ;;
        --worker=*) worker=${1#*=} ;;
        --lines=*) lines=${1#*=} ;;
        --no-follow) follow='' ;;
        *) false ;;
    esac
}
read_options "$@"
[[ $worker =~ ^(all|[0-9]+)$ && $lines =~ ^[0-9]+$ ]] || fail "--worker and --lines take a number"
on_hosts "$worker" log "$lines" "$follow"
