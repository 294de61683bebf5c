# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[classic-control]==1.4.0",
#     "numpy==2.4.6",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "wandb==0.31.0",
#     "tqdm==4.70.1",
#     "moviepy==2.2.1",
#     "ale-py==0.12.1",
#     "opencv-python-headless==5.0.0.93",
# ]
# ///
"""PPO for Atari games: the last four screens to observe, one button to press.

    python ppo_atari.py --env-id BreakoutNoFrameskip-v4           # pip install -e ".[atari]"
    python ppo_atari.py --env-id PongNoFrameskip-v4 --seed 2 --track --capture-video
    python ppo_atari.py --resume runs/BreakoutNoFrameskip-v4__ppo_atari__1__1790000000

PPO is Schulman et al. (2017), arXiv:1707.06347. `# Detail N` marks details 1-12, 14-22, A1-A3
of Huang et al. (2022), "The 37 Implementation Details of Proximal Policy Optimization";
"baselines" is openai/baselines at commit ea25b9e.

Shapes: N = num_envs, T = num_steps of each environment in one rollout, M = samples in a minibatch,
A = number of actions, B = any number of samples; [] is a scalar tensor.
"""

import argparse
import atexit
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import functools
import io
import os
import random
import shlex
import shutil
import signal
import sys
import threading
import time
import zipfile
import zlib
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, NoReturn, TextIO, get_args

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

try:
    import ale_py
    import cv2
except ImportError as missing:
    cure = 'pip install -e ".[atari]" brings it'
    print(f"{Path(__file__).name}: {missing}; {cure}", file=sys.stderr)
    raise SystemExit(2) from None


def refuse(problem: str) -> NoReturn:
    """Ends the program over something its user can mend: one line on stderr, exit code 2."""
    if os.environ.get("RANK", "0") == "0":  # one of several processes speaks
        say(f"{Path(__file__).name}: {' '.join(problem.split())}", sys.stderr)
    raise SystemExit(2)


def say(line: str, stream: TextIO | None) -> None:
    """Prints a line, or goes on without it: nobody may read the pipe, a disk may be full."""
    if stream is None:
        return
    try:
        print(line, file=stream, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # or Python would fail over it at its end


# What a resumed run cannot change: its weights and its steps rest on these.
FIXED_ON_RESUME = ("env_id", "num_envs", "num_steps")
CHECKPOINT_FORMAT = 2  # changes when what a checkpoint holds does


@dataclass
class Args:
    # The run
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run's name"""
    env_id: Annotated[str, tyro.conf.arg(aliases=["--gym-id"])] = "BreakoutNoFrameskip-v4"
    """the game, an id that ends in NoFrameskip-v4"""
    seed: int = 1
    """seed of the weights, the actions, the minibatches and the environments"""
    total_timesteps: int = 10_000_000
    """environment steps in all, rounded down to whole rollouts"""
    track: bool = False
    """send the run to Weights & Biases (W&B)"""
    wandb_project_name: str = "ppo37"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B team or user; your default one if not given"""
    capture_video: bool = False
    """film episodes of the first environment into videos/ in the run's folder"""
    checkpoint_interval: int = 50
    """iterations from one checkpoint to the next"""
    resume: str | None = None
    """folder of a run to go on with; it keeps its arguments, except those given anew"""

    # The algorithm
    learning_rate: float = 2.5e-4
    """learning rate of Adam"""
    num_envs: int = 8
    """number of environments that step together (N)"""
    num_steps: int = 128
    """steps of each environment in one rollout (T)"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to 0"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    num_minibatches: int = 4
    """number of minibatches in one epoch"""
    update_epochs: int = 4
    """epochs (passes over the rollout) per update"""
    norm_adv: bool = True
    """normalise the advantages of each minibatch"""
    clip_coef: float = 0.1
    """clip range of the probability ratio, and of the value"""
    anneal_clip: bool = False
    """let the clip range fall linearly to 0"""
    clip_vloss: bool = True
    """clip the value loss"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """a gradient with a larger norm is scaled down to this one"""
    target_kl: float | None = None
    """end an update after an epoch whose mean KL divergence is over 1.5 times this"""
    bootstrap_truncated: bool = False
    """at a time limit, add the discounted value of the final observation to the reward"""

    # Speed
    torch_deterministic: bool = True
    """ask PyTorch for deterministic algorithms"""
    cuda: bool = True
    """use the GPU if there is one; a CPU is faster for layers as small as those of an MLP"""
    compile: bool = False
    """compile the gradient step, in the first update; on a CPU it pays for MLPs"""
    amp: bool = False
    """compute the network in bfloat16; for a GPU, or a processor that knows it"""
    async_envs: bool = False
    """step each environment in a process of its own"""

    @property
    def batch_size(self) -> int:
        """Samples of one rollout, T * N."""
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        """Samples of one minibatch, M."""
        return self.batch_size // self.num_minibatches

    @property
    def num_iterations(self) -> int:
        """Rollouts of the whole training, each followed by an update."""
        return self.total_timesteps // self.batch_size

    def __post_init__(self):
        self.check("seed", 0, 2**31)
        self.check("total_timesteps", 1, 1e12)
        self.check("checkpoint_interval", 1, 1e12)
        self.check("learning_rate", 1e-12, 1e12)
        self.check("num_envs", 1, 1e12)
        self.check("num_steps", 1, 1e12)
        self.check("gamma", 0, 1)
        self.check("gae_lambda", 0, 1)
        self.check("num_minibatches", 1, 1e12)
        self.check("update_epochs", 1, 1e12)
        self.check("clip_coef", 1e-12, 1e12)
        self.check("ent_coef", 0, 1e9)
        self.check("vf_coef", 0, 1e9)
        self.check("max_grad_norm", 1e-12, 1e12)
        if self.target_kl is not None:
            self.check("target_kl", 1e-12, 1e12)

        if self.batch_size % self.num_minibatches != 0:
            refuse(
                f"--num-minibatches {self.num_minibatches}: must divide a rollout, "
                f"{self.batch_size} samples"
            )
        if self.compile and shutil.which(os.environ.get("CXX", "g++")) is None:
            refuse("--compile: needs a C++ compiler; install g++, or name yours in CXX")
        if self.num_iterations < 1:
            refuse(
                f"--total-timesteps {self.total_timesteps}: must be at least one rollout, "
                f"{self.batch_size} steps"
            )

    def check(self, name: str, low: float, high: float) -> None:
        """Refuses an argument that is not a number from low to high; NaN is in no range."""
        value = getattr(self, name)
        if not low <= value <= high:
            refuse(f"--{name.replace('_', '-')} {value}: must be a number from {low} to {high}")


class NoopReset(gym.Wrapper):
    """Begins a game with 1 to 30 frames without a button, so that no two games are the same."""

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        for _ in range(self.np_random.integers(1, 31)):
            obs, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                obs, info = self.env.reset()
        return obs, info


class MaxAndSkip(gym.Wrapper):
    """Repeats an action for 4 frames, and adds up their rewards.

    Observes the maximum of the last two screens: some games draw a sprite only every other frame.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.ale = env.unwrapped.ale  # draws the screens that are needed, and no others
        self.screens = np.zeros((2, *self.ale.getScreenRGB().shape), np.uint8)

    def reset(self, **kwargs):
        _, info = self.env.reset(**kwargs)
        return self.ale.getScreenRGB(), info

    def step(self, action):
        total_reward = 0.0
        for frame in range(4):
            _, reward, terminated, truncated, info = self.env.step(action)
            total_reward += reward
            if frame >= 2:
                self.ale.getScreenRGB(self.screens[frame - 2])
            if terminated or truncated:
                break
        screen = np.maximum(self.screens[0], self.screens[1])
        return screen, total_reward, terminated, truncated, info


class EpisodicLife(gym.Wrapper):
    """Ends an episode with each life, so that losing one has its price.

    The game goes on in the next episode.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.game_over = True

    def reset(self, **kwargs):
        if self.game_over:
            obs, info = self.env.reset(**kwargs)
        else:
            obs, _, _, _, info = self.env.step(0)
        self.lives = info["lives"]
        return obs, info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.game_over = terminated or truncated
        life_lost = 0 < info["lives"] < self.lives  # at 0 lives, some games go on for a few frames
        self.lives = info["lives"]
        return obs, reward, terminated or life_lost, truncated, info


class FireReset(gym.Wrapper):
    """Begins an episode with FIRE, which launches the ball, and with the action after it."""

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        for action in (1, 2):
            obs, _, terminated, truncated, info = self.env.step(action)
            if terminated or truncated:
                obs, info = self.env.reset()
        return obs, info


def warp(screen: np.ndarray) -> np.ndarray:
    """RGB [210, 160, 3] -> luminance [84, 84], both uint8."""
    luminance = cv2.cvtColor(screen, cv2.COLOR_RGB2GRAY)
    return cv2.resize(luminance, (84, 84), interpolation=cv2.INTER_AREA)


def check_camera(args: Args, env: gym.Env) -> None:
    """Refuses what cannot be filmed, such as MuJoCo's tasks where OpenGL is missing."""
    try:
        env.reset()
        env.render()
    except Exception as error:  # of many kinds
        refuse(f"--capture-video: {args.env_id} cannot be filmed, {error}")


def make_env(args: Args, video_dir: Path | None = None) -> gym.Env:
    """One environment, filmed if there is a video_dir; refuses one this script cannot learn.

    Its infos hold the raw return and the length of each finished game.
    """
    if not args.env_id.endswith("NoFrameskip-v4"):
        refuse(
            f"--env-id {args.env_id}: must be a game whose frames are not skipped, "
            "such as BreakoutNoFrameskip-v4"
        )
    if args.env_id.startswith((".", ":")) or args.env_id.count(":") > 1:
        refuse(f"--env-id {args.env_id}: is no environment's name")
    gym.register_envs(ale_py)
    try:
        env = gym.make(
            args.env_id,
            disable_env_checker=True,
            render_mode="rgb_array",
            # 128 bytes that nobody looks at: cheaper than the screen, which MaxAndSkip draws
            # itself, and only when it is needed.
            obs_type="ram",
        )
    except (gym.error.Error, ImportError, TypeError) as error:  # tells the cure
        refuse(f"--env-id {args.env_id}: {error}")
    if video_dir is not None:
        check_camera(args, env)
        env = gym.wrappers.RecordVideo(env, str(video_dir))

    # Detail 14: NoopResetEnv
    env = NoopReset(env)

    # Detail 15: MaxAndSkipEnv
    env = MaxAndSkip(env)

    # Here, because returns are those of whole games, with rewards as they are
    env = gym.wrappers.RecordEpisodeStatistics(env)

    # Detail 16: EpisodicLifeEnv
    env = EpisodicLife(env)

    # Detail 17: FireResetEnv
    if env.unwrapped.get_action_meanings()[1] == "FIRE":
        env = FireReset(env)

    # Detail 18: WarpFrame
    luminance = gym.spaces.Box(0, 255, (84, 84), np.uint8)
    env = gym.wrappers.TransformObservation(env, warp, luminance)

    # Detail 19: ClipRewardEnv
    env = gym.wrappers.TransformReward(env, np.sign)

    # Detail 20: FrameStack
    env = gym.wrappers.FrameStackObservation(env, 4)
    return env


def make_envs(args: Args, video_dir: Path | None = None) -> gym.vector.VectorEnv:
    """N environments that step together, the first one filmed if there is a video_dir."""
    # Detail 1: vectorised architecture
    first = functools.partial(make_env, args, video_dir)
    others = [functools.partial(make_env, args)] * (args.num_envs - 1)
    vector_env = gym.vector.SyncVectorEnv
    if args.async_envs:
        vector_env = make_processes
    return vector_env(
        [first, *others],
        # The last step of an episode already brings the first observation of the next one, so
        # that every row of a rollout is experience.
        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
        # The next step overwrites the observations; a rollout has copied them by then.
        copy=False,
    )


def make_processes(env_fns: list, **options) -> gym.vector.AsyncVectorEnv:
    """Environments in processes of their own; those leave signals to the training's process."""
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # the new processes inherit it
    try:
        envs = gym.vector.AsyncVectorEnv(env_fns, **options)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    for process in envs.processes:
        atexit.register(process.kill)  # when an error has ended the training
    return envs


class Categorical:
    """One of A actions with probability softmax(logits); logits [B, A].

    torch.distributions.Categorical is the same, but makes a training of CartPole 26 % slower.
    """

    def __init__(self, logits: torch.Tensor):
        self.logprobs = logits.log_softmax(-1)  # [B, A]

    def sample(self) -> torch.Tensor:
        """-> action [B], by the Gumbel-max trick, as in baselines/common/distributions.py."""
        noise = torch.empty_like(self.logprobs).exponential_()
        return (self.logprobs - noise.log_()).argmax(-1)

    def log_prob(self, action: torch.Tensor) -> torch.Tensor:
        """action [B] -> its log-probability [B]."""
        return -F.nll_loss(self.logprobs, action, reduction="none")

    def entropy(self) -> torch.Tensor:
        """-> entropy [B], in nats."""
        return -(self.logprobs.exp() * self.logprobs).sum(-1)


class Agent(nn.Module):
    """The policy (actor) and the value function (critic)."""

    inputs = ("obs",)  # what forward and act take
    amp = False  # half precision

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Discrete):
        super().__init__()

        # Detail 21: shared Nature CNN
        self.network = nn.Sequential(  # [B, 4, 84, 84]
            nn.Conv2d(observation_space.shape[0], 32, 8, stride=4),
            nn.ReLU(),  # [B, 32, 20, 20]
            nn.Conv2d(32, 64, 4, stride=2),
            nn.ReLU(),  # [B, 64, 9, 9]
            nn.Conv2d(64, 64, 3),
            nn.ReLU(),  # [B, 64, 7, 7]
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 512),
            nn.ReLU(),  # [B, 512]
        )
        self.actor = nn.Linear(512, int(action_space.n))
        self.critic = nn.Linear(512, 1)

        # Detail 2: orthogonal weights, constant biases
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.orthogonal_(layer.weight, 2**0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.orthogonal_(self.actor.weight, 0.01)
        nn.init.orthogonal_(self.critic.weight, 1.0)

    def forward(self, obs: torch.Tensor) -> tuple[Categorical, torch.Tensor]:
        """obs [B, ...] -> distribution over actions, value [B]."""
        # Detail 22: scaling images to [0, 1]
        images = obs.to(torch.float32, memory_format=torch.channels_last, copy=True)
        images /= 255  # a copy, so that not the rollout itself is scaled

        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.amp):
            hidden = self.network(images)
        hidden = hidden.float()
        return Categorical(self.actor(hidden)), self.critic(hidden).squeeze(-1)

    def act(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """obs [N, ...] -> sampled action [N], its log-probability [N], value [N]."""
        distribution, value = self(obs)
        action = distribution.sample()
        return action, distribution.log_prob(action), value


def compute_gae(
    rewards: np.ndarray,
    values: np.ndarray,
    dones: np.ndarray,
    next_value: np.ndarray,
    gamma: float,
    gae_lambda: float,
) -> tuple[np.ndarray, np.ndarray]:
    """rewards, values, dones [T, N], next_value [N] -> advantages, returns [T, N].

    dones[t]: action t ended the episode. next_value: of the observation after the last step.
    Schulman et al. (2016), equation 16; baselines/ppo2/runner.py#L56-L65.
    """
    # Detail 5: generalised advantage estimation
    nonterminal = 1.0 - dones  # float64, and so are all sums, as in baselines
    next_values = np.concatenate([values[1:], next_value[None]])
    deltas = rewards + gamma * next_values * nonterminal - values
    discounts = gamma * gae_lambda * nonterminal

    advantages = np.empty_like(values)  # float32, as the values
    advantage = np.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        advantage = deltas[t] + discounts[t] * advantage
        advantages[t] = advantage
    return advantages, advantages + values


def ppo_loss(
    agent: Agent, mb: dict[str, torch.Tensor], args: Args
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Minibatch mb -> loss [], {statistic: []}.

    mb: obs and actions [M, ...], and float32 [M]: logprobs, values (both of the agent that acted),
    advantages, returns. Equation 9 of the paper; baselines/ppo2/model.py#L68-L91.
    """
    distribution, value = agent(mb["obs"])
    logratio = distribution.log_prob(mb["actions"]) - mb["logprobs"]
    ratio = logratio.exp()  # pi_new / pi_old, 1 in the first minibatch of an update

    # Detail 7: advantage normalisation
    advantages = mb["advantages"]
    if args.norm_adv:
        std, mean = std_mean(advantages)
        advantages = (advantages - mean) / (std + 1e-8)

    # Detail 8: clipped surrogate objective
    pg_loss1 = -advantages * ratio
    pg_loss2 = -advantages * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = torch.max(pg_loss1, pg_loss2)  # [M]

    # Detail 9: value loss clipping
    v_loss = (value - mb["returns"]).square()
    if args.clip_vloss:
        v_clipped = value.clamp(mb["values"] - args.clip_coef, mb["values"] + args.clip_coef)
        v_loss_clipped = (v_clipped - mb["returns"]).square()
        v_loss = torch.max(v_loss, v_loss_clipped)
    v_loss = 0.5 * v_loss  # [M]

    # Detail 10: overall loss and entropy bonus
    entropy = distribution.entropy()  # [M]
    loss = (pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss).mean()

    # Detail 12: debug variables
    with torch.no_grad():
        stats = {
            "policy_loss": pg_loss.mean(),
            "value_loss": v_loss.mean(),
            "entropy": entropy.mean(),
            # Two estimates of the KL divergence from the agent that acted, k1 and k3 of
            # http://joschu.net/blog/kl-approx.html; k3 has less variance and is never negative.
            "old_approx_kl": -logratio.mean(),
            "approx_kl": (ratio - 1 - logratio).mean(),
            "clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(),
        }
    return loss, stats


def clipped_gradient(
    agent: Agent, mb: dict[str, torch.Tensor], args: Args
) -> dict[str, torch.Tensor]:
    """Leaves the clipped gradient of ppo_loss in the agent's parameters -> {statistic: []}."""
    loss, stats = ppo_loss(agent, mb, args)
    loss.backward()

    # Detail A2: parallel gradient update
    average_over_processes(agent, stats, len(mb["advantages"]))

    # Detail 11: global gradient clipping
    stats["grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    return stats


@functools.cache
def compiled_gradient():
    """clipped_gradient as one graph of compiled kernels."""
    whole = not dist.is_initialized()  # the sum over processes splits it
    torch._dynamo.config.trace_autograd_ops = whole  # lets loss.backward() into the graph
    return torch.compile(clipped_gradient, fullgraph=whole)


def train_step(
    agent: Agent, optimizer: torch.optim.Optimizer, mb: dict[str, torch.Tensor], args: Args
) -> dict[str, torch.Tensor]:
    """Takes one gradient step on a minibatch -> {statistic: []}."""
    optimizer.zero_grad()
    if args.compile:
        stats = compiled_gradient()(agent, mb, args)
    else:
        stats = clipped_gradient(agent, mb, args)
    optimizer.step()
    return stats


# Several processes, started by torchrun. In a single one, nothing of this changes anything.


@contextlib.contextmanager
def join_processes(args: Args):
    """Joins the processes that torchrun has started; refuses what cannot be divided among them.

    Sizes are global: each of W processes has N / W of the same N environments, and its share of
    each minibatch.
    """
    if not dist.is_torchelastic_launched():
        yield
        return

    # Before there is a group: imported later, as by torch.use_deterministic_algorithms, its
    # functions hold the group as a default argument, and gloo's threads can abort Python's exit.
    import torch.distributed.nn

    cuda = args.cuda and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        num_processes = dist.get_world_size()
        if args.num_envs % num_processes != 0:
            what = "must be a multiple of the number of processes"
            refuse(f"--num-envs {args.num_envs}: {what}, {num_processes}")
        divide(args)  # refuses minibatches that a process cannot have
        yield
    finally:
        dist.destroy_process_group()


def divide(args: Args) -> Args:
    """-> the sizes of one process: N / W environments, and its share of a minibatch."""
    num_processes = count_processes()
    return replace(
        args,
        num_envs=args.num_envs // num_processes,
        # As many iterations, because batch_size is divided too
        total_timesteps=args.total_timesteps // num_processes,
    )


def count_processes() -> int:
    """-> processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def get_rank() -> int:
    """-> number of this process, from 0 on. Process 0 writes the run's files."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather(value) -> list:
    """-> this value of every process, in their order."""
    if not dist.is_initialized():
        return [value]
    values = [None] * count_processes()
    dist.all_gather_object(values, value)
    return values


def std_mean(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> population standard deviation [] and mean [] of the x of all processes."""
    if not dist.is_initialized():
        return torch.std_mean(x, correction=0)
    x = x.double()
    moments = torch.stack([torch.ones_like(x).sum(), x.sum(), x.square().sum()])
    dist.all_reduce(moments)
    count, total, squares = moments
    mean = total / count
    variance = squares / count - mean.square()
    return variance.clamp(min=0).sqrt().float(), mean.float()


def average_over_processes(agent: Agent, stats: dict[str, torch.Tensor], num_samples: int) -> None:
    """Makes gradient and statistics those of the minibatch of all processes.

    One sum over processes, in which each counts by its num_samples, before clipping as in
    baselines/common/mpi_adam_optimizer.py.
    """
    if not dist.is_initialized():
        return
    with torch.no_grad():
        averaged = [p.grad for p in agent.parameters() if p.grad is not None]
        averaged.extend(stats.values())
        flat = [x.flatten() for x in averaged]
        flat.append(torch.ones_like(flat[0][:1]))  # counts the samples
        flat = torch.cat(flat) * num_samples
        dist.all_reduce(flat)

        flat = flat[:-1] / flat[-1]
        for x, average in zip(averaged, flat.split([x.numel() for x in averaged]), strict=True):
            x.copy_(average.view_as(x))


def check_weights_are_equal(agent: Agent) -> None:
    """Ends the program, exit code 1, if the processes have drifted apart."""
    weights = nn.utils.parameters_to_vector(agent.parameters())
    checksums = gather(zlib.crc32(weights.detach().cpu().numpy()))
    if len(set(checksums)) > 1:
        sys.exit("the processes have come to different weights")


def begin_together(agent: Agent, args: Args, first_iteration: int) -> None:
    """Gives every process the weights of process 0, and random numbers of its own."""
    if not dist.is_initialized():
        return
    for weights in agent.state_dict().values():
        dist.broadcast(weights, 0)
    if get_rank() > 0:  # process 0 keeps those of a single one
        sequence = np.random.SeedSequence((args.seed, first_iteration, get_rank()))
        torch.manual_seed(int(sequence.generate_state(1)[0]))


def find_signal(received: list[int]) -> int:
    """-> number of a signal that any process has received, 0 if none has."""
    return max(gather(received[0] if received else 0))


# Keeping the run: folder, checkpoints, logs, signals. The same in all eight scripts.


@contextlib.contextmanager
def restore_process_settings():
    """Puts back, when main returns, what training sets for the whole process.

    So a notebook has its Ctrl-C again, and its own number of threads and kind of algorithms.
    """
    sigint = signal.getsignal(signal.SIGINT)
    sigterm = signal.getsignal(signal.SIGTERM)
    sighup = signal.getsignal(signal.SIGHUP)
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill_memory = torch.utils.deterministic.fill_uninitialized_memory
    tf32 = torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, sigint)
        signal.signal(signal.SIGTERM, sigterm)
        signal.signal(signal.SIGHUP, sighup)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill_memory
        torch.backends.cudnn.allow_tf32 = tf32


def catch_signals() -> list[int]:
    """From now on SIGINT (Ctrl-C), SIGTERM and SIGHUP only go into the list returned here.

    train looks at it once an iteration, so that a run stops between two iterations, and saved. A
    second Ctrl-C ends the program at once.
    """
    received = []

    def receive(signum, frame):
        if signum == signal.SIGINT and signum in received:
            os._exit(128 + signum)
        received.append(signum)

    signal.signal(signal.SIGINT, receive)
    signal.signal(signal.SIGTERM, receive)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup has it ignored
        signal.signal(signal.SIGHUP, receive)
    return received


def seed_generators(seed: int) -> None:
    """Seeds every random number generator but those of the environments."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def choose_seeds(args: Args, first_iteration: int) -> list[int]:
    """-> seeds of all N environments, far apart: those of seed 1 are not seed 2's, shifted by one.

    A run that is resumed begins new episodes, with new seeds.
    """
    sequence = np.random.SeedSequence((args.seed, first_iteration))
    return sequence.generate_state(args.num_envs).tolist()


def keep_freed_memory() -> None:
    """Has the C library keep freed memory, instead of giving it back and fetching it page by page.

    Every minibatch of images takes some; without it, a training of Breakout is 18 % slower.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD of malloc.h
        libc.mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD


def use_deterministic_algorithms(enabled: bool) -> None:
    """Same seed, same machine, same number of threads: the same weights, bit for bit."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(enabled, warn_only=True)

    # Convolutions of a GPU in float32, like all else; PyTorch would round what they take to TF32
    torch.backends.cudnn.allow_tf32 = False

    # This would also fill every new tensor with NaN, in case someone reads what nobody wrote:
    # a kernel for each on a GPU; on a CPU, no difference in speed was measured.
    torch.utils.deterministic.fill_uninitialized_memory = False


def load_checkpoint(run_dir: str | Path) -> dict:
    """-> what save_checkpoint wrote, on the CPU; refuses what is no checkpoint of this script."""
    try:
        path = Path(run_dir, "checkpoint.pt")
        damaged = zipfile.ZipFile(path).testzip()  # checksums that torch.load does not look at
        if damaged is not None:
            raise ValueError(f"{damaged} in it is damaged")
        checkpoint = dict(torch.load(path, map_location="cpu", weights_only=True))
        check_checkpoint(checkpoint)
    except Exception as error:  # torch.load raises many kinds
        reason = f"{type(error).__name__}: {str(error)[:99]}"
        refuse(f"--resume {run_dir}: no checkpoint to go on with, {reason}")
    return checkpoint


def check_checkpoint(checkpoint: dict) -> None:
    """Completes the arguments; raises ValueError, KeyError or TypeError over what cannot go on."""
    if checkpoint["script"] != Path(__file__).stem:
        raise ValueError(f"belongs to {checkpoint['script']}.py")
    if checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"is of format {checkpoint.get('format', 1)}, not {CHECKPOINT_FORMAT}")
    if type(checkpoint["iteration"]) is not int or checkpoint["iteration"] < 0:
        raise ValueError(f"iteration {checkpoint['iteration']!r}")
    np.array(checkpoint["recent_returns"], dtype=float)  # raises where one is no number

    args = checkpoint["args"]
    fields = {field.name: field for field in dataclasses.fields(Args)}
    if args.keys() - fields.keys():
        others = ", ".join(sorted(args.keys() - fields.keys()))
        raise ValueError(f"is of a version with other arguments: {others}")
    for name, value in args.items():
        field = fields[name]
        allowed = (type(field.default),)
        if field.default is None:  # such as float | None
            allowed = get_args(field.type)
        if float in allowed:
            allowed = (*allowed, int)
        if type(value) not in allowed:
            raise TypeError(f"{name} is {value!r}")

    # Refuses numbers that are out of range; arguments newer than the checkpoint have their defaults
    checkpoint["args"] = asdict(Args(**args))


def save_checkpoint(
    run_dir: Path, args: Args, iteration: int, stateful: dict, recent_returns: deque
) -> None:
    """Writes run_dir/checkpoint.pt after that many iterations.

    stateful: {name: object with a state_dict}, all that learns. A kill at any moment leaves a
    whole checkpoint, the old one or the new one.
    """
    if get_rank() > 0:
        return
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    checkpoint = {
        "format": CHECKPOINT_FORMAT,
        "script": Path(__file__).stem,
        "args": asdict(args),
        "processes": count_processes(),
        "iteration": iteration,
        "recent_returns": list(recent_returns),
        "python_random": random.getstate(),
        "numpy_random": numpy_state,
        "torch_random": torch.get_rng_state(),
        "cuda_random": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }
    for name, part in stateful.items():
        checkpoint[name] = part.state_dict()

    content = io.BytesIO()
    torch.save(checkpoint, content)
    with open(run_dir / "checkpoint.tmp", "wb") as file:
        file.write(content.getbuffer())
        file.flush()
        os.fsync(file.fileno())  # on the disk before it takes the old one's place
    os.replace(run_dir / "checkpoint.tmp", run_dir / "checkpoint.pt")
    folder = os.open(run_dir, os.O_RDONLY)
    os.fsync(folder)  # and so is its name
    os.close(folder)


def restore(checkpoint: dict, stateful: dict, recent_returns: deque) -> None:
    """Puts back what save_checkpoint wrote; refuses what does not fit."""
    try:
        for name, part in stateful.items():
            part.load_state_dict(checkpoint[name])
        recent_returns.extend(checkpoint["recent_returns"])

        random.setstate(checkpoint["python_random"])
        np.random.set_state(checkpoint["numpy_random"])
        torch.set_rng_state(checkpoint["torch_random"])
        if checkpoint["cuda_random"] is not None and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(checkpoint["cuda_random"])
    except Exception as error:  # weights of other shapes, a key that is missing, ...
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        refuse(f"--resume: the checkpoint does not fit this script, {reason}")


def find_checkpoint(args: Args) -> dict | None:
    """-> the checkpoint to go on with, None for a new run; refuses what cannot go on."""
    if args.resume is None:
        return None
    checkpoint = load_checkpoint(args.resume)
    for name in FIXED_ON_RESUME:
        if getattr(args, name) != checkpoint["args"][name]:
            stored = checkpoint["args"][name]
            refuse(f"--resume {args.resume}: cannot change its {name}, {stored}")
    if args.num_iterations < checkpoint["iteration"]:
        done = checkpoint["iteration"] * args.batch_size
        refuse(f"--total-timesteps {args.total_timesteps}: {done} steps are done already")
    return checkpoint


@contextlib.contextmanager
def open_run(args: Args):
    """Gives the folder of a new run or of the one to go on with, locked; refuses what is in use.

    The lock is a file that is open: the kernel frees it when it is closed or its process dies.
    """
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-")
    run_dir = Path(args.resume or f"runs/{name}")
    while args.resume is None and run_dir.exists():  # another run began in this second
        run_dir = run_dir.with_name(f"{run_dir.name}+")
    run_dir = gather(run_dir)[0]
    if get_rank() > 0:
        yield run_dir
        return

    try:
        run_dir.mkdir(parents=True, exist_ok=args.resume is not None)
        lock = open(run_dir / "lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        refuse(f"{run_dir}: another process is training this run")
    except OSError as error:
        refuse(f"{run_dir}: cannot be written, {error.strerror}")
    try:
        yield run_dir
    finally:
        lock.close()
        if not (run_dir / "checkpoint.pt").exists():  # it failed before it began
            shutil.rmtree(run_dir, ignore_errors=True)


@contextlib.contextmanager
def explain_failure(args: Args, run_dir: Path):
    """Lets an error say where the last checkpoint is; a full disk or memory, in one line."""

    def ignore_os_error(error):  # TensorBoard's thread hands it on to this one
        if not issubclass(error.exc_type, OSError):
            excepthook(error)

    unwritable = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
    excepthook = threading.excepthook
    threading.excepthook = ignore_os_error
    try:
        yield
    except Exception as error:
        state = f"last good state: {run_dir}" if run_dir.exists() else "it is gone"
        if isinstance(error, OSError) and (error.errno in unwritable or not run_dir.exists()):
            sys.exit(f"cannot write {run_dir}, {error.strerror}; {state}")
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            sizes = f"--num-envs {args.num_envs}, --num-steps {args.num_steps}"
            refuse(f"{sizes}: there is not enough memory. {error}")
        error.add_note(state)
        raise
    finally:
        threading.excepthook = excepthook


def start_logging(run_dir: Path, args: Args, first_step: int) -> SummaryWriter | None:
    """-> TensorBoard's writer into the run's folder, whose events go to W&B as well if asked to.

    None in all processes but the first.
    """
    if get_rank() > 0:
        return None

    # Threads and processes change the last bits of all results
    config = asdict(args)
    config["threads"] = torch.get_num_threads()
    config["processes"] = count_processes()
    if args.track:
        import wandb  # here, because it is slow to import, and rarely needed

        try:
            wandb.init(
                project=args.wandb_project_name,
                entity=args.wandb_entity,
                id=run_dir.name,
                name=run_dir.name,
                resume="allow",
                config=config,
                sync_tensorboard=True,
                save_code=True,
            )
        except Exception as error:  # of many kinds
            refuse(f"--track: W&B says: {error} (`wandb login` once, or WANDB_MODE=offline)")

    writer = SummaryWriter(
        str(run_dir),
        purge_step=first_step + 1,  # hide what a killed run logged after its last checkpoint
    )
    lines = [f"- {name}: {value}\n" for name, value in config.items()]
    writer.add_text("hyperparameters", "".join(lines), first_step)

    # The tab HPARAMS compares runs by their arguments
    values = {name: str(value) for name, value in config.items()}
    for summary in hparams(values, {"charts/mean_return": 0}):
        writer.file_writer.add_summary(summary)

    # TensorBoard's thread has nothing left to write, should the run fail and its folder go
    writer.flush()
    return writer


def find_episodes(final_info: dict, first_step: int) -> list[tuple[int, float, int]]:
    """-> step, raw return and length of every episode that ended in a step of N environments.

    final_info is Gymnasium's: "episode" holds the returns "r" and the lengths "l", [N] each, and
    "_episode" says which of the N are those of an episode that ended. The environments' steps
    count one after another, from first_step on.
    """
    if "episode" not in final_info:  # an end for the learner only, such as a lost life in Atari
        return []
    episode = final_info["episode"]
    ended = np.flatnonzero(final_info["_episode"])
    return [(first_step + int(i), float(episode["r"][i]), int(episode["l"][i])) for i in ended]


def log_episodes(writer: SummaryWriter | None, episodes: list, recent_returns: deque) -> None:
    """Logs the episodes of all processes, by their steps."""
    of_all = []
    for of_one_process in gather(episodes):
        of_all.extend(of_one_process)
    for step, episodic_return, length in sorted(of_all):
        recent_returns.append(episodic_return)
        metrics = {"charts/episodic_return": episodic_return, "charts/episodic_length": length}
        log_metrics(writer, metrics, step)


def log_metrics(writer: SummaryWriter | None, metrics: dict[str, float], step: int) -> None:
    """Logs numbers, in the process that has a writer."""
    if writer is not None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)


def mean_return(recent_returns: deque) -> float:
    """Mean of the last 100 episodes' returns; NaN if none has ended."""
    return float(np.mean(recent_returns)) if recent_returns else float("nan")


def mean_losses(stats: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """{statistic: []} of every minibatch -> means over all of them, by one wait for the device."""
    table = torch.stack([torch.stack(list(minibatch.values())) for minibatch in stats])
    return dict(zip(stats[0], table.mean(0).tolist(), strict=True))


def explained_variance(values: np.ndarray, returns: np.ndarray) -> float:
    """Part of the returns' variance that the values explain: 1 is perfect, 0 a constant's."""
    deviation, _ = std_mean(torch.from_numpy(returns))
    unexplained, _ = std_mean(torch.from_numpy(returns - values))
    return 1 - (unexplained / deviation).item() ** 2 if deviation > 0 else float("nan")


def stop_if_not_finite(
    losses: dict[str, float], stateful: dict, iteration: int, run_dir: Path
) -> None:
    """Ends the program, exit code 1, if a loss, a weight or a statistic is NaN or infinite."""
    numbers = list(losses.values())
    weights = nn.utils.parameters_to_vector(stateful["agent"].parameters())
    numbers.append(weights.abs().max().item())
    if "envs" in stateful:  # running means and variances
        for statistics in stateful["envs"].state_dict().values():
            numbers.extend(np.abs(statistics["mean"]).flat)
            numbers.extend(np.abs(statistics["var"]).flat)

    if not np.isfinite(numbers).all():
        sys.exit(
            f"iteration {iteration + 1}: loss or weights became NaN or infinite; "
            f"last good state: {run_dir}"
        )


class Progress:
    """A bar on a terminal; elsewhere, such as in a log file, a line every five seconds."""

    def __init__(self, args: Args, first_step: int):
        self.silent = get_rank() > 0 or sys.stderr is None
        self.bar = tqdm(
            total=args.num_iterations * args.batch_size,
            initial=first_step,
            unit=" steps",
            disable=True if self.silent else None,  # None: unless it is a terminal
        )
        self.last_line = time.time()

    def show(self, step: int, speed: float, score: float) -> None:
        """step: environment steps done; speed: steps per second; score: the mean return."""
        self.bar.set_postfix_str(f"mean return {score:.1f}", refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and not self.silent and time.time() > self.last_line + 5:
            self.last_line = time.time()
            line = f"{step}/{self.bar.total} steps, {speed:.0f} steps/s, mean return {score:.1f}"
            say(line, sys.stderr)

    def close(self) -> None:
        self.bar.close()


def flush(writer: SummaryWriter | None) -> None:
    """Writes what is logged into the file now."""
    if writer is not None:
        writer.flush()


def send_films(args: Args, video_dir: Path, sent: set[Path]) -> None:
    """Sends W&B the films that it has not yet, in the order in which they were made."""
    if args.track and get_rank() == 0:
        import wandb

        films = sorted(set(video_dir.glob("*.mp4")) - sent, key=os.path.getmtime)
        for path in films:
            wandb.log({"video": wandb.Video(str(path))})
        sent.update(films)


def stop_logging(writer: SummaryWriter | None, args: Args) -> None:
    """Closes TensorBoard's file, and ends W&B's run."""
    if writer is not None:
        writer.close()
        if args.track:
            import wandb

            wandb.finish()


def summarize(run_dir: Path, recent_returns: deque, step: int, signum: int) -> float:
    """Prints the result, and how to go on if a signal ended the run -> the result."""
    score = mean_return(recent_returns)
    if get_rank() == 0:
        episodes = f"the last {len(recent_returns)} episodes"
        say(f"{run_dir}: mean return {score:.1f} over {episodes}, {step} steps", sys.stdout)
        if signum:
            command = ["python", os.path.relpath(__file__), "--resume", str(run_dir)]
            say(f"to go on: {shlex.join(command)}", sys.stdout)
    if signum:
        sys.exit(128 + signum)  # the exit code of a program that died of the signal
    return score


def main(args: Args) -> float:
    """Opens a run and trains -> mean return of the last 100 episodes, NaN if none has ended."""
    with restore_process_settings(), join_processes(args):
        checkpoint = find_checkpoint(args)
        make_env(args).close()  # refuses what it must before anything is written
        with open_run(args) as run_dir, explain_failure(args, run_dir):
            return train(args, run_dir, checkpoint)


def train(args: Args, run_dir: Path, checkpoint: dict | None) -> float:
    """Trains a new run, or goes on from its checkpoint -> what main returns."""
    # Set up
    seed_generators(args.seed)
    use_deterministic_algorithms(args.torch_deterministic)
    keep_freed_memory()
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")

    first_iteration = checkpoint["iteration"] if checkpoint else 0
    first_step = first_iteration * args.batch_size
    share = divide(args)  # what this process has, all of it unless there are several
    video_dir = run_dir / "videos" / f"from-step-{first_step}"
    filming = args.capture_video and get_rank() == 0
    envs = make_envs(share, video_dir if filming else None)
    agent = Agent(envs.single_observation_space, envs.single_action_space).to(device)
    agent.amp = args.amp

    # Detail 3: Adam epsilon 1e-5
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)

    stateful = {"agent": agent, "optimizer": optimizer}  # what a checkpoint holds
    recent_returns = deque(maxlen=100)
    if checkpoint:
        restore(checkpoint, stateful, recent_returns)
    if first_iteration == args.num_iterations:  # it is finished
        envs.close()
        return summarize(run_dir, recent_returns, first_step, signum=0)
    begin_together(agent, args, first_iteration)
    writer = start_logging(run_dir, args, first_step)
    progress = Progress(args, first_step)
    received = catch_signals()

    # One rollout. Rewards and ends of episodes stay on the host, where advantages are computed.
    # Images are laid out as [..., height, width, frames], in which convolutions are fastest.
    shape = (share.num_steps, share.num_envs)  # [T, N]
    frames, height, width = envs.single_observation_space.shape
    pixels = torch.zeros((*shape, height, width, frames), dtype=torch.uint8, device=device)
    buffer = {
        "obs": pixels.movedim(-1, 2),  # [T, N, frames, height, width]
        "actions": torch.zeros(shape, dtype=torch.int64, device=device),
        "logprobs": torch.zeros(shape, device=device),
        "values": torch.zeros(shape, device=device),
        "advantages": torch.zeros(shape, device=device),
        "returns": torch.zeros(shape, device=device),
    }
    rewards = np.zeros(shape, np.float32)
    dones = np.zeros(shape, bool)

    # Each process has the environments from first_env on
    seeds = choose_seeds(args, first_iteration)
    first_env = get_rank() * share.num_envs
    next_obs, infos = envs.reset(seed=seeds[first_env : first_env + share.num_envs])
    save_checkpoint(run_dir, args, first_iteration, stateful, recent_returns)
    global_step = first_step
    start_time = time.time()
    sent = set()  # films that W&B has

    for iteration in range(first_iteration, args.num_iterations):
        remaining = 1 - iteration / args.num_iterations

        # Detail 4: learning rate annealing
        learning_rate = args.learning_rate * remaining if args.anneal_lr else args.learning_rate
        for group in optimizer.param_groups:
            group["lr"] = learning_rate  # the same for every parameter group

        # Detail A1: clip range annealing
        update_args = args
        if args.anneal_clip:
            # A tensor, because --compile takes numbers for constants
            clip_coef = torch.tensor(args.clip_coef * remaining, dtype=torch.float64)
            update_args = replace(args, clip_coef=clip_coef.to(device))

        # Rollout: T steps of N environments
        episodes = []  # those that end in it
        with torch.inference_mode():
            for t in range(args.num_steps):
                obs = torch.as_tensor(next_obs, device=device)
                action, logprob, value = agent.act(obs)
                buffer["obs"][t] = obs
                buffer["actions"][t] = action
                buffer["logprobs"][t] = logprob
                buffer["values"][t] = value

                next_obs, rewards[t], terminated, truncated, infos = envs.step(action.cpu().numpy())
                dones[t] = terminated | truncated
                if "final_info" in infos:  # an episode has ended
                    ended = find_episodes(infos["final_info"], global_step + first_env + 1)
                    episodes.extend(ended)
                global_step += args.num_envs

                # A time limit is no death: what would have followed can be part of the reward
                at_limit = truncated & ~terminated
                if args.bootstrap_truncated and at_limit.any():
                    final_obs = np.stack(infos["final_obs"][at_limit])
                    final_obs = torch.as_tensor(final_obs, device=device)
                    _, final_value = agent(final_obs)
                    rewards[t, at_limit] += args.gamma * final_value.cpu().numpy()

            # Detail 1: vectorised architecture
            # The next rollout goes on with these observations; until then, their values stand for
            # what is still to come.
            obs = torch.as_tensor(next_obs, device=device)
            _, next_value = agent(obs)

        # Advantages
        values = buffer["values"].cpu().numpy()
        advantages, returns = compute_gae(
            rewards, values, dones, next_value.cpu().numpy(), args.gamma, args.gae_lambda
        )
        buffer["advantages"].copy_(torch.from_numpy(advantages))
        buffer["returns"].copy_(torch.from_numpy(returns))

        # Update
        batch = {name: x.flatten(0, 1) for name, x in buffer.items()}  # [T, N, ...] -> [T * N, ...]
        stats = []  # one dict a minibatch
        for _ in range(args.update_epochs):
            # Detail 6: minibatch updates
            order = torch.randperm(share.batch_size, device=device)
            for index in order.split(share.minibatch_size):
                mb = {name: x[index] for name, x in batch.items()}
                stats.append(train_step(agent, optimizer, mb, update_args))

            # Detail A3: early stopping on KL
            if args.target_kl is not None:
                epoch_kl = sum(s["approx_kl"] for s in stats[-args.num_minibatches :])
                if epoch_kl / args.num_minibatches > 1.5 * args.target_kl:
                    break

        # Log and save
        losses = mean_losses(stats)
        stop_if_not_finite(losses, stateful, iteration, run_dir)
        log_episodes(writer, episodes, recent_returns)

        # Detail 12: debug variables
        metrics = {f"losses/{name}": loss for name, loss in losses.items()}
        metrics["losses/explained_variance"] = explained_variance(values, returns)
        metrics["charts/learning_rate"] = learning_rate
        speed = (global_step - first_step) / (time.time() - start_time)
        metrics["charts/SPS"] = speed
        metrics["charts/mean_return"] = mean_return(recent_returns)
        log_metrics(writer, metrics, global_step)
        send_films(args, video_dir, sent)
        progress.show(global_step, speed, mean_return(recent_returns))

        finished = iteration + 1 == args.num_iterations
        signum = find_signal(received)  # once, so that a run that stops has saved
        if signum or finished or (iteration + 1) % args.checkpoint_interval == 0:
            check_weights_are_equal(agent)
            flush(writer)
            save_checkpoint(run_dir, args, iteration + 1, stateful, recent_returns)
        if signum:
            break

    envs.close()
    progress.close()
    send_films(args, video_dir, sent)
    stop_logging(writer, args)
    return summarize(run_dir, recent_returns, global_step, signum)


def parse_args() -> Args:
    """The command line -> Args. A resumed run keeps its arguments, except those given anew."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume")
    run_dir = parser.parse_known_args()[0].resume
    default = Args()
    if run_dir is not None:
        default = Args(**load_checkpoint(run_dir)["args"])
    return tyro.cli(Args, default=default)


if __name__ == "__main__":
    main(parse_args())
