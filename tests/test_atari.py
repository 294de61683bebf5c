"""ppo_atari.py: its wrappers do to a game what openai/baselines' do.

Its network and its records are as they should be.

Loss, advantages, optimizer and checkpoints are ppo.py's, and tested there.
"""

import contextlib
import copy
import hashlib
import itertools
import math
import signal
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from conftest import load, run, run_dir_of, scalars, start, wait_for_checkpoint, wait_until
from gymnasium.envs.registration import EnvSpec
from moviepy import VideoFileClip
from torch import nn
from torch.nn import functional as F

REFERENCE = Path(__file__).parent / "reference" / "atari_wrappers_breakout.npz"
SPACES = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), gym.spaces.Discrete(4)
SMALL = dict(num_envs=2, num_steps=8, num_minibatches=1, update_epochs=1)
# what frame f of a Script shows, left and right
LEVELS = np.random.default_rng(0).integers(0, 256, (1000, 2), np.uint8)


class Script(gym.Env):
    """A game that plays as told, whatever is pressed.

    Frames count from its start; what was pressed is in `pressed`.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 60}
    observation_space, action_space = (
        gym.spaces.Box(0, 255, (128,), np.uint8),
        gym.spaces.Discrete(4),
    )
    meanings = ("NOOP", "UP", "RIGHT", "LEFT")
    over = 100  # the frame that ends the game
    truncates = False  # whether that is a time limit
    lives = {0: 3}  # {frame: lives from there on}
    rewards = np.zeros(1000)  # of each frame
    noops = None  # what to draw instead of a random number
    made = 0  # how many have begun; a game's number is the count of those before it

    def __init__(self, render_mode: str, obs_type: str):
        self.render_mode, self.ale, self.pressed, self.resets = render_mode, self, [], 0

    @property
    def np_random(self):
        return super().np_random if self.noops is None else self

    def integers(self, low, high):
        return self.noops

    def get_action_meanings(self):
        return list(self.meanings)

    def getScreenRGB(self, screen=None):
        screen = np.empty((210, 160, 3), np.uint8) if screen is None else screen
        screen[:, :80], screen[:, 80:] = LEVELS[self.frame % 1000] if self.resets else (0, 0)
        return screen

    def info(self):
        lives = self.lives[max(start for start in self.lives if start <= self.frame)]
        return {"lives": lives, "episode_frame_number": self.frame}

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        if not self.resets:
            self.number, type(self).made = self.made, self.made + 1
        self.frame, self.resets = 0, self.resets + 1
        return np.zeros(128, np.uint8), self.info()

    def step(self, action):
        assert self.frame < self.over, "goes on after its end"
        self.frame += 1
        self.pressed.append(int(action))
        over = self.frame == self.over
        reward = float(self.rewards[self.frame])
        return (
            np.zeros(128, np.uint8),
            reward,
            over and not self.truncates,
            over and self.truncates,
            self.info(),
        )


def shown(obs: np.ndarray) -> list[list[int]]:
    """[4, 84, 84] of a Script -> the levels of the left and right half of each image."""
    assert (obs[:, :, :42] == obs[:, :1, :1]).all() and (obs[:, :, 42:] == obs[:, :1, 83:]).all()
    return obs[:, 0, [0, 83]].tolist()


@pytest.fixture(scope="module")
def ppo_atari():
    """The module ppo_atari."""
    import ppo_atari

    return ppo_atari


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Each test works in a folder of its own, with the same random numbers."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture
def script(ppo_atari, monkeypatch):
    """-> make(**attributes): registers that Script as ScriptNoFrameskip-v4 -> its environment."""

    def make(**attributes):
        game = type("Game", (Script,), attributes)
        monkeypatch.setitem(
            gym.registry, "ScriptNoFrameskip-v4", EnvSpec("ScriptNoFrameskip-v4", game)
        )
        return ppo_atari.make_env(ppo_atari.Args(env_id="ScriptNoFrameskip-v4"))

    return make


@pytest.fixture
def game(ppo_atari):
    """-> make(name): the environment of an Atari game; what is pressed is in `pressed`."""

    def make(name: str):
        env = ppo_atari.make_env(ppo_atari.Args(env_id=f"{name}NoFrameskip-v4"))
        step, env.unwrapped.pressed = env.unwrapped.step, []
        env.unwrapped.step = lambda action: (
            env.unwrapped.pressed.append(int(action)),
            step(action),
        )[1]
        return env

    return make


@contextlib.contextmanager
def games_played():
    """-> list of the games that any Atari environment ends meanwhile, in their order.

    Each is a dict of what was seen at the emulator.
    """
    from ale_py.env import AtariEnv

    games, current, frames = [], {}, itertools.count()
    reset, step = AtariEnv.reset, AtariEnv.step

    def spy_reset(env, **kwargs):
        obs, info = reset(env, **kwargs)
        number = current[env]["env"] if env in current else len(current)
        current[env] = {
            "env": number,
            "return": 0.0,
            "lives": [info["lives"]],
            "pressed": [],
            "frames": 0,
        }
        return obs, info

    def spy_step(env, action):
        if next(frames) > 20_000:
            pytest.fail("games do not end")
        obs, reward, terminated, truncated, info = step(env, action)
        game = current[env]
        game["return"] += reward
        game["pressed"].append(int(action))
        game["frames"] = info["episode_frame_number"]
        if info["lives"] != game["lives"][-1]:
            game["lives"].append(info["lives"])
        if terminated or truncated:
            games.append(game)
        return obs, reward, terminated, truncated, info

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AtariEnv, "reset", spy_reset)
        patch.setattr(AtariEnv, "step", spy_step)
        yield games


def train(ppo_atari, folder: Path, **args) -> Path:
    """Runs main in that folder -> folder of the only run there.

    Gives the signals back to whom they belonged.
    """
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.chdir(folder):
            ppo_atari.main(ppo_atari.Args(**SMALL | args))
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    return run_dir_of(folder)


@pytest.fixture(scope="module")
def breakout(ppo_atari, tmp_path_factory):
    """A filmed run of Breakout, 3 updates of 4 minibatches.

    -> (its folder, games played, calls of train_step)
    """
    calls, train_step = [], ppo_atari.train_step

    def spy(agent, optimizer, mb, args):
        calls.append({"before": copy.deepcopy(agent), "mb": mb})
        return train_step(agent, optimizer, mb, args)

    args = dict(
        num_envs=4,
        num_steps=160,
        num_minibatches=4,
        total_timesteps=3 * 4 * 160,
        capture_video=True,
    )
    with games_played() as games, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_atari, "train_step", spy)
        run_dir = train(ppo_atari, tmp_path_factory.mktemp("breakout"), **args)
    return run_dir, list(games), calls


def test_wrappers_equal_baselines(ppo_atari):
    """Fails when a wrapper is left out, changed or moved."""
    with np.load(REFERENCE) as file:
        reference = {name.removeprefix("Breakout/"): file[name] for name in file.files}
    noops = reference["noops"].tolist()

    class Drawn:
        def integers(self, low, high):
            assert (low, high) == (1, 31)
            return noops.pop(0)

    env = ppo_atari.make_env(ppo_atari.Args(env_id="BreakoutNoFrameskip-v4"))
    assert env.unwrapped.get_action_meanings() == reference["action_meanings"].tolist()
    env.unwrapped._np_random = Drawn()
    ram = env.unwrapped.ale.getRAM

    def md5(obs):
        return hashlib.md5(np.ascontiguousarray(obs.transpose(1, 2, 0)).tobytes()).hexdigest()

    obs, _ = env.reset()
    np.testing.assert_array_equal(obs.transpose(1, 2, 0), reference["reset_stack"])
    resets = 0
    full = dict(zip(reference["full_t"].tolist(), reference["full_stack"], strict=True))
    raw_return, games = 0.0, 0
    for t in range(1500):
        if t == reference["reset_after"][min(resets, 54)]:
            if t:
                obs, _ = env.reset()
            assert md5(obs) == reference["reset_stack_hash"][resets], t
            np.testing.assert_array_equal(ram(), reference["reset_ram"][resets])
            resets += 1
        obs, reward, terminated, truncated, info = env.step(reference["actions"][t])
        if t in full:  # images say more than hashes
            np.testing.assert_array_equal(obs.transpose(1, 2, 0), full[t], str(t))
        assert md5(obs) == reference["stack_hash"][t], t
        assert reward == reference["reward"][t], t
        assert (terminated or truncated) == reference["done"][t], t
        assert info["lives"] == reference["lives"][t], t
        np.testing.assert_array_equal(ram(), reference["ram"][t])
        raw_return += reference["unclipped_reward"][t]
        assert ("episode" in info) == reference["real_done"][t], t
        if "episode" in info:
            assert info["episode"]["r"] == raw_return
            raw_return, games = 0.0, games + 1
    assert (resets, len(noops), games) == (55, 0, reference["real_done"].sum())


def test_detail_14_noop_reset(script, game):
    """Fails without no-ops, with another range, button or seed, or one number for all games."""

    def numbers(env, seed: int, games: int = 20) -> list[int]:
        drawn = []
        for i in range(games):
            env.unwrapped.pressed.clear()
            _, info = env.reset(seed=None if i else seed)
            assert not any(env.unwrapped.pressed)
            assert info["episode_frame_number"] == len(env.unwrapped.pressed) % env.unwrapped.over
            drawn.append(len(env.unwrapped.pressed))
            while not any(env.step(1)[2:4]):
                pass
        return drawn

    env = script(over=31)
    drawn = numbers(env, 1, 400)
    assert set(drawn) == set(range(1, 31))
    assert numbers(env, 1) == drawn[:20]
    assert numbers(env, 2) != drawn[:20]
    for truncates in (False, True):
        # a new game after 7, and after 14
        assert set(numbers(script(over=7, noops=20, truncates=truncates), 1)) == {20}

    env = game("MsPacman")
    frames = [env.reset(seed=seed)[1]["episode_frame_number"] for seed in (3, 4, 3, 4)]
    assert frames[0] != frames[1] and frames[:2] == frames[2:]


def corners(frame: int) -> list[int]:
    """What a step shows that ends with that frame of a Script."""
    return LEVELS[frame - 1 : frame + 1].max(0).tolist()


def test_detail_15_max_and_skip(script, game):
    """Fails with another number of frames, no sum, or a maximum of others than the last two."""
    rewards = np.random.default_rng(1).integers(-2, 5, 1000)
    env = script(over=94, rewards=rewards, noops=5)
    for _ in range(2):
        obs, info = env.reset()
        assert info["episode_frame_number"] == 5
        assert shown(obs)[-1] == LEVELS[5].tolist()
        env.unwrapped.pressed.clear()
        for step in range(22):
            obs, reward, terminated, truncated, info = env.step(step % 4)
            frame = 5 + 4 * (step + 1)
            assert info["episode_frame_number"] == frame
            assert shown(obs)[-1] == corners(frame)
            assert reward == np.sign(rewards[frame - 3 : frame + 1].sum())
            assert not terminated and not truncated and "episode" not in info
        _, _, terminated, _, info = env.step(2)  # frame 94 ends it, one of four
        assert terminated and info["episode_frame_number"] == 94
        assert info["episode"]["r"] == rewards[6:95].sum() and info["episode"]["l"] == 23
        assert env.unwrapped.pressed == np.repeat(np.arange(23) % 4, 4).tolist()[: 94 - 5]

    env = game("Pong")
    _, info = env.reset(seed=1)
    for _ in range(5):
        frame, (_, _, _, _, info) = info["episode_frame_number"], env.step(0)
        assert info["episode_frame_number"] == frame + 4


def test_detail_16_episodic_life(script, game):
    """Fails without the wrapper, or when a lost life resets the emulator.

    Also when 0 lives or a bonus life end an episode: at 0 lives, some games (Qbert) go on for a few
    frames; only the emulator says when they are over.
    """
    env = script(over=129, noops=1, lives={0: 2, 20: 3, 40: 2, 60: 1, 100: 0})
    for played in range(2):
        _, info = env.reset()
        assert info["episode_frame_number"] == 1
        ends = []
        while "episode" not in info:
            _, _, terminated, _, info = env.step(2)
            if terminated:
                ends.append(info["episode_frame_number"])
                if "episode" not in info:
                    frame = info["episode_frame_number"]
                    _, info = env.reset()
                    assert info["episode_frame_number"] == frame + 4  # one step of NOOP
                    assert env.unwrapped.pressed[-4:] == [0] * 4
        assert ends == [41, 61, 129]
        assert env.unwrapped.resets == played + 1

    env = game("Breakout")
    _, info = env.reset(seed=1)
    env.action_space.seed(1)
    ended_with = []
    while "episode" not in info:
        lives, frame = info["lives"], info["episode_frame_number"]
        _, _, terminated, _, info = env.step(env.action_space.sample())
        assert info["episode_frame_number"] == frame + 4 or terminated
        assert terminated == (info["lives"] < lives)
        if terminated:
            ended_with.append(info["lives"])
            frame = info["episode_frame_number"]
            if "episode" not in info:
                _, info = env.reset()
                assert info["episode_frame_number"] == frame + 12  # steps of NOOP, 1 and 2
    assert ended_with == [4, 3, 2, 1, 0]
    _, info = env.reset()
    assert info["episode_frame_number"] <= 30 + 8 and info["lives"] == 5


def test_detail_17_fire_reset(game):
    """Fails without FireResetEnv, without its second button, or if games without FIRE get it."""
    env = game("Breakout")
    _, info = env.reset(seed=1)
    noops = info["episode_frame_number"] - 8
    assert 1 <= noops <= 30
    assert env.unwrapped.pressed == [0] * noops + [1] * 4 + [2] * 4
    for _ in range(200):
        if env.step(3)[2]:
            break
    env.unwrapped.pressed.clear()
    env.reset()  # after a life
    assert env.unwrapped.pressed == [0] * 4 + [1] * 4 + [2] * 4
    for name in ("MsPacman", "Freeway"):  # their button 1 is UP
        env = game(name)
        _, info = env.reset(seed=1)
        assert env.unwrapped.pressed == [0] * info["episode_frame_number"]


def warped(screen: np.ndarray) -> np.ndarray:
    """[210, 160, 3] -> [84, 84] luminance, each pixel the mean of what it covers, by area."""
    luminance = (screen @ np.array([0.299, 0.587, 0.114])).round()

    def overlaps(size: int) -> np.ndarray:  # [84, size]; each row sums to 1
        low, high = np.arange(84)[:, None] * size / 84, np.arange(1, 85)[:, None] * size / 84
        pixel = np.arange(size)
        return np.clip(np.minimum(high, pixel + 1) - np.maximum(low, pixel), 0, 1) * 84 / size

    return overlaps(210) @ luminance @ overlaps(160).T


def test_detail_18_warp_frame(ppo_atari, game):
    """Fails with other weights or another order of the colours, another size or interpolation."""
    env = game("MsPacman")  # colourful, and its first observation is the screen as it is
    assert env.observation_space == SPACES[0]
    obs, _ = env.reset(seed=1)
    assert obs.shape == (4, 84, 84) and obs.dtype == np.uint8
    assert np.abs(obs[-1] - warped(env.unwrapped.ale.getScreenRGB())).max() <= 1
    noise = np.random.default_rng(0).integers(0, 256, (210, 160, 3), np.uint8)
    image = ppo_atari.warp(noise)
    assert image.shape == (84, 84) and image.dtype == np.uint8
    assert np.abs(image - warped(noise)).max() <= 1


def test_detail_19_clip_reward(script, game):
    """Fails without the sign, when it is each frame's, or when episodes log clipped rewards."""
    rewards = np.random.default_rng(2).choice([-30.0, -0.5, 0.0, 0.0, 0.0, 10.0, 400.0], 1000)
    env = script(over=402, noops=2, rewards=rewards)
    env.reset()
    learned = []
    for step in range(100):
        _, reward, _, _, info = env.step(0)
        assert reward == np.sign(rewards[3 + 4 * step : 7 + 4 * step].sum())
        learned.append(float(reward))
    assert set(learned) == {-1.0, 0.0, 1.0}
    assert info["episode"]["r"] == rewards[3:403].sum()

    env = game("MsPacman")
    step, raw = env.unwrapped.step, []
    env.unwrapped.step = lambda action: (result := step(action), raw.append(result[1]))[0]
    env.reset(seed=1)
    env.action_space.seed(1)
    for _ in range(120):
        raw.clear()
        _, reward, over, _, _ = env.step(env.action_space.sample())
        assert reward == min(sum(raw), 1.0)
        learned.append(sum(raw))
        if over:
            env.reset()
    assert 10.0 in learned


def test_detail_20_frame_stack(script):
    """Fails with another number or order of frames, or with zeros or old frames after a reset."""
    env = script(over=64, noops=4, lives={0: 2, 32: 1})
    obs, info = env.reset()
    expected = [LEVELS[4].tolist()] * 4
    assert shown(obs) == expected
    for _ in range(15):
        previous, kept = obs, obs.copy()
        obs, _, terminated, _, info = env.step(1)
        expected = [*expected[1:], corners(info["episode_frame_number"])]
        assert shown(obs) == expected
        np.testing.assert_array_equal(previous, kept)  # no view of what goes on changing
        if terminated and "episode" not in info:
            obs, info = env.reset()
            expected = [corners(info["episode_frame_number"])] * 4
            assert shown(obs) == expected
        elif terminated:
            break
    assert info["episode_frame_number"] == 64
    assert shown(env.reset()[0]) == [LEVELS[4].tolist()] * 4


def make_agent(ppo_atari):
    """An agent whose actions differ in probability, and whose biases matter."""
    agent = ppo_atari.Agent(*SPACES)
    nn.init.orthogonal_(agent.actor.weight)
    for name, parameter in agent.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return agent


def by_hand(agent, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """images [B, 4, 84, 84] from 0 to 1 -> log-probabilities [B, A], values [B], in their dtype."""
    x, weights = (
        images.contiguous(),
        {name: w.to(images.dtype) for name, w in agent.state_dict().items()},
    )
    for layer, stride in ((0, 4), (2, 2), (4, 1)):
        weight, bias = (
            weights[f"network.{layer}.{kind}"].contiguous() for kind in ("weight", "bias")
        )
        x = F.conv2d(x, weight, bias, stride).clamp(min=0)
    x = (x.reshape(len(x), -1) @ weights["network.7.weight"].T + weights["network.7.bias"]).clamp(
        min=0
    )
    logits = x @ weights["actor.weight"].T + weights["actor.bias"]
    return logits.log_softmax(-1), (x @ weights["critic.weight"].T + weights["critic.bias"])[:, 0]


def test_detail_21_shared_nature_cnn(ppo_atari):
    """Fails with another layer, stride, activation or order of pixels, or with two trunks."""
    agent = make_agent(ppo_atari)
    assert {name: tuple(parameter.shape) for name, parameter in agent.named_parameters()} == {
        "network.0.weight": (32, 4, 8, 8),
        "network.0.bias": (32,),
        "network.2.weight": (64, 32, 4, 4),
        "network.2.bias": (64,),
        "network.4.weight": (64, 64, 3, 3),
        "network.4.bias": (64,),
        "network.7.weight": (512, 3136),
        "network.7.bias": (512,),
        "actor.weight": (4, 512),
        "actor.bias": (4,),
        "critic.weight": (1, 512),
        "critic.bias": (1,),
    }
    obs = torch.randint(0, 256, (16, *SPACES[0].shape), dtype=torch.uint8)
    distribution, value = agent(obs)
    logprobs, values = by_hand(agent, obs.float() / 255)
    assert logprobs.std() > 0.05
    torch.testing.assert_close(distribution.logprobs, logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(value, values, rtol=0, atol=1e-5)
    trunk = list(agent.network.parameters())
    for output in (distribution.logprobs[:, 0].sum(), value.sum()):
        assert all(
            gradient.any() for gradient in torch.autograd.grad(output, trunk, retain_graph=True)
        )


def test_detail_22_scaling_images(ppo_atari):
    """Fails without the division, with another, when uint8 wraps around, or for floats alone."""
    agent = make_agent(ppo_atari)
    obs = torch.randint(0, 256, (5, *SPACES[0].shape), dtype=torch.uint8)
    obs[0], obs[1] = 255, 0
    seen = []
    agent.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    distribution, value = agent(obs)
    assert seen[0].dtype == torch.float32
    assert (seen[0][0] == 1).all() and (seen[0][1] == 0).all()
    torch.testing.assert_close(seen[0].double(), obs.double() / 255, rtol=0, atol=1e-7)
    floats = obs.to(torch.float32, memory_format=torch.channels_last)
    of_floats, value_of_floats = agent(floats)
    assert torch.equal(floats, obs.float())  # left as they were
    assert torch.equal(distribution.logprobs, of_floats.logprobs) and torch.equal(
        value, value_of_floats
    )
    logprobs, values = by_hand(agent, obs.double() / 255)
    torch.testing.assert_close(distribution.logprobs.double(), logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(value.double(), values, rtol=0, atol=1e-5)


def test_orthogonal_weights(ppo_atari):
    """Fails with another gain, or without orthogonal_ or zeros_ (detail 2).

    W W^T or W^T W is gain^2 times the identity.
    """
    agent = ppo_atari.Agent(*SPACES)
    layers = [layer for layer in agent.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for layer, gain in zip(layers, [math.sqrt(2)] * 4 + [0.01, 1.0], strict=True):
        weight = layer.weight.detach().flatten(1).double()
        gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
        identity = torch.eye(len(gram), dtype=gram.dtype)
        torch.testing.assert_close(gram, gain**2 * identity, rtol=0, atol=1e-5 * gain**2)
        assert not layer.bias.any()


def test_defaults_are_those_of_baselines(ppo_atari):
    """Fails when a default is not what baselines/ppo2/defaults.py and run.py take for Atari."""
    args = ppo_atari.Args()
    assert (args.num_envs, args.num_steps, args.num_minibatches, args.update_epochs) == (
        8,
        128,
        4,
        4,
    )
    assert (args.learning_rate, args.anneal_lr, args.clip_coef, args.anneal_clip) == (
        2.5e-4,
        True,
        0.1,
        False,
    )
    assert (args.gamma, args.gae_lambda, args.ent_coef, args.vf_coef) == (0.99, 0.95, 0.01, 0.5)
    assert (args.max_grad_norm, args.norm_adv, args.clip_vloss, args.target_kl) == (
        0.5,
        True,
        True,
        None,
    )
    assert args.total_timesteps == 10_000_000 and not args.bootstrap_truncated


def test_observations_stay_uint8(ppo_atari, breakout):
    """Fails when images are kept as float32: a rollout would take four times the memory."""
    _, _, calls = breakout
    assert len(calls) == 3 * 4
    for call in calls:
        assert call["mb"]["obs"].dtype == torch.uint8
        assert call["mb"]["obs"].shape == (160, 4, 84, 84)
        assert call["mb"]["obs"].max() > 100  # the bricks
    envs = ppo_atari.make_envs(ppo_atari.Args(**SMALL))
    obs, _ = envs.reset(seed=1)
    assert envs.single_observation_space.dtype == obs.dtype == np.uint8
    assert obs.shape == (2, 4, 84, 84)
    envs.close()


def test_first_minibatch_has_ratio_one(breakout):
    """Fails when the update's observations or log-probabilities are not the acting policy's."""
    _, _, calls = breakout
    for call in (calls[0], calls[4]):
        with torch.no_grad():
            distribution, value = call["before"](call["mb"]["obs"])
        ratio = (distribution.log_prob(call["mb"]["actions"]) - call["mb"]["logprobs"]).exp()
        assert (ratio - 1).abs().max() < 1e-6
        torch.testing.assert_close(value, call["mb"]["values"], rtol=0, atol=1e-5)


def test_games_are_logged_not_lives(ppo_atari, breakout, script, tmp_path):
    """Fails when lives or clipped rewards are logged, or but one of the games that end at once."""
    run_dir, games, _ = breakout
    returns, lengths = (
        scalars(run_dir, f"charts/episodic_{name}") for name in ("return", "length")
    )
    assert len(games) >= 4
    assert all(game["lives"] == [5, 4, 3, 2, 1, 0] for game in games)
    assert [value for _, value in returns] == [game["return"] for game in games]
    # FIRE comes after them
    noops = [next(i for i, action in enumerate(game["pressed"]) if action) for game in games]
    expected = [math.ceil((game["frames"] - n) / 4) for game, n in zip(games, noops, strict=True)]
    assert [value for _, value in lengths] == expected
    assert load(run_dir)["recent_returns"] == [game["return"] for game in games]

    # games 1 and 3 take 10 steps; 0 and 2 take 21, one of them in a reset: they lose a life just
    # when the others end
    def over(self):
        return 43 if self.number % 2 else 87

    def rewards(self):
        return np.full(100, 1.0 + self.number)

    script(over=property(over), rewards=property(rewards), noops=3, lives={0: 2, 40: 1})
    run_dir = train(
        ppo_atari, tmp_path, env_id="ScriptNoFrameskip-v4", num_envs=4, total_timesteps=4 * 24
    )
    long, short = (84 * 1.0, 84 * 3.0), (40 * 2.0, 40 * 4.0)
    expected = [
        (38, short[0]),
        (40, short[1]),
        (77, long[0]),
        (78, short[0]),
        (79, long[1]),
        (80, short[1]),
    ]
    assert scalars(run_dir, "charts/episodic_return") == expected
    assert [value for _, value in scalars(run_dir, "charts/episodic_length")] == [
        10,
        10,
        21,
        10,
        21,
        10,
    ]
    assert load(run_dir)["recent_returns"] == [value for _, value in expected]


@pytest.mark.parametrize("bootstrap", [False, True])
def test_bootstrap_truncated(ppo_atari, script, tmp_path, monkeypatch, bootstrap):
    """Fails without the value, without gamma, or when lives and real ends of a game get it too."""
    observed, seen, compute_gae, act = [], [], ppo_atari.compute_gae, ppo_atari.Agent.act
    agents = []

    def spy_gae(rewards, values, dones, *rest):
        seen.append((rewards.copy(), dones.copy()))
        return compute_gae(rewards, values, dones, *rest)

    def spy_act(agent, obs):
        agents.append(copy.deepcopy(agent))
        observed.append(obs.clone())
        return act(agent, obs)

    monkeypatch.setattr(ppo_atari, "compute_gae", spy_gae)
    monkeypatch.setattr(ppo_atari.Agent, "act", spy_act)
    rewards = np.random.default_rng(3).integers(-2, 3, 100)
    for truncates in (False, True):
        folder = tmp_path / str(truncates)
        folder.mkdir()
        script(over=22, truncates=truncates, rewards=rewards, noops=2, lives={0: 2, 7: 1})
        observed.clear()
        sizes = dict(num_steps=7, total_timesteps=14, gamma=0.9, bootstrap_truncated=bootstrap)
        run_dir = train(ppo_atari, folder, env_id="ScriptNoFrameskip-v4", **sizes)
        got, dones = seen.pop()
        # frames that the steps end with: 6, 10 (a life; the reset plays to 14), 18, 22 (over;
        # starts anew at 2), ...
        ends = np.array([6, 10, 18, 22, 6, 10, 18])
        expected = np.repeat(
            [[np.sign(rewards[end - 3 : end + 1].sum())] for end in ends], 2, 1
        ).astype(float)
        assert dones[:, 0].tolist() == dones[:, 1].tolist() == [end in (10, 22) for end in ends]
        if truncates and bootstrap:
            final = torch.empty(2, 1, 84, 84)
            final[..., :42], final[..., 42:] = corners(22)
            final_obs = torch.cat([observed[3][:, 1:].float(), final], 1)
            with torch.inference_mode():
                values = agents[-1](final_obs)[1].numpy()
            assert np.abs(values).min() > 0.01
            expected[3] += 0.9 * values
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
        total = rewards[3:23].sum()
        assert scalars(run_dir, "charts/episodic_return") == [(7, total), (8, total)]


def test_games_are_cut_at_108000_frames(ppo_atari, game, monkeypatch):
    """Fails when the time limit is dropped or taken for a real end, or its game is not logged."""
    env = game("Breakout")
    assert env.unwrapped.spec.kwargs["max_num_frames_per_episode"] == 108_000
    kwargs = gym.registry["BreakoutNoFrameskip-v4"].kwargs
    monkeypatch.setitem(kwargs, "max_num_frames_per_episode", 100)
    env = game("Breakout")
    _, info = env.reset(seed=1)
    truncated = False
    while not truncated:
        _, _, terminated, truncated, info = env.step(0)
        assert not terminated and ("episode" in info) == truncated
    assert info["episode_frame_number"] == 100 and info["lives"] == 5
    _, info = env.reset()
    assert info["episode_frame_number"] <= 30 + 8


def test_same_seed_same_weights(ppo_atari, tmp_path, monkeypatch):
    """Fails when anything random is not seeded, or when the seed is not used."""
    from ale_py.env import AtariEnv

    agents, seeds, reset = [], [], AtariEnv.reset

    def spy_reset(env, **kwargs):
        seeds.append(kwargs.get("seed"))
        return reset(env, **kwargs)

    monkeypatch.setattr(AtariEnv, "reset", spy_reset)
    torch.set_num_threads(2)
    try:
        for name, seed in (("first", 1), ("second", 1), ("other", 2)):
            (tmp_path / name).mkdir()
            torch.manual_seed(len(agents))  # main must not depend on what was before it
            np.random.seed(len(agents))
            sizes = dict(num_steps=12, num_minibatches=2, total_timesteps=2 * 24, seed=seed)
            agents.append(load(train(ppo_atari, tmp_path / name, **sizes))["agent"])
    finally:
        torch.set_num_threads(1)
    first, second, other = agents
    assert all(torch.equal(first[name], second[name]) for name in first)
    # updates move them by 0.001
    assert (first["network.0.weight"] - other["network.0.weight"]).abs().max() > 0.01
    seeds = [seed for seed in seeds if seed is not None]
    assert len(seeds) == 6 and seeds[:2] == seeds[2:4] and len(set(seeds)) == 4


def test_stop_and_resume(ppo_atari, tmp_path, monkeypatch):
    """Fails when Ctrl-C loses the iteration, or when a resumed run begins anew."""
    sizes = ["--num-envs", 2, "--num-steps", 8, "--num-minibatches", 1, "--update-epochs", 1]
    process = start(
        "ppo_atari.py", *sizes, "--checkpoint-interval", 1, "--learning-rate", 1e-3, cwd=tmp_path
    )
    wait_for_checkpoint(process, tmp_path)
    run_dir = run_dir_of(tmp_path)
    wait_until(lambda: load(run_dir)["iteration"] >= 1 or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert f"--resume runs/{run_dir.name}" in stdout
    stopped = load(run_dir)
    done = stopped["iteration"]
    assert [step for step, _ in scalars(run_dir, "losses/value_loss")] == [
        16 * (i + 1) for i in range(done)
    ]

    args = stopped["args"] | {"resume": str(run_dir), "total_timesteps": 16 * (done + 2)}
    began_with, train_step = [], ppo_atari.train_step

    def spy(agent, *rest):
        began_with.append(copy.deepcopy(agent.state_dict()))
        return train_step(agent, *rest)

    monkeypatch.setattr(ppo_atari, "train_step", spy)
    assert train(ppo_atari, tmp_path, **args) == run_dir
    assert all(
        torch.equal(began_with[0][name], weight) for name, weight in stopped["agent"].items()
    )
    resumed = load(run_dir)
    assert resumed["iteration"] == done + 2
    assert [step for step, _ in scalars(run_dir, "losses/value_loss")] == [
        16 * (i + 1) for i in range(done + 2)
    ]
    assert {int(state["step"]) for state in resumed["optimizer"]["state"].values()} == {done + 2}


def moving_pictures(path: Path) -> int:
    """Checks that a video shows a game that moves -> its number of pictures, give or take 1."""
    pictures, moves, first = 0, False, None
    with VideoFileClip(str(path)) as clip:
        for picture in clip.iter_frames():
            assert picture.shape == (210, 160, 3)
            first = picture.copy() if first is None else first
            moves |= bool((picture != first).any())
            pictures += 1
    assert moves
    return pictures


def test_evaluation_plays_whole_games(ppo_atari, breakout, evaluate, tmp_path):
    """Fails when evaluate.py counts lives or clipped rewards, or does not film the game."""
    run_dir, _, _ = breakout
    with games_played() as games:
        returns = evaluate(run_dir, episodes=3, capture_video=True)
    assert [game["lives"] for game in games] == [[5, 4, 3, 2, 1, 0]] * 3
    assert returns == [game["return"] for game in games]
    for i, game in enumerate(games):
        video = run_dir / "evaluation" / f"rl-video-episode-{i}.mp4"
        assert abs(moving_pictures(video) - game["frames"] - 1) <= 1

    run_dir = train(ppo_atari, tmp_path, env_id="MsPacmanNoFrameskip-v4", total_timesteps=16)
    with games_played() as games:
        (score,) = evaluate(run_dir, episodes=1)
    assert score == games[0]["return"] >= 60 and score % 10 == 0
    assert games[0]["lives"] == [3, 2, 1, 0]


def test_video_is_playable(breakout):
    """Fails without RecordVideo, when nothing moves, or when it leaves out frames of the game."""
    run_dir, games, _ = breakout
    first = run_dir / "videos" / "from-step-0" / "rl-video-episode-0.mp4"
    filmed = next(game for game in games if game["env"] == 0)
    assert abs(moving_pictures(first) - filmed["frames"] - 1) <= 1


def refused(ppo_atari, capsys, folder: Path, *args: str) -> str:
    """Gives main that command line, checks that it refuses as it should -> its one line."""
    with pytest.raises(SystemExit) as end:
        ppo_atari.main(tyro.cli(ppo_atari.Args, args=["--total-timesteps", "1024", *args]))
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert not any(folder.iterdir())
    (line,) = err.splitlines()
    assert line.startswith("ppo_atari.py: ")
    return line


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--env-id", "CartPole-v1"], ["CartPole-v1", "BreakoutNoFrameskip-v4"]),
        (["--env-id", "ALE/Breakout-v5"], ["ALE/Breakout-v5", "BreakoutNoFrameskip-v4"]),
        (
            ["--gym-id", "BreakotNoFrameskip-v4"],
            ["BreakotNoFrameskip", "Did you mean: `BreakoutNoFrameskip`"],
        ),
        (["--num-minibatches", "3"], ["--num-minibatches 3", "divide", "1024"]),
    ],
    ids=" ".join,
)
def test_refusals(ppo_atari, capsys, tmp_path, args, words):
    """Each fails when its check is taken out: the run starts, or a traceback appears."""
    capsys.readouterr()
    line = refused(ppo_atari, capsys, tmp_path, *args)
    for word in words:
        assert word in line


def test_refusal_without_ale_py_comes_with_the_pip_command(tmp_path):
    """Fails when ImportError is let through."""
    (tmp_path / "without" / "ale_py").mkdir(parents=True)
    (tmp_path / "without" / "ale_py" / "__init__.py").write_text(
        "raise ImportError('No module named ale_py')"
    )
    (tmp_path / "empty").mkdir()
    result = run("ppo_atari.py", cwd=tmp_path / "empty", PYTHONPATH=str(tmp_path / "without"))
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert (
        line.startswith("ppo_atari.py: ")
        and "ale_py" in line
        and 'pip install -e ".[atari]"' in line
    )
    assert not any((tmp_path / "empty").iterdir())
