#!/usr/bin/env bash
# Samples on all GPUs of a machine: 50,000 images of the published DiT-DH-XL, 256 px.
#
# Config   configs/sampling/ditdh_xl_256.yaml, or CONFIG=...; your own weights: CKPT=results/ditdh
# Files    weights, decoder and statistics: downloaded from nyu-visionx/RAE-collections to models/
# Expect   gFID 1.51 (the paper); guidance.scale=... and the *_autoguidance.yaml give others
# Results  $OUT (results/sample_gpu): PNGs, grid.png, samples.npz. A second run resumes, on any
#          number of GPUs.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." && . scripts/examples/lib_examples.sh
begin "${CONFIG:-configs/sampling/ditdh_xl_256.yaml}" "$@"
published_sampler
torchrun --standalone --nproc-per-node "$(gpus)" -m rae_xla sample --config "$config" \
    ${CKPT:+--ckpt "$CKPT"} --out "$out" --num-samples "$count" --batch-size "${BATCH:-1000}" \
    "${settings[@]}"
