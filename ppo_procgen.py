# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[classic-control]==1.4.0", "numpy==2.4.6", "tyro==1.0.17",
#     "tensorboard==2.21.0", "wandb==0.31.0", "tqdm==4.70.1", "moviepy==2.2.1", "envpool==1.2.5",
#     "PyQt5-Qt5==5.15.19; sys_platform == 'linux'"]
# ///
"""PPO for Procgen, 16 games whose levels are generated, so that nothing can be learned by heart.

    python ppo_procgen.py                                         # starpilot, pip install -e ".[procgen]"
    python ppo_procgen.py --env-id bossfight --distribution-mode hard --num-levels 500 --track --capture-video
    python ppo_procgen.py --resume runs/starpilot__ppo_procgen__1__1790000000

PPO is Schulman et al. (2017), arXiv:1707.06347. `# Detail N` marks details 1-12, 22, 30, 31, A1 and A3 of Huang et al.
(2022), "The 37 Implementation Details of Proximal Policy Optimization", whose appendix is on Procgen; "baselines" is
openai/baselines at ea25b9e. The engine is EnvPool's build of Procgen, https://github.com/openai/procgen, 0.10.7.
Shapes: T = num_steps, N = num_envs, B = T * N (one rollout), M = B // num_minibatches (one minibatch), A actions.
"""

import argparse
import ctypes
import functools
import os
import random
import signal
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import gymnasium as gym
import numpy as np
import torch
import tyro
import wandb
from gymnasium.utils.save_video import capped_cubic_video_schedule, save_video
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

try:
    if sys.platform == "linux":  # Qt 5 draws the games: the system's, or else that of the package PyQt5-Qt5
        try:
            ctypes.CDLL("libQt5Gui.so.5", ctypes.RTLD_GLOBAL)
        except OSError:
            import PyQt5

            ctypes.CDLL(f"{PyQt5.__path__[0]}/Qt5/lib/libQt5Gui.so.5", ctypes.RTLD_GLOBAL)  # finds the rest beside it
    import envpool
    from envpool.registration import registry
except (ImportError, OSError) as missing:
    cure = 'pip install -e ".[procgen]" brings it, or else apt-get install libgl1 libglib2.0-0'
    print(f"{Path(__file__).name}: {missing}; {cure}", file=sys.stderr)
    raise SystemExit(2) from None


def refuse(problem: str) -> NoReturn:
    """Ends the program over something that its user can mend: one line on stderr, exit code 2 (raises SystemExit)."""
    print(f"{Path(__file__).name}: {' '.join(problem.split())}", file=sys.stderr)
    raise SystemExit(2)


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run's name
    env_id: Annotated[str, tyro.conf.arg(aliases=["--gym-id"])] = "starpilot"  # a game of Procgen
    distribution_mode: Literal["easy", "hard"] = "easy"  # of the levels
    num_levels: int = 0  # levels to train on; 0: no end of them
    start_level: int = 0  # the first of the levels
    seed: int = 1  # of weights, actions, minibatches and environments
    total_timesteps: int = 25_000_000  # environment steps in all, rounded down to whole rollouts
    learning_rate: float = 5e-4  # of Adam
    num_envs: int = 64  # N, environments that step together
    num_steps: int = 256  # T, steps of each environment in one rollout
    anneal_lr: bool = False  # let the learning rate fall linearly to 0
    gamma: float = 0.999  # discount factor
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    num_minibatches: int = 8  # minibatches in one epoch
    update_epochs: int = 3  # times that the samples of a rollout are learned from
    norm_adv: bool = True  # normalise the advantages of each minibatch
    clip_coef: float = 0.2  # clip range of the probability ratio, and of the value
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
        # Procgen's own name of the same game, procgen:procgen-starpilot-v0, is understood
        self.env_id = self.env_id.lower().removeprefix("procgen:").removeprefix("procgen-").removesuffix("-v0")
        limits = {"gamma": (0, 1), "gae_lambda": (0, 1), "ent_coef": (0, 1e9), "vf_coef": (0, 1e9), "seed": (0, 2**31)}
        limits |= {"num_levels": (0, 2**31 - 1), "start_level": (0, 2**31 - 1)}
        for name, value in vars(self).items():
            low, high = limits.get(name, (1 if type(value) is int else 1e-12, 1e12))
            if type(value) in (int, float) and not low <= value <= high:
                refuse(f"--{name.replace('_', '-')} {value}: must be a number from {low} to {high}")
        if self.batch_size % self.num_minibatches:
            refuse(f"--num-minibatches {self.num_minibatches}: must divide a rollout, {self.batch_size} samples")
        if self.num_steps < 2 or self.minibatch_size < 3:  # up to two thirds of so few steps may be no experience
            refuse(f"--num-steps {self.num_steps}, {self.minibatch_size} samples a minibatch: must be at least 2 and 3")
        if self.num_iterations < 1:
            refuse(f"--total-timesteps {self.total_timesteps}: must be at least one rollout, {self.batch_size} steps")


class Games(gym.vector.VectorEnv):
    """N games on EnvPool's threads, with returns and lengths of whole games in infos, as Gymnasium has them.

    EnvPool resets on the next step: the step after an episode's end ignores its action, has no reward, and observes the
    next episode's beginning. Such a row is no experience, and infos["valid"] [N] is False there. What the policy saw
    before it is the final observation of the episode that ended.
    """

    episode_trigger = staticmethod(capped_cubic_video_schedule)  # says which games of environment 0 are filmed

    def __init__(self, args: Args, video_dir: Path | None):
        self.num_envs, self.video_dir = args.num_envs, video_dir
        self.make_engine = functools.partial(
            envpool.make_gymnasium,
            f"{args.env_id.capitalize()}{args.distribution_mode.capitalize()}-v0",
            num_envs=args.num_envs,  # Detail 1: vectorised architecture
            num_threads=min(args.num_envs, torch.get_num_threads()),
            num_levels=args.num_levels,
            start_level=args.start_level,
            render_mode="rgb_array",
            render_width=512,
            render_height=512,
        )
        spec = envpool.make_spec(self.make_engine.args[0])
        self.single_observation_space = spec.gymnasium_observation_space
        self.single_action_space = spec.gymnasium_action_space

    def reset(self, *, seed: int | list[int] = 0, options: dict | None = None):
        self.engine = self.make_engine(seed=np.remainder(seed, 2**31).tolist())  # it takes seeds at birth only
        self.done = np.zeros(self.num_envs, bool)
        self.returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, int)
        self.game, self.film = 0, []
        return self.engine.reset()[0], {}

    def step(self, actions):
        obs, rewards, terminated, truncated, _ = self.engine.step(actions)
        infos = {"valid": ~self.done}
        self.done = terminated | truncated
        self.returns += rewards
        self.lengths += infos["valid"]
        game_over = self.done
        if game_over.any():
            episode = {"r": self.returns.copy(), "l": self.lengths.copy()}
            infos["final_info"] = {"episode": episode, "_episode": game_over}
            self.returns[game_over] = self.lengths[game_over] = 0
        if self.video_dir and self.episode_trigger(self.game):
            self.film.append(self.engine.render()[0])
        if game_over[0]:
            self.save_film()
        return obs, rewards, terminated, truncated, infos

    def save_film(self) -> None:
        if self.film:
            everything = dict(episode_trigger=lambda game: True, episode_index=self.game, fps=15)
            save_video(self.film, str(self.video_dir), **everything)
        self.game, self.film = self.game + 1, []

    def close_extras(self, **kwargs):
        if hasattr(self, "engine"):
            self.save_film()
            self.engine.close()


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


class ScaleRewards(gym.vector.VectorWrapper):
    """Scales rewards by running statistics that all N environments share; they are in the checkpoint.

    baselines/common/vec_env/vec_normalize.py. Rows that only reset have no part in it. `frozen` keeps the statistics.
    """

    def __init__(self, envs: gym.vector.VectorEnv, gamma: float):
        super().__init__(envs)
        self.gamma, self.frozen = gamma, False
        self.statistics = {"return": RunningMeanStd(())}

    def reset(self, **kwargs):
        self.discounted_return = np.zeros(self.num_envs)
        return self.env.reset(**kwargs)

    def step(self, actions):
        obs, rewards, terminated, truncated, infos = self.env.step(actions)
        # Detail 30: reward scaling
        self.discounted_return = self.discounted_return * self.gamma + rewards
        if not self.frozen and infos["valid"].any():
            self.statistics["return"].update(self.discounted_return[infos["valid"]])
        rewards = rewards / np.sqrt(self.statistics["return"].var + 1e-8)
        self.discounted_return[terminated | truncated] = 0
        # Detail 31: reward clipping
        return obs, rewards.clip(-10, 10), terminated, truncated, infos

    def state_dict(self) -> dict[str, list]:
        return {name: [np.asarray(x).tolist() for x in vars(stats).values()] for name, stats in self.statistics.items()}

    def load_state_dict(self, state: dict[str, list]) -> None:
        for name, stats in self.statistics.items():
            stats.mean, stats.var, stats.count = map(np.array, state[name])


def make_envs(args: Args, video_dir: Path | None = None) -> gym.vector.VectorEnv:
    """N environments that step together, environment 0 filmed if there is a video_dir."""
    games = [game.removesuffix("Easy-v0").lower() for game in registry.specs if game.endswith("Easy-v0")]
    if args.env_id not in games:
        refuse(f"--env-id {args.env_id}: is no game of Procgen; there are {', '.join(sorted(games))}")
    return ScaleRewards(Games(args, video_dir), args.gamma)


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


class ResidualBlock(nn.Module):
    """images [B, C, H, W] -> [B, C, H, W]; build_impala_cnn in baselines/common/models.py#L28."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv0 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images + self.conv1(self.conv0(images.relu()).relu())


class Agent(nn.Module):
    """Policy and value function."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Discrete):
        super().__init__()
        # the IMPALA network, Espeholt et al. (2018), arXiv:1802.01561, figure 3
        layers, (channels, height, width) = [], observation_space.shape
        for out_channels in (16, 32, 32):  # each block halves height and width
            layers += [nn.Conv2d(channels, out_channels, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1)]
            layers += [ResidualBlock(out_channels), ResidualBlock(out_channels)]
            channels, height, width = out_channels, (height + 1) // 2, (width + 1) // 2
        layers += [nn.ReLU(), nn.Flatten(), nn.Linear(channels * height * width, 256), nn.ReLU()]
        self.network = nn.Sequential(*layers)
        self.actor = nn.Linear(256, int(action_space.n))
        self.critic = nn.Linear(256, 1)
        # Detail 2: orthogonal weights, constant biases
        for layer in self.modules():
            if hasattr(layer, "weight"):
                nn.init.xavier_uniform_(layer.weight)  # baselines' convolutions are TensorFlow's, which begin so
                nn.init.zeros_(layer.bias)
        nn.init.orthogonal_(self.actor.weight, 0.01)
        nn.init.orthogonal_(self.critic.weight, 1.0)

    def forward(self, obs: torch.Tensor) -> tuple[Categorical, torch.Tensor]:
        """obs [B, ...] -> distribution over actions, value [B]."""
        # Detail 22: scaling images to [0, 1]
        images = obs.to(torch.float32, memory_format=torch.channels_last, copy=True).div_(255)
        hidden = self.network(images)
        return Categorical(self.actor(hidden)), self.critic(hidden).squeeze(-1)

    def act(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """obs [N, ...] -> sampled action [N], its log-probability [N], value [N]."""
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
    for name in ("env_id", "distribution_mode", "num_envs", "num_steps") if args.resume else ():  # it rests on these
        if getattr(args, name) != checkpoint["args"][name]:
            refuse(f"--resume {args.resume}: cannot change its {name}, {checkpoint['args'][name]}")
    run_name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-")
    run_dir = Path(args.resume or f"runs/{run_name}")
    make_envs(args).close()  # refuses what it must before anything is written
    try:
        run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
        (run_dir / "checkpoint.tmp").touch()
    except OSError as error:
        refuse(f"{run_dir}: cannot be written, {error.strerror}")
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(args.seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS is not deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
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
        envs.load_state_dict(checkpoint["envs"])
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
    frames, height, width = envs.single_observation_space.shape
    pixels = torch.zeros((*shape, height, width, frames), dtype=torch.uint8, device=device)
    buffer["obs"] = pixels.movedim(-1, 2)  # [T, N, frames, height, width], laid out as they convolve fastest
    buffer["actions"] = torch.zeros(shape, dtype=torch.int64, device=device)
    rows = [{name: x[t] for name, x in buffer.items()} for t in range(args.num_steps)]  # views, cheaper than indexing
    rewards = np.zeros(shape, np.float32)  # these stay on the host
    dones, cuts, valid = np.zeros((3, *shape), bool)  # episode ended, at a time limit; the row is experience
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
                dones[t], cuts[t], valid[t] = terminated | truncated, truncated & ~terminated, infos["valid"]
                global_step += args.num_envs
                if "episode" in infos.get("final_info", ()):
                    episode = infos["final_info"]["episode"]
                    for i in np.flatnonzero(infos["final_info"]["_episode"]):
                        recent_returns.append(float(episode["r"][i]))
                        writer.add_scalar("charts/episodic_return", episode["r"][i], global_step)
                        writer.add_scalar("charts/episodic_length", episode["l"][i], global_step)
            next_value = agent(torch.as_tensor(obs, dtype=torch.float32, device=device))[1].cpu().numpy()

        values = buffer["values"].cpu().numpy()
        if args.bootstrap_truncated:  # a row after a cut has the final observation
            rewards += args.gamma * cuts * np.concatenate([values[1:], next_value[None]])
        advantages, returns = compute_gae(rewards, values, dones, next_value, args.gamma, args.gae_lambda)
        buffer["advantages"].copy_(torch.from_numpy(advantages))
        buffer["returns"].copy_(torch.from_numpy(returns))
        batch = {name: x.flatten(0, 1) for name, x in buffer.items()}  # [T, N, ...] -> [B, ...]
        samples = torch.from_numpy(np.flatnonzero(valid)).to(device)  # rows that only reset are left out
        stats = []  # one dict a minibatch
        for _ in range(args.update_epochs):
            # Detail 6: minibatch updates
            order = torch.randperm(len(samples), device=device)
            for index in samples[order].tensor_split(args.num_minibatches):
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
        unexplained = np.var((returns - values)[valid])
        scalars["losses/explained_variance"] = 1 - unexplained / (np.var(returns[valid]) or np.nan)
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
