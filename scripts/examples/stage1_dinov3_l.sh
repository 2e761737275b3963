#!/usr/bin/env bash
# Stage 1 of RAEv2: a ViT-XL decoder for 7 layers of DINOv3-L, ImageNet 256 px, 16 epochs.
#
# Config   configs/stage1/dinov3_l_k7_256.yaml
# Data     gs://$BUCKET/shards/imagenet-{train,val}; without BUCKET, shards/ here, or data.train=... data.val=...
# Files    DINOv3 is gated: accept its licence on the Hugging Face hub, or set
#          stage_1.params.encoder_config_path=FOLDER. The networks of the losses as in stage1_dinov2_b.sh
# Expect   rFID 0.29, PSNR 22.6 (the paper, whose encoder was in train mode: docs/stage1.md)
# Results  $OUT (results/stage1_dinov3_l): decoder.pt, recon.json;
#          checkpoints there, or in gs://$BUCKET/runs. A second run resumes.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." && . scripts/examples/lib_examples.sh
begin configs/stage1/dinov3_l_k7_256.yaml "$@"
train_decoder
