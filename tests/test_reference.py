"""ppo.py computes what openai/baselines computed.

Advantages bit for bit, 20 updates to 5e-7 in every weight.
"""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

REFERENCE = Path(__file__).parent / "reference"
SPACES = gym.spaces.Box(-np.inf, np.inf, (4,)), gym.spaces.Discrete(2)


@pytest.mark.parametrize("case", range(7))
@pytest.mark.parametrize("rollout", range(2))
def test_gae_equals_baselines(ppo, case, rollout):
    """Fails without `* goes_on` in delta or discount, without next_value, or with float32 sums."""
    reference = np.load(REFERENCE / "gae.npz")
    of = {
        name: reference[f"case{case}/{name}"][rollout]
        for name in ("rewards", "values", "dones", "final_dones")
    }
    last_values, gamma, lam = (
        reference[f"case{case}/{name}"] for name in ("last_values", "gamma", "lam")
    )
    # ended before step t+1 = ended by action t
    dones = np.concatenate([of["dones"][1:], of["final_dones"][None]])
    advantages, returns = ppo.compute_gae(
        of["rewards"], of["values"], dones, last_values[rollout], float(gamma), float(lam)
    )
    np.testing.assert_array_equal(advantages, reference[f"case{case}/advantages"][rollout])
    np.testing.assert_array_equal(returns, reference[f"case{case}/returns"][rollout])


def load_weights(agent, reference, stage: str) -> dict[str, torch.Tensor]:
    """Baselines' weights at a stage ("w0", "w1", ...) by this Agent's names, transposed."""
    names = {"pi/mlp_fc0": "actor.0", "pi/mlp_fc1": "actor.2", "pi": "actor.4"}
    names |= {"vf/mlp_fc0": "critic.0", "vf/mlp_fc1": "critic.2", "vf": "critic.4"}
    weights = {}
    for theirs, ours in names.items():
        weights[f"{ours}.weight"] = torch.from_numpy(reference[f"{stage}/{theirs}/w"].T.copy())
        weights[f"{ours}.bias"] = torch.from_numpy(reference[f"{stage}/{theirs}/b"])
    assert weights.keys() == agent.state_dict().keys()
    return weights


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_twenty_updates_equal_baselines(ppo, compile):
    """Fails with any other loss, coefficient, clip, normalisation, gradient clipping or optimizer.

    Tried one at a time: the sample's instead of the population's standard deviation is the
    smallest change, 2e-6.
    """
    reference = np.load(REFERENCE / "ppo_update_mlp_discrete.npz")
    args = ppo.Args(compile=compile)
    for name in ("ent_coef", "vf_coef", "max_grad_norm"):
        assert getattr(args, name) == reference[name]
    agent = ppo.Agent(*SPACES)
    agent.load_state_dict(load_weights(agent, reference, "w0"))
    optimizer = torch.optim.Adam(agent.parameters(), fused=True)
    for k in range(20):
        assert reference["cliprange"][k] == args.clip_coef
        optimizer.param_groups[0]["lr"] = reference["lr"][k]
        # see reference/README.md
        optimizer.param_groups[0]["eps"] = 1e-5 / (1 - 0.999 ** (k + 1)) ** 0.5
        mb = {
            name: torch.from_numpy(reference[name][k])
            for name in ("obs", "actions", "values", "returns")
        }
        mb["advantages"] = mb["returns"] - mb["values"]
        mb["logprobs"] = -torch.from_numpy(reference["neglogpacs"][k])
        stats = ppo.train_step(agent, optimizer, mb, args)

        theirs = dict(zip(reference["stat_names"], reference["stats"][k], strict=True))
        ours = {name: stats[name].item() for name in ("policy_loss", "value_loss", "clipfrac")}
        ours["policy_entropy"] = stats["entropy"].item()
        for name, value in ours.items():
            assert value == pytest.approx(theirs[name], abs=1e-6, rel=1e-6), (k, name)
        assert stats["grad_norm"].item() == pytest.approx(reference["grad_norm"][k], rel=1e-5)
        if f"w{k + 1}/vf/b" in reference:
            for name, weight in load_weights(agent, reference, f"w{k + 1}").items():
                torch.testing.assert_close(agent.state_dict()[name], weight, rtol=0, atol=5e-7)


def test_forward_equals_baselines(ppo):
    """Fails without tanh, with a wrong entropy, or with log-probabilities of the wrong action."""
    reference = np.load(REFERENCE / "ppo_update_mlp_discrete.npz")
    agent = ppo.Agent(*SPACES)
    agent.load_state_dict(load_weights(agent, reference, "w0"))
    distribution, value = agent(torch.from_numpy(reference["obs"][0]))
    logprobs = torch.from_numpy(reference["fwd0/pi"]).log_softmax(-1)
    torch.testing.assert_close(distribution.logprobs, logprobs, rtol=0, atol=1e-6)
    torch.testing.assert_close(value, torch.from_numpy(reference["fwd0/vf"]), rtol=0, atol=1e-6)
    neglogp = -distribution.log_prob(torch.from_numpy(reference["actions"][0]))
    torch.testing.assert_close(
        neglogp, torch.from_numpy(reference["fwd0/neglogp"]), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        distribution.entropy(), torch.from_numpy(reference["fwd0/entropy"]), rtol=0, atol=1e-6
    )
