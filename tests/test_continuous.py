"""One test for each detail of ppo_continuous_action.py that ppo.py does not have.

And tests of all that rests on MuJoCo.
"""

import copy
import math
import os
import runpy
import shlex
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, load, run, run_dir_of, scalars, start, wait_for_checkpoint
from moviepy import VideoFileClip
from torch import nn

SCRIPT = "ppo_continuous_action.py"
SPACES = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64), gym.spaces.Box(-1, 1, (2,))
NUM_STEPS, NUM_ENVS = 16, 2


class Script(gym.Env):
    """Episodes of 5 or 7 steps, random observations and rewards; keeps all it sent and received."""

    observation_space, action_space = SPACES
    made = []  # every environment, in the order in which they were made

    def __init__(self, truncates: bool = False):
        self.truncates, self.length = truncates, 5 + 2 * (len(Script.made) % 2)
        self.rng = np.random.default_rng(len(Script.made))
        self.began = []  # first observations
        self.steps = []  # (action, observation, reward, over) of every step
        Script.made.append(self)

    def observe(self) -> np.ndarray:  # the last one of an episode lies farthest off
        return self.rng.normal([5, 0, self.step_of_episode**2], [2, 0.1, 1])

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.step_of_episode = 0
        self.began.append(self.observe())
        return self.began[-1], {}

    def step(self, action):
        self.step_of_episode += 1
        over = self.step_of_episode == self.length
        self.steps.append((action.copy(), self.observe(), self.rng.normal(3, 20), over))
        _, obs, reward, _ = self.steps[-1]
        return obs, reward, over and not self.truncates, over and self.truncates, {}


def history(envs: list[Script]) -> SimpleNamespace:
    """What those environments sent and received in K steps.

    obs [K + 1, N, 3], all else [K, N, ...]. obs is what an agent is to act on: after an episode's
    last step, the next one's first observation. final_obs is what the step itself led to.
    """
    columns = [[np.stack(column) for column in zip(*env.steps, strict=True)] for env in envs]
    actions, final_obs, rewards, dones = (
        np.stack(column, 1) for column in zip(*columns, strict=True)
    )
    obs = np.concatenate([np.stack([env.began[0] for env in envs])[None], final_obs])
    for n, env in enumerate(envs):
        obs[1:, n][dones[:, n]] = env.began[1:]
    return SimpleNamespace(
        obs=obs, actions=actions, final_obs=final_obs, rewards=rewards, dones=dones
    )


def statistics(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """By definition: mean, variance, count of rows, after 0.0001 row of mean 0 and variance 1."""
    count = 1e-4 + len(rows)
    mean = rows.sum(0) / count
    return mean, (1e-4 + (rows**2).sum(0)) / count - mean**2, count


def scaled(obs: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """obs, normalised by the statistics of rows."""
    mean, var, _ = statistics(rows)
    return ((obs - mean) / np.sqrt(var + 1e-8)).clip(-10, 10)


def discounted(rewards: np.ndarray, dones: np.ndarray, gamma: float = 0.99) -> np.ndarray:
    """[K, N] -> the discounted sum of each episode's rewards up to every step, [K, N]."""
    sums = np.zeros_like(rewards)
    for k in range(len(rewards)):
        sums[k] = rewards[k] + (gamma * sums[k - 1] * ~dones[k - 1] if k else 0)
    return sums


@pytest.fixture
def continuous(tmp_path, monkeypatch):
    """The module ppo_continuous_action, in an empty folder, so that its runs/ stays there."""
    import ppo_continuous_action

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return ppo_continuous_action


@pytest.fixture
def script(continuous, tmp_path_factory, monkeypatch):
    """main, spied on: -> train(**args).

    -> what every act, compute_gae and train_step got, history, run_dir
    """
    monkeypatch.setitem(
        gym.registry, "Script-v0", gym.envs.registration.EnvSpec("Script-v0", Script)
    )

    def train(truncates: bool = False, **args):
        gym.registry["Script-v0"].kwargs["truncates"] = truncates
        seen = SimpleNamespace(act=[], rewards=[], steps=[])
        act, gae, step = continuous.Agent.act, continuous.compute_gae, continuous.train_step

        def spy_act(agent, obs):
            seen.act.append(obs.numpy().copy())
            return act(agent, obs)

        def spy_gae(rewards, *args):
            seen.rewards.append(rewards.copy())
            return gae(rewards, *args)

        def spy_step(agent, optimizer, mb, args):
            before = copy.deepcopy(agent)
            stats = step(agent, optimizer, mb, args)
            seen.steps.append(
                SimpleNamespace(before=before, agent=agent, optimizer=optimizer, mb=mb)
            )
            return stats

        sizes = dict(
            num_envs=NUM_ENVS, num_steps=NUM_STEPS, num_minibatches=2, update_epochs=1, cuda=False
        )
        with monkeypatch.context() as patch:
            patch.setattr(Script, "made", [])  # equal runs observe the same
            patch.setattr(continuous.Agent, "act", spy_act)
            patch.setattr(continuous, "compute_gae", spy_gae)
            patch.setattr(continuous, "train_step", spy_step)
            patch.chdir(tmp_path_factory.mktemp("run"))
            args = (
                sizes | {"env_id": "Script-v0", "total_timesteps": 3 * NUM_STEPS * NUM_ENVS} | args
            )
            continuous.main(continuous.Args(**args))
            seen.run_dir = Path(args["resume"]) if "resume" in args else run_dir_of(Path.cwd())
            # one more is made to look at its spaces
            seen.history = history([env for env in Script.made if env.steps])
        return seen

    return train


def test_detail_23_normal_distribution(continuous):
    """Fails with another density or entropy, without exp, or with shared or non-normal noise."""
    mean, logstd, action = torch.randn(5, 3), torch.tensor([-1.0, 0.2, 0.7]), torch.randn(5, 3)
    ours = continuous.DiagonalGaussian(mean, logstd)
    theirs = torch.distributions.Independent(torch.distributions.Normal(mean, logstd.exp()), 1)
    torch.testing.assert_close(ours.log_prob(action), theirs.log_prob(action))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    n = 100_000
    samples = continuous.DiagonalGaussian(mean[:1].expand(n, 3), logstd).sample()
    assert samples.shape == (n, 3)
    z = ((samples - mean[0]) / logstd.exp()).double().numpy()
    assert np.abs(z.mean(0)).max() < 4 / math.sqrt(n)
    assert np.abs(z.std(0) - 1).max() < 4 / math.sqrt(2 * n)
    within = math.erf(1 / math.sqrt(2))  # the share of samples within one standard deviation
    assert np.abs((np.abs(z) < 1).mean(0) - within).max() < 4 * math.sqrt(within * (1 - within) / n)
    assert np.abs(np.corrcoef(z.T) - np.eye(3)).max() < 4 / math.sqrt(n)


def test_detail_24_state_independent_log_std(continuous, script):
    """Fails when logstd depends on the observation, starts elsewhere, or is not trained."""
    agent = continuous.Agent(*SPACES)
    assert isinstance(agent.logstd, nn.Parameter)
    assert agent.logstd.tolist() == [0, 0]
    obs = 10 * torch.randn(64, 3, dtype=torch.float32)
    for deviation in (1.0, 2.0):
        nn.init.constant_(agent.logstd, math.log(deviation))
        distribution, _ = agent(obs)
        peak = distribution.log_prob(distribution.mean).detach().numpy()  # (2 pi sigma^2)^(-A/2)
        np.testing.assert_allclose(
            peak, np.full(64, -math.log(2 * math.pi * deviation**2)), rtol=1e-5
        )
    seen = script(learning_rate=0.01)
    for call in seen.steps:
        assert any(
            parameter is call.agent.logstd for parameter in call.optimizer.param_groups[0]["params"]
        )
        assert call.agent.logstd.grad.all()
    assert [call.before.logstd.any().item() for call in seen.steps] == [False] + [True] * 5
    assert load(seen.run_dir)["agent"]["logstd"].abs().min() > 0.005


def test_detail_25_independent_action_components(continuous):
    """Fails when log_prob or entropy is a mean over the components, or one component's alone."""
    mean, action = (np.random.default_rng(seed).normal(size=(4, 6)) for seed in (0, 1))
    std = np.array([0.1, 0.5, 1, 1.5, 2, 4])
    density = np.exp(-((action - mean) ** 2) / (2 * std**2)) / np.sqrt(2 * np.pi * std**2)  # [4, 6]
    distribution = continuous.DiagonalGaussian(
        torch.from_numpy(mean), torch.from_numpy(np.log(std))
    )
    logprobs = distribution.log_prob(torch.from_numpy(action))
    np.testing.assert_allclose(logprobs.numpy(), np.log(density.prod(1)), rtol=1e-12)
    entropy = sum(0.5 * np.log(2 * np.pi * np.e * s**2) for s in std)
    np.testing.assert_allclose(distribution.entropy().numpy(), np.full(4, entropy), rtol=1e-12)


def test_detail_26_separate_networks(continuous):
    """Fails when policy and value share a layer, or when a layer has another size or activation."""
    agent, obs = continuous.Agent(*SPACES), torch.randn(16, 3)
    assert not {id(p) for p in agent.actor.parameters()} & {
        id(p) for p in agent.critic.parameters()
    }
    for network, outputs in ((agent.actor, 2), (agent.critic, 1)):
        shapes = [tuple(p.shape) for p in network.parameters()]
        assert shapes == [(64, 3), (64,), (64, 64), (64,), (outputs, 64), (outputs,)]
        hidden = obs
        for layer in [layer for layer in network.modules() if isinstance(layer, nn.Linear)]:
            output = layer(hidden)
            hidden = output.tanh()
        torch.testing.assert_close(network(obs), output)
    distribution, value = agent(obs)
    torch.testing.assert_close(distribution.mean, agent.actor(obs))
    torch.testing.assert_close(value, agent.critic(obs)[:, 0])
    others = [*agent.actor.parameters(), agent.logstd]
    assert torch.autograd.grad(value.sum(), others, allow_unused=True) == (None,) * 7


def test_detail_27_the_environment_gets_clipped_actions_the_buffer_sampled_ones(script):
    """Fails without ClipAction, or when the buffer gets what the environment got."""
    seen = script()
    learned = torch.cat([call.mb["actions"] for call in seen.steps]).numpy()
    received = seen.history.actions.reshape(-1, 2)
    assert 10 < (np.abs(learned) > 1).sum() < learned.size - 10
    assert np.abs(received).max() == 1
    assert sorted(map(tuple, learned.clip(-1, 1))) == sorted(map(tuple, received))


class Replay(gym.vector.VectorEnv):
    """N environments that send what they are told to."""

    single_observation_space, single_action_space = SPACES

    # [K + 1, N, 3], [K, N], [K, N]
    def __init__(self, obs: np.ndarray, rewards: np.ndarray, dones: np.ndarray):
        self.num_envs, self.obs, self.sequel = (
            obs.shape[1],
            obs,
            iter(zip(obs[1:], rewards, dones, strict=True)),
        )

    def reset(self, *, seed=None, options=None):
        return self.obs[0].copy(), {}

    def step(self, actions):
        obs, rewards, dones = next(self.sequel)
        return obs.copy(), rewards.astype(np.float64), dones.copy(), np.zeros_like(dones), {}


@pytest.mark.parametrize("case", ["n1", "n4"])
def test_details_28_to_31_equal_baselines(continuous, case):
    """Fails with other statistics, epsilon, clip range or order, or returns across episodes."""
    reference = np.load(ROOT / "tests" / "reference" / "vecnormalize.npz")
    wanted = SimpleNamespace(
        **{name[3:]: reference[name] for name in reference if name.startswith(f"{case}/")}
    )
    assert (np.abs(wanted.norm_obs) == reference["clipob"]).any() and reference["clipob"] == 10
    assert (np.abs(wanted.norm_rew) == reference["cliprew"]).any() and reference["cliprew"] == 10
    assert wanted.dones[:-1].any()

    envs = continuous.Normalize(
        Replay(wanted.raw_obs, wanted.raw_rew, wanted.dones), gamma=float(reference["gamma"])
    )
    exact = dict(rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(envs.reset()[0], wanted.norm_reset_obs, **exact)
    for k in range(300):
        obs, rewards, terminated, truncated, _ = envs.step(None)
        np.testing.assert_allclose(obs, wanted.norm_obs[k], **exact)
        # theirs are rounded to float32
        np.testing.assert_allclose(rewards, wanted.norm_rew[k], rtol=1e-6)
        np.testing.assert_array_equal(terminated | truncated, wanted.dones[k])
        statistics = {"ob": envs.obs_statistics, "ret": envs.return_statistics}
        for prefix, ours in statistics.items():
            for number in ("mean", "var", "count"):
                theirs = getattr(wanted, f"{prefix}_{number}")[k]
                np.testing.assert_allclose(getattr(ours, number), theirs, **exact)


def test_statistics_are_shared_by_all_environments(continuous):
    """Fails when each environment is normalised by itself, or by one of them."""
    envs = continuous.make_envs(continuous.Args(env_id="Pendulum-v1", num_envs=3))
    raw = [gym.make("Pendulum-v1") for _ in range(3)]
    obs = [np.stack([env.reset(seed=seed)[0] for seed, env in enumerate(raw)])]
    np.testing.assert_allclose(
        envs.reset(seed=[0, 1, 2])[0], scaled(obs[0], obs[0]), rtol=1e-4, atol=1e-5
    )
    rewards, rng = [], np.random.default_rng(0)
    for k in range(50):
        actions = rng.uniform(-2, 2, (3, 1)).astype(np.float32)
        stepped = [env.step(action) for env, action in zip(raw, actions, strict=True)]
        obs.append(np.stack([step[0] for step in stepped]))
        rewards.append([step[1] for step in stepped])
        ours, our_rewards, *_ = envs.step(actions)
        rows = np.concatenate(obs).astype(np.float64)
        # Pendulum observes in float32
        np.testing.assert_allclose(ours, scaled(obs[-1], rows), rtol=1e-4, atol=1e-5)
        returns = discounted(np.array(rewards), np.zeros((k + 1, 3), bool)).flatten()
        expected = rewards[-1] / np.sqrt(statistics(returns)[1] + 1e-8)
        np.testing.assert_allclose(our_rewards, expected.clip(-10, 10), rtol=1e-6)
    assert envs.obs_statistics.count == pytest.approx(3 * 51 + 1e-4, abs=1e-9)
    assert envs.return_statistics.count == pytest.approx(3 * 50 + 1e-4, abs=1e-9)
    envs.close()


def test_logged_returns_are_raw(script):
    """Fails when normalised or clipped rewards are logged, as when make_env scales them."""
    seen = script(num_envs=1)
    ends = np.flatnonzero(seen.history.dones[:, 0])
    episodes = np.split(seen.history.rewards[:, 0], ends + 1)[: len(ends)]
    assert len(episodes) > 5
    steps, returns = zip(*scalars(seen.run_dir, "charts/episodic_return"), strict=True)
    assert steps == tuple(ends + 1)
    np.testing.assert_allclose(returns, [episode.sum() for episode in episodes], rtol=1e-5)
    assert load(seen.run_dir)["recent_returns"] == pytest.approx(
        [episode.sum() for episode in episodes]
    )


def test_agent_learns_from_normalised_observations_and_rewards(script):
    """Fails when the rollout keeps raw ones."""
    seen = script()
    returns = discounted(seen.history.rewards, seen.history.dones)
    for k, rewards in enumerate(np.concatenate(seen.rewards)):
        rows = seen.history.obs[: k + 1].reshape(-1, 3)
        np.testing.assert_allclose(
            seen.act[k], scaled(seen.history.obs[k], rows), rtol=1e-5, atol=1e-5
        )
        expected = seen.history.rewards[k] / np.sqrt(
            statistics(returns[: k + 1].flatten())[1] + 1e-8
        )
        np.testing.assert_allclose(rewards, expected.clip(-10, 10), rtol=1e-5)


def test_final_observation_is_normalised_for_bootstrap_truncated(script):
    """Fails when it is raw, counted, or normalised otherwise than its step's other rows."""
    seen = script(truncates=True, bootstrap_truncated=True)
    returns = discounted(seen.history.rewards, seen.history.dones)
    for k, rewards in enumerate(np.concatenate(seen.rewards)):
        rows = seen.history.obs[: k + 2].reshape(-1, 3)
        final_obs = torch.from_numpy(scaled(seen.history.final_obs[k], rows)).float()
        # two minibatches an iteration
        value = seen.steps[k // NUM_STEPS * 2].before(final_obs)[1].detach().numpy()
        scaled_rewards = seen.history.rewards[k] / np.sqrt(
            statistics(returns[: k + 1].flatten())[1] + 1e-8
        )
        expected = scaled_rewards.clip(-10, 10) + 0.99 * value * seen.history.dones[k]
        np.testing.assert_allclose(rewards, expected, rtol=1e-4, atol=1e-4)
    assert (seen.history.dones.sum(1) == 1).sum() > 5  # one environment's end is no other's


def test_checkpoint_holds_the_statistics_and_resume_goes_on_with_them(continuous, script):
    """Fails when the statistics are not saved, not restored, rounded, or begun anew."""
    seen = script()
    saved = load(seen.run_dir)["envs"]
    steps = 3 * NUM_STEPS
    rows = seen.history.obs.reshape(-1, 3)
    assert len(rows) == NUM_ENVS * (steps + 1)
    returns = discounted(seen.history.rewards, seen.history.dones).flatten()
    for name, expected in (("obs", statistics(rows)), ("return", statistics(returns))):
        assert list(saved[name]) == ["mean", "var", "count"]
        for number, wanted in zip(saved[name].values(), expected, strict=True):
            np.testing.assert_allclose(number, wanted, rtol=1e-9)

    args = continuous.Args(env_id="Script-v0", num_envs=NUM_ENVS)
    envs = continuous.make_envs(args)
    envs.load_state_dict(saved)
    assert envs.state_dict() == saved  # bit for bit: they are Python's floats
    envs.reset()
    assert envs.state_dict()["return"] == saved["return"]
    assert envs.state_dict()["obs"]["count"] == saved["obs"]["count"] + NUM_ENVS

    resumed = script(resume=str(seen.run_dir), total_timesteps=5 * NUM_STEPS * NUM_ENVS)
    all_rows = np.concatenate([rows, resumed.history.obs[0]])
    np.testing.assert_allclose(
        resumed.act[0], scaled(resumed.history.obs[0], all_rows), rtol=1e-5, atol=1e-5
    )
    more_returns = discounted(resumed.history.rewards, resumed.history.dones).flatten()
    all_returns = np.concatenate([returns, more_returns[:NUM_ENVS]])
    expected = resumed.history.rewards[0] / np.sqrt(statistics(all_returns)[1] + 1e-8)
    np.testing.assert_allclose(resumed.rewards[0][0], expected, rtol=1e-5)
    again = load(seen.run_dir)["envs"]
    expected = statistics(np.concatenate([returns, more_returns]))
    for number, wanted in zip(again["return"].values(), expected, strict=True):
        np.testing.assert_allclose(number, wanted, rtol=1e-9)


def test_evaluation_uses_the_statistics_and_leaves_them_alone(
    continuous, evaluate, tmp_path, monkeypatch
):
    """Fails when evaluate.py plays with raw observations, or with fresh or changing statistics."""
    sizes = dict(total_timesteps=4096, num_steps=512, update_epochs=1)
    continuous.main(continuous.Args(env_id="Pendulum-v1", **sizes))
    run_dir = run_dir_of(tmp_path)
    before = {path: path.read_bytes() for path in run_dir.rglob("*")}
    mean, var, _ = load(run_dir)["envs"]["obs"].values()
    played, made = [], []
    act, make_envs = continuous.Agent.act, continuous.make_envs

    def spy(agent, obs):
        action, logprob, value = act(agent, obs)
        played.append((obs.numpy().copy(), action.numpy().copy()))
        return action, logprob, value

    monkeypatch.setattr(continuous.Agent, "act", spy)
    monkeypatch.setattr(
        continuous, "make_envs", lambda *args: made.append(make_envs(*args)) or made[-1]
    )
    returns = evaluate(run_dir, episodes=2, seed=3)

    assert len(played) == 400
    env = gym.make("Pendulum-v1")
    expected, step = [], 0
    for seed in (3, None):
        obs, _ = env.reset(seed=seed)
        over, total = False, 0
        while not over:
            agent_obs, action = played[step]
            by_hand = ((obs.astype(np.float64) - mean) / np.sqrt(np.array(var) + 1e-8)).clip(
                -10, 10
            )
            np.testing.assert_allclose(agent_obs[0], by_hand, rtol=1e-6, atol=1e-6)
            obs, reward, terminated, truncated, _ = env.step(action[0].clip(-2, 2))
            over, total, step = terminated or truncated, total + reward, step + 1
        expected.append(total)
    assert returns == pytest.approx(expected)
    assert made[0].state_dict() == load(run_dir)["envs"]
    assert {path: path.read_bytes() for path in run_dir.rglob("*")} == before


@pytest.fixture(scope="module")
def cheetahs(tmp_path_factory):
    """Folders of runs of HalfCheetah-v4, defaults, a rollout each, seeds 1, 1 and 2; made once."""
    import ppo_continuous_action

    run_dirs = []
    for seed in (1, 1, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("cheetah"))
            ppo_continuous_action.main(ppo_continuous_action.Args(total_timesteps=2048, seed=seed))
            run_dirs.append(run_dir_of(Path.cwd()))
    return run_dirs


def test_same_seed_same_weights(cheetahs):
    """Fails when anything random is not seeded, or when the seed is not used."""
    first, second, other = map(load, cheetahs)
    for name, weight in first["agent"].items():
        assert torch.equal(weight, second["agent"][name])
    assert first["envs"] == second["envs"]
    assert first["recent_returns"] == second["recent_returns"]
    assert not torch.equal(first["agent"]["logstd"], other["agent"]["logstd"])
    assert first["envs"] != other["envs"]


def test_first_minibatch_has_ratio_one(script, cheetahs):
    """Fails when log-probabilities are not the acting policy's, of the actions it sampled."""
    for call in script(learning_rate=0.01, num_steps=32, total_timesteps=64 * 5).steps[::2]:
        distribution, _ = call.before(call.mb["obs"])
        ratio = (distribution.log_prob(call.mb["actions"]) - call.mb["logprobs"]).exp()
        assert (ratio - 1).abs().max() < 1e-6
    for run_dir in cheetahs:
        ((_, kl),) = scalars(run_dir, "losses/approx_kl")
        assert 0 < kl < 0.1


@pytest.mark.parametrize(
    ("env_id", "expected"),
    [
        ("Hopper-v2", "Hopper-v4"),
        ("HalfCheetah-v3", "HalfCheetah-v4"),
        ("BipedalWalker-v3", None),
        ("Pendulum-v1", None),
        ("Hopper-v4", None),
        ("Hopper-v5", None),
    ],
)
def test_retired_ids_train_the_v4_task_and_say_so(continuous, capsys, env_id, expected):
    """Fails when an old paper's id is refused or replaced in silence, or a living one replaced."""
    assert continuous.Args(env_id=env_id).env_id == (expected or env_id)
    out, err = capsys.readouterr()
    assert out == ""
    if expected:
        (line,) = err.splitlines()
        assert env_id in line and expected in line
    else:
        assert err == ""


def test_run_of_a_retired_id_bears_the_name_of_the_task(tmp_path):
    """Fails when the run keeps the retired id, or says more than once that it is."""
    result = run(SCRIPT, "--env-id", "Hopper-v2", "--total-timesteps", 2048, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert run_dir_of(tmp_path).name.startswith("Hopper-v4__ppo_continuous_action__1__")
    assert load(run_dir_of(tmp_path))["args"]["env_id"] == "Hopper-v4"
    (line,) = [line for line in result.stderr.splitlines() if "Hopper" in line]
    assert "Hopper-v2" in line and "Hopper-v4" in line
    assert "out of date" not in result.stderr


@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "Walker2d-v5"])
def test_mujoco_tasks_train(tmp_path, env_id):
    """Fails when a task of either version cannot be made, or its numbers not be learned from."""
    result = run(SCRIPT, "--env-id", env_id, "--total-timesteps", 2048, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run_dir = run_dir_of(tmp_path)
    assert run_dir.name.startswith(f"{env_id}__ppo_continuous_action__1__")
    assert load(run_dir)["iteration"] == 1
    assert scalars(run_dir, "charts/episodic_return")


@pytest.fixture
def command(continuous, monkeypatch):
    """-> cli(*args): `python ppo_continuous_action.py ARGS`, without the seconds of its imports."""

    def cli(*args) -> None:
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, args)])
        runpy.run_path(str(ROOT / SCRIPT), run_name="__main__")

    return cli


class Pixels(Script):
    observation_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)


class Parts(Script):
    observation_space = gym.spaces.Dict({"position": SPACES[0], "velocity": SPACES[0]})


class Choices(Script):
    action_space = gym.spaces.MultiDiscrete([3, 3])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--env-id", "CartPole-v1"], ["CartPole-v1", "Discrete(2)", "flat Box"]),
        (["--env-id", "Choices-v0"], ["Choices-v0", "MultiDiscrete", "flat Box"]),
        (["--env-id", "Pixels-v0"], ["Pixels-v0", "(8, 8, 3)", "flat Box"]),
        (["--env-id", "Parts-v0"], ["Parts-v0", "Dict", "flat Box"]),
        (["--num-minibatches", "3"], ["--num-minibatches 3", "divide", "2048"]),
        (["--resume", "runs/other"], ["runs/other", "ppo.py"]),
    ],
    ids=" ".join,
)
def test_refusals(command, tmp_path, monkeypatch, capsys, args, words):
    """Each fails when its check is taken out: the run starts, or a traceback appears."""
    for env in (Pixels, Parts, Choices):
        env_id = f"{env.__name__}-v0"
        monkeypatch.setitem(gym.registry, env_id, gym.envs.registration.EnvSpec(env_id, env))
    if "--resume" in args:
        import ppo

        ppo.main(ppo.Args(total_timesteps=512))
        run_dir_of(tmp_path).rename("runs/other")
        capsys.readouterr()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as refusal:
        command(*args, "--total-timesteps", 2048)
    assert refusal.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"{SCRIPT}: ")
    for word in words:
        assert word in line
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_missing_mujoco_is_refused(tmp_path):
    """Fails when the ImportError, or Gymnasium's DependencyNotInstalled, is let through."""
    (tmp_path / "without" / "mujoco").mkdir(parents=True)
    (tmp_path / "without" / "mujoco" / "__init__.py").write_text(
        "raise ImportError('not installed')"
    )
    result = run(SCRIPT, cwd=tmp_path, PYTHONPATH=str(tmp_path / "without"))
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert (
        line.startswith(f"{SCRIPT}: --env-id HalfCheetah-v4: ")
        and "pip install" in line
        and "mujoco" in line
    )
    assert not (tmp_path / "runs").exists()


def test_video_is_playable(tmp_path, monkeypatch):
    """Fails without RecordVideo, when it needs a screen to render, or when nothing moves."""
    for name in ("DISPLAY", "MUJOCO_GL"):
        monkeypatch.delenv(name, raising=False)
    args = ["--capture-video", "--num-steps", 32, "--num-minibatches", 4, "--total-timesteps", 32]
    result = run(SCRIPT, *args, "--update-epochs", 1, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (video,) = run_dir_of(tmp_path).glob("videos/from-step-0/*.mp4")
    with VideoFileClip(str(video)) as clip:
        frames = [frame.copy() for frame in clip.iter_frames()]
    assert len(frames) > 16
    assert frames[0].std() > 5  # and shows something
    assert any((frame != frames[0]).any() for frame in frames[1:])


def test_stop_and_resume(command, tmp_path, capsys):
    """Fails when Ctrl-C breaks off an iteration, or leaves no checkpoint to go on from."""
    args = ["--env-id", "Pendulum-v1", "--num-steps", 256, "--total-timesteps", 10_000_000]
    process = start(SCRIPT, *args, cwd=tmp_path)
    wait_for_checkpoint(process, tmp_path)
    # with the checkpoint of iteration 0; the next one is due after iteration 50
    run_dir = run_dir_of(tmp_path)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in stderr
    stopped = load(run_dir)
    assert 1 <= stopped["iteration"] < 50
    assert stopped["envs"]["return"]["count"] == pytest.approx(256 * stopped["iteration"] + 1e-4)
    (line,) = [
        line.removeprefix("to go on: python ") for line in stdout.splitlines() if "--resume" in line
    ]
    script, *args = shlex.split(line)
    assert os.path.samefile(tmp_path / script, ROOT / SCRIPT)
    command(*args, "--total-timesteps", 256 * (stopped["iteration"] + 1))
    resumed = load(run_dir)
    assert resumed["iteration"] == stopped["iteration"] + 1
    assert resumed["envs"]["return"]["count"] == pytest.approx(
        stopped["envs"]["return"]["count"] + 256
    )
    assert run_dir_of(tmp_path) == run_dir
