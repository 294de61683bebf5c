#!/usr/bin/env bash
# CartPole by one process and by two that train as one (detail A2): 500,000 steps, 5 seeds.
# bash benchmark/ppo_processes.sh [options of benchmark/run.py, as --workers 2]
set -euo pipefail
cd "$(dirname "$0")/.."
python benchmark/run.py --command "python ppo.py" --env-ids CartPole-v1 --num-seeds 5 "$@"
python benchmark/run.py --command "python ppo.py --exp-name ppo_2_processes" --processes 2 \
    --env-ids CartPole-v1 --num-seeds 5 "$@"
python benchmark/report.py runs/CartPole-v1__ppo__[1-5]__* runs/CartPole-v1__ppo_2_processes__* \
    --save benchmark/results/ppo_processes
