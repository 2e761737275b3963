#!/usr/bin/env bash
# RAEv2's ideas, alone and together, on the quickstart's digits: adaLN or in-context conditioning,
# velocity or data prediction, AdamW or Muon, with and without internal guidance. Minutes a run on a CPU.
#
# Config   configs/quickstart/stage2.yaml
# Data     results/quickstart, which bash scripts/quickstart.sh makes: run it first
# Options  SEEDS="0 1 2" for a spread, RUNS="base all" for some of base tokens data muon all, SCALES="1.0 1.5"
# Expect   accuracy, Frechet distance and coverage of every run, with the spread over seeds
# Results  $OUT (results/ablations_raev2): a folder for every run, judge.json and table.md. A second run resumes.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." && . scripts/examples/lib_examples.sh
begin configs/quickstart/stage2.yaml "$@"

head="runtime.backend=torch stage_2.params.base_model_depth=2"
tokens="stage_2.params.conditioning=tokens stage_2.params.use_qknorm=true stage_2.params.use_pos_embed=false"
data="transport.params.prediction=x sampler.params.end=0"
muon="training.optimizer.type=muon training.scheduler.base_lr=2e-3 training.optimizer.adamw_lr=6e-3"
declare -A runs=([base]="$head" [tokens]="$head $tokens" [data]="$head $data" [muon]="$head $muon"
    [all]="$head $tokens $data $muon")

generated=()
for seed in ${SEEDS:-0}; do
    for name in ${RUNS:-base tokens data muon all}; do
        run=$out/$name-$seed
        read -ra options <<<"${runs[$name]}"
        options+=("${settings[@]}" "training.global_seed=$seed")
        rae-xla train stage2 --config "$config" --results-dir "$run" "${options[@]}"
        for scale in ${SCALES:-1.0 1.5}; do # equally many evaluations of the model
            samples=$run/scale-$scale
            [[ -e $samples/samples.npz ]] || rae-xla sample --config "$config" --ckpt "$run" --out "$samples" \
                --num-samples "${COUNT:-360}" --batch-size 360 --seed "$seed" "${options[@]}" \
                guidance.method=internal "guidance.scale=$scale" guidance.t_min=0.1
            generated+=(--generated "$name, internal $scale; seed $seed=$samples/samples.npz")
        done
    done
done
$smoke || python scripts/quickstart/judge.py --images results/quickstart/images \
    --reconstructed results/quickstart/reconstructed "${generated[@]}" --out "$out/judge.json"
$smoke || python scripts/examples/seed_table.py "$out/judge.json" | tee "$out/table.md"
