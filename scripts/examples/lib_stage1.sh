# shellcheck shell=bash
# What the stage-1 examples have in common: train, take the decoder out, measure it. Sourced, not run.
set -euo pipefail
if [[ -z ${VIRTUAL_ENV:-} && -e .venv/bin/activate ]]; then
    # shellcheck source=/dev/null
    source .venv/bin/activate
fi

# stage1 CONFIG [key=value ... | --help]
stage1() {
    local config=$1 file=${BASH_SOURCE[1]##*/}
    local out=${OUT:-results/${file%.*}}
    shift
    if [[ ${1:-} == --help || ${1:-} == -h ]]; then
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "scripts/examples/$file"
        return
    fi
    rae-xla train stage1 --config "$config" --results-dir "$out" "$@"
    rae-xla export decoder --ckpt "$out" --out "$out/decoder.pt"
    # float32: what is quoted should not hang on the precision it was measured in
    rae-xla evaluate recon --config "$config" --ckpt "$out" --out "$out/recon.json" \
        runtime.precision=fp32 "$@"
}
