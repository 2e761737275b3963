#!/usr/bin/env bash
# Stage 2, small: DiT-DH-S (196 M parameters) on DINOv2-B latents of ImageNet 256 px, 800 epochs.
#
# Config   configs/stage2/ditdh_s_256.yaml
# Data     gs://$BUCKET/shards/imagenet-train; without BUCKET, shards/ here, or data.train=...
# Files    decoder and statistics of latents: downloaded from nyu-visionx/RAE-collections to models/
# Expect   gFID 6.07 after 80 epochs, without guidance (the paper)
# Results  $OUT (results/stage2_ditdh_s): metrics, images;
#          checkpoints there, or in gs://$BUCKET/runs. A second run resumes.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." && . scripts/examples/lib_examples.sh
begin configs/stage2/ditdh_s_256.yaml "$@"
train_diffusion decoders/dinov2/wReg_base/ViTXL_n08/model.pt stats/dinov2/wReg_base/imagenet1k/stat.pt
