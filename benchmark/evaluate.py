"""Plays the agent of a run: the script's own environment and Agent, with the weights of its last checkpoint.

    python benchmark/evaluate.py runs/CartPole-v1__ppo__1__1790000000 --episodes 10
    python benchmark/evaluate.py runs/CartPole-v1__ppo__1__1790000000 --capture-video   # films into RUN_DIR/evaluation

Actions are sampled, as in training, so that the returns compare with training's.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import numpy as np
import torch
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Args:
    run_dir: Annotated[Path, tyro.conf.Positional]  # folder of the run, with its checkpoint.pt
    episodes: int = 10  # episodes to play
    seed: int = 1  # of the environment and the sampled actions
    capture_video: bool = False  # film every episode, into evaluation/ in the run's folder


def refuse(problem: str):
    """Ends the program over something that its user can mend: one line on stderr, exit code 2 (raises SystemExit)."""
    print(f"evaluate.py: {' '.join(problem.split())}", file=sys.stderr)
    raise SystemExit(2)


def script_of(run_dir: Path):
    """-> the module of the script that made the run, by the name in its checkpoint. Refuses what is no run."""
    try:
        name = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)["script"]
    except Exception as error:  # torch.load raises many kinds
        refuse(f"{run_dir}: no checkpoint to evaluate, {type(error).__name__}: {str(error)[:99]}")
    if not (ROOT / f"{name}.py").is_file():
        refuse(f"{run_dir}: made by {name}.py, which is not in {ROOT}")
    sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


def evaluate(args: Args) -> list[float]:
    """-> the return of every episode, undiscounted and raw."""
    if args.episodes < 1:
        refuse(f"--episodes {args.episodes}: must be at least 1")
    script = script_of(args.run_dir)
    checkpoint = script.load_checkpoint(args.run_dir)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    env = script.make_env(
        script.Args(**checkpoint["args"]), args.run_dir / "evaluation" if args.capture_video else None
    )
    if args.capture_video:
        film_every_episode(env)
    agent = script.Agent(env.observation_space, env.action_space)
    agent.load_state_dict(checkpoint["agent"])
    returns = []
    with torch.inference_mode():
        for episode in tqdm(range(args.episodes), unit=" episodes", disable=None):
            obs, info = env.reset(seed=args.seed if episode == 0 else None)
            while "episode" not in info:
                action, _, _ = agent.act(torch.as_tensor(obs, dtype=torch.float32).unsqueeze(0))
                obs, _, _, _, info = env.step(action.squeeze(0).numpy())
            returns.append(float(info["episode"]["r"]))
    env.close()
    return returns


def film_every_episode(env: gym.Env) -> None:
    """RecordVideo films ever fewer episodes of a training; of an evaluation, all are wanted."""
    while not isinstance(env, gym.wrappers.RecordVideo):
        env = env.env
    env.episode_trigger = lambda episode: True


if __name__ == "__main__":
    cli_args = tyro.cli(Args)
    returns = evaluate(cli_args)
    print(f"{cli_args.run_dir}: mean return {np.mean(returns):.2f}, std {np.std(returns):.2f}, {len(returns)} episodes")
    print("returns:", " ".join(f"{value:g}" for value in returns))
