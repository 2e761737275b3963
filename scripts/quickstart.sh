#!/usr/bin/env bash
# From real handwritten digits to generated ones, through every stage of the system, in some minutes:
# SPMD over 4 virtual XLA devices of this machine's CPU, as over the chips of a TPU slice.
# The results are a page, results/quickstart/report.html, and a table.
#
# A second run resumes where the first one stopped. Delete the result of a step to repeat from there, or
# results/quickstart to start over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash install_spmd.sh
# shellcheck source=/dev/null
source .venv/bin/activate
. scripts/quickstart/lib_steps.sh

out=results/quickstart
configs=configs/quickstart
# Without torch_xla, as on a CUDA machine, the same steps run on plain torch.
settings=()
python -c 'import torch_xla' 2>/dev/null || settings=(runtime.backend=torch)

begin_steps $out
printf '\nThirteen steps: 6 to 17 minutes on two cores, two thirds of the time for training stage 2.\n'

step "write real digits as images" $out/images \
    python scripts/quickstart/digits.py --out $out/images

step "make training shards" $out/shards/train \
    rae-xla shards make $out/images/train $out/shards/train

step "make test shards" $out/shards/test \
    rae-xla shards make $out/images/test $out/shards/test

step "pretrain the encoder" $out/encoder \
    python scripts/quickstart/pretrain_encoder.py --images $out/images --out $out/encoder

step "train stage 1, the decoder" $out/stage1 \
    rae-xla train stage1 --config $configs/stage1.yaml --results-dir $out/stage1 "${settings[@]}"

step "export the decoder" $out/decoder.pt \
    rae-xla checkpoints export $out/stage1 --what decoder --out $out/decoder.pt

step "measure latent statistics" $out/stat.pt \
    rae-xla stats --config $configs/stage2.yaml --out $out/stat.pt "${settings[@]}"

step "reconstruct the test digits" $out/reconstructed \
    rae-xla reconstruct --config $configs/stage2.yaml --batch-size 360 \
    --input $out/images/test --out $out/reconstructed "${settings[@]}"

step "train stage 2, the diffusion transformer" $out/stage2 \
    rae-xla train stage2 --config $configs/stage2.yaml --results-dir $out/stage2 "${settings[@]}"

step "sample without guidance" $out/samples/plain \
    rae-xla sample --config $configs/sample.yaml --ckpt $out/stage2 --num-samples 360 \
    --batch-size 360 --out $out/samples/plain guidance.scale=1 "${settings[@]}"

step "sample with guidance" $out/samples/guided \
    rae-xla sample --config $configs/sample.yaml --ckpt $out/stage2 --num-samples 360 \
    --batch-size 360 --out $out/samples/guided "${settings[@]}"

step "evaluate the results" $out/judge.json \
    python scripts/quickstart/judge.py --images $out/images --reconstructed $out/reconstructed \
    --generated "generated, no guidance=$out/samples/plain/samples.npz" \
    --generated "generated, guided=$out/samples/guided/samples.npz" --out $out/judge.json

step "write the report" $out/report.html \
    python scripts/quickstart/report.py --results $out

printf '\n%s\n\nAll steps together: %s. The report: %s\n' \
    "$(<$out/judge.txt)" "$(sum_of_times)" "$PWD/$out/report.html"
