#!/usr/bin/env bash
# Text-to-image on one GPU: SmolLM2-360M, frozen, and a 0.3 B head on SigLIP2 latents, bf16.
#
# Config   configs/t2i/smollm2_360m_dit0.3b_siglip2.yaml
# Data     captioned tars, indexed by `rae-xla shards captions`: shards/ here, or data.train=...
# Files    models/SmolLM2-360M-Instruct (`hf download HuggingFaceTB/SmolLM2-360M-Instruct --local-dir ...`)
#          and the decoder that the config names
# Expect   nothing measured here yet; an untrained head starts at an image loss of about 2
# Results  $OUT (results/t2i_one_gpu): metrics, checkpoints, and images/ of two prompts.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." && . scripts/examples/lib_examples.sh
BUCKET='' # the bucket of the other examples holds ImageNet, without captions
begin configs/t2i/smollm2_360m_dit0.3b_siglip2.yaml "$@"
rae-xla train t2i --config "$config" --results-dir "$out" "${settings[@]}"
rae-xla generate --model "$out" --prompt "a red square" --prompt "a cat on a windowsill" \
    --num-samples 2 --cfg-scale 3 --out "$out/images"
