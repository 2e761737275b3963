#!/usr/bin/env bash
# Stage 2 of RAEv2: DiT-DH-XL (875 M parameters) with in-context conditioning and a base head, data
# prediction, Muon, on DINOv3-L latents of ImageNet 256 px, 80 epochs.
#
# Config   configs/stage2/ditdh_xl_ig_256_dinov3l_k7.yaml
# Data     gs://$BUCKET/shards/imagenet-train; without BUCKET, shards/ here, or data.train=...
# Files    decoder and statistics of latents: downloaded from nyu-visionx/RAEv2-models to models/.
#          DINOv3 is gated: accept its licence on the hub, or set stage_1.params.encoder_config_path=FOLDER
# Expect   gFID 1.65 without guidance, 1.06 with internal guidance (the paper, against JiT's statistics)
# Results  $OUT (results/stage2_raev2_xl): metrics, images;
#          checkpoints there, or in gs://$BUCKET/runs. A second run resumes.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." && . scripts/examples/lib_examples.sh
begin configs/stage2/ditdh_xl_ig_256_dinov3l_k7.yaml "$@"
repository=nyu-visionx/RAEv2-models
train_diffusion stage1/imagenet/dinov3l-k7/decoder.pt stage1/imagenet/dinov3l-k7/stats.pt
