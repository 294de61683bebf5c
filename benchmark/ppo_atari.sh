#!/usr/bin/env bash
# ppo_atari.py, seed 1, 10,000,000 steps or STEPS: STEPS=750000 bash benchmark/ppo_atari.sh [ENV_ID ...]
# Goes on with a run that is there already. Adds to benchmark/results/ppo_atari.txt the date, the machine, and the summary
# of every run and of its evaluation.
set -euo pipefail
cd "$(dirname "$0")/.."
results=benchmark/results/ppo_atari.txt
steps=${STEPS:-10000000}
for env_id in "${@:-BreakoutNoFrameskip-v4}"; do
    run=$(find runs -maxdepth 1 -name "${env_id}__ppo_atari__1__*" 2>/dev/null | sort | tail -n 1)
    command="python ppo_atari.py --env-id $env_id --seed 1 --total-timesteps $steps"
    summary=$($command ${run:+--resume "$run"})
    {
        echo "# STEPS=$steps bash benchmark/ppo_atari.sh $env_id"
        echo "# $(date --iso-8601), $(grep -m1 'model name' /proc/cpuinfo | cut -d: -f2 | xargs), $(nproc) cores"
        echo "$command"
        echo "    $summary"
        echo "python benchmark/evaluate.py ${summary%%:*} --episodes 20"
        python benchmark/evaluate.py "${summary%%:*}" --episodes 20 | sed -n "1s/^/    /p"
        echo
    } >>"$results"
done
