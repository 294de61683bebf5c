"""ppo_atari_envpool.py and ppo_procgen.py: what is no experience is left out; games are whole.

Loss, advantages, optimizer and checkpoints are ppo.py's, and tested there.
"""

import copy
import functools
import importlib
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from conftest import interrupted, load, run, scalars, train_in
from moviepy import VideoFileClip
from torch import nn
from torch.nn import functional as F

import ppo_procgen  # before EnvPool, which looks for Qt 5 but once

SCRIPTS = ("ppo_atari_envpool", "ppo_procgen")
SPACES = {"ppo_atari_envpool": (4, 84, 84), "ppo_procgen": (3, 64, 64)}
SMALL = dict(num_envs=3, num_steps=8, num_minibatches=2, update_epochs=2, total_timesteps=3 * 3 * 8)
train = functools.partial(train_in, **SMALL)


@pytest.fixture(params=SCRIPTS)
def script(request):
    """The module, one after the other."""
    torch.manual_seed(0)
    return importlib.import_module(request.param)


class Engine:
    """EnvPool, playing as told: environment i has episodes of plans[i], in turn, for ever.

    plans[i] holds (length, end) of each. Every observation bears its environment and its row in its
    first two pixels; what an episode ended with, the shade `final` everywhere else. The step after
    an end only resets, as EnvPool's do.
    """

    plans = (
        ((3, "life"), (4, "over")),
        ((7, "over"), (9, "over")),
        ((5, "cut"), (2, "life"), (6, "over")),
    )
    final = 0

    def __init__(self, name: str):
        self.atari, self.shape = name == "ppo_atari_envpool", SPACES[name]
        self.rewards = np.random.default_rng(5).integers(-3, 5, (1000, 3))
        self.row, self.episodes = -1, [itertools.cycle(plan) for plan in self.plans]
        self.left, self.ends = [0] * 3, [""] * 3

    def reset(self):
        return self.step(None)[0], {}

    def step(self, actions):
        self.row += 1
        obs = np.random.default_rng(self.row).integers(0, 256, (3, *self.shape), np.uint8)
        over, life, cut = np.zeros((3, 3), bool)
        rewards = np.zeros(3, np.float32)
        for i in range(3):
            if self.left[i]:
                self.left[i] -= 1
                rewards[i] = self.rewards[self.row, i]
            else:
                self.left[i], self.ends[i] = next(self.episodes[i])
            if not self.left[i]:
                over[i], life[i], cut[i] = (self.ends[i] == end for end in ("over", "life", "cut"))
                obs[i] = self.final
            obs[i, 0, 0, :2] = i, self.row
        terminated = over | life
        infos = {"reward": rewards.copy(), "terminated": over.astype(np.int32)}
        return obs, np.sign(rewards) if self.atari else rewards, terminated, cut, infos

    def render(self):
        return np.full((1, 32, 32, 3), self.row, np.uint8)

    def close(self):
        pass


def rows(plan, number: int) -> list[tuple[bool, str]]:
    """First rows of an environment with that plan -> (is experience, how it ends the episode)."""
    every = itertools.chain.from_iterable(
        [(True, "")] * (length - 1) + [(True, end), (False, "")]
        for length, end in itertools.cycle(plan)
    )
    return list(itertools.islice(every, number))


@pytest.fixture
def scripted(script, monkeypatch):
    """EnvPool replaced by Engine -> a class whose attributes can be set."""
    import envpool

    class Changed(Engine):
        pass

    shape = SPACES[script.__name__]
    spec = SimpleNamespace(
        gymnasium_observation_space=gym.spaces.Box(0, 255, shape, np.uint8),
        gymnasium_action_space=gym.spaces.Discrete(4),
    )
    monkeypatch.setattr(envpool, "make_spec", lambda env_id: spec)
    monkeypatch.setattr(
        envpool, "make_gymnasium", lambda env_id, **options: Changed(script.__name__)
    )
    return Changed


@pytest.fixture
def spied(script, monkeypatch):
    """-> lists that fill as main runs: what train_step, compute_gae and act are given."""
    calls = SimpleNamespace(minibatches=[], gae=[], agents=[], observed=[])
    train_step, compute_gae, act = script.train_step, script.compute_gae, script.Agent.act

    def spy_train(agent, optimizer, mb, args):
        calls.minibatches.append({"before": copy.deepcopy(agent), **mb})
        return train_step(agent, optimizer, mb, args)

    def spy_gae(rewards, values, dones, next_value, *rest):
        advantages, returns = compute_gae(rewards, values, dones, next_value, *rest)
        calls.gae.append(
            {
                "rewards": rewards.copy(),
                "values": values.copy(),
                "dones": dones.copy(),
                "returns": returns,
            }
        )
        return advantages, returns

    def spy_act(agent, obs):
        calls.observed.append(obs.clone())
        calls.agents.append(copy.deepcopy(agent))
        return act(agent, obs)

    monkeypatch.setattr(script, "train_step", spy_train)
    monkeypatch.setattr(script, "compute_gae", spy_gae)
    monkeypatch.setattr(script.Agent, "act", spy_act)
    return calls


def identity(obs: torch.Tensor) -> list[tuple[int, int]]:
    """obs [M, ...] of Engine -> (environment, row) of each."""
    return [tuple(pixels) for pixels in obs[:, 0, 0, :2].tolist()]


def test_every_experience_once_an_epoch_and_nothing_else(script, scripted, spied, tmp_path):
    """Fails when a row that only resets, even a first one, is learned, or experience is lost."""
    train(script, tmp_path)
    plans = [rows(plan, 24) for plan in Engine.plans]
    assert not plans[1][7][0] and not plans[0][8][0]  # the rollout's last row; the next one's first
    epochs = [spied.minibatches[i : i + 2] for i in range(0, 12, 2)]
    assert len(spied.minibatches) == 12
    orders = []
    for number, epoch in enumerate(epochs):
        rollout = range(8 * (number // 2), 8 * (number // 2) + 8)
        expected = [(i, t) for i in range(3) for t in rollout if plans[i][t][0]]
        learned = [identity(mb["obs"]) for mb in epoch]
        drawn = sum(learned, [])
        assert sorted(set(drawn)) == expected
        # As many as there are rows, and no experience is drawn more often than it must be
        assert len(learned[0]) == len(learned[1]) == 12 and len(expected) < 24
        assert drawn[len(expected) :] == drawn[: 24 - len(expected)]
        orders.append(sum(learned, []))
    in_time = [sorted(order, key=lambda row: row[::-1]) for order in orders]
    assert orders[0] != orders[1] and all(
        order not in (sorted(order), in_time[i]) for i, order in enumerate(orders)
    )
    for rollout, gae in enumerate(spied.gae):
        dones = [[bool(plans[i][8 * rollout + t][1]) for i in range(3)] for t in range(8)]
        assert gae["dones"].tolist() == dones


def run_with(script, scripted, tmp_path, final: int, **args):
    """Weights and logged losses of a run in which episodes end with that shade."""
    scripted.final = final
    run_dir = train(
        script, tmp_path / str(len(list(tmp_path.iterdir()))), learning_rate=0.01, **args
    )
    names = (
        "policy_loss",
        "value_loss",
        "entropy",
        "approx_kl",
        "old_approx_kl",
        "clipfrac",
        "explained_variance",
    )
    return load(run_dir)["agent"], {name: scalars(run_dir, f"losses/{name}") for name in names}


def test_what_is_no_experience_changes_nothing(script, scripted, tmp_path, monkeypatch):
    """Fails when rows that only reset have a part in losses, normalisation or statistics.

    The statistics are KL, clip fraction and explained variance. Those rows' observations are black
    in one run and white in the other. The second half shows that it would matter.
    """
    (black, losses), (white, other_losses) = (
        run_with(script, scripted, tmp_path, final) for final in (0, 255)
    )
    assert all(torch.equal(black[name], white[name]) for name in black)
    assert losses == other_losses

    step = script.Games.step

    def all_valid(games, actions):
        obs, rewards, terminated, truncated, infos = step(games, actions)
        return obs, rewards, terminated, truncated, infos | {"valid": np.ones(3, bool)}

    monkeypatch.setattr(script.Games, "step", all_valid)
    (black, losses), (white, other_losses) = (
        run_with(script, scripted, tmp_path, final) for final in (0, 255)
    )
    assert any((black[name] - white[name]).abs().max() > 1e-4 for name in black)
    assert all(losses[name] != other_losses[name] for name in losses)


def test_explained_variance_is_that_of_experience(script, scripted, spied, tmp_path):
    """Fails when explained variance counts the rows that only reset."""
    run_dir = train(script, tmp_path)
    valid = np.array([[experience for experience, _ in rows(plan, 24)] for plan in Engine.plans]).T
    for (_, logged), gae, rollout in zip(
        scalars(run_dir, "losses/explained_variance"),
        spied.gae,
        valid.reshape(3, 8, 3),
        strict=True,
    ):
        returns, values = gae["returns"][rollout], gae["values"][rollout]
        assert logged == pytest.approx(1 - np.var(returns - values) / np.var(returns), abs=1e-5)


def test_first_minibatch_has_ratio_one(script, scripted, spied, tmp_path):
    """Fails when the update's observations or log-probabilities are not the acting policy's."""
    train(script, tmp_path)
    for mb in spied.minibatches[::4]:
        with torch.no_grad():
            distribution, value = mb["before"](mb["obs"])
        assert (
            (distribution.log_prob(mb["actions"]) - mb["logprobs"]).exp() - 1
        ).abs().max() < 1e-6
        torch.testing.assert_close(value, mb["values"], rtol=0, atol=1e-5)


def test_whole_games_are_logged_with_raw_rewards(script, scripted, tmp_path):
    """Fails when lives, clipped or scaled rewards or rows that reset count, or a game is lost."""
    run_dir = train(script, tmp_path)
    rewards, expected = Engine(script.__name__).rewards, []
    ends = {"over", "cut"} if "atari" in script.__name__ else {"over", "cut", "life"}
    totals, lengths = np.zeros(3), np.zeros(3)
    for t in range(24):
        for i, plan in enumerate(Engine.plans):
            experience, end = rows(plan, 24)[t]
            totals[i] += experience * rewards[t + 1, i]  # Engine's row 0 is the reset
            lengths[i] += experience
            if end in ends:
                expected.append((3 * t + i + 1, totals[i], lengths[i]))
                totals[i] = lengths[i] = 0
    steps = [(step, value) for step, value in scalars(run_dir, "charts/episodic_return")]
    assert steps == [(step, total) for step, total, _ in expected]
    assert [value for _, value in scalars(run_dir, "charts/episodic_length")] == [
        length for *_, length in expected
    ]
    assert load(run_dir)["recent_returns"] == [total for _, total, _ in expected]


def test_bootstrap_truncated(script, scripted, spied, tmp_path):
    """Fails without the final observation's value or gamma, or when lives and real ends get it.

    The cut at row 4 is followed by a row of the same rollout, the one of row 7 by the next
    rollout's first.
    """
    scripted.plans = (
        ((5, "cut"), (2, "life"), (6, "over")),
        ((8, "cut"), (4, "over")),
        ((8, "over"),),
    )
    scripted.final = 77
    for bootstrap in (False, True):
        args = dict(gamma=0.9, bootstrap_truncated=bootstrap, total_timesteps=24)
        train(script, tmp_path / str(bootstrap), **args)
    final_obs = torch.full((2, *SPACES[script.__name__]), 77, dtype=torch.uint8)
    final_obs[:, 0, 0, :2] = torch.tensor([[0, 5], [1, 8]])
    with torch.no_grad():
        values = spied.agents[0](final_obs)[1].numpy()
    assert np.abs(values).min() > 1e-3
    bonus = np.zeros((8, 3))
    bonus[[4, 7], [0, 1]] = 0.9 * values
    without_value, with_value = (gae["rewards"] for gae in spied.gae)
    np.testing.assert_allclose(with_value - without_value, bonus, rtol=0, atol=1e-5)
    if "atari" in script.__name__:
        rewards = np.sign(Engine(script.__name__).rewards[1:9])
        rewards[5, 0] = 0  # the reset
        assert (without_value == rewards).all()


def test_procgen_rewards_are_scaled_as_by_baselines():
    """Fails without scaling or clipping, with another epsilon, or when a return does not restart.

    Details 30 and 31.
    """
    with np.load(Path(__file__).parent / "reference" / "vecnormalize.npz") as file:
        for case in ("n1", "n4"):
            reference = {
                name.removeprefix(f"{case}/"): file[name]
                for name in file.files
                if name.startswith(case)
            }
            played = zip(reference["raw_rew"], reference["dones"].astype(bool), strict=True)
            n = reference["raw_rew"].shape[1]

            class Recorded(gym.vector.VectorEnv):
                num_envs = n

                def reset(self, **kwargs):
                    return None, {}

                def step(self, actions, played=played):
                    rewards, dones = next(played)
                    return (
                        None,
                        rewards,
                        dones,
                        np.zeros_like(dones),
                        {"valid": np.ones(len(dones), bool)},
                    )

            envs = ppo_procgen.ScaleRewards(Recorded(), 0.99)
            envs.reset()
            for expected in reference["norm_rew"]:
                np.testing.assert_allclose(envs.step(None)[1], expected, rtol=1e-6)
    clipped = np.abs(reference["norm_rew"]).max()
    assert clipped == 10


def test_procgen_statistics_are_those_of_experience(scripted_procgen, tmp_path):
    """Fails when rows that only reset count, or when statistics are not saved or not restored.

    Or when the returns by which rewards are scaled are discounted by PPO's gamma.
    """
    run_dir = train(ppo_procgen, tmp_path, gamma=0.9)
    rewards = Engine("ppo_procgen").rewards
    discounted, seen = np.zeros(3), []
    plans = [rows(plan, 24) for plan in Engine.plans]
    for t in range(24):
        experience = np.array([plan[t][0] for plan in plans])
        discounted = discounted * 0.99 + rewards[t + 1] * experience
        seen.extend(discounted[experience])
        discounted[[bool(plan[t][1]) for plan in plans]] = 0
    mean, var, count = load(run_dir)["envs"]["return"].values()
    assert count == pytest.approx(len(seen) + 1e-4)
    assert (mean, var) == (
        pytest.approx(np.mean(seen), abs=1e-3),
        pytest.approx(np.var(seen), rel=1e-3),
    )
    args = load(run_dir)["args"] | {"resume": str(run_dir), "total_timesteps": 4 * 24}
    train(ppo_procgen, tmp_path, **args)
    assert load(run_dir)["envs"]["return"]["count"] > count + 15


@pytest.fixture
def scripted_procgen(monkeypatch):
    import envpool

    spec = SimpleNamespace(
        gymnasium_observation_space=gym.spaces.Box(0, 255, SPACES["ppo_procgen"], np.uint8),
        gymnasium_action_space=gym.spaces.Discrete(4),
    )
    monkeypatch.setattr(envpool, "make_spec", lambda env_id: spec)
    monkeypatch.setattr(envpool, "make_gymnasium", lambda env_id, **options: Engine("ppo_procgen"))


def test_film_of_environment_0(script, scripted, tmp_path, monkeypatch):
    """Fails when no or other frames are filmed, or an unfinished game is lost.

    Other frames are another environment's, or another game's.
    """
    films = {}

    def spy(frames, folder, episode_trigger, episode_index, fps):
        assert episode_trigger(episode_index) and folder.endswith("videos/from-step-0")
        films[episode_index] = [int(frame[0, 0, 0]) for frame in frames]

    monkeypatch.setattr(script, "save_video", spy)
    train(script, tmp_path, capture_video=True)
    if "atari" in script.__name__:  # games end with rows 8 and 17, then 24 rows are over
        assert films == {0: list(range(1, 9)), 1: list(range(9, 18))}
    else:  # so do the lives
        assert films == {0: [1, 2, 3], 1: list(range(4, 9))}


# the engines themselves


def play(script, steps: int, seed: int = 3, **args):
    """Plays a real engine at random -> its rows, (obs, rewards, terminated, truncated, infos)."""
    envs = script.make_envs(script.Args(**args))
    obs, _ = envs.reset(seed=seed)
    rng = np.random.default_rng(0)
    n = int(envs.single_action_space.n)
    played = [(obs.copy(), *[None] * 4)]
    for _ in range(steps):
        obs, rewards, terminated, truncated, infos = envs.step(rng.integers(0, n, envs.num_envs))
        played.append((obs.copy(), rewards.copy(), terminated.copy(), truncated.copy(), infos))
    envs.close()
    return played


@pytest.mark.parametrize(
    ("name", "env_id"), [("ppo_atari_envpool", "Breakout-v5"), ("ppo_procgen", "starpilot")]
)
def test_engine_resets_on_the_next_step(name, env_id):
    """What all of this rests on, whatever is pressed.

    After an end comes a row without reward, never an end.
    """
    played = play(importlib.import_module(name), 400, env_id=env_id, num_envs=4)
    resets = 0
    for (_, _, terminated, truncated, _), (_, rewards, again, cut, infos) in itertools.pairwise(
        played[1:]
    ):
        over = terminated | truncated
        assert (infos["valid"] == ~over).all()
        assert not rewards[over].any() and not again[over].any() and not cut[over].any()
        resets += over.sum()
    assert resets >= 10


def test_engine_plays_the_seed(script):
    """Fails when the seed is not used, or environments get the same one."""
    args = dict(num_envs=3)
    first, second, other = (
        play(script, 40, seed=seed, **args) for seed in (3, 3, [7, 8, 2**32 - 1])
    )
    for (obs, rewards, *_), (obs2, rewards2, *_) in zip(first, second, strict=True):
        assert (obs == obs2).all() and np.array_equal(rewards, rewards2)
    assert any((a[0] != b[0]).any() for a, b in zip(first, other, strict=True))
    assert any((a[0][0] != a[0][1]).any() for a in first)


def test_breakout_games_are_those_of_the_emulator():
    """Fails when returns or lengths of real games are not what the engine's own counters say."""
    import envpool

    import ppo_atari_envpool as script

    args = script.Args(env_id="BreakoutNoFrameskip-v4", num_envs=4)
    assert args.env_id == script.Args(env_id="ALE/Breakout-v5").env_id == "Breakout-v5"
    envs = script.make_envs(args)
    envs.reset(seed=3)
    engine = envpool.make_gymnasium(
        "Breakout-v5", num_envs=4, seed=3, episodic_life=True, reward_clip=True
    )
    engine.reset()
    rng, raw, games = np.random.default_rng(1), np.zeros(4), 0
    for _ in range(500):
        actions = rng.integers(0, 4, 4)
        *_, infos = envs.step(actions)
        *_, engine_infos = engine.step(actions)
        raw += engine_infos["reward"]
        over = engine_infos["lives"] == 0
        assert (
            (infos["final_info"]["_episode"] == over).all()
            if over.any()
            else "final_info" not in infos
        )
        for i in np.flatnonzero(over):
            assert infos["final_info"]["episode"]["r"][i] == raw[i]
            assert infos["final_info"]["episode"]["l"][i] == engine_infos["elapsed_step"][i]
            raw[i], games = 0, games + 1
    assert games >= 8


@pytest.mark.parametrize("game", ["Breakout", "Pong"])
def test_engine_beside_the_wrappers(game):
    """Fails when an option of the engine is changed, or when the engine itself does.

    docs/details.md's comparison. The emulator of Gymnasium is brought to where EnvPool's is, byte
    for byte of its memory, and plays along.
    """
    import ale_py
    import cv2

    import ppo_atari
    import ppo_atari_envpool as script

    gym.register_envs(ale_py)
    engine = script.make_envs(script.Args(env_id=f"{game}-v5", num_envs=1)).make_engine(seed=11)
    emulator = gym.make(f"{game}NoFrameskip-v4", obs_type="ram", render_mode="rgb_array").unwrapped
    ale, rng = emulator.ale, np.random.default_rng(0)

    def begin(memory) -> int:
        """Details 14 and 17: after 0 to 30 no-ops and FIRE, the emulator is where EnvPool is.

        Each of them takes one frame.
        """
        before = ale.cloneState()
        for noops in range(31):
            ale.restoreState(before)
            for action in (*[0] * noops, 1):
                emulator.step(action)
            if (ale.getRAM() == memory[0]).all():
                return noops
        pytest.fail("EnvPool begins an episode in another way")

    assert engine.spec.config.max_episode_steps == 108_000 // 4
    obs, infos = engine.reset()
    emulator.reset(seed=1)
    noops, differences, done = {begin(infos["ram"])}, 0, False
    # detail 20: filled with the first frame
    stack = np.stack([ppo_atari.warp(ale.getScreenRGB())] * 4)
    assert (obs[0] == stack).all()
    while ale.lives() or game == "Pong":
        action = int(rng.integers(emulator.action_space.n))
        obs, rewards, terminated, _, infos = engine.step(np.array([action]))
        # a life is lost: unlike ours, no step of no-op, FIRE and RIGHT, and the stack goes on
        if done:
            noops.add(begin(infos["ram"]))
            stack = np.concatenate([stack[1:], ppo_atari.warp(ale.getScreenRGB())[None]])
            assert (obs[0] == stack).all()
        else:
            reward, screens = 0.0, []
            for _ in range(4):  # detail 15
                reward += emulator.step(action)[1]
                screens.append(ale.getScreenRGB())
                if ale.game_over():
                    break
            assert (ale.getRAM() == infos["ram"]).all()
            assert (rewards[0], infos["reward"][0]) == (np.sign(reward), reward)  # detail 19
            assert infos["lives"][0] == ale.lives()
            luminance = np.maximum(
                *(cv2.cvtColor(screen, cv2.COLOR_RGB2GRAY) for screen in screens[-2:])
            )
            image = cv2.resize(luminance, (84, 84), interpolation=cv2.INTER_AREA)  # detail 18
            ours = ppo_atari.warp(np.maximum(*screens[-2:]))
            differences += (image != ours).any()
            assert np.abs(image.astype(int) - ours).max() <= 16
            stack = np.concatenate([stack[1:], image[None]])
            assert (obs[0] == stack).all()
        done = terminated[0]
        if game == "Pong" and infos["elapsed_step"][0] == 300:
            break
    if game == "Pong":
        assert differences > 100  # the maximum of luminances is not the luminance of the maxima
    else:
        assert differences == 0 and len(noops) > 2 and infos["terminated"][0] == 1


def test_engine_clips_rewards_for_the_learner_alone():
    """Detail 19. Fails without reward_clip: a bean of MsPacman is worth 10 points."""
    import ppo_atari_envpool as script

    played = play(script, 150, env_id="MsPacman-v5", num_envs=2)
    assert {reward for _, rewards, *_ in played[1:] for reward in rewards} == {0.0, 1.0}
    engine = script.make_envs(script.Args(env_id="MsPacman-v5", num_envs=2)).make_engine(seed=3)
    engine.reset()
    rng = np.random.default_rng(0)
    raw = [engine.step(rng.integers(0, 9, 2))[4]["reward"] for _ in range(150)]
    assert np.max(raw) >= 10
    np.testing.assert_array_equal(np.sign(raw), [rewards for _, rewards, *_ in played[1:]])


def test_impala_network():
    """Fails with another layer, channel, stride or activation, or without a residual connection.

    The appendix.
    """
    agent = ppo_procgen.Agent(
        gym.spaces.Box(0, 255, (3, 64, 64), np.uint8), gym.spaces.Discrete(15)
    )
    for name, parameter in agent.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    nn.init.orthogonal_(agent.actor.weight)
    weights = [parameter.detach().double().contiguous() for parameter in agent.parameters()]
    shapes = [tuple(weight.shape) for weight in weights[::2]]
    trunk = [(c, d, 3, 3) for c, d in ((16, 3), *[(16, 16)] * 4, (32, 16), *[(32, 32)] * 9)]
    assert shapes == [*trunk, (256, 32 * 8 * 8), (15, 256), (1, 256)]
    obs = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
    x, pairs = obs.double() / 255, iter(zip(weights[::2], weights[1::2], strict=True))
    for _ in range(3):
        x = F.max_pool2d(F.conv2d(x, *next(pairs), padding=1), 3, stride=2, padding=1)
        for _ in range(2):
            inner = F.conv2d(x.clamp(min=0), *next(pairs), padding=1)
            x = x + F.conv2d(inner.clamp(min=0), *next(pairs), padding=1)
    x = F.linear(x.clamp(min=0).flatten(1), *next(pairs)).clamp(min=0)
    logprobs, value = F.linear(x, *next(pairs)).log_softmax(-1), F.linear(x, *next(pairs))[:, 0]
    distribution, ours = agent(obs)
    assert logprobs.std() > 0.05
    torch.testing.assert_close(distribution.logprobs.double(), logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.double(), value, rtol=0, atol=1e-5)


def test_impala_initialisation():
    """Fails with other gains or biases.

    Detail 2 where baselines has it, TensorFlow's default elsewhere.
    """
    agent = ppo_procgen.Agent(
        gym.spaces.Box(0, 255, (3, 64, 64), np.uint8), gym.spaces.Discrete(15)
    )
    layers = [layer for layer in agent.modules() if hasattr(layer, "weight")]
    assert not any(layer.bias.any() for layer in layers)
    for layer in layers[:-2]:
        fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(layer.weight)
        bound = (6 / (fan_in + fan_out)) ** 0.5
        assert 0.95 * bound < layer.weight.abs().max() <= bound
    for layer, gain in zip(layers[-2:], (0.01, 1.0), strict=True):
        gram = layer.weight @ layer.weight.T
        torch.testing.assert_close(
            gram, gain**2 * torch.eye(len(gram)), rtol=0, atol=1e-5 * gain**2
        )


def test_defaults():
    """Fails when a default is not the published one."""
    import ppo_atari
    import ppo_atari_envpool

    ours, theirs = vars(ppo_atari_envpool.Args()), vars(ppo_atari.Args())
    assert {name for name in ours if ours[name] != theirs[name]} == {"exp_name", "env_id"}
    args = ppo_procgen.Args()
    assert (args.env_id, args.distribution_mode, args.num_levels, args.start_level) == (
        "starpilot",
        "easy",
        0,
        0,
    )
    assert (args.total_timesteps, args.num_envs, args.num_steps) == (25_000_000, 64, 256)
    assert (args.num_minibatches, args.update_epochs, args.learning_rate, args.anneal_lr) == (
        8,
        3,
        5e-4,
        False,
    )
    assert (args.gamma, args.gae_lambda, args.clip_coef, args.ent_coef) == (0.999, 0.95, 0.2, 0.01)


def test_all_games_of_procgen_can_be_made():
    """Fails when a game, a mode or an option does not reach the engine."""
    games = (
        "bigfish bossfight caveflyer chaser climber coinrun dodgeball fruitbot heist jumper leaper "
        "maze miner ninja"
    )
    for game in (*games.split(), "plunder", "procgen:procgen-StarPilot-v0"):
        for mode in ("easy", "hard"):
            args = ppo_procgen.Args(
                env_id=game, distribution_mode=mode, num_levels=3, start_level=40, num_envs=2
            )
            envs = ppo_procgen.make_envs(args)
            obs, _ = envs.reset(seed=1)
            assert obs.shape == (2, 3, 64, 64) and obs.dtype == np.uint8
            config = envs.unwrapped.engine.spec.config
            assert (config.num_levels, config.start_level) == (3, 40)
            assert config.distribution_mode == ("easy", "hard").index(mode)
            envs.close()


@pytest.mark.parametrize("name", SCRIPTS)
def test_train_film_stop_resume_evaluate(name, evaluate, tmp_path, capsys):
    """Fails when one does not work with the real engine, or gives other weights the second time."""
    script = importlib.import_module(name)
    run_dir = interrupted(name, tmp_path)
    stopped = load(run_dir)
    done = stopped["iteration"]
    args = stopped["args"] | {"resume": str(run_dir), "total_timesteps": 64 * (done + 2)}
    resumed = []
    for _ in range(2):
        torch.save(stopped, run_dir / "checkpoint.pt")
        assert train(script, tmp_path, **args) == run_dir
        resumed.append(load(run_dir))
    first, second = resumed
    assert first["iteration"] == done + 2
    assert all(torch.equal(first["agent"][key], second["agent"][key]) for key in first["agent"])
    assert [step for step, _ in scalars(run_dir, "losses/value_loss")] == [
        64 * (i + 1) for i in range(done + 2)
    ]
    pictures = (210, 160, 3) if "atari" in name else (512, 512, 3)
    for folder in (f"videos/from-step-{64 * done}", "evaluation"):
        if folder == "evaluation":
            if "atari" in name:  # a whole game of Pong is long
                continue
            # training films 2 of 3
            returns = evaluate(run_dir, episodes=3, capture_video=True)
            assert len(returns) == 3 and len(list((run_dir / folder).glob("*.mp4"))) == 3
        with VideoFileClip(str(next((run_dir / folder).glob("*episode-0.mp4")))) as clip:
            frames = [frame.copy() for frame in clip.iter_frames()]
        assert frames[0].shape == pictures
        assert len(frames) > 5 and any((frame != frames[0]).any() for frame in frames)


def test_evaluation_of_breakout(evaluate, tmp_path):
    """Fails when evaluate.py counts lives or clipped rewards, or loses the film."""
    import ppo_atari_envpool as script

    run_dir = train(script, tmp_path, env_id="Breakout-v5")
    steps, step = [], script.Games.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            script.Games, "step", lambda *args: (result := step(*args), steps.append(result))[0]
        )
        returns = evaluate(run_dir, episodes=2, capture_video=True)
    assert len(list((run_dir / "evaluation").glob("*.mp4"))) == 2
    assert sum((result[2] | result[3]).sum() for result in steps) == 10  # lives
    # no brick of the lowest rows is worth more than 1
    assert sum(returns) == sum(result[1].sum() for result in steps)


def test_same_seed_same_weights(script, tmp_path):
    """Fails when anything random is not seeded, or when the seed is not used."""
    agents = []
    for name, seed in (("first", 1), ("second", 1), ("other", 2)):
        torch.manual_seed(len(agents))  # main must not depend on what was before it
        np.random.seed(len(agents))
        agents.append(load(train(script, tmp_path / name, seed=seed))["agent"])
    first, second, other = agents
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (first["critic.weight"] - other["critic.weight"]).abs().max() > 0.01


def test_the_seed_of_the_environments(script, tmp_path, monkeypatch):
    """Fails when runs with other seeds, or the halves of a resumed one, play the same episodes."""
    seeds, reset = [], script.Games.reset

    def spy(games, *, seed=0, options=None):
        seeds.append(seed)
        return reset(games, seed=seed)

    monkeypatch.setattr(script.Games, "reset", spy)
    run_dir = train(script, tmp_path / "first")
    train(
        script,
        tmp_path / "first",
        **load(run_dir)["args"] | {"resume": str(run_dir), "total_timesteps": 96},
    )
    train(script, tmp_path / "other", seed=2)
    assert len(seeds) == 3 and len({seed for drawn in seeds for seed in drawn}) == 9


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("ppo_atari_envpool", ["--env-id", "Breakot-v5"], ["Breakot-v5", "Breakout-v5"]),
        ("ppo_atari_envpool", ["--env-id", "Ant-v5"], ["Ant-v5", "no Atari game"]),
        ("ppo_atari_envpool", ["--gym-id", "CartPole-v1"], ["CartPole-v1", "no Atari game"]),
        (
            "ppo_atari_envpool",
            ["--num-minibatches", "3"],
            ["--num-minibatches 3", "divide", "1024"],
        ),
        ("ppo_atari_envpool", ["--num-steps", "1"], ["--num-steps 1", "at least"]),
        ("ppo_atari_envpool", ["--num-minibatches", "512"], ["2 samples a minibatch", "at least"]),
        ("ppo_procgen", ["--env-id", "starpilo"], ["starpilo", "bigfish", "starpilot"]),
        ("ppo_procgen", ["--start-level", "-1"], ["--start-level -1", "from 0"]),
        ("ppo_procgen", ["--num-levels", "-1"], ["--num-levels -1", "from 0"]),
    ],
)
def test_refusals(capsys, tmp_path, monkeypatch, name, args, words):
    """Each fails when its check is taken out: the run starts, or a traceback appears."""
    monkeypatch.chdir(tmp_path)
    script = importlib.import_module(name)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        script.main(tyro.cli(script.Args, args=["--total-timesteps", "16384", *args]))
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert not any(tmp_path.iterdir())
    (line,) = err.splitlines()
    assert line.startswith(f"{name}.py: ")
    for word in words:
        assert word in line


def test_runs_of_another_mode_cannot_be_gone_on_with(scripted_procgen, capsys, tmp_path):
    """Fails when levels of another mode are trained on with statistics and curves of the first."""
    run_dir = train(ppo_procgen, tmp_path)
    with pytest.raises(SystemExit):
        train(
            ppo_procgen,
            tmp_path,
            **load(run_dir)["args"] | {"resume": str(run_dir), "distribution_mode": "hard"},
        )
    assert "cannot change its distribution_mode, easy" in capsys.readouterr().err


def without(folder: Path, *packages: str) -> str:
    """A folder for PYTHONPATH that hides these packages, and the system's Qt 5."""
    folder.mkdir()
    for package in packages:
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text(
            f"raise ImportError('No module named {package}')"
        )
    (folder / "sitecustomize.py").write_text(
        "import ctypes\nload = ctypes.CDLL.__init__\n"
        "def init(self, name, *args, **kwargs):\n"
        "    if name == 'libQt5Gui.so.5': raise OSError('libQt5Gui.so.5: not there')\n"
        "    load(self, name, *args, **kwargs)\n"
        "ctypes.CDLL.__init__ = init\n"
    )
    return str(folder)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("ppo_atari_envpool", "envpool", "envpool"), ("ppo_procgen", "envpool", "procgen"),
     ("ppo_procgen", "PyQt5", "procgen")],
)  # fmt: skip
def test_missing_package_comes_with_the_pip_command(tmp_path, name, package, extra):
    """Fails when ImportError is let through."""
    (tmp_path / "empty").mkdir()
    result = run(
        f"{name}.py", cwd=tmp_path / "empty", PYTHONPATH=without(tmp_path / "path", package)
    )
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    (line,) = result.stderr.splitlines()
    assert (
        line.startswith(f"{name}.py: ")
        and package in line
        and f'pip install -e ".[{extra}]"' in line
    )
    assert not any((tmp_path / "empty").iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' EnvPool brings its Qt 5")
@pytest.mark.parametrize("system", [False, True])
def test_qt_of_the_package_or_of_the_system(tmp_path, system):
    """Fails when Qt 5 is not PyQt5-Qt5's where the system has none, or the system's not enough."""
    import PyQt5

    packages = ["PyQt5"] if system else []
    path = without(tmp_path / "path", *packages)
    environment = {"PYTHONPATH": path}
    if system:  # as good as installed
        (tmp_path / "path" / "sitecustomize.py").unlink()
        environment["LD_LIBRARY_PATH"] = f"{PyQt5.__path__[0]}/Qt5/lib"
    args = [
        "--num-envs",
        2,
        "--num-steps",
        8,
        "--num-minibatches",
        1,
        "--update-epochs",
        1,
        "--total-timesteps",
        16,
    ]
    result = run("ppo_procgen.py", *args, cwd=tmp_path, **environment)
    assert result.returncode == 0, result.stderr
