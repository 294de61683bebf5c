#!/usr/bin/env bash
# Classic control: 500,000 steps, 5 seeds.
# bash benchmark/ppo.sh [options of benchmark/run.py, as --workers 2 or --slurm --gpus 1]
set -euo pipefail
cd "$(dirname "$0")/.."
python benchmark/run.py --command "python ppo.py" \
    --env-ids CartPole-v1 Acrobot-v1 MountainCar-v0 --num-seeds 5 --save benchmark/results/ppo "$@"
