#!/usr/bin/env bash
# Text-to-image of RAEv2: a frozen Qwen3-0.6B, and an 875 M head that attends to the tokens of the prompt, on
# DINOv3-L latents.
#
# Config   configs/t2i/qwen3_0.6b_incontext_dinov3l.yaml
# Data     captioned tars, indexed by `rae-xla shards captions`: shards/ here, or data.train=...
# Files    models/Qwen3-0.6B (`hf download Qwen/Qwen3-0.6B --local-dir models/Qwen3-0.6B`), and decoder and
#          statistics (`hf download nyu-visionx/RAEv2-models --include "stage1/general/dinov3l-k7/*"
#          --local-dir models`)
# Expect   nothing measured here yet
# Results  $OUT (results/t2i_raev2): metrics, checkpoints, and images/ of two prompts. A second run resumes.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." && . scripts/examples/lib_examples.sh
BUCKET='' # the bucket of the other examples holds ImageNet, without captions
begin configs/t2i/qwen3_0.6b_incontext_dinov3l.yaml "$@"
rae-xla train t2i --config "$config" --results-dir "$out" "${settings[@]}"
[[ -e $out/images ]] || rae-xla generate --model "$out" --prompt "a red square" \
    --prompt "a cat on a windowsill" --num-samples 2 --cfg-scale 6 --out "$out/images"
