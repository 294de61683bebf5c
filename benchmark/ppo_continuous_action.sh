#!/usr/bin/env bash
# ppo_continuous_action.py, 1,000,000 steps, seed 1: bash benchmark/ppo_continuous_action.sh [ENV_ID ...]
# Goes on with a run that is there already. Adds to benchmark/results/ppo_continuous_action.txt the date, the machine, and
# the summary of every run and of its evaluation.
set -euo pipefail
cd "$(dirname "$0")/.."
results=benchmark/results/ppo_continuous_action.txt
for env_id in "${@:-HalfCheetah-v4}"; do
    run=$(find runs -maxdepth 1 -name "${env_id}__ppo_continuous_action__1__*" 2>/dev/null | sort | tail -n 1)
    summary=$(python ppo_continuous_action.py --env-id "$env_id" --seed 1 ${run:+--resume "$run"})
    {
        echo "# bash benchmark/ppo_continuous_action.sh $env_id"
        echo "# $(date --iso-8601), $(grep -m1 'model name' /proc/cpuinfo | cut -d: -f2 | xargs), $(nproc) cores"
        echo "python ppo_continuous_action.py --env-id $env_id --seed 1"
        echo "    $summary"
        echo "python benchmark/evaluate.py ${summary%%:*} --episodes 20"
        python benchmark/evaluate.py "${summary%%:*}" --episodes 20 | sed -n "1s/^/    /p"
        echo
    } >>"$results"
done
