#!/usr/bin/env bash
# Stage 1 at 512 px: a ViT-XL decoder for DINOv2-B, ImageNet, 16 epochs.
#
# Config   configs/stage1/dinov2_b_512.yaml
# Data     gs://$BUCKET/shards/imagenet-{train,val}; without BUCKET, shards/ here, or data.train=... data.val=...
# Files    the discriminator's backbone, VGG16 and Inception are downloaded; without network access:
#          gan.disc.arch.dino_ckpt_path=FILE weights.vgg16=FILE weights.inception=FILE
# Expect   no published rFID at 512 px; at 256 px it is 0.57
# Results  $OUT (results/stage1_dinov2_b_512): decoder.pt, recon.json;
#          checkpoints there, or in gs://$BUCKET/runs. A second run resumes.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." && . scripts/examples/lib_examples.sh
begin configs/stage1/dinov2_b_512.yaml "$@"
train_decoder
