#!/usr/bin/env bash
# Atari in EnvPool: 10,000,000 steps, 3 seeds; a GPU, or days. Then Pong, fast.
# bash benchmark/ppo_atari_envpool.sh [options of benchmark/run.py, as --workers 2 or --slurm --gpus 1]
set -euo pipefail
cd "$(dirname "$0")/.."
python benchmark/run.py --command "python ppo_atari_envpool.py" \
    --env-ids Pong-v5 BeamRider-v5 Breakout-v5 --num-seeds 3 --save benchmark/results/ppo_atari_envpool "$@"
fast="--clip-coef=0.2 --num-envs=16 --num-minibatches=8 --num-steps=128 --update-epochs=3"
python benchmark/run.py --command "python ppo_atari_envpool.py $fast" \
    --env-ids Pong-v5 --num-seeds 1 --save benchmark/results/pong_fast "$@"
