#!/usr/bin/env bash
# Mount a Cloud Storage bucket read-only with gcsfuse. Running it again is harmless.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: bash setup_gcs_mount.sh BUCKET MOUNT_POINT [--cache-dir DIR --cache-size SIZE] [--dry-run]
                               [-- GCSFUSE_OPTION...]
       bash setup_gcs_mount.sh --unmount MOUNT_POINT [--lazy] [--dry-run]

  BUCKET             name, gs://name, or gs://name/folder for one folder of the bucket
  MOUNT_POINT        an empty folder; created if missing
  --cache-dir DIR    cache the files that are read in DIR, on a local disk or RAM disk
  --cache-size SIZE  size of the cache, such as 200GB; it should hold all files that are read
  --dry-run          print the commands without running them
  --lazy             unmount even while it is in use
Mounts read-only; installs gcsfuse if it is missing (Debian and Ubuntu, as root or with sudo).
EOF
}

manual=https://cloud.google.com/storage/docs/cloud-storage-fuse
apt=https://packages.cloud.google.com/apt

info() { printf 'gcs mount: %s\n' "$*"; }

fail() {
    printf 'gcs mount: error: %s\n' "$*" >&2
    exit 2
}

# run COMMAND...: run it or, with --dry-run, print it quoted for a shell.
run() { if $dry_run; then printf '%q ' "$@" && echo; else "$@"; fi; }

# The steps of $manual/install, for a machine whose package sources do not offer gcsfuse.
install_gcsfuse() {
    local name key=/usr/share/keyrings/cloud.google.asc list=/etc/apt/sources.list.d/gcsfuse.list
    info "gcsfuse is missing: installing it"
    command -v apt-get >/dev/null || return
    umask 022 # apt reads these files as another user
    if ! apt-cache show gcsfuse >/dev/null 2>&1; then
        name=gcsfuse-$(. /etc/os-release && echo "${VERSION_CODENAME:-}") &&
            run curl -fsSL -o /dev/null "$apt/dists/$name/InRelease" &&
            run "${as_root[@]}" curl -fsSL -o "$key" "$apt/doc/apt-key.gpg" &&
            run "${as_root[@]}" sh -c "echo 'deb [signed-by=$key] $apt $name main' >$list" || return
    fi
    run "${as_root[@]}" apt-get update || true # it also fails if an unrelated source is down
    # A machine that has just booted holds the lock for its own updates for a while.
    run "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -o DPkg::Lock::Timeout=300 gcsfuse
}

# Sets $fstype, $mounted (for gcsfuse: the bucket) and $device of the mount point; empty if nothing
# is mounted.
read_mount() {
    read -r fstype mounted device < <(
        findmnt --noheadings --raw --output FSTYPE,SOURCE,MAJ:MIN --mountpoint "$mount_point" | tail -n 1
    ) || true
}

# The mount table has the bucket; only the command line of gcsfuse has the folder within it.
same_folder() {
    local processes
    processes=$(pgrep -af gcsfuse | grep -F -- " $bucket $mount_point") || true
    [[ $processes == *" --only-dir=$folder $bucket $mount_point"* ||
        -z $folder && $processes != *--only-dir* ]]
}

answers() { mountpoint -q "$mount_point" && listing=$(timeout 120 ls -U "$mount_point" 2>>"$log"); }

# give_up MESSAGE: unmount, print the end of the log, and fail.
give_up() {
    read_mount
    [[ -z $fstype ]] || fusermount -u "$mount_point" || true
    tail -c "+$((log_begin + 1))" "$log" | tail -n 20 >&2
    fail "$1"
}

# Fails for errors that a retry does not fix; see docs/troubleshooting.md of gcsfuse.
give_up_if_permanent() {
    case $(tail -c "+$((log_begin + 1))" "$log") in
        *"could not find default credentials"* | *invalid_grant* | *"Error 401"*)
            give_up "no valid Google credentials: run 'gcloud auth application-default login', or give the VM a service account with the access scope storage-ro" ;;
        *"Bad credentials"* | *"Error 403"*)
            give_up "these Google credentials may not read gs://$bucket: they need the role Storage Object Viewer for it and, on a VM, the access scope storage-ro; to use other credentials, run 'gcloud auth application-default login'" ;;
        *"Unknown bucket"* | *"bucket doesn't exist"* | *"Error 404"*)
            give_up "there is no bucket gs://$bucket" ;;
        *"unknown flag"* | *"flag provided but not defined"*)
            give_up "gcsfuse does not support an option: version 3 is required (sudo apt-get install --only-upgrade gcsfuse)" ;;
    esac
}

dry_run=false unmount=false lazy='' cache_dir='' cache_size='' places=() log=/dev/null
while (($#)); do
    case $1 in
        --cache-dir) cache_dir=${2:-} && shift ;;
        --cache-size) cache_size=${2:-} && shift ;;
        --dry-run) dry_run=true ;;
        --unmount) unmount=true ;;
        --lazy) lazy=-z ;;
        -h | --help) usage && exit ;;
        --) shift && break ;;
        -*) usage >&2 && fail "unknown option: $1" ;;
        *) places+=("$1") ;;
    esac
    shift || fail "the last option needs a value; see --help"
done
if $unmount && ((${#places[@]} == 1)); then places=("" "${places[@]}"); fi
((${#places[@]} == 2)) || { usage >&2 && fail "a bucket and a mount point are required"; }

IFS=/ read -r bucket folder <<<"${places[0]#gs://}"
folder=${folder%/}
source=gs://$bucket${folder:+/$folder}
[[ -z ${places[0]} ]] && $unmount || [[ $bucket =~ ^[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]$ ]] ||
    fail "'${places[0]}' is not a bucket: give name, gs://name or gs://name/folder; a name has only a-z, 0-9, '-', '_' and '.'"
mount_point=$(realpath -m -- "${places[1]}")
as_root=(sudo)
[[ $(id -u) != 0 ]] || as_root=()
read_mount

if $unmount; then
    [[ -n $fstype ]] || { info "nothing is mounted on $mount_point" && exit; }
    [[ $fstype == fuse.gcsfuse && ${bucket:-$mounted} == "$mounted" ]] ||
        fail "$mounted ($fstype) is mounted on $mount_point, not ${places[0]:-a bucket}: not unmounted"
    run fusermount -u $lazy "$mount_point" ||
        fail "$mount_point could not be unmounted: stop the processes that use it (fuser -vm '$mount_point' lists them), or add --lazy"
    $dry_run || info "unmounted: $mount_point"
    exit
fi
[[ -z $lazy ]] || fail "--lazy requires --unmount"

cache=()
if [[ -n $cache_dir$cache_size ]]; then
    mib=$(numfmt --from=auto --to-unit=1Mi --round=down -- "${cache_size%B}" 2>/dev/null) || mib=0
    [[ -n $cache_dir && $mib -gt 0 ]] ||
        fail "--cache-dir DIR and --cache-size SIZE must be given together, with a SIZE such as 200GB or 64GiB"
    cache_dir=$(realpath -m -- "$cache_dir")
    # Training also starts in the middle of a shard; without this option such reads are not cached.
    cache=(--cache-dir="$cache_dir" --file-cache-max-size-mb="$mib"
        --file-cache-cache-file-for-range-read)
fi

if [[ -n $fstype ]]; then
    [[ $fstype == fuse.gcsfuse && $mounted == "$bucket" ]] ||
        fail "$mounted ($fstype) is already mounted on $mount_point: unmount it, or choose another mount point"
    same_folder ||
        fail "another folder of gs://$bucket is already mounted on $mount_point: --unmount it, or choose another mount point"
    answers ||
        fail "$source is mounted on $mount_point but does not respond (did gcsfuse crash, or does another user run it?): --unmount it, then mount it again"
    info "$source is already mounted on $mount_point"
    exit
elif [[ -e $mount_point ]]; then
    [[ -d $mount_point && -w $mount_point ]] || fail "$mount_point is not a folder that you can write to"
    [[ -z $(ls -A "$mount_point") ]] ||
        fail "$mount_point is not empty, and a mount would hide its files: choose another mount point"
fi

command -v gcsfuse >/dev/null || install_gcsfuse ||
    fail "gcsfuse could not be installed; to install it yourself: $manual/install"
if [[ ! -e $mount_point ]]; then
    above=$mount_point
    until [[ -e $above ]]; do above=$(dirname "$above"); done
    make=(mkdir -p)
    [[ -w $above ]] || make=("${as_root[@]}" install -d -o "$(id -u)" -g "$(id -g)")
    run "${make[@]}" "$mount_point" || fail "$mount_point could not be created"
fi
[[ -z $cache_dir ]] || run mkdir -p "$cache_dir" || fail "$cache_dir could not be created"

log=${TMPDIR:-/tmp}/gcsfuse${mount_point//\//-}.log
# Caching as in gcsfuse's own samples/gcsfuse_config/tpu: metadata are cached without a time limit,
# missing files are not. One request reads a whole shard of the default 256 MB. Connections are not
# limited, because reads block at the limit. All options: $manual/cli-options
mount=(gcsfuse -o ro --implicit-dirs --metadata-cache-ttl-secs=-1 --metadata-cache-negative-ttl-secs=0
    --stat-cache-max-size-mb=-1 --kernel-list-cache-ttl-secs=60 --sequential-read-size-mb=256
    --max-conns-per-host=0 "${cache[@]}" --log-file="$log" --log-format=text "$@"
    ${folder:+"--only-dir=$folder"} "$bucket" "$mount_point")
if $dry_run; then
    run "${mount[@]}"
    device=MAJOR:MINOR
else
    touch "$log" || fail "the log $log cannot be written: move it away, or set TMPDIR"
    log_begin=$(wc -c <"$log")
    for pause in 1 2 4 8 ""; do
        mountpoint -q "$mount_point" || "${mount[@]}" >>"$log" 2>&1 </dev/null || true
        if answers; then break; fi
        give_up_if_permanent
        [[ -n $pause ]] || give_up "$source could not be mounted on $mount_point; the log is $log"
        info "$source does not respond yet: trying again in $pause s"
        sleep "$pause"
    done
    info "mounted: $source on $mount_point, read-only; log: $log"
    [[ -n $listing ]] || info "note: there are no files in $source; is the name correct?"
    read_mount
fi
# $manual/performance advises 1 MiB; the default of the kernel is 128 KiB.
run "${as_root[@]}" ${as_root:+-n} sh -c "echo 1024 >/sys/class/bdi/$device/read_ahead_kb" 2>/dev/null ||
    info "note: the kernel's read-ahead was not changed, which requires root"
