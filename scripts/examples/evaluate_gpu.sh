#!/usr/bin/env bash
# FID, sFID, Inception Score, precision and recall of 50,000 samples, on all GPUs of a machine.
#
# Data     SAMPLES=... (results/sample_gpu), a folder or an .npz; REFERENCE=..., the reference batch of the
#          ADM evaluation suite, ImageNet 256 px, downloaded if missing (2 GB)
# Expect   gFID 1.51 for DiT-DH-XL without guidance (the paper)
# Results  $OUT (results/evaluate_gpu)/gen.json, and a table
cd "$(dirname "${BASH_SOURCE[0]}")/../.." && . scripts/examples/lib_examples.sh
begin configs/sampling/ditdh_xl_256.yaml "$@"
reference=${REFERENCE:-models/VIRTUAL_imagenet256_labeled.npz}
what=(--reference "$reference" "$@")
if $smoke; then # features of a tiny DINOv2, because Inception would have to be downloaded
    what=(--reference "$smoke_dir/images.npz" --metrics fd_dinov2 runtime.backend=torch
        weights.dinov2=tests/golden/rae/dinov2/encoder)
elif [[ ! -e $reference ]]; then
    mkdir -p "$(dirname "$reference")"
    from=https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256
    curl -fL "$from/VIRTUAL_imagenet256_labeled.npz" -o "$reference.part"
    mv "$reference.part" "$reference"
fi
mkdir -p "$out"
torchrun --standalone --nproc-per-node "$(gpus)" -m rae_xla evaluate gen \
    --samples "${SAMPLES:-results/sample_gpu}" --out "$out/gen.json" "${what[@]}"
