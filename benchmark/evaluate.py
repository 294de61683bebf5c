"""Plays the agent of a run: the script's own environment and Agent, with the weights of its last checkpoint.

    python benchmark/evaluate.py runs/CartPole-v1__ppo__1__1790000000 --episodes 10
    python benchmark/evaluate.py runs/CartPole-v1__ppo__1__1790000000 --capture-video   # films into RUN_DIR/evaluation

Actions are sampled, as in training, so that the returns compare with training's.
"""

import dataclasses
import importlib
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import numpy as np
import torch
import tyro
from basics import ROOT, refuse
from tqdm import tqdm


@dataclass
class Args:
    run_dir: Annotated[Path, tyro.conf.Positional]  # folder of the run, with its checkpoint.pt
    episodes: int = 10  # episodes to play
    seed: int = 1  # of the environment and the sampled actions
    capture_video: bool = False  # film every episode, into evaluation/ in the run's folder


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
    envs = script.make_envs(
        dataclasses.replace(script.Args(**checkpoint["args"]), num_envs=1, num_minibatches=1),
        args.run_dir / "evaluation" if args.capture_video else None,
    )
    if "envs" in checkpoint:  # the statistics that observations were normalised by
        envs.load_state_dict(checkpoint["envs"])
        envs.frozen = True
    if args.capture_video:
        film_every_episode(envs)
    agent = script.Agent(envs.single_observation_space, envs.single_action_space)
    agent.load_state_dict(checkpoint["agent"])
    memory = [torch.ones(1, dtype=torch.bool), torch.zeros(2, 1, 128)] if hasattr(agent, "lstm") else []
    returns = []
    obs, infos = envs.reset(seed=args.seed)
    masked = "action_mask" in inspect.signature(agent.act).parameters
    with torch.inference_mode(), tqdm(total=args.episodes, unit=" episodes", disable=None) as bar:
        while len(returns) < args.episodes:
            inputs = [torch.from_numpy(infos["action_mask"])] if masked else memory
            action, _, _, *state = agent.act(torch.as_tensor(obs, dtype=torch.float32), *inputs)
            obs, _, terminated, truncated, infos = envs.step(action.numpy())
            memory = [torch.from_numpy(terminated | truncated), *state] if memory else []
            if "episode" in infos.get("final_info", ()):
                returns.append(float(infos["final_info"]["episode"]["r"][0]))
                bar.update()
    envs.close()
    return returns


def film_every_episode(envs: gym.vector.VectorEnv) -> None:
    """RecordVideo films ever fewer episodes of a training; of an evaluation, all are wanted."""
    env = envs.unwrapped
    if isinstance(env, gym.vector.SyncVectorEnv):
        (env,) = env.envs
        while not isinstance(env, gym.wrappers.RecordVideo):
            env = env.env
    env.episode_trigger = lambda episode: True


if __name__ == "__main__":
    cli_args = tyro.cli(Args)
    returns = evaluate(cli_args)
    print(f"{cli_args.run_dir}: mean return {np.mean(returns):.2f}, std {np.std(returns):.2f}, {len(returns)} episodes")
    print("returns:", " ".join(f"{value:g}" for value in returns))
