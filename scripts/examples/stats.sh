#!/usr/bin/env bash
# Mean and variance of the latents of your own encoder or data (published autoencoders include theirs).
#
# Config   configs/stage1/dinov2_b_256.yaml, or CONFIG=...
# Data     gs://$BUCKET/shards/imagenet-train; without BUCKET, shards/ here, or data.train=...
# Expect   every image encoded once, centre-cropped: minutes on a pod
# Results  $OUT (results/stats)/stat.pt, for stage_1.params.normalization_stat_path
cd "$(dirname "${BASH_SOURCE[0]}")/../.." && . scripts/examples/lib_examples.sh
begin "${CONFIG:-configs/stage1/dinov2_b_256.yaml}" "$@"
mkdir -p "$out"
rae-xla stats --config "$config" --out "$out/stat.pt" "${settings[@]}"
