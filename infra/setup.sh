#!/usr/bin/env bash
# Prepare every host of a pod: code, environment, bucket, doctor. Repeated runs are safe.
. "$(dirname "${BASH_SOURCE[0]}")/lib_pod.sh"

usage() {
    cat <<'TEXT'
usage: bash infra/setup.sh [--commit=COMMIT] [--no-doctor] [--dry-run] [--env=FILE] [DOCTOR ARGUMENT...]

Sends the committed code, installs it (install_spmd.sh), checks access to the bucket, mounts it if
MOUNT_POINT is set, and runs `rae-xla doctor` on all hosts in parallel.
  --commit=COMMIT   send this commit instead of HEAD
  --no-doctor       do not run the doctor
  --dry-run         print the commands without running them
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
must_be MOUNT_POINT '(/[A-Za-z0-9._-]+)*' "an absolute path"
[[ -z $MOUNT_POINT || -n $BUCKET ]] || fail "$settings: MOUNT_POINT needs BUCKET"

named=$commit
commit=$(git -C "$root" rev-parse --verify --quiet "$named^{commit}") || fail "commit $named does not exist"
[[ -z $(git -C "$root" status --porcelain) ]] || info "note: uncommitted changes are not sent"
if ! $dry_run; then
    state=$(pod_state)
    [[ $state == ready* ]] || fail "$NAME is not ready: '$state'; infra/create.sh waits for it"
fi
archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
git -C "$root" archive --format=tar "$commit" | gzip -1 >"$archive"

# One host first: gcloud may have to create an ssh key, ask for a passphrase, and distribute the key.
for node in "${nodes[@]}"; do on_host "$node" 0 true </dev/null; done
$dry_run || info "sending the code"
# The archive is unpacked by the host.sh that it contains; gzip detects an incomplete archive.
send "$archive" "umask 077 && cat >rae_xla.tar.gz && gzip -t rae_xla.tar.gz && tar -xzOf rae_xla.tar.gz infra/host.sh | bash -s NODE unpack ~/rae_xla.tar.gz $commit" ||
    fail "the code did not reach every host"
$dry_run || info "installing (some minutes the first time)"
on_hosts all install "$BUCKET" "$MOUNT_POINT" || fail "not every host was set up; see above"
! $doctor || on_hosts all doctor "${words[@]}" || fail "the doctor found problems; see above"
$dry_run || info "$NAME is ready: infra/launch.sh starts a run"
