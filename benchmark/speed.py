"""Steps per second of ppo.py beside Stable-Baselines3's PPO: one machine, one environment, the same hyperparameters.

    pip install -e ".[benchmark]"
    python benchmark/speed.py                       # CartPole-v1, 5 runs of each
    python benchmark/speed.py --steps 50000 --repeats 3 --save benchmark/results/speed_cartpole.json

The contestants take turns, each run in a process of its own, because shared machines change their speed from minute to
minute: only the ratio of medians means something. All log to TensorBoard and compute on one thread. The first iteration
is left out of the measurement, and with it the start of the program and what `--compile` takes to compile.
"""

import datetime
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

import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
CONTESTANTS = ("stable-baselines3", "ppo.py", "ppo.py --compile")


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # environment that all train on
    steps: int = 100_000  # environment steps of one run
    repeats: int = 5  # runs of each contestant
    save: Path | None = None  # file to write the measurements to, as JSON
    run: str | None = None  # only run this contestant, once, and print its steps/s (the child processes use it)


def ours(env_id: str, steps: int, compile: bool) -> float:
    """-> steps/s of ppo.py, from the times of its TensorBoard events."""
    sys.path.insert(0, str(ROOT))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    import ppo

    ppo.main(ppo.Args(env_id=env_id, total_timesteps=steps, cuda=False, compile=compile))
    events = EventAccumulator(str(next(Path("runs").iterdir())), size_guidance={"scalars": 0}).Reload()
    first, *_, last = events.Scalars("charts/SPS")
    return (last.step - first.step) / (last.wall_time - first.wall_time)


def stable_baselines3(env_id: str, steps: int) -> float:
    """-> steps/s of Stable-Baselines3's PPO with ppo.py's defaults."""
    sys.path.insert(0, str(ROOT))
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    import ppo

    class Clock(BaseCallback):
        def _init_callback(self):
            self.starts = []

        def _on_rollout_start(self):
            self.starts.append((time.time(), self.num_timesteps))

        def _on_step(self):
            return True

    torch.set_num_threads(1)
    args, clock = ppo.Args(env_id=env_id, total_timesteps=steps), Clock()
    PPO(
        "MlpPolicy",
        make_vec_env(env_id, n_envs=args.num_envs, seed=args.seed),
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
    if args.run:
        if args.run == "stable-baselines3":
            print(stable_baselines3(args.env_id, args.steps))
        else:
            print(ours(args.env_id, args.steps, compile=args.run.endswith("--compile")))
        return {}
    measured = {name: [] for name in CONTESTANTS}
    turns = [name for _ in range(args.repeats) for name in CONTESTANTS]
    for name in (bar := tqdm(turns, unit=" runs")):
        bar.set_postfix_str(name)
        command = [sys.executable, __file__, "--run", name, "--env-id", args.env_id, "--steps", str(args.steps)]
        with tempfile.TemporaryDirectory() as folder:
            child = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if child.returncode:
            sys.exit(child.stderr)
        measured[name].append(float(child.stdout.split()[-1]))
    medians = {name: statistics.median(speeds) for name, speeds in measured.items()}
    for name, speeds in measured.items():
        runs = " ".join(f"{speed:6.0f}" for speed in speeds)
        print(
            f"{name:18} {runs}   median {medians[name]:6.0f} steps/s, {medians[name] / medians[CONTESTANTS[0]]:.2f} x"
        )
    if args.save:
        record = {
            "command": shlex.join(["python", "benchmark/speed.py", *sys.argv[1:]]),
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "env_id": args.env_id,
            "steps": args.steps,
            "steps_per_second": {name: [round(speed) for speed in speeds] for name, speeds in measured.items()},
            "ratio": {name: round(medians[name] / medians[CONTESTANTS[0]], 2) for name in CONTESTANTS},
        }
        args.save.write_text(json.dumps(record, indent=2) + "\n")
    return measured


if __name__ == "__main__":
    main(tyro.cli(Args))
