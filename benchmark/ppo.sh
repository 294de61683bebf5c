#!/usr/bin/env bash
# ppo.py on its environments, seeds 1, 2 and 3 at the default 500,000 steps: bash benchmark/ppo.sh [ENV_ID ...]
# Adds to benchmark/results/ppo.txt the date, the machine, and the summary of every run and of its evaluation.
set -euo pipefail
cd "$(dirname "$0")/.."
results=benchmark/results/ppo.txt
for env_id in "${@:-CartPole-v1}"; do
    {
        echo "# bash benchmark/ppo.sh $env_id"
        echo "# $(date --iso-8601), $(grep -m1 'model name' /proc/cpuinfo | cut -d: -f2 | xargs), $(nproc) cores"
    } >>"$results"
    for seed in 1 2 3; do
        echo "python ppo.py --env-id $env_id --seed $seed" >>"$results"
        summary=$(python ppo.py --env-id "$env_id" --seed "$seed")
        echo "    $summary" >>"$results"
        echo "python benchmark/evaluate.py ${summary%%:*} --episodes 100" >>"$results"
        python benchmark/evaluate.py "${summary%%:*}" --episodes 100 | sed -n "1s/^/    /p" >>"$results"
    done
    echo >>"$results"
done
