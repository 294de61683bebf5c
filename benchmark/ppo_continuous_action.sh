#!/usr/bin/env bash
# MuJoCo: 1,000,000 steps, 3 seeds.
# bash benchmark/ppo_continuous_action.sh [options of benchmark/run.py, as --workers 2 or --slurm --gpus 1]
set -euo pipefail
cd "$(dirname "$0")/.."
python benchmark/run.py --command "python ppo_continuous_action.py" \
    --env-ids Hopper-v4 Walker2d-v4 HalfCheetah-v4 --num-seeds 3 --save benchmark/results/ppo_continuous_action "$@"
