"""Whoever copies a script and changes one thing gets what the change says, in all eight scripts."""

import copy
import signal
import sys
import types
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import import_scripts
from torch import nn

MODULES = import_scripts()
SCRIPTS = list(MODULES)
SIZES = dict(num_envs=2, num_steps=16, num_minibatches=1, update_epochs=1, total_timesteps=32)


@pytest.fixture(params=SCRIPTS)
def script(request):
    """The module of each script."""
    return MODULES[request.param]


@pytest.fixture
def minibatch(script, tmp_path, monkeypatch):
    """-> (agent, mb): a copy of the agent before its first gradient step, and its minibatch."""
    if script.__name__ not in recorded():
        monkeypatch.chdir(tmp_path)
        train_step = script.train_step

        def spy(agent, optimizer, mb, args):
            recorded()[script.__name__] = (copy.deepcopy(agent), mb)
            return train_step(agent, optimizer, mb, args)

        monkeypatch.setattr(script, "train_step", spy)
        script.main(script.Args(**SIZES, cuda=False))
    agent, mb = recorded()[script.__name__]
    return copy.deepcopy(agent), mb


@cache
def recorded() -> dict:
    """{script: (agent, mb)}, made once for all tests of this file."""
    return {}


def outputs(agent: nn.Module, mb: dict) -> torch.Tensor:
    """Log-probabilities of the minibatch's actions and values, in one row."""
    inputs = [mb["lstm_state" if name == "state" else name] for name in agent.inputs]
    with torch.no_grad():
        distribution, value, *_ = agent(*inputs)
        return torch.cat([distribution.log_prob(mb["actions"]), value])


class Halved(nn.Module):
    """A layer whose output is half of what it was."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *inputs):
        output = self.layer(*inputs)
        if isinstance(output, tuple):  # an LSTM's output and state
            return output[0] / 2, output[1]
        return output / 2


def test_what_the_network_shows_is_what_runs(minibatch):
    """Fails when a layer is only decoration: replaced by another, the outputs stay as they were."""
    agent, mb = minibatch
    nn.init.normal_(list(agent.actor.parameters())[-1])  # so that all that is below it shows
    before = outputs(agent, mb)
    layers = [name for name, layer in agent.named_modules() if not list(layer.children())]
    assert len(layers) >= 8
    for name in layers:
        if isinstance(agent.get_submodule(name), nn.Flatten):
            continue
        changed = copy.deepcopy(agent)
        parent, _, child = name.rpartition(".")
        setattr(changed.get_submodule(parent), child, Halved(changed.get_submodule(name)))
        assert not torch.equal(outputs(changed, mb), before), name


def test_swapping_an_activation_changes_the_outputs(minibatch):
    """Fails when an activation is written twice, and only one of the two runs."""
    agent, mb = minibatch
    before = outputs(agent, mb)
    swapped = 0
    for parent in list(agent.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Tanh | nn.ReLU):
                setattr(parent, name, nn.Sigmoid())
                swapped += 1
    assert swapped >= 2
    assert (outputs(agent, mb) - before).abs().max() > 1e-4


@pytest.mark.parametrize(
    "compile", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
def test_the_gradient_step_survives_ordinary_changes(script, minibatch, compile, monkeypatch):
    """Fails when a frozen module or an unused head raises, or a second group is not trained."""
    agent, mb = minibatch
    agent.frozen = nn.Linear(3, 3).requires_grad_(False)
    agent.unused = nn.Linear(3, 3)
    agent.bonus = nn.Parameter(torch.ones(5))
    ppo_loss = script.ppo_loss

    def loss_with_bonus(agent, mb, args):
        loss, stats = ppo_loss(agent, mb, args)
        return loss + agent.bonus.square().sum() + agent.frozen(agent.bonus[:3]).sum(), stats

    monkeypatch.setattr(script, "ppo_loss", loss_with_bonus)
    first = [p for name, p in agent.named_parameters() if name != "bonus"]
    groups = [{"params": first, "lr": 0.001}, {"params": [agent.bonus], "lr": 0.1}]
    optimizer = torch.optim.Adam(groups, fused=True)
    before = copy.deepcopy(agent.state_dict())
    args = script.Args(**SIZES, compile=compile)
    for _ in range(2):
        stats = script.train_step(agent, optimizer, mb, args)
    assert all(value.isfinite() for value in stats.values())
    for name, weight in agent.state_dict().items():
        moved = not torch.equal(weight, before[name])
        assert moved == (not name.startswith(("frozen", "unused"))), name
    assert (agent.bonus - 0.8).abs().max() < 0.05  # two steps of its own learning rate


def test_a_new_argument_is_free(script):
    """Fails when a limit is demanded of an argument that nobody named."""

    @dataclass
    class MyArgs(script.Args):
        int_coef: float = 0.0
        """weight of an intrinsic bonus"""
        warmup: int = 0
        """iterations without it"""
        shift: float = -1e15
        """anything"""

    args = MyArgs(warmup=0, int_coef=0.0)
    assert (args.int_coef, args.warmup, args.shift) == (0.0, 0, -1e15)
    with pytest.raises(SystemExit):
        MyArgs(gamma=1.5)


def test_initialisation_reaches_nested_modules(script, monkeypatch):
    """Fails when only a network's outermost layers are initialised, or when a LayerNorm raises."""
    first_line = "        super().__init__()\n\n"
    inner = "nn.Sequential(nn.Linear(8, 8, bias=False), nn.LayerNorm(8))"
    block = f"nn.Sequential({inner}, nn.Conv2d(1, 1, 1))"
    source = Path(script.__file__).read_text()
    begin = source.index("class Agent(nn.Module)")
    agent_source = source[begin:].replace(
        first_line, f"{first_line}        self.extra = {block}\n", 1
    )
    assert agent_source != source[begin:]
    copied = types.ModuleType("copied")
    monkeypatch.setitem(sys.modules, "copied", copied)
    copied.__file__ = script.__file__
    exec(compile(source[:begin] + agent_source, script.__file__, "exec"), copied.__dict__)

    agent = copied.Agent(*spaces(script))
    linear, norm = agent.extra[0]
    assert linear.bias is None and not agent.extra[1].bias.any()
    assert torch.equal(norm.weight, torch.ones(8))
    weight = linear.weight.detach()
    if script.__name__ == "ppo_procgen":  # Glorot's uniform weights, as baselines has them
        assert 0.9 * (6 / 16) ** 0.5 < weight.abs().max() <= (6 / 16) ** 0.5
    else:
        torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(8), rtol=0, atol=1e-5)


def spaces(script) -> tuple:
    """The observation and the action space of a script's default environment."""
    envs = script.make_envs(script.Args(num_envs=1, num_minibatches=1))
    envs.close()
    return envs.single_observation_space, envs.single_action_space


def test_main_gives_back_what_it_set_for_the_process(script, tmp_path, monkeypatch):
    """Fails when a notebook's Ctrl-C, number of threads or kind of algorithms is another after."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def mine(signum, frame):
        pass

    old_sigint = signal.signal(signal.SIGINT, mine)
    old_sigterm = signal.signal(signal.SIGTERM, mine)
    try:
        torch.set_num_threads(2)
        torch.use_deterministic_algorithms(False)
        script.main(script.Args(**SIZES, cuda=False))
        assert signal.getsignal(signal.SIGINT) is mine
        assert signal.getsignal(signal.SIGTERM) is mine
        assert torch.get_num_threads() == 2
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory
    finally:
        signal.signal(signal.SIGINT, old_sigint)
        signal.signal(signal.SIGTERM, old_sigterm)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("wanted", [None, "2"])
@pytest.mark.parametrize(
    "name", ["ppo", "ppo_continuous_action", "ppo_multidiscrete", "ppo_multidiscrete_mask"]
)
def test_small_layers_are_computed_on_one_thread(name, wanted, tmp_path, monkeypatch):
    """Fails without use_one_thread, or when it overrules OMP_NUM_THREADS."""
    script = MODULES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if wanted is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    seen = set()
    train_step = script.train_step

    def spy(*inputs):
        seen.add(torch.get_num_threads())
        return train_step(*inputs)

    monkeypatch.setattr(script, "train_step", spy)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        script.main(script.Args(**SIZES, cuda=False))
    finally:
        torch.set_num_threads(threads)
    assert seen == {int(wanted or 1)}
