"""What a gradient step does to the weights: in every script, what PyTorch's plain Adam does."""

import copy

import pytest
import torch
from conftest import import_scripts
from torch import nn

SCRIPTS = import_scripts()


@pytest.mark.parametrize(
    "compile", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_three_steps_are_those_of_plain_adam(script, compile, monkeypatch, tmp_path):
    """Fails when gradients lie in memory otherwise than their weights.

    Fused Adam pairs them by address.
    """
    monkeypatch.chdir(tmp_path)
    twins, differences, train_step = [], [], script.train_step

    def spy(agent, optimizer, mb, args):
        lr = optimizer.param_groups[0]["lr"]
        if not twins:
            twin = copy.deepcopy(agent)
            twins.extend(
                (
                    twin,
                    torch.optim.Adam(twin.parameters(), lr, eps=1e-5, foreach=False, fused=False),
                )
            )
        twin, plain = twins
        plain.zero_grad()
        script.ppo_loss(twin, mb, args)[0].backward()
        nn.utils.clip_grad_norm_(twin.parameters(), args.max_grad_norm)
        plain.step()
        stats = train_step(agent, optimizer, mb, args)
        for ours, plains in zip(agent.parameters(), twin.parameters(), strict=True):
            differences.append((ours - plains).abs().max().item() / lr)
        return stats

    monkeypatch.setattr(script, "train_step", spy)
    sizes = dict(num_envs=2, num_steps=16, num_minibatches=1, update_epochs=3, total_timesteps=32)
    script.main(script.Args(**sizes, compile=compile, torch_deterministic=False, cuda=False))
    assert len(differences) == 3 * len(list(twins[0].parameters()))
    # in learning rates; a step is about one of them
    assert max(differences) < 0.1, max(differences)
