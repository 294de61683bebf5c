"""What would make a GPU wait or fail, found without one: tensors of the device "meta" hold no data.

A hidden .item(), a loop over a tensor or a tensor on the wrong device raises there.
"""

import contextlib

import pytest
import torch
from conftest import import_scripts, record, train_in

MODULES = import_scripts()
SIZES = dict(num_envs=4, num_steps=16, num_minibatches=2, update_epochs=1, total_timesteps=64)


@pytest.fixture(scope="module", params=MODULES)
def recorded(request, tmp_path_factory):
    """-> a script, its agent's spaces, and a minibatch of its own."""
    script = MODULES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    _, minibatches, spaces = record(script, folder, **SIZES)
    return script, spaces, minibatches[0]


@pytest.fixture
def no_half_precision(monkeypatch):
    """autocast does not know the device, and does nothing without --amp."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())


def move_to_meta(mb: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The minibatch without its data, but for an LSTM's starts, which are read on the host."""
    return {key: x if key == "starts" else x.to("meta") for key, x in mb.items()}


@pytest.mark.usefixtures("no_half_precision")
def test_acting_waits_for_nothing(recorded):
    """Fails when an action's computation needs a number on the host."""
    script, spaces, mb = recorded
    agent = script.Agent(*spaces).to("meta")
    inputs = []
    for key in agent.inputs:
        x = agent.initial_state(4) if key == "state" else mb[key][:4]
        inputs.append(x if key == "starts" else x.to("meta"))
    with torch.inference_mode():
        results = agent.act(*inputs)
    assert all(x.device.type == "meta" for x in results)


@pytest.mark.usefixtures("no_half_precision")
def test_a_gradient_waits_for_nothing(recorded):
    """Fails when loss, gradient or clipping needs a number on the host."""
    script, spaces, mb = recorded
    agent = script.Agent(*spaces).to("meta")
    args = script.Args(**SIZES)
    stats = script.clipped_gradient(agent, move_to_meta(mb), args)
    assert all(x.device.type == "meta" for x in stats.values())
    assert all(p.grad is not None for p in agent.parameters())


@pytest.mark.usefixtures("no_half_precision")
def test_meta_notices_a_wait(recorded, monkeypatch):
    """Fails when the two tests above could not fail."""
    script, spaces, mb = recorded
    agent = script.Agent(*spaces).to("meta")
    loss = script.ppo_loss

    def ppo_loss(*given):
        total, stats = loss(*given)
        return total, stats | {"policy_loss": torch.tensor(stats["policy_loss"].item())}

    monkeypatch.setattr(script, "ppo_loss", ppo_loss)
    with pytest.raises(RuntimeError, match="meta"):
        script.clipped_gradient(agent, move_to_meta(mb), script.Args(**SIZES))


def count_compilations(script, folder, **args) -> int:
    """Trains with --compile -> how often the gradient was compiled."""
    script.compiled_gradient.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = dict(compile=True, anneal_clip=True, cuda=False)
    train_in(script, folder, **SIZES | compiled | args)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODULES if name != "ppo_atari_lstm"])
def test_one_compilation_is_enough(name, tmp_path):
    """Fails when an annealed clip range or a rollout with fewer samples compiles anew."""
    few = count_compilations(MODULES[name], tmp_path / "few", total_timesteps=128)
    many = count_compilations(MODULES[name], tmp_path / "many", total_timesteps=640)
    assert few == many
