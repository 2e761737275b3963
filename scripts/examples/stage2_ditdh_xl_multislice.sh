#!/usr/bin/env bash
# Stage 2 on several slices: DiT-DH-XL, a replica of the state on each, gradients reduced over the network.
#
# Config   configs/stage2/ditdh_xl_256.yaml
# Data     gs://$BUCKET/shards/imagenet-train; without BUCKET, shards/ here, or data.train=...
# Files    decoder and statistics of latents: downloaded from nyu-visionx/RAE-collections to models/
# Expect   the results of stage2_ditdh_xl.sh; SLICES comes from infra/pod.env (default: 2)
# Results  $OUT (results/stage2_ditdh_xl_multislice): metrics, images;
#          checkpoints there, or in gs://$BUCKET/runs. A second run resumes.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." && . scripts/examples/lib_examples.sh
begin configs/stage2/ditdh_xl_256.yaml "$@"
$smoke || settings=("mesh.dcn.data=${SLICES:-2}" "${settings[@]}")
train_diffusion decoders/dinov2/wReg_base/ViTXL_n08/model.pt stats/dinov2/wReg_base/imagenet1k/stat.pt
