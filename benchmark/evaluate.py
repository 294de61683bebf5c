"""Plays the agent of a run: its script's environment and Agent, the weights of its last checkpoint.

    python benchmark/evaluate.py runs/CartPole-v1__ppo__1__1790000000 --episodes 10
    python benchmark/evaluate.py runs/CartPole-v1__ppo__1__1790000000 --capture-video

Films go into evaluation/ in the run's folder. Actions are sampled, as in training, so that the
returns compare with training's.
"""

import importlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated

import gymnasium as gym
import numpy as np
import torch
import tyro
from common import ROOT, refuse
from torch import nn
from tqdm import tqdm


@dataclass
class Args:
    run_dir: Annotated[Path, tyro.conf.Positional]
    """folder of the run, with its checkpoint.pt"""
    episodes: int = 10
    """episodes to play"""
    seed: int = 1
    """seed of the environment and the sampled actions"""
    capture_video: bool = False
    """film every episode, into evaluation/ in the run's folder"""


def import_script(run_dir: Path) -> ModuleType:
    """-> the script that made the run, by the name in its checkpoint; refuses what is no run."""
    try:
        path = run_dir / "checkpoint.pt"
        name = torch.load(path, map_location="cpu", weights_only=True)["script"]
    except Exception as error:  # torch.load raises many kinds
        reason = f"{type(error).__name__}: {str(error)[:99]}"
        refuse(f"{run_dir}: no checkpoint to evaluate, {reason}")
    if not (ROOT / f"{name}.py").is_file():
        refuse(f"{run_dir}: made by {name}.py, which is not in {ROOT}")

    sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


def make_env_of_run(
    script: ModuleType, checkpoint: dict, video_dir: Path | None
) -> gym.vector.VectorEnv:
    """-> the environment that the run was trained on, once, every episode filmed if asked to."""
    script_args = script.Args(**checkpoint["args"])
    script_args = replace(script_args, num_envs=1, num_minibatches=1)
    envs = script.make_envs(script_args, video_dir)

    # The statistics that observations and rewards were normalised by
    if "envs" in checkpoint:
        envs.load_state_dict(checkpoint["envs"])
        envs.frozen = True

    if video_dir is not None:
        film_every_episode(envs)
    return envs


def film_every_episode(envs: gym.vector.VectorEnv) -> None:
    """Has all episodes filmed; of a training, ever fewer are."""
    env = envs.unwrapped
    if isinstance(env, gym.vector.SyncVectorEnv):
        (env,) = env.envs
        while not isinstance(env, gym.wrappers.RecordVideo):
            env = env.env
    env.episode_trigger = lambda episode: True


def act(
    agent: nn.Module,
    obs: np.ndarray,
    infos: dict,
    starts: np.ndarray,
    state: torch.Tensor | None,
) -> tuple[np.ndarray, torch.Tensor | None]:
    """One step of one environment -> sampled action [1, ...], the agent's state afterwards.

    obs [1, ...] and infos: what the environment said last. starts [1], bool: an episode begins
    with this observation. state: the agent's memory, None for one that has none.
    """
    obs = torch.as_tensor(obs, dtype=torch.float32)

    # The one difference between the scripts' agents: what they take
    if agent.inputs == ("obs", "starts", "state"):
        action, _, _, state = agent.act(obs, torch.from_numpy(starts), state)
    elif agent.inputs == ("obs", "action_mask"):
        action, _, _ = agent.act(obs, torch.from_numpy(infos["action_mask"]))
    else:
        action, _, _ = agent.act(obs)
    return action.numpy(), state


def evaluate(args: Args) -> list[float]:
    """-> the return of every episode, undiscounted and raw."""
    if args.episodes < 1:
        refuse(f"--episodes {args.episodes}: must be at least 1")
    script = import_script(args.run_dir)
    checkpoint = script.load_checkpoint(args.run_dir)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)

    # The environment and the agent, as the run left them
    video_dir = args.run_dir / "evaluation" if args.capture_video else None
    envs = make_env_of_run(script, checkpoint, video_dir)
    agent = script.Agent(envs.single_observation_space, envs.single_action_space)
    agent.load_state_dict(checkpoint["agent"])

    returns = []
    obs, infos = envs.reset(seed=args.seed)
    starts = np.ones(1, bool)
    state = agent.initial_state(1) if "state" in agent.inputs else None
    progress = tqdm(total=args.episodes, unit=" episodes", disable=None)
    with torch.inference_mode(), progress:
        while len(returns) < args.episodes:
            action, state = act(agent, obs, infos, starts, state)
            obs, _, terminated, truncated, infos = envs.step(action)
            starts = terminated | truncated

            # An episode has ended: not for the learner only, such as by a lost life in Atari
            if "final_info" in infos and "episode" in infos["final_info"]:
                returns.append(float(infos["final_info"]["episode"]["r"][0]))
                progress.update()
    envs.close()
    return returns


def main(args: Args) -> None:
    """Prints the mean and the standard deviation of the returns, and all of them."""
    returns = evaluate(args)
    mean = np.mean(returns)
    std = np.std(returns)
    print(f"{args.run_dir}: mean return {mean:.2f}, std {std:.2f}, {len(returns)} episodes")

    words = [f"{value:g}" for value in returns]
    print("returns:", " ".join(words))


if __name__ == "__main__":
    main(tyro.cli(Args))
