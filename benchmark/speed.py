"""Steps per second of a script beside Stable-Baselines3's PPO: one machine, one environment, the same hyperparameters.

    pip install -e ".[all]"
    python benchmark/speed.py                       # ppo.py on CartPole-v1, 5 runs of each
    python benchmark/speed.py --script ppo_continuous_action --save benchmark/results/speed_halfcheetah.json
    python benchmark/speed.py --script ppo_atari --repeats 3
    python benchmark/speed.py --script ppo_atari_envpool --repeats 3     # beside ppo_atari.py, on Breakout
    python benchmark/speed.py --script ppo_multidiscrete_mask            # beside ppo_multidiscrete.py

The contestants take turns, each run in a process of its own, because shared machines change their speed from minute to
minute: only the ratio of medians means something. All log to TensorBoard and compute on the same number of threads, one
for MLPs. Stable-Baselines3 normalises (VecNormalize) and preprocesses (its Atari wrappers) where the script does. The
first iteration is left out of the measurement, and with it the start of the program and the time to compile.

The last two have environments of special engines, which are also measured alone, with random actions: their share of a
training step is the ratio of the two speeds, the rest is the network's.
"""

import datetime
import importlib
import importlib.metadata
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import tyro
from basics import ROOT, commit, machine
from tqdm import tqdm

# environment steps of one run, about a minute or less
STEPS = {"ppo": 100_000, "ppo_continuous_action": 40_960, "ppo_atari": 8_192, "ppo_atari_envpool": 8_192}
STEPS["ppo_multidiscrete_mask"] = 65_536
BESIDE = {"ppo_atari_envpool": "ppo_atari.py", "ppo_multidiscrete_mask": "ppo_multidiscrete.py"}
ALONE = ", environments alone"


@dataclass
class Args:
    script: Literal[tuple(STEPS)] = "ppo"  # the script to measure
    env_id: str | None = None  # environment that all train on; the script's default if not given
    steps: int | None = None  # environment steps of one run
    repeats: int = 5  # runs of each contestant
    save: Path | None = None  # file to write the measurements to, as JSON
    run: str | None = None  # only run this contestant, once, and print its steps/s (the child processes use it)


def contestants(args: Args) -> list[str]:
    """-> the names of all, the one that the others are compared with first."""
    ours = [f"{args.script}.py", f"{args.script}.py --compile"]
    if other := BESIDE.get(args.script):
        return [other, *ours, f"{other}{ALONE}", f"{args.script}.py{ALONE}"]
    return ["stable-baselines3", *ours]


def arguments(args: Args, name: str | None = None, **changes):
    """-> the module of the script, or of the contestant of that name, and its arguments for one run."""
    sys.path.insert(0, str(ROOT))
    script = importlib.import_module(name.partition(".py")[0] if name else args.script)
    if args.env_id or args.script == "ppo_atari_envpool":
        changes["env_id"] = args.env_id or "BreakoutNoFrameskip-v4"
    return script, script.Args(total_timesteps=args.steps or STEPS[args.script], cuda=False, **changes)


def environments_alone(args: Args) -> float:
    """-> steps/s of a script's environments with random actions, the second time through: Java starts slowly."""
    script, script_args = arguments(args, args.run)
    envs = script.make_envs(script_args)
    envs.reset(seed=list(range(envs.num_envs)))
    space = gym.vector.utils.batch_space(envs.single_action_space, envs.num_envs)
    space.seed(0)
    actions = [space.sample() for _ in range(script_args.total_timesteps // envs.num_envs)]
    for _ in range(2):
        start_time = time.time()
        for action in actions:
            envs.step(action)
    return len(actions) * envs.num_envs / (time.time() - start_time)


def ours(args: Args) -> float:
    """-> steps/s of a script, from the times of its TensorBoard events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    script, script_args = arguments(args, args.run, compile=args.run.endswith("--compile"))
    script.main(script_args)
    events = EventAccumulator(str(next(Path("runs").iterdir())), size_guidance={"scalars": 0}).Reload()
    first, *_, last = events.Scalars("charts/SPS")
    return (last.step - first.step) / (last.wall_time - first.wall_time)


def stable_baselines3(speed_args: Args) -> float:
    """-> steps/s of Stable-Baselines3's PPO with the script's defaults."""
    script, args = arguments(speed_args)
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

    class Clock(BaseCallback):
        def _init_callback(self):
            self.starts = []

        def _on_rollout_start(self):
            self.starts.append((time.time(), self.num_timesteps))

        def _on_step(self):
            return True

    if speed_args.script == "ppo_atari":
        envs = VecFrameStack(make_atari_env(args.env_id, n_envs=args.num_envs, seed=args.seed), 4)
    else:
        torch.set_num_threads(1)
        envs = make_vec_env(args.env_id, n_envs=args.num_envs, seed=args.seed)
    if speed_args.script == "ppo_continuous_action":
        envs = VecNormalize(envs, gamma=args.gamma)
    clock = Clock()
    PPO(
        "CnnPolicy" if speed_args.script == "ppo_atari" else "MlpPolicy",
        envs,
        learning_rate=lambda remaining: args.learning_rate * remaining,
        n_steps=args.num_steps,
        batch_size=args.minibatch_size,
        n_epochs=args.update_epochs,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        clip_range=args.clip_coef,
        clip_range_vf=args.clip_coef,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef,
        max_grad_norm=args.max_grad_norm,
        tensorboard_log="runs",
        seed=args.seed,
        device="cpu",
    ).learn(args.num_iterations * args.batch_size, callback=clock)
    (_, _), (start_time, start), *_ = clock.starts  # the second rollout's start
    return (args.num_iterations * args.batch_size - start) / (time.time() - start_time)


def main(args: Args) -> dict[str, list[float]]:
    """-> {contestant: steps/s of each run}."""
    if args.run:
        measure = stable_baselines3 if args.run == "stable-baselines3" else ours
        print((environments_alone if args.run.endswith(ALONE) else measure)(args))
        return {}
    measured = {name: [] for name in contestants(args)}
    turns = [name for _ in range(args.repeats) for name in measured]
    for name in (bar := tqdm(turns, unit=" runs")):
        bar.set_postfix_str(name)
        command = [sys.executable, __file__, *sys.argv[1:], "--run", name]
        with tempfile.TemporaryDirectory() as folder:
            child = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if child.returncode:
            sys.exit(child.stderr)
        measured[name].append(float(child.stdout.split()[-1]))
    medians = {name: statistics.median(speeds) for name, speeds in measured.items()}
    first = next(iter(measured))  # like is compared with like
    ratio = {name: medians[name] / medians[first + ALONE * name.endswith(ALONE)] for name in measured}
    for name, speeds in measured.items():
        runs = " ".join(f"{speed:6.0f}" for speed in speeds)
        print(f"{name:42} {runs}   median {medians[name]:6.0f} steps/s, {ratio[name]:.2f} x")
    share = {name: medians[name] / medians[name + ALONE] for name in measured if name + ALONE in measured}
    for name, part in share.items():
        print(f"{name}: the environments take {part:.0%} of a step, the network the rest")
    if args.save:
        record = {
            "command": shlex.join(["python", "benchmark/speed.py", *sys.argv[1:]]),
            "commit": commit(),
            "date": datetime.date.today().isoformat(),
            "machine": f"{machine()}, SB3 {importlib.metadata.version('stable-baselines3')}",
            "env_id": arguments(args)[1].env_id,
            "steps": arguments(args)[1].total_timesteps,
            "steps_per_second": {name: [round(speed) for speed in speeds] for name, speeds in measured.items()},
            "ratio": {name: round(value, 2) for name, value in ratio.items()},
        }
        if share:
            record["share_of_environments"] = {name: round(part, 2) for name, part in share.items()}
        args.save.write_text(json.dumps(record, indent=2) + "\n")
    return measured


if __name__ == "__main__":
    main(tyro.cli(Args))
