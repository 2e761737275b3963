#!/usr/bin/env bash
# Check and time everything on a machine with GPUs, in ten minutes: doctor, parity of a tiny model with
# recorded numbers, a save and a resume, one real-size step of each task next to what `rae-xla plan` says,
# and every mode of sampling. It needs no data, no weights and no network.
#
#     bash scripts/first_run_gpu.sh [OUT]
#
# Results  OUT (results/first_run_gpu.json): one file, to attach to an issue. It names the hardware, the
#          versions and the paths that the doctor checks.
# SMOKE=1  tiny models on the CPU, to test this script.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/lib_first_run.sh
first_run gpu "$@"
