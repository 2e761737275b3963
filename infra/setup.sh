#!/usr/bin/env bash
# Make every host of a pod ready: code, environment, bucket, doctor. It is safe to run it again.
. "$(dirname "${BASH_SOURCE[0]}")/lib_pod.sh"

usage() {
    cat <<'TEXT'
usage: bash infra/setup.sh [--commit=COMMIT] [--no-doctor] [--dry-run] [--env=FILE] [DOCTOR ARGUMENT...]

Sends the committed code, installs it (install_spmd.sh), tries the bucket and mounts it if MOUNT_POINT
is set, and runs `rae-xla doctor` on all hosts at once.
  --commit=COMMIT   this code instead of HEAD
  --no-doctor       leave the doctor out
  --dry-run         print the commands and run none
  DOCTOR ARGUMENT   such as -- --config configs/stage2/ditdh_s_256.yaml data.train=gs://...
TEXT
}
commit=HEAD doctor=true
option() {
    case $1 in
        --commit=*) commit=${1#*=} ;;
        --no-doctor) doctor=false ;;
        *) false ;;
    esac
}
read_options "$@"
must_be MOUNT_POINT '(/[A-Za-z0-9._-]+)*' "a folder, from the root"
[[ -z $MOUNT_POINT || -n $BUCKET ]] || fail "$settings: MOUNT_POINT needs BUCKET"

named=$commit
commit=$(git -C "$root" rev-parse --verify --quiet "$named^{commit}") || fail "there is no commit $named"
[[ -z $(git -C "$root" status --porcelain) ]] || say "note: what is not committed does not go along"
if ! $dry_run; then
    state=$(pod_state)
    [[ $state == ready* ]] || fail "$NAME is not ready but '$state'; infra/create.sh waits for it"
fi
archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
git -C "$root" archive --format=tar "$commit" | gzip -1 >"$archive"

# One host first: gcloud may have to make a key, ask, and spread it.
for node in "${nodes[@]}"; do on_host "$node" 0 true </dev/null; done
$dry_run || say "sending the code"
# Unpacked by the very script that comes with it; gzip notices if something is missing.
send "$archive" "umask 077 && cat >rae_xla.tar.gz && gzip -t rae_xla.tar.gz && tar -xzOf rae_xla.tar.gz infra/host.sh | bash -s NODE unpack ~/rae_xla.tar.gz $commit" ||
    fail "the code did not reach every host"
$dry_run || say "installing (some minutes the first time)"
on_hosts all install "$BUCKET" "$MOUNT_POINT" || fail "not every host could be set up"
! $doctor || on_hosts all doctor "${words[@]}" || fail "the doctor found something to fix"
$dry_run || say "$NAME is ready: infra/launch.sh starts a run"
