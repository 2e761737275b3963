#!/usr/bin/env bash
# Stage 2 of RAEv2 on one GPU: DiT-DH-S (188 M parameters), the same recipe, batch 256, 40 epochs, bf16.
#
# Config   configs/stage2/ditdh_s_ig_256_dinov3l_k7.yaml
# Data     gs://$BUCKET/shards/imagenet-train; without BUCKET, shards/ here, or data.train=...
# Files    as in stage2_raev2_xl.sh
# Expect   not measured yet; sample with guidance.method=internal guidance.scale=1.78 (docs/sampling.md)
# Results  $OUT (results/stage2_raev2_s): metrics, images;
#          checkpoints there, or in gs://$BUCKET/runs. A second run resumes.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." && . scripts/examples/lib_examples.sh
begin configs/stage2/ditdh_s_ig_256_dinov3l_k7.yaml "$@"
repository=nyu-visionx/RAEv2-models
train_diffusion stage1/imagenet/dinov3l-k7/decoder.pt stage1/imagenet/dinov3l-k7/stats.pt
