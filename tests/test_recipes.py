"""The diffs of docs/recipes.md apply to the scripts as they are, train, and do what is said."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, load, run, run_dir_of, scalars, train_in
from gymnasium.utils.env_checker import check_env

TINY = ["--num-envs", 2, "--num-steps", 16, "--num-minibatches", 2, "--update-epochs", 1]


def recipes() -> dict[str, tuple[str, str]]:
    """docs/recipes.md -> {name of the copy: (name of the script, diff)}."""
    found = {}
    text = (ROOT / "docs" / "recipes.md").read_text()
    for diff in re.findall(r"^```diff\n(.*?)^```$", text, re.M | re.S):
        script, copy = re.match(r"--- (\S+)\n\+\+\+ (\S+)\n", diff).groups()
        found[copy] = (script, diff)
    return found


@pytest.fixture
def apply(tmp_path):
    """apply(name of the copy) -> the script with the recipe in it, in a folder of its own."""

    def apply_to_copy(name: str) -> Path:
        script, diff = recipes()[name]
        shutil.copy(ROOT / script, tmp_path / name)
        result = subprocess.run(
            ["git", "apply", "-p0", "--verbose", "-"],
            cwd=tmp_path,
            input=diff,
            # The folder is not to be taken for part of a repository around it.
            env=os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent), "LC_ALL": "C"},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        # git knows no fuzz, but it would look for a hunk at other lines.
        assert "offset" not in result.stderr, (
            f"{result.stderr}\n{script} has other line numbers than docs/recipes.md: "
            "run `python tools/refresh_recipes.py`"
        )
        return tmp_path / name

    return apply_to_copy


@pytest.mark.parametrize("name", recipes())
def test_refresh_recipes_gives_a_diff_its_line_numbers(name):
    """Fails when the tool changes more of a diff than where its hunks begin."""
    spec = importlib.util.spec_from_file_location("refresh", ROOT / "tools" / "refresh_recipes.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    _, diff = recipes()[name]
    moved = re.sub(r"^@@ -(\d+),", lambda hunk: f"@@ -{int(hunk[1]) + 7},", diff, flags=re.M)
    assert moved != diff
    assert tool.refresh(moved) == diff


def train(copy: Path, *args: object) -> dict:
    """Runs the copy in its folder, where it is the only run -> its checkpoint."""
    result = run(str(copy), *args, cwd=copy.parent, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    return load(run_dir_of(copy.parent))


def import_copy(copy: Path):
    """-> the copy as a module."""
    spec = importlib.util.spec_from_file_location(copy.stem, copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def new_agent(module):
    """An agent of an Atari script with four actions, of the same weights in every call."""
    torch.manual_seed(0)
    return module.Agent(gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), gym.spaces.Discrete(4))


def test_every_recipe_is_tested():
    """Fails when docs/recipes.md has a recipe more, or one less, than this file."""
    assert list(recipes()) == ["my_rnd.py", "my_resnet.py", "my_corridor.py", "my_n_step.py"]


def test_rnd_trains_the_predictor_and_nothing_else_of_it(apply):
    """Fails when the target learns or the predictor does not, or when a checkpoint lacks a part."""
    copy = apply("my_rnd.py")
    before = train(copy, *TINY, "--total-timesteps", 32)
    run_dir = run_dir_of(copy.parent)
    after = train(copy, "--resume", run_dir, "--total-timesteps", 96)
    assert (before["iteration"], after["iteration"]) == (1, 3)

    old, new = before["agent"], after["agent"]
    targets = [name for name in old if name.startswith("rnd.target.")]
    predictors = [name for name in old if name.startswith("rnd.predictor.")]
    assert len(targets) == len(predictors) == 8
    for name in targets:
        assert torch.equal(old[name], new[name]), name
    for name in predictors:
        assert not torch.equal(old[name], new[name]), name
    assert not torch.equal(old["actor.weight"], new["actor.weight"])

    # The running statistics went on where they were
    assert (old["rnd.rollouts"], new["rnd.rollouts"]) == (1, 3)
    assert not torch.equal(old["rnd.pixel_mean"], new["rnd.pixel_mean"])
    assert new["rnd.return_var"] > 0

    # The predictor's learning rate is not annealed; in iteration 3 of 3, the policy's is
    policy_group, rnd_group = after["optimizer"]["param_groups"]
    assert len(rnd_group["params"]) == 8
    assert rnd_group["lr"] == 1e-4
    assert policy_group["lr"] == pytest.approx(2.5e-4 / 3)
    assert len(scalars(run_dir, "losses/rnd_loss")) == 3


def test_rnd_pays_the_bonus_of_what_a_step_led_to(apply, monkeypatch):
    """Fails when the bonus is not added to the rewards, or is that of other observations."""
    copy = apply("my_rnd.py")
    module = import_copy(copy)
    bonus, compute_gae, train_step = module.RND.bonus, module.compute_gae, module.train_step
    seen = {}

    def spy_bonus(self, next_obs, gamma):
        seen["next_obs"] = next_obs.clone()
        seen["bonus"] = bonus(self, next_obs, gamma)
        return seen["bonus"]

    def spy_gae(rewards, *others):
        seen["rewards"] = rewards.copy()
        return compute_gae(rewards, *others)

    def spy_step(agent, optimizer, mb, args):
        seen["obs"] = mb["obs"]
        return train_step(agent, optimizer, mb, args)

    monkeypatch.setattr(module.RND, "bonus", spy_bonus)
    monkeypatch.setattr(module, "compute_gae", spy_gae)
    monkeypatch.setattr(module, "train_step", spy_step)
    monkeypatch.setattr(torch, "randperm", lambda n, device: torch.arange(n, device=device))
    sizes = dict(num_envs=2, num_steps=16, num_minibatches=1, update_epochs=1, total_timesteps=32)
    train_in(module, copy.parent, **sizes, int_coef=0.25, cuda=False)

    assert seen["bonus"].shape == (16, 2)
    assert seen["bonus"].min() > 0
    game = seen["rewards"] - 0.25 * seen["bonus"]  # clipped to their sign
    np.testing.assert_allclose(game, game.round(), atol=1e-5)

    obs = seen["obs"].unflatten(0, (16, 2))
    assert torch.equal(seen["next_obs"][:-1], obs[1:])
    assert not torch.equal(seen["next_obs"][-1], obs[-1])


def test_rnd_pays_less_for_what_it_knows(apply):
    """Fails when the bonus does not tell a frame that was learned from a new one."""
    module = import_copy(apply("my_rnd.py"))
    agent = new_agent(module)
    known, new = torch.randint(0, 256, (2, 8, 4, 84, 84), dtype=torch.uint8)
    agent.rnd.bonus(torch.stack([known, new]), 0.99)  # both are in the statistics
    optimizer = torch.optim.Adam(agent.rnd.predictor.parameters(), lr=1e-4)
    for _ in range(50):
        optimizer.zero_grad()
        agent.rnd(known).mean().backward()
        optimizer.step()
    bonus_of_known, bonus_of_new = agent.rnd.bonus(torch.stack([known, new]), 0.99)
    assert bonus_of_known.max() < 0.5 * bonus_of_new.min()


def test_rnd_does_not_touch_the_gradient_of_the_policy(apply):
    """Fails when RND's gradient counts in the norm of the policy's, or the target is not frozen."""
    module = import_copy(apply("my_rnd.py"))
    agent = new_agent(module)
    everything = set(agent.parameters())
    rnd = set(agent.rnd.parameters())
    assert set(agent.policy_parameters()) == everything - rnd
    assert not any(weight.requires_grad for weight in agent.rnd.target.parameters())

    mb = {
        "obs": torch.randint(0, 256, (8, 4, 84, 84), dtype=torch.uint8),
        "actions": torch.randint(0, 4, (8,)),
    }
    for name in ("logprobs", "values", "advantages", "returns"):
        mb[name] = torch.randn(8)
    stats = module.clipped_gradient(agent, mb, module.Args())
    squares = [p.grad.square().sum() for p in agent.policy_parameters()]
    assert stats["grad_norm"] > 0.5
    assert torch.stack(squares).sum().sqrt().item() == pytest.approx(0.5, rel=1e-3)


def test_residual_blocks_learn(apply):
    """Fails when the blocks are not in the network, or their normalisation does not learn."""
    agent = train(apply("my_resnet.py"), *TINY, "--total-timesteps", 64)["agent"]
    norms = [name for name in agent if re.fullmatch(r"network\.\d+\.layers\.[03]\.weight", name)]
    assert len(norms) == 4
    for name in norms:
        assert agent[name].shape == (64, 7, 7)
        assert not torch.equal(agent[name], torch.ones(64, 7, 7)), name


def test_residual_blocks_are_initialised_and_treat_each_sample_alone(apply):
    """Fails when the loop of detail 2 misses the blocks, or with normalisation over the batch."""
    module = import_copy(apply("my_resnet.py"))
    agent = new_agent(module)
    blocks = [layer for layer in agent.modules() if isinstance(layer, module.ResidualBlock)]
    assert len(blocks) == 2
    for block in blocks:
        for layer in (block.layers[2], block.layers[5]):
            rows = layer.weight.detach().flatten(1)
            torch.testing.assert_close(rows @ rows.T, 2 * torch.eye(64), atol=1e-4, rtol=0)
            assert not layer.bias.any()

        x = torch.randn(3, 64, 7, 7)
        with torch.no_grad():
            torch.testing.assert_close(block(x), x + block.layers(x))
            assert not torch.allclose(block(x), x)

    obs = torch.randint(0, 256, (8, 4, 84, 84), dtype=torch.uint8)
    with torch.no_grad():
        _, value = agent(obs)
        _, value_of_two = agent(obs[:2])
    torch.testing.assert_close(value[:2], value_of_two, atol=1e-4, rtol=1e-4)


def test_corridor_is_the_environment_and_is_learned(apply):
    """Fails when another environment is trained, or when the corridor cannot be learned."""
    args = ["--num-steps", 32, "--learning-rate", 2.5e-3, "--total-timesteps", 8192]
    checkpoint = train(apply("my_corridor.py"), *args)
    assert checkpoint["args"]["env_id"] == "Corridor-v0"
    returns = np.array(checkpoint["recent_returns"])
    assert len(returns) == 100

    # Each step costs 0.1 but the one that finds the lamp, which pays 1; 50 steps are the limit
    possible = np.append(1 - 0.1 * np.arange(50), -5)
    distances = np.abs(returns[:, None] - possible).min(1)
    assert distances.max() < 1e-4
    assert returns.mean() > 0.4  # the best is 0.7, playing at random gets less than -1


def test_corridor_passes_the_checker_and_follows_its_seed(apply):
    """Fails when Gymnasium's checker has an objection, or when the seed does not decide."""
    import_copy(apply("my_corridor.py"))
    env = gym.make("Corridor-v0")
    assert env.spec.max_episode_steps == 50
    check_env(env.unwrapped, skip_render_check=True)
    first, _ = env.reset(seed=3)
    for _ in range(5):
        env.reset()
    again, _ = env.reset(seed=3)
    np.testing.assert_array_equal(first, again)


def test_n_step_returns_equal_their_definition(apply):
    """Fails when a return counts another reward, another value, or goes over an episode's end."""
    module = import_copy(apply("my_n_step.py"))
    rng = np.random.default_rng(0)
    T, N, gamma = 12, 3, 0.9
    rewards = rng.normal(size=(T, N)).astype(np.float32)
    values = rng.normal(size=(T, N)).astype(np.float32)
    next_value = rng.normal(size=N).astype(np.float32)
    dones = rng.random((T, N)) < 0.2
    assert dones.any()

    for n in (1, 3, 5, 100):
        expected = np.zeros((T, N))
        for i in range(N):
            for start in range(T):
                discount = 1.0
                for t in range(start, min(start + n, T)):
                    expected[start, i] += discount * rewards[t, i]
                    discount *= gamma
                    if dones[t, i]:
                        break
                else:
                    last = t + 1
                    value = values[last, i] if last < T else next_value[i]
                    expected[start, i] += discount * value
        advantages, returns = module.compute_n_step(rewards, values, dones, next_value, gamma, n)
        np.testing.assert_allclose(returns, expected, atol=1e-5)
        np.testing.assert_allclose(advantages, expected - values, atol=1e-5)

    # As docs/recipes.md says
    original = import_copy(ROOT / recipes()["my_n_step.py"][0])
    for n, gae_lambda in ((1, 0), (T, 1)):
        ours = module.compute_n_step(rewards, values, dones, next_value, gamma, n)
        gae = original.compute_gae(rewards, values, dones, next_value, gamma, gae_lambda)
        np.testing.assert_allclose(ours, gae, atol=1e-5)


def test_training_with_one_step_returns_is_training_with_lambda_0(apply):
    """Fails when training takes its advantages from elsewhere, or --return-steps has no effect."""
    copy = apply("my_n_step.py")
    weights = train(copy, *TINY, "--total-timesteps", 64, "--return-steps", 1)["agent"]

    original = import_copy(ROOT / recipes()[copy.name][0])
    sizes = dict(num_envs=2, num_steps=16, num_minibatches=2, update_epochs=1, total_timesteps=64)
    of_lambda = {}
    for gae_lambda in (0, 1):
        folder = copy.parent / f"lambda {gae_lambda}"
        run_dir = train_in(original, folder, **sizes, gae_lambda=gae_lambda, cuda=False)
        of_lambda[gae_lambda] = load(run_dir)["agent"]

    for name, weight in weights.items():
        torch.testing.assert_close(weight, of_lambda[0][name], atol=1e-5, rtol=0)
    assert not torch.allclose(weights["actor.0.weight"], of_lambda[1]["actor.0.weight"], atol=1e-5)
