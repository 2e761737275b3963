#!/usr/bin/env bash
# Create a pod: a TPU VM, or a queued resource of one or several slices. Repeated runs are safe.
. "$(dirname "${BASH_SOURCE[0]}")/lib_pod.sh"

usage() {
    cat <<'TEXT'
usage: bash infra/create.sh [--no-wait] [--dry-run] [--env=FILE]

Creates what infra/pod.env (or FILE) describes and waits until it is ready.
  --no-wait   return without waiting for a queued resource
  --dry-run   print the commands without running them
TEXT
}
wait=true
option() { [[ $1 == --no-wait ]] && wait=false; }
read_options "$@"
must_be ACCELERATOR 'v[0-9][a-z]*-[0-9]+' "such as v4-8, v5litepod-16, v5p-32 or v6e-16"

case $ACCELERATOR in # cloud.google.com/tpu/docs/runtimes
    v6e-*) : "${RUNTIME_VERSION:=v2-alpha-tpuv6e}" ;;
    v5p-*) : "${RUNTIME_VERSION:=v2-alpha-tpuv5}" ;;
    v5litepod-*) : "${RUNTIME_VERSION:=v2-alpha-tpuv5-lite}" ;;
    v[234]-*) : "${RUNTIME_VERSION:=tpu-ubuntu2204-base}" ;;
esac
must_be RUNTIME_VERSION '[a-z][a-z0-9.-]+' "the TPU software version for $ACCELERATOR"
what=(--accelerator-type="$ACCELERATOR")
case $CAPACITY in
    spot) what+=(--spot) ;;
    reserved) what+=(--reserved) ;;
esac
if [[ $KIND == vm ]]; then
    create=(tpu-vm create "$NAME" --version="$RUNTIME_VERSION" "${what[@]}")
elif ((SLICES == 1)); then
    create=(queued-resources create "$NAME" --node-id="$NAME" --runtime-version="$RUNTIME_VERSION" "${what[@]}")
else
    create=(queued-resources create "$NAME" --node-count="$SLICES" --node-prefix="$NAME"
        --runtime-version="$RUNTIME_VERSION" "${what[@]}")
fi

state=none
$dry_run || state=$(pod_state)
case $state in
    none*)
        $dry_run || info "creating $NAME: $SLICES x $ACCELERATOR, $CAPACITY, in $ZONE"
        tpus "${create[@]}" "${CREATE_OPTIONS[@]}" || fail "gcloud refused; see above"
        ;;
    lost*) fail "$NAME is lost ($state): delete it first (infra/delete.sh), or use infra/watch.sh, which recreates it" ;;
    unknown*) fail "gcloud does not answer: try gcloud compute tpus tpu-vm list --zone=$ZONE" ;;
    *) info "$NAME exists already: $state" ;;
esac
! $dry_run || exit 0
for ((;;)); do
    state=$(pod_state)
    info "$NAME: $state"
    case $state in
        ready*) break ;;
        lost*) fail "$NAME was lost before it was ready" ;;
    esac
    $wait || break
    sleep 30
done
