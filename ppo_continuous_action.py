# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[classic-control]==1.4.0", "numpy==2.4.6", "tyro==1.0.17",
#     "tensorboard==2.21.0", "wandb==0.31.0", "tqdm==4.70.1", "moviepy==2.2.1", "mujoco==4.0.0", "imageio==2.37.0"]
# ///
"""PPO for robots: any environment with a vector of numbers to observe and a vector of numbers to act with.

    python ppo_continuous_action.py                               # HalfCheetah-v4, pip install -e ".[mujoco]"
    python ppo_continuous_action.py --env-id Hopper-v4 --seed 2 --track --capture-video
    python ppo_continuous_action.py --resume runs/HalfCheetah-v4__ppo_continuous_action__1__1790000000

PPO is Schulman et al. (2017), arXiv:1707.06347. `# Detail N` marks details 1-12, 23-31, A1 and A3 of Huang et al.
(2022), "The 37 Implementation Details of Proximal Policy Optimization"; "baselines" is openai/baselines at ea25b9e.
Shapes: T = num_steps, N = num_envs, B = T * N (one rollout), M = B // num_minibatches (one minibatch), A actions.
"""

import argparse
import functools
import math
import os
import random
import signal
import sys
import time
import warnings
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
import wandb
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


def refuse(problem: str) -> NoReturn:
    """Ends the program over something that its user can mend: one line on stderr, exit code 2 (raises SystemExit)."""
    print(f"{Path(__file__).name}: {' '.join(problem.split())}", file=sys.stderr)
    raise SystemExit(2)


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run's name
    env_id: Annotated[str, tyro.conf.arg(aliases=["--gym-id"])] = "HalfCheetah-v4"  # the Gymnasium environment
    seed: int = 1  # of weights, actions, minibatches and environments
    total_timesteps: int = 1_000_000  # environment steps in all, rounded down to whole rollouts
    learning_rate: float = 3e-4  # of Adam
    num_envs: int = 1  # N, environments that step together
    num_steps: int = 2048  # T, steps of each environment in one rollout
    anneal_lr: bool = True  # let the learning rate fall linearly to 0
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    num_minibatches: int = 32  # minibatches in one epoch
    update_epochs: int = 10  # times that the samples of a rollout are learned from
    norm_adv: bool = True  # normalise the advantages of each minibatch
    clip_coef: float = 0.2  # clip range of the probability ratio, and of the value
    anneal_clip: bool = False  # let the clip range fall linearly to 0
    clip_vloss: bool = True  # clip the value loss
    ent_coef: float = 0.0  # weight of the entropy bonus
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
        task, _, version = self.env_id.rpartition("-v")
        if version in ("2", "3") and f"{task}-v4" in gym.registry:  # commands of older papers go on working
            print(f"{self.env_id} is retired: training its successor {task}-v4 instead", file=sys.stderr)
            self.env_id = f"{task}-v4"
        limits = {"gamma": (0, 1), "gae_lambda": (0, 1), "ent_coef": (0, 1e9), "vf_coef": (0, 1e9), "seed": (0, 2**31)}
        for name, value in vars(self).items():
            low, high = limits.get(name, (1 if type(value) is int else 1e-12, 1e12))
            if type(value) in (int, float) and not low <= value <= high:
                refuse(f"--{name.replace('_', '-')} {value}: must be a number from {low} to {high}")
        if self.batch_size % self.num_minibatches:
            refuse(f"--num-minibatches {self.num_minibatches}: must divide a rollout, {self.batch_size} samples")
        if self.num_iterations < 1:
            refuse(f"--total-timesteps {self.total_timesteps}: must be at least one rollout, {self.batch_size} steps")


def make_env(args: Args, video_dir: Path | None = None) -> gym.Env:
    """One environment, filmed if there is a video_dir; info holds each finished episode's raw return and length."""
    if "DISPLAY" not in os.environ and sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # films without a screen
    warnings.filterwarnings("ignore", ".*is out of date")  # published numbers compare with -v4
    try:
        env = gym.make(args.env_id, disable_env_checker=True, **({"render_mode": "rgb_array"} if video_dir else {}))
    except (gym.error.Error, ImportError) as error:  # Gymnasium's words tell the nearest name, or what to install
        refuse(f"--env-id {args.env_id}: {error}")
    if not isinstance(env.observation_space, gym.spaces.Box) or len(env.observation_space.shape) != 1:
        refuse(f"--env-id {args.env_id}: its observations are {env.observation_space}, not a flat Box")
    if not isinstance(env.action_space, gym.spaces.Box) or len(env.action_space.shape) != 1:
        refuse(f"--env-id {args.env_id}: its actions are {env.action_space}, not a flat Box")
    if video_dir:
        env = gym.wrappers.RecordVideo(env, str(video_dir))
    env = gym.wrappers.ClipAction(env)  # Detail 27: action clipping, unclipped storage
    return gym.wrappers.RecordEpisodeStatistics(env)


class RunningMeanStd:
    """Mean and variance of all rows x [*shape] so far, as in baselines/common/running_mean_std.py."""

    def __init__(self, shape: tuple[int, ...]):
        self.mean, self.var, self.count = np.zeros(shape), np.ones(shape), 1e-4

    def update(self, x: np.ndarray) -> None:  # [N, *shape]; Chan et al. (1979) join two sets of numbers
        n, total = len(x), self.count + len(x)
        mean = np.add.reduce(x, 0) / n
        delta = mean - self.mean
        squares = self.var * self.count + np.add.reduce(np.square(x - mean), 0)
        squares += np.square(delta) * self.count * n / total
        self.mean, self.var, self.count = self.mean + delta * n / total, squares / total, total


class Normalize(gym.vector.VectorWrapper):
    """Scales observations and rewards by running statistics that all N environments share.

    baselines/common/vec_env/vec_normalize.py. An agent is worth nothing without its statistics: they are in the
    checkpoint, and evaluation takes them from there and sets `frozen`.
    """

    def __init__(self, envs: gym.vector.VectorEnv, gamma: float):
        super().__init__(envs)
        self.gamma, self.frozen = gamma, False
        self.statistics = {"obs": RunningMeanStd(self.single_observation_space.shape), "return": RunningMeanStd(())}

    def reset(self, **kwargs):
        obs, infos = self.env.reset(**kwargs)
        self.discounted_return = np.zeros(self.num_envs)
        return self.normalize_obs(obs, self.frozen), infos

    def step(self, actions):
        obs, rewards, terminated, truncated, infos = self.env.step(actions)
        obs = self.normalize_obs(obs, self.frozen)
        for i in np.flatnonzero(infos.get("_final_obs", ())):
            infos["final_obs"][i] = self.normalize_obs(infos["final_obs"][i], frozen=True)
        # Detail 30: reward scaling
        self.discounted_return = self.discounted_return * self.gamma + rewards
        if not self.frozen:
            self.statistics["return"].update(self.discounted_return)
        rewards = rewards / np.sqrt(self.statistics["return"].var + 1e-8)
        self.discounted_return[terminated | truncated] = 0
        # Detail 31: reward clipping
        return obs, rewards.clip(-10, 10), terminated, truncated, infos

    def normalize_obs(self, obs: np.ndarray, frozen: bool) -> np.ndarray:
        # Detail 28: observation normalisation
        if not frozen:
            self.statistics["obs"].update(obs)
        obs = (obs - self.statistics["obs"].mean) / np.sqrt(self.statistics["obs"].var + 1e-8)
        # Detail 29: observation clipping
        return obs.clip(-10, 10)

    def state_dict(self) -> dict[str, list]:
        return {name: [np.asarray(x).tolist() for x in vars(stats).values()] for name, stats in self.statistics.items()}

    def load_state_dict(self, state: dict[str, list]) -> None:
        for name, stats in self.statistics.items():
            stats.mean, stats.var, stats.count = map(np.array, state[name])


def make_envs(args: Args, video_dir: Path | None = None) -> gym.vector.VectorEnv:
    """N environments that step together, environment 0 filmed if there is a video_dir."""
    # Detail 1: vectorised architecture
    env_fns = [functools.partial(make_env, args, video_dir)] + [lambda: make_env(args)] * (args.num_envs - 1)
    # SAME_STEP: an episode's last step already brings the next one's first observation, so every row is experience
    envs = gym.vector.SyncVectorEnv(env_fns, copy=False, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    return Normalize(envs, args.gamma)


class Normal:
    """A independent numbers, number i normally distributed around mean[:, i] with deviation exp(logstd[i])."""

    # Detail 23: normal distribution
    def __init__(self, mean: torch.Tensor, logstd: torch.Tensor):  # [B, A], [A]
        self.mean, self.logstd = mean, logstd

    def sample(self) -> torch.Tensor:  # [B, A]
        return self.mean + self.logstd.exp() * torch.randn_like(self.mean)

    # Detail 25: independent action components
    def log_prob(self, action: torch.Tensor) -> torch.Tensor:  # [B, A] -> [B]
        z = (action - self.mean) * (-self.logstd).exp()
        return -0.5 * z.square().sum(-1) - (self.logstd + 0.5 * math.log(2 * math.pi)).sum()

    def entropy(self) -> torch.Tensor:  # [B], in nats
        return (self.logstd + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(len(self.mean))


class MLP(nn.Sequential):
    def __init__(self, inputs: int, outputs: int):
        super().__init__(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))
        self.layers = [(self[i].weight, self[i].bias) for i in (0, 2, 4)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # on layers this small, nn.Sequential's calls cost more
        (w1, b1), (w2, b2), (w3, b3) = self.layers
        return F.linear(F.linear(F.linear(x, w1, b1).tanh(), w2, b2).tanh(), w3, b3)


class Agent(nn.Module):
    """Policy and value function."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Box):
        super().__init__()
        # Detail 26: separate MLPs for policy and value
        self.actor = MLP(observation_space.shape[0], action_space.shape[0])
        self.critic = MLP(observation_space.shape[0], 1)
        # Detail 2: orthogonal weights, constant biases
        for weight, bias in self.actor.layers + self.critic.layers:
            nn.init.orthogonal_(weight, 2**0.5)
            nn.init.zeros_(bias)
        nn.init.orthogonal_(self.actor[-1].weight, 0.01)
        nn.init.orthogonal_(self.critic[-1].weight, 1.0)
        # Detail 24: state-independent log standard deviation
        self.logstd = nn.Parameter(torch.zeros(action_space.shape[0]))

    def forward(self, obs: torch.Tensor) -> tuple[Normal, torch.Tensor]:
        """obs [B, ...] -> distribution over actions, value [B]."""
        return Normal(self.actor(obs), self.logstd), self.critic(obs).squeeze(-1)

    def act(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """obs [N, ...] -> sampled action [N, A], its log-probability [N], value [N]."""
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


def save_checkpoint(run_dir: Path, args: Args, iteration: int, agent: Agent, optimizer, recent_returns, envs) -> None:
    """Writes run_dir/checkpoint.pt after that many iterations; a kill at any moment leaves a whole one."""
    numpy_state = [x.tolist() if isinstance(x, np.ndarray) else x for x in np.random.get_state()]
    states = (random.getstate(), numpy_state, torch.get_rng_state(), torch.cuda.get_rng_state_all()[:1])
    checkpoint = {"script": Path(__file__).stem, "args": asdict(args), "iteration": iteration, "random_states": states}
    checkpoint |= {"agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "returns": list(recent_returns)}
    checkpoint["envs"] = envs.state_dict()
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
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    first_iteration, recent_returns = checkpoint["iteration"], deque(checkpoint["returns"], maxlen=100)
    global_step = first_step = first_iteration * args.batch_size
    envs = make_envs(args, run_dir / "videos" / f"from-step-{first_step}" if args.capture_video else None)
    agent = Agent(envs.single_observation_space, envs.single_action_space).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5, fused=True)  # Detail 3: Adam epsilon 1e-5
    if args.resume:
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        envs.load_state_dict(checkpoint["envs"])
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
    buffer["obs"] = torch.zeros((*shape, *envs.single_observation_space.shape), device=device)
    buffer["actions"] = torch.zeros((*shape, *envs.single_action_space.shape), device=device)
    rows = [{name: x[t] for name, x in buffer.items()} for t in range(args.num_steps)]  # views, cheaper than indexing
    rewards, dones = np.zeros(shape, np.float32), np.zeros(shape, bool)  # these stay on the host
    env_seeds = np.random.SeedSequence((args.seed, first_iteration)).generate_state(args.num_envs)
    obs, _ = envs.reset(seed=env_seeds.tolist())  # a resumed run goes on in new episodes
    save_checkpoint(run_dir, args, first_iteration, agent, optimizer, recent_returns, envs)
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
            save_checkpoint(run_dir, args, iteration + 1, agent, optimizer, recent_returns, envs)
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
