#!/usr/bin/env bash
# Stage 1 on one GPU: a ViT-B decoder for DINOv2-B, ImageNet 256 px, 16 epochs, bf16.
#
# Config   configs/stage1/dinov2_b_256_vitb.yaml
# Data     gs://$BUCKET/shards/imagenet-{train,val}; without BUCKET, shards/ here, or data.train=... data.val=...
# Files    the discriminator's backbone, VGG16 and Inception are downloaded; without network access:
#          gan.disc.arch.dino_ckpt_path=FILE weights.vgg16=FILE weights.inception=FILE
# Expect   rFID about 0.58 (the paper's ViT-B decoder, trained at the full batch of 512)
# Results  $OUT (results/stage1_dinov2_b_one_gpu): decoder.pt, recon.json;
#          checkpoints there, or in gs://$BUCKET/runs. A second run resumes.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." && . scripts/examples/lib_examples.sh
begin configs/stage1/dinov2_b_256_vitb.yaml "$@"
train_decoder
