#!/usr/bin/env bash
# Make the Python environment for this machine. Run it again whenever you like: it is quick when
# there is nothing to do, and takes up an installation that was interrupted.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: bash install_spmd.sh [--accelerator tpu|cuda|cpu] [--python PYTHON] [--venv DIR]

  --accelerator KIND   what to compute on; found out by itself when left out
                         tpu   torch_xla with libtpu
                         cuda  plain torch (torch_xla has no CUDA backend)
                         cpu   torch_xla on virtual CPU devices, and plain torch
  --python PYTHON      a version (3.12), a command or a path; the newest of 3.10 to 3.12 when left out
  --venv DIR           where the environment goes (.venv)

A later run keeps the choices of the first unless told otherwise. requirements.lock has the versions.
EOF
}

called_from=$PWD
cd -P "$(dirname "${BASH_SOURCE[0]}")"
. scripts/lib_install.sh

asked_accelerator=
asked_python=
venv=.venv
while (($#)); do
    case $1 in
        --accelerator) asked_accelerator=${2:-} && shift ;;
        --python) asked_python=${2:-} && shift ;;
        --venv) venv=${2:-} && shift ;;
        -h | --help) usage && exit ;;
        *) usage >&2 && fail "unknown option: $1" ;;
    esac
    shift || fail "the last option lacks its value; see --help"
done
# Relative paths are relative to where the user is.
[[ $asked_python != ?*/* || $asked_python == /* ]] || asked_python=$called_from/$asked_python
[[ $venv == /* || $venv == .venv ]] || venv=$called_from/$venv
venv=${venv#"$PWD/"}

trap 'exit 130' INT # by way of EXIT, which ends what is running
trap 'exit 143' TERM

# One installation at a time (test.sh and quickstart.sh may both be starting).
exec 9<requirements.lock
if command -v flock >/dev/null && ! flock --nonblock 9; then
    say "another installation is running here: waiting for it"
    flock 9
fi

# What stands in $venv: the choices at its first line, and at its second, once complete, of what.
record=$venv/rae-xla.install
fingerprint=$(cat requirements.lock pyproject.toml install_spmd.sh | cksum)
had_accelerator=
had_python=
had_folder=
had_fingerprint=
if [[ -e $record ]]; then
    {
        IFS=$'\t' read -r had_accelerator had_python had_folder
        read -r had_fingerprint
    } <"$record" || true
fi

if [[ -n $asked_accelerator ]]; then
    accelerator=$asked_accelerator reason="as asked"
elif [[ -n $had_accelerator ]]; then
    accelerator=$had_accelerator reason="as before"
else
    accelerator=$(detect_accelerator) reason="found by itself"
fi
case $accelerator in
    tpu) extras=tpu,xla,quickstart,hub,dashboard,dev ;;
    cpu) extras=xla,plan,quickstart,hub,dashboard,dev ;; # plan: the TPU's compiler, without a TPU
    cuda) extras=quickstart,hub,dashboard,dev ;;
    *) fail "--accelerator is tpu, cuda or cpu, not '$accelerator'" ;;
esac

if [[ -n $asked_python ]]; then
    python=$(find_python "$asked_python") ||
        fail "no usable Python for '--python $asked_python': it must run, be 3.10 to 3.12 and have pip (or uv beside it)"
elif [[ -n $had_python && -x $had_python ]]; then
    python=$had_python
else
    python=$(find_python) ||
        fail "no Python 3.10 to 3.12 with pip found: install one (on Debian or Ubuntu: apt-get install python3 python3-pip), or name it with --python"
fi

if [[ -e $record ]]; then
    if [[ "$accelerator $python $PWD" != "$had_accelerator $had_python $had_folder" ]]; then
        say "$venv was made for $had_accelerator, $had_python, in $had_folder: making it anew"
        rm -rf "$venv"
    elif ! "$venv/bin/python" -c '' 2>/dev/null; then
        say "$venv is broken: making it anew"
        rm -rf "$venv"
    elif [[ $fingerprint == "$had_fingerprint" ]]; then
        say "ready: $venv, $accelerator ($reason), $("$venv/bin/python" --version)"
        exit
    fi
elif [[ -d $venv && -n $(ls -A "$venv") ]]; then
    fail "$venv exists and was not made by this script: move it away, or choose another place with --venv"
fi

say "accelerator: $accelerator ($reason)"
say "Python: $python"
mkdir -p "$venv"
printf '%s\t%s\t%s\n' "$accelerator" "$python" "$PWD" >"$record"
log=$venv/install.log
: >"$log"

if command -v uv >/dev/null; then
    say "installer: uv"
    work "environment" uv venv --allow-existing --python "$python" "$venv"
    install=(uv pip install --python "$venv/bin/python" --constraints requirements.lock --compile-bytecode)
else
    say "installer: pip"
    work "environment" make_venv "$python" "$venv"
    install=("$venv/bin/python" -m pip install --constraint requirements.lock)
fi
first_import='
import importlib.util, rae_xla, torch
xla = importlib.util.find_spec("torch_xla") and __import__("torch_xla").__version__
print(f"rae_xla {rae_xla.__version__}, torch {torch.__version__}, torch_xla {xla or chr(45)}")
'
[[ -n $had_fingerprint ]] ||
    say "about 3 GB to download and 9 GB on disk, most of it torch: some minutes"
work "build backend" "${install[@]}" setuptools
work "packages" "${install[@]}" --no-build-isolation --editable ".[$extras]"
work "first import" "$venv/bin/python" -c "$first_import"
say "$(tail -n 1 "$log")"
echo "$fingerprint" >>"$record"
say "ready after $SECONDS s: source $venv/bin/activate, then rae-xla --help"
