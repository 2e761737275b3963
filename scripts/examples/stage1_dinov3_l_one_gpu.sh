#!/usr/bin/env bash
# Stage 1 of RAEv2 on one GPU: a ViT-B decoder for 7 layers of DINOv3-L, ImageNet 256 px, 16 epochs, bf16.
#
# Config   configs/stage1/dinov3_l_k7_256_vitb.yaml
# Data     gs://$BUCKET/shards/imagenet-{train,val}; without BUCKET, shards/ here, or data.train=... data.val=...
# Files    as in stage1_dinov3_l.sh
# Expect   an rFID between 0.29 and that of a ViT-B decoder for DINOv2-B, 0.58 (not measured)
# Results  $OUT (results/stage1_dinov3_l_one_gpu): decoder.pt, recon.json;
#          checkpoints there, or in gs://$BUCKET/runs. A second run resumes.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." && . scripts/examples/lib_examples.sh
begin configs/stage1/dinov3_l_k7_256_vitb.yaml "$@"
train_decoder
