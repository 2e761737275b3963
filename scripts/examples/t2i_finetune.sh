#!/usr/bin/env bash
# Text-to-image fine-tuning: continues the averaged model of t2i_pretrain.sh, a tenth of its learning rate.
#
# Config   configs/t2i/qwen2.5_1.5b_dit2.4b_siglip2.yaml
# Data     captioned tars of instructions: shards/ here, or data.train=...
# Files    $FROM (results/t2i_pretrain): results folder of the first stage, or a folder of Scale-RAE
# Expect   nothing measured here yet; the losses start where those of the first stage ended
# Results  $OUT (results/t2i_finetune): metrics, checkpoints, and model/ in the layout of Scale-RAE.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." && . scripts/examples/lib_examples.sh
BUCKET='' # the bucket of the other examples holds ImageNet, without captions
begin configs/t2i/qwen2.5_1.5b_dit2.4b_siglip2.yaml "$@"
$smoke || settings=(text_to_image.tokenizer=models/Qwen2.5-1.5B-Instruct "${settings[@]}")
rae-xla train t2i --config "$config" --results-dir "$out" "${settings[@]}" \
    text_to_image.ckpt="${FROM:-results/t2i_pretrain}" text_to_image.language_model=null \
    text_to_image.language_model_config=null training.scheduler.base_lr=5.65e-5 \
    text_to_image.language_model_scheduler.base_lr=5.65e-6
[[ -e $out/model ]] || rae-xla checkpoints export "$out" --what text-to-image --out "$out/model"
