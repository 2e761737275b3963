#!/usr/bin/env bash
# Create the Python environment for this machine. A repeated run returns at once if the environment
# is complete, and resumes an installation that was interrupted.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: bash install_spmd.sh [--accelerator tpu|cuda|cpu] [--python PYTHON] [--venv DIR] [--check]

  --accelerator KIND   which packages to install; detected when omitted
                         tpu   torch_xla with libtpu
                         cuda  plain torch (torch_xla has no CUDA backend)
                         cpu   torch_xla on virtual CPU devices, and plain torch
  --python PYTHON      a version (3.12), a command or a path; default: the newest of 3.10 to 3.12, for tpu 3.12
                       or 3.11, installed with uv if there is neither
  --venv DIR           directory of the environment (default: .venv)
  --check              install nothing; exit with status 0 if the environment is complete, 1 otherwise

A later run keeps the choices of the first one unless these options override them. The versions are
pinned in requirements.lock.
USAGE
}

called_from=$PWD
cd -P "$(dirname "${BASH_SOURCE[0]}")"
. scripts/lib_install.sh

requested_accelerator=
requested_python=
venv=.venv
check_only=false
while (($#)); do
    case $1 in
        --accelerator) requested_accelerator=${2:-} && shift ;;
        --python) requested_python=${2:-} && shift ;;
        --venv) venv=${2:-} && shift ;;
        --check) check_only=true ;;
        -h | --help) usage && exit ;;
        *) usage >&2 && fail "unknown option: $1" ;;
    esac
    shift || fail "the last option has no value; see --help"
done
# Relative paths are relative to the directory of the caller.
[[ $requested_python != ?*/* || $requested_python == /* ]] ||
    requested_python=$called_from/$requested_python
[[ $venv == /* || $venv == .venv ]] || venv=$called_from/$venv
venv=${venv#"$PWD/"}

trap 'exit 130' INT # runs the EXIT trap, which stops the running step
trap 'exit 143' TERM

# Only one installation runs at a time: test.sh and quickstart.sh may start together.
exec 9<requirements.lock
if command -v flock >/dev/null && ! flock --nonblock 9; then
    info "another installation is running in this directory: waiting for it"
    flock 9
fi

# First line of the record: accelerator, Python and project directory of the environment. Second
# line, written once the installation is complete: the checksum of the files that define it.
record=$venv/rae-xla.install
fingerprint=$(cat requirements.lock pyproject.toml install_spmd.sh | cksum)
installed_accelerator=
installed_python=
installed_from=
installed_fingerprint=
if [[ -e $record ]]; then
    {
        IFS=$'\t' read -r installed_accelerator installed_python installed_from
        read -r installed_fingerprint
    } <"$record" || true
fi

if [[ -n $requested_accelerator ]]; then
    accelerator=$requested_accelerator reason="requested"
elif [[ -n $installed_accelerator ]]; then
    accelerator=$installed_accelerator reason="as before"
else
    accelerator=$(detect_accelerator) reason="detected"
fi
case $accelerator in
    tpu) extras=tpu,xla,quickstart,hub,dashboard,dev ;;
    cpu) extras=xla,plan,quickstart,hub,dashboard,dev ;; # plan: the TPU compiler, without a TPU
    cuda) extras=quickstart,hub,dashboard,dev ;;
    *) fail "--accelerator must be tpu, cuda or cpu, not '$accelerator'" ;;
esac

if [[ -n $requested_python ]]; then
    python=$(find_python "$requested_python") ||
        fail "no usable Python for '--python $requested_python': it must run, be 3.10 to 3.12, and have pip (or uv on PATH)"
elif [[ -n $installed_python && -x $installed_python ]]; then
    python=$installed_python
else
    search=find_python
    [[ $accelerator != tpu ]] || $check_only || search=tpu_python
    python=$("$search") ||
        fail "found no Python 3.10 to 3.12 with pip: install one (on Debian or Ubuntu: apt-get install python3 python3-pip), or select one with --python"
fi

complete=false
problem=
if [[ ! -e $record ]]; then
    [[ ! -d $venv || -z $(ls -A "$venv") ]] ||
        fail "$venv exists and was not created by this script: move it, or select another directory with --venv"
elif [[ "$accelerator $python $PWD" != "$installed_accelerator $installed_python $installed_from" ]]; then
    problem="was created for $installed_accelerator, $installed_python, in $installed_from"
elif ! "$venv/bin/python" -c '' 2>/dev/null; then
    problem="is broken"
elif [[ $fingerprint == "$installed_fingerprint" ]]; then
    complete=true
fi
if $complete; then
    info "ready: $venv, $accelerator ($reason), $("$venv/bin/python" --version)"
    exit
elif $check_only; then
    info "not ready: $venv ${problem:-"has to be installed or updated"}"
    exit 1
elif [[ -n $problem ]]; then
    info "$venv $problem: recreating it"
    rm -rf "$venv"
fi

info "accelerator: $accelerator ($reason)"
info "Python: $python"
mkdir -p "$venv"
printf '%s\t%s\t%s\n' "$accelerator" "$python" "$PWD" >"$record"
log=$venv/install.log
: >"$log"

if command -v uv >/dev/null; then
    info "installer: uv"
    run_step "environment" uv venv --allow-existing --python "$python" "$venv"
    install=(uv pip install --python "$venv/bin/python" --constraints requirements.lock --compile-bytecode)
else
    info "installer: pip"
    run_step "environment" make_venv "$python" "$venv"
    install=("$venv/bin/python" -m pip install --constraint requirements.lock)
fi
first_import='
import importlib.util, rae_xla, torch
xla = importlib.util.find_spec("torch_xla") and __import__("torch_xla").__version__
print(f"rae_xla {rae_xla.__version__}, torch {torch.__version__}, torch_xla {xla or chr(45)}")
'
[[ -n $installed_fingerprint ]] ||
    info "this downloads about 3 GB and needs 9 GB of disk, most of it for torch; it takes some minutes"
run_step "build backend" "${install[@]}" setuptools
run_step "packages" "${install[@]}" --no-build-isolation --editable ".[$extras]"
run_step "first import" "$venv/bin/python" -c "$first_import"
info "$(tail -n 1 "$log")"
echo "$fingerprint" >>"$record"
info "ready after $SECONDS s: source $venv/bin/activate, then rae-xla --help"
