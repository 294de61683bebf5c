"""Steps per second of a script beside Stable-Baselines3's PPO: one machine, one environment, the same hyperparameters.

    pip install -e ".[all]"
    python benchmark/speed.py                       # ppo.py on CartPole-v1, 5 runs of each
    python benchmark/speed.py --script ppo_continuous_action --save benchmark/results/speed_halfcheetah.json
    python benchmark/speed.py --script ppo_atari --repeats 3

The contestants take turns, each run in a process of its own, because shared machines change their speed from minute to
minute: only the ratio of medians means something. All log to TensorBoard and compute on the same number of threads, one
for MLPs. Stable-Baselines3 normalises (VecNormalize) and preprocesses (its Atari wrappers) where the script does. The
first iteration is left out of the measurement, and with it the start of the program and the time to compile.
"""

import datetime
import importlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
STEPS = {"ppo": 100_000, "ppo_continuous_action": 40_960, "ppo_atari": 8_192}  # of one run, about a minute or less


@dataclass
class Args:
    script: Literal["ppo", "ppo_continuous_action", "ppo_atari"] = "ppo"  # the script to measure
    env_id: str | None = None  # environment that all train on; the script's default if not given
    steps: int | None = None  # environment steps of one run
    repeats: int = 5  # runs of each contestant
    save: Path | None = None  # file to write the measurements to, as JSON
    run: str | None = None  # only run this contestant, once, and print its steps/s (the child processes use it)


def arguments(args: Args, **changes):
    """-> the script's module, and its arguments for one run."""
    sys.path.insert(0, str(ROOT))
    script = importlib.import_module(args.script)
    changes |= {"env_id": args.env_id} if args.env_id else {}
    return script, script.Args(total_timesteps=args.steps or STEPS[args.script], cuda=False, **changes)


def ours(args: Args, compile: bool) -> float:
    """-> steps/s of the script, from the times of its TensorBoard events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    script, script_args = arguments(args, compile=compile)
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


def machine() -> str:
    """-> processor, its cores, system and versions, in one line."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    import stable_baselines3
    import torch

    versions = f"Python {platform.python_version()}, torch {torch.__version__}, SB3 {stable_baselines3.__version__}"
    return f"{names[0].split(': ')[1] if names else platform.processor()}, {os.cpu_count()} cores, {versions}"


def main(args: Args) -> dict[str, list[float]]:
    """-> {contestant: steps/s of each run}."""
    contestants = ("stable-baselines3", f"{args.script}.py", f"{args.script}.py --compile")
    if args.run:
        sb3 = args.run == contestants[0]
        print(stable_baselines3(args) if sb3 else ours(args, compile=args.run.endswith("--compile")))
        return {}
    measured = {name: [] for name in contestants}
    turns = [name for _ in range(args.repeats) for name in contestants]
    for name in (bar := tqdm(turns, unit=" runs")):
        bar.set_postfix_str(name)
        command = [sys.executable, __file__, *sys.argv[1:], "--run", name]
        with tempfile.TemporaryDirectory() as folder:
            child = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if child.returncode:
            sys.exit(child.stderr)
        measured[name].append(float(child.stdout.split()[-1]))
    medians = {name: statistics.median(speeds) for name, speeds in measured.items()}
    for name, speeds in measured.items():
        runs = " ".join(f"{speed:6.0f}" for speed in speeds)
        ratio = medians[name] / medians[contestants[0]]
        print(f"{name:35} {runs}   median {medians[name]:6.0f} steps/s, {ratio:.2f} x")
    if args.save:
        record = {
            "command": shlex.join(["python", "benchmark/speed.py", *sys.argv[1:]]),
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "env_id": arguments(args)[1].env_id,
            "steps": arguments(args)[1].total_timesteps,
            "steps_per_second": {name: [round(speed) for speed in speeds] for name, speeds in measured.items()},
            "ratio": {name: round(medians[name] / medians[contestants[0]], 2) for name in contestants},
        }
        args.save.write_text(json.dumps(record, indent=2) + "\n")
    return measured


if __name__ == "__main__":
    main(tyro.cli(Args))
