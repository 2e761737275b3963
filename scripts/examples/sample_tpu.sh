#!/usr/bin/env bash
# Samples on a TPU VM of one host: 50,000 images of the published DiT-DH-XL, 256 px.
#
# Config   configs/sampling/ditdh_xl_256.yaml, or CONFIG=...; your own weights: CKPT=gs://...
# Files    weights, decoder and statistics: downloaded from nyu-visionx/RAE-collections to models/
# Expect   gFID 1.51 (the paper); guidance.scale=... and the *_autoguidance.yaml give others
# Results  $OUT (results/sample_tpu): PNGs, grid.png, samples.npz. A second run resumes. On a pod
#          $OUT must be a folder that all hosts share.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." && . scripts/examples/lib_examples.sh
begin "${CONFIG:-configs/sampling/ditdh_xl_256.yaml}" "$@"
published_sampler
rae-xla sample --config "$config" ${CKPT:+--ckpt "$CKPT"} --out "$out" --num-samples "$count" \
    --batch-size "${BATCH:-1000}" "${settings[@]}"
