#!/bin/sh
# Runs a recipe on all GPUs of a machine: every training is shared, everything else is done by the first process.
#
#     scripts/run_on_all_gpus.sh recipe.yaml --output-dir ./small [options of hf-compress run]
#
# On a CPU, give the number of processes: PROCESSES=2 scripts/run_on_all_gpus.sh ...
set -e
if [ -n "$PROCESSES" ]; then
    # With --cpu alone, accelerate starts one process.
    config="$(dirname "$0")/accelerate_configs/cpu_ddp.yaml"
    exec accelerate launch --config_file "$config" --num_processes "$PROCESSES" -m hf_compress.cli.main run "$@"
fi
exec accelerate launch --multi_gpu -m hf_compress.cli.main run "$@"
