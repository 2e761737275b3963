#!/usr/bin/env bash
# Stage 2, the published recipe: DiT-DH-XL on DINOv2-B latents of ImageNet 256 px, 800 epochs.
#
# Config   configs/stage2/ditdh_xl_256.yaml
# Data     gs://$BUCKET/shards/imagenet-train; without BUCKET, shards/ here, or data.train=...
# Files    decoder and statistics of latents: downloaded from nyu-visionx/RAE-collections to models/
# Expect   gFID 1.51 without guidance (the paper, 50,000 samples: sample_tpu.sh, evaluate_gpu.sh)
# Results  $OUT (results/stage2_ditdh_xl): metrics, images;
#          checkpoints there, or in gs://$BUCKET/runs. A second run resumes.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." && . scripts/examples/lib_examples.sh
begin configs/stage2/ditdh_xl_256.yaml "$@"
train_diffusion decoders/dinov2/wReg_base/ViTXL_n08/model.pt stats/dinov2/wReg_base/imagenet1k/stat.pt
