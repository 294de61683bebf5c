#!/usr/bin/env bash
# MicroRTS with masks: 1,000,000 steps, 3 seeds.
# bash benchmark/ppo_multidiscrete_mask.sh [options of benchmark/run.py, as --workers 2 or --slurm --gpus 1]
set -euo pipefail
cd "$(dirname "$0")/.."
python benchmark/run.py --command "python ppo_multidiscrete_mask.py --total-timesteps 1000000" \
    --env-ids MicrortsMining-v1 MicrortsProduceCombatUnitsShapedReward-v1 MicrortsAttackShapedReward-v1 --num-seeds 3 --save benchmark/results/ppo_multidiscrete_mask "$@"
