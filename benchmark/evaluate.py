"""Plays the agent of a run: its script's environments, the weights of its last checkpoint.

    python benchmark/evaluate.py runs/CartPole-v1__ppo__1__1790000000 --episodes 100 --num-envs 8
    python benchmark/evaluate.py runs/CartPole-v1__ppo__1__1790000000 --greedy --capture-video
    python benchmark/evaluate.py runs/CartPole-v1__mine__1__1790000000 --script mine.py

Actions are sampled, as in training, so that the returns compare with training's; --greedy takes the
most likely action instead, or the mean of the Gaussian. The statistics by which a script normalises
are those of the checkpoint, frozen; who was trained with --amp plays in half precision. Returns are
raw sums of rewards: not scaled, not clipped.

Atari is played by whole games, as the published numbers are: a lost life ends no episode here, and
rewards are not clipped. The wrappers are those of training, with random no-ops at the start, and
FIRE where a game needs it to go on after a lost life.

Which episodes count is decided beforehand: of N environments, environment k mod N plays episode k.
Had the first episodes that end been taken, the short ones would be too many.

A line for each evaluation is added to evaluation.csv in the run's folder, films go into evaluation/
there.
"""

import datetime
import shutil
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import common
import gymnasium as gym
import numpy as np
import pandas as pd
import torch
import tyro
from scipy import stats
from torch import nn
from tqdm import tqdm


@dataclass
class Args:
    run_dir: Annotated[Path, tyro.conf.Positional]
    """folder of the run, with its checkpoint.pt"""
    episodes: int = 10
    """episodes to play"""
    num_envs: int = 1
    """environments at a time"""
    seed: int = 1
    """seed of the environments and the sampled actions"""
    greedy: bool = False
    """take the most likely action, or the mean of the Gaussian, instead of a sampled one"""
    script: Path | None = None
    """the file that made the run, if it is none of the eight scripts"""
    capture_video: bool = False
    """film the episodes, one environment at a time, into evaluation/ in the run's folder"""
    capture_video_of: Literal["all", "best-and-median"] = "all"
    """film all episodes, or keep best.mp4 and median.mp4 only"""

    def __post_init__(self):
        self.check("episodes", 1, 10**9)
        self.check("num_envs", 1, 10**5)
        self.check("seed", 0, 2**31)
        if self.capture_video_of != "all":
            self.capture_video = True
        if self.capture_video and self.num_envs > 1:
            common.refuse(
                f"--num-envs {self.num_envs}: only one environment at a time can be filmed"
            )

    def check(self, name: str, low: int, high: int) -> None:
        """Refuses an argument that is not a number from low to high."""
        value = getattr(self, name)
        if not low <= value <= high:
            common.refuse(
                f"--{name.replace('_', '-')} {value}: must be a number from {low} to {high}"
            )


def load_run(args: Args) -> tuple[ModuleType, dict]:
    """-> the script that made the run, and the run's checkpoint; refuses what is no run."""
    try:
        name = common.read_checkpoint(args.run_dir)["script"]
        path = common.find_script(name) if args.script is None else args.script
        script = common.load_script(path)
    except ValueError as error:
        common.refuse(f"{args.run_dir}: {error}")
    return script, script.load_checkpoint(args.run_dir)


def make_envs_of_run(
    script: ModuleType, checkpoint: dict, num_envs: int, video_dir: Path | None
) -> gym.vector.VectorEnv:
    """-> so many of the environments that the run was trained on, the first one filmed if asked."""
    script_args = script.Args(**checkpoint["args"])
    script_args = replace(
        script_args,
        num_envs=num_envs,
        num_minibatches=1,
        total_timesteps=num_envs * script_args.num_steps,  # a rollout, which Args asks for
    )
    envs = script.make_envs(script_args, video_dir)

    # The statistics that observations and rewards were normalised by
    if "envs" in checkpoint:
        envs.load_state_dict(checkpoint["envs"])
        envs.frozen = True
    return envs


def film_episodes(envs: gym.vector.VectorEnv, episodes: int) -> None:
    """Has so many episodes filmed, and not the one that begins after them.

    Of a training, ever fewer are.
    """
    env = envs.unwrapped
    if isinstance(env, gym.vector.SyncVectorEnv):
        env = env.envs[0]
        while not isinstance(env, gym.wrappers.RecordVideo):
            env = env.env
    env.episode_trigger = lambda episode: episode < episodes


def find_most_likely(distribution: Any) -> torch.Tensor:
    """-> the most likely action of each row, [N] or [N, A]; the mean of a Gaussian."""
    match distribution:
        case torch.distributions.Distribution():  # in a copy of a script
            return distribution.mode
        case object(components=components):  # several choices
            return torch.stack([component.logprobs.argmax(-1) for component in components], -1)
        case object(mean=mean):
            return mean
        case object(logprobs=logprobs):
            return logprobs.argmax(-1)
    common.refuse(f"--greedy: the most likely action of {type(distribution).__name__} is not known")


def act(agent: nn.Module, inputs: dict, greedy: bool) -> tuple[np.ndarray, torch.Tensor | None]:
    """One step of N environments -> action [N, ...], the agent's state afterwards.

    inputs: what an agent can take, by its name, see play; an agent's `inputs` are those it takes.
    """
    taken = [inputs[name] for name in agent.inputs]
    if greedy:
        distribution, _, *state = agent(*taken)
        action = find_most_likely(distribution)
    else:
        action, _, _, *state = agent.act(*taken)
    return action.numpy(), state[0] if state else None


def make_seeds(seed: int, num_envs: int) -> list[int]:
    """-> a seed for each environment, far apart: those of seed 1 are not those of seed 2."""
    others = np.random.SeedSequence(seed).generate_state(num_envs - 1)
    return [seed, *others.tolist()]


def play(
    agent: nn.Module, envs: gym.vector.VectorEnv, args: Args, bar: tqdm
) -> tuple[np.ndarray, int]:
    """-> the return of every episode, undiscounted and raw, and the steps that it took."""
    num_envs = envs.num_envs
    returns = np.full(args.episodes, np.nan)
    next_episode = np.arange(num_envs)  # of each environment; of N, environment k mod N plays k
    steps = 0

    obs, infos = envs.reset(seed=make_seeds(args.seed, num_envs))
    starts = np.ones(num_envs, bool)
    state = agent.initial_state(num_envs) if "state" in agent.inputs else None

    while np.isnan(returns).any():
        inputs = {
            "obs": torch.as_tensor(obs, dtype=torch.float32),
            "starts": torch.from_numpy(starts),  # an episode begins with this observation
            "state": state,  # the agent's memory
        }
        if "action_mask" in agent.inputs:
            inputs["action_mask"] = torch.from_numpy(infos["action_mask"])
        action, state = act(agent, inputs, args.greedy)
        obs, _, terminated, truncated, infos = envs.step(action)
        starts = terminated | truncated
        steps += num_envs
        bar.set_postfix_str(f"{steps / (time.time() - bar.start_t):.0f} steps/s", refresh=False)

        # An episode has ended: not for the learner only, such as by a lost life in Atari
        if "final_info" not in infos or "episode" not in infos["final_info"]:
            continue
        ended = infos["final_info"]
        for i in np.flatnonzero(ended["_episode"]):
            if next_episode[i] < args.episodes:
                returns[next_episode[i]] = ended["episode"]["r"][i]
                bar.update()
            next_episode[i] += num_envs
    return returns, steps


def keep_best_and_median(films: Path, returns: np.ndarray, video_dir: Path) -> None:
    """Moves two of the films, that of episode k being rl-video-episode-k.mp4, to video_dir."""
    order = returns.argsort(kind="stable")
    chosen = {"best": order[-1], "median": order[(len(order) - 1) // 2]}
    for name, episode in chosen.items():
        film = films / f"rl-video-episode-{episode}.mp4"
        shutil.copyfile(film, video_dir / f"{name}.mp4")


def play_run(args: Args) -> tuple[np.ndarray, int, float, dict]:
    """-> the return of every episode, the steps and the seconds of all, and the checkpoint."""
    script, checkpoint = load_run(args)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)

    # Films, of which some may be left out later. Those of an evaluation before are overwritten.
    warnings.filterwarnings("ignore", ".*Overwriting existing videos")
    video_dir = args.run_dir / "evaluation"
    films = None
    if args.capture_video:
        common.check_writable(video_dir / "best.mp4", "--capture-video")
        films = video_dir
    if args.capture_video_of == "best-and-median":
        films = Path(tempfile.mkdtemp(prefix="films-", dir=video_dir))

    # The environments and the agent, as the run left them
    try:
        envs = make_envs_of_run(script, checkpoint, min(args.num_envs, args.episodes), films)
        agent = script.Agent(envs.single_observation_space, envs.single_action_space)
        agent.load_state_dict(checkpoint["agent"])
        agent.amp = checkpoint["args"].get("amp", False)  # plays in the precision it learned in
        if films is not None:
            film_episodes(envs, args.episodes)

        start_time = time.time()
        bar = tqdm(total=args.episodes, unit=" episodes", disable=None)
        bar.start_t = start_time
        with torch.inference_mode(), bar:
            returns, steps = play(agent, envs, args, bar)
        seconds = time.time() - start_time
        envs.close()

        if args.capture_video_of == "best-and-median":
            keep_best_and_median(films, returns, video_dir)
    finally:
        if args.capture_video_of == "best-and-median":
            shutil.rmtree(films)
    return returns, steps, seconds, checkpoint


def evaluate(args: Args) -> list[float]:
    """-> the return of every episode, undiscounted and raw."""
    returns, _, _, _ = play_run(args)
    return returns.tolist()


def compute_statistics(returns: np.ndarray) -> dict[str, float]:
    """-> mean, std, min, median, max, and low and high of the mean's 95 % bootstrap interval.

    One episode has no interval.
    """
    low, high = np.nan, np.nan
    if len(returns) > 1:
        result = stats.bootstrap(
            (returns,), np.mean, n_resamples=2000, batch=100, method="percentile", rng=0
        )
        low, high = result.confidence_interval
    return {
        "mean": returns.mean(),
        "std": returns.std(),
        "min": returns.min(),
        "median": np.median(returns),
        "max": returns.max(),
        "low": low,
        "high": high,
    }


def main(args: Args) -> None:
    """Prints the statistics of the returns and all of them; adds a line to evaluation.csv."""
    # Before an hour is played that cannot be kept
    try:
        common.read_checkpoint(args.run_dir)
    except ValueError as error:
        common.refuse(f"{args.run_dir}: {error}")
    path = args.run_dir / "evaluation.csv"
    common.check_writable(path, "evaluation.csv:")

    returns, steps, seconds, checkpoint = play_run(args)
    result = compute_statistics(returns)
    line = {
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "trained_steps": common.count_steps(checkpoint),
        "seed": args.seed,
        "episodes": args.episodes,
        "num_envs": args.num_envs,
        "greedy": args.greedy,
        **result,
        "steps": steps,
        "steps_per_second": round(steps / seconds),
        "machine": common.describe_machine(),
        "commit": common.find_commit(),
    }
    is_new = not path.exists()
    table = pd.DataFrame([line])
    table.to_csv(path, mode="a", header=is_new, index=False, float_format="%.6g")

    interval = ""
    if args.episodes > 1:
        interval = f" (95 % interval {result['low']:.2f} to {result['high']:.2f})"
    print(
        f"{args.run_dir}: mean return {result['mean']:.2f}, std {result['std']:.2f}{interval}, "
        f"min {result['min']:g}, median {result['median']:g}, max {result['max']:g}, "
        f"{args.episodes} episodes, {steps / seconds:.0f} steps/s"
    )
    words = [f"{value:g}" for value in returns]
    print("returns:", " ".join(words))


if __name__ == "__main__":
    main(tyro.cli(Args))
