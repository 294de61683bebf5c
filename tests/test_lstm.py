"""ppo_atari_lstm.py: details 32-36, on real rollouts of Breakout and on scripted ones."""

import copy
import itertools
import signal
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load, run, run_dir_of, scalars, start, wait_for_checkpoint
from torch import nn

SPACES = gym.spaces.Box(0, 255, (1, 84, 84), np.uint8), gym.spaces.Discrete(4)
SMALL = ["--num-envs", 2, "--num-minibatches", 2, "--num-steps", 16, "--update-epochs", 1]
NUM_STEPS, NUM_ENVS = 64, 4


@pytest.fixture(scope="module")
def lstm():
    """The module ppo_atari_lstm."""
    import ppo_atari_lstm

    return ppo_atari_lstm


@pytest.fixture(scope="module")
def seen(lstm, tmp_path_factory):
    """Three updates on Breakout, spied on.

    The agent before every gradient step and its minibatch; the states while acting.
    """
    calls = {"act": [], "step": [], "dones": []}
    act, gae, step = lstm.Agent.act, lstm.compute_gae, lstm.train_step

    def spy_act(agent, obs, starts, state):
        result = act(agent, obs, starts, state)
        calls["act"].append((obs.clone(), starts.clone(), state.clone(), result[3].clone()))
        return result

    def spy_gae(rewards, values, dones, *rest):
        calls["dones"].append(dones.copy())
        return gae(rewards, values, dones, *rest)

    def spy_step(agent, optimizer, mb, args):
        calls["step"].append((copy.deepcopy(agent), mb))
        return step(agent, optimizer, mb, args)

    sizes = dict(
        num_envs=NUM_ENVS,
        num_steps=NUM_STEPS,
        num_minibatches=2,
        update_epochs=2,
        learning_rate=0.002,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("lstm"))
        patch.setattr(lstm.Agent, "act", spy_act)
        patch.setattr(lstm, "compute_gae", spy_gae)
        patch.setattr(lstm, "train_step", spy_step)
        lstm.main(lstm.Args(total_timesteps=3 * NUM_STEPS * NUM_ENVS, anneal_lr=False, **sizes))
    return calls


def ratio(agent, mb, **changes) -> torch.Tensor:
    """pi_new / pi_old of every sample of a minibatch, with some of its columns changed."""
    mb = mb | changes
    with torch.no_grad():
        distribution, _, _ = agent(mb["obs"], mb["starts"], mb["lstm_state"])
        return (distribution.log_prob(mb["actions"]) - mb["logprobs"]).exp()


def plain_loop(agent, obs, starts, state):
    """The LSTM by its equations, one step after the other, in float64 -> logits, value, state."""
    lstm = agent.lstm
    hidden = agent.network(obs.float() / 255).detach().double().unflatten(0, (-1, state.shape[1]))
    (w_x, w_h, b_x, b_h) = (
        p.detach().double()
        for p in (lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0, lstm.bias_hh_l0)
    )
    h, c = state.double()
    outputs = []
    for x, new in zip(hidden, starts.unflatten(0, (-1, state.shape[1])), strict=True):
        h, c = h * ~new[:, None], c * ~new[:, None]
        i, f, g, o = (x @ w_x.T + b_x + h @ w_h.T + b_h).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    outputs = torch.cat(outputs)
    logits = outputs @ agent.actor.weight.double().T + agent.actor.bias.double()
    value = outputs @ agent.critic.weight.double().T + agent.critic.bias.double()
    return logits.detach(), value.squeeze(-1).detach(), torch.stack([h, c])


def test_detail_32_lstm_initialisation(lstm):
    """Fails without the loop over the LSTM's parameters, or with another gain."""
    agent = lstm.Agent(*SPACES)
    assert isinstance(agent.lstm, nn.LSTM) and (agent.lstm.input_size, agent.lstm.hidden_size) == (
        512,
        128,
    )
    for name, parameter in agent.lstm.named_parameters():
        if "bias" in name:
            assert not parameter.any()
        else:
            gram = (
                parameter @ parameter.T
                if parameter.shape[0] <= parameter.shape[1]
                else parameter.T @ parameter
            )
            torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)
    for head, gain in ((agent.actor, 0.01), (agent.critic, 1.0)):
        gram = head.weight @ head.weight.T
        torch.testing.assert_close(
            gram, gain**2 * torch.eye(len(gram)), rtol=0, atol=1e-5 * gain**2
        )


def test_detail_33_states_start_at_zero(seen):
    """Fails when the first state is anything but zeros."""
    _, starts, state, _ = seen["act"][0]
    assert state.shape == (2, NUM_ENVS, 128) and not state.any()
    assert starts.all()


def test_detail_34_states_are_reset_at_episode_ends(lstm, seen):
    """Fails without the reset, when it is a step late, or when it resets other environments too."""
    dones = np.concatenate(seen["dones"])
    assert 3 <= dones.sum() < dones.size / 4
    for t in range(1, len(dones)):
        obs, starts, state, after = seen["act"][t]
        np.testing.assert_array_equal(starts, dones[t - 1])
        # carried from step to step and rollout to rollout
        torch.testing.assert_close(state, seen["act"][t - 1][3])
    agent = lstm.Agent(*SPACES)
    obs, state = torch.randint(0, 256, (3, 1, 84, 84), dtype=torch.uint8), torch.randn(2, 3, 128)
    _, value, after = agent(obs, torch.tensor([False, True, False]), state)
    _, expected, expected_after = plain_loop(agent, obs, torch.tensor([False, True, False]), state)
    torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(after.double(), expected_after, rtol=0, atol=1e-5)
    state[:, 1] = torch.randn(2, 128)
    torch.testing.assert_close(agent(obs, torch.tensor([False, True, False]), state)[1], value)


def test_detail_35_minibatches_are_whole_environments_in_time_order(seen):
    """Fails when steps are shuffled, or an environment is cut, or left out of an epoch."""
    assert len(seen["step"]) == 3 * 2 * 2
    for rollout in range(3):
        steps = seen["act"][rollout * NUM_STEPS : (rollout + 1) * NUM_STEPS]
        rolled_out = torch.stack([obs for obs, *_ in steps])  # [T, N, 1, 84, 84]
        for epoch in range(2):
            first = rollout * 4 + epoch * 2
            learned = [
                mb["obs"].unflatten(0, (NUM_STEPS, -1)) for _, mb in seen["step"][first : first + 2]
            ]
            envs = []
            for sequence in torch.cat(learned, 1).unbind(1):
                envs += [n for n in range(NUM_ENVS) if torch.equal(rolled_out[:, n], sequence)]
            assert sorted(envs) == list(range(NUM_ENVS))


def test_detail_36_states_are_reconstructed_and_the_first_ratio_is_one(seen):
    """Fails without the saved state, with another rollout's, or without resets at episode ends."""
    for update in range(3):
        agent, mb = seen["step"][4 * update]
        inside = mb["starts"].unflatten(0, (NUM_STEPS, -1))[1:]
        assert inside.any()  # episodes begin inside the rollout
        assert (ratio(agent, mb) - 1).abs().max() < 1e-6
        if update == 0:
            continue  # as initialised, all actions are about equally likely, whatever the state
        assert (ratio(agent, mb, starts=torch.zeros_like(mb["starts"])) - 1).abs().max() > 1e-4
        assert (
            ratio(agent, mb, lstm_state=torch.zeros_like(mb["lstm_state"])) - 1
        ).abs().max() > 1e-4


def test_segments_equal_a_plain_loop_over_steps(lstm):
    """Fails when a cut is lost, doubled or shifted.

    All sizes, with no start, starts everywhere, and random ones.
    """
    torch.manual_seed(0)
    agent = lstm.Agent(*SPACES)
    nn.init.normal_(agent.actor.weight)
    for steps, envs, rate in itertools.product((1, 2, 9), (1, 3), (0.0, 0.2, 1.0)):
        obs = torch.randint(0, 256, (steps * envs, 1, 84, 84), dtype=torch.uint8)
        starts, state = torch.rand(steps * envs) < rate, torch.randn(2, envs, 128)
        distribution, value, after = agent(obs, starts, state)
        logits, expected_value, expected_state = plain_loop(agent, obs, starts, state)
        torch.testing.assert_close(
            distribution.logprobs.double(), logits.log_softmax(-1), rtol=0, atol=2e-5
        )
        torch.testing.assert_close(value.double(), expected_value, rtol=0, atol=2e-5)
        torch.testing.assert_close(after.double(), expected_state, rtol=0, atol=2e-5)


def test_lstm_is_called_once_a_segment(lstm, monkeypatch):
    """Fails when the LSTM runs once a step.

    128 steps of 2 environments with 3 starts inside are 4 calls.
    """
    agent, calls = lstm.Agent(*SPACES), []
    agent.lstm.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    starts = torch.zeros(128, 2, dtype=torch.bool)
    starts[0] = starts[10, 0] = starts[50, 1] = starts[127] = True
    agent(torch.zeros(256, 1, 84, 84, dtype=torch.uint8), starts.flatten(), torch.zeros(2, 2, 128))
    assert calls == [10, 40, 77, 1]


def test_one_frame_is_observed(lstm):
    """Fails when frames are stacked."""
    env = lstm.make_env(lstm.Args())
    assert env.reset(seed=1)[0].shape == env.observation_space.shape == (1, 84, 84)


def test_evaluation_carries_the_state(lstm, evaluate, tmp_path, monkeypatch):
    """Fails when evaluate.py forgets the state after a step, or keeps it after a life."""
    monkeypatch.chdir(tmp_path)
    sizes = dict(num_envs=2, num_steps=16, num_minibatches=2, update_epochs=1)
    lstm.main(lstm.Args(total_timesteps=32, **sizes))
    calls, act = [], lstm.Agent.act

    def spy_act(agent, obs, starts, state):
        result = act(agent, obs, starts, state)
        calls.append((starts.clone(), state.clone(), result[3].clone()))
        return result

    monkeypatch.setattr(lstm.Agent, "act", spy_act)
    returns = evaluate(run_dir_of(tmp_path), episodes=1)
    assert len(returns) == 1 and len(calls) > 50
    assert calls[0][0].all() and not calls[0][1].any()
    for (_, _, after), (_, state, _) in itertools.pairwise(calls):
        torch.testing.assert_close(state, after)
    assert sum(starts.item() for starts, _, _ in calls) == 5  # Breakout's lives


def test_bootstrap_truncated_keeps_the_state(lstm, tmp_path, monkeypatch):
    """Fails when the final observation is valued with a reset or another environment's state."""
    monkeypatch.chdir(tmp_path)
    kwargs = dict(gym.spec("BreakoutNoFrameskip-v4").kwargs, max_num_frames_per_episode=150)
    monkeypatch.setitem(
        gym.registry["BreakoutNoFrameskip-v4"].kwargs, "max_num_frames_per_episode", 150
    )
    assert kwargs["max_num_frames_per_episode"] == 150
    forward, gae, finals, got = lstm.Agent.forward, lstm.compute_gae, [], []
    act, acting = lstm.Agent.act, []

    def spy_act(*inputs):
        acting.append(True)
        result = act(*inputs)
        acting.pop()
        return result

    def spy_forward(agent, obs, starts, state):
        result = forward(agent, obs, starts, state)
        if not torch.is_grad_enabled() and not acting and not starts.any():
            finals.append((obs.clone(), state.clone(), result[1].clone()))
        return result

    def spy_gae(rewards, *rest):
        got.append(rewards.copy())
        return gae(rewards, *rest)

    monkeypatch.setattr(lstm.Agent, "act", spy_act)
    monkeypatch.setattr(lstm.Agent, "forward", spy_forward)
    monkeypatch.setattr(lstm, "compute_gae", spy_gae)
    sizes = dict(num_envs=2, num_steps=48, num_minibatches=2, update_epochs=1)
    lstm.main(lstm.Args(total_timesteps=96, bootstrap_truncated=True, gamma=0.9, **sizes))
    assert finals
    for _, state, value in finals[:2]:
        assert state.any()
        assert (
            np.isclose(np.abs(got[0] - 0.9 * value[0].item()), 0, atol=1e-6).any()
            or value[0].abs() < 1e-6
        )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a short run; made once for all tests."""
    cwd = tmp_path_factory.mktemp("trained")
    result = run("ppo_atari_lstm.py", *SMALL, "--total-timesteps", 64, "--capture-video", cwd=cwd)
    assert result.returncode == 0, result.stderr
    return cwd


def test_run_resumes_in_its_folder(trained):
    """Fails when the checkpoint lacks something that the LSTM needs."""
    run_dir = run_dir_of(trained)
    assert load(run_dir)["iteration"] == 2
    result = run("ppo_atari_lstm.py", "--resume", run_dir, "--total-timesteps", 128, cwd=trained)
    assert result.returncode == 0, result.stderr
    assert load(run_dir)["iteration"] == 4
    assert [step for step, _ in scalars(run_dir, "losses/value_loss")] == [32, 64, 96, 128]
    assert list(run_dir.glob("videos/*/*.mp4"))


def test_sigint_saves_and_exits(tmp_path):
    """Fails without the handlers, or without the save."""
    args = [*SMALL, "--total-timesteps", 1_000_000, "--checkpoint-interval", 1_000_000]
    process = start("ppo_atari_lstm.py", *args, cwd=tmp_path)
    wait_for_checkpoint(process, tmp_path)
    time.sleep(2)  # some iterations that no checkpoint holds
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in stderr
    assert "--resume" in stdout and load(run_dir_of(tmp_path))["iteration"] >= 1


def test_same_seed_same_weights(lstm, tmp_path, monkeypatch):
    """Fails when anything random is not seeded, or when a sum depends on the threads' order."""
    clock, weights = itertools.count(1_790_000_000), []
    monkeypatch.setattr(time, "time", lambda: next(clock))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    for name, seed in (("first", 1), ("second", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        sizes = dict(num_envs=2, num_steps=32, num_minibatches=2, update_epochs=2)
        lstm.main(lstm.Args(total_timesteps=64, seed=seed, **sizes))
        weights.append(load(run_dir_of(tmp_path / name))["agent"])
    torch.set_num_threads(threads)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["actor.weight"], weights[2]["actor.weight"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--num-minibatches", "3"], ["--num-minibatches 3", "environments, 8"]),
        (["--num-envs", "2"], ["--num-minibatches 4", "environments, 2"]),
        (["--env-id", "CartPole-v1"], ["CartPole-v1", "BreakoutNoFrameskip-v4"]),
    ],
    ids=" ".join,
)
def test_refusals(tmp_path, args, words):
    """Fails when the check is taken out."""
    result = run("ppo_atari_lstm.py", *args, cwd=tmp_path)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("ppo_atari_lstm.py: ") and all(word in line for word in words)
    assert not list(tmp_path.iterdir())
