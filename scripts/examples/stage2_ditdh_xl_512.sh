#!/usr/bin/env bash
# Stage 2 at 512 px: DiT-DH-XL on DINOv2-B latents of ImageNet, 32 x 32 tokens.
#
# Config   configs/stage2/ditdh_xl_512.yaml
# Data     gs://$BUCKET/shards/imagenet-train; without BUCKET, shards/ here, or data.train=...
# Files    decoder and statistics of latents: downloaded from nyu-visionx/RAE-collections to models/
# Expect   gFID 1.13 with autoguidance (the paper)
# Results  $OUT (results/stage2_ditdh_xl_512): metrics, images;
#          checkpoints there, or in gs://$BUCKET/runs. A second run resumes.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." && . scripts/examples/lib_examples.sh
begin configs/stage2/ditdh_xl_512.yaml "$@"
train_diffusion decoders/dinov2/wReg_base/ViTXL_n08_i512/model.pt stats/dinov2/wReg_base/imagenet1k_512/stat.pt
