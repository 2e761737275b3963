#!/usr/bin/env bash
# Stage 1 for another encoder: a ViT-XL decoder for SigLIP2-B, ImageNet 256 px, 16 epochs.
#
# Config   configs/stage1/siglip2_b_256.yaml
# Data     shards/imagenet-train, shards/imagenet-val (rae-xla shards make), or data.train=... data.val=...
# Files    models/discs/dino_vit_small_patch8_224.pth: hf download nyu-visionx/RAE-collections \
#              discs/dino_vit_small_patch8_224.pth --local-dir models
#          VGG16 and Inception are downloaded by torchvision and torch-fidelity, or weights.vgg16=FILE
# Expect   rFID 0.53 without noise on the latents (stage_1.params.noise_tau=0); with it, as here, more
# Results  $OUT (results/stage1_siglip2_b): checkpoints, decoder.pt, recon.json. Started again, it goes on.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." && . scripts/examples/lib_stage1.sh
stage1 configs/stage1/siglip2_b_256.yaml "$@"
