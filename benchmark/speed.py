"""Steps per second of a script beside Stable-Baselines3's PPO with the same hyperparameters.

    pip install -e ".[atari,mujoco,envpool,microrts,benchmark]"
    python benchmark/speed.py                          # ppo.py on CartPole-v1, 5 runs of each
    python benchmark/speed.py --script ppo_continuous_action --save halfcheetah.json
    python benchmark/speed.py --script ppo_atari --repeats 3
    python benchmark/speed.py --script ppo_atari_envpool --repeats 3
    python benchmark/speed.py --script ppo_multidiscrete_mask

The contestants train on one machine and one environment. They take turns, each run in a process of
its own, because shared machines change their speed from minute to minute: only the ratio of medians
means something. All log to TensorBoard and compute on the same number of threads, one for MLPs.
Stable-Baselines3 normalises (VecNormalize) and preprocesses (its Atari wrappers) where the script
does. The first iteration is left out of the measurement, and with it the start of the program and
the time to compile.

The last two have environments of special engines. They are measured beside the script that they
vary, ppo_atari.py on Breakout and ppo_multidiscrete.py, and the environments of both also alone,
with random actions: the environments' share of a training step is the ratio of the two speeds, the
rest is the network's.
"""

import datetime
import importlib.metadata
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import common
import gymnasium as gym
import tyro
from common import ROOT, check_writable, describe_machine, find_commit, refuse
from tqdm import tqdm

# Environment steps of one run, about a minute or less
STEPS = {
    "ppo": 100_000,
    "ppo_continuous_action": 40_960,
    "ppo_atari": 8_192,
    "ppo_atari_envpool": 8_192,
    "ppo_multidiscrete_mask": 65_536,
}

# The scripts that are measured beside another one, for want of an equal in Stable-Baselines3
BESIDE = {
    "ppo_atari_envpool": "ppo_atari",
    "ppo_multidiscrete_mask": "ppo_multidiscrete",
}

# How the names of contestants end
COMPILED = " --compile"
ALONE = ", environments alone"


@dataclass
class Args:
    script: Literal[tuple(STEPS)] = "ppo"
    """the script to measure"""
    env_id: str | None = None
    """environment that all train on; the script's default if not given"""
    steps: int | None = None
    """environment steps of one run"""
    repeats: int = 5
    """runs of each contestant"""
    save: Path | None = None
    """file to write the measurements to, as JSON"""
    run: str | None = None
    """only run this contestant, once, and print its steps/s (the child processes use it)"""

    def __post_init__(self):
        if self.repeats < 1:
            refuse(f"--repeats {self.repeats}: must be at least 1")
        if self.run is not None and self.run not in list_contestants(self):
            refuse(f"--run {self.run}: is none of {', '.join(list_contestants(self))}")


def list_contestants(args: Args) -> list[str]:
    """-> the names of all, the one that the others are compared with first."""
    ours = f"{args.script}.py"
    if args.script not in BESIDE:
        return ["stable-baselines3", ours, ours + COMPILED]

    other = f"{BESIDE[args.script]}.py"
    return [other, ours, ours + COMPILED, other + ALONE, ours + ALONE]


def load_script(args: Args, name: str) -> tuple[ModuleType, Any]:
    """-> the script of that name, and its Args for one run."""
    script = common.load_script(ROOT / f"{name}.py")
    steps = STEPS[args.script] if args.steps is None else args.steps
    script_args = script.Args(total_timesteps=steps, cuda=False)

    if args.env_id is not None:
        script_args = replace(script_args, env_id=args.env_id)
    elif args.script == "ppo_atari_envpool":  # a name that both scripts know
        script_args = replace(script_args, env_id="BreakoutNoFrameskip-v4")
    return script, script_args


def check_args(args: Args) -> None:
    """Refuses what would fail when some of the runs are measured already."""
    for name in {args.script, BESIDE.get(args.script, args.script)}:
        script = common.load_script(ROOT / f"{name}.py")
        needed = 2 * script.Args().batch_size  # the first iteration is left out
        if args.steps is not None and args.steps < needed:
            refuse(f"--steps {args.steps}: must be at least two rollouts of {name}.py, {needed}")

        _, script_args = load_script(args, name)
        script.make_envs(replace(script_args, num_envs=1, num_minibatches=1)).close()
    if args.save is not None:
        check_writable(args.save, "--save")


def measure_script(args: Args, name: str, compiled: bool) -> float:
    """-> steps/s of a training by the script of that name, from its TensorBoard events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    script, script_args = load_script(args, name)
    script.main(replace(script_args, compile=compiled))

    (run_dir,) = Path("runs").iterdir()
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    iterations = events.Scalars("charts/SPS")
    first = iterations[0]
    last = iterations[-1]
    return (last.step - first.step) / (last.wall_time - first.wall_time)


def measure_environments(args: Args, name: str) -> float:
    """-> steps/s of the environments of the script of that name, with random actions."""
    script, script_args = load_script(args, name)
    envs = script.make_envs(script_args)
    envs.reset(seed=list(range(envs.num_envs)))

    space = gym.vector.utils.batch_space(envs.single_action_space, envs.num_envs)
    space.seed(0)
    num_steps = script_args.total_timesteps // envs.num_envs
    actions = [space.sample() for _ in range(num_steps)]

    # The second time counts: Java starts slowly
    for _ in range(2):
        start_time = time.time()
        for action in actions:
            envs.step(action)
        seconds = time.time() - start_time
    return num_steps * envs.num_envs / seconds


def measure_stable_baselines3(speed_args: Args) -> float:
    """-> steps/s of a training by Stable-Baselines3's PPO, with the script's defaults."""
    _, args = load_script(speed_args, speed_args.script)
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

    class Clock(BaseCallback):
        """Notes when rollouts begin, and at which step."""

        def _init_callback(self):
            self.start_times = []
            self.start_steps = []

        def _on_rollout_start(self):
            self.start_times.append(time.time())
            self.start_steps.append(self.num_timesteps)

        def _on_step(self):
            return True  # go on

    # Environments and network as the script has them
    if speed_args.script == "ppo_atari":
        policy = "CnnPolicy"
        envs = make_atari_env(args.env_id, n_envs=args.num_envs, seed=args.seed)
        envs = VecFrameStack(envs, 4)
    else:
        policy = "MlpPolicy"
        torch.set_num_threads(1)
        envs = make_vec_env(args.env_id, n_envs=args.num_envs, seed=args.seed)
    if speed_args.script == "ppo_continuous_action":
        envs = VecNormalize(envs, gamma=args.gamma)

    agent = PPO(
        policy,
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
    )
    clock = Clock()
    total_steps = args.num_iterations * args.batch_size
    agent.learn(total_steps, callback=clock)

    # From the start of the second rollout on
    seconds = time.time() - clock.start_times[1]
    return (total_steps - clock.start_steps[1]) / seconds


def measure(args: Args, contestant: str) -> float:
    """-> steps/s of one run of that contestant."""
    if contestant == "stable-baselines3":
        return measure_stable_baselines3(args)

    name = contestant.split(".py")[0]
    if contestant.endswith(ALONE):
        return measure_environments(args, name)
    return measure_script(args, name, compiled=contestant.endswith(COMPILED))


def measure_in_child(contestant: str) -> float:
    """-> steps/s of one run of that contestant, in a process and a folder of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--run", contestant]
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if child.returncode != 0:
        sys.exit(child.stderr)
    return float(child.stdout.split()[-1])


def compute_ratio(medians: dict[str, float]) -> dict[str, float]:
    """medians: {contestant: steps/s} -> {contestant: how many times as fast as the first one}.

    Environments alone are compared with environments alone.
    """
    first = next(iter(medians))
    ratio = {}
    for contestant, median in medians.items():
        reference = first + ALONE if contestant.endswith(ALONE) else first
        ratio[contestant] = median / medians[reference]
    return ratio


def compute_shares(medians: dict[str, float]) -> dict[str, float]:
    """medians: {contestant: steps/s} -> {contestant: the environments' part of a step, 0 to 1}.

    Only of those whose environments are measured alone.
    """
    shares = {}
    for contestant, median in medians.items():
        if contestant + ALONE in medians:
            shares[contestant] = median / medians[contestant + ALONE]
    return shares


def save_record(
    args: Args,
    measured: dict[str, list[float]],
    ratio: dict[str, float],
    shares: dict[str, float],
) -> None:
    """Writes the measurements, and how they came about, into the file args.save."""
    _, script_args = load_script(args, args.script)
    sb3_version = importlib.metadata.version("stable-baselines3")
    steps_per_second = {}
    for name, speeds in measured.items():
        steps_per_second[name] = [round(speed) for speed in speeds]

    record = {
        "command": shlex.join(["python", "benchmark/speed.py", *sys.argv[1:]]),
        "commit": find_commit(),
        "date": datetime.date.today().isoformat(),
        "machine": f"{describe_machine()}, SB3 {sb3_version}",
        "env_id": script_args.env_id,
        "steps": script_args.total_timesteps,
        "steps_per_second": steps_per_second,
        "ratio": {name: round(value, 2) for name, value in ratio.items()},
    }
    if shares:
        record["share_of_environments"] = {name: round(part, 2) for name, part in shares.items()}
    args.save.write_text(json.dumps(record, indent=2) + "\n")


def main(args: Args) -> None:
    """Measures one run of one contestant, or all runs of all."""
    if args.run is not None:
        print(measure(args, args.run))
        return

    check_args(args)

    # All have their turn before any has its next one
    contestants = list_contestants(args)
    turns = contestants * args.repeats
    measured = {contestant: [] for contestant in contestants}
    progress = tqdm(turns, unit=" runs")
    for contestant in progress:
        progress.set_postfix_str(contestant)
        measured[contestant].append(measure_in_child(contestant))

    medians = {name: statistics.median(speeds) for name, speeds in measured.items()}
    ratio = compute_ratio(medians)
    shares = compute_shares(medians)
    for name, speeds in measured.items():
        runs = " ".join(f"{speed:6.0f}" for speed in speeds)
        print(f"{name:42} {runs}   median {medians[name]:6.0f} steps/s, {ratio[name]:.2f} x")
    for name, share in shares.items():
        print(f"{name}: the environments take {share:.0%} of a step, the network the rest")

    if args.save is not None:
        save_record(args, measured, ratio, shares)


if __name__ == "__main__":
    main(tyro.cli(Args))
