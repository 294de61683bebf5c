# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[classic-control]==1.4.0", "numpy==2.4.6", "tyro==1.0.17",
#     "tensorboard==2.21.0", "wandb==0.31.0", "tqdm==4.70.1", "moviepy==2.2.1", "ale-py==0.12.1",
#     "opencv-python-headless==5.0.0.93"]
# ///
"""PPO for Atari games with a memory: one frame to observe, and an LSTM that has seen the frames before.

    python ppo_atari_lstm.py --env-id BreakoutNoFrameskip-v4      # pip install -e ".[atari]"
    python ppo_atari_lstm.py --env-id PongNoFrameskip-v4 --seed 2 --track --capture-video
    python ppo_atari_lstm.py --resume runs/BreakoutNoFrameskip-v4__ppo_atari_lstm__1__1790000000

PPO is Schulman et al. (2017), arXiv:1707.06347. `# Detail N`: details 1-12, 14-22, 32-36, A1 and A3 of Huang et al.
(2022), "The 37 Implementation Details of Proximal Policy Optimization"; "baselines" is openai/baselines at ea25b9e.
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
from collections.abc import Callable, Iterable
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
    import ale_py
    import cv2
except ImportError as missing:
    print(f'{Path(__file__).name}: {missing}; pip install -e ".[atari]" brings it', file=sys.stderr)
    raise SystemExit(2) from None


def refuse(problem: str) -> NoReturn:
    """Ends the program over something that its user can mend: one line on stderr, exit code 2 (raises SystemExit)."""
    print(f"{Path(__file__).name}: {' '.join(problem.split())}", file=sys.stderr)
    raise SystemExit(2)


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run's name
    env_id: Annotated[str, tyro.conf.arg(aliases=["--gym-id"])] = "BreakoutNoFrameskip-v4"  # a *NoFrameskip-v4 id
    seed: int = 1  # of weights, actions, minibatches and environments
    total_timesteps: int = 10_000_000  # environment steps in all, rounded down to whole rollouts
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
        if self.num_envs % self.num_minibatches:
            refuse(
                f"--num-minibatches {self.num_minibatches}: must divide --num-envs {self.num_envs}; none is cut in two"
            )
        if self.num_iterations < 1:
            refuse(f"--total-timesteps {self.total_timesteps}: must be at least one rollout, {self.batch_size} steps")


class ActOnReset(gym.Wrapper):
    """Begins every episode with actions(random generator); baselines' NoopResetEnv and FireResetEnv."""

    def __init__(self, env: gym.Env, actions: Callable[[np.random.Generator], Iterable[int]]):
        super().__init__(env)
        self.actions = actions

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        for action in self.actions(self.np_random):
            obs, _, terminated, truncated, info = self.env.step(action)
            if terminated or truncated:
                obs, info = self.env.reset()
        return obs, info


class MaxAndSkip(gym.Wrapper):
    """Repeats an action for 4 frames; observes the maximum of the last two screens, as sprites may flicker."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.draw = env.unwrapped.ale.getScreenRGB  # only the screens that count
        self.screens = np.zeros((2, *self.draw().shape), np.uint8)

    def reset(self, **kwargs):
        _, info = self.env.reset(**kwargs)
        return self.draw(), info

    def step(self, action):
        total_reward = 0.0
        for frame in range(4):
            _, reward, terminated, truncated, info = self.env.step(action)
            total_reward += reward
            if frame >= 2:
                self.draw(self.screens[frame - 2])
            if terminated or truncated:
                break
        return np.maximum(*self.screens), total_reward, terminated, truncated, info


class EpisodicLife(gym.Wrapper):
    """Ends an episode with each life, so that losing one has its price; the game goes on in the next episode."""

    game_over = True

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


def warp(screen: np.ndarray) -> np.ndarray:
    """RGB [210, 160, 3] -> luminance [84, 84], both uint8."""
    return cv2.resize(cv2.cvtColor(screen, cv2.COLOR_RGB2GRAY), (84, 84), interpolation=cv2.INTER_AREA)


def make_env(args: Args, video_dir: Path | None = None) -> gym.Env:
    """One environment, filmed if there is a video_dir; info holds each finished game's raw return and length."""
    if not args.env_id.endswith("NoFrameskip-v4"):
        refuse(f"--env-id {args.env_id}: must be a game whose frames are not skipped, such as BreakoutNoFrameskip-v4")
    try:
        gym.register_envs(ale_py)
        env = gym.make(args.env_id, disable_env_checker=True, render_mode="rgb_array", obs_type="ram")
    except (gym.error.Error, ImportError) as error:  # Gymnasium's words tell the nearest name, or what to install
        refuse(f"--env-id {args.env_id}: {error}")
    if video_dir:
        env = gym.wrappers.RecordVideo(env, str(video_dir))
    env = ActOnReset(env, lambda rng: [0] * rng.integers(1, 31))  # Detail 14: NoopResetEnv
    env = MaxAndSkip(env)  # Detail 15: MaxAndSkipEnv
    env = gym.wrappers.RecordEpisodeStatistics(env)  # of whole games, with rewards as they are
    env = EpisodicLife(env)  # Detail 16: EpisodicLifeEnv
    if env.unwrapped.get_action_meanings()[1] == "FIRE":
        env = ActOnReset(env, lambda rng: (1, 2))  # Detail 17: FireResetEnv
    grey = gym.spaces.Box(0, 255, (84, 84), np.uint8)
    env = gym.wrappers.TransformObservation(env, warp, grey)  # Detail 18: WarpFrame
    env = gym.wrappers.TransformReward(env, np.sign)  # Detail 19: ClipRewardEnv
    return gym.wrappers.FrameStackObservation(env, 1)  # one frame: the LSTM remembers the others


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


class Agent(nn.Module):
    """Policy and value function."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Discrete):
        super().__init__()
        # Detail 21: shared Nature CNN
        self.network = nn.Sequential(
            nn.Conv2d(observation_space.shape[0], 32, 8, stride=4), nn.ReLU(),  # [B, 32, 20, 20]
            nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(),  # [B, 64, 9, 9]
            nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(),  # [B, 64 * 7 * 7]
            nn.Linear(64 * 7 * 7, 512), nn.ReLU(),
        )  # fmt: skip
        self.lstm = nn.LSTM(512, 128)
        self.actor = nn.Linear(128, int(action_space.n))
        self.critic = nn.Linear(128, 1)
        # Detail 2: orthogonal weights, constant biases
        for layer in (*self.network, self.actor, self.critic):
            if hasattr(layer, "weight"):
                nn.init.orthogonal_(layer.weight, 2**0.5)
                nn.init.zeros_(layer.bias)
        # Detail 32: LSTM initialisation
        for parameter in self.lstm.parameters():
            nn.init.orthogonal_(parameter, 1.0) if parameter.dim() > 1 else nn.init.zeros_(parameter)
        nn.init.orthogonal_(self.actor.weight, 0.01)
        nn.init.orthogonal_(self.critic.weight, 1.0)

    def forward(self, obs, starts, state) -> tuple[Categorical, torch.Tensor, torch.Tensor]:
        """K steps of N environments -> distribution over actions, value [K * N], state after them [2, N, 128].

        obs [K * N, ...] in time order; starts [K * N], bool, on the CPU: an episode begins with this observation;
        state [2, N, 128]: hidden and cell state before the first of the steps.
        """
        # Detail 22: scaling images to [0, 1]
        images = obs.to(torch.float32, memory_format=torch.channels_last, copy=True).div_(255)
        hidden = self.network(images)
        hidden, state = self.remember(*(x.unflatten(0, (-1, state.shape[1])) for x in (hidden, starts)), state)
        return Categorical(self.actor(hidden)), self.critic(hidden).squeeze(-1), state

    def remember(self, hidden, starts, state) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [K, N, 512], starts [K, N], state [2, N, 128] -> the LSTM's outputs [K * N, 128], state after them."""
        outputs = []
        # one call from each step at which any environment begins an episode to the next such step
        cuts = [0, *(starts[1:].any(1).nonzero().flatten() + 1).tolist(), len(starts)]
        for first, end in zip(cuts, cuts[1:], strict=False):
            # Detail 34: LSTM states reset at episode ends
            state = state * (~starts[first]).to(state).unsqueeze(-1)
            output, state = self.lstm(hidden[first:end], tuple(state.split(1)))
            outputs.append(output)
            state = torch.cat(state)
        return torch.cat(outputs).flatten(0, 1), state

    def act(self, obs, starts, state) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """One step, as in forward -> sampled action [N], its log-probability [N], value [N], state [2, N, 128]."""
        distribution, value, state = self(obs, starts, state)
        action = distribution.sample()
        return action, distribution.log_prob(action), value, state


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
    distribution, value, _ = agent(mb["obs"], mb["starts"], mb["lstm_state"])
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
    return torch.compile(clipped_gradient)  # in parts: the LSTM is called as often as episodes demand


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
    frames, height, width = envs.single_observation_space.shape
    pixels = torch.zeros((*shape, height, width, frames), dtype=torch.uint8, device=device)
    buffer["obs"] = pixels.movedim(-1, 2)  # [T, N, frames, height, width], laid out as they convolve fastest
    buffer["actions"] = torch.zeros(shape, dtype=torch.int64, device=device)
    buffer["starts"] = torch.zeros(shape, dtype=torch.bool)  # on the host, where the LSTM's calls are counted
    rows = [{name: x[t] for name, x in buffer.items()} for t in range(args.num_steps)]  # views, cheaper than indexing
    rewards, dones = np.zeros(shape, np.float32), np.zeros(shape, bool)  # these stay on the host
    env_seeds = np.random.SeedSequence((args.seed, first_iteration)).generate_state(args.num_envs)
    obs, _ = envs.reset(seed=env_seeds.tolist())  # a resumed run goes on in new episodes
    starts = np.ones(args.num_envs, bool)
    state = torch.zeros(
        (2, args.num_envs, agent.lstm.hidden_size), device=device
    )  # Detail 33: LSTM states start at zero
    save_checkpoint(run_dir, args, first_iteration, agent, optimizer, recent_returns)
    start_time = last_line = time.time()

    for iteration in range(first_iteration, args.num_iterations):
        # Detail 4: learning rate annealing
        remaining = 1 - iteration / args.num_iterations
        optimizer.param_groups[0]["lr"] = args.learning_rate * (remaining if args.anneal_lr else 1)
        # Detail A1: clip range annealing
        update_args = replace(args, clip_coef=args.clip_coef * remaining) if args.anneal_clip else args
        first_state = state
        with torch.inference_mode():  # rollout: each step takes observations to the device and actions from it, once
            for t, row in enumerate(rows):
                row["obs"].copy_(torch.from_numpy(obs))
                row["starts"].copy_(torch.from_numpy(starts))
                *outputs, state = agent.act(row["obs"], row["starts"], state)
                for name, x in zip(("actions", "logprobs", "values"), outputs, strict=True):
                    row[name].copy_(x)
                obs, rewards[t], terminated, truncated, infos = envs.step(row["actions"].cpu().numpy())
                starts = dones[t] = terminated | truncated
                global_step += args.num_envs
                if args.bootstrap_truncated and (cut := truncated & ~terminated).any():
                    final_obs = torch.as_tensor(np.stack(infos["final_obs"][cut]), dtype=torch.float32, device=device)
                    goes_on = torch.zeros(len(final_obs), dtype=torch.bool)
                    rewards[t, cut] += args.gamma * agent(final_obs, goes_on, state[:, cut])[1].cpu().numpy()
                if "episode" in infos.get("final_info", ()):
                    episode = infos["final_info"]["episode"]
                    for i in np.flatnonzero(infos["final_info"]["_episode"]):
                        recent_returns.append(float(episode["r"][i]))
                        writer.add_scalar("charts/episodic_return", episode["r"][i], global_step)
                        writer.add_scalar("charts/episodic_length", episode["l"][i], global_step)
            next_obs = torch.as_tensor(obs, dtype=torch.float32, device=device)
            next_value = agent(next_obs, torch.from_numpy(starts), state)[1].cpu().numpy()

        values = buffer["values"].cpu().numpy()
        advantages, returns = compute_gae(rewards, values, dones, next_value, args.gamma, args.gae_lambda)
        buffer["advantages"].copy_(torch.from_numpy(advantages))
        buffer["returns"].copy_(torch.from_numpy(returns))
        stats = []  # one dict a minibatch
        for _ in range(args.update_epochs):
            # Detail 6: minibatch updates
            # Detail 35: sequential minibatches
            for index in torch.randperm(args.num_envs).split(args.num_envs // args.num_minibatches):
                mb = {name: x[:, index].flatten(0, 1) for name, x in buffer.items()}  # [T, N, ...] -> [M, ...]
                mb["lstm_state"] = first_state[:, index]  # Detail 36: LSTM states reconstructed in training
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
