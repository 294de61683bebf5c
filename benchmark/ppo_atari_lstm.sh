#!/usr/bin/env bash
# Atari, one frame and an LSTM: 10,000,000 steps, 3 seeds; a GPU, or days.
# bash benchmark/ppo_atari_lstm.sh [options of benchmark/run.py, as --workers 2 or --slurm --gpus 1]
set -euo pipefail
cd "$(dirname "$0")/.."
python benchmark/run.py --command "python ppo_atari_lstm.py" \
    --env-ids PongNoFrameskip-v4 BeamRiderNoFrameskip-v4 BreakoutNoFrameskip-v4 --num-seeds 3 --save benchmark/results/ppo_atari_lstm "$@"
