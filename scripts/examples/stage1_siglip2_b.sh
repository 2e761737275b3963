#!/usr/bin/env bash
# Stage 1 for another encoder: a ViT-XL decoder for SigLIP2-B, ImageNet 256 px, 16 epochs.
#
# Config   configs/stage1/siglip2_b_256.yaml
# Data     gs://$BUCKET/shards/imagenet-{train,val}; without BUCKET, shards/ here, or data.train=... data.val=...
# Files    the discriminator's backbone, VGG16 and Inception are downloaded; without network access:
#          gan.disc.arch.dino_ckpt_path=FILE weights.vgg16=FILE weights.inception=FILE
# Expect   rFID 0.53 without noise on the latents (stage_1.params.noise_tau=0); with it, as here, higher
# Results  $OUT (results/stage1_siglip2_b): decoder.pt, recon.json;
#          checkpoints there, or in gs://$BUCKET/runs. A second run resumes.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." && . scripts/examples/lib_examples.sh
begin configs/stage1/siglip2_b_256.yaml "$@"
train_decoder
