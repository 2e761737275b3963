# shellcheck shell=bash
# Functions of install_spmd.sh: detect the accelerator, find a Python, run timed steps. Sourced, not
# executed.

info() { printf 'install: %s\n' "$*"; }

fail() {
    printf 'install: error: %s\n' "$*" >&2
    exit 2
}

# detect_accelerator [ROOT]: print tpu, cuda or cpu. The tests pass a ROOT that replaces /.
detect_accelerator() {
    if has_tpu "${1:-}"; then
        echo tpu
    elif command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU '; then
        echo cuda
    else
        echo cpu
    fi
}

# has_tpu ROOT: TPUs up to v4 appear as /dev/accelN. Later ones appear as /dev/vfio/N, like any
# device that is passed to user space; the PCI ids (those torch_xla looks for) or the environment
# variables of a TPU VM identify them. (/dev/accel/ without a number is the kernel's directory for
# accelerators of other vendors.)
has_tpu() {
    local root=$1 device
    compgen -G "$root/dev/accel[0-9]*" >/dev/null && return
    compgen -G "$root/dev/vfio/[0-9]*" >/dev/null || return
    [[ -z ${TPU_ACCELERATOR_TYPE:-}${TPU_WORKER_ID:-}${TPU_NAME:-} ]] || return 0
    for device in "$root"/sys/bus/pci/devices/*; do
        [[ $(cat "$device/vendor" 2>/dev/null) == 0x1ae0 ]] || continue
        case $(cat "$device/device") in
            0x0027 | 0x005e | 0x0062 | 0x0063 | 0x006f | 0x0076) return ;;
        esac
    done
    return 1
}

# find_python [WHICH]: print the path of the newest usable Python, or of the requested one.
find_python() {
    local candidate
    while read -r candidate; do
        usable_python "$candidate" "${1:-}" && return
    done < <(
        case ${1:-} in
            "") list_pythons 12 11 10 ;;
            3.*) list_pythons "${1#3.}" ;;
            *) echo "$1" ;;
        esac
    )
    return 1
}

# tpu_python: print the path of a Python that can run jax, which has the flash attention of TPUs and needs
# 3.11. The image of TPU VMs has 3.10; uv installs 3.12 for this user then, and is itself installed with
# pip if necessary. Where that fails, print the newest Python there is.
tpu_python() {
    local found uv=uv folder=${XDG_CACHE_HOME:-$HOME/.cache}/rae_xla/uv
    found=$(find_python 3.12 || find_python 3.11) && echo "$found" && return
    found=$(find_python) || return 1
    info "Python 3.12 is being installed: flash attention needs it" >&2
    if ! command -v uv >/dev/null; then
        uv=$folder/bin/uv
        [[ -x $uv ]] || "$found" -m pip install --quiet --target "$folder" uv >&2 || true
    fi
    "$uv" python install 3.12 >&2 && "$uv" python find --system 3.12 && return
    info "note: Python 3.12 could not be installed: attention will be slower on long sequences" >&2
    echo "$found"
}

# list_pythons MINOR...: print candidates, the preferred ones first.
list_pythons() {
    local minor
    for minor; do
        echo "python3.$minor"
        compgen -G "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$minor.*/bin/python3.$minor" || true
        ! command -v uv >/dev/null || uv python find --no-python-downloads "3.$minor" 2>/dev/null || true
    done
    echo python3
    echo python
}

# usable_python CANDIDATE [WHICH]: print the real path of the candidate if it runs (a pyenv shim may
# not), is a version that torch_xla has wheels for, and can install packages.
usable_python() {
    "$1" - "${2:-}" "$(command -v uv)" <<'PY' 2>/dev/null
import os, sys
from importlib.util import find_spec

which, uv = sys.argv[1:]
version = sys.version_info[:2]
matches = not which.startswith("3.") or which == f"{version[0]}.{version[1]}"
if not (matches and (3, 10) <= version < (3, 13)):
    sys.exit(1)
if not (uv or find_spec("ensurepip") or find_spec("pip")):
    sys.exit(1)
print(os.path.realpath(sys.executable))  # of a virtual environment: the interpreter it is based on
PY
}

# make_venv PYTHON DIR: create an environment with pip. The Python of Debian and Ubuntu (and so of
# TPU VMs) may lack ensurepip, which venv needs to install pip; the system's pip serves then.
make_venv() {
    if "$1" -c 'import ensurepip' 2>/dev/null; then
        "$1" -m venv "$2"
    else
        "$1" -m venv --without-pip "$2"
        "$1" -m pip install pip --target \
            "$("$2/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    fi
}

# run_step NAME COMMAND...: run a step that may take minutes. Its output goes to $log; every 15
# seconds one line shows the elapsed time and the last line of the output, if that has changed.
run_step() {
    local name=$1 begin=$SECONDS beat=15 job line='' now
    shift
    # shellcheck disable=SC2154  # install_spmd.sh defines log
    "$@" >>"$log" 2>&1 </dev/null &
    job=$!
    # shellcheck disable=SC2064  # expands now: this job, not a later one
    trap "kill $job 2>/dev/null || true" EXIT
    while kill -0 "$job" 2>/dev/null; do
        sleep 0.1
        if ((SECONDS - begin >= beat)); then
            now=$(tail -n 1 "$log" | cut -c 1-80)
            [[ $now != "$line" ]] && line=$now || now="still running"
            info "  $name, $beat s: $now"
            beat=$((beat + 15))
        fi
    done
    if ! wait "$job"; then
        tail -n 20 "$log" >&2
        fail "$name failed; the full log is $log; run the command again to resume"
    fi
    trap - EXIT
    info "$name: $((SECONDS - begin)) s"
}
