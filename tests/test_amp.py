"""--amp: the convolutional networks compute in bfloat16, all else in float32."""

import evaluate
import pytest
import torch
from conftest import import_scripts, load, train_in

MODULES = import_scripts()
NAMES = ("ppo_atari", "ppo_atari_envpool", "ppo_atari_lstm", "ppo_procgen")
SIZES = dict(num_envs=4, num_steps=16, num_minibatches=2, update_epochs=2, total_timesteps=128)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def seen(name, monkeypatch):
    """{layer: type of its output}, and the types of what losses are made of, as training goes."""
    script = MODULES[name]
    types = {}
    loss = script.ppo_loss

    def spy(layer):
        def look(module, args, output):
            value = output[0] if isinstance(output, tuple) else output
            types.setdefault(layer, set()).add(value.dtype)

        return look

    def ppo_loss(agent, mb, args):
        hooks = []
        for layer, module in agent.named_modules():
            if not list(module.children()):
                hooks.append(module.register_forward_hook(spy(layer)))
        total, stats = loss(agent, mb, args)
        for hook in hooks:
            hook.remove()
        types.setdefault("loss", set()).update({total.dtype, *(x.dtype for x in stats.values())})
        return total, stats

    monkeypatch.setattr(script, "ppo_loss", ppo_loss)
    return types


@pytest.mark.parametrize("amp", [False, True])
def test_only_the_network_is_in_half_precision(name, seen, tmp_path, amp):
    """Fails when --amp does nothing, is on without being asked, or reaches heads and losses."""
    run_dir = train_in(MODULES[name], tmp_path, **SIZES, amp=amp, cuda=False)
    for layer, types in seen.items():
        in_network = layer.startswith("network.")
        expected = torch.bfloat16 if amp and in_network else torch.float32
        assert types == {expected}, (layer, types)
    assert len(seen) > 8
    weights = load(run_dir)["agent"]
    assert all(x.dtype == torch.float32 for x in weights.values())


def test_the_first_ratio_is_one(name, tmp_path, monkeypatch):
    """Fails when acting and learning round in different ways."""
    script = MODULES[name]
    ratios = []
    log_prob = script.Categorical.log_prob
    loss = script.ppo_loss

    def ppo_loss(agent, mb, args):
        def compare(distribution, action):
            logprob = log_prob(distribution, action)
            ratios.append((logprob - mb["logprobs"]).exp().detach())
            return logprob

        with monkeypatch.context() as patch:
            patch.setattr(script.Categorical, "log_prob", compare)
            return loss(agent, mb, args)

    monkeypatch.setattr(script, "ppo_loss", ppo_loss)
    # The second update's weights are no longer the first ones, all of whose actions are as likely
    train_in(script, tmp_path, **SIZES, amp=True, learning_rate=1e-3, cuda=False)
    assert len(ratios) == 8
    for first in (ratios[0], ratios[4]):
        assert (first - 1).abs().max() < 1e-2
    assert (ratios[7] - 1).abs().max() > 1e-4


def test_the_same_bits_twice(name, tmp_path):
    """Fails when half precision makes a run that nobody can repeat."""
    runs = [train_in(MODULES[name], tmp_path / str(i), **SIZES, amp=True) for i in (1, 2)]
    first, second = (load(run_dir)["agent"] for run_dir in runs)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("amp", [False, True])
def test_an_agent_plays_in_the_precision_it_learned_in(tmp_path, monkeypatch, amp):
    """Fails when evaluate.py plays with another policy than the one that was trained."""
    options = dict(env_id="Breakout-v5", amp=amp, cuda=False)
    run_dir = train_in(MODULES["ppo_atari_envpool"], tmp_path, **SIZES, **options)
    types = set()
    play = evaluate.play

    def play_and_look(agent, *others):
        agent.network[0].register_forward_hook(lambda layer, args, out: types.add(out.dtype))
        return play(agent, *others)

    monkeypatch.setattr(evaluate, "play", play_and_look)
    evaluate.evaluate(evaluate.Args(run_dir, episodes=1))
    assert types == {torch.bfloat16 if amp else torch.float32}


@pytest.mark.slow
def test_compiled_half_precision(name, tmp_path):
    """Fails when --compile loses the half precision, or is further from float32 than without it.

    Compiled, other numbers are rounded to bfloat16, and max-pooling amplifies what that changes.
    """
    ends = []
    for number, options in enumerate(({}, {"amp": True}, {"amp": True, "compile": True})):
        folder = tmp_path / str(number)
        run_dir = train_in(MODULES[name], folder, **SIZES, **options, cuda=False)
        weights = load(run_dir)["agent"].values()
        ends.append(torch.cat([weight.flatten() for weight in weights]))
    in_float32, eager, compiled = ends
    distance = (eager - in_float32).abs().max()
    assert distance > 1e-5
    assert 0.1 * distance < (compiled - in_float32).abs().max() < 3 * distance
