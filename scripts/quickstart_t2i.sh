#!/usr/bin/env bash
# From captioned emoji and a pretrained language model to a text-to-image model, through every stage of
# the system: SPMD over 4 virtual XLA devices of this machine's CPU, as over the chips of a TPU slice.
# Emoji and language model are packages of npm and PyPI. The results are a page,
# results/quickstart_t2i/report.html, and a table.
#
# A second run resumes where the first one stopped. Delete the result of a step to repeat from there, or
# results/quickstart_t2i to start over. SMOKE=1 runs every step on little data for a few training steps,
# in results/quickstart_t2i_smoke.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash install_spmd.sh
# shellcheck source=/dev/null
source .venv/bin/activate
. scripts/quickstart/lib_steps.sh

out=results/quickstart_t2i
configs=configs/quickstart_t2i
packages=$out/packages
# Without torch_xla, as on a CUDA machine, the same steps run on plain torch.
settings=()
python -c 'import torch_xla' 2>/dev/null || settings=(runtime.backend=torch)
concepts=() encoder_steps=() judge_steps=() training=() sampling=(--num-steps 20)
if [[ -n ${SMOKE:-} ]]; then
    out=results/quickstart_t2i_smoke
    export XLA_FLAGS=${XLA_FLAGS:---xla_backend_optimization_level=0} # compiles faster
    mkdir -p "$out/configs"
    for name in stage1 t2i; do
        sed "s|results/quickstart_t2i/|$out/|" "$configs/$name.yaml" >"$out/configs/$name.yaml"
    done
    configs=$out/configs
    concepts=(--concepts 5) encoder_steps=(--steps 3) judge_steps=(--steps 3) sampling=(--num-steps 2)
    training=(training.steps=3 training.log_every=1 training.scheduler.warmup_steps=1
        training.scheduler.decay_end_steps=3 training.global_batch_size=8)
fi

begin_steps $out
printf '\nSeventeen steps, half of the time for training the text-to-image model.\n'

step "download the emoji and the language model" "$packages/complete" \
    python scripts/quickstart_t2i/packages.py --out "$packages"

step "render captioned emoji" $out/images \
    python scripts/quickstart_t2i/emoji_images.py --packages "$packages" --out $out/images "${concepts[@]}"

step "index the captions" $out/shards \
    rae-xla shards captions $out/images/tars --out $out/shards

step "write the language model as a model folder" $out/language_model \
    python scripts/quickstart_t2i/language_model.py --packages "$packages" --layers 6 \
    --out $out/language_model

step "pretrain the encoder" $out/encoder \
    python scripts/quickstart_t2i/pretrain_emoji_encoder.py --images $out/images --out $out/encoder \
    "${encoder_steps[@]}"

step "train stage 1, the decoder" $out/stage1 \
    rae-xla train stage1 --config $configs/stage1.yaml --results-dir $out/stage1 \
    "${training[@]}" "${settings[@]}"

step "export the decoder" $out/decoder.pt \
    rae-xla checkpoints export $out/stage1 --what decoder --out $out/decoder.pt

step "measure latent statistics" $out/stat.pt \
    rae-xla stats --config $configs/t2i.yaml --out $out/stat.pt "${settings[@]}"

step "reconstruct all emoji" $out/reconstructed \
    rae-xla reconstruct --config $configs/t2i.yaml --batch-size 60 \
    --input $out/images/png --out $out/reconstructed "${settings[@]}"

step "train the text-to-image model" $out/t2i \
    rae-xla train t2i --config $configs/t2i.yaml --results-dir $out/t2i \
    "${training[@]}" "${settings[@]}"

step "write the prompts of the evaluation" $out/prompts \
    python scripts/quickstart_t2i/emoji_prompts.py --images $out/images --out $out/prompts

step "generate without guidance" $out/generated/scale1 \
    rae-xla generate --model $out/t2i --prompts $out/prompts/few.txt --num-samples 2 --cfg-scale 1 \
    "${sampling[@]}" --batch-size 60 --out $out/generated/scale1

step "generate with guidance" $out/generated/scale2 \
    rae-xla generate --model $out/t2i --prompts $out/prompts/all.txt --num-samples 1 --cfg-scale 2 \
    "${sampling[@]}" --batch-size 60 --out $out/generated/scale2

step "generate with more guidance" $out/generated/scale3 \
    rae-xla generate --model $out/t2i --prompts $out/prompts/few.txt --num-samples 2 --cfg-scale 3 \
    "${sampling[@]}" --batch-size 60 --out $out/generated/scale3

step "train the judge" $out/judge.pt \
    python scripts/quickstart_t2i/emoji_judge.py train --images $out/images --out $out/judge.pt \
    "${judge_steps[@]}"

step "evaluate the results" $out/judge.json \
    python scripts/quickstart_t2i/emoji_judge.py judge --results $out --out $out/judge.json

step "write the report" $out/report.html \
    python scripts/quickstart_t2i/emoji_report.py --results $out

printf '\n%s\n\nAll steps together: %s. The report: %s\n' \
    "$(<$out/judge.txt)" "$(sum_of_times)" "$PWD/$out/report.html"
