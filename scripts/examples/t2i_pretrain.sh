#!/usr/bin/env bash
# Text-to-image pretraining: Qwen2.5-1.5B and a 2.4 B head on SigLIP2 latents, after Scale-RAE.
#
# Config   configs/t2i/qwen2.5_1.5b_dit2.4b_siglip2.yaml
# Data     captioned tars, indexed by `rae-xla shards captions`: shards/ here, or data.train=...
# Files    models/Qwen2.5-1.5B-Instruct (`hf download Qwen/Qwen2.5-1.5B-Instruct --local-dir ...`) and the
#          decoder that the config names
# Expect   nothing measured here yet; an untrained head starts at an image loss of about 2
# Results  $OUT (results/t2i_pretrain): metrics; checkpoints there. A second run resumes.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." && . scripts/examples/lib_examples.sh
BUCKET='' # the bucket of the other examples holds ImageNet, without captions
begin configs/t2i/qwen2.5_1.5b_dit2.4b_siglip2.yaml "$@"
rae-xla train t2i --config "$config" --results-dir "$out" "${settings[@]}"
