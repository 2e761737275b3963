# shellcheck shell=bash
# What the examples have in common: where data and results are, and SMOKE=1. Sourced, not run.
set -euo pipefail
if [[ -z ${VIRTUAL_ENV:-} && -e .venv/bin/activate ]]; then
    # shellcheck source=/dev/null
    source .venv/bin/activate
fi

# begin CONFIG [--help | key=value ...]: sets $config, $out, $ckpt (what is trained, where it is to be
# found) and $settings.
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
        local said
        said=$(python scripts/examples/smoke.py "$config" "$smoke_dir")
        mapfile -t settings <<<"$said"
    elif [[ -n ${BUCKET:-} ]]; then
        ckpt=gs://$BUCKET/runs/$name
        settings=("data.train=gs://$BUCKET/shards/imagenet-train"
            "data.val=gs://$BUCKET/shards/imagenet-val" "checkpoint.dir=$ckpt")
    fi
    settings+=("$@")
}

# published FILE...: of nyu-visionx/RAE-collections, in models/, where the configurations look.
published() {
    local file
    for file; do
        $smoke || [[ -e models/$file ]] ||
            hf download nyu-visionx/RAE-collections "$file" --local-dir models
    done
}

# train_decoder CONFIG [key=value ...]: train, take the decoder out, measure it.
train_decoder() {
    local metrics=(psnr ssim lpips rfid)
    published discs/dino_vit_small_patch8_224.pth
    ! $smoke || metrics=(psnr ssim) # the others need networks that are downloaded
    rae-xla train stage1 --config "$config" --results-dir "$out" "${settings[@]}"
    rae-xla export decoder --ckpt "$ckpt" --out "$out/decoder.pt"
    # float32: what is quoted should not hang on the precision it was measured in
    rae-xla evaluate recon --config "$config" --ckpt "$ckpt" --out "$out/recon.json" \
        --metrics "${metrics[@]}" "${settings[@]}" runtime.precision=fp32
}

# train_diffusion FILE...: train on latents of the published autoencoder that these files make up.
train_diffusion() {
    published "$@"
    $smoke || settings=(runtime.precision=bf16 "${settings[@]}")
    rae-xla train stage2 --config "$config" --results-dir "$out" "${settings[@]}"
}

# published_sampler: the weights of configs/sampling/ditdh_xl_256.yaml; sets $count.
published_sampler() {
    count=${COUNT:-50000}
    if $smoke; then count=8; else settings=(runtime.precision=bf16 "${settings[@]}"); fi
    [[ -n ${CKPT:-} ]] || published DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-XL/stage2_model.pt
    published decoders/dinov2/wReg_base/ViTXL_n08/model.pt stats/dinov2/wReg_base/imagenet1k/stat.pt
}

# gpus: how many there are; torchrun starts a process for each. One process where there are none.
gpus() {
    local count
    count=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU ' || true)
    echo $((count > 0 ? count : 1))
}
