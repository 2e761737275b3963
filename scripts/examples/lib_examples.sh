# shellcheck shell=bash
# Functions of the example scripts: locations of data and results, and SMOKE=1. Sourced, not executed.
set -euo pipefail
if [[ -z ${VIRTUAL_ENV:-} && -e .venv/bin/activate ]]; then
    # shellcheck source=/dev/null
    source .venv/bin/activate
fi

# begin CONFIG [--help | key=value ...]: set $config, $out (results), $ckpt (checkpoints) and $settings.
begin() {
    config=$1 smoke=${SMOKE:+true} smoke=${smoke:-false}
    local script=${BASH_SOURCE[1]} name=${BASH_SOURCE[1]##*/}
    name=${name%.sh}
    shift
    if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "scripts/examples/${script##*/}"
        exit
    fi
    out=${OUT:-results/$name} ckpt=${OUT:-results/$name} settings=()
    smoke_dir=${SMOKE_DIR:-results/smoke}
    if $smoke; then
        local lines
        lines=$(python scripts/examples/smoke.py "$config" "$smoke_dir")
        mapfile -t settings <<<"$lines"
    elif [[ -n ${BUCKET:-} ]]; then
        ckpt=gs://$BUCKET/runs/$name
        settings=("data.train=gs://$BUCKET/shards/imagenet-train"
            "data.val=gs://$BUCKET/shards/imagenet-val" "checkpoint.dir=$ckpt")
    fi
    settings+=("$@")
}

# published FILE...: download files of $repository to models/, as the configs expect.
published() {
    local file
    for file; do
        $smoke || [[ -e models/$file ]] ||
            hf download "${repository:-nyu-visionx/RAE-collections}" "$file" --local-dir models
    done
}

# train_decoder CONFIG [key=value ...]: train, export the decoder, and evaluate it.
train_decoder() {
    local metrics=(psnr ssim lpips rfid)
    published discs/dino_vit_small_patch8_224.pth
    ! $smoke || metrics=(psnr ssim) # the other metrics need downloaded networks
    rae-xla train stage1 --config "$config" --results-dir "$out" "${settings[@]}"
    rae-xla checkpoints export "$ckpt" --what decoder --out "$out/decoder.pt"
    # float32, so that quoted numbers do not depend on the precision of the evaluation
    rae-xla evaluate recon --config "$config" --ckpt "$ckpt" --out "$out/recon.json" \
        --metrics "${metrics[@]}" "${settings[@]}" runtime.precision=fp32
}

# train_diffusion FILE...: train on latents of the published autoencoder, which consists of these files.
train_diffusion() {
    published "$@"
    $smoke || settings=(runtime.precision=bf16 "${settings[@]}")
    rae-xla train stage2 --config "$config" --results-dir "$out" "${settings[@]}"
}

# published_sampler: download the weights of configs/sampling/ditdh_xl_256.yaml; set $count.
published_sampler() {
    count=${COUNT:-50000}
    if $smoke; then count=8; else settings=(runtime.precision=bf16 "${settings[@]}"); fi
    [[ -n ${CKPT:-} ]] || published DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-XL/stage2_model.pt
    published decoders/dinov2/wReg_base/ViTXL_n08/model.pt stats/dinov2/wReg_base/imagenet1k/stat.pt
}

# gpus: print the number of GPUs, for each of which torchrun starts a process; 1 without a GPU.
gpus() {
    local count
    count=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU ' || true)
    echo $((count > 0 ? count : 1))
}
