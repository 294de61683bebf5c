"""One test for each detail of ppo.py; docs/details.md names them, test_project.py compares both."""

import copy
import itertools
import math
import time
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import run_dir_of, scalars
from torch import nn

SPACES = gym.spaces.Box(-np.inf, np.inf, (4,)), gym.spaces.Discrete(2)
NUM_STEPS, NUM_ENVS = 4, 2


class Script(gym.Env):
    """Episodes of `length` steps that end as told.

    Observes [environment, step of its life, step of the episode, 1].
    """

    observation_space, action_space = SPACES
    lives = 0

    def __init__(self, length: int = 6, truncates: bool = False):
        self.length, self.truncates = length, truncates
        self.life, Script.lives = Script.lives, Script.lives + 1
        self.steps = -1

    def observe(self) -> np.ndarray:
        return np.array([self.life, self.steps, self.step_of_episode, 1], np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.step_of_episode, self.steps = 0, self.steps + 1
        return self.observe(), {}

    def step(self, action):
        self.step_of_episode, self.steps = self.step_of_episode + 1, self.steps + 1
        over = self.step_of_episode == self.length
        return (
            self.observe(),
            float(self.steps),
            over and not self.truncates,
            over and self.truncates,
            {},
        )


@pytest.fixture
def script(ppo, monkeypatch):
    """ppo.main on scripted environments, spied on: -> train(**args).

    -> {"act" | "gae" | "step": what each call got}
    """
    monkeypatch.setitem(
        gym.registry, "Script-v0", gym.envs.registration.EnvSpec("Script-v0", Script)
    )
    clock = itertools.count(1_790_000_000)

    def train(truncates: bool = False, **args):
        gym.registry["Script-v0"].kwargs["truncates"] = truncates
        seen = {"act": [], "gae": [], "step": []}
        Script.lives = 0  # equal runs observe the same
        act, gae, step = ppo.Agent.act, ppo.compute_gae, ppo.train_step

        def spy_act(agent, obs):
            seen["act"].append(obs.numpy().copy())
            return act(agent, obs)

        def spy_gae(rewards, values, dones, next_value, gamma, gae_lambda):
            arrays = {
                "rewards": rewards,
                "values": values,
                "dones": dones,
                "next_value": next_value,
            }
            seen["gae"].append({name: x.copy() for name, x in arrays.items()})
            return gae(rewards, values, dones, next_value, gamma, gae_lambda)

        def spy_step(agent, optimizer, mb, args):
            before = copy.deepcopy(agent)
            stats = step(agent, optimizer, mb, args)
            group = copy.copy(optimizer.param_groups[0])
            seen["step"].append(
                {
                    "before": before,
                    "type": type(optimizer),
                    "group": group,
                    "mb": mb,
                    "args": args,
                    "stats": stats,
                }
            )
            return stats

        sizes = dict(num_envs=NUM_ENVS, num_steps=NUM_STEPS, num_minibatches=2, update_epochs=3)
        with monkeypatch.context() as patch:
            patch.setattr(ppo.Agent, "act", spy_act)
            patch.setattr(ppo, "compute_gae", spy_gae)
            patch.setattr(ppo, "train_step", spy_step)
            # runs of one second get different names
            patch.setattr(time, "time", lambda: next(clock))
            ppo.main(
                ppo.Args(
                    env_id="Script-v0",
                    **(sizes | {"total_timesteps": 5 * NUM_STEPS * NUM_ENVS} | args),
                )
            )
        return seen

    return train


@pytest.fixture
def minibatch(ppo):
    """-> (agent, mb): 128 samples; stored log-probabilities and values differ from the agent's."""
    agent = ppo.Agent(*SPACES)
    nn.init.normal_(agent.actor[-1].weight)
    obs, actions = torch.randn(128, 4), torch.randint(2, (128,))
    with torch.no_grad():
        distribution, value = agent(obs)
        logprobs = distribution.log_prob(actions) + 0.3 * torch.randn(128)
        mb = {
            "obs": obs,
            "actions": actions,
            "logprobs": logprobs,
            "values": value + 0.3 * torch.randn(128),
        }
    return agent, mb | {"advantages": 1 + 2 * torch.randn(128), "returns": value + torch.randn(128)}


def by_hand(agent, mb) -> dict[str, np.ndarray]:
    """ratio, value and entropy of every sample, in NumPy and from the logits alone."""
    logits = agent.actor(mb["obs"]).detach().double().numpy()
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    chosen = np.log(probs[np.arange(len(probs)), mb["actions"].numpy()])
    ratio = np.exp(chosen - mb["logprobs"].double().numpy())
    value = agent.critic(mb["obs"]).detach().double().numpy()[:, 0]
    return {"ratio": ratio, "value": value, "entropy": -(probs * np.log(probs)).sum(1)}


def test_detail_1_environments_step_together_and_rollouts_do_not_cut_episodes(script):
    """Fails when num_envs is ignored, or when obs is reset at the start of a rollout."""
    obs = np.stack(script()["act"])  # [5 * T, N, 4]
    assert obs.shape == (5 * NUM_STEPS, NUM_ENVS, 4)
    expected = np.arange(5 * NUM_STEPS) % 6  # episodes of 6 steps through rollouts of 4
    for n in range(NUM_ENVS):
        assert obs[:, n, 2].tolist() == expected.tolist()
        assert len(set(obs[:, n, 0])) == 1
    assert obs[0, 0, 0] != obs[0, 1, 0]


def test_detail_2_weights_are_orthogonal_and_biases_zero(ppo):
    """Fails without either orthogonal_ line or zeros_.

    W W^T (or W^T W) is gain^2 times the identity.
    """
    agent = ppo.Agent(*SPACES)
    for network, head_gain in ((agent.actor, 0.01), (agent.critic, 1.0)):
        layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
        for layer, gain in zip(layers, (math.sqrt(2), math.sqrt(2), head_gain), strict=True):
            weight = layer.weight.detach()
            gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
            torch.testing.assert_close(
                gram, gain**2 * torch.eye(len(gram)), rtol=0, atol=1e-5 * gain**2
            )
            assert not layer.bias.any()


def test_detail_3_adam_epsilon(script):
    """Fails without eps=1e-5."""
    for call in script()["step"]:
        assert call["type"] is torch.optim.Adam
        assert call["group"]["eps"] == 1e-5
        assert call["group"]["betas"] == (0.9, 0.999)
        assert call["group"]["weight_decay"] == 0


def test_detail_4_learning_rate_falls_linearly(script):
    """Fails when lr is not set, is less than the full rate at first, or is a step late."""
    rates = [call["group"]["lr"] for call in script(learning_rate=1.0)["step"]]
    assert rates == pytest.approx(np.repeat([1, 0.8, 0.6, 0.4, 0.2], 6))
    assert {call["group"]["lr"] for call in script(anneal_lr=False, learning_rate=0.1)["step"]} == {
        0.1
    }


def test_detail_5_gae_bootstraps_the_unfinished_segment(ppo, script):
    """Fails when next_value is left out or taken before the last step, or dones are shifted."""
    seen = script(learning_rate=1e-9)
    for i, call in enumerate(seen["gae"][:-1]):
        next_obs = torch.from_numpy(seen["act"][NUM_STEPS * (i + 1)])
        agent = seen["step"][6 * i]["before"]
        np.testing.assert_allclose(call["next_value"], agent(next_obs)[1].detach(), atol=1e-5)
        t = np.arange(NUM_STEPS * i, NUM_STEPS * (i + 1))
        np.testing.assert_array_equal(call["dones"], np.stack([(t + 1) % 6 == 0] * NUM_ENVS, 1))
    # returns = advantages + values, and the sum of discounted deltas, by its definition
    rng = np.random.default_rng(0)
    rewards, values, next_value = (
        rng.normal(size=(7, 1)),
        rng.normal(size=(7, 1)),
        rng.normal(size=1),
    )
    dones = np.zeros((7, 1), bool)
    dones[4] = True
    advantages, returns = ppo.compute_gae(rewards, values, dones, next_value, 0.9, 0.8)
    following = np.concatenate([values[1:], next_value[None]]) * ~dones
    delta = rewards + 0.9 * following - values
    for t in range(7):
        end = 5 if t < 5 else 7
        assert advantages[t] == pytest.approx(
            sum((0.9 * 0.8) ** (k - t) * delta[k] for k in range(t, end))
        )
    np.testing.assert_array_equal(returns, advantages + values)


def test_detail_6_every_sample_once_an_epoch_in_a_fresh_order(script):
    """Fails when the shuffle is left out, made once for all epochs, or with replacement."""
    calls = script()["step"]
    assert len(calls) == 5 * 3 * 2
    orders = []
    for epoch in range(5 * 3):
        samples = torch.cat([call["mb"]["obs"] for call in calls[2 * epoch : 2 * epoch + 2]])
        orders.append([tuple(sample) for sample in samples[:, :2].tolist()])
        assert len(set(orders[-1])) == NUM_STEPS * NUM_ENVS
    for rollout in range(5):
        first, second, third = orders[3 * rollout : 3 * rollout + 3]
        assert sorted(first) == sorted(second) == sorted(third)
    assert sum(a != b for a, b in zip(orders[::3], orders[1::3], strict=True)) > 2
    for call in calls:  # and the columns of a minibatch belong together
        assert call["mb"]["obs"].shape == (NUM_STEPS * NUM_ENVS // 2, 4)
        assert (
            call["mb"]["advantages"].shape
            == call["mb"]["actions"].shape
            == (NUM_STEPS * NUM_ENVS // 2,)
        )
        torch.testing.assert_close(
            call["mb"]["returns"], call["mb"]["advantages"] + call["mb"]["values"]
        )
    first = calls[0]["mb"]
    torch.testing.assert_close(agent_value(calls[0]["before"], first["obs"]), first["values"])


def agent_value(agent, obs):
    return agent(obs)[1].detach()


def test_detail_7_advantages_are_normalised_per_minibatch_by_the_population_deviation(
    ppo, minibatch
):
    """Fails without the normalisation, and with the sample's deviation.

    [0, 2] has to become [-1, 1].
    """
    agent, mb = minibatch
    mb = {name: x[:2] for name, x in mb.items()} | {"advantages": torch.tensor([0.0, 2.0])}
    ratio = by_hand(agent, mb)["ratio"]
    args = ppo.Args(clip_coef=100)
    assert ppo.ppo_loss(agent, mb, args)[1]["policy_loss"].item() == pytest.approx(
        (ratio[0] - ratio[1]) / 2, rel=1e-5
    )
    off = replace(args, norm_adv=False)
    assert ppo.ppo_loss(agent, mb, off)[1]["policy_loss"].item() == pytest.approx(
        -2 * ratio[1] / 2, rel=1e-5
    )


def test_detail_8_clipped_surrogate_objective(ppo, minibatch):
    """Fails without pg_loss2, with min for max, or with another range.

    A clipped sample has no gradient.
    """
    agent, mb = minibatch
    args = ppo.Args(norm_adv=False, ent_coef=0, vf_coef=0)
    ratio, advantages = by_hand(agent, mb)["ratio"], mb["advantages"].double().numpy()
    surrogate = np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages)
    loss, stats = ppo.ppo_loss(agent, mb, args)
    assert loss.item() == pytest.approx(-surrogate.mean(), rel=1e-5)
    assert stats["policy_loss"].item() == pytest.approx(-surrogate.mean(), rel=1e-5)
    clipped = ((ratio > 1.2) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    assert 10 < clipped.sum() < 118
    loss = ppo.ppo_loss(agent, {name: x[clipped] for name, x in mb.items()}, args)[0]
    assert all(
        not gradient.any() for gradient in torch.autograd.grad(loss, list(agent.actor.parameters()))
    )


def test_detail_9_value_loss_is_clipped_around_the_old_value(ppo, minibatch):
    """Fails without the clip, max or half, or clipped around anything but the stored value."""
    agent, mb = minibatch
    value, old, returns = (
        x.double().numpy() for x in (agent_value(agent, mb["obs"]), mb["values"], mb["returns"])
    )
    clipped = old + np.clip(value - old, -0.2, 0.2)
    expected = 0.5 * np.maximum((value - returns) ** 2, (clipped - returns) ** 2).mean()
    assert ppo.ppo_loss(agent, mb, ppo.Args())[1]["value_loss"].item() == pytest.approx(
        expected, rel=1e-5
    )
    unclipped = 0.5 * ((value - returns) ** 2).mean()
    assert expected > unclipped * 1.01
    off = ppo.Args(clip_vloss=False)
    assert ppo.ppo_loss(agent, mb, off)[1]["value_loss"].item() == pytest.approx(
        unclipped, rel=1e-5
    )


def test_detail_10_overall_loss_with_entropy_bonus(ppo, minibatch):
    """Fails when a term, its coefficient or its sign is changed."""
    agent, mb = minibatch
    loss, stats = ppo.ppo_loss(agent, mb, ppo.Args(ent_coef=0.3, vf_coef=0.7))
    entropy = by_hand(agent, mb)["entropy"].mean()
    assert stats["entropy"].item() == pytest.approx(entropy, rel=1e-5)
    expected = stats["policy_loss"].item() - 0.3 * entropy + 0.7 * stats["value_loss"].item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_detail_11_one_gradient_norm_over_all_parameters(ppo, minibatch):
    """Fails without the scale, with a norm per network, or when short gradients are lengthened."""
    agent, mb = minibatch
    for max_norm in (0.05, 1000.0):
        args = ppo.Args(max_grad_norm=max_norm)
        raw = torch.autograd.grad(ppo.ppo_loss(agent, mb, args)[0], list(agent.parameters()))
        norm = torch.cat([g.flatten() for g in raw]).norm().item()
        assert 0.05 < norm < 1000
        optimizer = torch.optim.SGD(agent.parameters(), lr=0.0)
        stats = ppo.train_step(agent, optimizer, mb, args)
        assert stats["grad_norm"].item() == pytest.approx(norm, rel=1e-5)
        for parameter, gradient in zip(agent.parameters(), raw, strict=True):
            torch.testing.assert_close(parameter.grad, gradient * min(1, max_norm / norm))


def test_detail_12_debug_variables(ppo, minibatch, script, tmp_path):
    """Fails when a statistic is wrong, or is the last minibatch's instead of the mean of all."""
    agent, mb = minibatch
    ratio = by_hand(agent, mb)["ratio"]
    stats = ppo.ppo_loss(agent, mb, ppo.Args())[1]
    assert stats["old_approx_kl"].item() == pytest.approx(-np.log(ratio).mean(), abs=1e-6)
    assert stats["approx_kl"].item() == pytest.approx((ratio - 1 - np.log(ratio)).mean(), abs=1e-6)
    assert stats["clipfrac"].item() == pytest.approx((np.abs(ratio - 1) > 0.2).mean())
    seen = script(learning_rate=0.01)
    run_dir = run_dir_of(tmp_path)
    for name in (
        "policy_loss",
        "value_loss",
        "entropy",
        "old_approx_kl",
        "approx_kl",
        "clipfrac",
        "grad_norm",
    ):
        values = np.array([call["stats"][name].item() for call in seen["step"]]).reshape(5, 6)
        steps, logged = zip(*scalars(run_dir, f"losses/{name}"), strict=True)
        assert steps == (8, 16, 24, 32, 40)
        np.testing.assert_allclose(logged, values.mean(1), rtol=1e-5, atol=1e-8)
    explained = []
    for call in seen["gae"]:
        returns = ppo.compute_gae(*call.values(), 0.99, 0.95)[1]
        explained.append(1 - np.var(returns - call["values"]) / np.var(returns))
    np.testing.assert_allclose(
        [v for _, v in scalars(run_dir, "losses/explained_variance")],
        explained,
        rtol=1e-5,
        atol=1e-6,
    )


def test_detail_13_separate_networks(ppo, minibatch):
    """Fails when policy and value share a layer, or when a layer has another size or activation."""
    agent, mb = minibatch
    assert not {id(p) for p in agent.actor.parameters()} & {
        id(p) for p in agent.critic.parameters()
    }
    for network, outputs in ((agent.actor, 2), (agent.critic, 1)):
        assert [tuple(p.shape) for p in network.parameters()] == [
            (64, 4),
            (64,),
            (64, 64),
            (64,),
            (outputs, 64),
            (outputs,),
        ]
        hidden = mb["obs"]
        for layer in [layer for layer in network.modules() if isinstance(layer, nn.Linear)]:
            output = layer(hidden)
            hidden = output.tanh()
        torch.testing.assert_close(network(mb["obs"]), output)
    gradients = torch.autograd.grad(
        agent(mb["obs"])[1].sum(), list(agent.actor.parameters()), allow_unused=True
    )
    assert gradients == (None,) * 6


def test_detail_a1_clip_range_falls_linearly_when_asked(script):
    """Fails without the line that replaces clip_coef, or when it is on by default."""
    ranges = [call["args"].clip_coef for call in script(anneal_clip=True)["step"]]
    assert ranges == pytest.approx(np.repeat([0.2, 0.16, 0.12, 0.08, 0.04], 6))
    assert {call["args"].clip_coef for call in script()["step"]} == {0.2}


def test_detail_a3_target_kl_ends_an_update_early(script):
    """Fails without the break, without the factor 1.5, or when it is on by default."""
    assert len(script(learning_rate=0.05)["step"]) == 5 * 3 * 2
    seen = script(learning_rate=0.05, anneal_lr=False)["step"]
    first_epoch = np.mean([call["stats"]["approx_kl"].item() for call in seen[:2]])
    below, above = first_epoch / 1.5 * 0.99, first_epoch / 1.5 * 1.01
    assert epochs_of_first_update(script(learning_rate=0.05, anneal_lr=False, target_kl=below)) == 1
    assert epochs_of_first_update(script(learning_rate=0.05, anneal_lr=False, target_kl=above)) > 1


def epochs_of_first_update(seen) -> int:
    first = [call for call in seen["step"] if (call["mb"]["obs"][:, 1] < NUM_STEPS).all()]
    return len(first) // 2


@pytest.mark.parametrize("bootstrap", [False, True])
def test_bootstrap_truncated_adds_the_final_value_at_time_limits_alone(script, bootstrap):
    """Fails without the line that adds the value, without gamma, or when a real end gets it."""
    for truncates in (False, True):
        seen = script(
            truncates=truncates, bootstrap_truncated=bootstrap, learning_rate=1e-9, gamma=0.9
        )
        for i, call in enumerate(seen["gae"]):
            final_obs = np.stack(seen["act"][NUM_STEPS * i : NUM_STEPS * (i + 1)]) + np.float32(
                [0, 1, 1, 0]
            )
            final_value = agent_value(
                seen["step"][0]["before"], torch.from_numpy(final_obs)
            ).numpy()
            raw = final_obs[..., 1]  # its reward is the step of its life
            expected = raw + 0.9 * final_value * call["dones"] * (truncates and bootstrap)
            np.testing.assert_allclose(call["rewards"], expected, atol=1e-4)
        assert sum(call["dones"].sum() for call in seen["gae"]) == 3 * NUM_ENVS


def test_first_minibatch_has_ratio_one(ppo, script):
    """Fails when the update's log-probabilities are not those of the policy that acted."""
    for call in script(learning_rate=0.05, num_steps=32, total_timesteps=64 * 5)["step"][::6]:
        distribution, _ = call["before"](call["mb"]["obs"])
        ratio = (distribution.log_prob(call["mb"]["actions"]) - call["mb"]["logprobs"]).exp()
        assert (ratio - 1).abs().max() < 1e-6


def test_categorical_equals_torch(ppo):
    """Fails when log_prob or entropy is wrong, or when samples do not follow the probabilities."""
    logits = torch.randn(3, 5)
    ours, theirs = ppo.Categorical(logits), torch.distributions.Categorical(logits=logits)
    action = torch.tensor([4, 0, 2])
    torch.testing.assert_close(ours.log_prob(action), theirs.log_prob(action))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    samples = ppo.Categorical(logits.repeat(100_000, 1)).sample().view(100_000, 3)
    frequency = torch.stack([(samples == a).float().mean(0) for a in range(5)], 1)
    torch.testing.assert_close(frequency, theirs.probs, rtol=0, atol=0.006)  # 4 standard deviations
