#!/usr/bin/env bash
# Procgen, easy levels: 25,000,000 steps, 3 seeds; a GPU, or weeks.
# bash benchmark/ppo_procgen.sh [options of benchmark/run.py, as --workers 2 or --slurm --gpus 1]
set -euo pipefail
cd "$(dirname "$0")/.."
python benchmark/run.py --command "python ppo_procgen.py" \
    --env-ids starpilot bossfight bigfish --num-seeds 3 --save benchmark/results/ppo_procgen "$@"
