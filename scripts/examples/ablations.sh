#!/usr/bin/env bash
# The paper's ablations of decoder training, one short run each, then a table and a plot. The config of
# a run is a small file in configs/ablations/decoder based on base.yaml. A second run resumes.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: bash scripts/examples/ablations.sh [--digits] [--out DIR] [NAME ...] [key=value ...]

  NAME        gan (on, off), tau (0.8, 0), lr (2e-4, 1e-4, 4e-4), lpips (1, 0.5, 2); default: all
  --digits    train on the quickstart's handwritten digits, with random loss networks: minutes on a CPU
  --out DIR   results (default: results/ablations, or results/ablations-digits)
  key=value   settings of every run, such as data.train=shards/imagenet-train

Without --digits: ImageNet shards and the published files, see configs/stage1/dinov2_b_256.yaml.
EOF
}

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
names=()
settings=()
out=
digits=false
while (($#)); do
    case $1 in
        --digits) digits=true ;;
        --out) out=${2:?needs a folder} && shift ;;
        -h | --help) usage && exit ;;
        gan | tau | lr | lpips) names+=("$1") ;;
        *=*) settings+=("$1") ;;
        *) usage >&2 && printf 'ablations.sh: unknown argument: %s\n' "$1" >&2 && exit 2 ;;
    esac
    shift
done
((${#names[@]})) || names=(gan tau lr lpips)
configs=configs/ablations/decoder
# SMOKE=1: --digits with tiny stand-ins for data and networks, in seconds.
smoke=${SMOKE:-}
[[ -z $smoke ]] || digits=true
if [[ -z ${VIRTUAL_ENV:-} && -e .venv/bin/activate ]]; then
    # shellcheck source=/dev/null
    source .venv/bin/activate
fi

if [[ -n $smoke ]]; then
    out=${out:-results/ablations-smoke}
    tiny=$(python scripts/examples/smoke.py configs/quickstart/stage1.yaml "${SMOKE_DIR:-results/smoke}")
    mapfile -t tiny <<<"$tiny"
    settings=("base=$configs/digits.yaml" "${tiny[@]}" eval.eval_interval=2 "${settings[@]}")
elif $digits; then
    out=${out:-results/ablations-digits}
    data=$out/data
    [[ -e $data/images ]] || python scripts/quickstart/digits.py --out "$data/images"
    for split in train test; do
        [[ -e $data/$split/index.json ]] || rae-xla shards make "$data/images/$split" "$data/$split"
    done
    [[ -e $data/encoder ]] ||
        python scripts/quickstart/pretrain_encoder.py --images "$data/images" --out "$data/encoder"
    [[ -e $data/dino.pth ]] || python scripts/quickstart/random_loss_networks.py --out "$data"
    encoder=stage_1.params.encoder_config_path=$data/encoder
    settings=("base=$configs/digits.yaml" "data.train=$data/train" "data.val=$data/test" "$encoder"
        "stage_1.params.encoder_params.dinov2_path=$data/encoder" "weights.vgg16=$data/vgg16.pth"
        "gan.disc.arch.dino_ckpt_path=$data/dino.pth" "${settings[@]}")
fi
out=${out:-results/ablations}

runs=(base)
for name in "${names[@]}"; do
    case $name in
        gan) runs+=(gan_off) ;;
        tau) runs+=(tau_0) ;;
        lr) runs+=(lr_1e-4 lr_4e-4) ;;
        lpips) runs+=(lpips_0.5 lpips_2) ;;
    esac
done
for run in "${runs[@]}"; do
    own=("${settings[@]}")
    config=$configs/$run.yaml
    if $digits; then
        # digits.yaml replaces base.yaml; its own learning rate is halved and doubled
        case $run in
            base) config=$configs/digits.yaml own=("${settings[@]:1}") ;;
            lr_1e-4) own+=(training.scheduler.base_lr=5.0e-4) ;;
            lr_4e-4) own+=(training.scheduler.base_lr=2.0e-3) ;;
        esac
    fi
    printf '\n== %s\n' "$run"
    rae-xla train stage1 --config "$config" --results-dir "$out/$run" "${own[@]}"
done
printf '\n'
python scripts/examples/ablation_table.py "$out" "${names[@]}"
